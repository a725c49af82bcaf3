"""Random numbers other than dropout's masks, by the same counters: uniform, normal, Bernoulli.

    torch.rand, rand_like, uniform_           u = hash ÷ 2⁵³
    torch.randn, randn_like, normal_          √2 · erf⁻¹(2u − 1)
    torch.bernoulli, bernoulli_               u < p

One example's numbers depend on (seed, step, name of the call, its row, the element) alone, so noise
and stochastic depth are the same on any number of ranks and in any microbatches. What is drawn has
a dimension of the rows; of anything else it is unknown how it would be cut, and it is torch's own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.parallel.randomness.key import StepKey, hashed
from shoal.parallel.randomness.masks import bits, find_rows

_UNIT = 2.0**-53


def has_rows(key: StepKey, shape: Sequence[int]) -> bool:
    """Whether it is known which numbers of a drawn tensor are which example's."""
    # Not "one row for all examples": on a rank with one example it would look like that one's.
    return find_rows(key, shape) is not None


def uniform(key: StepKey, name: str, shape: Sequence[int], device: torch.device) -> Tensor:
    """Numbers in [0, 1), float64, of a shape that `has_rows`."""
    at, rows = find_rows(key, shape), key.rows
    assert at is not None
    assert rows is not None
    order = [at, *(dim for dim in range(len(shape)) if dim != at)]
    code = hashed(key.seed, key.step, name)
    drawn = bits(code, rows.to(device), math.prod(shape) // len(rows))
    # The upper 53 bits of 64, as a number from 0.
    numbers = ((drawn >> 11) & ((1 << 53) - 1)).to(torch.float64) * _UNIT
    numbers = numbers.view([shape[dim] for dim in order])
    return numbers.movedim(0, at) if at else numbers


def normal(key: StepKey, name: str, shape: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of the standard normal distribution, float64."""
    # In the middle of its interval: 0 would become minus infinity.
    inner = uniform(key, name, shape, device) + _UNIT / 2
    return torch.erfinv(2.0 * inner - 1.0) * math.sqrt(2.0)


# ---- torch's functions. Each gives None where it is not one of those above.


def drawn_new(mode: Any, plain: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """``torch.rand`` or ``torch.randn``: a new tensor of a given size."""
    options = {name: kwargs.pop(name, None) for name in ("dtype", "device", "requires_grad")}
    size = kwargs.pop("size", None) or args
    if any(value is not None for value in kwargs.values()):
        return None
    shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    dtype = options["dtype"] or torch.get_default_dtype()
    device = torch.device(options["device"] or torch.get_default_device())
    draw = normal if plain is torch.randn else uniform
    made = _drawn(mode, draw, plain.__name__, tuple(shape), device)
    if made is None or not dtype.is_floating_point:
        return None
    return made.to(dtype).requires_grad_(bool(options["requires_grad"]))


def drawn_like(mode: Any, plain: Any, input: Tensor, **kwargs: Any) -> Tensor | None:
    """``torch.rand_like`` or ``torch.randn_like``."""
    dtype, device = kwargs.pop("dtype", None), kwargs.pop("device", None)
    if any(value is not None for value in kwargs.values()):
        return None
    dtype = dtype or input.dtype
    draw = normal if plain is torch.randn_like else uniform
    made = _drawn(mode, draw, plain.__name__, tuple(input.shape), device or input.device)
    return made.to(dtype) if made is not None and dtype.is_floating_point else None


def drawn_within(
    mode: Any, plain: Any, tensor: Tensor, first: Any = None, second: Any = None, **kwargs: Any
) -> Tensor | None:
    """``Tensor.uniform_(from, to)`` or ``Tensor.normal_(mean, std)``: in place."""
    if kwargs.pop("generator", None) is not None or not tensor.is_floating_point():
        return None
    is_normal = plain is Tensor.normal_
    names = ("mean", "std") if is_normal else ("from", "to")
    low = kwargs.pop(names[0], first)
    high = kwargs.pop(names[1], second)
    low, high = 0.0 if low is None else low, 1.0 if high is None else high
    shape, device = tuple(tensor.shape), tensor.device
    made = _drawn(mode, normal if is_normal else uniform, plain.__name__, shape, device)
    if made is None or kwargs:
        return None
    return tensor.copy_(low + made * (high if is_normal else high - low))


def chanced(mode: Any, plain: Any, input: Tensor, p: Any = None, **kwargs: Any) -> Tensor | None:
    """``torch.bernoulli(p)``, ``torch.bernoulli(input, p)``, ``Tensor.bernoulli_(p)``."""
    if kwargs.pop("generator", None) is not None:
        return None
    within = plain is Tensor.bernoulli_
    chance = kwargs.pop("p", p)
    chance = (0.5 if within else input) if chance is None else chance
    made = _drawn(mode, uniform, "bernoulli", tuple(input.shape), input.device)
    if made is None or kwargs:
        return None
    hit = made < chance
    return input.copy_(hit) if within else hit.to(input.dtype)


def _drawn(mode: Any, draw: Any, kind: str, shape: tuple[int, ...], device: Any) -> Tensor | None:
    """The numbers of the call in hand; None where it is not known whose they would be."""
    if not has_rows(mode.key, shape):
        return None
    with torch.no_grad(), torch._C.DisableTorchFunction():
        made: Tensor = draw(mode.key, mode.next_name(kind), shape, device)
        return made


DRAWING = {
    torch.rand: drawn_new,
    torch.randn: drawn_new,
    torch.rand_like: drawn_like,
    torch.randn_like: drawn_like,
    Tensor.uniform_: drawn_within,
    Tensor.normal_: drawn_within,
    torch.bernoulli: chanced,
    Tensor.bernoulli: chanced,
    Tensor.bernoulli_: chanced,
}
