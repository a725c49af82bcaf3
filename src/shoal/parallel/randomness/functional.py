"""Functional dropout within a model's forward, with the masks that a layer would have.

    with counted(key, model):
        outputs = model(inputs)          # F.dropout, F.scaled_dot_product_attention(dropout_p=…), …

What intercepts them is a `TorchFunctionMode`: it sees the calls of this thread, in this block, and
replaces nothing of torch's. It costs about a microsecond for each of torch's functions; so the
first pass in training finds out whether a model needs it, and one that does not goes without. A
call belongs to the innermost module that is running, which is looked up on the interpreter's stack.
"""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from shoal.errors import Refused
from shoal.parallel.randomness.drawing import DRAWING
from shoal.parallel.randomness.key import Moment, StepKey
from shoal.parallel.randomness.masks import ANYWHERE, Place
from shoal.parallel.randomness.ops import ATTENTION, Attention, attend, drop


@contextlib.contextmanager
def counted(key: StepKey, model: nn.Module) -> Iterator[None]:
    """Inside, functional dropout has masks by `key`. For one forward pass of `model`.

    A model in evaluation runs as it is. Raises `Refused` where something else has drawn from
    torch's generator, and what it has drawn depends on the split.
    """
    if not model.training:
        yield
        return
    before, first = _drawn(), key.intercepts is None
    with intercepting(key) as mode:
        yield
    drew = not torch.equal(before, _drawn())
    if mode is not None and mode.drew:
        drew = True
    if drew and key.splits:
        raise _not_counted(mode.drew if mode is not None else "")
    if first:
        assert mode is not None
        key.intercepts = mode.found or drew
    elif drew:
        key.intercepts = True


def _not_counted(what: str) -> Refused:
    what = what or "one of torch's functions"
    return Refused(
        f"the model draws random numbers with {what}, and they "
        "would be others on several ranks or in microbatches than on one device",
        hint="Dropout, torch.rand, randn, bernoulli and their like are counted where a dimension "
        "is that of the examples. Draw with these, or train this model with `single`.",
    )


@contextlib.contextmanager
def intercepting(key: StepKey) -> Iterator["Interception | None"]:
    """Inside, functional dropout has masks by `key`, unless the model is known to have none.

    For a backward pass too: a model may run parts of itself again there.
    """
    if key.intercepts is False:
        yield None
        return
    was, key.active = key.active, True
    try:
        with Interception(key) as mode:
            yield mode
    finally:
        key.active = was


@contextlib.contextmanager
def replaying(key: StepKey, moment: Moment) -> Iterator[None]:
    """Inside, a block runs again as it did at `moment`."""
    mode = Interception(key) if moment.active else contextlib.nullcontext()
    with key.replaying(moment), mode:
        yield


def run_within(module: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, whose calls belong to `module` even where nobody calls it."""
    return function(*args, **kwargs)


def _drawn() -> Tensor:
    """The state of the generators that a model's own random operations move."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append(torch.cuda.get_rng_state())
    return torch.cat(states)


class Interception(TorchFunctionMode):
    """Gives the functions of `_FUNCTIONS` masks by `key`, and lets all else pass."""

    def __init__(self, key: StepKey) -> None:
        super().__init__()
        self.key = key
        self.found = False
        self.drew = ""  # what has drawn from torch's own generator, and where
        self._looks = key.intercepts is None and key.splits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = _FUNCTIONS.get(func)
        # A graph that the user has had compiled would hold the masks of one step: it draws its own.
        if torch.compiler.is_dynamo_compiling():
            return func(*args, **kwargs) if kwargs else func(*args)
        if function is not None:
            return self.answer(function, func, *args, **(kwargs or {}))
        drawing = DRAWING.get(func)
        if drawing is not None and not torch.compiler.is_exporting():
            drawn = self.answer(drawing, func, *args, **(kwargs or {}))
            if drawn is not None:
                return drawn
        if self._looks and not self.drew:
            return self._watched(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)

    def _watched(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function, and see whether it draws: in a first pass only, for what it costs."""
        before = _drawn()
        result = func(*args, **kwargs)
        if kwargs.get("generator") is not None or not torch.equal(before, _drawn()):
            self.drew = f"{getattr(func, '__name__', func)} ({_callers_line()})"
        return result

    def answer(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """What `function` gives instead of one of torch's."""
        return function(self, *args, **kwargs)

    def next_name(self, kind: str) -> str:
        """The name of a call that the module running now makes."""
        self.found = True
        return self.key.next_name(_running(self.key), kind)


@dataclass(frozen=True)
class _Dropping:
    """One of torch's functions that drop: its kind, and what it does with its input."""

    kind: str
    inplace: bool = False
    unbatched: int | None = None  # dimensions of an input without rows

    def __call__(
        self,
        mode: Interception,
        plain: Any,
        input: Tensor,
        p: float,
        training: bool = False,
        inplace: bool = False,
        *,
        train: bool = False,
    ) -> Any:
        inplace = inplace or self.inplace
        if not (training or train) or not 0.0 < p <= 1.0:
            return plain(input, p, training or train, *([True] if inplace != self.inplace else []))
        name = mode.next_name(self.kind)
        alone = input.dim() == self.unbatched
        given = input.unsqueeze(0) if alone else input
        # Weights that drop have no examples, and drop alike everywhere.
        place = Place(None) if isinstance(input, nn.Parameter) else ANYWHERE
        output = drop(mode.key, name, self.kind, given, p, inplace=inplace, place=place)
        if inplace:
            return input
        return output.squeeze(0) if alone else output


def _native(mode: Interception, plain: Any, input: Tensor, p: float, train: bool | None) -> Any:
    """``torch.native_dropout``: also which elements are kept."""
    if train is False or not 0.0 < p <= 1.0:
        return plain(input, p, train)
    name = mode.next_name("native_dropout")
    kept = drop(mode.key, name, "native_dropout", torch.ones_like(input), p) != 0
    return input * kept * (1.0 / (1.0 - p) if p < 1.0 else 0.0), kept


def _attention(
    mode: Interception,
    plain: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p == 0.0 or query.is_nested or (is_causal and attn_mask is not None):
        mode.key.skip(_running(mode.key), ATTENTION)
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return plain(query, key, value, attn_mask, dropout_p, **options)
    told = Attention(dropout_p, is_causal, scale, enable_gqa)
    return attend(mode.key, mode.next_name(ATTENTION), (query, key, value, attn_mask), told)


def _through(function: Any) -> Any:
    """Have the functions that a function of torch's own calls intercepted.

    Such a function asks first whether anybody intercepts *it*, which would go in circles: here runs
    its code with another answer.
    """
    names = function.__globals__ | dict.fromkeys(_QUESTIONS, _never)
    parts = (function.__name__, function.__defaults__, function.__closure__)
    code = types.FunctionType(function.__code__, names, *parts)
    code.__kwdefaults__ = function.__kwdefaults__

    def run(mode: Interception, _plain: Any, *args: Any, **kwargs: Any) -> Any:
        with mode:
            return code(*args, **kwargs)

    return run


_QUESTIONS = ("has_torch_function", "has_torch_function_unary")


def _callers_line() -> str:
    """The innermost line on the stack that is neither torch's nor Shoal's."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_LIBRARIES):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "a place that is not known"


_LIBRARIES = (str(torch.__path__[0]), str(Path(__file__).parents[2]))


def _never(*_: Any) -> bool:
    return False


_aten = torch.ops.aten
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.dropout: _Dropping("dropout"),
    F.dropout1d: _Dropping("feature_dropout", unbatched=2),
    F.dropout2d: _Dropping("feature_dropout"),
    F.dropout3d: _Dropping("feature_dropout", unbatched=4),
    F.alpha_dropout: _Dropping("alpha_dropout"),
    F.feature_alpha_dropout: _Dropping("feature_alpha_dropout"),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _through(F.multi_head_attention_forward),
    # A backward pass, in which a model may run parts of itself again.
    Tensor.backward: _through(Tensor.backward),
    torch.autograd.backward: _through(torch.autograd.backward),
    torch.autograd.grad: _through(torch.autograd.grad),
    torch.native_dropout: _native,
    _aten.native_dropout: _native,
    _aten.native_dropout.default: _native,
    _aten.scaled_dot_product_attention: _attention,
    _aten.scaled_dot_product_attention.default: _attention,
}
for _kind in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
    for _suffix, _inplace in (("", False), ("_", True)):
        _packet = getattr(_aten, _kind + _suffix)
        for _function in (getattr(torch, _kind + _suffix), _packet, _packet.default):
            _FUNCTIONS[_function] = _Dropping(_kind, _inplace)


def drops(function: Any) -> bool:
    """Whether it is one of torch's functions that may drop elements."""
    return isinstance(_FUNCTIONS.get(function), _Dropping) or function in _OTHERS


_OTHERS = {f for f, how in _FUNCTIONS.items() if how in (_native, _attention)}

# Where on the interpreter's stack a module is seen running, and the local variable that it is.
_SEEN_AS = {nn.Module._call_impl.__code__: "self", run_within.__code__: "module"}


def _running(key: StepKey) -> str | None:
    """The path of the innermost module of the model that is running; None if that is not known.

    It is not, in a function that the model's own checkpoint runs again in the backward pass.
    """
    again = key.in_backward
    frame = sys._getframe(2)
    while frame is not None:
        variable = _SEEN_AS.get(frame.f_code)
        if variable is not None:
            path = key.paths.get(id(frame.f_locals[variable]))
            if path is not None:
                return path
        elif again and frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return None
        frame = frame.f_back  # type: ignore[assignment]
    return None if again else ""
