"""How far replicas have come since they were equal, and what that is in the mean.

w_r           the weights of replica r now
θ             the weights at the last meeting, the same bits on all
Δ = Σ_r share_r · (w_r - θ)

changes = Changes(trained, sums)
changes.start(share)                 # what is sent is small where `sums` make it so
for name, weight, theta, change in changes.arrived(): …
"""

import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shoal.sync.sums import Sums, UnderWay

LAST = "sync.last"
ARRIVING = "sync.arriving"


class Changes:
    """Of some tensors by name; one sum is under way at a time."""

    def __init__(self, tensors: Mapping[str, Tensor], sums: Sums, key: str = LAST) -> None:
        self.tensors = dict(tensors)
        self._key = key  # what θ is called in checkpoints
        self._sums = sums
        self.last = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._deltas: dict[str, Tensor] = {}
        self._under_way: UnderWay | None = None
        self.hidden_s = 0.0

    def begin_here(self) -> None:
        """Replicas are equal now: this is θ."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                self.last[name].copy_(tensor)

    def start(self, share: float) -> None:
        """Send how far this replica has come. Collective."""
        with torch.no_grad():
            self._deltas = {
                name: (tensor.detach() - self.last[name]).mul_(share)
                for name, tensor in self.tensors.items()
            }
        self._under_way = self._sums.start(self._deltas)

    def arrived(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Of each tensor its name, w_r, θ and Δ, which may all be changed; once for each start."""
        self._wait()
        deltas, self._deltas = self._deltas, {}
        for name, delta in deltas.items():
            yield name, self.tensors[name].detach(), self.last[name], delta

    def _wait(self) -> None:
        if self._under_way is not None:
            began_to_wait = time.perf_counter()
            self._under_way.wait()
            ended = min(self._under_way.ended or began_to_wait, began_to_wait)
            self.hidden_s += max(0.0, ended - self._under_way.began)
            self._under_way = None

    def state(self) -> dict[str, Tensor]:
        """θ; of a sum that is under way what comes of it; and what the sums keep."""
        self._wait()
        held = {f"{name}/{self._key}": tensor for name, tensor in self.last.items()}
        held |= {f"{name}/{ARRIVING}": delta for name, delta in self._deltas.items()}
        return held | self._sums.state()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`; θ is what the weights are now, where there is none."""
        self.begin_here()
        with torch.no_grad():
            for name, last in self.last.items():
                if f"{name}/{self._key}" in tensors:
                    last.copy_(tensors[f"{name}/{self._key}"])
        found = {name: tensors.get(f"{name}/{ARRIVING}") for name in self.tensors}
        self._deltas = {
            name: delta.to(self.last[name].device, copy=True)
            for name, delta in found.items()
            if delta is not None
        }
        self._sums.restore(tensors)
