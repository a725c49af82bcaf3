"""Commit: weights, optimizer, position in the data, early-stop state, together or not at all.

    step 40 ── check, copy ── step 41 ── step 42 ── step 43 ── … ── wait ── check, copy ── step 61
                  └─ thread: hash, meet, write, sync, rename ─┘

Training waits for the copy alone. The thread has connections of its own, so that its meetings do
not mix with those of the steps.

    committer.commit(40, convergence, state)
    committer.wait()                    # it is on the disk now, or an error says why not
"""

import contextlib
from collections.abc import Callable
from typing import Any

from shoal.checkpoint import Background, Copies, SavedCheckpoint, Snapshot, prune, save
from shoal.checkpoint.meeting import Meeting
from shoal.comm import Group
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.train.agree_start import not_finite, require_finite
from shoal.train.stop import Convergence
from shoal.train.team import Team


class GroupMeeting:
    """The ranks of a group, as a checkpoint's meeting."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank = group.rank
        self.size = group.size

    def all_gather_json(self, value: Any) -> list[Any]:
        return self._group.all_gather_json(value, "checkpoint")


class Committer:
    """Writes the checkpoints of one run, one at a time, in a thread. ``last`` is committed."""

    def __init__(
        self, team: Team, recipe: Recipe, run: Run, strategy: str, send: Callable[[Any], None]
    ) -> None:
        self._team = team
        self._recipe = recipe
        self._run = run
        self._strategy = strategy
        self._send = send
        self._meeting = GroupMeeting(team.job.groups.checkpoint)
        self._copies = Copies()
        self._background = Background()
        # An attention mask, say, may be a buffer with infinities from the start.
        self._never_finite = [not_finite(held) for held in team.holdings]
        self.last: SavedCheckpoint | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in flight has failed; :meth:`wait` raises it."""
        return self._background.failed

    @property
    def hidden_s(self) -> float:
        """Seconds of saving in which training went on."""
        return self._background.hidden_s

    def commit(self, step: int, convergence: Convergence, state: dict[str, Any]) -> None:
        """Copy what there is after `step` steps, and begin to save it. Collective.

        ``state`` is the loop's. The save before this one is waited for. Replicas whose weights
        differ are found by the save: it compares every piece's checksum. Once the checkpoint is
        there, what need not be kept is removed. A rank that owns nothing has no part in it. Raises
        `NotFinite`, and what :meth:`wait` raises.
        """
        if not self._team.saves:
            return
        self.wait()
        for held, never in zip(self._team.holdings, self._never_finite, strict=True):
            require_finite(held, step, never)
        fingerprint = self._recipe.fingerprint
        snapshot = self._copies.take(self._team.snapshot(step, fingerprint, self._strategy, state))
        best = (convergence.best_step,) if convergence.best is not None else ()
        meeting = self._team.meeting() or self._meeting
        self._background.start(lambda: self._save(snapshot, best, meeting))

    def wait(self) -> None:
        """Wait for the save in flight, if there is one. Raises what `checkpoint.save` raises.

        A save that fails does so on all ranks, with one error.
        """
        self.last = self._background.finish() or self.last

    def settle(self) -> None:
        """Let the save in flight end, however it does: another error ends the run."""
        with contextlib.suppress(Exception):
            self.wait()

    def _save(self, snapshot: Snapshot, best: tuple[int, ...], meeting: Meeting) -> SavedCheckpoint:
        folder, keep = self._run.checkpoints_path, self._recipe.checkpoint.keep
        saved = save(folder, snapshot, meeting, lambda: prune(folder, keep, also=best))
        self._send(
            {
                "kind": "checkpoint",
                "step": snapshot.step,
                "seconds": saved.seconds,
                "bytes": saved.bytes,
            }
        )
        return saved
