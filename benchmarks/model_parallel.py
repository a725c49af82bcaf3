"""Is a model that Shoal cuts by itself as fast as one that a user has cut by hand with torch?

    python benchmarks/model_parallel.py [--rounds 3] [--only tp2,pp2]

Both in the same two ranks of one thread, a training step of the one after a step of the other:
Shoal over what it would use here (shared memory), Shoal over gloo, and the program by hand over
gloo (`split_by_hand.py`): FSDP2, DTensor, torch's pipelining. First losses are compared.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import sidebyside
from sidebyside import table

STEPS, WARMUP = 7, 2
VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS, BATCH = 256, 128, 384, 6, 4, 16
IMAGE, IMAGE_BATCH = 32, 64


@dataclass(frozen=True)
class Case:
    """A strategy of Shoal's, the model, and what is like it by hand."""

    strategy: str
    model: str  # "gpt" or "resnet"
    by_hand: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.strategy}"


CASES = tuple(
    Case(*each)
    for each in (
        ("dp2/zero2", "gpt", "FSDP2, kept"),
        ("dp2/zero3", "gpt", "FSDP2"),
        ("tp2", "gpt", "DTensor"),
        ("pp2/gpipe/mb:8", "gpt", "pipelining, GPipe"),
        ("pp2/1f1b/mb:8", "gpt", "pipelining, 1F1B"),
        ("pp2/1f1b/mb:2", "gpt", "pipelining, 1F1B"),
        ("pp2/1f1b/mb:8", "resnet", "pipelining, 1F1B"),
    )
)


def measure(rounds: int, share: float = 1.0) -> str:
    """The section of the results page."""
    steps = max(1, round(STEPS * share))
    rows, cuts = [], []
    for case in CASES:
        found = run_case(case, rounds, steps)
        rows.append(row_of(case, found))
        cuts += [f"{case.name}: {found['cut']}"] if found["cut"] else []
    return "\n\n".join([_about(rounds, steps), table(HEAD, rows), *cuts])


HEAD = ["", "by hand, gloo: samples/s", "shoal: samples/s", "shoal, gloo: samples/s",
        "shoal ÷ by hand", "both over gloo", "losses differ by"]  # fmt: skip


def _about(rounds: int, steps: int) -> str:
    return (
        "## Cut by Shoal and cut by hand\n\n"
        f"GPT of {LAYERS} layers of {WIDTH}, {BATCH} × {LENGTH} tokens of {VOCABULARY}; ResNet-18 "
        f"of width 16 with group norm, {IMAGE_BATCH} images of {IMAGE}×{IMAGE}; float32, fused "
        f"AdamW, 2 ranks × 1 thread. Steps in turn in the same ranks, {rounds} × {steps} after "
        f"{WARMUP}. Goal: 0.97."
    )


def row_of(case: Case, found: dict[str, Any]) -> list[str]:
    times = found["seconds"]
    hand, ours, gloo = times["by hand"], times["shoal"], times["shoal, gloo"]
    rows = BATCH if case.model == "gpt" else IMAGE_BATCH
    rates = [sidebyside.spread([rows / s for s in each], 1) for each in (hand, ours, gloo)]
    ratios = [_ratio(hand, each) for each in (ours, gloo)]
    return [f"`{case.strategy}` {case.model}, {case.by_hand}", *rates, *ratios,
            f"{found['difference']:.0e}"]  # fmt: skip


def _ratio(hand: Sequence[float], ours: Sequence[float]) -> str:
    """Of each pair of steps: the median, and its quartiles."""
    ratios = [a / b for a, b in zip(hand, ours, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"**{middle:.2f}** ({low:.2f} to {high:.2f})"


def run_case(case: Case, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of each step of each program, the same on both ranks: the slower one's."""
    from shoal.launch import Ranks

    with Ranks(2, threads=1) as ranks:
        found = ranks.call(_on_rank, case, rounds * steps)
    ways = found[0]["seconds"]
    slowest = {
        way: [max(both) for both in zip(*(one["seconds"][way] for one in found), strict=True)]
        for way in ways
    }
    return {**found[0], "seconds": slowest}


# ---- on a rank


def build(model: str) -> Any:
    import torch

    from split_by_hand import Gpt

    torch.manual_seed(0)
    if model == "gpt":
        return Gpt(VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS)
    from shoal.models import ResNet, ResNetOptions

    shape = {"width": 16, "classes": 10, "in_channels": 1, "stem": "small", "norm": "group"}
    if model == "separable":
        return ResNet(ResNetOptions(50, conv="depthwise_separable", **shape))
    return ResNet(ResNetOptions(18, **shape))


def batches(model: str) -> list[tuple[Any, Any]]:
    import torch

    made = torch.Generator().manual_seed(0)
    if model == "gpt":
        ids = torch.randint(VOCABULARY, (4, BATCH, LENGTH + 1), generator=made)
        return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in ids]
    images = torch.randn(4, IMAGE_BATCH, 1, IMAGE, IMAGE, generator=made)
    return list(zip(images, torch.randint(10, (4, IMAGE_BATCH), generator=made), strict=True))


def over_gloo(groups: Any) -> Any:
    """The same groups with gloo between their ranks."""
    import torch.distributed as dist

    from shoal.comm import Group

    found = {}
    for each in fields(groups):
        group = getattr(groups, each.name)
        if isinstance(group, Group) and group.process_group is not None:
            found[each.name] = replace(group, process_group=dist.new_group(backend="gloo"))
    return replace(groups, **found, transport="gloo")


@dataclass(frozen=True)
class Rows:
    inputs: Any
    targets: Any
    rows: Any
    bad: tuple[()] = ()

    def to(self, device: Any, dtype: Any, *, channels_last: bool = False) -> "Rows":
        return self


@dataclass(frozen=True)
class Endless:
    """Batches in memory, over and over."""

    batches: list[tuple[Any, Any]]
    steps_per_epoch: int = 100_000
    fingerprint: str = "made"

    @property
    def examples(self) -> int:
        return self.steps_per_epoch * self.batch_examples(0)

    def batch_examples(self, step: int) -> int:
        return len(self.batches[0][0])

    def read(self, step: int, start: int, stop: int) -> Rows:
        import torch

        inputs, targets = self.batches[step % len(self.batches)]
        return Rows(inputs[start:stop], targets[start:stop], torch.arange(start, stop))

    def prefetch(self, step: int, start: int, stop: int) -> None:
        return

    def position(self, step: int) -> dict[str, int]:
        return {"epoch": 0, "position": step}


def objective(outputs: Any, targets: Any) -> Any:
    from torch.nn import functional

    total = functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum")
    return total, total.new_tensor(float(targets.numel()))


def job_of(groups: Any, strategy: str, model: str) -> Any:
    from shoal.job import Execution, Workload, assemble
    from shoal.strategy import Strategy
    from split_by_hand import adamw

    feed = Endless(batches(model))
    workload = Workload(
        build_model=lambda: build(model),
        objective=objective,
        build_optimizer=adamw,
        schedule=lambda _seen: 1.0,
        feed=feed,
        seed=0,
        total_steps=feed.steps_per_epoch,
    )
    return assemble(groups, workload, Execution.of(Strategy.parse(strategy)))


def shoals(groups: Any, strategy: str, model: str) -> tuple[Any, Callable[[int], float]]:
    from shoal.train.step import Flags, train_step

    job = job_of(groups, strategy, model)
    return job, lambda number: train_step(job, number, Flags()).loss


def by_hand(case: Case, group: Any, cut: int) -> Callable[[int], float | None]:
    import torch.distributed as dist

    import split_by_hand as hand
    from shoal.strategy import Strategy

    model, data, rank = build(case.model), batches(case.model), dist.get_rank(group)
    strategy = Strategy.parse(case.strategy)
    rows = slice(None)
    if strategy.pp > 1:
        layers = model.layers() if case.model == "gpt" else resnet_layers(model)
        method = strategy.schedule.method if strategy.schedule is not None else "1f1b"
        program = hand.pipelined(layers, cut, method, strategy.microbatches, group)
    elif strategy.tp > 1:
        program = hand.tensor_parallel(model, group)
    else:
        program = hand.fully_sharded(model, group, keep="zero2" in case.strategy)
        size = len(data[0][0]) // 2
        rows = slice(rank * size, (rank + 1) * size)

    def step(number: int) -> float | None:
        inputs, targets = data[number % len(data)]
        loss = program(inputs[rows], targets[rows])
        return None if loss is None else float(loss.detach())  # Shoal reads it at each step as well

    return step


def resnet_layers(model: Any) -> list[Any]:
    """The network as a list: stem, residual blocks, head."""
    from torch import nn

    children = list(model.named_children())
    stem = nn.Sequential(*(c for n, c in children if n in ("conv1", "bn1")), nn.ReLU())
    blocks = [block for n, stage in children if n.startswith("layer") for block in stage]
    return [stem, *blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc)]


def cut_of(job: Any) -> tuple[int, str]:
    """Before which layer of a list the cut lies, the nearest, and what that is."""
    traced = job.replica._parts.forms._known[True][0].traced
    node = traced.ops[job.replica.boundaries[0]]
    return node.meta.get("path", ""), f"{node.name} of {node.meta.get('path', '')}"


def nearest(path: str, model: str) -> int:
    parts = path.split(".")
    if model == "gpt":
        return 1 + int(parts[1]) if parts[0] == "blocks" else 1 + LAYERS
    return 1 + 2 * (int(parts[0].removeprefix("layer")) - 1) + int(parts[1])


def _on_rank(context: Any, case: Case, steps: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from shoal.comm import Groups
    from shoal.strategy import Strategy

    torch.set_num_threads(1)
    groups = Groups.form(
        context.rank, 2, context.store, context.generation, axes=Strategy.parse(case.strategy).axes
    )
    job, ours = shoals(groups, case.strategy, case.model)
    _, gloo = shoals(over_gloo(groups), case.strategy, case.model)
    cut, told = 0, None
    if case.strategy.startswith("pp"):
        path, told = cut_of(job)
        cut = nearest(path, case.model)
        told = f"Shoal cuts before {told}, by hand before layer {cut} of the list"
    plain = by_hand(case, dist.new_group(backend="gloo"), cut)
    ways: dict[str, Callable[[int], float | None]] = {
        "by hand": plain, "shoal": ours, "shoal, gloo": gloo
    }  # fmt: skip
    first = {name: way(0) for name, way in ways.items()}
    hands = groups.world.all_gather_json(first["by hand"])
    given = [each for each in hands if each is not None]
    difference = abs(sum(given) / len(given) - (first["shoal"] or 0.0))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gc.disable()
    for number in range(1, WARMUP + steps):
        for name, way in ways.items():
            dist.barrier(group=groups.world.process_group)
            began = time.perf_counter()
            way(number)
            if number >= WARMUP:
                seconds[name].append(time.perf_counter() - began)
        gc.collect()
    groups.close()
    return {"seconds": seconds, "difference": difference, "cut": told}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    rows = []
    for case in CASES:
        if given.only in case.name:
            found = run_case(case, given.rounds, STEPS)
            rows.append(row_of(case, found))
            print(found["cut"] or "", table(HEAD, rows[-1:]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    # Functions go to the ranks by their module's name.
    import model_parallel

    model_parallel.main()
