"""ZeRO 2 and 3 of staged replicas beside one device; their bytes; checkpoints across layouts."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from onedevice import Case, adamw, assembled, sgd
from torch import Tensor, nn
from torch.nn import functional

from shoal.checkpoint import Checkpoint
from shoal.parallel.pipeline.microbatches import cut_rows, run_by, run_together
from shoal.recipe.component import read
from shoal.strategy import Strategy
from shoal.verify.on_rank import Functions, VerifyTask, verify_on_rank

TOLERANCE = 1e-10
ADAMW = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.5, "clip_norm": 0.1}


class Block(nn.Module):
    """Attention of 4 heads and a perceptron of 18 units: neither is divided by every split."""

    def __init__(self, width: int, inner: int, drop: float) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(drop)
        # A bias of keys has no gradient but rounding errors, which AdamW makes large.
        self.mix, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.mix(self.norm(x)).view(rows, length, 3, 4, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, length, width))
        return x + self.drop(self.narrow(torch.tanh(self.widen(x))))


class Language(nn.Module):
    """Tied weights on the first stage and the last, a skip over all blocks, frozen weights, a 0-d
    parameter, and a layer that is never used.
    """

    def __init__(self, inner: int = 18, drop: float = 0.2) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.Sequential(*(Block(8, inner, drop) for _ in range(4)))
        self.blocks[1].widen.requires_grad_(False)
        self.never = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.embed(tokens)
        return self.head(self.blocks(first) * self.scale + first)


def tokens(step: int, rows: int = 9) -> Any:
    made = torch.Generator().manual_seed(step)
    inputs = torch.randint(11, (rows, 6), generator=made)
    labels = torch.randint(11, (rows, 6), generator=made)
    labels[torch.arange(6) >= torch.randint(1, 7, (rows, 1), generator=made)] = -100
    return inputs, labels


def language_loss(logits: Tensor, labels: Tensor) -> Any:
    flat = logits.flatten(0, 1)
    total = functional.cross_entropy(flat, labels.flatten(), ignore_index=-100, reduction="sum")
    return total, (labels != -100).sum()


def verified(pool: Any, work: Any, strategy: str) -> dict[str, Any]:
    ranks = Strategy.parse(strategy).world_size
    findings: dict[str, Any] = pool.call(
        verify_on_rank, VerifyTask(work, strategy, 3), ranks=ranks
    )[0]
    return findings


def holds(findings: dict[str, Any]) -> bool:
    found = [error for error in findings["max_error"].values() if error is not None]
    return findings["first_difference"] is None and max(found) <= TOLERANCE


STRATEGIES = [
    "pp2.dp2/zero2",
    "pp2.dp2/zero3",
    "pp2.dp2/zero2/mb:5",  # shares of 5 and 4 rows: the last microbatch of one stands in
    "pp2.dp2/zero3/mb:5",
    "pp2.dp2/zero3/mb:1",
    "pp2.dp2/zero3+recompute",
    "pp2.dp2/zero2+recompute",
    "pp2.dp2/interleaved:2/zero3",
    "pp2.dp2/zb/zero3",
    "pp2.dp2/zbv/zero2",
    "pp2.dp2/zbv/zero3",
    "dp2.tp2/zero2",
    "dp2.tp2/zero3",
    "dp2.tp2/zero3/mb:3+recompute",
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_language_model_holds(pool: Any, strategy: str) -> None:
    work = Functions(Language, tokens, language_loss, None, read("optimizer", ADAMW))
    findings = verified(pool, work, strategy)
    assert holds(findings), findings


class Images(nn.Module):
    """Convolutions and batch norm over groups of two examples."""

    def __init__(self) -> None:
        super().__init__()

        def unit(i: int, o: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())

        self.stages = nn.Sequential(unit(3, 5), unit(5, 6), unit(6, 6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean((2, 3)))


def pictures(step: int) -> Any:
    made = torch.Generator().manual_seed(step)
    # Shares of 6 and 4 rows: three statistics groups, and two with one that stands in.
    return torch.randn(10, 3, 6, 6, generator=made) + 1.5, torch.randint(4, (10,), generator=made)


@pytest.mark.parametrize(
    "strategy", ["pp2.dp2/zero3/mb:3", "pp2.dp2/zero2/mb:3", "pp2.dp2/zb/zero3/mb:3"]
)
def test_batch_norm_in_groups_holds(pool: Any, strategy: str) -> None:
    chosen = read("optimizer", {"name": "sgd", "lr": 0.1, "momentum": 0.9})
    work = Functions(Images, pictures, functional.cross_entropy, None, chosen, 2)
    findings = verified(pool, work, strategy)
    assert holds(findings), findings
    assert findings["max_error"]["buffer"] is not None


def _losses(groups: Any, case: Case) -> list[float]:
    from shoal.train.step import Flags, train_step

    job = assembled(groups, case)
    return [train_step(job, step, Flags()).loss for step in range(len(case.batches))]


@pytest.mark.parametrize("axes", [(("pp", 2), ("dp", 2)), (("dp", 2), ("tp", 2))])
def test_products_in_bf16_are_those_of_whole_weights(pool: Any, axes: Any) -> None:
    def case(zero: int) -> Case:
        how = {"zero": zero, "staged": True, "microbatches": 2, "bf16": True, "recompute": True}
        return Case(
            Language, [tokens(s) for s in range(3)], objective=language_loss, optimizer=sgd,
            dtype=torch.float32, execution=how,
        )  # fmt: skip

    expected = pool.run(_losses, case(0), ranks=4, axes=axes)[0]
    for losses in pool.run(_losses, case(3), ranks=4, axes=axes):
        assert losses == pytest.approx(expected, rel=1e-5)


def test_replicas_with_fewer_rows_run_their_first_again() -> None:
    pieces, runs, idle = run_together(cut_rows(2, 4), [run_by(cut_rows(n, 4)) for n in (3, 2)])
    assert pieces == [slice(0, 1), slice(1, 2), slice(0, 1), slice(2, 2)]
    assert runs == (True, True, True, False)
    assert idle == {2}


# ---- shard groups


def _copies(groups: Any, case: Case, zero: int) -> list[dict[str, Any]]:
    """Gradients of two steps of a stage without neighbours, over two shard groups of two."""
    from shoal.job.sharing import share_of
    from shoal.parallel import Numerics
    from shoal.parallel.pipeline import Staging, build_staged_replica
    from shoal.sync import Alone

    torch.manual_seed(case.seed)
    model = case.build().to(case.dtype).train()
    inputs, _ = case.batches[0]
    staging = Staging(microbatches=2)
    replica = build_staged_replica(
        model, case.objective, Numerics(case.dtype), groups, staging, inputs, seed=0, zero=zero
    )
    found = []
    for step in range(2):
        share = share_of(9, groups.data.size, 1)
        start, stop = share.reads(groups.data.rank)
        inputs, targets = case.batches[step]
        rows = SimpleNamespace(
            inputs=inputs[start:stop], targets=targets[start:stop], rows=torch.arange(start, stop)
        )
        totals = replica.forward_backward(rows, step, share, Alone(groups.world).share)
        replica.rescale(float(totals[1]))
        norm = float(replica.gradient_norm())
        whole = {}
        for name, piece in replica.holding.named_parameters():
            if piece.grad is not None:
                whole[name] = piece.grad.flatten().tolist()
                piece.grad = None
        found.append({"norm": norm, "gradients": whole})
        replica.updated()
    return found


def test_shard_groups_hold_copies(pool: Any) -> None:
    """zero3:2 on four replicas: rows within a group, sums over all."""

    def together(context: Any, case: Case, shards: int | None, zero: int) -> Any:
        from shoal.comm import Groups

        groups = Groups.form(
            context.rank, context.world_size, context.store, context.generation,
            axes=(("dp", context.world_size),), shards=shards, timeout_s=60,
        )  # fmt: skip
        found = _copies(groups, case, zero)
        groups.close()
        return found

    case = Case(lambda: Language(drop=0.0), [tokens(0), tokens(1)], objective=language_loss)
    (expected,) = pool.call(together, case, None, 0, ranks=1)
    ranks = pool.call(together, case, 2, 3, ranks=4)
    for step in range(2):
        assert ranks[0][step]["gradients"] == ranks[2][step]["gradients"]
        assert ranks[1][step]["gradients"] == ranks[3][step]["gradients"]
        for name, whole in expected[step]["gradients"].items():
            parts = [ranks[r][step]["gradients"].get(name, []) for r in (0, 1)]
            joined = parts[0] if name == "scale" else parts[0] + parts[1]
            torch.testing.assert_close(torch.tensor(joined), torch.tensor(whole))
        for found in ranks:
            assert found[step]["norm"] == pytest.approx(expected[step]["norm"], rel=1e-12)


# ---- bytes


class Even(nn.Module):
    """Every dimension divides by 4, and parts of tensor parallelism by 2 once more."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(Unit(), Unit()) for _ in range(2)))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) * self.scale


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.tanh(self.widen(x)))


def even(zero: int) -> Case:
    made = torch.Generator().manual_seed(1)
    batch = torch.randn(8, 8, generator=made), torch.arange(8) % 8
    return Case(
        Even,
        [batch, batch],
        optimizer=adamw,
        dtype=torch.float32,
        execution={"zero": zero, "staged": True, "microbatches": 2},
    )


def _kept(groups: Any, case: Case) -> dict[str, Any]:
    from shoal.parallel import persistent
    from shoal.train.step import Flags, train_step

    job = assembled(groups, case)
    replica, found = job.replica, {}

    def kept() -> Any:
        return persistent(replica.model, replica.holding, job.optimizer, replica.layout)

    def look(*_: object) -> None:
        found["gradients"] = kept().gradients

    job.optimizer.register_step_post_hook(look)
    train_step(job, 0, Flags())
    now = kept()
    return {
        "parameters": now.parameters,
        "optimizer": now.optimizer,
        "replicated": dict(now.replicated),
        "padding": now.padding,
        "names": [name for name, _ in replica.holding.named_parameters()],
        **found,
    }


@pytest.mark.parametrize("zero", [2, 3])
def test_persistent_bytes_of_a_pipeline(pool: Any, zero: int) -> None:
    """A stage has half of the blocks, and a rank half of their rows."""
    unit = 4 * sum(p.numel() for p in Unit().parameters())
    for found in pool.run(_kept, even(zero), ranks=4, axes=(("pp", 2), ("dp", 2))):
        scale = 4 * ("scale" in found["names"])
        assert found["parameters"] == 2 * unit // 2 + scale
        assert found["gradients"] == found["parameters"]
        counters = 4 * len(found["names"])
        assert found["optimizer"] == 2 * found["parameters"] + counters
        assert found["padding"] == 0
        whole = {name for name in found["replicated"] if not name.endswith("/step")}
        scales = {"scale", "optimizer: scale/exp_avg", "optimizer: scale/exp_avg_sq"}
        assert whole == (scales if scale else set())


@pytest.mark.parametrize("zero", [2, 3])
def test_persistent_bytes_of_tensor_parallelism(pool: Any, zero: int) -> None:
    """Of each unit's two weights and the wide bias a quarter, of the narrow bias half."""
    quarter, half = 4 * (8 * 16 + 16 + 16 * 8) // 4, 4 * 8 // 2
    for found in pool.run(_kept, even(zero), ranks=4, axes=(("dp", 2), ("tp", 2))):
        assert found["parameters"] == 4 * (quarter + half) + 4
        assert found["gradients"] == found["parameters"]
        assert found["optimizer"] == 2 * found["parameters"] + 4 * len(found["names"])
        assert found["padding"] == 0


# ---- checkpoints


def moving(zero: int, optimizer: Callable[[nn.Module], Any], **execution: Any) -> Case:
    how = {"zero": zero, "staged": True, **execution}
    batches = [tokens(step) for step in range(4)]
    return Case(Language, batches, objective=language_loss, optimizer=optimizer, execution=how)


def _train(groups: Any, case: Case, folder: str, start: int, stop: int) -> bool:
    """Steps `start` to `stop`, from the checkpoint of `start`, to one of `stop`.

    Whether what was read is what the checkpoint holds, bit for bit.
    """
    from shoal.train.commit import Committer
    from shoal.train.step import Flags, train_step
    from shoal.train.stop import Convergence
    from shoal.train.team import Team

    checkpoints = Path(folder)
    state = Checkpoint.open(checkpoints / f"step-{start:09d}") if start else None
    job = assembled(groups, case, state)
    same = state is None or _is(job, state)
    for step in range(start, stop):
        train_step(job, step, Flags())
    recipe = SimpleNamespace(fingerprint="case", checkpoint=SimpleNamespace(keep=9))
    run = SimpleNamespace(checkpoints_path=checkpoints)
    committer = Committer(Team((job,)), recipe, run, "any", lambda _message: None)
    committer.commit(stop, Convergence("loss"), {})
    committer.wait()
    return same


def _is(job: Any, state: Checkpoint) -> bool:
    from shoal.checkpoint.optimizer_state import flatten

    held, _ = flatten(job.optimizer, job.parameter_names)
    held |= {name: p.detach() for name, p in job.replica.holding.named_parameters()}
    return all(
        torch.equal(tensor, job.part_of(name, tensor).take(state.read(name)))
        for name, tensor in held.items()
    )


TENSOR = ((("dp", 2), ("tp", 2)), 3, {})
PIPELINE = ((("pp", 2), ("dp", 2)), 3, {"microbatches": 2})
MOVES = [
    (TENSOR, ((("pp", 2),), 0, {"microbatches": 2})),
    (TENSOR, ((("dp", 1),), 0, {"staged": False})),
    (((("pp", 2),), 0, {}), TENSOR),
    (((("dp", 1),), 0, {"staged": False}), TENSOR),
    (TENSOR, PIPELINE),
    (PIPELINE, ((("dp", 3),), 3, {"staged": False})),
    (((("dp", 2),), 2, {"staged": False}), ((("pp", 2), ("dp", 2)), 2, {})),
]


@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["momentum", "adamw"])
@pytest.mark.parametrize(("saved", "resumed"), MOVES)
def test_checkpoints_move_between_layouts(
    pool: Any, saved: Any, resumed: Any, optimizer: Any, tmp_path: Path
) -> None:
    """Bit-equal after the move; and the weights at the end are those of one device."""
    moved, plain = tmp_path / "moved", tmp_path / "plain"
    for (axes, zero, how), start, stop in ((saved, 0, 2), (resumed, 2, 4)):
        ranks = 1
        for _, degree in axes:
            ranks *= degree
        case = moving(zero, optimizer, **how)
        assert all(pool.run(_train, case, str(moved), start, stop, ranks=ranks, axes=axes))
    pool.run(_train, moving(0, optimizer, staged=False), str(plain), 0, 4, ranks=1)
    ours, expected = (Checkpoint.open(at / "step-000000004") for at in (moved, plain))
    assert set(ours.names) == set(expected.names)
    assert ours.manifest.aliases == expected.manifest.aliases
    for name in expected.names:
        torch.testing.assert_close(ours.read(name), expected.read(name), rtol=1e-10, atol=1e-12)
