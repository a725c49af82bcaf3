"""Replicas with weights of their own: their groups, their data, their checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from shoal.errors import Refused


def groups_of(context: Any, axes: Any, shards: Any) -> Any:
    from shoal.comm import Groups

    groups = Groups.form(
        context.rank, context.world_size, context.store, context.generation,
        axes=axes, shards=shards, apart=True, timeout_s=60,
    )  # fmt: skip
    inner = groups.inner
    assert inner is not None
    assert groups.within is inner
    found = {
        "between": list(groups.between.ranks),
        **{name: list(getattr(inner, name).ranks) for name in ("world", "data", "model")},
        "transport": [inner.transport == groups.transport],
    }
    groups.close()
    return found


@pytest.mark.parametrize(
    ("axes", "shards", "between", "world", "data"),
    [
        ((("dp", 4),), None, [0, 1, 2, 3], [0], [0]),
        ((("dp", 4),), 2, [0, 2], [0, 1], [0, 1]),
        ((("pp", 2), ("dp", 2)), None, [0, 1], [0, 2], [0]),
        ((("dp", 2), ("tp", 2)), None, [0, 2], [0, 1], [0]),
    ],
)
def test_the_groups_within_a_replica_and_between_them(
    pool: Any, axes: Any, shards: Any, between: Any, world: Any, data: Any
) -> None:
    first = pool.call(groups_of, axes, shards)[0]
    assert (first["between"], first["world"], first["data"]) == (between, world, data)
    assert first["transport"] == [True]


# ---- solo


class Net(nn.Module):
    """Dropout, and batch norm: what a member sees of both is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(12, 10),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)


def summed(outputs: torch.Tensor, targets: torch.Tensor) -> Any:
    total = functional.cross_entropy(outputs, targets, reduction="sum")
    return total, total.new_tensor(float(len(targets)))


def workload(steps: int = 5) -> Any:
    from shoal.data import open_feed
    from shoal.job import Workload
    from shoal.recipe import SourceSpec

    feed, held = (
        open_feed(SourceSpec.model_validate(f"digits:{split}"), batch_size=50, seed=0,
                  shuffle=split == "train")
        for split in ("train", "test")
    )  # fmt: skip
    return Workload(
        build_model=Net,
        objective=summed,
        build_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        schedule=lambda _seen: 1.0,
        feed=feed,
        seed=0,
        total_steps=steps,
        evaluation=held,
    )


def team_of(groups: Any, strategy: str, state: Any = None, steps: int = 5) -> Any:
    from shoal.job import Execution
    from shoal.strategy import Strategy
    from shoal.train.team import Team

    execution = Execution.of(Strategy.parse(strategy), torch.float64)
    return Team.of(groups, workload(steps), execution, state, lambda _number, _model: None)


def train_team(team: Any, first: int = 0, stop: int = 5) -> list[float]:
    from shoal.train.step import Flags
    from shoal.train.times import StepTimes

    return [team.step(step, Flags(), StepTimes()).loss for step in range(first, stop)]


def digests(team: Any) -> dict[str, dict[str, str]]:
    from shoal.train.agree_start import model_digests

    return {
        str(number): model_digests(job.replica.holding)
        for number, job in zip(team.numbers, team.jobs, strict=True)
    }


def on_ranks(context: Any, strategy: str, folder: str = "") -> Any:
    from shoal.checkpoint import Checkpoint, save
    from shoal.comm import Groups
    from shoal.strategy import Strategy
    from shoal.train.commit import GroupMeeting

    torch.set_num_threads(1)
    parsed = Strategy.parse(strategy)
    groups = Groups.form(
        context.rank, context.world_size, context.store, context.generation,
        axes=parsed.axes, shards=parsed.shards, apart=True, timeout_s=60,
    )  # fmt: skip
    team = team_of(groups, strategy)
    if not folder:
        losses = train_team(team)
        metrics = team.evaluate()
        found = {"losses": losses, "weights": digests(team), "members": list(metrics.members)}
    else:
        train_team(team, stop=3)
        saved = save(Path(folder), team.snapshot(3, "f", strategy, {}), GroupMeeting(groups.world))
        again = team_of(groups, strategy, Checkpoint.open(saved.path))
        assert [job.next_step for job in again.jobs] == [3] * len(again.jobs)
        train_team(again, first=3)
        found = {"weights": digests(again)}
    groups.close()
    return found


def member_alone(number: int, of: int, *, full: bool = False) -> Any:
    """A member's whole training on one device, from its own feed."""
    from shoal.comm import Groups
    from shoal.data import Member, MemberFeed

    team = team_of(Groups.alone(), "single")
    job = team.job
    job.feed = MemberFeed(job.workload.feed, Member(number, of, full))
    train_team(team)
    return digests(team)["0"]


@pytest.mark.parametrize(
    ("strategy", "ranks", "members"),
    [("dp2/solo", 2, 2), ("dp2/solo:members=5", 2, 5), ("dp3/solo:full", 3, 3)],
)
def test_each_member_is_as_if_it_were_alone(
    pool: Any, strategy: str, ranks: int, members: int
) -> None:
    found = pool.call(on_ranks, strategy, ranks=ranks)
    weights = {number: own for rank in found for number, own in rank["weights"].items()}
    assert sorted(weights) == [str(number) for number in range(members)]
    assert len({own["body.1.weight"] for own in weights.values()}) == members
    for number in range(members):
        alone = member_alone(number, members, full="full" in strategy)
        assert weights[str(number)] == alone
    assert found[0]["losses"] == found[1]["losses"]
    assert len(found[0]["members"]) == members
    assert found[0]["members"] == found[1]["members"]


@pytest.mark.parametrize("strategy", ["dp2/solo:members=3", "dp2/local:2", "dp4/zero3:2/solo"])
def test_a_resumed_run_has_the_same_bits(pool: Any, tmp_path: Path, strategy: str) -> None:
    ranks = 4 if "dp4" in strategy else 2
    through = pool.call(on_ranks, strategy, ranks=ranks)
    again = pool.call(on_ranks, strategy, str(tmp_path), ranks=ranks)
    assert [rank["weights"] for rank in again] == [rank["weights"] for rank in through]


def resume_otherwise(context: Any, folder: str, strategy: str) -> Any:
    from shoal.checkpoint import Checkpoint
    from shoal.comm import Groups

    groups = Groups.form(
        context.rank, context.world_size, context.store, context.generation,
        axes=(("dp", 2),), apart=True, timeout_s=60,
    )  # fmt: skip
    try:
        team = team_of(groups, strategy, Checkpoint.open(Path(folder)))
        return digests(team)
    except Refused as error:
        return error.message
    finally:
        groups.close()


@pytest.mark.parametrize(
    ("saved", "resumed", "said"),
    [
        ("dp2/solo:members=3", "dp2/solo", "holds 3 members, and solo has 2"),
        ("dp2/solo:members=3", "dp2/local:4", "3 models that were trained apart"),
        ("dp2/local:2", "dp2/solo:members=3", "holds 2 members, and solo:members=3 has 3"),
    ],
)
def test_members_that_never_meet_are_not_made_of_others(
    pool: Any, tmp_path: Path, saved: str, resumed: str, said: str
) -> None:
    pool.call(on_ranks, saved, str(tmp_path), ranks=2)
    folder = next(tmp_path.glob("step-*"))
    for answer in pool.call(resume_otherwise, str(folder), resumed, ranks=2):
        assert said in answer


def test_weights_of_replicas_that_meet_are_averaged_for_others(pool: Any, tmp_path: Path) -> None:
    from shoal.checkpoint import Checkpoint, replicas
    from shoal.comm import Groups

    pool.call(on_ranks, "dp2/local:2", str(tmp_path), ranks=2)
    state = Checkpoint.open(next(tmp_path.glob("step-*")))
    one = team_of(Groups.alone(), "single", state)
    mean = replicas.Mean.of(state)
    for name, tensor in one.job.replica.holding.state_dict().items():
        assert torch.equal(tensor, mean.read(name))
    assert one.job.next_step == 3


@pytest.mark.parametrize("resumed", ["dp2/diloco:2", "dp2/easgd:2", "dp2/local:2/compress:topk=10"])
def test_replicas_begin_equal_under_another_agreement(
    pool: Any, tmp_path: Path, resumed: str
) -> None:
    pool.call(on_ranks, "dp2/local:2", str(tmp_path), ranks=2)
    folder = next(tmp_path.glob("step-*"))
    own = pool.call(resume_otherwise, str(folder), "dp2/local:2", ranks=2)
    assert own[0]["0"] != own[1]["1"]  # saved between two meetings
    found = pool.call(resume_otherwise, str(folder), resumed, ranks=2)
    assert found[0]["0"] == found[1]["1"]
