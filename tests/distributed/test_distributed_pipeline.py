"""A model in stages trains as on one device, whatever it sends past its stages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from onedevice import Case, _normalize_in_parts, batches_of, images, summed_cross_entropy
from staged import How, built, compare_staged, rows_of
from torch import Tensor, nn
from torch.nn import functional

from shoal.errors import Refused

LIMIT = 1e-10


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 17), nn.Tanh(), nn.Linear(17, 11), nn.GELU(),
        nn.Linear(11, 9), nn.ReLU(), nn.Linear(9, 5),
    )  # fmt: skip


def rows(examples: int, features: int = 6) -> Any:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(examples, features, generator=generator)
    return inputs, torch.randint(0, 5, (examples,), generator=generator)


MLP = Case(build=mlp, batches=batches_of(*rows(43), 20, 4), clip_norm=0.1)


def check(errors: dict[str, float]) -> None:
    assert max(errors.values()) <= LIMIT, errors


@pytest.mark.parametrize(
    ("method", "chunks"),
    [("gpipe", None), ("1f1b", None), ("interleaved", 2), ("zb", 1), ("zb", 2), ("zbv", None)],
)
@pytest.mark.parametrize("microbatches", [1, 7])
def test_every_schedule(
    pool: Any, tmp_path: Path, method: str, chunks: int | None, microbatches: int
) -> None:
    # 20, 20, 3 rows: the last step has fewer rows than microbatches.
    how = How(method, microbatches, chunks)
    check(compare_staged(pool, (("pp", 2),), MLP, tmp_path, how))


class UNet(nn.Module):
    """Long skips: what the first layers make is needed by the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.deep = nn.Conv2d(6, 8, 3, padding=1)
        self.up2 = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.mix2 = nn.Conv2d(12, 4, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.mix1, self.head = nn.Conv2d(8, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        first = functional.relu_(self.down1(images))
        second = functional.relu(self.down2(functional.max_pool2d(first, 2)))
        deep = functional.relu(self.deep(functional.avg_pool2d(second, 2)))
        second = self.mix2(torch.cat((self.up2(deep), second), 1)).relu_()
        first = self.mix1(torch.cat((self.up1(second), first), 1))
        return self.head(first.mean((2, 3)))


class Residual(nn.Module):
    """Batch norm in residual units, one of which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.units = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
            for _ in range(4)
        )
        self.last, self.head = nn.BatchNorm2d(4, momentum=0.3), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for unit in self.units:
            features = features + unit(features)
        return self.head(self.last(self.last(features)).mean((2, 3)))


class Tied(nn.Module):
    """A small GPT: the embedding is the head as well, and a mask is a buffer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(11, 8), nn.Parameter(torch.randn(6, 8) * 0.1)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embedding(tokens) + self.places
        for block in self.blocks:
            states = block(states)
        return self.head(self.norm(states)).flatten(0, 1)


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.drop = nn.LayerNorm(8), nn.LayerNorm(8), nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("mask", torch.tril(torch.ones(6, 6)).bool())

    def forward(self, states: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(states)).chunk(3, -1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~self.mask, -1e9).softmax(-1)
        states = states + self.drop(self.out(scores @ v))
        return states + self.drop(self.narrow(functional.gelu(self.wide(self.norm2(states)))))


class Forking(nn.Module):
    """A value without a gradient, one without use for its gradient, a frozen layer, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.fourth, self.unused = nn.Linear(6, 5), nn.Linear(3, 3)
        self.second.requires_grad_(False)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        early = torch.tanh(self.first(rows))
        order = rows.argsort(-1)
        middle = torch.tanh(self.second(early))
        late = torch.tanh(self.third(middle)) + early.detach() + order
        return self.fourth(late), early * 2


class Clipped(nn.Module):
    """A unit of a sequential model: what it does depends on the values, so no trace has it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(dropout)

    def forward(self, rows: Tensor) -> Tensor:
        rows = rows + self.drop(self.norm(self.linear(rows)))
        rows = functional.dropout(rows, self.drop.p, self.training)
        return rows.clamp(-2, 2) if bool((rows.abs() > 2).any()) else rows


def clipped(dropout: float = 0.0) -> nn.Sequential:
    units = nn.Sequential(*(Clipped(dropout) for _ in range(3)))
    return nn.Sequential(
        nn.Linear(6, 6), nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(inplace=True)), units,
        nn.Dropout(dropout), nn.Linear(6, 5),
    )  # fmt: skip


class MindsOne(nn.Module):
    """What it computes for a batch of one example is something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, rows: Tensor) -> Tensor:
        states = torch.tanh(self.first(rows))
        if rows.shape[0] == 1:
            states = (states * 2).squeeze().unsqueeze(0)
        return self.second(states)


def of_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets.flatten())


def summed_over_tokens(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return summed_cross_entropy(outputs, targets.flatten())


def of_first(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs[0], targets)


def summed_of_first(outputs: tuple[Tensor, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    return summed_cross_entropy(outputs[0], targets)


def texts(dropout: float = 0.0) -> Case:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 11, (43, 7), generator=generator)
    batches = batches_of(tokens[:, :-1].clone(), tokens[:, 1:].clone(), 20, 4)
    return Case(
        build=lambda: Tied(dropout),
        batches=batches,
        loss=of_tokens,
        objective=summed_over_tokens,
        clip_norm=0.2,
    )


PICTURES = batches_of(*images(43, side=8), 20, 4)
UNETS = Case(build=UNet, batches=PICTURES, clip_norm=0.1)
RESIDUAL = Case(build=Residual, batches=PICTURES, normalize_over=3)
FORKS = Case(build=Forking, batches=MLP.batches, loss=of_first, objective=summed_of_first)
BLOCKS = Case(build=clipped, batches=MLP.batches, normalize_over=3, clip_norm=0.1)
RANDOM_BLOCKS = replace(BLOCKS, build=lambda: clipped(0.3))
PP2, PP3, PP4 = (("pp", 2),), (("pp", 3),), (("pp", 4),)
PP2_DP2, DP2_PP2 = (("pp", 2), ("dp", 2)), (("dp", 2), ("pp", 2))


@pytest.mark.parametrize(
    ("case", "axes", "how"),
    [
        (UNETS, PP4, How("1f1b", 5)),
        (UNETS, PP3, How("zb", 4)),
        (RESIDUAL, PP4, How("gpipe", 3)),
        (RESIDUAL, PP3, How("1f1b", 4)),
        (RESIDUAL, PP2, How("zbv", 5)),
        (RESIDUAL, PP2_DP2, How("1f1b", 3)),
        (texts(), PP4, How("1f1b", 8)),
        (texts(), PP2, How("interleaved", 8, 2)),  # shapes told both ways at once
        (texts(), PP3, How("interleaved", 6, 2)),
        (texts(), PP2, How("zb", 3, 2)),
        (texts(), PP2_DP2, How("1f1b", 4)),
        (texts(), DP2_PP2, How("zbv", 3)),
        (MLP, PP2_DP2, How("interleaved", 4, 2)),
        (MLP, PP2_DP2, How("zb", 30)),
        (FORKS, PP4, How("1f1b", 4)),
        (FORKS, PP2, How("zb", 4)),
        (RESIDUAL, (("dp", 2),), How("1f1b", 3)),
        (RESIDUAL, PP2, How("1f1b", 4, recompute=True)),
        (texts(0.2), PP2, How("1f1b", 4, random=True)),
        (texts(0.2), PP2_DP2, How("zb", 3, recompute=True, random=True)),
        (replace(BLOCKS, normalize_over=None), PP2, How("1f1b", 1)),
        (BLOCKS, PP2, How("1f1b", 3)),
        (BLOCKS, (("pp", 2), ("tp", 2)), How("zb", 3)),
        (RANDOM_BLOCKS, PP3, How("1f1b", 3, random=True)),
        (RANDOM_BLOCKS, PP2, How("interleaved", 2, 2, random=True)),
        (RANDOM_BLOCKS, PP2_DP2, How("zbv", 3, random=True)),
        (RANDOM_BLOCKS, PP2, How("1f1b", 4, recompute=True, random=True)),
    ],
)
def test_equal_to_one_device(pool: Any, tmp_path: Path, case: Case, axes: Any, how: How) -> None:
    check(compare_staged(pool, axes, case, tmp_path, how))


def test_tensor_parallel_stages(pool: Any, tmp_path: Path) -> None:
    axes = (("pp", 2), ("tp", 2))
    check(compare_staged(pool, axes, texts(0.2), tmp_path, How("zb", 3, random=True)))


@pytest.mark.parametrize("axes", [PP2, (("tp", 2),)])
def test_a_batch_of_one_example_is_not_a_microbatch_of_one(
    pool: Any, tmp_path: Path, axes: Any
) -> None:
    inputs, targets = MLP.batches[0]
    sizes = (3, 1, 3, 1)
    case = Case(build=MindsOne, batches=[(inputs[:n], targets[:n]) for n in sizes])
    check(compare_staged(pool, axes, case, tmp_path, How("1f1b", 3)))


def test_a_replica_without_rows_takes_part(pool: Any, tmp_path: Path) -> None:
    few = Case(build=Residual, batches=batches_of(*images(2, side=8), 2, 2), normalize_over=2)
    check(compare_staged(pool, PP2_DP2, few, tmp_path, How("1f1b", 3)))


# ---- evaluation


def _evaluated(groups: Any, case: Case, how: How) -> float | None:
    """The largest difference from one device's outputs in evaluation, where there are any."""
    from shoal.job.sharing import share_of

    replica = built(groups, case, how)
    whole = rows_of(case, 0, 0, 20)
    share = share_of(20, groups.data.size, case.normalize_over or 1)
    batch = rows_of(case, 0, *share.reads(groups.data.rank))
    for step in range(2):  # running statistics are no longer those of the beginning
        replica.forward_backward(batch, step, share, _nobody(groups))
    outputs = replica.forward(batch, 0, share)
    torch.manual_seed(case.seed)
    plain = case.build().to(case.dtype).train()
    if case.normalize_over is not None:
        _normalize_in_parts(plain, case.normalize_over)
    for _ in range(2):
        plain(whole.inputs)
    for layer in plain.modules():
        layer.__dict__.pop("forward", None)
    expected = plain.eval()(whole.inputs).detach()
    if outputs is None:
        return None
    each = len(expected) // 20
    start, stop = share.shares[groups.data.rank]
    return float((outputs - expected[start * each : stop * each]).abs().max())


def _nobody(groups: Any) -> Any:
    from shoal.sync import build_agreement

    return build_agreement(groups).share


@pytest.mark.parametrize(
    ("case", "axes", "how", "last"),
    [
        (RESIDUAL, PP3, How("1f1b", 4), {2}),
        (RESIDUAL, PP2, How("zbv", 3), {0}),
        (texts(0.3), PP2_DP2, How("interleaved", 3, 2), {2, 3}),
        (UNETS, PP4, How("gpipe", 6), {3}),
        (BLOCKS, PP3, How("1f1b", 3), {2}),
    ],
)
def test_evaluation_runs_in_stages(
    pool: Any, case: Case, axes: Any, how: How, last: set[int]
) -> None:
    ranks = 1
    for _, degree in axes:
        ranks *= degree
    found = pool.run(_evaluated, case, how, ranks=ranks, axes=axes)
    assert {rank for rank, error in enumerate(found) if error is not None} == last
    assert max(error for error in found if error is not None) <= LIMIT


# ---- bytes, bits


def _sent(groups: Any, case: Case, how: How) -> list[Any]:
    """(bytes by purpose of one step, gradient of the tied weight, its norm, what is held)."""
    from shoal.job.sharing import share_of

    replica = built(groups, case, how)
    share = share_of(20, groups.data.size)
    batch = rows_of(case, 0, *share.reads(groups.data.rank))
    counter, bytes_before = groups.world.counter, {}
    for step in range(2):
        bytes_before = dict(counter.as_dict().get("send", {}))
        totals = replica.forward_backward(batch, step, share, _nobody(groups))
        replica.rescale(float(totals[1]))
    sent = counter.as_dict().get("send", {})
    bytes_of = {purpose: sent[purpose] - bytes_before.get(purpose, 0) for purpose in sent}
    held = dict(replica.model.named_parameters(remove_duplicate=False))
    tied = held.get("head.weight")
    gradient = None if tied is None else tied.grad.flatten().tolist()
    norm = float(replica.gradient_norm())
    return [bytes_of, gradient, norm, sorted(held)]


def test_bytes_are_those_of_the_live_values_and_tied_gradients_agree(pool: Any) -> None:
    found = pool.run(_sent, texts(), How("1f1b", 4), ranks=2, axes=PP2)
    states = 20 * 6 * 8 * 8  # 20 examples of 6 tokens, 8 numbers of 8 bytes: one value is live
    tied = 11 * 8 * 8
    for bytes_of, *_ in found:
        assert bytes_of.pop("start-up", 0) == 0
        assert bytes_of == {"activation": states, "gradient": tied, "agreement": 8}
    (_, first, norm, held), (_, second, other_norm, others) = found
    assert first == second
    assert norm == other_norm
    assert set(held) & set(others) == {"embedding.weight", "head.weight"}


def test_statistics_over_the_batch_are_refused_in_microbatches(pool: Any) -> None:
    case = Case(build=Residual, batches=PICTURES)
    with pytest.raises(Refused, match="batch norm over the whole batch in a pipeline of 3"):
        pool.run(_sent, case, How("1f1b", 3), ranks=2, axes=PP2)
    case = replace(BLOCKS, normalize_over=None)
    with pytest.raises(Refused, match="batch norm over the whole batch in a pipeline of 3"):
        pool.run(_sent, case, How("1f1b", 3), ranks=2, axes=PP2)


def test_one_microbatch_may_normalise_over_the_batch(pool: Any, tmp_path: Path) -> None:
    case = Case(build=Residual, batches=PICTURES)
    check(compare_staged(pool, PP2_DP2, case, tmp_path, How("1f1b", 1)))
