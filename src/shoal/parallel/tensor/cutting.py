"""A plan carried out: the graph of one rank, and the module's own parameters cut to its parts.

cut_model(made, model, rank)                         # in place, under all names
mine = apply(made, traced, model, group)             # before or after, train or eval graph
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shoal.comm import Group
from shoal.errors import Refused
from shoal.parallel.hooks import refuse_hooks
from shoal.parallel.tensor.plan import Graphed, TensorPlan, trained_placeholders
from shoal.parallel.tensor.rewrite import Rewriting
from shoal.parallel.tensor.split import CannotCut

T = TypeVar("T", bound=Graphed)


def apply(made: TensorPlan, traced: T, model: nn.Module, group: Group) -> T:
    """`traced` for the rank that `group` says; ``cut_outputs`` has the outputs that stay cut.

    The plan may come from another graph of the same model (its train mode). Raises `Refused` where
    this one cannot be cut so.
    """
    if group.size != made.ranks:
        raise ValueError(f"a plan for {made.ranks} ranks, a group of {group.size}")
    copy = traced.copy()
    if not made.cuts:
        return copy
    first = made.first_names
    known = {name: first.get(path, path) for name, path in traced.state.items()}
    cuts = {name: made.cuts[path] for name, path in known.items() if path in made.cuts}
    walk = Rewriting(copy.graph, cuts, group, trained_placeholders(traced, model))
    try:
        walk.run()
    except CannotCut as error:
        raise Refused(
            f"tensor parallelism cannot cut this graph as it was planned: {error}",
            hint="The model computes something else in this mode; use a strategy without tp.",
        ) from error
    copy.graph.lint()
    copy.cut_outputs = {at: cut.dim for at, cut in walk.cut_outputs.items()}
    for node in copy.graph.nodes:
        if node.op == "output":
            node.meta["cut_outputs"] = walk.cut_outputs
    return copy


@torch.no_grad()
def cut_model(made: TensorPlan, model: nn.Module, rank: int) -> None:
    """Leave in `model` this rank's part of each parameter and buffer, under all of its names.

    One after another, so that the whole ones need not be there beside all parts. Raises `Refused`
    for one with a hook of the user's own, which would be lost.
    """
    names = {**_names(model.named_parameters()), **_names(model.named_buffers())}
    refuse_hooks({name: names[name] for name in made.cuts}, f"tp{made.ranks}")
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, value in store.items():
                places.setdefault(id(value), []).append((store, key))
    for name in made.cuts:
        whole = names.pop(name)
        mine = made.part(name, rank).take(whole.detach())
        if isinstance(whole, nn.Parameter):
            mine = nn.Parameter(mine, requires_grad=whole.requires_grad)
        for store, key in places[id(whole)]:
            store[key] = mine


def _names(pairs: object) -> dict[str, Tensor]:
    return dict(pairs)  # type: ignore[call-overload, no-any-return]
