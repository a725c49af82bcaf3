"""A traced graph cut into segments that run one after another, anywhere.

    boundaries [5, 9]        ops 0…4 │ 5…8 │ 9…

    first, second, third = traced.segment([5, 9])
    values = first.callable()({name: tensor for ...})

What a segment gives on (`live_out`) is every value that any later segment needs: a skip connection
passes through the segments between. *Free* values (`free_values`), those that no parameter, no
random choice and no costly operation enters, are computed again wherever they are needed, sizes
above all; so only tensors live across a cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import SymBool, SymFloat, SymInt, Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from shoal.errors import Refused
from shoal.trace.aliases import Sharing, is_getitem, written_by
from shoal.trace.emit import emit
from shoal.trace.normalise import op_name

Values = dict[str, Any]

# Operations that cost more than a pass over their result: never computed twice.
_COSTLY = (
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv", "lstm", "gru", "rnn",
    "attention", "svd", "eig", "qr", "inverse", "solve", "fft", "sort", "topk", "embedding",
)  # fmt: skip
_RANDOM = (
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli",
    "multinomial", "normal", "uniform", "exponential", "dropout", "rrelu", "gumbel",
)  # fmt: skip


@dataclass
class Segment:
    """One piece of a traced graph, with placeholders of its own.

    Placeholders carry the names that the whole graph has for them: those of ``state`` (placeholder
    → qualified name), ``constants`` (placeholder → tensor), ``inputs`` (model inputs) and
    ``live_in``. ``outputs`` are the names of the model's outputs that the last segment gives.
    """

    graph: Graph
    state: dict[str, str]
    constants: dict[str, Tensor]
    inputs: tuple[str, ...]
    live_in: tuple[str, ...]
    live_out: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    nodes: tuple[str, ...] = field(default=(), repr=False)  # the ops that are its own

    def callable(self) -> Callable[[Values], Values]:
        """A function of {name: tensor} to {name: tensor}.

        In: ``inputs`` and ``live_in`` by name, ``state`` by placeholder or by qualified name. Out:
        ``live_out`` and ``outputs``. Constants are known to it. Changes of ``graph`` made before
        the call count.
        """
        function = emit(self.graph)
        places = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        keys = [(name, self.state.get(name, name)) for name in places]
        constants, given = self.constants, self._given()

        def run(values: Values) -> Values:
            arguments = [
                constants[name] if name in constants else values[key if key in values else name]
                for name, key in keys
            ]
            return dict(zip(given, function(*arguments), strict=True))

        return run

    def _given(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.live_out, *self.outputs)))


def operations(graph: Graph) -> list[Node]:
    """The graph's operations: what boundaries count."""
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def free_values(graph: Graph, fixed: set[str]) -> set[Node]:
    """The operations that are computed again where needed.

    ``fixed`` names the placeholders of parameters. Buffers and constants that the graph does not
    write to count as known everywhere.
    """
    sharing = Sharing.of(graph)
    written = sharing.written
    free: set[Node] = set()
    for node in graph.nodes:
        if node.op == "output" or node.name in fixed or sharing.root(node) in written:
            continue
        if node.op == "placeholder" or (
            all(given in free for given in node.all_input_nodes) and _cheap(node)
        ):
            free.add(node)
    return {node for node in free if node.op != "placeholder"}


def _cheap(node: Node) -> bool:
    name = op_name(node)
    if isinstance(node.target, OpOverload):
        if any(name.startswith(kind) or name.endswith(f"_{kind}") for kind in _RANDOM):
            return False
        return not any(kind in name for kind in _COSTLY) or _outer_product(node)
    return is_getitem(node) or getattr(node.target, "__module__", "") in (
        "_operator", "math", "torch",
    )  # fmt: skip


def _outer_product(node: Node) -> bool:
    """A matrix product over an inner dimension of one: as cheap as a multiplication."""
    if op_name(node) not in ("matmul", "bmm", "mm") or not isinstance(node.args[0], Node):
        return False
    value = node.args[0].meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] == 1


def forbidden(graph: Graph, free: set[Node]) -> set[int]:
    """The boundaries at which no cut is allowed.

    Between the first and the last use of memory that is written to, inside an operation with
    several results, and where a number rather than a tensor would have to be sent.
    """
    ops = operations(graph)
    place = {node: index for index, node in enumerate(ops)}
    found: set[int] = set()
    sharing = Sharing.of(graph)
    written = sharing.written
    for root, group in sharing.groups(graph).items():
        if root not in written:
            continue
        around = {*group, *(user for node in group for user in node.users)}
        places = [place.get(node, len(ops)) for node in around if node.op != "placeholder"]
        found.update(range(min(places) + 1, max(places) + 1))
    for node in ops:
        if node in free:
            continue
        if is_getitem(node) and isinstance(node.args[0], Node):
            found.update(range(place.get(node.args[0], 0) + 1, place[node] + 1))
        elif _is_number(node):
            last = max((place.get(user, len(ops)) for user in node.users), default=place[node])
            found.update(range(place[node] + 1, last + 1))
    return {boundary for boundary in found if 0 < boundary < len(ops)}


def _is_number(node: Node) -> bool:
    return isinstance(node.meta.get("val"), SymInt | SymFloat | SymBool)


@dataclass
class Parts:
    """What `cut` has to know of a traced graph."""

    graph: Graph
    state: dict[str, str]
    constants: dict[str, Tensor]
    inputs: tuple[str, ...]
    free: set[Node]


def cut(parts: Parts, boundaries: Sequence[int]) -> list[Segment]:
    """Cut before the operations at ``boundaries``, which rise strictly."""
    ops = operations(parts.graph)
    _check(boundaries, len(ops), forbidden(parts.graph, parts.free))
    home = homes(ops, boundaries, parts.free)
    return [_build(parts, home, index, len(boundaries)) for index in range(len(boundaries) + 1)]


def _check(boundaries: Sequence[int], count: int, not_allowed: set[int]) -> None:
    for before, boundary in zip((0, *boundaries), boundaries, strict=False):
        if not before < boundary < count:
            raise ValueError(f"boundaries {list(boundaries)} do not rise within 0 … {count}")
        if boundary in not_allowed:
            raise Refused(
                f"no cut is possible at operation {boundary}: a value written to in place, or the "
                "parts of one result, would lie on both sides",
                hint="Cut elsewhere: `Traced.forbidden` lists where not.",
            )


def homes(ops: list[Node], boundaries: Sequence[int], free: set[Node]) -> dict[Node, int]:
    """The segment of every operation that is not free."""
    home: dict[Node, int] = {}
    segment = 0
    for index, node in enumerate(ops):
        while segment < len(boundaries) and index >= boundaries[segment]:
            segment += 1
        if node in free:
            continue
        whole = node.args[0] if is_getitem(node) else node
        home[node] = home.get(whole, segment) if isinstance(whole, Node) else segment
    return home


def live_after(parts: Parts, home: dict[Node, int], segment: int) -> list[Node]:
    """The values made in segments up to ``segment`` that a later one uses, in order."""
    last = max(home.values(), default=0)
    return [
        node
        for node, made in home.items()
        if made <= segment
        and any(
            (last if user.op == "output" else home.get(user, made)) > segment for user in node.users
        )
    ]


def _build(parts: Parts, home: dict[Node, int], index: int, last: int) -> Segment:
    source = parts.graph
    live_in = live_after(parts, home, index - 1) if index else []
    live_out = live_after(parts, home, index) if index < last else []
    own = [node for node, segment in home.items() if segment == index]
    results = source.output_node().args[0] if index == last else ()
    assert isinstance(results, tuple | list)
    wanted = list(dict.fromkeys((*live_out, *results)))
    needed = _needed(own, wanted, parts.free)
    graph, copies = Graph(), dict[Node, Node]()
    places = [node for node in source.nodes if node.op == "placeholder" and node in needed]
    for node in (*places, *live_in):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in operations(source):
        if node in needed and node not in copies:
            copies[node] = _copy(graph, node, copies)
    graph.output(tuple(copies[node] for node in wanted))
    names = {node.name for node in places}
    return Segment(
        graph,
        {name: path for name, path in parts.state.items() if name in names},
        {name: value for name, value in parts.constants.items() if name in names},
        tuple(name for name in parts.inputs if name in names),
        tuple(node.name for node in live_in),
        tuple(node.name for node in live_out),
        tuple(node.name for node in results),
        tuple(node.name for node in own),
    )


def _needed(own: list[Node], wanted: list[Node], free: set[Node]) -> set[Node]:
    """The segment's own operations with the free ones and the placeholders that they need."""
    needed = set(own)
    waiting = [given for node in own for given in node.all_input_nodes] + wanted
    while waiting:
        node = waiting.pop()
        if node in needed or (node.op != "placeholder" and node not in free):
            continue
        needed.add(node)
        waiting += node.all_input_nodes
    return needed


def _copy(graph: Graph, node: Node, copies: dict[Node, Node]) -> Node:
    args = map_arg(node.args, lambda given: copies[given])
    kwargs = map_arg(node.kwargs, lambda given: copies[given])
    copied = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
    copied.meta = dict(node.meta)
    return copied


__all__ = ["Parts", "Segment", "cut", "forbidden", "free_values", "operations", "written_by"]
