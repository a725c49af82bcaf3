"""Rules of layers: products, convolutions, normalisation, embedding, attention, pooling.

linear     x [b, k], weight [o, k], bias [o]                → [b, o]             sums over k
conv       x [b, c, …], weight [o, c, …], bias [o]          → [b, o, …]          sums over c
grouped    x [b, g·c, …], weight [g·o, c, …], bias [g·o]    → [b, g·o, …]        between groups
matmul     [b, m, k], [b, k, n]                             → [b, m, n]          sums over k
attention  q [b, h, t, d], k and v [b, h, s, d]             → [b, h, t, d]
"""

import math
from typing import Any

from shoal.parallel.tensor.calls import Call, is_tensor, operand
from shoal.parallel.tensor.relation import NOTHING, Local, Operand, Relation, Term
from shoal.parallel.tensor.rules import broadcast, rule, through
from shoal.parallel.tensor.sizes import shape

SPATIAL = "neighbouring positions are combined along it"
NORMALISED = "normalises over it"


@rule("linear")
def _linear(call: Call) -> Relation | None:
    if len(call.shape("weight")) != 2:
        return None
    relation = Relation(added="bias")
    *rows, width = call.shape("input")
    batch, inner = relation.axes(rows), relation.label(width)
    outer = relation.label(call.shape("weight")[0])
    operand(relation, call, "input", [*batch, inner])
    operand(relation, call, "weight", [outer, inner])
    operand(relation, call, "bias", [outer])
    relation.results = [(*batch, outer)]
    relation.sum_over(inner)
    relation.macs = width
    return relation


@rule("addmm", "baddbmm")
def _addmm(call: Call) -> Relation | None:
    first, second = ("mat1", "mat2") if call.name == "addmm" else ("batch1", "batch2")
    relation = Relation(added="self")
    *rows, inner_size = call.shape(first)
    left, inner = relation.axes(rows), relation.label(inner_size)
    right = relation.label(call.shape(second)[-1])
    batch = left[:-1]
    operand(relation, call, first, [*left, inner])
    operand(relation, call, second, [*batch, inner, right])
    result = [*left, right]
    bias = broadcast(relation, result, call.result(), call.shape("self"))
    if bias is None:
        return None
    operand(relation, call, "self", bias)
    relation.results = [tuple(result)]
    if (call["alpha"], call["beta"]) == (1, 1):
        relation.sum_over(inner)
    else:
        relation.fix([inner], "its sum is scaled")
    relation.macs = inner_size
    return relation


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(call: Call) -> Relation | None:
    names = list(call.arguments)
    left, right = call.shape(names[0]), call.shape(names[1])
    relation = Relation()
    inner = relation.label(left[-1])
    sizes = call.result()
    result = relation.axes(sizes)
    batch = len(sizes) - (len(left) > 1) - (len(right) > 1)
    mine = broadcast(relation, result[:batch], sizes[:batch], left[:-2])
    theirs = broadcast(relation, result[:batch], sizes[:batch], right[:-2])
    if mine is None or theirs is None:
        return None
    rows = [result[batch]] if len(left) > 1 else []
    columns = [result[-1]] if len(right) > 1 else []
    operand(relation, call, names[0], [*mine, *rows, inner])
    operand(relation, call, names[1], [*theirs, inner, *columns])
    relation.results = [tuple(result)]
    relation.sum_over(inner)
    relation.macs = left[-1]
    return relation


@rule("einsum")
def _einsum(call: Call) -> Relation | None:
    equation, tensors = call["equation"].replace(" ", ""), call["tensors"]
    if "->" not in equation or "." in equation or call.get("path"):
        return None
    left, right = equation.split("->")
    inputs = left.split(",")
    if any(len(set(letters)) != len(letters) for letters in [*inputs, right]):
        return None
    relation = Relation()
    axes: dict[str, Term] = {}
    sizes: dict[str, int] = {}
    for at, (letters, node) in enumerate(zip(inputs, tensors, strict=True)):
        for letter, number in zip(letters, shape(node.meta["val"]), strict=True):
            if sizes.setdefault(letter, number) != number:
                return None
            if letter not in axes:
                axes[letter] = relation.label(number)
        relation.operands.append(Operand("tensors", at, node, tuple(axes[x] for x in letters)))
    relation.results = [tuple(axes[letter] for letter in right)]
    for letter in set(axes) - set(right):
        everywhere = all(letter in letters for letters in inputs)
        if everywhere or len(inputs) == 2:
            relation.sum_over(axes[letter])
        else:
            relation.fix([axes[letter]], "it is summed over in some of several factors")
    relation.macs = math.prod(sizes[x] for x in set(axes) - set(right))
    return relation


@rule("conv1d", "conv2d", "conv3d", "convolution")
def _conv(call: Call) -> Relation | None:
    if call.get("transposed"):
        return _transposed(call)
    return _convolve(call, transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(call: Call) -> Relation | None:
    return _convolve(call, transposed=True)


def _convolve(call: Call, *, transposed: bool) -> Relation | None:
    groups = call["groups"]
    given, weight, result = call.shape("input"), call.shape("weight"), call.result()
    spatial = len(weight) - 2
    at = len(given) - spatial - 1
    relation = Relation(added="bias")
    batch = relation.axes(given[:at])
    incoming = relation.label(given[at])
    places = [relation.axes(sizes) for sizes in (given[at + 1 :], weight[2:], result[at + 1 :])]
    for each in places:
        relation.fix(each, SPATIAL)
    if groups == 1:
        outgoing = relation.label(result[at])
        kernel = [incoming, outgoing] if transposed else [outgoing, incoming]
        relation.sum_over(incoming)
    else:
        # One label for both sides: rank r does some of the groups.
        outgoing = incoming
        relation.units.update(dict.fromkeys(incoming.labels, groups))
        within = relation.label(weight[1])
        relation.fix([within], "it lies within the groups of a convolution")
        kernel = [incoming, within]
        relation.adjust = _fewer_groups
    operand(relation, call, "input", [*batch, incoming, *places[0]])
    operand(relation, call, "weight", [*kernel, *places[1]])
    operand(relation, call, "bias", [outgoing])
    relation.results = [(*batch, outgoing, *places[2])]
    relation.macs = math.prod(weight[2:]) * (weight[0] if transposed else weight[1])
    return relation


def _fewer_groups(arguments: dict[str, Any], local: Local) -> None:
    label = next(iter(local.cut), None)
    if label is not None:
        arguments["groups"] = local.units_of(label)


@rule(
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "instance_norm",
    "cudnn_batch_norm",
)
def _batch_norm(call: Call) -> Relation | None:
    relation = Relation(kept=("running_mean", "running_var"))
    sizes = call.shape("input")
    terms = relation.axes(sizes)
    if len(call.results()) != 1:
        return None
    operand(relation, call, "input", terms)
    for name in ("weight", "bias", "running_mean", "running_var"):
        operand(relation, call, name, [terms[1]])
    everywhere = [terms[0], *terms[2:]] if call.name == "batch_norm" else terms[2:]
    relation.fix(everywhere, NORMALISED)
    relation.results = [tuple(terms)]
    return relation


@rule("group_norm")
def _group_norm(call: Call) -> Relation | None:
    relation = Relation()
    terms = relation.axes(call.shape("input"))
    operand(relation, call, "input", terms)
    for name in ("weight", "bias"):
        operand(relation, call, name, [terms[1]])
    relation.units.update(dict.fromkeys(terms[1].labels, call["num_groups"]))
    relation.fix(terms[2:], NORMALISED)
    relation.results = [tuple(terms)]
    relation.adjust = _fewer_norm_groups
    return relation


def _fewer_norm_groups(arguments: dict[str, Any], local: Local) -> None:
    for label in local.cut:
        if label in local.units:
            arguments["num_groups"] = local.units_of(label)


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(call: Call) -> Relation | None:
    if len(call.results()) != 1:
        return None
    relation = Relation()
    terms = relation.axes(call.shape("input"))
    over = terms[len(terms) - len(call["normalized_shape"]) :]
    relation.fix(over, NORMALISED)
    operand(relation, call, "input", terms)
    for name in ("weight", "bias"):
        operand(relation, call, name, over)
    relation.results = [tuple(terms)]
    return relation


@rule("embedding")
def _embedding(call: Call) -> Relation | None:
    relation = Relation()
    words, width = call.shape("weight")
    vocabulary, feature = relation.label(words), relation.label(width)
    places = relation.axes(call.shape("indices"))
    operand(relation, call, "weight", [vocabulary, feature])
    operand(relation, call, "indices", places)
    relation.results = [(*places, feature)]
    if call["scale_grad_by_freq"] or call["sparse"]:
        relation.fix([vocabulary], "its embedding scales gradients by frequency, or is sparse")
    else:
        relation.sum_over(vocabulary)
        relation.special = "embedding"
    return relation


@rule("prelu")
def _prelu(call: Call) -> Relation | None:
    relation = Relation()
    terms = relation.axes(call.shape("self"))
    operand(relation, call, "self", terms)
    own = call.shape("weight")
    one = own == [1] or len(terms) < 2 or not own
    operand(relation, call, "weight", [NOTHING] * len(own) if one else [terms[1]])
    relation.results = [tuple(terms)]
    return relation if not own or own == [1] or len(terms) >= 2 else None


@rule("scaled_dot_product_attention")
def _attention(call: Call) -> Relation | None:
    query, key, value = (call.shape(name) for name in ("query", "key", "value"))
    if not len(query) == len(key) == len(value) or len(query) < 3:
        return None
    relation = Relation()
    batch = relation.axes(query[:-2])
    keys = list(batch)
    if key[:-2] != query[:-2]:
        if not call.get("enable_gqa") or key[:-3] != query[:-3] or len(query) < 4:
            return None
        if query[-3] % key[-3]:
            return None
        relation.units.update(dict.fromkeys(batch[-1].labels, key[-3]))
        # The same label in another size: query head i goes with key head i ÷ (their quotient).
        keys[-1] = batch[-1] if key[-3] > 1 else NOTHING
        if key[-3] == 1:
            relation.fix([batch[-1]], "all its heads share one key head")
    queries, places = relation.label(query[-2]), relation.label(key[-2])
    depth, width = relation.label(query[-1]), relation.label(value[-1])
    relation.fix([depth, places], "attention's softmax is over it, or a product before it")
    operand(relation, call, "query", [*batch, queries, depth])
    operand(relation, call, "key", [*keys, places, depth])
    operand(relation, call, "value", [*keys, places, width])
    if is_tensor(call.get("attn_mask")):
        sizes = [*query[:-1], key[-2]]
        own = broadcast(relation, [*batch, queries, places], sizes, call.shape("attn_mask"))
        if own is None:
            return None
        operand(relation, call, "attn_mask", own)
    if call.get("is_causal"):
        relation.fix([queries], "attention is causal along it")
    relation.results = [(*batch, queries, width)]
    return relation


_POOLS = """
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool2d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
    upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d
"""


@rule(*_POOLS.split())
def _pool(call: Call) -> Relation | None:
    name = "self" if "self" in call.arguments else "input"
    rank = len(call.shape(name))
    digits = [int(letter) for letter in call.name if letter in "123"]
    count = digits[0] if digits else 2
    return through(call, dict.fromkeys(range(rank - count, rank), SPATIAL), name)


@rule("feature_dropout", "feature_alpha_dropout")
def _feature_dropout(call: Call) -> Relation | None:
    return through(call, {}, "input")


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
      "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def _pad(call: Call) -> Relation | None:
    rank = len(call.shape("self"))
    pads = call["pad"] if "pad" in call.arguments else call["padding"]
    touched = {
        rank - 1 - at // 2: SPATIAL
        for at, number in enumerate(pads)
        if not (isinstance(number, int) and number == 0)
    }
    return through(call, touched)
