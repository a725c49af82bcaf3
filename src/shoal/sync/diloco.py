"""`diloco:H`: an outer step of Nesterov's on the mean change of H inner steps.

    θ         outer weights, the same on all replicas; each begins a round at them
    Δ  = Σ_r (examples of r ÷ all) · (θ - w_r)           after H inner steps
    m ← μ m + Δ,    θ ← θ - lr · (Δ + μ m)               (Douillard et al. 2023, algorithm 1)
    w_r ← θ

The inner optimizers keep their states, and are never averaged. Float buffers are.

`fragments=n` (Streaming DiLoCo, Douillard et al. 2025): parameters in their order are cut into n
parts of about equal size, which meet in turn, each every H steps, part i after i·H/n of a round:

    step          0 1 2 3 4 5 6 7 8 9 …
    part 0                      x         H = 8, n = 2
    part 1              x               x

`overlap=1`: Δ is sent after a step, and taken τ = min(5, H - 1) steps later: the steps between
compute meanwhile. Then, by the paper's mixing rule, with α = 1/2 here,

    w_r ← α · w_r + (1 - α) · θ

At the end of a run all that is under way is taken, then all parts meet, and w_r ← θ.

`wire=bf16` adds up 16-bit numbers. `wire=int8` sends a byte for each number and two for the scale
of each 256; every rank gets the others' and adds them up in full.
"""

import torch
from torch import Tensor

from shoal.strategy import DiLoCo
from shoal.sync.average import average
from shoal.sync.changes import Changes
from shoal.sync.choose import sums_of, sums_on_wire
from shoal.sync.meetings import MeanOfReplicas, Setting, floating, trained
from shoal.sync.rounds import Rounds
from shoal.sync.sums import Line

LONGEST_OVERLAP = 5
MIXING = 0.5
MOMENTUM = "sync.momentum"


class OuterSteps(MeanOfReplicas):
    """Replicas whose mean change is a gradient for an optimizer of its own."""

    def __init__(self, agreement: DiLoCo, setting: Setting) -> None:
        super().__init__(setting)
        weights = trained(setting.model)
        parts = cut_evenly(weights, agreement.fragments)
        self._setting = setting
        self._fragments = [
            _Fragment(agreement, setting, part, number * agreement.every // agreement.fragments)
            for number, part in enumerate(parts)
        ]
        learned = {id(each) for each in weights.values()}
        self._buffers = [t for t in floating(setting.model).values() if id(t) not in learned]
        self._rounds = Rounds(agreement.every, setting.total_steps)

    @property
    def hidden_s(self) -> float:
        """Seconds of communication so far during which this rank computed."""
        return sum(fragment.hidden_s for fragment in self._fragments)

    def gradients(self, step: int, count: float) -> bool:
        return False

    def after(self, step: int) -> None:
        """Send and take what is due."""
        if self._rounds.ends(step):
            share = self._setting.share(self._rounds.first(step), step)
            average(self._buffers, share, self._setting.between)
        for fragment in self._fragments:
            fragment.after(step)
        self.are_equal = self._setting.is_last(step) or (
            len(self._fragments) == 1 and not self._fragments[0].overlap and self._rounds.ends(step)
        )

    def state(self) -> dict[str, Tensor]:
        return {k: v for fragment in self._fragments for k, v in fragment.state().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for fragment in self._fragments:
            fragment.restore(tensors)


class _Fragment:
    """Parameters that meet together."""

    def __init__(
        self, how: DiLoCo, setting: Setting, weights: dict[str, Tensor], offset: int
    ) -> None:
        self._how, self._setting = how, setting
        self._rounds = Rounds(how.every, setting.total_steps, offset=offset)
        line = Line(setting.between, "parameter", place=setting.place)
        sums = sums_on_wire(how.wire, line)
        if setting.compress is not None:
            sums = sums_of(setting.compress, line, weights)
        self._changes = Changes(weights, sums)
        self._momentum = {
            name: torch.zeros_like(weight.detach())
            for name, weight in weights.items()
            if how.momentum
        }
        self.overlap = min(LONGEST_OVERLAP, how.every - 1) if how.overlap else 0

    @property
    def hidden_s(self) -> float:
        return self._changes.hidden_s

    def after(self, step: int) -> None:
        """What is due after this step."""
        last = self._setting.is_last(step)
        sent = step - self.overlap
        if self.overlap and (last or (sent >= 0 and self._rounds.ends(sent))):
            self._take(MIXING)
        if self._rounds.ends(step):
            self._changes.start(self._setting.share(self._rounds.first(step), step))
            if last or not self.overlap:
                self._take(0.0)

    def _take(self, mixing: float) -> None:
        """Do the outer step with what has arrived, if anything was sent."""
        lr, momentum = self._how.lr, self._how.momentum
        with torch.no_grad():
            for name, weight, outer, change in self._changes.arrived():
                step = change  # −Δ
                kept = self._momentum.get(name)
                if kept is not None:
                    kept.mul_(momentum).add_(change)
                    step = change + momentum * kept
                outer.add_(step, alpha=lr)
                if mixing:
                    weight.mul_(mixing).add_(outer, alpha=1 - mixing)
                else:
                    weight.copy_(outer)

    def state(self) -> dict[str, Tensor]:
        momentum = {f"{name}/{MOMENTUM}": kept for name, kept in self._momentum.items()}
        return self._changes.state() | momentum

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self._changes.restore(tensors)
        for name, kept in self._momentum.items():
            if f"{name}/{MOMENTUM}" in tensors:
                kept.copy_(tensors[f"{name}/{MOMENTUM}"])


def cut_evenly(weights: dict[str, torch.nn.Parameter], parts: int) -> list[dict[str, Tensor]]:
    """Consecutive parameters, in `parts` parts of about equal size, some empty if there are few."""
    total = sum(weight.numel() for weight in weights.values())
    found: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    before = 0
    for name, weight in weights.items():
        middle = before + weight.numel() / 2
        found[min(parts - 1, int(parts * middle / max(total, 1)))][name] = weight
        before += weight.numel()
    return found
