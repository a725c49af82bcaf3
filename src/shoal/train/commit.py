"""Commit: weights, optimizer, position in the data, early-stop state, together or not at all."""

from collections.abc import Callable
from typing import Any

from shoal.checkpoint import Piece, SavedCheckpoint, Snapshot, prune, save
from shoal.checkpoint.optimizer_state import flatten
from shoal.comm import Group
from shoal.job import Job
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.train.agree_start import not_finite, require_finite
from shoal.train.stop import Convergence


class _Meeting:
    """The ranks of a group, as a checkpoint's meeting."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank = group.rank
        self.size = group.size

    def all_gather_json(self, value: Any) -> list[Any]:
        return self._group.all_gather_json(value, "checkpoint")


class Committer:
    """Writes the checkpoints of one run."""

    def __init__(
        self, job: Job, recipe: Recipe, run: Run, strategy: str, send: Callable[[Any], None]
    ) -> None:
        self._job = job
        self._recipe = recipe
        self._run = run
        self._strategy = strategy
        self._send = send
        self._meeting = _Meeting(job.groups.world)
        # An attention mask, say, may be a buffer with infinities from the start.
        self._never_finite = not_finite(job.replica.model)
        self.last: SavedCheckpoint | None = None

    def commit(self, step: int, convergence: Convergence, state: dict[str, Any]) -> None:
        """Save what there is after `step` steps, then remove what need not be kept. Collective.

        ``state`` is the loop's. Replicas whose weights differ are found here: the save compares
        every piece's checksum. Raises `NotFinite`, and what `checkpoint.save` raises.
        """
        require_finite(self._job.replica.model, step, self._never_finite)
        snapshot = self._snapshot(step, state)
        self.last = save(self._run.checkpoints_path, snapshot, self._meeting)
        if self._meeting.rank == 0:
            best = [convergence.best_step] if convergence.best is not None else []
            prune(self._run.checkpoints_path, self._recipe.checkpoint.keep, also=best)
        self._send(
            {
                "kind": "checkpoint",
                "step": step,
                "seconds": self.last.seconds,
                "bytes": self.last.bytes,
            }
        )

    def _snapshot(self, step: int, train: dict[str, Any]) -> Snapshot:
        job = self._job
        state, scalars = flatten(job.optimizer, job.parameter_names)
        weights, aliases = _weights(job)
        return Snapshot(
            step=step,
            tensors={name: Piece.whole(tensor) for name, tensor in (weights | state).items()},
            fingerprint=self._recipe.fingerprint,
            strategy=self._strategy,
            position={**job.workload.feed.position(step), "data": job.workload.feed.fingerprint},
            train=train,
            optimizer=scalars,
            aliases=aliases,
        )


def _weights(job: Job) -> tuple[dict[str, Any], dict[str, str]]:
    """Parameters and buffers by qualified name, tied ones once, with aliases to that name."""
    weights: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in job.replica.model.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if first == name:
            weights[name] = tensor.detach()
        else:
            aliases[name] = first
    return weights, aliases
