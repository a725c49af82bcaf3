"""Forward over ranks: evaluation now; ensembles, merging and files of predictions later.

evaluate(job).metrics        # {"loss": 0.41, "accuracy": 0.971}, each example counted once
"""

from shoal.predict.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
