"""Rules of operations that reduce or look along a dimension: sums, means, softmax, indexing.

sum        [b, c, h] → [b, h]      sums over c: partial sums where it is cut
amax       [b, c, h] → [b, h]      c stays whole
softmax    [b, c]    → [b, c]      along c: it stays whole
index      [v, c] by [n] → [n, c]  v stays whole
"""

import math

from shoal.parallel.tensor.calls import Call, dims, is_tensor, operand
from shoal.parallel.tensor.relation import NOTHING, Operand, Relation, Term
from shoal.parallel.tensor.rules import rule, through
from shoal.parallel.tensor.sizes import is_symbolic, shape


@rule("sum", "mean", "nansum")
def _sum(call: Call) -> Relation | None:
    before = call.shape("self")
    over = dims(call.get("dim"), len(before))
    relation = _reduced(call, over)
    terms = relation.operands[0].terms
    if call.name == "nansum" or call.get("dtype") is not None:
        relation.fix([terms[dim] for dim in over], "it is summed over")
        return relation
    relation.sum_over(*(terms[dim] for dim in over))
    if call.name == "mean":
        relation.special = "mean"
        for dim in over:
            if is_symbolic(before[dim]):
                relation.fix([terms[each] for each in over], "a mean over a number of rows")
        relation.mean_over = math.prod(before[dim] for dim in over)
    return relation


@rule("amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "norm", "linalg_vector_norm",
      "logsumexp", "prod", "any", "all", "median", "var_mean", "std_mean")  # fmt: skip
def _reduce(call: Call) -> Relation | None:
    if not is_tensor(call.get("self")) or is_tensor(call.get("other")):
        return None
    over = dims(call.get("dim"), len(call.shape("self")))
    relation = _reduced(call, over)
    relation.fix([relation.operands[0].terms[dim] for dim in over], f"{call.name} is over it")
    return relation


def _reduced(call: Call, over: list[int]) -> Relation:
    before = call.shape("self")
    relation = Relation()
    terms = relation.axes(before)
    operand(relation, call, "self", terms)
    for value in call.results():
        kept = len(shape(value)) == len(before)
        result = [
            NOTHING if dim in over else term
            for dim, term in enumerate(terms)
            if kept or dim not in over
        ]
        relation.results.append(tuple(result))
    return relation


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp",
      "flip", "roll", "sort", "topk", "argsort", "renorm", "cummax")  # fmt: skip
def _along(call: Call) -> Relation | None:
    name = "self" if "self" in call.arguments else "input"
    if name not in call.arguments:
        return None
    rank = len(call.shape(name))
    over = next((call[key] for key in ("dim", "dims") if key in call.arguments), None)
    return through(call, dict.fromkeys(dims(over, rank), f"{call.name} is over it"), name)


@rule("tril", "triu")
def _triangle(call: Call) -> Relation | None:
    rank = len(call.shape("self"))
    return through(call, dict.fromkeys((rank - 2, rank - 1), f"{call.name} is over it"))


@rule("index_select")
def _index_select(call: Call) -> Relation | None:
    relation = through(call, {call["dim"] % len(call.shape("self")): "indices of it are selected"})
    relation.operands.append(Operand("index", None, call["index"], (relation.label(1),)))
    own = call.shape("index")
    relation.operands[-1].terms = tuple(_fixed(relation, own))
    return relation


def _fixed(relation: Relation, sizes: list[int]) -> list[Term]:
    terms = relation.axes(sizes)
    relation.fix(terms, "it holds indices")
    return terms


@rule("index")
def _index(call: Call) -> Relation | None:
    indices = list(call["indices"])
    used = [at for at, index in enumerate(indices) if index is not None]
    values = [indices[at] for at in used]
    if not all(
        is_tensor(value) and not value.meta["val"].dtype.is_floating_point for value in values
    ):
        return None
    if any(value.meta["val"].dtype.itemsize == 1 for value in values):
        return None  # a mask: as many results as it has ones
    together = used == list(range(used[0], used[-1] + 1))
    relation = Relation()
    before, after = call.shape("self"), call.result()
    terms = relation.axes(before)
    relation.fix([terms[at] for at in used], "it is indexed")
    operand(relation, call, "self", terms)
    for at in used:
        own = shape(indices[at].meta["val"])
        relation.operands.append(Operand("indices", at, indices[at], tuple(_fixed(relation, own))))
    rest = [term for at, term in enumerate(terms) if at not in used]
    at = used[0] if together else 0
    new = _fixed(relation, after[at : at + len(after) - len(rest)])
    relation.results = [(*rest[:at], *new, *rest[at:])]
    return relation
