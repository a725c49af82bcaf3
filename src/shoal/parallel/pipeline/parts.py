"""What a staged replica is made of, and what it knows of a step in progress.

parts     from `build_staged_replica`: forms, links, table, groups
run       the batch in hand: microbatches, what was received and given, sums of losses
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shoal.comm import Groups
from shoal.errors import ShoalError
from shoal.layout import Part
from shoal.parallel.batch_groups import BatchGroups
from shoal.parallel.microbatches import LocalBatch
from shoal.parallel.pipeline.completion import Completion
from shoal.parallel.pipeline.forms import Form, Forms
from shoal.parallel.pipeline.links import Links
from shoal.parallel.pipeline.tied import Tied
from shoal.parallel.pipeline.weights import Later
from shoal.parallel.randomness import StepKey
from shoal.parallel.replica import (
    Numerics,
    Objective,
    user_error,
)
from shoal.parallel.tensor import TensorPlan
from shoal.parallel.zero import GatheredRows, States
from shoal.schedule import Action, Table

Values = dict[str, Tensor]


@dataclass
class Parts:
    """What a staged replica is made of. See `build_staged_replica`."""

    model: nn.Module
    objective: Objective
    numerics: Numerics
    groups: Groups
    table: Table
    forms: Forms
    links: Links
    batch_groups: BatchGroups
    randomness: StepKey
    later: Later
    tied: Tied
    completion: Completion
    cut: dict[str, Part]  # of the tensors that tensor parallelism has cut
    states: States
    rows: GatheredRows | None  # zero2 and zero3: what the stages gather from
    about: tuple[str, ...]  # what is cut and why, in words
    has_norms: bool
    plan: TensorPlan | None  # of tensor parallelism
    parameters: int


@dataclass
class Kept:
    """Of one stage and microbatch, from its forward to its backward."""

    received: list[Tensor | None]
    given: list[Tensor]


@dataclass
class StepRun:
    """A step, or a forward pass alone, in progress."""

    batch: LocalBatch
    step: int
    counts: bool  # whether the rows have any weight, see `Share`
    divisor: float
    pieces: dict[int, slice]  # the microbatches that are run, and their rows
    idle: frozenset[int] = frozenset()  # of these, those that only stand in, without weight
    first: int = 0  # see `Share`
    last: frozenset[Action] = frozenset()  # each stage's last action of this rank
    forms: dict[int, Form] = field(default_factory=dict)
    inputs: dict[int, Values] = field(default_factory=dict)
    kept: dict[tuple[int, int], Kept] = field(default_factory=dict)
    outputs: dict[int, list[Tensor]] = field(default_factory=dict)
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))


def run_chunk(chunk: Callable[[Values], Values], values: Values) -> Values:
    """Run a stage; errors say whose they are."""
    try:
        return chunk(values)
    except ShoalError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise user_error("the model's forward", error) from error


def named(names: Sequence[str], tensors: Sequence[Tensor | None]) -> Values:
    """Live values, which are all there, by their names."""
    pairs = zip(names, tensors, strict=True)
    return {name: tensor for name, tensor in pairs if tensor is not None}


def some_rows(leaf: Tensor, piece: slice, rows: int) -> Tensor:
    return leaf[piece] if leaf.dim() and leaf.shape[0] == rows else leaf


def shapes_of(values: Values) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in values.values())
