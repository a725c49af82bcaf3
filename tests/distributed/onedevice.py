"""One device, in a plain torch loop, beside the same training split over ranks.

    case = Case(build=..., loss=..., objective=..., batches=batches_of(inputs, targets, 50))
    expected = train_plainly(case)
    errors = compare(expected, train_split(pool, 3, case, tmp_path))    # {"gradient": 1e-14, …}

Nothing of Shoal computes the reference: a model, autograd, an optimizer of torch's.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

KINDS = ("output", "loss", "gradient", "parameter", "buffer", "optimizer")
Trace = dict[str, Tensor]  # "step/kind/name"


def cross_entropy(outputs: Any, targets: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def summed_cross_entropy(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    from shoal.learn.objectives import CrossEntropy

    return CrossEntropy()(outputs, targets)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


@dataclass(frozen=True)
class Case:
    """What is trained: a global batch a step, one mean loss, and the same as sum and count."""

    build: Callable[[], nn.Module]
    batches: Sequence[tuple[Any, Any]]
    loss: Callable[[Any, Any], Tensor] = cross_entropy
    objective: Callable[[Any, Any], tuple[Tensor, Tensor]] = summed_cross_entropy
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd
    normalize_over: int | None = None
    clip_norm: float | None = None
    execution: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    seed: int = 3


def batches_of(inputs: Any, targets: Any, size: int, steps: int) -> list[tuple[Any, Any]]:
    """Epochs over the same examples in their order, the last batch of each a partial one."""
    examples = len(targets)
    starts = [*range(0, examples, size)] * steps
    return [
        tree_map(lambda whole, at=start: whole[at : at + size], (inputs, targets))
        for start in starts[:steps]
    ]


def images(examples: int, side: int = 16, channels: int = 1, classes: int = 5) -> Any:
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(examples, channels, side, side, generator=generator)
    return inputs, torch.randint(0, classes, (examples,), generator=generator)


def cast(value: Any, dtype: torch.dtype) -> Any:
    return tree_map(
        lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf,
        value,
    )


# ---- one device


def train_plainly(case: Case) -> Trace:
    torch.manual_seed(case.seed)
    model = case.build().to(case.dtype).train()
    if case.normalize_over is not None:
        _normalize_in_parts(model, case.normalize_over)
    optimizer = case.optimizer(model)
    trace: Trace = {}
    for step, (inputs, targets) in enumerate(case.batches):
        inputs = cast(inputs, case.dtype)
        outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        loss = case.loss(outputs, cast(targets, case.dtype))
        optimizer.zero_grad()
        loss.backward()
        note(trace, step, "output", named_outputs(outputs))
        note(trace, step, "loss", {"loss": loss})
        note(trace, step, "gradient", gradients(model))
        if case.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip_norm)
        optimizer.step()
        note_state(trace, step, model, optimizer)
    return trace


def _normalize_in_parts(model: nn.Module, size: int) -> None:
    """Let each batch norm see `size` examples after the other, as if they were batches."""
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            plain = layer.forward

            def forward(input: Tensor, plain: Any = plain) -> Tensor:
                return torch.cat([plain(part) for part in input.split(size)])

            layer.forward = forward


# ---- several ranks


@dataclass(frozen=True)
class Rows:
    inputs: Any
    targets: Any
    rows: Tensor
    bad: tuple[()] = ()

    def to(self, device: Any, dtype: torch.dtype, *, channels_last: bool = False) -> "Rows":
        def moved(leaf: Tensor) -> Tensor:
            return leaf.contiguous(memory_format=torch.channels_last) if leaf.ndim == 4 else leaf

        inputs = cast(self.inputs, dtype)
        inputs = tree_map(moved, inputs) if channels_last else inputs
        return Rows(inputs, cast(self.targets, dtype), self.rows)


@dataclass(frozen=True)
class Batches:
    """The batches of a case, as a feed."""

    batches: Sequence[tuple[Any, Any]]

    @property
    def steps_per_epoch(self) -> int:
        return len(self.batches)

    @property
    def examples(self) -> int:
        return sum(map(self.batch_examples, range(len(self.batches))))

    fingerprint = "the batches of a case"

    def batch_examples(self, step: int) -> int:
        return len(tree_leaves(self.batches[step][1])[0])

    def read(self, step: int, start: int, stop: int) -> Rows:
        inputs, targets = tree_map(lambda whole: whole[start:stop], tuple(self.batches[step]))
        return Rows(inputs, targets, torch.arange(start, stop))

    def prefetch(self, step: int, start: int, stop: int) -> None:
        return

    def position(self, step: int) -> dict[str, int]:
        return {"epoch": 0, "position": step}


def assembled(groups: Any, case: Case, state: Any = None) -> Any:
    """A job of the case on this rank."""
    from shoal.job import Execution, Workload, assemble

    workload = Workload(
        build_model=case.build,
        objective=case.objective,
        build_optimizer=case.optimizer,
        schedule=lambda _seen: 1.0,
        feed=Batches(case.batches),
        seed=case.seed,
        total_steps=len(case.batches),
        normalize_over=case.normalize_over,
        clip_norm=case.clip_norm,
    )
    return assemble(groups, workload, Execution(dtype=case.dtype, **case.execution), state)


class Watched:
    """A replica that notes the gradients on which it has agreed with the others."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica
        self.gradients: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replica, name)

    def rescale(self, count: float) -> None:
        self._replica.rescale(count)
        self.gradients = {n: g.clone() for n, g in gradients(self._replica.model).items()}


def trace_job(groups: Any, case: Case) -> Trace:
    """Train the case as one of several ranks, in the calls of a real run."""
    from shoal.train.step import Flags, train_step

    job = assembled(groups, case)
    job.replica = watched = Watched(job.replica)
    job.replica.body.capture = True
    trace: Trace = {}
    for step in range(len(case.batches)):
        result = train_step(job, step, Flags())
        note(trace, step, "output", named_outputs(job.replica.body.captured))
        note(trace, step, "loss", {"loss": torch.tensor(result.loss, dtype=torch.float64)})
        note(trace, step, "gradient", watched.gradients)
        note_state(trace, step, job.replica.model, job.optimizer)
    return trace


def _save_trace(groups: Any, case: Case, folder: str) -> None:
    save_file(trace_job(groups, case), Path(folder) / f"rank-{groups.world.rank}.safetensors")


def train_split(pool: Any, ranks: int, case: Case, folder: Path) -> list[Trace]:
    """Train the case on `ranks` ranks of the pool; what each of them saw."""
    pool.run(_save_trace, case, str(folder), ranks=ranks)
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(ranks)]


# ---- what a step leaves behind


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def named_outputs(outputs: Any) -> dict[str, Tensor]:
    if hasattr(outputs, "__dataclass_fields__"):
        outputs = [getattr(outputs, name) for name in outputs.__dataclass_fields__]
    return {str(number): leaf for number, leaf in enumerate(tree_leaves(outputs))}


def note(trace: Trace, step: int, kind: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        trace[f"{step}/{kind}/{name}"] = tensor.detach().clone().contiguous()


def note_state(trace: Trace, step: int, model: nn.Module, optimizer: Any) -> None:
    note(trace, step, "parameter", dict(model.named_parameters()))
    note(trace, step, "buffer", dict(model.named_buffers()))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        kept = {f"{names[parameter]}/{k}": v for k, v in state.items() if v is not None}
        note(trace, step, "optimizer", kept)


# ---- comparison


def of_kind(trace: Trace, step: int, kind: str) -> dict[str, Tensor]:
    prefix = f"{step}/{kind}/"
    return {
        key.removeprefix(prefix): tensor for key, tensor in trace.items() if key.startswith(prefix)
    }


def compare(expected: Trace, ranks: Sequence[Trace]) -> dict[str, float]:
    """The largest error of each kind over steps and ranks, by the contract's measure."""
    worst = dict.fromkeys(KINDS, 0.0)
    for step in range(1 + max(int(key.split("/")[0]) for key in expected)):
        whole = of_kind(expected, step, "output")
        joined = [of_kind(trace, step, "output") for trace in ranks]
        cut = {name: torch.cat([trace[name] for trace in joined]) for name in joined[0]}
        worst["output"] = max(worst["output"], _error(whole, cut))
        for kind in KINDS[1:]:
            for trace in ranks:
                error = _error(of_kind(expected, step, kind), of_kind(trace, step, kind))
                worst[kind] = max(worst[kind], error)
    return worst


def _error(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    assert expected.keys() == found.keys()
    sizes = [_size(t) for t in expected.values() if t.is_floating_point() and _size(t)]
    floor = 0.001 * statistics.median(sizes) if sizes else 0.0
    worst = 0.0
    for name, reference in expected.items():
        difference = _size(found[name].double() - reference.double())
        assert found[name].shape == reference.shape, name
        if reference.is_floating_point() and difference:
            difference /= max(_size(reference), floor) or float("nan")
        worst = max(worst, difference)
    return worst


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
