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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from shoal.comm import Pending, is_peer_failure
from shoal.errors import NoGradient, PeerLost, Refused, ShoalError, UserCodeError
from shoal.layout import Part
from shoal.parallel.microbatches import LocalBatch, Share, joined, microbatches
from shoal.parallel.randomness import StepKey, counted, intercepting
from shoal.parallel.statistics import BatchGroups
from shoal.parallel.zero.states import States, Whole

_LIBRARIES = (torch.__path__[0], str(Path(__file__).parents[1]))

Objective = Callable[[Any, Any], tuple[Tensor, Tensor]]
Start = Callable[[Tensor], Pending]


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
        self.kept: list[Any] = []  # outputs of each microbatch
        self.capture = False
        self.counts = True  # whether the rows have any weight, see `Share`

    @property
    def captured(self) -> Any:
        """The outputs of the last step, of all its microbatches; None without any."""
        return joined(self.kept)

    def forward(self, inputs: Any, targets: Any, *, outputs_only: bool = False) -> Any:
        """(Σ loss, Σ count), or the model's outputs."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._numerics.bf16):
            with counted(self._randomness, self.model):
                outputs = call_model(self.model, inputs)
            if outputs_only:
                return outputs
            total, count = call_objective(self._objective, outputs, targets)
        if self.capture:
            self.kept.append(each_tensor(detached if self.counts else no_rows, outputs))
        return (total, count) if self.counts else (total * 0.0, count * 0.0)


class Replica:
    """A model whole on one rank, prepared for training. Made by `parallel.build_replica`."""

    def __init__(
        self,
        body: Body,
        numerics: Numerics,
        groups: BatchGroups,
        randomness: StepKey,
        states: States | None = None,
        microbatches: int = 1,
        about: tuple[str, ...] = (),
    ) -> None:
        self.body = body
        self.numerics = numerics
        self.states = Whole(body.model) if states is None else states
        self.microbatches = microbatches
        self.rank = groups.group.rank
        self.ranks = groups.group.size
        self._groups = groups
        self._randomness = randomness
        randomness.splits = self.ranks * microbatches > 1
        self._about = about
        self._divisor = 1.0

    @property
    def model(self) -> nn.Module:
        """The user's module, unwrapped."""
        return self.body.model

    @property
    def holding(self) -> nn.Module:
        """The user's module with the tensors that this rank keeps and updates, by their names."""
        return self.states.holding

    def describe(self) -> tuple[str, ...]:
        """What is cut, and why, a line each."""
        return self._about

    @property
    def judges(self) -> bool:
        """Whether this rank is the one of its replica that has outputs for metrics."""
        return True

    @property
    def sums_gradients(self) -> bool:
        """Whether gradients are those of the whole batch already when the backward pass ends."""
        return self.states.in_step

    @property
    def unit(self) -> int:
        """What shares of a batch are multiples of: with microbatches, a statistics group.

        Without, a group may lie on several ranks.
        """
        return (self._groups.normalize_over or 1) if self.microbatches > 1 else 1

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
        """Which part of each tensor of the model the one in `holding` is."""
        state = self.model.state_dict(keep_vars=True)
        whole = {name: Part.whole(tuple(tensor.shape)) for name, tensor in state.items()}
        return self.states.layout(whole)

    def forward_backward(self, batch: LocalBatch, step: int, share: Share, start: Start) -> Tensor:
        """Leave in ``.grad`` the gradient of this rank's losses ÷ the examples of the global batch.

        ``start`` begins to sum a small float64 vector over all replicas; what comes of it is this
        method's result: ``[Σ loss, Σ count, …]`` of the global batch, for `rescale`. Raises
        `NoGradient` for a loss that no parameter can learn from.
        """
        parts = self._parts(batch, share)
        self._divisor = float(max(1, share.batch_examples))
        self.body.kept.clear()
        sums, totals = None, None
        for number, (part, counts) in enumerate(parts):
            self._begin(part, step, share, number, counts=counts)
            loss_sum, count = self.body(part.inputs, part.targets)
            if not loss_sum.requires_grad:
                raise no_gradient(step)
            own = torch.stack((loss_sum.detach().double(), count.detach().double()))
            sums = own if sums is None else sums + own
            if number == len(parts) - 1:
                # Agreements send gradients from here on: no backward pass comes after this one.
                totals = start(sums)
                self._groups.send()
            with intercepting(self._randomness):
                (loss_sum / self._divisor).backward()
        self._groups.finish()
        self.states.finish()
        assert totals is not None  # there is one part at least
        return totals.wait()

    def _parts(self, batch: LocalBatch, share: Share) -> list[tuple[LocalBatch, bool]]:
        """The microbatches of this rank, and whether their rows have weight."""
        if self.microbatches == 1:
            return [(batch, not share.is_empty(self.rank))]
        return microbatches(
            batch,
            share,
            self.rank,
            self.microbatches,
            self.unit,
            together=self.states.in_step,
        )

    def rescale(self, count: float) -> None:
        """Make of gradients per example those per what the objective counts, `count` in all."""
        # Nothing counted: a loss and a gradient of zero.
        self.states.take_gradients(self._divisor / count if count else 1.0)

    def updated(self) -> None:
        """After the optimizer's update, once its gradients are forgotten. Collective."""
        self.states.spread()

    def forward(self, batch: LocalBatch, step: int, share: Share) -> Any:
        """Outputs for this rank's rows, without gradient."""
        self._begin(batch, step, share, counts=not share.is_empty(self.rank))
        with torch.no_grad():
            return self.body(batch.inputs, None, outputs_only=True)

    def _begin(
        self, batch: LocalBatch, step: int, share: Share, number: int = 0, *, counts: bool
    ) -> None:
        self.body.counts = counts
        self._groups.begin(
            batch.rows,
            share.batch_examples,
            list(share.shares),
            microbatch=number,
            stands_in=not counts,
        )
        rows = batch.rows + share.first if share.first else batch.rows
        # What is drawn from torch's generator is another microbatch's, and another replica's, own.
        place = self.rank + self.ranks * number + (share.first << 20)
        self._randomness.begin(step, rows, place)

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole model's gradient, a 0-d tensor. Collective."""
        return self.states.norm()


def no_gradient(step: int) -> NoGradient:
    """The error of a loss that nothing can be learned from."""
    return NoGradient(
        "the objective's result has no gradient: no parameter can learn from it",
        hint="Something in the model or the objective cuts the graph: argmax, .detach(), "
        ".item(), torch.no_grad(), or a comparison. A count of errors is a metric; train "
        "on a loss that changes smoothly with the outputs (cross_entropy, mse).",
        step=step,
        phase="backward",
    )


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
    if "mixed torch.Tensor and DTensor" in str(error):
        where = _users_line(error)
        return Refused(
            f"{what} uses a block's parameter outside that block's own forward, and zero2 and "
            f"zero3 have it whole only there{f': {where}' if where else ''}",
            hint="Use zero1, or reach the parameter from the block's forward.",
        )
    return UserCodeError(f"{what} failed: {type(error).__name__}: {error}", hint=_users_line(error))


def _users_line(error: Exception) -> str | None:
    """The innermost line that is neither torch's nor Shoal's: where the user would look."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    if not own:
        return None
    if own[-1].filename.startswith("<"):
        # The code of a traced model, which says behind each operation where the user wrote it.
        _, _, place = (own[-1].line or "").partition("  # ")
        return f"in {place.partition(': ')[2] or place}" if place else None
    return f"in {own[-1].filename}:{own[-1].lineno}: {own[-1].line}"


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
