"""ZeRO 1, 2 and 3 and microbatches beside one device; their bytes; checkpoints across them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from onedevice import Case, adamw, assembled, batches_of, sgd
from torch import Tensor, nn
from torch.nn import functional

from shoal.checkpoint import Checkpoint
from shoal.errors import Refused, RunError
from shoal.recipe.component import read
from shoal.strategy import Strategy
from shoal.verify.on_rank import Functions, VerifyTask, verify_on_rank

TOLERANCE = 1e-10
ADAMW = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.5}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


# ---- models


class Unit(nn.Module):
    """A block with a norm, dropout, and rows that few numbers of ranks divide."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.2)
        self.widen, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.narrow(torch.tanh(self.widen(self.norm(x)))))


@dataclass
class Answer:
    logits: Tensor
    size: Tensor


class Language(nn.Module):
    """Tied weights, dropout, a frozen layer, a 0-d parameter, a layer that is never used, and one
    that is used for some examples only. Its answer is a dataclass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.Sequential(Unit(8, 13), Unit(8, 10), Unit(8, 3))
        self.blocks[1].widen.requires_grad_(False)
        self.never, self.rare = nn.Linear(3, 3), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Answer:
        x = self.blocks(self.embed(tokens)) * self.scale
        chosen = tokens[:, 0] == 10
        if bool(chosen.any()):
            x = x + chosen[:, None, None] * self.rare(x)
        return Answer(self.head(x), x.square().mean((1, 2)))


def tokens(step: int) -> Any:
    made = torch.Generator().manual_seed(step)
    inputs = torch.randint(10, (9, 6), generator=made)
    inputs[8, 0] = 10  # the last rank alone uses the rare layer
    labels = torch.randint(11, (9, 6), generator=made)
    labels[torch.arange(6) >= torch.randint(1, 7, (9, 1), generator=made)] = -100
    return inputs, labels


def language_loss(answer: Answer, labels: Tensor) -> Any:
    logits = answer.logits.flatten(0, 1)
    total = functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    return total, (labels != -100).sum()


class Images(nn.Module):
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
    return torch.randn(9, 3, 6, 6, generator=made) + 1.5, torch.randint(4, (9,), generator=made)


def language(**optimizer: Any) -> Functions:
    chosen = read("optimizer", optimizer or ADAMW)
    return Functions(Language, tokens, language_loss, None, chosen)


def conv(**optimizer: Any) -> Functions:
    return Functions(
        Images, pictures, functional.cross_entropy, None, read("optimizer", optimizer or SGD)
    )


def verified(pool: Any, work: Any, strategy: str) -> dict[str, Any]:
    ranks = Strategy.parse(strategy).world_size
    findings: dict[str, Any] = pool.call(
        verify_on_rank, VerifyTask(work, strategy, 3), ranks=ranks
    )[0]
    return findings


def holds(findings: dict[str, Any]) -> bool:
    found = [error for error in findings["max_error"].values() if error is not None]
    return findings["first_difference"] is None and max(found) <= TOLERANCE


# ---- beside one device


@pytest.mark.parametrize(
    "strategy",
    [
        "dp2/zero1",
        "dp3/zero1",
        "dp4/zero1",
        "dp2/zero2",
        "dp3/zero2",
        "dp2/zero3",
        "dp3/zero3",
        "dp4/zero3",
        "dp4/zero3:2",
        "dp3/zero3+recompute",
        "dp2/zero1/offload",
        "single/mb:4",
        "dp2/mb:2",
        "dp4/mb:3+recompute",
        "dp3/zero3/mb:2",
        "dp2/zero1/mb:3",
    ],
)
def test_a_language_model_holds(pool: Any, strategy: str) -> None:
    clipped = {**ADAMW, "clip_norm": 0.1, "no_decay": ["norm", "bias"]}
    findings = verified(pool, language(**clipped), strategy)
    assert holds(findings), findings


@pytest.mark.parametrize("strategy", ["dp3/zero1", "dp4/zero2", "dp3/zero3", "dp2/zero3+recompute"])
def test_batch_norm_holds(pool: Any, strategy: str) -> None:
    assert holds(verified(pool, conv(), strategy))


GROUPED = {
    "name": "small",
    "batch_size": 14,
    "steps": 5,
    "model": {"name": "resnet", "depth": 18, "width": 4, "stem": "small"},
    "data": {"train": "digits:train"},
    "objective": "cross_entropy",
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "normalize_over": 5,
}


@pytest.mark.parametrize("strategy", ["single/mb:2", "dp2/mb:2", "dp3/zero3/mb:2"])
def test_microbatches_along_statistics_groups_hold(pool: Any, strategy: str) -> None:
    """Running statistics too: one step for each group of the batch, in their order."""
    findings = verified(pool, GROUPED, strategy)
    assert holds(findings), findings
    assert findings["max_error"]["buffer"] is not None


def _refused(groups: Any, case: Case) -> str:
    try:
        assembled(groups, case)
    except Refused as error:
        return str(error)
    return ""


def test_microbatches_of_a_whole_batchs_statistics_are_refused(pool: Any) -> None:
    case = Case(build=Images, batches=[pictures(0)], execution={"microbatches": 2})
    said = pool.run(_refused, case, ranks=2)
    assert all("mb:2: stages.0.1 is a batch norm over the whole batch" in each for each in said)


class Choosy(nn.Module):
    """Ranks run different blocks, of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[int(x[0, 0] > 0)](x)


def _chooses(groups: Any, case: Case) -> str:
    from shoal.train.step import Flags, train_step

    job = assembled(groups, case)
    try:
        train_step(job, 0, Flags())
    except (RunError, Refused) as error:
        return str(error)
    return ""


def test_ranks_that_run_other_blocks_are_told_and_never_train_on(pool: Any) -> None:
    inputs = torch.ones(4, 4)
    inputs[2:, 0] = -1.0
    case = Case(
        build=Choosy, batches=[(inputs, torch.arange(4))], execution={"zero": 3}, optimizer=sgd
    )
    said = pool.run(_chooses, case, ranks=2)
    assert all("every rank to run the same blocks in the same order" in each for each in said)


class Reaching(nn.Module):
    """Uses a block's weight outside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](x) @ self.blocks[0][0].weight


def test_a_parameter_that_is_not_there_is_refused_by_name(pool: Any) -> None:
    batches = [(torch.ones(4, 4), torch.arange(4))]
    case = Case(build=Reaching, batches=batches, execution={"zero": 3}, optimizer=sgd)
    for said in pool.run(_chooses, case, ranks=2):
        assert "uses a block's parameter outside that block's own forward" in said
        assert "self.blocks[0][0].weight" in said


class Odd(torch.optim.Optimizer):
    """A user's own, of which nobody knows whether it treats every element by itself."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return


def _warnings(groups: Any, case: Case) -> list[str]:
    return list(assembled(groups, case).warnings)


def test_optimizers_that_see_whole_tensors(pool: Any) -> None:
    plain = {"batches": [pictures(0)], "execution": {"zero": 1}, "build": Images}
    assert pool.run(_warnings, Case(**plain, optimizer=adamw), ranks=2) == [[], []]
    own = Case(**plain, optimizer=lambda model: Odd(model.parameters()))
    assert "optimizer Odd: ranks keep pieces" in pool.run(_warnings, own, ranks=2)[0][0]
    whole = Case(**plain, optimizer=lambda model: torch.optim.Adafactor(model.parameters()))
    assert "Adafactor computes with whole parameters" in pool.run(_refused, whole, ranks=2)[0]


# ---- beside plain replicas, in other numerics


def _difference(groups: Any, case: Case) -> list[Any]:
    """The largest difference between the pieces of ZeRO and those of plain replicas; the types."""
    from shoal.train.step import Flags, train_step

    jobs = []
    for zero in (0, case.execution["zero"]):
        execution = {**case.execution, "zero": zero}
        jobs.append(assembled(groups, Case(**{**vars(case), "execution": execution})))
        for step in range(2):
            train_step(jobs[-1], step, Flags())
    plain = dict(jobs[0].replica.holding.named_parameters())
    layout, worst, kinds = jobs[1].replica.layout, 0.0, set()
    for name, piece in jobs[1].replica.holding.named_parameters():
        difference = layout[name].take(plain[name].detach()) - piece.detach()
        worst = max(worst, float(difference.abs().max()) if piece.numel() else 0.0)
        kinds |= {str(t.dtype) for t in (piece, *jobs[1].optimizer.state[piece].values())}
    return [worst, sorted(kinds)]


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("how", ["bf16", "channels_last"])
def test_other_numerics_are_those_of_plain_replicas(pool: Any, zero: int, how: str) -> None:
    """Parameters, sums and state in float32 under bf16."""
    case = Case(
        build=Images,
        batches=[pictures(step) for step in range(2)],
        dtype=torch.float32,
        execution={"zero": zero, how: True},
    )
    for worst, kinds in pool.run(_difference, case, ranks=2):
        assert worst <= (1e-3 if how == "bf16" else 1e-5)
        assert kinds == ["torch.float32"]


# ---- bytes


def stack() -> nn.Module:
    """Every dimension divides by 2 and by 4."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)),
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)),
        nn.Linear(8, 4),
    )


def rows_case(zero: int, microbatches: int = 1, build: Callable[[], nn.Module] = stack) -> Case:
    made = torch.Generator().manual_seed(1)
    batches = batches_of(torch.randn(16, 8, generator=made), torch.arange(16) % 4, 8, 2)
    return Case(
        build=build,
        batches=batches,
        optimizer=adamw,
        dtype=torch.float32,
        execution={"zero": zero, "microbatches": microbatches},
    )


def _bytes_of_a_step(groups: Any, case: Case) -> dict[str, Any]:
    from shoal.train.step import Flags, train_step

    job = assembled(groups, case)
    before = groups.world.counter.as_dict()
    train_step(job, 0, Flags())
    after = groups.world.counter.as_dict()
    return {
        f"{collective}/{purpose}": count - before.get(collective, {}).get(purpose, 0)
        for collective, purposes in after.items()
        for purpose, count in purposes.items()
        if count - before.get(collective, {}).get(purpose, 0)
    }


@pytest.mark.parametrize(("zero", "parts"), [(0, 1), (0, 2), (1, 1), (2, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_of_a_step_are_those_of_the_closed_form(
    pool: Any, zero: int, parts: int, ranks: int
) -> None:
    model = stack()
    numbers, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    root = sum(p.numel() for p in model[2].parameters())
    whole, rest = 4 * numbers, 4 * root
    expected = {"all_reduce/metric": 8 * (2 + 4)}  # loss, count, and what ranks decide together
    if zero <= 1:
        expected |= {"all_reduce/gradient": whole, "all_reduce/agreement": 4 * tensors}
    if zero == 1:
        expected |= {"all_gather/parameter": whole // ranks}
    if zero >= 2:
        # Each microbatch; in zero3 blocks once more, for the backward pass.
        gathers = whole if zero == 2 else 2 * whole - rest
        expected |= {
            "all_gather/parameter": parts * gathers // ranks,
            "reduce_scatter/gradient": parts * whole,
            "all_reduce/agreement": 8 * (2 + tensors),
        }
    for found in pool.run(_bytes_of_a_step, rows_case(zero, parts), ranks=ranks):
        assert found == expected


def _kept(groups: Any, case: Case) -> dict[str, Any]:
    from shoal.parallel import persistent
    from shoal.train.step import Flags, train_step

    job = assembled(groups, case)
    found = {}

    def look(*_: object) -> None:
        replica = job.replica
        kept = persistent(replica.model, replica.holding, job.optimizer, replica.layout)
        found["gradients"] = kept.gradients

    job.optimizer.register_step_post_hook(look)
    train_step(job, 0, Flags())
    replica = job.replica
    kept = persistent(replica.model, replica.holding, job.optimizer, replica.layout)
    return {
        "parameters": kept.parameters,
        "optimizer": kept.optimizer,
        "replicated": dict(kept.replicated),
        "padding": kept.padding,
        **found,
    }


class Scaled(nn.Module):
    """One 0-d parameter beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.scale = stack(), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_persistent_bytes_are_the_ranks_share_and_what_is_listed(
    pool: Any, zero: int, ranks: int
) -> None:
    whole = 4 * sum(p.numel() for p in stack().parameters())
    names = [name for name, _ in Scaled().named_parameters()]
    for found in pool.run(_kept, rows_case(zero, build=Scaled), ranks=ranks):
        listed = found["replicated"]
        assert found["padding"] == 0
        counters = {name for name in listed if name.endswith("/step")}
        assert counters == {f"optimizer: {name}/step" for name in names}
        scalar = sum(v for k, v in listed.items() if k.startswith("optimizer: scale/exp"))
        steps = sum(listed[name] for name in counters)
        assert scalar == 8
        assert found["optimizer"] == 2 * whole // ranks + scalar + steps
        if zero == 1:
            assert found["parameters"] == whole + 4
            assert sum(listed[name] for name in names) == whole + 4
        else:
            assert found["parameters"] == whole // ranks + listed["scale"]
            assert found["gradients"] == whole // ranks + 4
            assert set(names) & set(listed) == {"scale"}


# ---- checkpoints


class Tied(nn.Module):
    """Tied weights of 11 rows, and a layer of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.Sequential(Unit(8, 13), Unit(8, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens)).mean(1))


def tied(zero: int, optimizer: Callable[[nn.Module], Any]) -> Case:
    made = torch.Generator().manual_seed(2)
    batches = [
        (torch.randint(11, (9, 6), generator=made), torch.randint(11, (9,), generator=made))
        for _ in range(4)
    ]
    return Case(Tied, batches, optimizer=optimizer, execution={"zero": zero})


def _train(groups: Any, case: Case, folder: str, start: int, stop: int) -> bool:
    """Steps `start` to `stop`, from the checkpoint of `start`, to one of `stop`.

    Whether what was read is what the checkpoint holds, bit for bit.
    """
    from shoal.train.commit import Committer
    from shoal.train.step import Flags, train_step
    from shoal.train.stop import Convergence
    from shoal.train.team import Team

    checkpoints = Path(folder)
    found = checkpoints / f"step-{start:09d}"
    state = Checkpoint.open(found) if start else None
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
    assert {name for name in state.names if "/" in name} == {name for name in held if "/" in name}
    return all(
        torch.equal(tensor, job.part_of(name, tensor).take(state.read(name)))
        for name, tensor in held.items()
    )


MOVES = [
    ((1, 0), (3, 3)),
    ((3, 3), (1, 0)),
    ((2, 0), (4, 1)),
    ((4, 1), (2, 3)),
    ((3, 1), (2, 0)),
    ((4, 3), (3, 2)),
    ((2, 2), (4, 3)),
]


@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["momentum", "adamw"])
@pytest.mark.parametrize(("saved", "resumed"), MOVES)
def test_checkpoints_move_between_layouts(
    pool: Any, saved: Any, resumed: Any, optimizer: Any, tmp_path: Path
) -> None:
    """Bit-equal after the move; and the weights at the end are those of one device."""
    (ranks, zero), (other_ranks, other_zero) = saved, resumed
    moved, plain = tmp_path / "moved", tmp_path / "plain"
    pool.run(_train, tied(zero, optimizer), str(moved), 0, 2, ranks=ranks)
    assert all(pool.run(_train, tied(other_zero, optimizer), str(moved), 2, 4, ranks=other_ranks))
    pool.run(_train, tied(0, optimizer), str(plain), 0, 4, ranks=1)
    ours, expected = (Checkpoint.open(at / "step-000000004") for at in (moved, plain))
    assert set(ours.names) == set(expected.names)
    assert ours.manifest.aliases == expected.manifest.aliases
    for name in expected.names:
        torch.testing.assert_close(ours.read(name), expected.read(name), rtol=1e-10, atol=1e-12)
