"""What a trained model is for: evaluation, plain weights, predictions of one model or of several.

evaluate(job).metrics        # {"loss": 0.41, "accuracy": 0.971}, each example counted once
predict("runs/digits-0001", "digits:test", how="greedy-soup").metrics

Importing it is light: what a verb needs is imported when it is called.
"""

from typing import TYPE_CHECKING, Any

from shoal.callable_module import make_callable
from shoal.predict.call import predict

if TYPE_CHECKING:
    from shoal.predict.evaluation import Evaluation, evaluate
    from shoal.predict.exporting import export
    from shoal.predict.front import Options, Predictions, open_runs, predict_with

__all__ = [
    "Evaluation",
    "Options",
    "Predictions",
    "evaluate",
    "export",
    "open_runs",
    "predict",
    "predict_with",
]

_HOMES = {
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "export": "exporting",
    "Options": "front",
    "Predictions": "front",
    "open_runs": "front",
    "predict_with": "front",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"shoal.predict.{_HOMES[name]}"), name)


make_callable(__name__, predict)
