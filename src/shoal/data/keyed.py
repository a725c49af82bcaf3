"""Random bits as a function of a key and a counter: no state, so no order of calls.

    bits(key, counter) = mix64(key + counter * golden)

`mix64` is the finalizer of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014, figure 16, variant 13 of D. Stafford), a bijection of 64-bit words; the
golden gamma is that paper's increment.

    key = derive_key(seed, epoch, FLIP)
    flips = keyed_bits(key, example_ids) >> 63
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB


def _mix_word(word: int) -> int:
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)


def derive_key(*parts: int) -> int:
    """One 64-bit key from whole numbers of any size, each of which changes all of it.

    Raises ValueError for a negative part.
    """
    key = len(parts)
    for part in parts:
        if part < 0:
            raise ValueError(f"a part of a key must not be negative, given {part}")
        # A part above 64 bits is folded in word by word, so that no two seeds share a key by
        # being cut off.
        while True:
            key = _mix_word((key * _GOLDEN + (part & _MASK) + 1) & _MASK)
            part >>= 64
            if part == 0:
                break
    return key


def mix64(words: Words) -> Words:
    """SplitMix64's finalizer, element by element; a bijection of the 64-bit words."""
    mixed = words ^ (words >> np.uint64(30))
    mixed *= np.uint64(_FIRST)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(_SECOND)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def keyed_bits(key: int, counters: NDArray[np.integer]) -> Words:
    """64 random bits for each counter (whole numbers, any shape), the same wherever it is asked."""
    words = np.array(counters, dtype=np.uint64)
    words *= np.uint64(_GOLDEN)
    words += np.uint64(key)
    return mix64(words)


def keyed_below(key: int, counters: NDArray[np.integer], limit: int) -> NDArray[np.int64]:
    """A whole number in [0, limit) for each counter, for limits up to 2**32.

    Multiply and shift (Lemire, "Fast random integer generation in an interval", 2019) without its
    rejection: the bias is below limit / 2**32.
    """
    high = keyed_bits(key, counters) >> np.uint64(32)
    below: Words = (high * np.uint64(limit)) >> np.uint64(32)
    return below.astype(np.int64)
