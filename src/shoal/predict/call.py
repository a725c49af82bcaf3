"""`shoal.predict` as a script calls it; what it needs is imported when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.predict.front import Predictions
    from shoal.run import Run


def predict(
    runs: Sequence[Run | Path | str] | Run | Path | str,
    data: Any = None,
    how: str | None = "ensemble",
    strategy: str = "single",
    out: Path | str | None = None,
    *,
    skip_damaged: bool = False,
) -> Predictions:
    """Predict `data` with the models of `runs`: all of them, the best one, or one made of them.

    ``data``: a source, as in a recipe (``"digits:test"``, a folder of images); None is what the
    recipe evaluates on. ``how``: best, mean, greedy-soup, matched-mean or ensemble. ``out``: a
    .parquet, .csv or .jsonl file to write. Raises a `ShoalError` for models that cannot be put
    together, for damaged ones (unless ``skip_damaged``) and for data that are not there.
    """
    from shoal.predict.front import Options, open_runs, predict_with

    options = Options(how, strategy, data, Path(out) if out else None, skip_damaged)
    return predict_with(open_runs(runs), options)
