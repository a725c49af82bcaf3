"""A perceptron: flatten, then linear layers with ReLU between them.

    inputs [n, …] ─ flatten ─ linear ─ ReLU ─ … ─ linear ─ logits [n, classes]

    model = mlp(features=64, classes=10, widths=[128])

Without widths it is a linear classifier.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(features: int, classes: int, widths: Sequence[int] = (128,)) -> nn.Sequential:
    """Linear layers of ``widths`` units between ``features`` numbers an example and ``classes``."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise([features, *widths]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear([features, *widths][-1], classes))
