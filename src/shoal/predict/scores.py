"""What a model's predictions are worth: per example, and over a set, with intervals.

    right            is the most probable class the label?
    nll              −log p(label), in nats
    calibration      Σ over 15 bins of confidence  share of examples × |accuracy − mean confidence|

    scores = Scores.of(probabilities, labels)
    scores.metrics()                            # accuracy, negative_log_likelihood, …
    intervals(all_scores)                       # 95 %, from resampled examples, the same for all

Expected calibration error: Guo et al. 2017 (arXiv 1706.04599), equation 3, bins of equal width.
Intervals: the bootstrap's percentiles (Efron 1979); paired, as every model answers the same
resampled examples, so that differences between models have intervals of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15
RESAMPLES = 1000
SMALLEST = float(np.finfo(np.float64).tiny)  # what a probability of 0 counts as

Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Scores:
    """Of each example: whether it is right (0 or 1), its nll, the confidence; all float64 [N]."""

    right: Floats
    nll: Floats
    confidence: Floats

    @classmethod
    def of(cls, probabilities: Floats, labels: NDArray[np.int64]) -> "Scores":
        """Of probabilities [N, classes] and labels [N]."""
        rows = np.arange(len(labels))
        chosen = probabilities.argmax(1) if len(labels) else labels
        return cls(
            (chosen == labels).astype(np.float64),
            -np.log(np.maximum(probabilities[rows, labels], SMALLEST)),
            probabilities.max(1, initial=0.0),
        )

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
        """Of all examples of the parts, in their order."""
        return cls(
            np.concatenate([part.right for part in parts]),
            np.concatenate([part.nll for part in parts]),
            np.concatenate([part.confidence for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.right)

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def loss(self) -> float:
        """The mean negative log likelihood, nats per example."""
        return float(self.nll.mean())

    @property
    def calibration_error(self) -> float:
        return float(_calibration(self.right[None], self.confidence[None])[0])

    @property
    def rank(self) -> tuple[float, float]:
        """What models are chosen by: accuracy, and among equals the smaller loss."""
        return self.accuracy, -self.loss

    def metrics(self) -> dict[str, float]:
        """By name; nothing of no examples."""
        if not len(self):
            return {}
        return {
            "accuracy": self.accuracy,
            "negative_log_likelihood": self.loss,
            "calibration_error": self.calibration_error,
        }


def resampled(scores: Mapping[str, Scores], seed: int = 0) -> dict[str, dict[str, Floats]]:
    """Each model's metrics on `RESAMPLES` draws of as many examples, the same draws for all."""
    size = len(next(iter(scores.values())))
    found: dict[str, dict[str, list[Floats]]] = {name: {} for name in scores}
    random = np.random.default_rng(seed)
    chunk = max(1, min(RESAMPLES, 4_000_000 // max(1, size)))  # some 32 MB of drawn indices
    for begin in range(0, RESAMPLES, chunk):
        drawn = random.integers(0, size, (min(chunk, RESAMPLES - begin), size))
        for name, each in scores.items():
            right, confidence = each.right[drawn], each.confidence[drawn]
            parts = {
                "accuracy": right.mean(1),
                "negative_log_likelihood": each.nll[drawn].mean(1),
                "calibration_error": _calibration(right, confidence),
            }
            for metric, values in parts.items():
                found[name].setdefault(metric, []).append(values)
    return {
        name: {metric: np.concatenate(values) for metric, values in metrics.items()}
        for name, metrics in found.items()
    }


def interval(values: Floats) -> Interval:
    """The middle 95 % of what was resampled."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _calibration(right: Floats, confidence: Floats) -> Floats:
    """Of each row of [R, N]: Σ over bins |Σ right − Σ confidence| ÷ N."""
    rows, size = right.shape
    # Bins are (0, 1/15], (1/15, 2/15], …, as in the paper.
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    keys = (bins + np.arange(rows)[:, None] * BINS).ravel()
    gaps = np.bincount(keys, (right - confidence).ravel(), rows * BINS).reshape(rows, BINS)
    return np.asarray(np.abs(gaps).sum(1) / max(1, size), dtype=np.float64)
