"""Sums of which a part is sent; each rank keeps what it left out and adds it the next time.

    m = x + e          what is to be sent, e what was left out before
    c = C(m)           what is sent
    e = m - c

Left out for good, the rest would be missing in the sum; so it only comes later (Seide et al. 2014,
Stich et al. 2018, Vogels et al. 2019, algorithm 2). A rank that has nothing to add sends zeros, and
keeps its e.

    sums = TopK(line, {"fc.weight": weight}, percent=1)
"""

import math
import zlib
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from shoal.comm import Pending
from shoal.sync.average import PIECE_BYTES, pieces
from shoal.sync.sums import Line, Several, UnderWay, flat_of, spread


class Feedback:
    """The errors of some tensors, by name: zeros at first."""

    def __init__(self, line: Line, like: Mapping[str, Tensor]) -> None:
        self.line = line
        self.errors = {name: torch.zeros_like(tensor.detach()) for name, tensor in like.items()}

    def state(self) -> dict[str, Tensor]:
        return {f"{name}/{self.line.error_key}": error for name, error in self.errors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, error in self.errors.items():
            saved = tensors.get(f"{name}/{self.line.error_key}")
            if saved is not None:
                error.copy_(saved)


class TopK(Feedback):
    """Of each tensor the ``percent`` of its numbers that are largest, one at least.

    Sent are the numbers and their places, 4 bytes each: above 50 % of float32 that is more than all
    of it. Equal numbers: the first that torch finds, which need not be the same on all ranks.
    """

    def __init__(self, line: Line, like: Mapping[str, Tensor], percent: float) -> None:
        super().__init__(line, like)
        self._percent = percent

    def start(self, named: Mapping[str, Tensor], used: Collection[str] | None = None) -> UnderWay:
        """As `Sums.start`."""
        names, under_way = iter(named), _Chosen()
        for piece in pieces(list(named.values()), PIECE_BYTES):
            values, places, start = [], [], 0
            for tensor, name in zip(piece, names, strict=False):
                value, place = self._choose(name, tensor, used is None or name in used)
                values.append(value)
                places.append((place + start).to(torch.int32))
                start += tensor.numel()
            message = torch.cat((_bytes(values), _bytes(places)))
            under_way.add(self.line.group.all_gather_later(message, self.line.purpose), piece)
        return under_way

    def _choose(self, name: str, tensor: Tensor, used: bool) -> tuple[Tensor, Tensor]:
        """The numbers to send, and where they lie in the flat tensor; the error is the rest."""
        count = min(tensor.numel(), math.ceil(tensor.numel() * self._percent / 100))
        if not used:
            return tensor.new_zeros(count), torch.arange(count, device=tensor.device)
        whole = (tensor.detach() + self.errors[name]).reshape(-1)
        places = torch.topk(whole.abs(), count, sorted=False).indices
        values = whole[places]
        whole[places] = 0.0
        self.errors[name].copy_(whole.view(tensor.shape))
        return values, places


class _Chosen(Several):
    def totals(self, sent: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        total = tensors[0].new_zeros(sum(tensor.numel() for tensor in tensors))
        size = total.element_size()
        middle = sent.shape[1] // (size + 4) * size
        for message in sent:  # copies: a view as wider numbers has to begin at a fitting place
            values = message[:middle].clone().view(total.dtype)
            places = message[middle:].clone().view(torch.int32).long()
            total[places] += values  # no place is there twice
        return total


def _bytes(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([*parts]).view(torch.uint8)


class LowRank(Feedback):
    """PowerSGD (Vogels, Karimireddy, Jaggi 2019): a matrix of low rank in place of each tensor.

        P = Σ M Q      orthonormal columns      Q = Σ Mᵀ P      Σ M ≈ P Qᵀ

    with M [n, m] the tensor by its first dimension, or the transposed one, n ≤ m, so that rank n
    is all of it; Q [m, r] is kept, as a start for the next time. Sent in full is what that would
    not make smaller: r · (n + m) ≥ n · m; ``force``: nothing is, not even vectors (for tests).
    """

    def __init__(
        self, line: Line, like: Mapping[str, Tensor], rank: int, *, force: bool = False
    ) -> None:
        self.bases: dict[str, Tensor] = {}  # Q of each that is not sent in full
        for name, tensor in like.items():
            n, m = sorted(_matrix(tensor).shape)
            width = min(rank, n)
            if tensor.numel() and (force or width * (n + m) < n * m):
                self.bases[name] = _first_base(name, m, width).to(tensor.detach())
        super().__init__(line, {name: like[name] for name in self.bases})

    def start(self, named: Mapping[str, Tensor], used: Collection[str] | None = None) -> UnderWay:
        """As `Sums.start`."""
        under_way = _Products()
        names = iter(named)
        for piece in pieces(list(named.values()), PIECE_BYTES):
            of_piece = dict(zip((next(names) for _ in piece), piece, strict=True))
            idle = [] if used is None else [name for name in of_piece if name not in used]
            under_way.pieces.append(_Piece(self, of_piece, idle))
        return under_way

    def state(self) -> dict[str, Tensor]:
        key = self.line.own_key("q")
        return super().state() | {f"{name}/{key}": base for name, base in self.bases.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        super().restore(tensors)
        key = self.line.own_key("q")
        for name, base in self.bases.items():
            saved = tensors.get(f"{name}/{key}")
            if saved is not None and saved.shape == base.shape:
                base.copy_(saved)


class _Piece:
    """Some tensors on their way: first P's and what is sent in full, then Q's."""

    def __init__(self, sums: LowRank, named: dict[str, Tensor], idle: Collection[str]) -> None:
        self._sums, self._idle = sums, idle
        self._full = [tensor for name, tensor in named.items() if name not in sums.bases]
        self._low = {name: tensor for name, tensor in named.items() if name in sums.bases}
        self._matrices, products = [], []
        with torch.no_grad():
            for name, tensor in self._low.items():
                whole = tensor.detach() if name in idle else tensor.detach() + sums.errors[name]
                self._matrices.append(_matrix(whole))
                products.append(self._matrices[-1] @ sums.bases[name])
            self._shapes = [product.shape for product in products]
            flat = flat_of([*self._full, *products])
        self.pending = sums.line.group.all_reduce_later(flat, sums.line.purpose)
        self._seconds: Pending | None = None

    def second(self) -> None:
        """What all P's are is known: send what this rank's matrices are along them."""
        first, sizes = self.pending.wait(), [shape.numel() for shape in self._shapes]
        count = first.numel() - sum(sizes)
        with torch.no_grad():
            spread(first[:count], self._full)
            parts = torch.split(first[count:], sizes)
            self._directions = [
                torch.linalg.qr(part.view(shape)).Q
                for part, shape in zip(parts, self._shapes, strict=True)
            ]
            along = [m.T @ p for m, p in zip(self._matrices, self._directions, strict=True)]
            for name, matrix, p, q in zip(
                self._low, self._matrices, self._directions, along, strict=True
            ):
                if name not in self._idle:
                    _put(matrix - p @ q.T, self._sums.errors[name])
        if along:
            line = self._sums.line
            self._seconds = line.group.all_reduce_later(flat_of(along), line.purpose)

    def finish(self) -> None:
        """Put the sums into the tensors."""
        if self._seconds is None:
            return
        bases = [self._sums.bases[name] for name in self._low]
        with torch.no_grad():
            spread(self._seconds.wait(), bases)
            for tensor, p, q in zip(self._low.values(), self._directions, bases, strict=True):
                _put(p @ q.T, tensor)


class _Products:
    """Sums in two rounds."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self.ended: float | None = None

    @property
    def began(self) -> float:
        return self.pieces[0].pending.began if self.pieces else 0.0

    def wait(self) -> None:
        for piece in self.pieces:
            piece.second()
        for piece in self.pieces:
            piece.finish()
        # The second round hides behind nothing.
        self.ended = self.pieces[-1].pending.ended if self.pieces else None


def _matrix(tensor: Tensor) -> Tensor:
    """A tensor as a matrix by its first dimension, with no more rows than columns."""
    detached = tensor.detach()
    matrix = detached.reshape(detached.shape[0] if detached.dim() and detached.numel() else 1, -1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _put(matrix: Tensor, tensor: Tensor) -> None:
    """Put back what :func:`_matrix` has made of a tensor like this one."""
    rows = tensor.shape[0] if tensor.dim() else 1
    turned = matrix if rows == matrix.shape[0] else matrix.T
    tensor.detach().copy_(turned.reshape(tensor.shape))


def _first_base(name: str, m: int, width: int) -> Tensor:
    """A first Q, the same on all ranks."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(m, width, generator=generator, dtype=torch.float64)
