"""What is saved: the pieces of tensors that this rank holds, and the run's small values.

    whole tensor   [============]     Piece.whole(weight)
    rows 4 to 8    [----[====]--]     Piece(rows, Part.of(Slice((10, 64), (4, 0), (4, 64))))

A snapshot holds references: nothing may change its tensors until it is saved. `Copies` makes one
that training cannot change.

    Snapshot(
        step=400,
        tensors={"fc.weight": Piece.whole(weight), "fc.weight/exp_avg": Piece.whole(average)},
        fingerprint=recipe.fingerprint, strategy="dp2", position={"epoch": 2, "step": 400},
    )
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from shoal.layout import Part, Slice


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a tensor, on any device, with any strides. Raises ValueError if shapes differ."""

    tensor: Tensor
    part: Part

    def __post_init__(self) -> None:
        if tuple(self.tensor.shape) != self.part.shape:
            raise ValueError(f"a tensor of shape {tuple(self.tensor.shape)} cannot be {self.part}")

    @classmethod
    def whole(cls, tensor: Tensor) -> "Piece":
        return cls(tensor, Part.whole(tensor.shape))

    def boxes(self) -> Iterator[tuple[Slice, Tensor]]:
        """Each box of the part, and the values in it."""
        if len(self.part.boxes) == 1:
            yield self.part.boxes[0], self.tensor
            return
        for box, index in self.part.places():
            yield box, self.tensor[index]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One rank's part of a checkpoint after `step` optimizer steps.

    `tensors` holds the pieces of this rank by qualified name in the unwrapped module; optimizer
    state is ``name/exp_avg``. A piece that several ranks hold is given by each of them, written by
    one, and must have the same bits on all. `aliases` leads from the other names of tied tensors to
    the one they are saved under. `position` (in the data), `sync`, `train` (early stopping) and
    `optimizer` (of :func:`~shoal.checkpoint.optimizer_state.flatten`) are JSON values without NaN
    or infinity; rank 0's are written.
    """

    step: int
    tensors: Mapping[str, Piece]
    fingerprint: str
    strategy: str
    position: Any
    sync: Any = None
    train: Any = None
    optimizer: Any = None
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def common(self) -> dict[str, Any]:
        """What every rank must say alike."""
        return {
            "step": self.step,
            "fingerprint": self.fingerprint,
            "strategy": self.strategy,
            "position": self.position,
        }
