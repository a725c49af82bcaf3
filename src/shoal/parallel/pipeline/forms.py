"""`Form`: the model in one mode, traced and cut into stages. Most runs have two: train and eval.

    forms = Forms(model, how)
    form = forms.of(training=True, inputs=inputs, rows=8)
    live = form.chunks[stage](values)

The first one decides, by counted costs, where the model is cut and which tensors each stage holds;
any other (evaluation; one that a model with fixed sizes needs for each number of rows; one for a
batch of a single example, where code may say ``if len(x) == 1``) is cut where its parameters lie.
Models are traced again from a skeleton without memory, since by then a rank has
only its own stages' tensors.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from shoal.errors import Refused
from shoal.parallel.pipeline.chunk import Chunk
from shoal.parallel.pipeline.cutting import Cut, choose, cut_at, follow
from shoal.parallel.pipeline.describing import of_masks, of_stages
from shoal.parallel.pipeline.placing import (
    find_holders,
    keep_only,
    names_of,
    skeleton_of,
    tensors_of,
)
from shoal.parallel.randomness import StepKey, intercepting
from shoal.parallel.zero.gathered import GatheredRows
from shoal.schedule import Table
from shoal.trace import Blocks, Traced, trace, trace_blocks

Rewrite = Callable[[Traced, bool], Traced]


@dataclass
class Form:
    """One trace, and this rank's stages of it. ``alone``: for batches of a single example."""

    traced: Traced
    chunks: dict[int, Chunk]
    alone: bool = False

    def fits(self, inputs: Any, rows: int) -> bool:
        """Whether the trace holds for these inputs: their number of rows may be free."""
        if self.traced.static_rows not in (None, rows):
            return False
        tensors = self.traced.flatten(inputs)
        return all(map(_same_shape, tensors, self._expected()))

    def named(self, inputs: Any) -> dict[str, Tensor]:
        """The model's input tensors by their names in the trace."""
        return dict(zip(self.traced.inputs, self.traced.flatten(inputs), strict=True))

    def _expected(self) -> list[Tensor]:
        values = {node.name: node.meta["val"] for node in self.traced.graph.nodes
                  if node.op == "placeholder"}  # fmt: skip
        return [values[name] for name in self.traced.inputs]


def _same_shape(given: Tensor, expected: Tensor) -> bool:
    """A traced size that is a symbol may be any."""
    return given.dim() == expected.dim() and all(
        not isinstance(wanted, int) or size == wanted
        for size, wanted in zip(given.shape, expected.shape, strict=True)
    )


@dataclass
class Forms:
    """All forms of one rank's model. Making the first takes the other stages' tensors out of it.

    ``rewrite(traced, training)`` prepares a trace to be cut; ``blocks`` are the paths of modules
    with borders around them: to be computed again in the backward pass (``again``), or to have
    their parameters gathered together (``rows``).
    """

    model: nn.Module
    table: Table
    rank: int
    rewrite: Rewrite
    blocks: tuple[str, ...] = ()
    again: bool = False
    rows: GatheredRows | None = None
    holders: dict[str, set[int]] = field(default_factory=dict)
    boundaries: tuple[int, ...] = ()
    about: tuple[str, ...] = ()  # where it is cut and why, in words
    _known: dict[bool, list[Form]] = field(default_factory=lambda: {True: [], False: []})
    _first: Cut | None = None
    split: Blocks | None = None  # of a model that is cut between its children, untraced

    def __post_init__(self) -> None:
        self.skeleton = skeleton_of(self.model)
        self.names = names_of(self.model)

    def of(self, *, training: bool, inputs: Any, rows: int, alone: bool = False) -> Form:
        """The form for inputs of these shapes, made if it is not there. The same on all ranks.

        ``alone``: the rows are a whole batch of one example. A microbatch of one row is a part of a
        larger batch, and its form is that one's.
        """
        known = self._known[training]
        fitting = (f for f in known if f.alone == alone and f.fits(inputs, rows))
        found = next(fitting, None)
        if found is None:
            make = self._alone if alone else self._make
            found = make(training, inputs, rows)
            known.append(found)
        return found

    def _alone(self, training: bool, inputs: Any, rows: int) -> Form:
        """A trace of one row; without any (batch norm refuses one value), that of more rows."""
        try:
            return replace(self._make(training, inputs, rows), alone=True)
        except Refused:
            return replace(self.of(training=training, inputs=inputs, rows=rows), alone=True)

    def in_backward(self, key: StepKey) -> contextlib.AbstractContextManager[object]:
        """For a backward pass: what a block of its own accord runs again draws as we count."""
        return intercepting(key) if self.split is not None else contextlib.nullcontext()

    def _make(self, training: bool, inputs: Any, rows: int) -> Form:
        self.skeleton.train(training)
        traced = self._traced(inputs, rows)
        costs = traced.costs  # of operations that rewriting may make unknown ones
        traced = self.rewrite(traced, training)
        if self._first is None:
            self.boundaries = choose(traced, self.table.stages, costs)
            cut = self._first = cut_at(traced, self.boundaries, self.blocks)
            self.about = (*of_stages(traced, self.boundaries, costs, self.table), *of_masks(traced))
            self.holders = find_holders(self.model, cut.stages)
            keep_only(self.model, self._kept())
        else:
            found = follow(traced, self._first, self.holders, self.names)
            cut = cut_at(traced, found, self.blocks if training or self.rows else ())
        return Form(traced, self._chunks(cut))

    def _traced(self, inputs: Any, rows: int) -> Traced:
        """Of the skeleton. Whether at its operations or its children, the first trace decides."""
        if self.split is not None:
            return trace_blocks(self.skeleton, inputs, rows, self.split)
        first = self._first is None
        traced = trace(self.skeleton, inputs, rows, whole=self.model, split=first)
        self.split = traced.blocks
        return traced

    def _kept(self) -> set[str]:
        mine = set(self.table.stages_of(self.rank))
        return {name for name, stages in self.holders.items() if stages & mine}

    def _chunks(self, cut: Cut) -> dict[int, Chunk]:
        held = dict(self.skeleton.named_buffers(remove_duplicate=False)) | tensors_of(self.model)
        return {stage: self._chunk(cut, stage, held) for stage in self.table.stages_of(self.rank)}

    def _chunk(self, cut: Cut, stage: int, held: dict[str, Tensor]) -> Chunk:
        segments = cut.stages[stage]
        again = cut.again[stage] if self.again else [False] * len(segments)
        if self.rows is None:
            return Chunk(segments, held, again)
        needed = [[held[path] for path in segment.state.values()] for segment in segments]
        units = [self.rows.unit(stage, number, each) for number, each in enumerate(needed)]
        return Chunk(segments, held, again, self.rows, units)
