"""What a model learns from: objectives, optimizers, schedules of the learning rate, metrics.

    objective(outputs, targets) → (sum, count)        metric(outputs, targets) → (sum, count)
    schedule(share of samples seen) → factor          optimizer: torch's

    objective = build_objective(recipe.objective)
    metrics = build_metrics(recipe.evaluate.metrics, recipe.objective.options.get("ignore_index"))
    optimizer = build_optimizer(recipe.optimizer, model)
    schedule = build_schedule(recipe.schedule)

Nothing here divides by a count: that is done once, by the count of the whole global batch.
"""

from shoal.learn.metrics import Metric, build_metrics
from shoal.learn.objectives import Objective, UsersObjective, build_objective
from shoal.learn.optimizers import (
    build_optimizer,
    check_cut,
    check_parted,
    clip_norm_of,
    parameter_groups,
)
from shoal.learn.schedules import Schedule, build_schedule

__all__ = [
    "Metric",
    "Objective",
    "Schedule",
    "UsersObjective",
    "build_metrics",
    "build_objective",
    "build_optimizer",
    "build_schedule",
    "check_cut",
    "check_parted",
    "clip_norm_of",
    "parameter_groups",
]
