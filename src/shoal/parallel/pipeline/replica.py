"""`StagedReplica`: one copy of the model over several ranks, each with some stages of it.

    rank 0   F0 F1 .  .  B0 F2 B1 .  B2         every rank reads the replica's rows, runs its row of
    rank 1   .  F0 B0 F1 B1 .  F2 B2            the table, and receives what an action needs

    replica = build_staged_replica(model, objective, …)
    totals = replica.forward_backward(batch, step, share, start)      # as of `Replica`

A rank's share is cut into microbatches whose sizes differ by one at most; the loss of each is
divided by the examples of the global batch, which all know beforehand, so that their gradients add
up to the step's. Microbatches without rows are left out by all stages alike.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm import Pending
from shoal.errors import Refused
from shoal.layout import Part
from shoal.parallel.microbatches import LocalBatch, Share
from shoal.parallel.pipeline.links import Message
from shoal.parallel.pipeline.microbatches import cut_groups, cut_rows, run_by, run_together
from shoal.parallel.pipeline.outputs import join
from shoal.parallel.pipeline.parts import (
    Kept,
    Parts,
    StepRun,
    named,
    run_chunk,
    shapes_of,
    some_rows,
)
from shoal.parallel.replica import (
    Start,
    call_objective,
    each_tensor,
    no_gradient,
)
from shoal.parallel.tensor import TensorPlan, gather_outputs, wrap
from shoal.schedule import Action


class StagedReplica:
    """A model in stages, prepared for training. Made by `build_staged_replica`.

    ``rank`` and ``ranks`` count replicas. ``accumulation`` says when gradients are complete.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.model = parts.model
        self.numerics = parts.numerics
        self.rank, self.ranks = parts.groups.data.rank, parts.groups.data.size
        self.device = parts.groups.device
        self.table = parts.table
        self.parameters = parts.parameters
        self.accumulation = parts.completion
        self.captured: Any = None
        self._captures = False
        self._divisor = 1.0
        self._row = parts.table.rows[parts.groups.pipeline.rank]

    @property
    def holding(self) -> nn.Module:
        """The user's module with the tensors that this rank keeps and updates, by their names."""
        return self._parts.states.holding

    @property
    def judges(self) -> bool:
        """Whether this rank is the one of its replica that has outputs for metrics."""
        return self._parts.groups.tensor.rank == 0 and self._has_last_stage

    @property
    def _has_last_stage(self) -> bool:
        return self.table.rank_of(self.table.stages - 1) == self._parts.groups.pipeline.rank

    @property
    def sums_gradients(self) -> bool:
        """Whether gradients are those of the whole batch already when the backward pass ends."""
        return self._parts.states.in_step

    @property
    def unit(self) -> int:
        """What shares of a batch are multiples of: with microbatches, a statistics group."""
        several = self._parts.has_norms and self.table.microbatches > 1
        return (self._parts.batch_groups.normalize_over or 1) if several else 1

    def describe(self) -> tuple[str, ...]:
        """What is cut, and why, a line each."""
        return self._parts.about

    @property
    def layout(self) -> dict[str, Part]:
        """Which part of each tensor this rank holds; those of other stages are not there.

        Of buffers that no checkpoint has, those that are cut.
        """
        state, cut = self.model.state_dict(keep_vars=True), self._parts.cut
        whole = {name: Part.whole(tuple(tensor.shape)) for name, tensor in state.items()}
        here = whole.keys() | {name for name, _ in self.model.named_buffers()}
        held = whole | {name: part for name, part in cut.items() if name in here}
        return self._parts.states.layout(held)

    @property
    def plan(self) -> TensorPlan | None:
        """What tensor parallelism has cut, and why; None without it."""
        return self._parts.plan

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The operations before which the traced model is cut."""
        return self._parts.forms.boundaries

    def capture(self) -> None:
        """Keep the outputs of each training step from now on, on ranks of the last stage."""
        self._captures = True

    # ---- a step

    def forward_backward(self, batch: LocalBatch, step: int, share: Share, start: Start) -> Tensor:
        """Leave in ``.grad`` the gradient of this replica's losses ÷ the batch's examples.

        As `Replica.forward_backward`; ``start`` is called once on every rank, when its forwards are
        done, with sums that are zero on all but one rank of the replica. Collective over the
        replica's ranks.
        """
        run = self._begin(batch, step, share, training=True)
        actions = [action for action in self._row if action.microbatch in run.pieces]
        forwards = sum(action.kind == "F" for action in actions)
        self._parts.completion.begin(actions)
        run.last = frozenset({a.stage: a for a in actions if a.kind in "BW"}.values())
        totals: Pending | None = None
        try:
            for action in actions:
                with self._parts.completion.during(action):
                    self._do(run, action)
                forwards -= action.kind == "F"
                if not forwards and totals is None:
                    totals = start(run.sums.to(self.device))
                    self._parts.batch_groups.send()
        except BaseException:
            self._parts.later.clear()
            raise
        self._parts.links.finish()
        self._parts.batch_groups.finish()
        self._divisor = run.divisor
        if self._captures:
            self.captured = self._joined(run)
        assert totals is not None  # a rank has a stage, and a step a microbatch
        return totals.wait()

    def _do(self, run: StepRun, action: Action) -> None:
        kind, stage, microbatch = action
        last = action in run.last
        if kind == "F":
            self._forward(run, stage, microbatch)
            return
        if kind != "W":
            if self._parts.rows is not None:
                self._parts.rows.begin_backward((stage, microbatch), last=last)
            self._backward(run, stage, microbatch)
        if kind != "I":
            self._parts.later.run(stage, microbatch)
            if self._parts.rows is not None:
                self._parts.rows.settle((stage, microbatch), last=last)

    def _forward(self, run: StepRun, stage: int, microbatch: int) -> None:
        chunk = run.forms[microbatch].chunks[stage]
        links = self._parts.links
        received = links.receive(Message("F", stage - 1, microbatch)) if stage else []
        self._enter(run, microbatch)
        values = run.inputs[microbatch] | named(chunk.takes, received)
        with self._products():
            live = run_chunk(chunk, values)
            if stage == self.table.stages - 1:
                outputs = [live[name] for name in chunk.outputs]
                given = [self._loss(run, microbatch, outputs)]
            else:
                given = [live[name] for name in chunk.gives]
                links.send(Message("F", stage, microbatch), given)
        run.kept[stage, microbatch] = Kept(received, given)

    def _loss(self, run: StepRun, microbatch: int, outputs: list[Tensor]) -> Tensor:
        """The loss of a microbatch ÷ the global batch's examples; its sums are noted."""
        rows, piece = len(run.batch.rows), run.pieces[microbatch]
        targets = each_tensor(lambda leaf: some_rows(leaf, piece, rows), run.batch.targets)
        traced, group = run.forms[microbatch].traced, self._parts.groups.tensor
        seen = wrap(outputs, traced, group) if traced.cut_outputs else outputs
        whole = traced.rebuild(seen)
        total, count = call_objective(self._parts.objective, whole, targets)
        if not run.counts or microbatch in run.idle:
            total, count = total * 0.0, count * 0.0
        if not total.requires_grad:
            raise no_gradient(run.step)
        if self._parts.groups.tensor.rank == 0:
            run.sums += torch.stack((total.detach().double(), count.detach().double())).cpu()
        if self._captures and microbatch not in run.idle:
            kept = [tensor.detach().clone() for tensor in outputs]
            run.outputs[microbatch] = self._whole(run, microbatch, kept)
        return total / run.divisor

    def _backward(self, run: StepRun, stage: int, microbatch: int) -> None:
        """The backward pass, without the gradients of weights that are computed later."""
        kept = run.kept.pop((stage, microbatch))
        links, parts = self._parts.links, self._parts
        gradients: list[Tensor | None] = [None]
        roots = kept.given
        if stage < self.table.stages - 1:
            gradients = links.receive(Message("B", stage + 1, microbatch))
            known = [(v, g) for v, g in zip(roots, gradients, strict=True) if g is not None]
            roots, gradients = [v for v, _ in known], [g for _, g in known]
        self._enter(run, microbatch)
        parts.later.at = (stage, microbatch)
        if roots:
            with parts.batch_groups.recomputation(), parts.forms.in_backward(parts.randomness):
                torch.autograd.backward(roots, gradients)
        if stage:
            of_received = [None if value is None else value.grad for value in kept.received]
            links.send(Message("B", stage, microbatch), of_received)

    def rescale(self, count: float) -> None:
        """Make of gradients per example those per what the objective counts, `count` in all.

        Before that, gradients of tied parameters are summed over the stages. Collective.
        """
        self._parts.states.finish()
        self._parts.tied.sum_gradients()
        self._parts.states.take_gradients(self._divisor / count if count else 1.0)

    def updated(self) -> None:
        """After the optimizer's update, once its gradients are forgotten. Collective."""
        self._parts.states.spread()

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole model's gradient, a 0-d tensor. Collective over the replica.

        Each number counts once: tied ones with their first stage, and those that every tensor rank
        holds with the first of these; likewise what is whole on all ranks of a shard group.
        """
        groups, rows, mine = self._parts.groups, self._parts.rows, []
        held = self.model if rows is None else rows.holding
        for name, parameter in held.named_parameters():
            whole = name not in self._parts.cut
            elsewhere = self._parts.tied.counts_elsewhere(parameter)
            everywhere = rows is not None and rows.is_on_all(parameter)
            if parameter.grad is None or elsewhere or (whole and groups.tensor.rank):
                continue
            if parameter.numel() and not (everywhere and groups.shard.rank):
                mine.append(parameter.grad)
        norm = nn.utils.get_total_norm(mine) if mine else torch.zeros((), device=self.device)
        square = norm.double().square().reshape(1)
        dtype = norm.dtype if mine else next(self._dtypes(), norm.dtype)
        sharded = () if rows is None else (groups.shard,)
        for group in (*sharded, groups.tensor, groups.pipeline):
            group.all_reduce(square, "agreement")
        return square.sqrt().to(dtype).reshape(())

    def _dtypes(self) -> Iterator[torch.dtype]:
        yield from (parameter.dtype for parameter in self.model.parameters())

    def _products(self) -> torch.autocast:
        """Products in bf16, where that was asked for."""
        # Weights that are gathered unit by unit are not to stay as copies in bf16.
        cached = self._parts.rows is None
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.numerics.bf16, cache_enabled=cached
        )

    # ---- evaluation

    def forward(self, batch: LocalBatch, step: int, share: Share) -> Any:
        """Outputs for the replica's rows, without gradient; None on all but the last stage."""
        run = self._begin(batch, step, share, training=False)
        with torch.no_grad():
            for kind, stage, microbatch in self._row:
                if kind == "F" and microbatch in run.pieces:
                    self._evaluate(run, stage, microbatch)
        self._parts.links.finish()
        return self._joined(run)

    def _evaluate(self, run: StepRun, stage: int, microbatch: int) -> None:
        chunk = run.forms[microbatch].chunks[stage]
        links = self._parts.links
        received = links.receive(Message("F", stage - 1, microbatch)) if stage else []
        self._enter(run, microbatch)
        values = run.inputs[microbatch] | named(chunk.takes, received)
        with self._products():
            live = run_chunk(chunk, values)
        if stage == self.table.stages - 1:
            outputs = [live[name] for name in chunk.outputs]
            if microbatch not in run.idle:
                run.outputs[microbatch] = self._whole(run, microbatch, outputs)
        else:
            links.send(Message("F", stage, microbatch), [live[name] for name in chunk.gives])

    def _whole(self, run: StepRun, microbatch: int, outputs: list[Tensor]) -> list[Tensor]:
        """Outputs that every tensor rank has all of."""
        traced = run.forms[microbatch].traced
        if not traced.cut_outputs:
            return outputs
        return gather_outputs(outputs, traced, self._parts.groups.tensor)

    # ---- rows

    def _begin(self, batch: LocalBatch, step: int, share: Share, *, training: bool) -> StepRun:
        """Cut the batch, and have the forms that its microbatches need."""
        parts, rows = self._parts, len(batch.rows)
        parts.batch_groups.begin(batch.rows, share.batch_examples, list(share.shares))
        pieces = self._pieces(batch.rows, training)
        runs, idle = run_by(pieces), frozenset[int]()
        if parts.rows is not None:
            of_each = [self._pieces(torch.arange(*reads), training) for reads in share.shares]
            pieces, runs, idle = run_together(pieces, [run_by(each) for each in of_each])
        run = StepRun(
            batch,
            step,
            not share.is_empty(self.rank),
            float(max(1, share.batch_examples)),
            {m: piece for m, piece in enumerate(pieces) if runs[m]},
            idle,
            first=share.first,
        )
        if training and parts.has_norms and parts.batch_groups.crosses and len(run.pieces) > 1:
            raise Refused(
                "statistics groups of batch norm lie on several replicas, and a pipeline of "
                "several microbatches needs each whole in one",
                hint="Use shares of whole groups (a batch size that is replicas × normalize_over "
                "× a whole number), or mb:1.",
            )
        for number, piece in run.pieces.items():
            inputs = each_tensor(lambda leaf, p=piece: some_rows(leaf, p, rows), batch.inputs)  # type: ignore[misc]
            size = piece.stop - piece.start
            run.forms[number] = form = parts.forms.of(
                training=training, inputs=inputs, rows=size, alone=share.batch_examples == 1
            )
            run.inputs[number] = form.named(inputs)
        kind = (training, share.batch_examples == 1)
        keys = {m: (*kind, shapes_of(values)) for m, values in run.inputs.items()}
        parts.links.begin(keys, backward=training)
        return run

    def _pieces(self, positions: Tensor, training: bool) -> list[slice]:
        """The microbatches' rows of these: whole statistics groups, if there are any."""
        size = self._parts.batch_groups.normalize_over
        if self._parts.has_norms and not training and size is None:
            return [slice(0, len(positions))]
        if self._parts.has_norms and size is not None:
            groups = torch.div(positions, size, rounding_mode="floor").tolist()
            return cut_groups(groups, self.table.microbatches)
        return cut_rows(len(positions), self.table.microbatches)

    def _enter(self, run: StepRun, microbatch: int) -> None:
        """What follows is about these rows, for batch statistics and random choices."""
        rows = run.batch.rows[run.pieces[microbatch]]
        if len(run.pieces) > 1:
            self._parts.batch_groups.microbatch(rows)
            self._parts.batch_groups.stands_in = not run.counts or microbatch in run.idle
        self._parts.randomness.begin(run.step, rows + run.first, self.rank)

    def _joined(self, run: StepRun) -> Any:
        """The model's outputs of all microbatches as one; None where this rank has none."""
        if not run.outputs:
            return None
        rows = [run.pieces[m].stop - run.pieces[m].start for m in sorted(run.outputs)]
        tensors = join([run.outputs[m] for m in sorted(run.outputs)], rows)
        if not run.counts:
            tensors = [tensor[:0] if tensor.dim() else tensor for tensor in tensors]
        first = run.forms[min(run.outputs)]
        return first.traced.rebuild(tensors)
