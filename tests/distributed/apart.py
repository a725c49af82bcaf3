"""Replicas with weights of their own, in plain torch loops, beside the same over ranks.

    plain = Plain(case, replicas=3)
    plain.run(local(4))                                    # what `meet` does after each step
    found = train_apart(pool, case, "dp3/local:4", folder)  # what each replica has, by name

Nothing of Shoal computes the reference: models, autograd, optimizers of torch's, and a few lines
for each algorithm.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from onedevice import Batches, Case, _normalize_in_parts, cast
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Meet = Callable[["Plain", int], None]
Weights = dict[str, Tensor]


def cuts(examples: int, replicas: int, unit: int = 1) -> list[tuple[int, int]]:
    """Whole units, as many to each as to any other, the first have one more."""
    each, more = divmod(-(-examples // unit), replicas)
    sizes = [unit * (each + (r < more)) for r in range(replicas)]
    stops = [min(examples, sum(sizes[: r + 1])) for r in range(replicas)]
    return list(zip([0, *stops], stops, strict=False))


class Plain:
    """Replicas one after another on one device."""

    def __init__(self, case: Case, replicas: int) -> None:
        torch.manual_seed(case.seed)
        first = case.build().to(case.dtype).train()
        self.case, self.replicas = case, replicas
        self.models = [copy.deepcopy(first) for _ in range(replicas)]
        if case.normalize_over is not None:
            for model in self.models:
                _normalize_in_parts(model, case.normalize_over)
        self.optimizers = [case.optimizer(model) for model in self.models]
        self.unit = case.normalize_over or 1
        self.total = len(case.batches)
        self.agree_until = 0  # steps whose gradients are summed

    def counts(self, step: int) -> list[int]:
        size = len(self.case.batches[step][1])
        return [stop - start for start, stop in cuts(size, self.replicas, self.unit)]

    def shares(self, first: int, last: int) -> list[float]:
        of_each = [sum(c) for c in zip(*map(self.counts, range(first, last + 1)), strict=True)]
        return [each / sum(of_each) for each in of_each]

    def run(self, meet: Meet = lambda _plain, _step: None) -> "Plain":
        for step in range(self.total):
            self._step(step)
            with torch.no_grad():
                meet(self, step)
        return self

    def _step(self, step: int) -> None:
        inputs, targets = self.case.batches[step]
        spans = cuts(len(targets), self.replicas, self.unit)
        for model, (start, stop) in zip(self.models, spans, strict=True):
            model.zero_grad()
            if stop > start:
                x, y = tree_map(lambda t, a=start, b=stop: t[a:b], (inputs, targets))
                self.case.loss(model(cast(x, self.case.dtype)), y).backward()
        if step < self.agree_until:
            self._sum_gradients(self.shares(step, step))
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            if self.case.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.case.clip_norm)
            optimizer.step()

    def _sum_gradients(self, shares: list[float]) -> None:
        for parameters in zip(*(model.parameters() for model in self.models), strict=True):
            given = zip(parameters, shares, strict=True)
            total = sum(p.grad * share for p, share in given if p.grad is not None)
            for parameter in parameters:
                parameter.grad = total.clone()

    # ---- what meetings do

    def weights(self, replica: int) -> Weights:
        state = self.models[replica].state_dict()
        return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}

    def mean(self, shares: list[float]) -> Weights:
        names = self.weights(0)
        every = [self.weights(r) for r in range(self.replicas)]
        return {n: sum(s * w[n] for s, w in zip(shares, every, strict=True)) for n in names}

    def put(self, replica: int, weights: Weights) -> None:
        own = self.weights(replica)
        for name, tensor in weights.items():
            own[name].copy_(tensor)

    def put_all(self, weights: Weights) -> None:
        for replica in range(self.replicas):
            self.put(replica, weights)


def local(every: int, *, after: int = 0, state: bool = False) -> Meet:
    def meet(plain: Plain, step: int) -> None:
        since = step + 1 - after
        if step < after or (since % every and step + 1 != plain.total):
            return
        first = step - (since - 1) % every
        shares = plain.shares(first, step)
        plain.put_all(plain.mean(shares))
        if state:
            average_momentum(plain, shares)

    return meet


def average_momentum(plain: Plain, shares: list[float]) -> None:
    """Of SGD: what each keeps of a parameter, missing ones zero."""
    for parameters in zip(*(model.parameters() for model in plain.models), strict=True):
        kept = [o.state[p] for o, p in zip(plain.optimizers, parameters, strict=True)]
        of_each = [k.get("momentum_buffer", torch.zeros_like(parameters[0])) for k in kept]
        total = sum(s * m for s, m in zip(shares, of_each, strict=True))
        for state in kept:
            state["momentum_buffer"] = total.clone()


def easgd(every: int, alpha: float) -> Meet:
    centre: Weights = {}

    def meet(plain: Plain, step: int) -> None:
        if step == 0 and not centre:
            torch.manual_seed(plain.case.seed)
            first = plain.case.build().to(plain.case.dtype).state_dict()
            centre.update({n: t.clone() for n, t in first.items() if t.is_floating_point()})
        if (step + 1) % every and step + 1 != plain.total:
            return
        every_one = [plain.weights(r) for r in range(plain.replicas)]
        pulls = [{n: alpha * (w[n] - centre[n]) for n in centre} for w in every_one]
        for own, pull in zip(every_one, pulls, strict=True):
            for name in centre:
                own[name] -= pull[name]
        for name in centre:
            centre[name] += sum(pull[name] for pull in pulls)

    meet.centre = centre  # type: ignore[attr-defined]
    return meet


def gossip(graph: str) -> Meet:
    def meet(plain: Plain, step: int) -> None:
        n = plain.replicas
        if step + 1 == plain.total:
            plain.put_all(plain.mean([1 / n] * n))
            return
        before = [{k: v.clone() for k, v in plain.weights(r).items()} for r in range(n)]
        rounds = 1 if n < 3 else 2  # ⌈log₂ n⌉ of up to 4
        for r in range(n):
            near = (
                {(r - 1) % n, (r + 1) % n} if graph == "ring" else {(r - 2 ** (step % rounds)) % n}
            )
            heard = [before[r], *(before[k] for k in sorted(near))]
            plain.put(r, {name: sum(w[name] for w in heard) / len(heard) for name in before[r]})

    return meet


# ---- over ranks


def _train(
    context: Any,
    case: Case,
    text: str,
    folder: str,
    first: int,
    last: int | None,
    watch: bool,
    transport: Any,
    into: str,
) -> Any:
    from shoal.checkpoint import Checkpoint, save
    from shoal.checkpoint.folder import checkpoint_path
    from shoal.comm import Groups
    from shoal.job import Execution, Workload
    from shoal.strategy import Strategy
    from shoal.train.commit import GroupMeeting
    from shoal.train.step import Flags
    from shoal.train.team import Team
    from shoal.train.times import StepTimes

    torch.set_num_threads(1)
    strategy = Strategy.parse(text)
    groups = Groups.form(
        context.rank,
        context.world_size,
        context.store,
        context.generation,
        axes=strategy.axes,
        shards=strategy.shards,
        apart=strategy.agreement.apart,
        transport=transport,
        timeout_s=60,
    )
    feed = Batches(case.batches)
    workload = Workload(
        build_model=case.build,
        objective=case.objective,
        build_optimizer=case.optimizer,
        schedule=lambda _seen: 1.0,
        feed=feed,
        seed=case.seed,
        total_steps=len(case.batches),
        normalize_over=case.normalize_over,
        clip_norm=case.clip_norm,
        evaluation=feed if watch else None,
    )
    state = Checkpoint.open(checkpoint_path(Path(folder), first)) if first else None
    execution = Execution.of(strategy, case.dtype)
    team = Team.of(groups, workload, execution, state, lambda _number, _model: None)
    stop, losses = len(case.batches) if last is None else last, []
    for step in range(first, stop):
        team.step(step, Flags(), StepTimes())
        if watch:
            losses.append(team.evaluate().metrics["loss"])
    snapshot = team.snapshot(stop, "the case", text, {})
    save(Path(into), snapshot, GroupMeeting(groups.world))
    sent = groups.world.counter.as_dict()
    groups.close()
    return {"losses": losses, "bytes": sent, "warnings": list(team.job.warnings)}


def train_apart(
    pool: Any,
    case: Case,
    text: str,
    folder: Path,
    *,
    first: int = 0,
    last: int | None = None,
    watch: bool = False,
    transport: str = "auto",
    into: Path | None = None,
) -> Any:
    """Train from step `first` (of an earlier call) to `last`; what rank 0 says of it.

    ``into``: where the last step is saved, if not in `folder`.
    """
    from shoal.strategy import Strategy

    folder.mkdir(exist_ok=True)
    ranks = Strategy.parse(text).world_size
    into = into or folder
    into.mkdir(exist_ok=True)
    options = (first, last, watch, transport, str(into))
    return pool.call(_train, case, text, str(folder), *options, ranks=ranks)[0]


def saved(folder: Path, step: int) -> Weights:
    """Every tensor of a checkpoint, by name."""
    from shoal.checkpoint import Checkpoint
    from shoal.checkpoint.folder import checkpoint_path

    checkpoint = Checkpoint.open(checkpoint_path(folder, step))
    checkpoint.verify()
    return {name: checkpoint.read(name) for name in checkpoint.names}


def replica_of(tensors: Weights, number: int | None) -> Weights:
    """The tensors of one replica, under their own names."""
    start = "" if number is None else f"replica-{number}/"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def distance(expected: Weights, found: Weights) -> float:
    """The largest error over the expected tensors, relative to the largest number of each."""
    worst = 0.0
    for name, tensor in expected.items():
        size = max(float(tensor.abs().max()), 1e-3)
        worst = max(worst, float((found[name] - tensor).abs().max()) / size)
    return worst


def worst_of(plain: Plain, folder: Path, *, apart: bool = True) -> float:
    """How far replicas on ranks are from those of the plain loop at the end."""
    tensors = saved(folder, plain.total)
    return max(
        distance(plain.weights(r), replica_of(tensors, r if apart else None))
        for r in range(plain.replicas)
    )
