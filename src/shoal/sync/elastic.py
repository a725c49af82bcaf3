"""`easgd:H`: elastic averaging (Zhang, Choromanska, LeCun 2015, §2, the synchronous form).

    every H steps      w_r ← w_r - α (w_r - c)
                       c  ← c + α Σ_r (w_r - c)          both from the same w_r and c

The centre c has the same bits on all ranks, and stands for all replicas: it is what is evaluated.
Replicas are drawn to it, and stay apart. Each counts the same, however many examples it has seen.
Float buffers are drawn likewise. The last step of a run ends with a meeting.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from shoal.strategy import Easgd
from shoal.sync.changes import Changes
from shoal.sync.choose import sums_of
from shoal.sync.meetings import Setting, exchanged, floating
from shoal.sync.rounds import Rounds
from shoal.sync.sums import Line

BETA = 0.9  # replicas · α, §5.1
CENTRE = "sync.center"


class Elastic:
    """Replicas on springs."""

    hidden_s = 0.0

    def __init__(self, agreement: Easgd, setting: Setting) -> None:
        self._setting = setting
        given, usual = agreement.alpha, BETA / setting.between.size
        self._alpha = usual if given is None else given
        self._rounds = Rounds(agreement.every, setting.total_steps)
        self._floating = floating(setting.model)
        line = Line(setting.between, "parameter", place=setting.place)
        sums = sums_of(setting.compress, line, self._floating)
        self._changes = Changes(self._floating, sums, CENTRE)

    def gradients(self, step: int, count: float) -> bool:
        return False

    def after(self, step: int) -> None:
        """Draw replicas and centre to each other, where that is due."""
        if not self._rounds.ends(step):
            return
        self._changes.start(self._alpha)
        with torch.no_grad():
            for _, weight, centre, change in self._changes.arrived():
                weight.sub_(weight - centre, alpha=self._alpha)
                centre.add_(change)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """With the centre."""
        with exchanged(list(self._floating.values()), list(self._changes.last.values())):
            yield

    def state(self) -> dict[str, Tensor]:
        return self._changes.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self._changes.restore(tensors)
