"""The order of examples: a keyed permutation of any N, computed at the places asked for.

    example = order(position; N, seed, epoch)

A position x in [0, a*b), a = ceil(sqrt(N)), b = ceil(N / a), is a pair
(left, right) = divmod(x, b).
Each of 8 rounds adds to one half a keyed function of the other:

    left  <- (left  + F_k(right)) mod a         rounds 0, 2, 4, 6
    right <- (right + F_k(left))  mod b         rounds 1, 3, 5, 7

which is a bijection of [0, a*b) for any F: the generalized Feistel network of Black & Rogaway,
"Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), section 5. A result of N or more goes
through again until it is below N (cycle walking, the same paper, section 4); as a*b - N < a, that
happens to about one position in sqrt(N) at most. F is SplitMix64's mixing, see `shoal.data.keyed`.

    order(np.arange(128, 256), examples=60_000, seed=0, epoch=3)     # the second batch of epoch 3

Nothing is stored: position 10**12 costs what position 0 costs, so resuming needs no state but the
position, and how ranks share a batch cannot change it.
"""

from math import isqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shoal.data.keyed import Words, derive_key, keyed_bits

ROUNDS: Final = 8
MAX_EXAMPLES: Final = 1 << 62
_STREAM: Final = 0x6F72646572  # "order": no other use of (seed, epoch) shares these keys


def order(
    positions: NDArray[np.integer], *, examples: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """The examples at these positions of an epoch: int64, of the positions' shape.

    Over all positions 0..examples-1 it is a permutation. Raises ValueError for a position outside
    of them, or for more than 2**62 examples.
    """
    if not 0 <= examples <= MAX_EXAMPLES:
        raise ValueError(f"examples must be 0..{MAX_EXAMPLES}, given {examples}")
    if positions.size == 0:
        return np.zeros(positions.shape, dtype=np.int64)
    lowest, highest = int(positions.min()), int(positions.max())
    if lowest < 0 or highest >= examples:
        raise ValueError(
            f"positions {lowest}..{highest} are not all among the {examples} of an epoch"
        )
    rows = isqrt(examples - 1) + 1 if examples > 1 else 1
    columns = -(-examples // rows)
    keys = keyed_bits(derive_key(_STREAM, seed, epoch), np.arange(ROUNDS)).tolist()
    places = _permute(positions.astype(np.uint64).ravel(), rows, columns, keys)
    while (outside := np.flatnonzero(places >= examples)).size:
        places[outside] = _permute(places[outside], rows, columns, keys)
    return places.astype(np.int64).reshape(positions.shape)


def _permute(places: Words, rows: int, columns: int, keys: list[int]) -> Words:
    left, right = np.divmod(places, np.uint64(columns))
    for index, key in enumerate(keys):
        if index % 2 == 0:
            _add_keyed(left, right, rows, key)
        else:
            _add_keyed(right, left, columns, key)
    left *= np.uint64(columns)
    left += right
    return left


def _add_keyed(half: Words, other: Words, modulus: int, key: int) -> None:
    """half <- (half + F_key(other)) mod modulus, in place; both halves are below 2**32."""
    addend = keyed_bits(key, other)
    addend >>= np.uint64(32)
    addend *= np.uint64(modulus)
    addend >>= np.uint64(32)
    half += addend
    half -= (half >= modulus) * np.uint64(modulus)
