"""One collective as a value: what `group.py` makes of torch's arguments and a core runs.

Call(Kind.ALL_REDUCE, [tensor], [tensor], operation=Operation.SUM, timeout_s=60.0)
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Kind(IntEnum):
    """As in core.c."""

    ALL_REDUCE = 0
    REDUCE_SCATTER = 1
    ALL_GATHER = 2
    BROADCAST = 3
    BARRIER = 4


class Operation(IntEnum):
    """As in core.c."""

    SUM = 0
    AVERAGE = 1
    PRODUCT = 2
    MINIMUM = 3
    MAXIMUM = 4


# The place of a type is its number in core.c, which can reduce the first nine.
_TYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_NUMBER = {dtype: number for number, dtype in enumerate(_TYPES)}
_BOOL = _NUMBER[torch.bool]
_OTHER = 255
REDUCIBLE = frozenset(_TYPES[: _BOOL + 1])


def type_name(label: int) -> str:
    """``float32``; "elements" for a type that has no number here."""
    return str(_TYPES[label]).removeprefix("torch.") if label < len(_TYPES) else "elements"


@dataclass(frozen=True)
class Call:
    """A collective of dense tensors of one type on the CPU.

    ``inputs``: one tensor, for a reduce-scatter one a rank; ``outputs``: one, for an all-gather one
    a rank; all of equal size. Booleans are reduced as sets: a sum is "any", a product "all".
    """

    kind: Kind
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    operation: Operation = Operation.SUM
    root: int = 0
    timeout_s: float = 600.0
    patient: bool = False  # somebody computes meanwhile: sleep rather than spin

    @property
    def _first(self) -> Tensor | None:
        return self.inputs[0] if self.inputs else None

    @property
    def count(self) -> int:
        """Elements of one rank's share."""
        return self._first.numel() if self._first is not None else 0

    @property
    def item_bytes(self) -> int:
        return self._first.element_size() if self._first is not None else 1

    @property
    def label(self) -> int:
        """The number of the type, told apart where the arithmetic is the same."""
        return _NUMBER.get(self._first.dtype, _OTHER) if self._first is not None else 0

    @property
    def type(self) -> int:
        """The number of the type that is computed with."""
        return _NUMBER[torch.uint8] if self.label == _BOOL else self.label

    @property
    def arithmetic(self) -> Operation:
        """The operation that is computed."""
        if self.label != _BOOL:
            return self.operation
        kept = {Operation.SUM: Operation.MAXIMUM, Operation.PRODUCT: Operation.MINIMUM}
        return kept.get(self.operation, self.operation)
