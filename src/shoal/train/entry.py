"""Where a rank comes in: a name that reaches it without importing torch in the supervisor."""

from typing import Any

from shoal.launch import Context


def run_on_rank(context: Context, task: dict[str, Any]) -> dict[str, Any]:
    """Train as one of the ranks of `context`; the summary of the run."""
    from shoal.train.rank import Task, train_on_rank

    return train_on_rank(context, Task(**task))


def try_on_rank(context: Context, task: dict[str, Any]) -> dict[str, Any]:
    """Try other numerics, as one of the ranks of `context`; what they showed."""
    from shoal.train import trial

    return trial.try_on_rank(context, task)
