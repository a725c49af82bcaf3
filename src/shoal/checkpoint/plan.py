"""Who writes what: a pure function of what every rank holds.

    rank 0 holds a, b    rank 1 holds a, b, c    ->    rank 0 writes a, b    rank 1 writes c

Each piece goes to the rank that holds it and has least to write so far, the lowest in a tie.

    make_plan([[Offer("a", "float32", Slice.whole((4,)), "99aa…")], …]).of_rank(0)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.checkpoint.manifest import Entry
from shoal.checkpoint.tensor_file import Spec
from shoal.errors import RanksDiffer, ReplicasDiffer, RunError
from shoal.layout import Slice, check_cover


@dataclass(frozen=True)
class Offer:
    """A piece that one rank holds and could write."""

    name: str
    dtype: str
    slice: Slice
    checksum: str

    @property
    def bytes(self) -> int:
        return Spec(self.name, self.dtype, self.slice.shape).bytes

    @property
    def key(self) -> str:
        """Its key in a file: the plain name of a whole tensor, so that others can read it too."""
        if self.slice.is_whole:
            return self.name
        starts_stops = zip(self.slice.offset, self.slice.stop, strict=True)
        return f"{self.name}[{','.join(f'{a}:{b}' for a, b in starts_stops)}]"

    def to_json(self) -> list[Any]:
        return [self.name, self.dtype, self.slice.to_json(), self.checksum]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> "Offer":
        name, dtype, piece, checksum = value
        return cls(name, dtype, Slice.from_json(piece), checksum)


@dataclass(frozen=True)
class Plan:
    """Every piece of a checkpoint with the file it goes into; `bytes` of all tensors together."""

    entries: tuple[Entry, ...]
    bytes: int
    aliases: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def file_of(rank: int) -> str:
        return f"rank-{rank:05d}.safetensors"

    def of_rank(self, rank: int) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.file == self.file_of(rank))


def make_plan(offers: Sequence[Sequence[Offer]]) -> Plan:
    """Give each piece to one of the ranks that hold it; ``offers[rank]`` is what each holds.

    Raises `ReplicasDiffer` where a piece has not the same bits on all its ranks, `RanksDiffer`
    where ranks disagree on a tensor's type or shape, `RunError` where pieces do not cover it.
    """
    holders: dict[str, dict[Slice, list[int]]] = {}
    first: dict[tuple[str, Slice], Offer] = {}
    for rank, held in enumerate(offers):
        for offer in held:
            holders.setdefault(offer.name, {}).setdefault(offer.slice, []).append(rank)
            _check_same_bits(first.setdefault((offer.name, offer.slice), offer), offer, rank)
    load = [0] * len(offers)
    entries = []
    for name, pieces in holders.items():
        _check_tensor(name, [first[name, piece] for piece in pieces])
        for piece, ranks in pieces.items():
            offer = first[name, piece]
            writer = min(ranks, key=lambda r: (load[r], r))
            load[writer] += offer.bytes
            entries.append(_entry(offer, Plan.file_of(writer)))
    return Plan(tuple(entries), sum(load))


def _check_same_bits(expected: Offer, offer: Offer, rank: int) -> None:
    if offer.dtype == expected.dtype and offer.checksum != expected.checksum:
        raise ReplicasDiffer(
            f"{offer.name} is not the same on rank {rank} as on an earlier rank that holds it too",
            hint="replicas that agree at every step have equal weights: this is not rounding, and "
            "no checkpoint of it is saved",
            rank=rank,
            phase="checkpoint",
        )


def _check_tensor(name: str, offers: Sequence[Offer]) -> None:
    kinds = {(offer.dtype, offer.slice.global_shape) for offer in offers}
    if len(kinds) > 1:
        described = " and ".join(f"{dtype} {shape}" for dtype, shape in sorted(kinds))
        raise RanksDiffer(f"{name} is {described} on different ranks", phase="checkpoint")
    try:
        check_cover(offer.slice for offer in offers)
    except ValueError as error:
        raise RunError(f"the pieces of {name} do not make it up: {error}") from error


def _entry(offer: Offer, file: str) -> Entry:
    return Entry(
        name=offer.name,
        dtype=offer.dtype,
        global_shape=offer.slice.global_shape,
        offset=offer.slice.offset,
        shape=offer.slice.shape,
        file=file,
        key=offer.key,
        checksum=offer.checksum,
    )
