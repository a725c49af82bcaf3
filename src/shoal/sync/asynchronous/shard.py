"""An owner's part of the weights: contributions come in any order, updates are made in one.

    step k, pieces 0 … n-1      gradient = Σ_i  c_i ÷ C · g_i        in the order of i
    delay compensation          g_i + λ · g_i · g_i · (w_k - w_v)    (Zheng et al. 2017, eq. 10)
    damping                     lr · Σ_i  c_i ÷ C · (1 + k - v_i)^-p    (Zhang et al. 2016: p = 1)
    version k + 1               one update of the recipe's optimizer, at the rate of step k

g_i is the mean gradient of contribution i over the c_i that its objective counts, computed on
version v ≥ k - S; C is the sum of all counts. A contribution that was refused has no piece: the sum
is over the others. The last S + 1 versions are kept, as workers may still ask for them.

    shard.add(Piece(step, index, version, count, gradient))
    while shard.is_ready:
        shard.sum_up(); shard.update(norm)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from shoal.sync.asynchronous.parts import Part


@dataclass(frozen=True, eq=False)
class Piece:
    """A contribution to this part; ``gradient`` None where there is nothing to add."""

    step: int
    index: int
    version: int
    count: float
    gradient: Tensor | None


@dataclass(frozen=True)
class Rules:
    """How ``each`` contributions become an update: ``bound`` on staleness, λ, p, clipping.

    ``of``: with copies, whose part each parameter is of: its owner's, or another's that this one
    keeps a copy of. Both get the same bits.
    """

    each: int
    bound: int
    compensate: float = 0.0
    damp: float = 0.0
    clip_norm: float | None = None
    of: Sequence[int] = ()


class Shard:
    """One owner's tensors, their optimizer, and the last versions. ``set_rate(step)`` sets lr."""

    def __init__(
        self,
        part: Part,
        optimizer: Optimizer,
        set_rate: Callable[[int], object],
        rules: Rules,
        version: int,
    ) -> None:
        self._part, self._optimizer, self._set_rate, self._rules = part, optimizer, set_rate, rules
        self._pieces: dict[int, dict[int, Piece]] = {}
        self._buffers = part.weights()[part.weights_size :]
        self._there: list[Piece] = []
        self._fresh = 1.0
        self.version = version
        self.versions = {version: part.weights()}

    def add(self, piece: Piece) -> None:
        """Take in a contribution; each is there once."""
        of_step = self._pieces.setdefault(piece.step, {})
        if piece.index in of_step:
            raise RuntimeError(f"contribution {piece.step}/{piece.index} has come twice")
        of_step[piece.index] = piece

    def drop(self, step: int, index: int) -> None:
        """Forget a contribution, if it has come: another comes in its place."""
        if step < self.version:
            raise RuntimeError(f"contribution {step}/{index} was applied, and cannot be dropped")
        self._pieces.get(step, {}).pop(index, None)

    @property
    def is_ready(self) -> bool:
        """Whether all contributions of the next step are there."""
        return len(self._pieces.get(self.version, ())) == self._rules.each

    @torch.no_grad()
    def sum_up(self) -> dict[int, float]:
        """Give the parameters the step's gradient; returns the square of its norm.

        By owner, where there are copies; else under 0. Nothing has changed before `update`.
        """
        of_step = self._pieces[self.version]
        pieces = [of_step[index] for index in range(self._rules.each)]
        there = [piece for piece in pieces if piece.gradient is not None]
        self._there = there
        total = sum(piece.count for piece in there)
        self._fresh = self._freshness(there, total)
        part = self._part
        flat = torch.zeros(part.size + len(part.parameters), dtype=part.dtype)
        for piece in there:
            weight = piece.count / total if total else 0.0
            self._add(flat[: part.weights_size], self._compensated(piece), weight)
        used = [bool(number) for number in self._used(there).tolist()]
        places = part.of_parameters(flat)
        for parameter, place, is_used in zip(part.parameters, places, used, strict=True):
            parameter.grad = place if is_used else None
        present = [place for place, is_used in zip(places, used, strict=True) if is_used]
        squares = [float(norm) ** 2 for norm in torch._foreach_norm(present)] if present else []
        if not self._rules.of:
            return {0: sum(squares)}
        by_owner = dict.fromkeys(self._rules.of, 0.0)
        of = [owner for owner, is_used in zip(self._rules.of, used, strict=True) if is_used]
        for owner, square in zip(of, squares, strict=True):
            by_owner[owner] += square
        return by_owner

    def _add(self, total: Tensor, values: Tensor, weight: float) -> None:
        """Add so much of some values; where there are copies, in two roundings.

        In one, the bits of an element would depend on its place.
        """
        if self._rules.of:
            total.add_(values * weight)
        else:
            total.add_(values, alpha=weight)

    def _freshness(self, pieces: list[Piece], total: float) -> float:
        """What the learning rate is multiplied by."""
        if not self._rules.damp or not total:
            return 1.0
        ages = [(piece.count, 1 + piece.step - piece.version) for piece in pieces]
        return float(sum(count / total * age**-self._rules.damp for count, age in ages))

    def _used(self, pieces: list[Piece]) -> Tensor:
        used = torch.zeros(len(self._part.parameters), dtype=self._part.dtype)
        for piece in pieces:
            assert piece.gradient is not None
            used += piece.gradient[self._part.size :]
        return used

    def _compensated(self, piece: Piece) -> Tensor:
        assert piece.gradient is not None
        size, strength = self._part.weights_size, self._rules.compensate
        gradient = piece.gradient[:size]
        if not strength or piece.version == self.version:
            return gradient
        moved = self.versions[self.version][:size] - self.versions[piece.version][:size]
        return gradient + strength * gradient * gradient * moved

    def _change_buffers(self, pieces: list[Piece]) -> None:
        """Add the mean of what the contributions have changed."""
        if not pieces:
            return
        first, last = self._part.weights_size, self._part.size
        for piece in pieces:
            assert piece.gradient is not None
            self._add(self._buffers, piece.gradient[first:last], 1 / len(pieces))
        start = 0
        for buffer in self._part.buffers:
            values = self._buffers[start : start + buffer.numel()].view(buffer.shape)
            # A mean of n equal whole numbers may be off by a rounding.
            buffer.copy_(values if buffer.is_floating_point() else values.round())
            start += buffer.numel()

    @torch.no_grad()
    def update(self, norm: float) -> int:
        """Clip by the whole model's ``norm``, update, keep the new version; returns its number.

        A step that has no contribution left changes nothing.
        """
        parameters = self._part.parameters
        self._change_buffers(self._there)
        if self._there:
            self._set_rate(self.version)
            if self._fresh != 1.0:
                for group in self._optimizer.param_groups:
                    group["lr"] *= self._fresh
            if self._rules.clip_norm is not None:
                of_all = torch.tensor(norm, dtype=self._part.dtype)
                torch.nn.utils.clip_grads_with_norm_(parameters, self._rules.clip_norm, of_all)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        del self._pieces[self.version]
        self.version += 1
        self.versions[self.version] = self._part.weights()
        self.versions.pop(self.version - self._rules.bound - 1, None)
        return self.version
