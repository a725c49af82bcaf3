"""What replicas send made smaller: beside plain loops, or one device where none is lost."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from apart import (
    Plain,
    Weights,
    distance,
    easgd,
    local,
    replica_of,
    saved,
    train_apart,
    worst_of,
)
from onedevice import Case, batches_of, images
from test_distributed_against_one_device import branches
from test_distributed_meetings import STEPS, TOLERANCE, Outer, one_device, small
from torch import Tensor

# ---- the methods, for a part of a sum or for all parts together


class Kept:
    """The largest percent of each tensor; the rest comes later."""

    def __init__(self, percent: float) -> None:
        self.percent = percent
        self.errors: dict[tuple[str, int], Tensor] = {}

    def __call__(self, part: Tensor, name: str, replica: int) -> Tensor:
        whole = part + self.errors.get((name, replica), torch.zeros_like(part))
        count = math.ceil(whole.numel() * self.percent / 100)
        smallest = whole.abs().flatten().sort(descending=True).values[count - 1]
        sent = torch.where(whole.abs() >= smallest, whole, 0.0)
        self.errors[name, replica] = whole - sent
        return sent

    def sum(self, parts: list[Tensor], name: str) -> Tensor:
        return sum(self(part, name, replica) for replica, part in enumerate(parts))


class LowRank:
    """Algorithms 1 and 2 of Vogels et al. 2019, with Gram and Schmidt."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.errors: dict[tuple[str, int], Tensor] = {}
        self.bases: Weights = {}

    def sum(self, parts: list[Tensor], name: str) -> Tensor:
        from shoal.sync.feedback import _first_base

        matrices = [part.flatten(1) if part.dim() > 1 else part[:, None] for part in parts]
        turned = matrices[0].shape[0] > matrices[0].shape[1]
        matrices = [m.T if turned else m for m in matrices]
        n, m = matrices[0].shape
        rank = min(self.rank, n)
        if rank * (n + m) >= n * m:
            return sum(parts)
        base = self.bases.get(name, _first_base(name, m, rank))
        whole = [x + self.errors.get((name, r), 0.0) for r, x in enumerate(matrices)]
        directions = orthonormal(sum(x @ base for x in whole))
        along = [x.T @ directions for x in whole]
        for replica, (x, q) in enumerate(zip(whole, along, strict=True)):
            self.errors[name, replica] = x - directions @ q.T
        self.bases[name] = sum(along)
        total = directions @ self.bases[name].T
        return (total.T if turned else total).reshape(parts[0].shape)


def orthonormal(matrix: Tensor) -> Tensor:
    columns: list[Tensor] = []
    for column in matrix.T:
        for other in columns:
            column = column - (column @ other) * other
        columns.append(column / column.norm())
    return torch.stack(columns, 1)


class Rounded:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def sum(self, parts: list[Tensor], _name: str) -> Tensor:
        assert len(parts) == 2  # more would be rounded in some order
        return (parts[0].to(self.dtype) + parts[1].to(self.dtype)).to(parts[0].dtype)


METHODS = {
    "topk=5": lambda: Kept(5),
    "powersgd=1": lambda: LowRank(1),
    "powersgd=2": lambda: LowRank(2),
    "fp16": lambda: Rounded(torch.float16),
    "bf16": lambda: Rounded(torch.bfloat16),
}


class Smaller(Plain):
    """Gradients are summed at each step, by a method."""

    def __init__(self, case: Case, replicas: int, method: Any) -> None:
        super().__init__(case, replicas)
        self.method, self.agree_until = method, self.total

    def _sum_gradients(self, shares: list[float]) -> None:
        named = [dict(model.named_parameters()) for model in self.models]
        for name in named[0]:
            of_each = [each[name] for each in named]
            given = zip(of_each, shares, strict=True)
            parts = [torch.zeros_like(p) if p.grad is None else p.grad * s for p, s in given]
            total = self.method.sum(parts, name)
            for parameter in of_each:
                parameter.grad = total.clone()


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("dp3/compress:topk=5", "topk=5"),
        ("dp4/compress:topk=5", "topk=5"),
        ("dp3/compress:powersgd=1", "powersgd=1"),
        ("dp4/compress:powersgd=2", "powersgd=2"),
        ("dp2/zero1/compress:powersgd=2", "powersgd=2"),
        ("dp2/compress:fp16", "fp16"),
        ("dp2/compress:bf16", "bf16"),
        ("dp2/mb:3/compress:topk=5", "topk=5"),
        ("pp2.dp2/compress:topk=5", "topk=5"),
    ],
)
def test_gradients(pool: Any, tmp_path: Path, text: str, method: str) -> None:
    case = small()
    train_apart(pool, case, text, tmp_path)
    plain = Smaller(case, 2 if "dp2" in text else int(text[2]), METHODS[method]()).run()
    # In 16 bits another last bit of a gradient is another number.
    tolerance = 1e-6 if method in ("fp16", "bf16") else TOLERANCE
    assert worst_of(plain, tmp_path, apart=False) < tolerance


def changes(every: int, method: Any) -> Any:
    """Local steps whose weights meet by their changes, summed by a method."""
    last: Weights = {}

    def compressed(plain: Plain, step: int) -> None:
        if not last:
            torch.manual_seed(plain.case.seed)
            last.update(
                {n: p.detach().clone() for n, p in plain.case.build().double().named_parameters()}
            )
        if (step + 1) % every and step + 1 != plain.total:
            return
        shares = plain.shares(step - step % every, step)
        for name in last:
            given = enumerate(shares)
            parts = [share * (plain.weights(r)[name] - last[name]) for r, share in given]
            last[name] += method.sum(parts, name)
        plain.put_all(last)

    return compressed


@pytest.mark.parametrize("method", ["topk=5", "powersgd=1"])
def test_weights_meet_by_their_changes(pool: Any, tmp_path: Path, method: str) -> None:
    case = small()
    train_apart(pool, case, f"dp3/local:4/compress:{method}", tmp_path)
    plain = Plain(case, 3).run(changes(4, METHODS[method]()))
    assert worst_of(plain, tmp_path) < TOLERANCE


def in_bytes(part: Tensor, _name: str, _replica: int) -> Tensor:
    """Each 256 numbers as bytes, and a scale in bf16."""
    flat, blocks = part.flatten(), []
    for block in flat.split(256):
        scale = (block.abs().max() / 127).bfloat16().double()
        blocks.append(torch.round(block / (scale or 1.0)).clamp(-127, 127) * scale)
    return torch.cat(blocks).view(part.shape)


@pytest.mark.parametrize(
    ("text", "send"),
    [("dp3/diloco:4:wire=int8", in_bytes), ("dp3/diloco:4/compress:topk=5", Kept(5))],
)
def test_outer_gradients(pool: Any, tmp_path: Path, text: str, send: Any) -> None:
    case = small()
    train_apart(pool, case, text, tmp_path)
    assert worst_of(Plain(case, 3).run(Outer(4, send=send)), tmp_path) < TOLERANCE


def test_outer_gradients_in_16_bits_are_near_those_in_full(pool: Any, tmp_path: Path) -> None:
    case = small()
    train_apart(pool, case, "dp2/diloco:4:wire=bf16", tmp_path)
    error = worst_of(Plain(case, 2).run(Outer(4)), tmp_path)
    assert 1e-8 < error < 2**-7


# ---- nothing is lost


@pytest.mark.parametrize(
    "text", ["dp3/compress:topk=100", "dp4/compress:topk=100", "dp2.tp2/compress:topk=100"]
)
def test_all_of_each_tensor_is_sync(pool: Any, tmp_path: Path, text: str) -> None:
    case = branches() if text.startswith("dp3") else small()
    train_apart(pool, case, text, tmp_path)
    last = len(case.batches)
    found = replica_of(saved(tmp_path, last), None)
    assert distance(one_device(case), found) < TOLERANCE
    errors = [t for n, t in found.items() if "sync.error" in n]
    assert len(errors) == sum(p.requires_grad for p in case.build().parameters()) * int(text[2])
    assert not any(t.any() for t in errors)


def test_all_of_each_change_is_as_in_full(pool: Any, tmp_path: Path) -> None:
    case = small()
    train_apart(pool, case, "dp3/local:4/compress:topk=100", tmp_path)
    assert worst_of(Plain(case, 3).run(local(4)), tmp_path) < TOLERANCE
    other = tmp_path / "elastic"
    train_apart(pool, case, "dp3/easgd:2:alpha=0.2/compress:topk=100", other)
    assert worst_of(Plain(case, 3).run(easgd(2, 0.2)), other) < TOLERANCE


def _full_rank(groups: Any, dtype: torch.dtype) -> list[float]:
    """Errors of sums over three rounds; among the tensors are one of rank 1, and zeros."""
    from shoal.sync.feedback import LowRank as Sums
    from shoal.sync.sums import Line

    shapes = {"tall": (9, 3), "wide": (3, 9), "four": (4, 3, 2, 2), "vector": (7,), "number": ()}
    shapes |= {"rank 1": (6, 4), "zeros": (5, 4)}
    generator = torch.Generator().manual_seed(groups.world.rank)
    worst, sums = [], None
    for round_ in range(3):
        given = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, shape in shapes.items()
        }
        given["four"] = given["four"].contiguous(memory_format=torch.channels_last)
        given["zeros"].zero_()
        if round_ == 0:
            given["rank 1"] = given["rank 1"][:, :1] @ torch.ones(1, 4, dtype=dtype)
            sums = Sums(Line(groups.data, "gradient", groups.world.rank), given, 99, force=True)
        exact = {name: groups.data.all_reduce(t.double(), "metric") for name, t in given.items()}
        sums.start(given).wait()
        errors = [float((given[name].double() - exact[name]).abs().max()) for name in shapes]
        worst.append(max([*errors, *(float(e.abs().max()) for e in sums.errors.values())]))
    assert len(sums.errors) == len(shapes)
    return worst


def test_full_rank_of_every_tensor_is_all_of_it(pool: Any) -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        for errors in pool.run(_full_rank, dtype, ranks=3):
            assert max(errors) < tolerance


# ---- what is not used, and what is sent


def test_what_no_replica_uses_gets_no_gradient_and_keeps_its_error(
    pool: Any, tmp_path: Path
) -> None:
    case = branches()
    train_apart(pool, case, "dp3/compress:topk=20", tmp_path)
    found = saved(tmp_path, len(case.batches))
    assert "never.weight/momentum_buffer" not in found
    # One rank alone has used it, once; what was left out then is still there.
    errors = [found[f"rare.weight/sync.error.{rank}"] for rank in range(3)]
    assert [bool(error.any()) for error in errors] == [False, False, True]


SIZES = (256 * 8, 8, 8 * 5, 5)


@pytest.mark.parametrize(
    ("text", "collective", "purpose", "expected"),
    [
        ("dp2", "all_reduce", "gradient", STEPS * 8 * sum(SIZES)),
        ("dp2/compress:fp16", "all_reduce", "gradient", STEPS * 2 * sum(SIZES)),
        (
            "dp2/compress:topk=1",
            "all_gather",
            "gradient",
            STEPS * 12 * sum(math.ceil(size / 100) for size in SIZES),
        ),
        (
            "dp2/compress:powersgd=1",
            "all_reduce",
            "gradient",
            STEPS * 8 * (256 + 8 + 8 + 8 + 5 + 5),
        ),
        (
            "dp2/diloco:5:wire=int8",
            "all_gather",
            "parameter",
            2 * (sum(SIZES) + 2 * sum(math.ceil(size / 256) for size in SIZES)),
        ),
        ("dp2/diloco:5:wire=bf16", "all_reduce", "parameter", 2 * 2 * sum(SIZES)),
        ("dp2/local:5", "all_reduce", "parameter", 2 * 8 * sum(SIZES)),
    ],
)
def test_bytes(
    pool: Any, tmp_path: Path, text: str, collective: str, purpose: str, expected: int
) -> None:
    case = small(batches=batches_of(*images(48), 48, STEPS))
    said = train_apart(pool, case, text, tmp_path)
    assert said["bytes"][collective][purpose] == expected
