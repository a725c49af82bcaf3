"""Forward over ranks: evaluation now; ensembles, merging and files of predictions later.

    evaluate(job)        # {"loss": 0.41, "accuracy": 0.971}, each example counted once
"""

from shoal.predict.evaluate import evaluate

__all__ = ["evaluate"]
