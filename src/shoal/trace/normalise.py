"""An exported graph made simple: one flat list of pure operations, as far as that is exact.

wrap_with_set_grad_enabled(False, body, x)   →   body of detach(x)
wrap_with_autocast(..., body, x)             →   body, its nodes marked meta["autocast"]
relu_(x)                                     →   relu(x), later uses of x replaced
assertions, dropout that drops nothing       →   gone

normalise(graph, module, inputs)
"""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from shoal.errors import Refused
from shoal.trace.aliases import Sharing, is_getitem, note_memory, own_memory, written_by
from shoal.trace.capture import ADVICE

aten = torch.ops.aten

_ASSERTIONS = (
    "_assert_scalar",
    "_assert_async",
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)
_DROPOUT = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
# `copy` and `zero` out of place cost a pass over memory and have no gradient everywhere.
_STAYS = ("copy_", "zero_", "set_", "resize_", "resize_as_", "requires_grad_")
_METADATA = ("squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "detach_")


def normalise(graph: Graph, module: GraphModule) -> None:
    """Change ``graph`` in place. Raises Refused for what no list of operations can be."""
    _inline(graph, module)
    note_memory(graph)
    _drop_assertions(graph)
    _drop_constants(graph)
    _out_of_place(graph)
    _keep_parts_together(graph)
    remove_dead(graph)


def op_name(node: Node) -> str:
    """``linear`` of ``aten.linear.default``; the name of any other function."""
    if isinstance(node.target, OpOverload):
        return str(node.target._overloadpacket.__name__)
    return str(getattr(node.target, "__name__", node.target))


def remove_dead(graph: Graph) -> None:
    """Remove what nobody uses, apart from what writes to memory or is random."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users or written_by(node):
            continue
        if isinstance(node.target, OpOverload) or is_getitem(node) or _is_operator(node):
            graph.erase_node(node)


def _is_operator(node: Node) -> bool:
    return getattr(node.target, "__module__", "") in ("_operator", "math", "torch")


def _inline(graph: Graph, module: GraphModule) -> None:
    """Put the bodies of regions (no gradient, autocast) in their places."""
    for node in list(graph.nodes):
        name = op_name(node)
        if name == "wrap_with_set_grad_enabled":
            enabled, body, *given = node.args
            _refuse_nested(bool(enabled), node)
            if not enabled:
                with graph.inserting_before(node):
                    given = [_detached(graph, value) for value in given]
            _insert(graph, module, node, body, given, {"no_grad": not enabled})
        elif name == "wrap_with_autocast":
            device, dtype, enabled, _, body, *given = node.args
            _insert(graph, module, node, body, given, {"autocast": (device, dtype, enabled)})
    for node in list(graph.nodes):
        if node.op == "get_attr":
            _get_attr(graph, node)


def _insert(
    graph: Graph,
    module: GraphModule,
    node: Node,
    body: Any,
    given: list[Any],
    mark: dict[str, Any],
) -> None:
    inner = getattr(module, str(body.target))
    inherited = {key: node.meta[key] for key in ("autocast", "no_grad") if key in node.meta}
    _inline_marks(inner.graph, inherited | mark)
    _inline(inner.graph, inner)
    places = [n for n in inner.graph.nodes if n.op == "placeholder"]
    replaced: dict[Node, Any] = dict(zip(places, given, strict=True))
    with graph.inserting_before(node):
        result: Any = graph.graph_copy(inner.graph, replaced)
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    for user in list(node.users):
        assert is_getitem(user)
        index: Any = user.args[1]
        value: Any = result[index] if isinstance(result, list | tuple) else result
        user.replace_all_uses_with(value)
        graph.erase_node(user)
    graph.erase_node(node)


def _inline_marks(graph: Graph, mark: dict[str, Any]) -> None:
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta |= mark


def _refuse_nested(enabled: bool, node: Node) -> None:
    if enabled and node.meta.get("no_grad"):
        raise Refused("the model enables gradients inside torch.no_grad()", hint=ADVICE)


def _detached(graph: Graph, value: Any) -> Any:
    """``value`` without gradient, its memory shared: what happens inside torch.no_grad()."""
    if not isinstance(value, Node) or not isinstance(value.meta.get("val"), Tensor):
        return value
    node = graph.call_function(aten.detach.default, (value,))
    node.meta = {
        key: value.meta[key]
        for key in ("val", "nn_module_stack", "stack_trace")
        if key in value.meta
    }
    return node


def _get_attr(graph: Graph, node: Node) -> None:
    if not node.users:
        graph.erase_node(node)
        return
    user = next(iter(node.users))
    raise Refused(f"the model uses {op_name(user)}, which is no plain operation", hint=ADVICE)


def _drop_assertions(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and op_name(node) in _ASSERTIONS:
            if node.users:
                node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _drop_constants(graph: Graph) -> None:
    """Dropout that drops nothing is its input; a constant needs no copy unless written to."""
    written = Sharing.of(graph)
    for node in list(graph.nodes):
        name = op_name(node) if node.op == "call_function" else ""
        nothing = name.rstrip("_") in _DROPOUT and (not node.args[2] or node.args[1] == 0.0)
        fresh = name == "lift_fresh_copy" and written.root(node) not in written.written
        if nothing or fresh:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _out_of_place(graph: Graph) -> None:
    """Make operations that overwrite their input ones that do not, where nobody could tell.

    Nobody can if the input was made here and no other name of its memory is used afterwards.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    sharing = Sharing.of(graph)
    groups = sharing.groups(graph)
    group_of = {node: groups[sharing.root(node)] for node in order if node.op != "output"}
    for node in order:
        target = _pure(node)
        if target is None:
            continue
        value, group = node.args[0], group_of[node]
        assert isinstance(value, Node)
        if op_name(node) in _METADATA:
            if value.op == "placeholder":
                continue
        elif not _unseen(node, value, group, order):
            continue
        else:
            later = [member for member in group if order[member] >= order[node]]
            group_of |= dict.fromkeys(later, later)
            own_memory(later)
        node.target = target
        for user in list(value.users):
            if order[user] > order[node]:
                user.replace_input_with(value, node)


def _pure(node: Node) -> OpOverload | None:
    """The operator that gives the same result and writes nothing, None if there is none."""
    if not isinstance(node.target, OpOverload) or not node.args:
        return None
    name = op_name(node)
    if not name.endswith("_") or name.startswith("_") or name in _STAYS:
        return None
    packet = getattr(aten, name[:-1], None)
    target = getattr(packet, node.target._overloadname, None)
    if target is None or len(target._schema.arguments) != len(node.target._schema.arguments):
        return None
    return target if _same_dtype(node) else None


def _same_dtype(node: Node) -> bool:
    """Whether no other operand would widen the result."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    tensors = [_like(v) for v in values if isinstance(v, Tensor)]
    return bool(tensors) and all(
        torch.result_type(tensors[0], other) == tensors[0].dtype for other in tensors[1:]
    )


def _like(value: Tensor) -> Tensor:
    return torch.empty((1,) * value.dim(), dtype=value.dtype)


def _unseen(node: Node, value: Any, group: list[Node], order: dict[Node, int]) -> bool:
    if any(member.op == "placeholder" for member in group):
        return False
    for member in group:
        if member is value or order[member] >= order[node]:
            continue
        if any(order.get(user, len(order)) > order[node] for user in member.users):
            return False
    return True


def _keep_parts_together(graph: Graph) -> None:
    """The parts of a result with several come right after it, so that no cut falls between."""
    for node in list(graph.nodes):
        if is_getitem(node) and isinstance(node.args[0], Node):
            node.args[0].append(node)
