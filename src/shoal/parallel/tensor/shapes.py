"""Rules of operations that move elements: reshapes, transposes, concatenation, slices.

view       [b, (h·d)] → [b, h, d]        a dimension that is split or merged is a product
split      [b, (p | q)] → [b, p], [b, q] a dimension that is taken apart is a row
glu        [b, (p | p)] → [b, p]         both halves are cut alike
repeat     [h, d] → [(h | h), d]         copies
"""

from typing import Any

from shoal.parallel.tensor.calls import Call, dims, is_tensor, operand
from shoal.parallel.tensor.relation import NOTHING, Local, Operand, Relation, Term
from shoal.parallel.tensor.rules import rule, through
from shoal.parallel.tensor.sizes import factors, is_symbolic, shape, taken

LAST = 2**62  # aten's "to the end" is 2^63 − 1


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as",
      "reshape_as", "_reshape_alias")  # fmt: skip
def _reshape(call: Call) -> Relation | None:
    name = "self" if "self" in call.arguments else "input"
    if call.get("dtype") is not None or (call.name == "view" and "size" not in call.arguments):
        return None
    before, after = call.shape(name), call.result()
    relation = Relation()
    common = factors(before, after)
    if common is None:
        for sizes, found in ((before, "operand"), (after, "result")):
            terms = relation.axes(sizes)
            relation.fix(terms, "a reshape mixes it with its neighbours")
            if found == "operand":
                operand(relation, call, name, terms)
            else:
                relation.results = [tuple(terms)]
        return relation
    labels = [relation.label(number).labels[0] for number in common]

    def terms_of(sizes: list[int]) -> tuple[Term, ...]:
        groups = taken(common, sizes)
        return tuple(Term("product", tuple(labels[at] for at in group)) for group in groups)

    operand(relation, call, name, list(terms_of(before)))
    relation.results = [terms_of(after)]
    if call.name in ("view", "reshape", "_unsafe_view"):
        relation.adjust = _local_size
    elif call.name == "unflatten":
        relation.adjust = _local_unflatten
    elif call.name in ("view_as", "reshape_as", "_reshape_alias"):
        relation.fix([Term("product", tuple(labels))], "a reshape to another tensor's shape")
    return relation


def _local_size(arguments: dict[str, Any], local: Local) -> None:
    name = "size" if "size" in arguments else "shape"
    wanted = list(arguments[name])
    for dim, number in enumerate(local.results[0]):
        if number is not None:
            wanted[dim] = local.scaled(wanted[dim], 0, dim)
    arguments[name] = wanted


def _local_unflatten(arguments: dict[str, Any], local: Local) -> None:
    sizes = list(arguments["sizes"])
    rank = len(local.results[0])
    first = arguments["dim"]
    first = first if first >= 0 else first + rank - len(sizes) + 1
    for at in range(len(sizes)):
        if local.results[0][first + at] is not None:
            sizes[at] = local.scaled(sizes[at], 0, first + at)
    arguments["sizes"] = sizes


@rule("expand")
def _expand(call: Call) -> Relation | None:
    relation = Relation(adjust=_local_size)
    before, after = call.shape("self"), call.result()
    terms = relation.axes(after)
    offset = len(after) - len(before)
    own = [
        terms[offset + at] if number == after[offset + at] else NOTHING
        for at, number in enumerate(before)
    ]
    operand(relation, call, "self", own)
    relation.results = [tuple(terms)]
    return relation


@rule("permute", "transpose", "t", "movedim", "swapaxes", "swapdims", "numpy_T", "mT", "adjoint",
      "moveaxis")  # fmt: skip
def _permute(call: Call) -> Relation | None:
    name = "self" if "self" in call.arguments else "input"
    before = call.shape(name)
    order = _order(call, len(before))
    if order is None:
        return None
    relation = Relation()
    terms = relation.axes(before)
    operand(relation, call, name, terms)
    relation.results = [tuple(terms[dim] for dim in order)]
    return relation


def _order(call: Call, rank: int) -> list[int] | None:
    order = list(range(rank))
    if call.name == "permute":
        return dims(call["dims"], rank)
    if call.name in ("transpose", "swapaxes", "swapdims"):
        names = [name for name in call.arguments if name not in ("self", "input")]
        first, second = (call[name] % rank for name in names[:2])
        order[first], order[second] = order[second], order[first]
    elif call.name in ("movedim", "moveaxis"):
        source, target = dims(call["source"], rank), dims(call["destination"], rank)
        rest = [dim for dim in order if dim not in source]
        placed = dict(zip(target, source, strict=True))
        left = iter(rest)
        order = [placed[dim] if dim in placed else next(left) for dim in range(rank)]
    elif call.name == "numpy_T":
        order.reverse()
    elif rank >= 2:
        order[-2], order[-1] = order[-1], order[-2]
    return order


@rule("cat", "concat", "concatenate")
def _cat(call: Call) -> Relation | None:
    nodes = call["tensors"]
    if not all(is_tensor(node) for node in nodes):
        return None
    result = call.result()
    dim = call["dim"] % len(result)
    relation = Relation()
    terms = relation.axes(result)
    row: list[int] = []
    for at, node in enumerate(nodes):
        own = shape(node.meta["val"])
        if len(own) != len(result):
            return None
        mine = list(terms)
        # A piece of size 1 has a label too: it takes its place in the row.
        number = len(relation.sizes)
        relation.sizes[number] = own[dim]
        mine[dim] = Term("product", (number,))
        row.append(number)
        relation.operands.append(Operand("tensors", at, node, tuple(mine)))
    terms[dim] = Term("row", tuple(row))
    relation.results = [tuple(terms)]
    return relation


@rule("stack")
def _stack(call: Call) -> Relation | None:
    result = call.result()
    dim = call["dim"] % len(result)
    relation = Relation()
    terms = relation.axes(result)
    relation.fix([terms[dim]], "tensors are stacked along it")
    own = [*terms[:dim], *terms[dim + 1 :]]
    for at, node in enumerate(call["tensors"]):
        relation.operands.append(Operand("tensors", at, node, tuple(own)))
    relation.results = [tuple(terms)]
    return relation


def _pieces(call: Call, dim: int, parts: list[tuple[int, bool]], name: str = "self") -> Relation:
    """A row along `dim` of pieces ``(size, whether it is a result)``."""
    relation = Relation()
    terms = relation.axes(call.shape(name))
    row: list[int] = []
    for number, kept in parts:
        label = len(relation.sizes)
        relation.sizes[label] = number
        row.append(label)
        if kept:
            mine = list(terms)
            mine[dim] = Term("product", (label,))
            relation.results.append(tuple(mine))
        else:
            relation.dropped.add(label)
    terms[dim] = Term("row", tuple(row))
    operand(relation, call, name, terms)
    return relation


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk",
      "split_copy", "split_with_sizes_copy")  # fmt: skip
def _split(call: Call) -> Relation | None:
    rank = len(call.shape("self"))
    dim = call["dim"] % rank
    sizes = [shape(value)[dim] for value in call.results()]
    relation = _pieces(call, dim, [(number, True) for number in sizes])

    def adjust(arguments: dict[str, Any], local: Local) -> None:
        if local.results[0][dim] is not None:
            mine = [result[dim] for result in local.results]
            given = arguments["self"]
            arguments.clear()
            arguments.update(self=given, split_sizes=mine, dim=dim, target="split_with_sizes")

    relation.adjust = adjust
    return relation


@rule("slice", "narrow")
def _slice(call: Call) -> Relation | None:
    before = call.shape("self")
    dim = call["dim"] % len(before)
    length = call.result()[dim]
    if length == before[dim]:
        return through(call, {}, "self")
    start = call["start"]
    start = 0 if start is None else start
    if call.get("step", 1) != 1 or not isinstance(start, int) or is_symbolic(before[dim]):
        return through(call, {dim: "a slice takes some of it"})
    start = start if start >= 0 else max(0, start + before[dim])
    parts = [(start, False), (length, True), (before[dim] - start - length, False)]
    kept = [part for part in parts if part[0]]
    if min(number for number, _ in kept) < 0:
        return None
    relation = _pieces(call, dim, kept)

    def adjust(arguments: dict[str, Any], local: Local) -> None:
        if local.results[0][dim] is None:
            return
        labels = relation.operands[0].terms[dim].labels
        first = local.cut[labels[0]] if start else 0
        given = arguments["self"]
        arguments.clear()
        arguments.update(self=given, dim=dim, start=first)
        arguments.update(end=first + (local.results[0][dim] or 0), step=1, target="slice")

    relation.adjust = adjust
    return relation


@rule("select")
def _select(call: Call) -> Relation | None:
    return _without(call, [call["dim"]], "one index of it is selected")


@rule("unbind")
def _unbind(call: Call) -> Relation | None:
    return _without(call, [call["dim"]], "its indices are taken apart")


def _without(call: Call, gone: list[int], why: str, name: str = "self") -> Relation:
    relation = Relation()
    terms = relation.axes(call.shape(name))
    gone = [dim % len(terms) for dim in gone]
    relation.fix([terms[dim] for dim in gone], why)
    operand(relation, call, name, terms)
    rest = tuple(term for dim, term in enumerate(terms) if dim not in gone)
    relation.results = [rest] * len(call.results())
    return relation


@rule("glu")
def _glu(call: Call) -> Relation | None:
    before = call.shape("self")
    dim = call["dim"] % len(before)
    relation = Relation()
    terms = relation.axes(before)
    half = relation.label(before[dim] // 2)
    if half is NOTHING:
        return through(call, {dim: "its halves are multiplied"})
    terms[dim] = Term("row", half.labels * 2)
    operand(relation, call, "self", terms)
    result = list(terms)
    result[dim] = half
    relation.results = [tuple(result)]
    return relation


@rule("repeat")
def _repeat(call: Call) -> Relation | None:
    times = call["repeats"]
    before, after = call.shape("self"), call.result()
    offset = len(after) - len(before)
    relation = Relation()
    terms = relation.axes(before)
    result = relation.axes(after[:offset])
    relation.fix(result, "it is repeated along it")
    for dim, term in enumerate(terms):
        copies = after[offset + dim] // before[dim] if before[dim] else 1
        if copies == 1 or not isinstance(times[offset + dim], int) or copies > 64:
            moved = term if copies == 1 else relation.label(after[offset + dim])
            if copies != 1:
                relation.fix([term, moved], "it is repeated along it")
            result.append(moved)
        else:
            result.append(Term("row", term.labels * copies) if term.labels else NOTHING)
            if not term.labels:
                result[-1] = relation.label(after[offset + dim])
                relation.fix([result[-1]], "it is repeated along it")
    operand(relation, call, "self", terms)
    relation.results = [tuple(result)]
    return relation


@rule("repeat_interleave")
def _repeat_interleave(call: Call) -> Relation | None:
    if not isinstance(call.get("repeats"), int) or call.get("dim") is None:
        return None
    before, after = call.shape("self"), call.result()
    dim = call["dim"] % len(before)
    relation = Relation()
    terms = relation.axes(before)
    operand(relation, call, "self", terms)
    result = list(terms)
    copies = relation.label(after[dim] // before[dim])
    relation.fix([copies], "copies of one index stay together")
    result[dim] = Term("product", terms[dim].labels + copies.labels)
    relation.results = [tuple(result)]
    return relation
