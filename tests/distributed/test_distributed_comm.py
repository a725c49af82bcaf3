"""Collectives between real ranks: what they give, what they count, what they say of a lost peer."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from onedevice import Case, assembled, batches_of, images
from torch import nn

from shoal.comm import Groups
from shoal.errors import PeerLost, RankLost
from shoal.models import mlp
from shoal.train.step import Flags, train_step


def _collectives(groups: Groups) -> dict[str, Any]:
    group, rank = groups.world, groups.world.rank
    return {
        "sum": group.all_reduce(torch.full((3,), rank + 1.0), "metric").tolist(),
        "future": group.all_reduce_later(torch.full((2,), rank + 1.0), "gradient").wait().tolist(),
        "rows": groups.statistics.all_gather(torch.tensor([[rank, 7]]), "activation").tolist(),
        "from 1": group.broadcast(torch.tensor([rank] * 4), 1, "parameter").tolist(),
        "bytes": group.counter.as_dict(),
    }


def test_collectives_and_their_bytes(pool: Any) -> None:
    for rank, found in enumerate(pool.run(_collectives, ranks=3)):
        assert found["sum"] == [6.0] * 3
        assert found["future"] == [6.0] * 2
        assert found["rows"] == [[[0, 7]], [[1, 7]], [[2, 7]]]
        assert found["from 1"] == [1] * 4
        sent = {"all_reduce": {"metric": 12, "gradient": 8}, "all_gather": {"activation": 16}}
        # The source of a broadcast sends; the others only receive.
        assert found["bytes"] == sent | ({"broadcast": {"parameter": 32}} if rank == 1 else {})


VALUES = [
    {"name": "Größe ≥ 3, 日本語, 🐟", "list": [1, 2.5, None, True]},
    "",
    [list(range(3000)), {"nested": {"deep": [[]]}}],
    None,
]


def _gather(groups: Groups, values: list[Any]) -> list[Any]:
    return groups.world.all_gather_json(values[groups.world.rank])


@pytest.mark.parametrize("ranks", [2, 4])
def test_json_of_any_length_from_every_rank(pool: Any, ranks: int) -> None:
    assert pool.run(_gather, VALUES, ranks=ranks) == [VALUES[:ranks]] * ranks


def perceptron() -> Case:
    return Case(
        build=lambda: mlp(16, 5, [8]),
        batches=batches_of(*images(20, side=4), 10, 3),
        dtype=torch.float32,
    )


def _bytes_of_training(groups: Groups, case: Case) -> dict[str, Any]:
    job = assembled(groups, case)
    for step in range(len(case.batches)):
        train_step(job, step, Flags())
    return groups.world.counter.as_dict()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bytes_of_a_step_in_closed_form(pool: Any, ranks: int) -> None:
    parameters, tensors, steps = 16 * 8 + 8 + 8 * 5 + 5, 4, 3
    told = 2 + len(Flags().vector())  # Σ loss, Σ count, and what ranks decide together
    expected = {
        "gradient": 4 * parameters * steps,
        "metric": 8 * told * steps,
        "agreement": 4 * tensors * steps,  # which of them the step has used
    }
    for found in pool.run(_bytes_of_training, perceptron(), ranks=ranks):
        assert found == ({"all_reduce": expected} if ranks > 1 else {})


def _bytes_of_batch_norm(groups: Groups, normalize_over: int | None) -> dict[str, Any]:
    case = Case(
        build=lambda: nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Flatten()),
        batches=batches_of(*images(12, side=4), 12, 1),
        normalize_over=normalize_over,
        dtype=torch.float32,
    )
    return _bytes_of_training(groups, case)


def test_bytes_of_batch_statistics(pool: Any) -> None:
    channels = 3
    for found in pool.run(_bytes_of_batch_norm, None, ranks=2):
        assert found["all_gather"] == {"activation": 4 * (2 * channels + 1)}
        assert found["all_reduce"]["activation"] == 4 * 2 * channels
    for found in pool.run(_bytes_of_batch_norm, 3, ranks=2):  # groups lie whole on a rank
        assert "all_gather" not in found
        assert found["all_reduce"]["activation"] == 4 * (4 + 4 * 2 * channels)


# ---- a peer that is gone


class Deadly(nn.Linear):
    """A layer in whose second backward pass rank 1 is killed."""

    rank = 0
    calls = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        output = super().forward(input)
        if self.rank == 1 and self.calls == 2:
            output.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return output


def _meet_death(context: Any, case: Case, diary: Path) -> None:
    Deadly.rank = context.rank
    groups = Groups.form(context.rank, 2, context.store, context.generation, timeout_s=60)
    job = assembled(groups, case)
    train_step(job, 0, Flags())
    group, other = groups.world, torch.zeros(2)

    def said(action: Any) -> str:
        try:
            action()
        except PeerLost as error:
            return f"PeerLost at step {error.step}"
        return "nothing"

    actions = {
        "train": lambda: train_step(job, 1, Flags()),
        "all_reduce": lambda: group.all_reduce(other, "metric"),
        "all_gather": lambda: group.all_gather(other, "metric"),
        "broadcast": lambda: group.broadcast(other, 1, "metric"),
        "json": lambda: group.all_gather_json(1),
    }
    # Messages to the supervisor end with the first rank lost, hence a file.
    diary.write_text(json.dumps({name: said(action) for name, action in actions.items()}))


def test_a_lost_peer_is_named_and_the_pool_starts_again(pool: Any, tmp_path: Path) -> None:
    case = Case(
        build=lambda: nn.Sequential(nn.Flatten(), Deadly(16, 8), nn.Linear(8, 5)),
        batches=batches_of(*images(20, side=4), 10, 2),
    )
    diary = tmp_path / "rank-0.json"
    with pytest.raises(RankLost, match="killed by SIGKILL") as lost:
        pool.call(_meet_death, case, diary, ranks=2)
    assert lost.value.rank == 1
    heard = json.loads(diary.read_text())
    assert heard.pop("train") == "PeerLost at step 1"
    assert set(heard.values()) == {"PeerLost at step None"}
    assert len(heard) == 4
    assert pool.process_ids == ()
    assert pool.run(_gather, VALUES, ranks=2) == [VALUES[:2]] * 2
    assert len(pool.process_ids) == 4
