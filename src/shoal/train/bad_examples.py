"""Examples that could not be read and were left out: counted, and named once each."""

from collections.abc import Callable, Sequence
from typing import Any

from shoal.comm import Group
from shoal.run import Run
from shoal.train.step import StepResult

NAMED = 100  # at most so many events of a run; all are counted


class BadExamples:
    """What `data.on_bad_example: skip` has skipped in training, over all ranks."""

    def __init__(self, group: Group, run: Run, send: Callable[[dict[str, Any]], None]) -> None:
        self.count = 0
        self._group = group
        self._run = run
        self._send = send
        self._named: set[str] = set()

    def trained(self, step: int, result: StepResult) -> None:
        """Take in the step that made `step` steps done. Collective where it had bad examples.

        Where a worker has died they are counted and not named.
        """
        self.count += int(result.flags.bad_examples)
        if result.flags.bad_examples > 0 and not result.lost:
            self._name_all(step, result.bad, "training")

    def evaluated(self, step: int, bad: Sequence[Any]) -> None:
        """Take in what this rank could not read of an evaluation: named only. Collective."""
        self._name_all(step, bad, "evaluation")

    def _name_all(self, step: int, own: Sequence[Any], phase: str) -> None:
        said = [{"where": bad.where, "why": bad.why} for bad in own]
        for rank, theirs in enumerate(self._group.all_gather_json(said, "metric")):
            for bad in theirs:
                self._name(step, rank, bad, phase)

    def _name(self, step: int, rank: int, bad: dict[str, str], phase: str) -> None:
        if self._group.rank != 0 or bad["where"] in self._named or len(self._named) >= NAMED:
            return
        self._named.add(bad["where"])
        message = f"{bad['where']} cannot be read and is left out: {bad['why']}"
        self._run.log_event("bad example", message, rank, step, phase)
        self._send(
            {
                "kind": "event",
                "event": "bad example",
                "message": message,
                "rank": rank,
                "step": step,
            }
        )
