"""What a trained model is for: evaluation and plain weights; ensembles and predictions later.

evaluate(job).metrics        # {"loss": 0.41, "accuracy": 0.971}, each example counted once
"""

from shoal.predict.evaluate import Evaluation, evaluate
from shoal.predict.exporting import export

__all__ = ["Evaluation", "evaluate", "export"]
