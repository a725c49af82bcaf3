"""What a checkpoint holds of one job: weights, buffers, optimizer, position in the data.

snapshot_of(job, 40, recipe.fingerprint, "dp2")
"""

from typing import Any

from shoal.checkpoint import Piece, Snapshot
from shoal.checkpoint.optimizer_state import flatten
from shoal.job import Job


def snapshot_of(
    job: Job, step: int, fingerprint: str, strategy: str, train: dict[str, Any] | None = None
) -> Snapshot:
    """What this rank holds after `step` steps; ``train`` is the loop's state."""
    state, scalars = flatten(job.optimizer, job.parameter_names)
    # Of all ranks: a rank of a pipeline has some of them.
    for group, names in zip(scalars["groups"], job.group_names, strict=True):
        group["names"] = list(names)
    weights, aliases = _weights(job)
    held = weights | state | job.agreement.state()
    held |= {} if job.meetings is None else job.meetings.state()
    return Snapshot(
        step=step,
        tensors={name: Piece(each, job.part_of(name, each)) for name, each in held.items()},
        fingerprint=fingerprint,
        strategy=strategy,
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
    for name, tensor in job.replica.holding.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if first == name:
            weights[name] = tensor.detach()
        else:
            aliases[name] = first
    return weights, aliases
