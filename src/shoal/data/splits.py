"""Which examples a set without a test split holds out: a fixed tenth, by a hash of the index.

Within each class the examples are ranked by a keyed hash of their index, and the first ones are
held out; how many of each class is the class's share, rounded by largest remainder, so that both
parts keep the proportions of the classes. The choice depends on the labels' order alone: not on the
recipe's seed, the machine or the run.

    held = held_out(labels, tenth(len(labels)))      # bool [N]
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from shoal.data.keyed import derive_key, keyed_bits

_STREAM: Final = 0x68656C64  # "held"


def tenth(examples: int) -> int:
    """How many of so many examples are held out: a tenth, rounded, and one at least; 0 of one."""
    return max(1, (examples + 5) // 10) if examples > 1 else 0


def held_out(labels: NDArray[np.integer], count: int) -> NDArray[np.bool_]:
    """Which `count` of the N examples with these labels are held out: bool [N]."""
    examples = len(labels)
    held = np.zeros(examples, dtype=np.bool_)
    if count == 0:
        return held
    hashes = keyed_bits(derive_key(_STREAM), np.arange(examples))
    by_class = np.lexsort((hashes, labels))
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    quota, remainder = np.divmod(sizes * count, examples)
    most_left_over = np.argsort(-remainder, kind="stable")[: count - int(quota.sum())]
    quota[most_left_over] += 1
    place_in_class = np.arange(examples) - np.repeat(starts, sizes)
    held[by_class[place_in_class < np.repeat(quota, sizes)]] = True
    return held
