"""Which cells there are: rows × strategies, and the sample that `make test` runs.

    sample()         # every model once, every strategy once or more

The sample gives each strategy one model that is traced quickly, and each model that is left a
strategy that calls it as it is. No cover is smaller: it has as many cells as there are models, or
strategies if these are more.
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


EAGER = ("dp3", "dp2/zero1", "dp2/zero3")
SLOW = ("resnet", "hf-")  # seconds to trace on each rank


# These are what Shoal has to be right for, under everything; the others, one of a kind each, are
# there for what is special about them, and six strategies show that.
EVERYWHERE = (
    "resnet18", "resnet18-groups-of-3", "resnet18-group-norm", "resnet18-depthwise",
    "resnet18-depthwise-group-norm", "resnet101", "resnet101-depthwise", "u-net", "densenet",
    "video", "gpt", "encoder", "mlp-uneven",
    "hf-gpt2", "hf-llama", "hf-bert", "hf-vit", "hf-t5", "hf-mixtral",
)  # fmt: skip
FEW = ("dp2", "dp2/mb:2", "dp2/zero3", "tp2", "pp2", "pp2.tp2")


def every_cell(
    models: tuple[str, ...] = (), strategies: tuple[str, ...] = (), *, full: bool = False
) -> list[Cell]:
    """The table's cells, or those of some models and strategies; row by row. Raises KeyError.

    ``full``: every model under every strategy.
    """
    rows = [SUBJECTS[name].name for name in models] or list(SUBJECTS)
    full = full or bool(models)

    def columns(name: str) -> tuple[str, ...]:
        return strategies or (STRATEGIES if full or name in EVERYWHERE else FEW)

    return [(name, strategy) for name in rows for strategy in columns(name)]


def sample(
    models: tuple[str, ...] = tuple(SUBJECTS), strategies: tuple[str, ...] = STRATEGIES
) -> list[Cell]:
    """Every model and every strategy at least once, in as few cells as can be."""
    quick = [name for name in models if not name.startswith(SLOW)] or list(models)
    cells = list(zip(cycle(quick), strategies, strict=False))
    dealt = {name for name, _ in cells}
    left = [name for name in models if name not in dealt]
    eager = [each for each in strategies if each in EAGER] or strategies
    return [*cells, *zip(left, cycle(eager), strict=False)]
