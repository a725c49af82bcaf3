"""Letters between the threads of ranks: small numbers, and perhaps one tensor, from any to any.

    sender thread of (a, b)    numbers ─ payload ─▶    receiver thread of (a, b)    handle(letter)

    mail = Mail(group, torch.float32, handle)
    mail.start()                                     # once `handle` may be called
    mail.send(1, KIND, (step, index), gradient)      # returns at once; keep the tensor as it is
    mail.close()                                     # collective: the last letters have arrived

Between two ranks letters arrive in the order in which they were sent, those of a rank to itself
included. `handle` is called in a thread of mail's, one for each source, and must not wait for other
letters. A thread that fails (the other rank has gone) keeps its error in ``failure`` and calls
``failed``; where the rank that has gone is one that may be lost, the others' letters go on, and
``lost`` is called once all that it had sent was handled. Each pair of ranks has a thread for each
direction: nobody waits behind a slow rank but what is for that rank.
"""

import queue
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.comm.counter import Counter, Purpose
from shoal.comm.failures import peer_failures
from shoal.comm.groups import Group
from shoal.errors import PeerLost

NUMBERS = 10  # of a letter, at most
_HEADER = NUMBERS + 2  # and its kind, and the size of its payload
_ASKS_NO_MORE, _END, _STILL_HERE = -1, -2, -3
STILL_HERE_S = 30.0  # so often a silent rank says that it is there: gloo's receives have a deadline


@dataclass(frozen=True)
class Letter:
    """What a rank has sent: ``numbers`` are `NUMBERS` float64, filled with zeros."""

    source: int
    kind: int
    numbers: tuple[float, ...]
    payload: Tensor | None = None

    def whole(self, count: int) -> tuple[int, ...]:
        """The first numbers, as integers."""
        return tuple(int(number) for number in self.numbers[:count])


_Queued = tuple[Tensor, Tensor | None]


class Mail:
    """One rank's post. ``dtype`` is that of all payloads, which lie in the host's memory.

    ``may_lose``: ranks without which the others go on.
    """

    def __init__(
        self,
        group: Group,
        dtype: torch.dtype,
        handle: Callable[[Letter], None],
        failed: Callable[[], None] = lambda: None,
        *,
        may_lose: Collection[int] = (),
        lost: Callable[[int], None] = lambda _rank: None,
    ) -> None:
        self.failure: BaseException | None = None
        self.counter = Counter()
        self._group, self._dtype, self._handle, self._failed = group, dtype, handle, failed
        self._out: list[queue.SimpleQueue[_Queued]] = [
            queue.SimpleQueue() for _ in range(group.size)
        ]
        others = [rank for rank in range(group.size) if rank != group.rank]
        works: list[tuple[Callable[[int], None], int]] = [(self._receive_own, group.rank)]
        works += [(self._receive, rank) for rank in others] + [
            (self._send, rank) for rank in others
        ]
        self._may_lose, self._on_lost = frozenset(may_lose), lost
        self._gone: set[int] = set()
        self._no_more = threading.Semaphore(0)
        self._asks_no_more: set[int] = set()
        self._threads = [
            threading.Thread(target=self._guarded, args=work, name="shoal-mail", daemon=True)
            for work in works
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def send(
        self,
        to: int,
        kind: int,
        numbers: Sequence[float] = (),
        payload: Tensor | None = None,
        purpose: Purpose = "agreement",
    ) -> None:
        """Put a letter into the queue of the group's rank `to`. ``payload``: 1-d, contiguous."""
        if to in self._gone:
            return
        header = torch.zeros(_HEADER, dtype=torch.float64)
        size = -1 if payload is None else payload.numel()
        header[: len(numbers) + 2] = torch.tensor([kind, size, *numbers], dtype=torch.float64)
        if to != self._group.rank:
            # Threads of several kinds send, and a sum is no single operation.
            self.counter.add("send", "agreement", _HEADER * 8)
            if payload is not None:
                self.counter.add("send", purpose, payload.numel() * payload.element_size())
        self._out[to].put((header, payload))

    def close(self) -> None:
        """Let the last letters arrive, and the answers to them. Collective.

        Raises what has ended a thread.
        """
        everyone = range(self._group.size)
        for rank in everyone:
            self.send(rank, _ASKS_NO_MORE)
        # What others have asked before that is answered by then, and the answers are queued.
        for _ in everyone:
            self._no_more.acquire()
        for rank in everyone:
            self.send(rank, _END)
        for thread in self._threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _guarded(self, work: Callable[[int], None], rank: int) -> None:
        try:
            with peer_failures():
                work(rank)
        except BaseException as error:
            if rank in self._may_lose and isinstance(error, PeerLost):
                self._lose(rank, heard_all=work == self._receive)
                return
            if self.failure is None:
                self.failure = error
            self._no_more.release(self._group.size)  # nobody waits for what does not come
            self._failed()

    def _lose(self, rank: int, *, heard_all: bool) -> None:
        """Go on without a rank; either of its two threads may be the first to know."""
        self._gone.add(rank)
        if not heard_all:
            return
        end = torch.zeros(_HEADER, dtype=torch.float64)
        end[:2] = torch.tensor([_END, -1], dtype=torch.float64)
        self._out[rank].put((end, None))  # it ends the thread that sends
        if rank not in self._asks_no_more:
            self._no_more.release()
        try:
            self._on_lost(rank)
        except BaseException as error:
            self.failure = self.failure or error
            self._failed()

    def _send(self, to: int) -> None:
        """Send what is queued for a rank, one after another."""
        process_group = self._group.process_group
        while True:
            try:
                header, payload = self._out[to].get(timeout=STILL_HERE_S)
            except queue.Empty:
                header, payload = torch.zeros(_HEADER, dtype=torch.float64), None
                header[:2] = torch.tensor([_STILL_HERE, -1], dtype=torch.float64)
            dist.send(header, group=process_group, group_dst=to)
            if payload is not None and payload.numel():
                dist.send(payload, group=process_group, group_dst=to)
            if header[0] == _END:
                return

    def _receive(self, source: int) -> None:
        header = torch.zeros(_HEADER, dtype=torch.float64)
        while True:
            dist.recv(header, group=self._group.process_group, group_src=source)
            kind, size, *numbers = header.tolist()
            payload = None
            if size >= 0:
                payload = torch.empty(int(size), dtype=self._dtype)
                if size:
                    dist.recv(payload, group=self._group.process_group, group_src=source)
            if not self._take(Letter(source, int(kind), tuple(numbers), payload)):
                return

    def _receive_own(self, rank: int) -> None:
        while True:
            header, payload = self._out[rank].get()
            kind, _, *numbers = header.tolist()
            if not self._take(Letter(rank, int(kind), tuple(numbers), payload)):
                return

    def _take(self, letter: Letter) -> bool:
        """Handle a letter; False for the last one of its source."""
        if letter.kind == _ASKS_NO_MORE:
            self._asks_no_more.add(letter.source)
            self._no_more.release()
        elif letter.kind not in (_END, _STILL_HERE):
            self._handle(letter)
        return letter.kind != _END
