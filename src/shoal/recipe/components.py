"""The signatures of the built-in components, as values: what may be asked for, without torch.

    SIGNATURES["optimizer"]["adamw"]().options()
    # {'lr': 0.001, 'weight_decay': 0.01, …}

A recipe is checked against this table before anything starts; `models/` and `learn/` build from the
options that it filled in, so a default stands here and nowhere else.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core.core_schema import ValidationInfo

Role = Literal["model", "objective", "optimizer", "schedule"]


def as_tuple(value: Any) -> Any:
    """A list as a tuple: a value of a recipe can't be changed in place."""
    return tuple(value) if isinstance(value, list) else value


Share = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(as_tuple)]


class Signature(BaseModel):
    """The options of one built-in component: their types, limits and defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def options(self) -> dict[str, Any]:
        """Every option by name, those that were not given with their defaults."""
        return {name: getattr(self, name) for name in type(self).model_fields}


class Resnet(Signature):
    """ResNet (He et al. 2016): ``depth`` layers, ``width`` channels in its first stage."""

    depth: Literal[18, 34, 50, 101, 152] = 18
    conv: Literal["standard", "depthwise_separable"] = "standard"
    residual: bool = True
    input_downscale: Count = 1
    stem: Literal["auto", "standard", "small"] = "auto"
    norm: Literal["batch", "group"] = "batch"
    width: Count = 64
    classes: Count | None = None
    in_channels: Count | None = None


class Transformer(Signature):
    """An encoder that classifies sequences of ``length`` token ids, or of vectors of features."""

    vocab: Count | None = None
    features: Annotated[Count | None, Field(validate_default=True)] = None
    length: Count
    width: Count = 256
    heads: Annotated[Count, Field(validate_default=True)] = 4
    layers: Count = 4
    classes: Count | None = None
    dropout: Share = 0.0

    @field_validator("features")
    @classmethod
    def _one_kind_of_input(cls, features: int | None, info: ValidationInfo) -> int | None:
        if "vocab" in info.data and (features is None) == (info.data["vocab"] is None):
            given = "neither" if features is None else "both"
            needed = "exactly one of `vocab` (token ids) and `features` (vectors) is needed"
            raise ValueError(f"{needed}, given {given}")
        return features

    @field_validator("heads")
    @classmethod
    def _heads_divide_width(cls, heads: int, info: ValidationInfo) -> int:
        width = info.data.get("width")
        if width is not None and width % heads:
            raise ValueError(f"must divide `width`, which is {width}")
        return heads


class Mlp(Signature):
    """Linear layers of these widths with ReLU between them; no widths: a linear classifier."""

    widths: Counts = (128,)
    classes: Count | None = None


class CrossEntropy(Signature):
    """Cross-entropy of class scores; ``ignore_index`` is a target that counts nowhere."""

    label_smoothing: Share = 0.0
    ignore_index: int | None = None


class Mse(Signature):
    """Mean squared error."""


class Binary(Signature):
    """Binary cross-entropy of logits."""


class Optimizer(Signature):
    """What every built-in optimizer takes; ``clip_norm`` is of the whole model's gradient."""

    lr: NotNegative
    weight_decay: NotNegative = 0.0
    no_decay: Annotated[tuple[Literal["bias", "norm"], ...], BeforeValidator(as_tuple)] = ()
    clip_norm: Positive | None = None

    @field_validator("no_decay")
    @classmethod
    def _each_once(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(kinds)))


class Sgd(Optimizer):
    """Stochastic gradient descent; there is no learning rate that suits every model."""

    momentum: Share = 0.0
    nesterov: bool = False

    @field_validator("nesterov")
    @classmethod
    def _needs_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("needs `momentum` above 0, given momentum 0")
        return nesterov


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015); weight decay is part of the gradient."""

    lr: NotNegative = 1e-3
    betas: Annotated[tuple[Share, Share], BeforeValidator(as_tuple)] = (0.9, 0.999)
    eps: Positive = 1e-8


class AdamW(Adam):
    """AdamW (Loshchilov and Hutter 2019); weight decay is apart from the gradient."""

    weight_decay: NotNegative = 0.01


class Schedule(Signature):
    """A factor on the learning rate against the share of training done; ``warmup`` rises from 0."""

    warmup: Share = 0.0


class Constant(Schedule):
    """The learning rate as given."""


class Cosine(Schedule):
    """Half a cosine from 1 down to ``final``."""

    final: Annotated[float, Field(ge=0, le=1)] = 0.0


class Step(Schedule):
    """Times ``factor`` at each of the shares ``at``."""

    at: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], BeforeValidator(as_tuple)] = (
        0.5,
        0.75,
    )
    factor: Positive = 0.1

    @field_validator("at")
    @classmethod
    def _rising(cls, at: tuple[float, ...]) -> tuple[float, ...]:
        if any(later <= earlier for earlier, later in pairwise(at)):
            raise ValueError("must rise from one to the next")
        return at


SIGNATURES: Mapping[Role, Mapping[str, type[Signature]]] = {
    "model": {"resnet": Resnet, "transformer": Transformer, "mlp": Mlp},
    "objective": {"cross_entropy": CrossEntropy, "mse": Mse, "binary": Binary},
    "optimizer": {"sgd": Sgd, "adam": Adam, "adamw": AdamW},
    "schedule": {"constant": Constant, "cosine": Cosine, "step": Step},
}

METRICS = ("accuracy", "top5", "loss")
"""What an evaluation can report; the loss is always there."""

DATA_SETS: Mapping[str, tuple[str, ...]] = {
    "digits": ("train", "test"),
    "fashion-mnist": ("train", "test"),
    "mnist": ("train", "test"),
}
"""The data sets known by name, and their splits."""


def roles() -> tuple[Role, ...]:
    """The keys of a recipe that hold a component."""
    return tuple(SIGNATURES)
