"""Float64 throughout: what a model computes in float32 on purpose is verified in float64 too.

    x.to(torch.float32)      x.float()      softmax(x, dtype=torch.float32)      # x in float64

Norms and softmax of many transformers are written so, for the sake of half precision. In a float64
verification such a place rounds to 6e-8, in another way for each order of a sum: a Llama under dp2
differed from one device by 1e-5 after three steps of AdamW, and by 1e-15 with this.

    with Float64Throughout():
        model(inputs)                # on one device, and on the ranks, also while a model is traced
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_WIDE = torch.float64


class Float64Throughout(TorchFunctionMode):
    """Inside, a float64 tensor stays one where it is asked to become float32."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, with float64 where its first tensor has that and float32 is asked for."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype == _WIDE:
            if func is Tensor.float:
                return first
            if func is Tensor.to or func is Tensor.type:
                args = tuple(_WIDE if each is torch.float32 else each for each in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": _WIDE}
        return func(*args, **kwargs)
