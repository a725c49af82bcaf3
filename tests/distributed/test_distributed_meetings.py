"""Replicas that agree less often, beside plain loops of the same algorithms, in float64.

Batches of 50, 50, 3 and 50 examples: on 3 replicas 17 + 17 + 16, on 4 one has none of the third.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from apart import (
    Plain,
    Weights,
    distance,
    easgd,
    gossip,
    local,
    replica_of,
    saved,
    train_apart,
    worst_of,
)
from onedevice import Case, adamw, batches_of, images, train_plainly
from torch import Tensor, nn

from shoal.models import ResNet, ResNetOptions, mlp

TOLERANCE = 1e-10
STEPS = 10


def small(**options: Any) -> Case:
    plain = {"build": lambda: mlp(256, 5, [8]), "batches": batches_of(*images(103), 50, STEPS)}
    return Case(**{**plain, **options})


def resnet() -> nn.Module:
    return ResNet(ResNetOptions(width=4, classes=5, in_channels=1, image_size=16))


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


# ---- local SGD


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_local_steps(pool: Any, tmp_path: Path, ranks: int) -> None:
    case = small()
    train_apart(pool, case, f"dp{ranks}/local:4", tmp_path)
    assert worst_of(Plain(case, ranks).run(local(4)), tmp_path) < TOLERANCE


def test_local_steps_with_statistics_over_groups(pool: Any, tmp_path: Path) -> None:
    """Three groups of 8 and one of 2: 16 + 10, and of 3 examples the second replica has none."""
    batches = batches_of(*images(29), 26, 4)
    case = small(build=resnet, batches=batches, normalize_over=8)
    train_apart(pool, case, "dp2/local:2", tmp_path)
    assert worst_of(Plain(case, 2).run(local(2)), tmp_path) < TOLERANCE


@pytest.mark.parametrize("state", ["own", "average"])
def test_local_steps_begin_later(pool: Any, tmp_path: Path, state: str) -> None:
    """Also where a replica has nothing of a step of those in which all agree."""
    case, plain = small(clip_norm=0.5), Plain(small(clip_norm=0.5), 4)
    plain.agree_until = 4
    train_apart(pool, case, f"dp4/local:3:after=4:state={state}", tmp_path)
    plain.run(local(3, after=4, state=state == "average"))
    assert worst_of(plain, tmp_path) < TOLERANCE


def one_device(case: Case) -> Weights:
    trace, last = train_plainly(case), len(case.batches) - 1
    start = f"{last}/parameter/"
    return {k.removeprefix(start): v for k, v in trace.items() if k.startswith(start)}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("dp3/local:1:state=average", {}),
        ("dp4/local:1:state=average", {}),
        ("dp3/local:1", {"optimizer": plain_sgd}),
        ("dp3/gossip:complete", {"optimizer": plain_sgd}),
        ("dp2/local:1", {"batches": batches_of(*images(48), 48, 4)}),  # equal shares
        ("dp4/local:9:after=10", {"clip_norm": 0.1, "optimizer": adamw}),
        ("dp2/diloco:1:lr=1:momentum=0", {"batches": batches_of(*images(48), 48, 4)}),
    ],
)
def test_meeting_at_each_step_is_sync(
    pool: Any, tmp_path: Path, text: str, options: dict[str, Any]
) -> None:
    case = small(**options)
    train_apart(pool, case, text, tmp_path)
    tensors, expected = saved(tmp_path, len(case.batches)), one_device(case)
    for replica in range(int(text[2])):
        assert distance(expected, replica_of(tensors, replica)) < TOLERANCE


def test_a_replica_that_never_has_an_example_takes_the_others_state(
    pool: Any, tmp_path: Path
) -> None:
    batches = batches_of(*images(16), 16, 4)
    case = small(batches=batches, normalize_over=8)
    train_apart(pool, case, "dp3/local:1:state=average", tmp_path)
    tensors = saved(tmp_path, 4)
    assert distance(one_device(case), replica_of(tensors, 2)) < TOLERANCE
    kept = [f"replica-{r}/1.weight/momentum_buffer" for r in (0, 2)]
    assert torch.equal(*(tensors[name] for name in kept))


def test_a_replica_whose_first_example_comes_late_goes_on_from_the_others_state(
    pool: Any, tmp_path: Path
) -> None:
    x, y = images(16)
    case = small(batches=[(x[:8], y[:8])] * 2 + [(x, y)] * 3, normalize_over=8, optimizer=adamw)
    train_apart(pool, case, "dp2/local:2:state=average", tmp_path, last=2)
    tensors = saved(tmp_path, 2)
    same_bits(*(replica_of(tensors, r) for r in range(2)))
    assert tensors["replica-1/1.weight/step"] == 2
    alone = Case(**{**vars(case), "batches": case.batches[:2]})
    assert distance(one_device(alone), replica_of(tensors, 1)) < TOLERANCE
    train_apart(pool, case, "dp2/local:2:state=average", tmp_path, first=2)


# ---- DiLoCo


class Outer:
    """DiLoCo as the papers have it; `send` is what becomes of a replica's part on its way."""

    def __init__(
        self,
        every: int,
        *,
        lr: float = 0.7,
        momentum: float = 0.9,
        parts: list[list[str]] | None = None,
        overlap: int = 0,
        send: Any = lambda tensor, _name, _replica: tensor,
    ) -> None:
        self.every, self.lr, self.momentum, self.send = every, lr, momentum, send
        self.parts, self.overlap = parts, overlap
        self.outer: Weights = {}
        self.buffer: Weights = {}
        self.on_their_way: dict[int, Weights] = {}

    def __call__(self, plain: Plain, step: int) -> None:
        if not self.outer:
            torch.manual_seed(plain.case.seed)
            first = plain.case.build().to(plain.case.dtype)
            self.outer = {n: p.detach().clone() for n, p in first.named_parameters()}
            self.buffer = {n: torch.zeros_like(t) for n, t in self.outer.items()}
        parts = self.parts or [list(self.outer)]
        last = step + 1 == plain.total
        for number, names in enumerate(parts):
            offset = number * self.every // len(parts)
            due = (step + 1 - offset) % self.every == 0
            taken = (step + 1 - self.overlap - offset) % self.every == 0
            if number in self.on_their_way and (last or taken):
                self._take(plain, self.on_their_way.pop(number), 0.5)
            if due or last:
                into = (step - offset) % self.every
                shares = plain.shares(max(0, step - into), step)
                self.on_their_way[number] = self._gradient(plain, names, shares)
                if last or not self.overlap:
                    self._take(plain, self.on_their_way.pop(number), 0.0)

    def _gradient(self, plain: Plain, names: list[str], shares: list[float]) -> Weights:
        def part(replica: int, name: str) -> Tensor:
            own = plain.weights(replica)[name]
            return self.send(shares[replica] * (self.outer[name] - own), name, replica)

        return {n: sum(part(r, n) for r in range(plain.replicas)) for n in names}

    def _take(self, plain: Plain, gradient: Weights, mixing: float) -> None:
        for name, change in gradient.items():
            self.buffer[name] = self.momentum * self.buffer[name] + change
            self.outer[name] -= self.lr * (change + self.momentum * self.buffer[name])
            for replica in range(plain.replicas):
                own = plain.weights(replica)[name]
                own.copy_(mixing * own + (1 - mixing) * self.outer[name])


HALVES = [["1.weight"], ["1.bias", "3.weight", "3.bias"]]


@pytest.mark.parametrize(
    ("text", "outer"),
    [
        ("dp3/diloco:4", Outer(4)),
        ("dp4/diloco:3:lr=0.5:momentum=0.5", Outer(3, lr=0.5, momentum=0.5)),
        ("dp2/diloco:4:overlap=1", Outer(4, overlap=3)),
        ("dp2/diloco:4:fragments=2", Outer(4, parts=HALVES)),
        ("dp3/diloco:4:fragments=2:overlap=1", Outer(4, parts=HALVES, overlap=3)),
        ("dp2/diloco:30", Outer(30)),
    ],
)
def test_outer_steps(pool: Any, tmp_path: Path, text: str, outer: Outer) -> None:
    case = small(optimizer=adamw)
    said = train_apart(pool, case, text, tmp_path)
    plain = Plain(case, int(text[2])).run(outer)
    assert worst_of(plain, tmp_path) < TOLERANCE
    assert ("meet once" in "".join(said["warnings"])) == ("30" in text)


def test_outer_rate_1_without_momentum_is_local(pool: Any, tmp_path: Path) -> None:
    case = small()
    train_apart(pool, case, "dp3/diloco:4:lr=1:momentum=0", tmp_path)
    assert worst_of(Plain(case, 3).run(local(4)), tmp_path) < TOLERANCE


@pytest.mark.parametrize(
    "text", ["local:4", "diloco:4:lr=1:momentum=0", "gossip:ring", "easgd:2:alpha=0"]
)
def test_one_replica_is_single(pool: Any, tmp_path: Path, text: str) -> None:
    case = small()
    train_apart(pool, case, f"single/{text}", tmp_path)
    found = replica_of(saved(tmp_path, STEPS), 0)
    assert distance(one_device(case), found) < TOLERANCE


# ---- elastic averaging


@pytest.mark.parametrize(("ranks", "every", "alpha"), [(2, 3, 0.45), (4, 2, 0.1)])
def test_elastic_averaging(pool: Any, tmp_path: Path, ranks: int, every: int, alpha: float) -> None:
    case, meet = small(), easgd(every, alpha)
    train_apart(pool, case, f"dp{ranks}/easgd:{every}:alpha={alpha}", tmp_path)
    assert worst_of(Plain(case, ranks).run(meet), tmp_path) < TOLERANCE
    found = saved(tmp_path, STEPS)
    centre = {n: found[f"replica-1/{n}/sync.center"] for n in meet.centre}
    assert distance(meet.centre, centre) < TOLERANCE


def test_without_a_spring_replicas_are_solo(pool: Any, tmp_path: Path) -> None:
    """On the same examples: those of each replica's share."""
    case = small()
    train_apart(pool, case, "dp3/easgd:2:alpha=0", tmp_path)
    plain = Plain(case, 3).run()
    assert worst_of(plain, tmp_path) < TOLERANCE
    assert distance(plain.weights(0), plain.weights(1)) > 1e-3


def test_the_centre_is_what_is_evaluated_and_gone_on_from(pool: Any, tmp_path: Path) -> None:
    case = small()
    said = train_apart(pool, case, "dp2/easgd:2:alpha=0", tmp_path, last=4, watch=True)
    assert said["losses"] == [said["losses"][0]] * 4  # the first weights, with nothing added
    train_apart(pool, case, "dp3/easgd:2:alpha=0", tmp_path, first=4, last=5)
    start = Plain(case, 1).weights(0)
    centre = {n: saved(tmp_path, 5)[f"replica-0/{n}/sync.center"] for n in start}
    assert distance(start, centre) == 0


# ---- gossip


@pytest.mark.parametrize(
    ("graph", "ranks"), [("ring", 2), ("ring", 4), ("exponential", 3), ("exponential", 4)]
)
def test_neighbours(pool: Any, tmp_path: Path, graph: str, ranks: int) -> None:
    case = small()
    said = train_apart(pool, case, f"dp{ranks}/gossip:{graph}", tmp_path)
    assert worst_of(Plain(case, ranks).run(gossip(graph)), tmp_path) < TOLERANCE
    numbers = sum(p.numel() for p in case.build().parameters())
    sent = 2 if graph == "ring" and ranks > 2 else 1
    assert said["bytes"]["send"]["parameter"] == 8 * numbers * sent * (STEPS - 1)
    assert said["bytes"]["all_reduce"]["parameter"] == 8 * numbers  # at the end


# ---- within replicas: shard groups, stages, tensor parallelism


@pytest.mark.parametrize(
    ("text", "meet"),
    [
        ("dp4/zero3:2/local:4", local(4)),
        ("dp4/zero3:2/local:4:after=3", local(4, after=3)),
        ("pp2.dp2/diloco:4", Outer(4)),
        ("dp2.tp2/local:2", local(2)),
        ("dp2.tp2/easgd:2:alpha=0.3", easgd(2, 0.3)),
        ("dp4/zero3:2/gossip:ring", gossip("ring")),
        ("pp2.dp2/local:3:state=average", local(3, state=True)),
    ],
)
def test_replicas_of_several_ranks(pool: Any, tmp_path: Path, text: str, meet: Any) -> None:
    case = small()
    train_apart(pool, case, text, tmp_path)
    plain = Plain(case, 2)
    plain.agree_until = 3 if "after=3" in text else 0
    assert worst_of(plain.run(meet), tmp_path) < TOLERANCE


def test_evaluation_leaves_sharded_replicas_as_they_were(pool: Any, tmp_path: Path) -> None:
    """What an evaluation has gathered is the mean, and must not be trained on."""
    case = small()
    quiet, watched = tmp_path / "quiet", tmp_path / "watched"
    train_apart(pool, case, "dp4/zero3:2/local:4", quiet, last=6)
    train_apart(pool, case, "dp4/zero3:2/local:4", watched, last=6, watch=True)
    same_bits(saved(quiet, 6), saved(watched, 6))


# ---- resuming


def same_bits(expected: Weights, found: Weights) -> None:
    assert expected.keys() == found.keys()
    differ = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not differ, differ


@pytest.mark.parametrize(
    "text",
    [
        "dp3/local:4:after=2:state=average",
        "dp2/local:4/compress:topk=10",
        "dp2/local:4/compress:powersgd=2",
        "dp3/diloco:4",
        "dp3/diloco:4:fragments=2:overlap=1:wire=int8",
        "dp2/diloco:3/compress:topk=5",
        "dp3/easgd:2",
        "dp2/easgd:2/compress:powersgd=1",
        "dp3/gossip:exponential",
        "dp3/compress:topk=5",
        "dp3/compress:powersgd=2",
        "dp2/zero1/compress:powersgd=2",
        "dp2.tp2/compress:powersgd=1",
        "dp4/zero3:2/local:4/compress:powersgd=1",
    ],
)
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
    pool: Any, tmp_path: Path, text: str
) -> None:
    case = small(optimizer=adamw, dtype=torch.float32)
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    train_apart(pool, case, text, through)
    train_apart(pool, case, text, stopped, last=5)
    train_apart(pool, case, text, stopped, first=5)
    same_bits(saved(through, STEPS), saved(stopped, STEPS))


MOVES = ("dp2/gossip:ring", "dp3/diloco:2:overlap=1", "dp2/compress:topk=5", "dp2/local:3", "dp2")


def test_a_run_goes_on_under_another_agreement_from_the_mean(pool: Any, tmp_path: Path) -> None:
    """And on another number of replicas; what is kept for one way means nothing to the next."""
    case, run, copy = small(), tmp_path / "run", tmp_path / "copy"
    names = list(Plain(case, 1).weights(0))
    for step, text in enumerate(MOVES):
        train_apart(pool, case, text, run, first=step, last=step + 1)
    for step, text in enumerate(MOVES[1:], 1):
        before = saved(run, step)
        replicas = {name.split("/")[0] for name in before if name.startswith("replica-")}
        of_each = [replica_of(before, r) for r in range(len(replicas))] or [before]
        mean = {n: sum(each[n] for each in of_each) / len(of_each) for n in names}
        train_apart(pool, case, text, run, first=step, last=step, into=copy)
        after = saved(copy, step)
        starts = {n.removesuffix(names[0]) for n in after if n.endswith(names[0])}
        assert len(starts) == (int(text[2]) if "local" in text or "diloco" in text else 1)
        for start in starts:
            assert distance(mean, {n: after[start + n] for n in names}) < 1e-15


@pytest.mark.parametrize("text", ["dp3/diloco:2:wire=int8", "dp3/compress:topk=5"])
def test_what_is_gathered_has_the_same_bits_over_gloo(pool: Any, tmp_path: Path, text: str) -> None:
    case = small(batches=batches_of(*images(48), 48, 4))
    for transport in ("shared_memory", "gloo"):
        train_apart(pool, case, text, tmp_path / transport, transport=transport)
    same_bits(saved(tmp_path / "shared_memory", 4), saved(tmp_path / "gloo", 4))
