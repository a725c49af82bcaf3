"""`Record`: everything that one training step leaves behind, by kind and name."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from shoal.layout import Layout
from shoal.verify.certificate import STAGES, TOLERANCE
from shoal.verify.measure import scale_of


@dataclass
class Record:
    """Tensors of one step: ``tensors[kind][name]``, and what the loss was counted in.

    ``allowed[kind][name]``: the error that ranks may have against this record; what is not there
    may have `TOLERANCE`. Filled where the ranks compute in less than float64.
    """

    tensors: dict[str, dict[str, Tensor]] = field(
        default_factory=lambda: {kind: {} for kind in STAGES}
    )
    count: float = 0.0
    allowed: dict[str, dict[str, float]] = field(default_factory=dict)

    def allowance(self, kind: str, name: str) -> float:
        """The error that a tensor may have."""
        return self.allowed.get(kind, {}).get(name, TOLERANCE)


def rows_of(tensor: Tensor, share: tuple[int, int], batch_examples: int) -> Tensor:
    """The rows of a share of a batch: of what has one row, or several, for each example.

    Several are those of an example together, as in ``[examples · tokens, classes]``. What has no
    rows of examples (a scalar, a table) is given whole.
    """
    if tensor.dim() == 0 or not batch_examples or tensor.shape[0] % batch_examples:
        return tensor
    each = tensor.shape[0] // batch_examples
    start, stop = share
    return tensor[start * each : stop * each]


def outputs_by_name(outputs: Any) -> dict[str, Tensor]:
    """The tensors among a model's outputs, by their place in it; a single tensor is `output`."""
    if isinstance(outputs, Tensor):
        return {"output": outputs.detach()}
    # Dataclasses are leaves to the tree: their fields are looked at by name.
    if hasattr(outputs, "__dataclass_fields__"):
        outputs = {name: getattr(outputs, name) for name in outputs.__dataclass_fields__}
    leaves, _ = tree_flatten_with_path(outputs)
    return {
        "output" + "".join(str(key) for key in path): leaf.detach()
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    }


def state_after(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Copies of parameters, buffers and optimizer state, by qualified name."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if value is not None:
                copied = torch.as_tensor(value).detach().clone()
                # Step counters are counters, whatever type torch keeps them in.
                state[f"{names[parameter]}/{key}"] = (
                    copied.to(torch.int64) if key == "step" else copied
                )
    order = {name: place for place, name in enumerate(names.values())}
    return {
        "parameter": {n: p.detach().clone() for n, p in model.named_parameters()},
        "buffer": {n: b.detach().clone() for n, b in model.named_buffers()},
        "optimizer": dict(
            sorted(state.items(), key=lambda item: order[item[0].rpartition("/")[0]])
        ),
    }


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients, by qualified name; a parameter without one is left out."""
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


NOISE = 1e-12  # a gradient this much smaller than the others is rounding, not signal


def silence_noise(
    model: nn.Module, reference: dict[str, Tensor], layout: Layout | None = None
) -> None:
    """Set gradients to zero, element by element, where one device's are rounding only.

    The true gradient of a key's bias, or of a bias before batch norm, is zero. An optimizer that
    divides by the gradient's size (Adam) turns the rounding that is left of it into updates, and
    these into differences that mean nothing. What the gradients were is compared all the same.
    """
    floor = NOISE * scale_of(reference.values())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in reference:
            small = reference[name].abs() <= floor
            parameter.grad.masked_fill_(small if layout is None else layout[name].take(small), 0.0)
