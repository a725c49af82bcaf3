"""`Traced`: a model as a graph of plain operations, and `trace`, which makes one.

model + example inputs  →  torch.export  →  normalise  →  Traced  →  segments

traced = trace(model, inputs, rows=4)
(segment,) = traced.segment([])
values = dict(zip(traced.inputs, traced.flatten(inputs))) | parameters | buffers
outputs = traced.rebuild([segment.callable()(values)[name] for name in segment.outputs])
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node

from shoal.errors import Refused
from shoal.trace import lines
from shoal.trace.blocks import Blocks, is_sequential
from shoal.trace.capture import ADVICE, Captured, capture
from shoal.trace.costs import bytes_of, seconds_of
from shoal.trace.normalise import normalise, op_name, remove_dead
from shoal.trace.segments import (
    Parts,
    Segment,
    cut,
    forbidden,
    free_values,
    homes,
    live_after,
    operations,
)
from shoal.trace.sizes import sizes_from_inputs
from shoal.trace.structure import Structure, take_apart

_PREFIX = "model."  # of the wrapper that was exported


@dataclass
class Traced:
    """A model in one mode (train or eval) as a flat graph; see the design of `trace`.

    ``state``: placeholder → qualified name of a parameter or buffer. ``constants``: placeholder →
    tensor. ``inputs``: placeholders in the order of `flatten`. ``static_rows``: None, or the one
    number of rows that the graph holds for. ``parameters``: the qualified names that are
    parameters. ``notes``: what the user might want to know. ``cut_outputs``: output → the dimension
    along which it stays cut, filled in by tensor parallelism. ``blocks``: None, or what is known of
    a sequential model that could not be traced: its operations are its children then.
    """

    graph: Graph
    state: dict[str, str]
    constants: dict[str, Tensor]
    inputs: tuple[str, ...]
    rows: int
    static_rows: int | None
    parameters: frozenset[str]
    notes: tuple[str, ...] = ()
    cut_outputs: dict[int, int] = field(default_factory=dict)
    blocks: Blocks | None = None
    _input_structure: Structure | None = field(default=None, repr=False)
    _output_structure: Structure | None = field(default=None, repr=False)

    def flatten(self, inputs: Any) -> list[Tensor]:
        """The tensors of the user's inputs, in the order of ``inputs``. Raises ValueError for a
        structure with another number of tensors than the traced one."""
        _, tensors = take_apart(inputs)
        if len(tensors) != len(self.inputs):
            raise ValueError(f"{len(tensors)} input tensors; traced with {len(self.inputs)}")
        return tensors

    def rebuild(self, outputs: list[Tensor]) -> Any:
        """The user's structure of outputs around the graph's tensors."""
        assert self._output_structure is not None
        return self._output_structure.build(outputs)

    @property
    def ops(self) -> list[Node]:
        """The operations, in order: boundary b lies before ``ops[b]``."""
        return operations(self.graph)

    @property
    def outputs(self) -> tuple[Node, ...]:
        """The nodes of the output tensors."""
        results = self.graph.output_node().args[0]
        assert isinstance(results, tuple | list)
        return tuple(results)

    @property
    def forbidden(self) -> set[int]:
        """The boundaries at which no cut is allowed."""
        return forbidden(self.graph, self._parts().free)

    @property
    def costs(self) -> dict[str, float]:
        """Counted seconds, forward and backward, of each operation for `rows` rows, by name."""
        return seconds_of(self.graph)

    def crossing(self) -> list[float]:
        """For each boundary, 0 to the number of operations: bytes that cross it per example."""
        ops, free = self.ops, self._parts().free
        place = {node: index for index, node in enumerate(ops)}
        change = [0] * (len(ops) + 2)
        for node in ops:
            users = [place.get(user, len(ops)) for user in node.users]
            if node in free or not users:
                continue
            size = bytes_of(node)
            change[place[node] + 1] += size
            change[max(users) + 1] -= size
        totals = itertools.accumulate(change[: len(ops) + 1])
        return [total / max(1, self.rows) for total in totals]

    def live_bytes(self, boundary: int) -> float:
        """Bytes per example that a cut at ``boundary`` sends forward."""
        return self.crossing()[boundary]

    def segment(self, boundaries: Sequence[int]) -> list[Segment]:
        """Cut before ``ops[b]`` for each b of ``boundaries``, which rise strictly.

        Raises Refused for a boundary that is forbidden, ValueError for one that does not exist.
        """
        return cut(self._parts(), boundaries)

    def copy(self) -> "Traced":
        """The same with a graph of its own; nodes keep their names, fake tensors are shared."""
        graph = Graph()
        copies: dict[Node, Node] = {}
        for node in self.graph.nodes:
            copies[node] = graph.node_copy(node, lambda given: copies[given])
        return replace(self, graph=graph, cut_outputs=dict(self.cut_outputs))

    def _parts(self) -> Parts:
        fixed = {name for name, path in self.state.items() if path in self.parameters}
        free = free_values(self.graph, fixed)
        return Parts(self.graph, self.state, self.constants, self.inputs, free)

    def live_values(self, boundary: int) -> list[Node]:
        """The nodes whose values cross a cut at ``boundary``, in order."""
        parts = self._parts()
        return live_after(parts, homes(operations(self.graph), [boundary], parts.free), 0)


def trace(
    model: nn.Module, inputs: Any, rows: int, *, whole: nn.Module | None = None, split: bool = True
) -> Traced:
    """Trace ``model`` in the mode that it is in; nothing of it is changed.

    ``inputs`` as its forward takes them (a tuple: positional arguments, else one argument), with
    ``rows`` examples, two or more: dimension 0 of each tensor whose size is ``rows`` is then free,
    where the model allows. A sequential model that cannot be traced is split at its children, see
    `Blocks`, unless not ``split``; ``whole`` is the same model with its values, if `model` has
    none.
    Raises Refused naming the line that cannot be traced.
    """
    try:
        return _operations(model, inputs, rows)
    except Refused as why:
        if not split or not is_sequential(model):
            raise
        blocks = Blocks.measure(model if whole is None else whole, inputs, why)
    return trace_blocks(model, inputs, rows, blocks)


def trace_blocks(model: nn.Module, inputs: Any, rows: int, blocks: Blocks) -> Traced:
    """The graph of a sequential model's children, which run as they are."""
    _, tensors = take_apart(inputs)
    captured = capture(_Same(), tuple(tensors), rows)
    nodes = {n.name: n for n in captured.program.graph.nodes if n.op == "placeholder"}
    names = captured.program.graph_signature.user_inputs
    places = [(str(name), nodes[str(name)].meta["val"]) for name in names]
    graph, state = blocks.graph(model, places)
    return Traced(
        graph,
        state,
        {},
        tuple(name for name, _ in places),
        rows,
        None,
        frozenset(name for name, _ in model.named_parameters()),
        (f"split at its children, which run as they are: {blocks.why}",),
        blocks=blocks,
        _input_structure=take_apart(inputs)[0],
        _output_structure=blocks.outputs(model.training),
    )


class _Same(nn.Module):
    """Its trace says which sizes of the inputs are free."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors


def _operations(model: nn.Module, inputs: Any, rows: int) -> Traced:
    """The graph of plain operations."""
    captured = capture(model, inputs, rows)
    graph = captured.program.graph
    normalise(graph, captured.program.graph_module)
    traced = _describe(captured, rows, _first_names(model))
    _assign_buffers(traced, captured.assigned)
    sizes_from_inputs(graph, traced.inputs)
    remove_dead(graph)
    _annotate(graph)
    _refuse_items(graph)
    graph.lint()
    return traced


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer, tied ones too, to the first that its tensor has."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names


def _describe(captured: Captured, rows: int, first: dict[str, str]) -> Traced:
    program = captured.program
    state: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    inputs: list[str] = []
    parameters = set()
    for spec in program.graph_signature.input_specs:
        name, target = spec.arg.name, (spec.target or "").removeprefix(_PREFIX)
        target = first.get(target, target)
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            state[name] = target
            if spec.kind is InputKind.PARAMETER:
                parameters.add(target)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[name] = program.constants[spec.target]
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(name)
        else:
            raise Refused(f"the model uses an object that cannot be traced: {spec}", hint=ADVICE)
    notes = tuple(
        f"the output's {kind} is left out: its tensors are in no plain container"
        for kind in dict.fromkeys(captured.outputs.dropped)
    )
    return Traced(
        program.graph,
        state,
        constants,
        tuple(inputs),
        rows,
        rows if captured.static else None,
        frozenset(parameters),
        notes,
        _input_structure=captured.inputs,
        _output_structure=captured.outputs,
    )


def _assign_buffers(traced: Traced, assigned: tuple[str, ...]) -> None:
    """``self.buffer = value`` of a forward pass becomes ``buffer.copy_(value)`` at the end."""
    if not assigned:
        return
    output = traced.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    places = {path: name for name, path in traced.state.items()}
    nodes = {node.name: node for node in traced.graph.nodes if node.op == "placeholder"}
    values = results[len(results) - len(assigned) :]
    with traced.graph.inserting_before(output):
        for path, value in zip(assigned, values, strict=True):
            _check_assigned(path, nodes[places[path]].meta["val"], value.meta["val"])
            detached = traced.graph.call_function(torch.ops.aten.detach.default, (value,))
            traced.graph.call_function(
                torch.ops.aten.copy_.default, (nodes[places[path]], detached)
            )
    output.args = (tuple(results[: len(results) - len(assigned)]),)


def _check_assigned(path: str, old: Tensor, new: Tensor) -> None:
    if old.shape != new.shape or old.dtype != new.dtype:
        raise Refused(
            f"the forward pass gives the buffer {path} another shape or type: "
            f"{tuple(old.shape)} {old.dtype} becomes {tuple(new.shape)} {new.dtype}",
            hint=ADVICE,
        )


def _annotate(graph: Graph) -> None:
    """Give every operation its ``path``, ``call`` and ``line``."""
    calls: Counter[tuple[str, str]] = Counter()
    for node in operations(graph):
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack and isinstance(stack[-1], tuple) else ""
        node.meta["path"] = path = _user_path(path)
        kind = op_name(node)
        node.meta["call"] = calls[path, kind]
        calls[path, kind] += 1
        node.meta["line"] = lines.of_stack(node.meta.get("stack_trace"))


def _user_path(path: str) -> str:
    parts = [part.split("@")[0] for part in path.split(".")]
    return ".".join(parts[1:]) if parts[0] == _PREFIX.rstrip(".") else ""


def _refuse_items(graph: Graph) -> None:
    for node in operations(graph):
        if op_name(node) in ("item", "_local_scalar_dense"):
            where = f" at {node.meta['line']}" if node.meta["line"] else ""
            raise Refused(
                f"the model cannot be traced{where} (a tensor is made a Python number)",
                hint=ADVICE,
            )
