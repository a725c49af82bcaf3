"""torch.export's graph of a model whose number of rows is free, or the line that forbids it.

    model, inputs  →  wrapper(flat tensors) -> flat tensors  →  torch.export  →  Captured

    captured = capture(model, inputs, rows=4)

The wrapper takes inputs and outputs apart, so that no structure has to be registered with torch.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from shoal.errors import Refused
from shoal.trace import lines
from shoal.trace.structure import Structure, take_apart

# Numbers of rows that a condition found while tracing is tried with: see `_general`.
_TRIED = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 31, 64, 97, 128, 1000, 1023, 4096, 99991)

ADVICE = (
    "Only pipeline (ppN) and tensor (tpN) parallelism need a trace of the model: dpN and "
    "dpN/zeroK run the module itself. Or write this line without looking at a tensor's values "
    "(torch.where, masks, multiplication), or make the model an nn.Sequential of blocks, which is "
    "cut between them without a trace."
)


@dataclass
class Captured:
    """What came out of the export, still in torch's own form."""

    program: ExportedProgram
    inputs: Structure
    outputs: Structure
    static: bool  # whether it holds for the traced number of rows alone
    assigned: tuple[str, ...]  # buffers that the forward pass assigns: the last outputs


@dataclass
class _Seen:
    """What the wrapper notes while it runs. Not on the wrapper: export takes attributes back."""

    outputs: Structure | None = None
    assigned: tuple[str, ...] = ()
    custom: tuple[str, ...] = ()
    counted: str | None = None


class _Called(nn.Module):
    """The model as a function of a flat list of tensors."""

    def __init__(self, model: nn.Module, inputs: Structure, positional: bool) -> None:
        super().__init__()
        self.model = model
        self._inputs, self._positional = inputs, positional
        self.seen = _Seen()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The flat outputs; what they were part of is noted."""
        value = self._inputs.build(list(tensors))
        before, numbers = dict(self.model.named_buffers()), _numbers(self.model)
        result = self.model(*value) if self._positional else self.model(value)
        self.seen.outputs, flat = take_apart(result)
        after = dict(self.model.named_buffers())
        assigned = tuple(
            name for name, buffer in after.items() if before.get(name, buffer) is not buffer
        )
        self.seen.assigned, self.seen.custom = assigned, _own_gradients(flat)
        now = _numbers(self.model)
        changed = (name for name, number in numbers.items() if now.get(name) != number)
        self.seen.counted = next(changed, None)
        return (*flat, *(after[name] for name in assigned))


def capture(model: nn.Module, inputs: Any, rows: int) -> Captured:
    """Export ``model`` in the mode that it is in. Raises Refused with the line that is at fault."""
    structure, tensors = take_apart(inputs)
    wrapper = _Called(model, structure, isinstance(inputs, tuple))
    dims = tuple({0: Dim.AUTO} if t.dim() and t.shape[0] == rows else None for t in tensors)
    try:
        program = _export(wrapper, tensors, dims)
    except Exception:
        # Some code only works with plain numbers: then the trace is one for these rows.
        try:
            program = _export(wrapper, tensors, tuple(None for _ in tensors))
        except Exception as error:
            raise _refused(error) from error
        dims = tuple(None for _ in tensors)
    static = rows < 2 or not any(dims) or not _general(program, dims)
    if static and any(dims):
        # len(x) makes a plain number of a symbol on the way: shapes before it would have the symbol
        # and those after it would not, which reads as if these had no rows.
        program = _export(wrapper, tensors, tuple(None for _ in tensors))
    seen = wrapper.seen
    if why := _not_kept(seen):
        raise Refused(why, hint=ADVICE)
    assert seen.outputs is not None
    return Captured(program, structure, seen.outputs, static, seen.assigned)


def _not_kept(seen: _Seen) -> str | None:
    """What the model does that a graph of its operations leaves out, if anything."""
    if seen.custom:
        return (
            f"the model uses {', '.join(seen.custom)}, a torch.autograd.Function with a "
            "gradient of its own, which a traced graph does not keep"
        )
    if seen.counted is not None:
        return (
            f"the model's forward pass changes the number {seen.counted}, and a traced graph "
            "would go on with the first one (a buffer can count)"
        )
    if seen.outputs is not None and seen.outputs.symbols:
        return "the model returns a number that depends on the batch"
    return None


def _numbers(model: nn.Module) -> dict[str, bool | int | float]:
    """The plain numbers that the model's modules have as attributes, by qualified name."""
    return {
        f"{path}.{key}".lstrip("."): value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) in (bool, int, float)
    }


def _export(wrapper: _Called, tensors: list[Tensor], dims: tuple[Any, ...]) -> ExportedProgram:
    with _quiet(), torch.enable_grad():
        return torch.export.export(
            wrapper, tuple(tensors), strict=False, dynamic_shapes=(dims,) if any(dims) else None
        )


def _general(program: ExportedProgram, dims: tuple[Any, ...]) -> bool:
    """Whether the graph holds for any number of rows, by the conditions that tracing met.

    Every free number is the number of rows, so a condition is tried with the same one for all.
    """
    users = [spec.arg.name for spec in program.graph_signature.input_specs if spec.target is None]
    values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    environment = None
    for name, dim in zip(users, dims, strict=True):
        if dim is None:
            continue
        if isinstance(values[name].shape[0], int):
            return False
        environment = values[name].fake_mode.shape_env
    if environment is None:
        return False
    for guard in environment.guards:
        for number in _TRIED:
            values_of = dict.fromkeys(guard.expr.free_symbols, number)
            if not bool(guard.expr.xreplace(values_of)):
                return False
    return True


def _own_gradients(outputs: list[Tensor]) -> tuple[str, ...]:
    """Names of the user's torch.autograd.Function classes on the way to ``outputs``.

    The fake tensors of an export carry their autograd graph, where such a function is seen: the
    exported graph shows its forward pass only.
    """
    found: dict[str, None] = {}
    seen: set[Any] = set()
    waiting = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if _is_users(node):
            found[type(node).__name__.removesuffix("Backward")] = None
        waiting += [before for before, _ in node.next_functions if before is not None]
    return tuple(found)


def _is_users(node: Any) -> bool:
    """Whether a node of an autograd graph is a Function's; not an operator registered with
    `torch.library` and a gradient, which stays one operation of the graph and keeps it."""
    return isinstance(node, torch.autograd.function.BackwardCFunction) and not type(
        node
    ).__name__.startswith("GeneratedBackwardFor_")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and no log lines: what goes wrong is said in the error."""
    names = ("torch.fx", "torch._export", "torch.export", "torch._subclasses")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    # What torch prints of a graph that it gives up on.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _refused(error: Exception) -> Refused:
    line = lines.of_error(error)
    said = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {said[0]}"
    if "data-dependent" in str(error) or "DataDependent" in type(error).__name__:
        reason = "what is computed depends on the values of a tensor"
    where = f" at {line}" if line else ""
    return Refused(f"the model cannot be traced{where} ({reason})", hint=ADVICE)
