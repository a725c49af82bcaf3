"""Sizes as plain integers: a symbolic number of rows is stood for by a large prime.

size(8)      8
size(s0)     1000003
size(4·s0)   4000012           so factors are found by division, and none is found by accident

factors([b, 512], [b, 8, 64])        # [b, 8, 64]
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

FIRST_PRIME = 1_000_003
_given: dict[str, int] = {}


def size(number: Any) -> int:
    """`number`, an int or a SymInt, as an int."""
    if isinstance(number, int):
        return number
    return _stand_in(number.node.expr)


@functools.lru_cache(maxsize=4096)
def _stand_in(expression: Any) -> int:
    values = {symbol: _prime(str(symbol)) for symbol in expression.free_symbols}
    return int(expression.subs(values))


def hint(number: Any) -> int:
    """`number` at the sizes of the example that was traced."""
    if isinstance(number, int):
        return number
    found = number.node.hint
    return int(found) if found is not None else 2


def numel(sizes: Iterable[Any]) -> int:
    """The number of elements at the traced sizes."""
    return math.prod(hint(number) for number in sizes)


def shape(value: torch.Tensor) -> list[int]:
    """The sizes of a (fake) tensor as integers."""
    return [size(number) for number in value.shape]


def is_symbolic(number: int) -> bool:
    """Whether an int of `size` stands for something that varies with the rows."""
    return number >= FIRST_PRIME and any(number % prime == 0 for prime in _given.values())


def factors(before: Sequence[int], after: Sequence[int]) -> list[int] | None:
    """The common factors of two shapes of as many elements, outer first, none of them 1.

    A dimension of either shape is the product of some that follow each other (`taken`). None where
    there are none such ([6, 4] and [4, 6]).
    """
    bounds = sorted({*_suffixes(before), *_suffixes(after)})
    sizes = []
    for inner, outer in itertools.pairwise(bounds):
        if inner == 0 or outer % inner:
            return None
        sizes.append(outer // inner)
    return sizes[::-1]


def taken(sizes: Sequence[int], dims: Sequence[int]) -> list[list[int]]:
    """For each dimension the indices of the factors that it is made of."""
    position = 0
    result = []
    for dim in dims:
        mine: list[int] = []
        product = 1
        while product < dim:
            product *= sizes[position]
            mine.append(position)
            position += 1
        result.append(mine)
    return result


def _suffixes(sizes: Sequence[int]) -> list[int]:
    product, found = 1, [1]
    for number in reversed(sizes):
        product *= number
        found.append(product)
    return found


def _prime(symbol: str) -> int:
    if symbol not in _given:
        number = max(_given.values(), default=FIRST_PRIME - 2) + 2
        while any(number % divisor == 0 for divisor in range(3, 1 + int(number**0.5), 2)):
            number += 2
        _given[symbol] = number
    return _given[symbol]
