"""A sum that is under way: started now, waited for when it is needed.

    pending = group.all_reduce_later(counts, "metric")
    loss.backward()                      # meanwhile
    totals = pending.wait()

On CUDA `on_host` copies the result to the host beside the stream that computes: the host then waits
for the copy alone, while the device works on what was queued after it.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shoal.comm.counter import Counter
from shoal.comm.failures import peer_failures


class Pending:
    """`wait` returns the sum; the time that it takes is booked in `counter`."""

    def __init__(
        self,
        tensor: Tensor,
        work: Any = None,
        counter: Counter | None = None,
        finish: Callable[[], None] | None = None,
        *,
        tells_its_end: bool = True,
    ) -> None:
        self._tensor = tensor
        self._work = work
        self._counter = counter
        self._finish = finish
        self.began = time.perf_counter()
        self.ended: float | None = None
        # gloo's sends and receives have no future.
        if work is not None and counter is not None and tells_its_end:
            work.get_future().add_done_callback(self._done)

    def _done(self, _future: object) -> None:
        self.ended = time.perf_counter()

    def wait(self) -> Tensor:
        """The sum, once it is there (on CUDA: once its stream is told to wait for it)."""
        began = time.perf_counter()
        if self._work is not None:
            with peer_failures():
                self._work.wait()
            self._work = None
        if self._finish is not None:
            self._finish()
            self._finish = None
        if self._counter is not None:
            self._counter.waited_s += time.perf_counter() - began
        return self._tensor

    def on_host(self) -> "Pending":
        """The same sum, in the host's memory."""
        if self._tensor.device.type != "cuda":
            return self
        computing = torch.cuda.current_stream()
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(computing)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        host = torch.empty_like(self._tensor, device="cpu", pin_memory=True)
        with torch.cuda.stream(beside):
            host.copy_(self.wait(), non_blocking=True)
            copied.record(beside)
        self._tensor.record_stream(beside)
        return Pending(host, None, self._counter, copied.synchronize)
