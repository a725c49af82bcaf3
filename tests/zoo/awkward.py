"""Models that are hard to split: what people write all the same. Each is right, or refused by name.

counting = SUBJECTS["counts-calls"]         # a buffer that says how often forward was called
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.perceptrons import mlp
from zoo.subject import ADAMW, SGD, Subject, cross_entropy, generator, rows_of, values


class Scale(nn.Module):
    """A weight and a bias for each feature, and nothing with two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(5)), nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * self.weight + self.bias


class Linear(nn.Module):
    """One layer: there is hardly a place to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


class BranchesOnWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if self.second.weight.abs().sum() > 1e-3:
            return self.second(x)
        return self.third(x)


class BranchesOnInputs(nn.Module):
    """The branch is always the same one, which nobody can know before it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(5, 8, 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() and bool((x > 1e6).any()):
            raise ValueError("numbers too large")
        return self.body(x)


class Clips(nn.Module):
    """A unit that does its work only where there is some: a row alone has the same result."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.drop = nn.LayerNorm(6), nn.Linear(6, 6), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(torch.tanh(self.layer(self.norm(x))))
        return x.clamp(-1, 1) if bool((x.abs() > 1).any()) else x


def sequential_blocks() -> nn.Module:
    """What cannot be traced is cut between the children of an nn.Sequential."""
    return nn.Sequential(nn.Linear(5, 6), *(Clips() for _ in range(4)), nn.Linear(6, 5))


class Repeats(nn.Module):
    """As many rounds as a Python list of the model says, one layer for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.round, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.again = self.round  # a second name for the same layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for _ in range(3):
            x = x + torch.tanh(self.round(x))
        return self.head(torch.tanh(self.again(x)))


def frozen() -> nn.Module:
    return mlp(5, 8, 5).requires_grad_(False)


def frozen_below() -> nn.Module:
    """A backbone that stays as it is, and a head that learns."""
    model = mlp(5, 8, 9, 7, 5)
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    return model


def frozen_between() -> nn.Module:
    """Gradients pass through layers that stay as they are; some biases learn alone."""
    model = mlp(5, 8, 9, 7, 5)
    model[2].requires_grad_(False)
    model[4].weight.requires_grad_(False)
    return model


class Unused(nn.Module):
    """A layer that nobody calls, and one whose result nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.never = mlp(5, 8, 5), nn.Linear(5, 3)
        self.unread = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.unread(x)
        return self.body(x)


class State(NamedTuple):
    value: Tensor
    skip: Tensor


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor
    name: str = "answer"


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 8)

    def forward(self, x: Tensor) -> State:
        return State(torch.tanh(self.layer(x)), x)


class Structured(nn.Module):
    """Tuples, dicts and a dataclass from module to module, one of them as the answer."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer = answer
        self.first, self.second, self.third = First(), nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Any:
        state = self.first(x)
        parts = {"hidden": torch.tanh(self.second(state.value)), "skip": state.skip}
        logits = self.third(parts["hidden"]) + parts["skip"]
        if self.answer == "tuple":
            return logits, (parts["hidden"], None)
        if self.answer == "dict":
            return {"logits": logits, "hidden": [parts["hidden"]], "scale": 2}
        return Answer(logits, parts["hidden"])


def structured_loss(outputs: Any, targets: Tensor) -> Tensor:
    if isinstance(outputs, tuple):
        logits, (hidden, _) = outputs
    elif isinstance(outputs, dict):
        logits, hidden = outputs["logits"], outputs["hidden"][0]
    else:
        logits, hidden = outputs.logits, outputs.hidden
    return cross_entropy(logits, targets) + 0.01 * hidden.square().sum(-1).mean()


class InPlace(nn.Module):
    """Values that are changed after others have read them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skip = x * 2
        x.add_(1.0)
        x = self.relu(x + 0)
        skip[:, 0] = x[:, 1]
        skip[:, 2:4] += 0.5
        y = self.second(x)
        y += skip
        y.mul_(torch.sigmoid(skip))
        z = y.clone()
        z[:, ::2].zero_()
        return self.third(z + y)


class ChangesInput(nn.Module):
    """The input itself is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(5, 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        return self.body(x) + x


class CountsCalls(nn.Module):
    """A buffer counts the calls, and the answer depends on it: microbatches would count too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(5, 8, 6, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.body(x) / (1 + 0.1 * self.calls)


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.second(x + 0.1 * torch.randn(x.shape, dtype=x.dtype))


class Gumbel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gumbel_softmax(self.first(x), tau=2.0))


class Draws(nn.Module):
    """A variational layer, multiplicative noise, and examples left out as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.scale, self.last = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        drawn = torch.empty_like(self.mean(x)).normal_(0.5, 2.0)
        latent = self.mean(x) + drawn * F.softplus(self.scale(x))
        latent = latent * (0.5 + torch.rand(len(x), 1, dtype=x.dtype))
        kept = torch.bernoulli(torch.full((len(x), 1), 0.7, dtype=x.dtype))
        return self.last(latent * kept + torch.randn_like(latent))


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(torch.tanh(self.first(x)), 0.3, self.training))


class Rounded(torch.autograd.Function):
    """Rounds; its gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(nn.Module):
    """A gradient that is not the derivative: a tracer that looks through it gets 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 8), nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = Rounded.apply(self.first(x))
        return self.third(torch.tanh(self.second(x)))


class StopsGradient(nn.Module):
    """`detach` and `no_grad` in the middle of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + (torch.round(x * 4) / 4 - x).detach()
        with torch.no_grad():
            weights = torch.softmax(self.second(x), dim=-1)
        return self.third(torch.tanh(self.second(x)) * weights)


class Checkpointed(nn.Module):
    """The user recomputes a block himself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(5, 8), mlp(8, 9, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(x + checkpoint(self.block, x, use_reentrant=False))


class Hooked(nn.Module):
    """A forward hook that changes what a layer gives, and a weight computed from another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.first.register_forward_hook(lambda _module, _inputs, output: output * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(F.linear(x, self.second.weight * self.first.bias, self.second.bias))


class Selects(nn.Module):
    """How many rows a layer sees depends on their values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(5, 6), nn.ModuleList(nn.Linear(6, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        chosen = x[:, :3].argmax(-1)
        out = x.new_zeros(len(x), 5)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            out = out.index_add(0, rows, expert(x[rows]))
        return out


class Optional(nn.Module):
    """An argument that is None, and a number beside the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(5, 9, 5)

    def forward(self, x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        x = x if mask is None else x * mask
        return self.body(x * scale)


def optional(step: int) -> tuple[Any, Any]:
    inputs, targets = values(5, classes=5, rows=(7, 5, 2))(step)
    return (inputs, None, 0.5), targets


class Sizes(nn.Module):
    """Reads the size of the batch, and reshapes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(10, 9, 6), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        flat = self.body(x.reshape(n, 10)).reshape(n * 2, 3)
        return self.head(flat).view(n, 2, 5).mean(1) + torch.zeros(n, 1, dtype=x.dtype)


def wide(step: int) -> tuple[Any, Any]:
    made, n = generator(step), rows_of((9, 7, 2), step)
    return torch.randn(n, 2, 5, generator=made), torch.randint(5, (n,), generator=made)


def awkward(name, model_fn, note, *, rows=(11, 7, 3), batch=None, loss=cross_entropy,
            optimizer=SGD, **others):  # fmt: skip
    batch = batch or values(5, classes=5, rows=rows)
    return Subject(name, model_fn, batch, loss, note, optimizer, family="awkward", **others)


SUBJECTS = [
    awkward("nothing-to-cut", Scale, "vectors only: tp replicates all of it, and says so"),
    awkward("one-layer", Linear, "fewer places to cut than stages"),
    awkward("branches-on-weights", BranchesOnWeights, "control flow on a weight's value"),
    awkward("branches-on-inputs", BranchesOnInputs, "control flow on an input's value"),
    awkward("sequential-blocks", sequential_blocks, "blocks with control flow on values, in a row"),
    awkward("repeats", Repeats, "a layer used four times, under two names", optimizer=ADAMW),
    awkward("frozen", frozen, "nothing learns"),
    awkward("frozen-below", frozen_below, "the first layers do not learn", optimizer=ADAMW),
    awkward("frozen-between", frozen_between, "layers in the middle do not learn"),
    awkward("unused", Unused, "parameters that get no gradient", optimizer=ADAMW),
    awkward("tuple", lambda: Structured("tuple"), "a tuple with None", loss=structured_loss),
    awkward("dict", lambda: Structured("dict"), "a dict with a number", loss=structured_loss),
    awkward("dataclass", lambda: Structured("class"), "a dataclass", loss=structured_loss),
    awkward("in-place", InPlace, "values changed after they were read"),
    awkward("changes-input", ChangesInput, "the input is changed in place"),
    awkward("counts-calls", CountsCalls, "a buffer counts the calls of forward"),
    awkward("two-examples", lambda: mlp(5, 8, 9, 5), "fewer examples than microbatches",
            rows=(2, 2, 2)),
    awkward("noise", Noise, "torch.randn in forward"),
    awkward("gumbel", Gumbel, "F.gumbel_softmax in forward"),
    awkward("several-draws", Draws, "rand, normal_, bernoulli of examples"),
    awkward("functional-dropout", FunctionalDropout, "F.dropout in forward",),
    awkward("straight-through", StraightThrough, "an autograd.Function with its own gradient"),
    awkward("stops-gradient", StopsGradient, "detach and no_grad inside"),
    awkward("checkpointed", Checkpointed, "torch.utils.checkpoint inside"),
    awkward("hooked", Hooked, "a forward hook; a weight made of two"),
    awkward("selects", Selects, "rows chosen by value: sizes that depend on the data"),
    awkward("optional-inputs", Optional, "None and a number among the inputs", batch=optional),
    awkward("sizes", Sizes, "reshapes by the size of the batch", batch=wide),
]  # fmt: skip
