"""Who may start on what, in asynchronous SGD: a rule of whole numbers, without threads or torch.

    step         k                  k + 1              k + 2
    contribution (k, 0) … (k, n-1)  (k + 1, 0) …       …            claimed in this order
    version      k  ── all n are there: one update ──▶  k + 1

A contribution of step k is applied at version k, whenever it is done; its staleness is k minus the
version that it was computed on. So the bound S is kept by who may *start*: step k may be claimed
once version k - S is there. Nobody's pace is set by a slow worker until the others have claimed all
that lies within the bound.

    claims = Claims(each=2, bound=1)
    first = claims.claim(worker=0)            # Claim(step=0, index=0, version=0, …)
    claims.finish(first)                      # True: it counts, and can't be taken back any more
    claims.advance(1)                         # all of step 0 was applied: version 1 is there
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Key = tuple[int, int]  # step, index


@dataclass(frozen=True)
class Claim:
    """A contribution that a worker has to compute on ``version``.

    ``attempt``: counts up when the contribution is taken back and claimed again.
    """

    step: int
    index: int
    worker: int
    version: int
    attempt: int = 0

    @property
    def key(self) -> Key:
        return self.step, self.index

    @property
    def staleness(self) -> int:
        """In optimizer steps."""
        return self.step - self.version


@dataclass
class Claims:
    """The contributions of a run, from step ``version`` on, ``each`` of them a step.

    ``limit``: no contribution of this step or a later one is given out. ``computed_on``: versions
    that contributions are to be computed on, by (step, index), where the order of another run is
    followed; else they are computed on the newest.
    """

    each: int
    bound: int
    version: int = 0
    limit: int | None = None
    computed_on: Mapping[Key, int] | None = None
    held: dict[Key, Claim] = field(default_factory=dict)  # in the hands of a worker
    _next: int = 0  # the first contribution that nobody has claimed yet, counted through
    _pool: list[Key] = field(default_factory=list)  # taken back
    _attempts: dict[Key, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._next = self.version * self.each

    @property
    def begun(self) -> int:
        """One past the last step that a contribution was claimed of."""
        return -(-self._next // self.each)

    @property
    def quiet(self) -> bool:
        """Whether nobody holds a claim, and none waits to be claimed again."""
        return not self.held and not self._pool

    def claim(self, worker: int) -> Claim | None:
        """The next contribution for `worker`; None where it has to wait."""
        if self._pool:
            step, index = key = heapq.heappop(self._pool)
        else:
            step, index = key = divmod(self._next, self.each)
            if not self._may_start(key):
                return None
            self._next += 1
        claim = Claim(step, index, worker, self._base(key), self._attempts.get(key, 0))
        self.held[key] = claim
        return claim

    def _may_start(self, key: Key) -> bool:
        if self.limit is not None and key[0] >= self.limit:
            return False
        return self.version >= max(key[0] - self.bound, self._base(key))

    def _base(self, key: Key) -> int:
        if self.computed_on is None:
            return self.version
        # What its ledger does not name was lost with the run: as if it were done at once.
        return self.computed_on.get(key, key[0])

    def finish(self, claim: Claim) -> bool:
        """Whether a contribution that is done counts; not if its claim was taken back."""
        if self.held.get(claim.key) != claim:
            return False
        del self.held[claim.key]
        self._attempts.pop(claim.key, None)
        return True

    def take_back(self, claim: Claim) -> None:
        """Return what a worker holds to the pool; the next to ask gets it, on a newer version."""
        if self.held.get(claim.key) == claim:
            del self.held[claim.key]
            self._attempts[claim.key] = claim.attempt + 1
            heapq.heappush(self._pool, claim.key)

    def reopen(self, claim: Claim) -> None:
        """Return to the pool what was done and counted, and has got lost on its way."""
        self._attempts[claim.key] = claim.attempt + 1
        heapq.heappush(self._pool, claim.key)

    def advance(self, version: int) -> None:
        """A newer version is there: all contributions of the steps before it were applied."""
        self.version = version


def simulated_seconds(
    seconds: list[float],
    bound: int,
    steps: int,
    tell: Callable[[Claim], None] = lambda _claim: None,
) -> float:
    """How long `steps` steps take where worker w needs ``seconds[w]`` for a contribution.

    Updates and messages take no time. ``tell`` hears of each contribution once it is done.
    """
    claims = Claims(len(seconds), bound, limit=steps)
    working: list[tuple[float, int, Claim]] = []  # when it will be done, by whom
    free, done, now = set(range(len(seconds))), [0] * steps, 0.0
    while claims.version < steps:
        for worker in sorted(free, key=lambda each: seconds[each]):
            claim = claims.claim(worker)
            if claim is not None:
                free.remove(worker)
                heapq.heappush(working, (now + seconds[worker], worker, claim))
        now, worker, claim = heapq.heappop(working)
        claims.finish(claim)
        tell(claim)
        free.add(worker)
        done[claim.step] += 1
        while claims.version < steps and done[claims.version] == len(seconds):
            claims.advance(claims.version + 1)
    return now
