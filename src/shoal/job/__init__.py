"""Recipe × cluster × strategy → the live parts. The strategy is read here, once.

    resolved = resolve(recipe, "auto", Cluster.local())      # before any rank starts; no torch
    check_before_start(recipe)
    job = assemble(groups, workload_of(recipe), Execution.of(resolved.strategy))   # on each rank

`assemble` is the same call at the start, at a resume and, later, at a recovery without restart.
What needs torch is imported when it is asked for: a supervisor has no use for it. The check, which
looks at the data with numpy, is too: by then the ranks have been started.
"""

from typing import TYPE_CHECKING, Any

from shoal.job.numerics import as_begun, settled, tried_of
from shoal.job.remembered import Remembered
from shoal.job.resolve import Resolved, resolve

if TYPE_CHECKING:
    from shoal.job.assembly import Job, assemble
    from shoal.job.before import check_before_start
    from shoal.job.sharing import Feed, ReplicaFeed, share_of, shares
    from shoal.job.workload import Execution, Workload, local_batch, workload_of

__all__ = [
    "Execution",
    "Feed",
    "Job",
    "Remembered",
    "ReplicaFeed",
    "Resolved",
    "Workload",
    "as_begun",
    "assemble",
    "check_before_start",
    "local_batch",
    "resolve",
    "settled",
    "share_of",
    "shares",
    "tried_of",
    "workload_of",
]

_HOMES = {
    "assembly": ("Job", "assemble"),
    "before": ("check_before_start",),
    "sharing": ("Feed", "ReplicaFeed", "share_of", "shares"),
    "workload": ("Execution", "Workload", "local_batch", "workload_of"),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"shoal.job.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
