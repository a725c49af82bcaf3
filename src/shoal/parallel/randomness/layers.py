"""`CountedDropout`: torch's dropout layers with counter-based masks.

use_counted_dropout(model, key)
key.begin(step, rows, rank)                # then forward: same rows, same masks, anywhere
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from shoal.parallel.randomness.key import StepKey
from shoal.parallel.randomness.ops import drop
from shoal.parallel.specialise import specialise

# What the layer's function is in ATen, and how many dimensions an input without rows has.
_LAYERS: dict[type[nn.Module], tuple[str, int | None]] = {
    nn.Dropout: ("dropout", None),
    nn.Dropout1d: ("feature_dropout", 2),
    nn.Dropout2d: ("feature_dropout", None),
    nn.Dropout3d: ("feature_dropout", 4),
    nn.AlphaDropout: ("alpha_dropout", None),
    nn.FeatureAlphaDropout: ("feature_alpha_dropout", None),
}


class CountedDropout(_DropoutNd):
    """A dropout layer with counter-based masks; whole channels drop where the original's do.

    Inputs are [rows, …]: one row an example, or as many for each, all of an example together; or
    the rows are another dimension, and the first does not fit them. Any other shape gets masks by
    the rank: those depend on the split.
    """

    path: str
    kind: str
    unbatched: int | None
    key: StepKey

    def forward(self, input: Tensor) -> Tensor:
        """`input` ÷ (1 − p) where kept, 0 elsewhere."""
        if not self.training or self.p == 0.0:
            return input
        if torch.compiler.is_exporting():
            # A graph has nodes of torch's own here, see `use_counted_randomness`.
            plain: Tensor = super().forward(input)
            return plain
        return self.drop(input)

    def drop(self, input: Tensor) -> Tensor:
        """The same, where it is not left out."""
        # What intercepts functional dropout need not look at each of the operations here.
        with torch._C.DisableTorchFunction():
            name = self.key.next_name(self.path, self.kind)
            given = input.unsqueeze(0) if input.dim() == self.unbatched else input
            inplace = self.inplace and "alpha" not in self.kind  # as torch's, which ignore it
            output = drop(self.key, name, self.kind, given, self.p, inplace=inplace)
            if inplace:
                return input
            return output.squeeze(0) if input.dim() == self.unbatched else output


def use_counted_dropout(model: nn.Module, key: StepKey) -> int:
    """Give every dropout layer of `model` masks by `key`; how many there were.

    A layer of the user's own class keeps its `forward`, if it has one. The functions that `model`
    calls are counted while it runs within `counted`.
    """
    key.know(model)
    found = 0
    for path, layer in model.named_modules():
        kind = next((kind for kind in _LAYERS if isinstance(layer, kind)), None)
        if kind is None:
            continue
        if type(layer).forward is kind.forward:
            specialise(layer, CountedDropout)
        if not isinstance(layer, CountedDropout):
            continue
        layer.path, layer.key = path, key
        layer.kind, layer.unbatched = _LAYERS[kind]
        found += 1
    return found
