"""`Replica`: one whole copy of the model, on one rank, as the training step sees it.

    totals = replica.forward_backward(batch, step, share, start)  # Σ loss, Σ count of all replicas
    agreement.agree(replica)                                      # gradients are summed
    replica.rescale(count)
    outputs = replica.forward(batch, step, share)

The loss goes *into* the replica, as a pipeline runs forward, loss and backward by itself. A rank
back-propagates its own sum of losses ÷ the number of examples of the global batch, which every rank
knows beforehand; the true global count is summed while the backward pass goes on, and where it is
another (masked tokens, examples left out) `rescale` multiplies the sum of gradients by the
quotient. So no rank waits for another between forward and backward.
"""

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from shoal.comm import Pending, is_peer_failure
from shoal.errors import NoGradient, PeerLost, ShoalError, UserCodeError
from shoal.layout import Part
from shoal.parallel.randomness import StepKey, counted, intercepting
from shoal.parallel.statistics import BatchGroups

_LIBRARIES = (torch.__path__[0], str(Path(__file__).parents[1]))

Objective = Callable[[Any, Any], tuple[Tensor, Tensor]]
Start = Callable[[Tensor], Pending]


class LocalBatch(Protocol):
    """This replica's rows of a global batch."""

    @property
    def inputs(self) -> Any: ...
    @property
    def targets(self) -> Any: ...
    @property
    def rows(self) -> Tensor: ...


@dataclass(frozen=True)
class Share:
    """Which positions of a step's global batch each rank has: ``shares[rank] = (start, stop)``.

    A rank without any still computes, on the batch's first example and with no weight: a user's
    model need not bear a batch of no rows (``x.view(len(x), -1)`` does not), and collectives inside
    the model need every rank.
    """

    batch_examples: int
    shares: tuple[tuple[int, int], ...]

    def is_empty(self, rank: int) -> bool:
        start, stop = self.shares[rank]
        return start == stop

    def reads(self, rank: int) -> tuple[int, int]:
        """The positions that `rank` reads: its share, or in place of an empty one the first."""
        return (0, 1) if self.is_empty(rank) else self.shares[rank]


@dataclass(frozen=True)
class Numerics:
    """How a replica computes: parameters in `dtype`; `bf16` is autocast with float32 parameters."""

    dtype: torch.dtype = torch.float32
    bf16: bool = False
    channels_last: bool = False


class Body(nn.Module):
    """Model and objective as one module that returns (Σ loss, Σ count)."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        numerics: Numerics,
        randomness: StepKey | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._randomness = randomness if randomness is not None else StepKey(0)
        self._objective = objective
        self._numerics = numerics
        self.captured: Any = None
        self.capture = False
        self.counts = True  # whether the rows have any weight, see `Share`

    def forward(self, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._numerics.bf16):
            with counted(self._randomness, self.model):
                outputs = call_model(self.model, inputs)
            total, count = call_objective(self._objective, outputs, targets)
        if self.capture:
            self.captured = each_tensor(detached if self.counts else no_rows, outputs)
        return (total, count) if self.counts else (total * 0.0, count * 0.0)


class Replica:
    """A model whole on one rank, prepared for training. Made by `parallel.build_replica`."""

    def __init__(
        self, body: Body, numerics: Numerics, groups: BatchGroups, randomness: StepKey
    ) -> None:
        self.body = body
        self.numerics = numerics
        self.rank = groups.group.rank
        self.ranks = groups.group.size
        self._groups = groups
        self._randomness = randomness
        self._divisor = 1.0

    @property
    def model(self) -> nn.Module:
        """The user's module, unwrapped."""
        return self.body.model

    @property
    def holding(self) -> nn.Module:
        """The user's module with the tensors that this rank keeps and updates, by their names."""
        return self.body.model

    @property
    def parameters(self) -> int:
        """How many numbers the whole model learns."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def captured(self) -> Any:
        """The outputs of the last step, once `capture` is set; None on ranks without any."""
        return self.body.captured

    def capture(self) -> None:
        """Keep the outputs of each training step from now on."""
        self.body.capture = True

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def layout(self) -> dict[str, Part]:
        """Every tensor of the model lies whole on each rank."""
        state = self.model.state_dict(keep_vars=True)
        return {name: Part.whole(tuple(tensor.shape)) for name, tensor in state.items()}

    def forward_backward(self, batch: LocalBatch, step: int, share: Share, start: Start) -> Tensor:
        """Leave in ``.grad`` the gradient of this rank's losses ÷ the examples of the global batch.

        ``start`` begins to sum a small float64 vector over all replicas; what comes of it is this
        method's result: ``[Σ loss, Σ count, …]`` of the global batch, for `rescale`. Raises
        `NoGradient` for a loss that no parameter can learn from.
        """
        self._begin(batch, step, share)
        loss_sum, count = self.body(batch.inputs, batch.targets)
        if not loss_sum.requires_grad:
            raise NoGradient(
                "the objective's result has no gradient: no parameter can learn from it",
                hint="Something in the model or the objective cuts the graph: argmax, .detach(), "
                ".item(), torch.no_grad(), or a comparison. A count of errors is a metric; train "
                "on a loss that changes smoothly with the outputs (cross_entropy, mse).",
                step=step,
                phase="backward",
            )
        totals = start(torch.stack((loss_sum.detach().double(), count.detach().double())))
        self._groups.send()
        self._divisor = float(max(1, share.batch_examples))
        with intercepting(self._randomness):
            (loss_sum / self._divisor).backward()
        self._groups.finish()
        return totals.wait()

    def rescale(self, count: float) -> None:
        """Make of gradients per example those per what the objective counts, `count` in all."""
        # Nothing counted: a loss and a gradient of zero.
        if count not in (0.0, self._divisor):
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, self._divisor / count)

    def forward(self, batch: LocalBatch, step: int, share: Share) -> Any:
        """Outputs for this rank's rows, without gradient."""
        self._begin(batch, step, share)
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.numerics.bf16),
            counted(self._randomness, self.model),
        ):
            return call_model(self.model, batch.inputs)

    def _begin(self, batch: LocalBatch, step: int, share: Share) -> None:
        self.body.counts = not share.is_empty(self.rank)
        self._groups.begin(batch.rows, share.batch_examples, list(share.shares))
        self._randomness.begin(step, batch.rows, self.rank)

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole model's gradient, a 0-d tensor."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """``model(*inputs)`` for a tuple, ``model(inputs)`` otherwise; errors say whose they are."""
    try:
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    except ShoalError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise user_error("the model's forward", error) from error


def call_objective(objective: Objective, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """``objective(outputs, targets)``; errors say whose they are."""
    try:
        return objective(outputs, targets)
    except ShoalError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise user_error("the objective", error) from error


def user_error(what: str, error: Exception) -> ShoalError:
    refused = getattr(error, "inner_exception", None)  # what torch's compiler has wrapped
    if isinstance(refused, ShoalError):
        return refused
    if is_peer_failure(error):
        return PeerLost(str(error).splitlines()[0])
    return UserCodeError(f"{what} failed: {type(error).__name__}: {error}", hint=_users_line(error))


def _users_line(error: Exception) -> str | None:
    """The innermost line that is neither torch's nor Shoal's: where the user would look."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    return f"in {own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else None


def each_tensor(function: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    """A copy of a model's outputs with each tensor changed; dataclasses are looked into as well."""

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        copied = copy.copy(leaf)
        for part in fields(leaf):
            # A frozen one too: the copy is nobody's yet.
            object.__setattr__(copied, part.name, each_tensor(function, getattr(leaf, part.name)))
        return copied

    return tree_map(changed, outputs)


def detached(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def no_rows(tensor: Tensor) -> Tensor:
    return detached(tensor[:0] if tensor.dim() else tensor)
