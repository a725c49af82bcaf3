"""Which cells there are: rows × strategies, and the sample that `make test` runs.

    sample()         # every model once, every strategy once or more

The sample deals the strategies out to the models in turn. No cover is smaller: it has as many cells
as there are models, or strategies if these are more.
"""

from itertools import cycle

from zoo import SUBJECTS

Cell = tuple[str, str]  # subject's name, strategy

STRATEGIES = (
    "dp2", "dp3", "dp2/mb:2",
    "dp2/zero1", "dp2/zero2", "dp2/zero3", "dp3/zero3", "dp4/zero3:2",
    "tp2", "tp3", "dp2.tp2", "dp2.tp2/zero3", "tp2/sp",
    "pp2", "pp4", "pp2/mb:1", "pp2/mb:3", "pp2/gpipe", "pp2/interleaved:2", "pp2/zb", "pp2/zbv",
    "dp2.pp2", "pp2.dp2/zero1", "pp2.dp2/zero2", "pp2.tp2", "pp2+recompute",
)  # fmt: skip


def every_cell(models: tuple[str, ...] = (), strategies: tuple[str, ...] = ()) -> list[Cell]:
    """All cells, or those of some models and strategies; row by row. Raises KeyError."""
    rows = [SUBJECTS[name].name for name in models] or list(SUBJECTS)
    return [(name, strategy) for name in rows for strategy in strategies or STRATEGIES]


def sample(
    models: tuple[str, ...] = tuple(SUBJECTS), strategies: tuple[str, ...] = STRATEGIES
) -> list[Cell]:
    """Every model and every strategy at least once, in as few cells as can be."""
    if len(models) >= len(strategies):
        return list(zip(models, cycle(strategies), strict=False))
    return list(zip(cycle(models), strategies, strict=False))
