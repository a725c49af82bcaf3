"""zero2 and zero3 of a traced model: this rank's rows, and weights gathered where a unit runs.

    forward    gather 0 ▸ run ▸ (free) ▸ gather 1 ▸ run ▸ …
    backward   … ▸ (gather 0) ▸ run ▸ free ▸ sum its gradients, keep this rank's rows

    rows = GatheredRows(groups)
    rows.cut(model)                              # parameters stay, and have no memory from now on
    live = rows.run(unit, function, values)      # in the forward pass of a stage, unit by unit

A unit is what lies between two borders of a traced graph: a block, or what is between blocks. zero3
sums a unit's gradients after each of its backward passes. zero2 keeps weights and gradients whole
to the stage's last one, so that a step of many microbatches gathers and sums once.

Not torch's `fully_shard`: it takes parameters for those of one module, called forward and backward
in turn, and puts others in their place. Here graphs of training and of evaluation have the same
ones, and are made when they are needed; forwards and backwards of several microbatches mix;
zero-bubble schedules have a weight's gradient after the backward pass; and stages share parameters.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shoal.comm import Group, Groups
from shoal.errors import Refused, RunError
from shoal.layout import Part
from shoal.parallel.zero.rows import Cut, gather, reduce
from shoal.parallel.zero.states import scale
from shoal.parallel.zero.twin import Twin, rows

_DIGEST = 1 << 20  # its square, summed over the ranks, is exact in float64

Values = dict[str, Tensor]
Call = Callable[[Values], Values]
Place = tuple[int, int]  # stage, microbatch


@dataclass(frozen=True, eq=False)
class Unit:
    """What is gathered together; ``stage`` and ``number`` name it alike on all replicas."""

    stage: int
    number: int
    parameters: tuple[nn.Parameter, ...]

    def __str__(self) -> str:
        return f"{self.stage}.{self.number}"


@dataclass
class _Pass:
    """The backward pass in hand."""

    place: Place = (0, 0)
    sums: bool = True  # whether what it leaves is summed over the replicas
    later: bool = False  # … and not before weights have got their gradients
    waiting: dict[Place, list[Unit]] = field(default_factory=dict)


class GatheredRows:
    """The rows of every parameter that this rank keeps; see `States`. 0-d ones are whole.

    ``keep``: weights stay whole from their first use in a step to its end (zero2). ``later``:
    backward passes come in two halves.
    """

    in_step = True

    def __init__(self, groups: Groups, *, keep: bool = False, later: bool = False) -> None:
        self._group: Group = groups.shard
        self._everyone, self._copies = groups.data, groups.copies
        self.keeps = keep
        self._cuts: dict[nn.Parameter, Cut] = {}
        self._scalars: list[nn.Parameter] = []
        self._whole: set[nn.Parameter] = set()  # gathered now
        self._used: set[nn.Parameter] = set()  # with a gradient in the step in hand
        self._order: list[str] = []
        self._owed: dict[Unit, None] = {}  # with gradients that are not summed yet
        self._pass = _Pass(later=later)
        self._units: dict[tuple[int, int, tuple[int, ...]], Unit] = {}
        self.holding: nn.Module = nn.Module()

    # ---- cutting

    def cut(self, model: nn.Module) -> None:
        """Keep this rank's rows of `model`'s parameters, and free the memory of these."""
        twin = Twin(model)
        twin.fill(self._piece)
        self.holding = twin.root

    def _piece(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dim() == 0:
            self._scalars.append(parameter)
            return parameter
        size, ranks = parameter.shape[0], self._group.size
        start, stop = rows(size, ranks, self._group.rank)
        own = parameter.detach()[start:stop].clone(memory_format=torch.contiguous_format)
        piece = nn.Parameter(own, requires_grad=parameter.requires_grad)
        if not _has_own_memory(parameter):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        padded = -(-size // ranks) * (parameter.numel() // max(1, size))
        self._cuts[parameter] = Cut(parameter, piece, padded)
        _free(parameter)
        return piece

    def unit(self, stage: int, number: int, tensors: Sequence[Tensor]) -> Unit:
        """The unit of a segment that needs these parameters (and buffers, which stay)."""
        found = dict.fromkeys(each for each in tensors if isinstance(each, nn.Parameter))
        key = stage, number, tuple(map(id, found))
        return self._units.setdefault(key, Unit(stage, number, tuple(found)))

    def layout(self, whole: dict[str, Part]) -> dict[str, Part]:
        pieces = {id(each.piece) for each in self._cuts.values()}
        cut = dict(whole)
        for name, piece in self.holding.named_parameters(remove_duplicate=False):
            if id(piece) in pieces:
                held = rows(whole[name].shape[0], self._group.size, self._group.rank)
                cut[name] = whole[name].narrow(0, *held)
        return cut

    def piece_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What of a parameter is kept here, and gets its gradient."""
        return self._cuts[parameter].piece if parameter in self._cuts else parameter

    def is_on_all(self, parameter: nn.Parameter) -> bool:
        """Whether one of `holding` is whole on all ranks of the shard group."""
        return parameter.dim() == 0

    # ---- a unit runs

    def run(self, unit: Unit, call: Call, values: Values) -> Values:
        """``call(values)`` with the unit's parameters there; its backward pass likewise."""
        if not torch.is_grad_enabled():
            self._gather(unit)
            made = _apart(call(values), unit)
            self._leave(unit, keep=False)
            return made
        names: list[str] = []
        # So that there is a backward pass where nothing that comes in has a gradient.
        anchor = torch.zeros((), requires_grad=True)
        given = tuple(values.values())
        made = _Run.apply(anchor, self, unit, call, tuple(values), names, *given)  # type: ignore[no-untyped-call]
        return dict(zip(names, made, strict=True))

    @torch.no_grad()
    def _gather(self, unit: Unit) -> None:
        wanted = [p for p in unit.parameters if p in self._cuts and p not in self._whole]
        if not wanted:
            return
        self._order.append(f"gather {unit}")
        for parameter in wanted:
            storage = parameter.untyped_storage()
            storage.resize_(parameter.numel() * parameter.element_size())
        gather([self._cuts[each] for each in wanted], self._group)
        self._whole.update(wanted)

    def _leave(self, unit: Unit, *, keep: bool) -> None:
        for parameter in () if keep else unit.parameters:
            if parameter in self._whole:
                self._whole.discard(parameter)
                _free(parameter)

    # ---- gradients

    def begin_backward(self, place: Place, *, last: bool) -> None:
        """A backward pass of a stage and microbatch begins; ``last``: the stage's last."""
        self._pass.place = place
        self._pass.sums = last or not self.keeps

    def _done(self, unit: Unit) -> None:
        """A unit's backward pass has ended."""
        self._leave(unit, keep=self.keeps)
        self._owed[unit] = None
        if self._pass.later:
            self._pass.waiting.setdefault(self._pass.place, []).append(unit)
        elif self._pass.sums:
            self._sum(unit)

    def settle(self, place: Place, *, last: bool) -> None:
        """Weights have got their gradients of a backward pass in two halves."""
        units = self._pass.waiting.pop(place, [])
        for unit in units if last or not self.keeps else ():
            self._sum(unit)

    @torch.no_grad()
    def _sum(self, unit: Unit) -> None:
        """Over the replicas; this rank keeps its rows of the sum."""
        self._owed.pop(unit, None)
        trained = [p for p in unit.parameters if p in self._cuts and p.requires_grad]
        if not trained:
            return
        self._order.append(f"sum {unit}")
        for parameter in trained:
            if parameter.grad is not None:
                self._used.add(parameter)
                _require_dense(parameter)
        reduce([self._cuts[each] for each in trained], self._group)

    def finish(self) -> None:
        """Compare what the replicas have run, and find what none of them has used. Collective."""
        for unit in list(self._owed):  # which the stage's last backward pass has left out
            self._sum(unit)
        for parameter in self._whole:
            _free(parameter)
        self._whole.clear()
        self._pass.waiting.clear()
        trained = [each for p, each in self._cuts.items() if p.requires_grad]
        scalars = [each for each in self._scalars if each.requires_grad]
        digest = float(zlib.crc32("\n".join(self._order).encode()) % _DIGEST)
        used = [float(each.parameter in self._used) for each in trained]
        used += [float(each.grad is not None) for each in scalars]
        # On the host, as it is read at once.
        vector = torch.tensor([digest, digest**2, *used], dtype=torch.float64)
        total, squares, *counts = self._everyone.all_reduce(vector, "agreement").tolist()
        if int(total) ** 2 != int(squares) * self._everyone.size:
            raise RunError(
                "zero2 and zero3 need every replica to run the same parts of the model in the same "
                "order, and in this step they have not",
                hint="An objective that uses other outputs on each rank can be trained with zero1.",
                phase="backward",
            )
        self._order.clear()
        self._used.clear()
        for each, count in zip(trained, counts, strict=False):
            if not count:
                each.piece.grad = None
            elif self._copies.size > 1:
                if each.piece.grad is None:
                    each.piece.grad = torch.zeros_like(each.piece)
                self._copies.all_reduce(each.piece.grad, "gradient")
        self._sum_scalars(scalars, counts[len(trained) :])

    def _sum_scalars(self, scalars: Sequence[nn.Parameter], counts: Sequence[float]) -> None:
        for parameter, count in zip(scalars, counts, strict=True):
            if count:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._everyone.all_reduce(own, "gradient")

    def take_gradients(self, factor: float) -> None:
        scale(self.holding, factor)

    def norm(self) -> Tensor:
        """Not here: which numbers count once is known to the staged replica."""
        raise NotImplementedError

    def spread(self) -> None:
        """Nothing: a unit is gathered where it runs."""


class _Run(torch.autograd.Function):
    """A unit as one operation: its own graph is inside, so that nothing runs before or after."""

    @staticmethod
    def forward(
        ctx: Any,
        _anchor: Tensor,
        rows: GatheredRows,
        unit: Unit,
        call: Call,
        given: tuple[str, ...],
        names: list[str],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        rows._gather(unit)
        with torch.enable_grad():
            inner = [each.detach().requires_grad_(each.requires_grad) for each in tensors]
            made = _apart(call(dict(zip(given, inner, strict=True))), unit)
        rows._leave(unit, keep=rows.keeps)
        names += made
        outputs = tuple(made.values())
        ctx.rows, ctx.unit, ctx.inner, ctx.outputs = rows, unit, inner, outputs
        ctx.set_materialize_grads(False)
        results = tuple(each.detach() for each in outputs)
        plain = [r for o, r in zip(outputs, results, strict=True) if not o.requires_grad]
        ctx.mark_non_differentiable(*plain)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, unit, inner, outputs = ctx.rows, ctx.unit, ctx.inner, ctx.outputs
        del ctx.inner, ctx.outputs  # nothing of this is needed when it is over
        known = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        del outputs, gradients
        if known:
            rows._gather(unit)
            torch.autograd.backward([o for o, _ in known], [g for _, g in known])
            del known
            rows._done(unit)
        return (*(None,) * 6, *(each.grad for each in inner))


def _apart(made: Values, unit: Unit) -> Values:
    """A unit's results, none of them in the memory of its parameters, which is freed."""
    own = {each.untyped_storage().data_ptr() for each in unit.parameters if each.numel()}
    return {
        name: each.clone() if each.untyped_storage().data_ptr() in own and each.numel() else each
        for name, each in made.items()
    }


def _has_own_memory(parameter: nn.Parameter) -> bool:
    """Whether it lies in the usual order, in memory that nothing else lies in."""
    size = parameter.numel() * parameter.element_size()
    return parameter.is_contiguous() and parameter.untyped_storage().nbytes() == size


def _free(parameter: nn.Parameter) -> None:
    parameter.untyped_storage().resize_(0)


def _require_dense(parameter: nn.Parameter) -> None:
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise Refused(
            f"a parameter of shape {list(parameter.shape)} has a sparse gradient, and replicas "
            "sum dense ones",
            hint="Make the embedding with sparse=False.",
        )
