"""The table of rules by operator name, and the rule that most operators share.

@rule("glu")
def _glu(call): ...                        # → Relation, or None where it cannot say

pointwise    [b, 1, c] and [c]  →  [b, t, c]       aligned at the last dimension
"""

from collections.abc import Callable

from torch import Tensor

from shoal.parallel.tensor.calls import Call, operand
from shoal.parallel.tensor.relation import NOTHING, Operand, Relation, Term
from shoal.parallel.tensor.sizes import shape

Rule = Callable[[Call], Relation | None]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operators of these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def find(name: str) -> Rule | None:
    """The rule of an operator's name."""
    return _RULES.get(name) or _RULES.get(name.removesuffix("_"))


POINTWISE = {
    "dropout", "native_dropout", "alpha_dropout", "contiguous", "alias", "detach", "detach_copy",
    "to", "_to_copy", "type_as", "masked_fill", "hardswish", "zeros_like", "ones_like", "full_like",
    "__and__", "__or__", "__xor__", "lift_fresh_copy", "lift_fresh", "copy", "clone", "float",
    "double", "half", "bfloat16", "rand_like", "randn_like", "empty_like", "bernoulli", "where",
    "clip", "hardtanh", "rrelu", "rsub", "log_sigmoid", "logsigmoid", "relu6", "selu", "celu",
    "_autocast_to_full_precision", "_autocast_to_reduced_precision", "zero", "fill", "expand_as",
    "nan_to_num", "square", "dropout1d", "resolve_conj", "resolve_neg",
}  # fmt: skip


def pointwise(call: Call) -> Relation | None:
    """Operands broadcast against each other, aligned at the last dimension."""
    results = [value for value in call.results() if isinstance(value, Tensor)]
    if not results or any(value.shape != results[0].shape for value in results):
        return None
    relation = Relation()
    sizes = shape(results[0])
    terms = relation.axes(sizes)
    for name, index, node in call.tensors():
        own = shape(node.meta["val"])
        if len(own) > len(sizes):
            return None
        mine = broadcast(relation, terms, sizes, own)
        if mine is None:
            return None
        relation.operands.append(Operand(name, index, node, tuple(mine)))
    relation.results = [tuple(terms)] * len(results)
    return relation


def broadcast(
    relation: Relation, terms: list[Term], sizes: list[int], own: list[int]
) -> list[Term] | None:
    """The terms of an operand of sizes `own` against those of a result."""
    offset = len(sizes) - len(own)
    mine = []
    for at, number in enumerate(own):
        if number == sizes[offset + at]:
            mine.append(terms[offset + at])
        elif number == 1:
            mine.append(NOTHING)
        else:
            return None
    return mine


def through(
    call: Call, fixed: dict[int, str], name: str = "self", *, also: tuple[str, ...] = ()
) -> Relation:
    """A result of the same dimensions as `name`, of which some must be whole.

    A fixed dimension may have another size in the result. ``also``: operands of the same shape.
    """
    relation = Relation()
    before = call.shape(name)
    terms = relation.axes(before)
    for dim, why in fixed.items():
        relation.fix([terms[dim]], why)
    operand(relation, call, name, terms)
    for other in also:
        operand(relation, call, other, terms)
    for value in call.results():
        after = shape(value)
        result = list(terms)
        for dim in fixed:
            if after[dim] != before[dim]:
                result[dim] = relation.label(after[dim])
                relation.fix([result[dim]], fixed[dim])
        relation.results.append(tuple(result))
    return relation
