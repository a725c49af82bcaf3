"""The shared-memory group between real ranks: against gloo, under DDP and FSDP2, in parts."""

import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shoal.comm import Groups, is_peer_failure, peer_failures
from shoal.comm.shared_memory import BACKEND, SharedMemoryGroup, native
from shoal.errors import PeerLost, RanksDiffer, WorldError

CORES = ["C", "Python"]


def group_of(core: str) -> Any:
    """A group over all ranks that runs on `core`."""
    with mock.patch.object(native, "available", return_value=core == "C"):
        group = dist.new_group(backend=BACKEND)
    assert isinstance(group, SharedMemoryGroup)
    assert group.core_name == core
    return group


# ---- random collectives

TYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.int32,
         torch.int8, torch.uint8, torch.bool]  # fmt: skip
# torch 2.13 has given two of them new names, and warns of the old.
GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Draw:
    """One random collective: the same on all ranks, with values of each rank's own."""

    def __init__(self, seed: int, size: int) -> None:
        chance = random.Random(seed)
        self.size = size
        self.seed = seed
        self.kind = chance.choice(
            ["all_reduce", "all_gather", "into_tensor", "scatter", "scatter_list", "broadcast",
             "barrier"]
        )  # fmt: skip
        self.dtype = chance.choice(TYPES)
        # Mostly small, some of several chunks, now and then nothing at all.
        self.count = chance.choice([0, 1, 3, 17, 64, 1000, 9000, 40_000, 200_000])
        self.op = chance.choice([dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN])
        if self.dtype == torch.bool:
            self.op = dist.ReduceOp.MAX  # gloo's sum of true and true is 2
        self.root = chance.randrange(size)
        self.async_op = chance.random() < 0.3

    def values(self, rank: int, count: int) -> Tensor:
        """Whole numbers, so small that their sums are exact in every type."""
        generator = torch.Generator().manual_seed(self.seed * 8 + rank)
        high = 2 if self.dtype == torch.bool else 8
        return torch.randint(0, high, (count,), generator=generator).to(self.dtype)

    def start(self, group: Any, rank: int) -> tuple[Any, list[Tensor]]:
        """The work and the tensors that will hold the result."""
        mine = self.values(rank, self.count)
        many = self.values(rank, self.count * self.size)
        places = [torch.empty_like(mine) for _ in range(self.size)]
        common = {"group": group, "async_op": self.async_op}
        if self.kind == "all_reduce":
            return dist.all_reduce(mine, self.op, **common), [mine]
        if self.kind == "all_gather":
            return dist.all_gather(places, mine, **common), places
        if self.kind == "into_tensor":
            return GATHER(many, mine, **common), [many]
        if self.kind == "scatter":
            return SCATTER(mine, many, self.op, **common), [mine]
        if self.kind == "scatter_list":
            pieces = list(many.view(self.size, -1).unbind(0)) if self.count else places
            return dist.reduce_scatter(mine, pieces, self.op, **common), [mine]
        if self.kind == "broadcast":
            return dist.broadcast(mine, group_src=self.root, **common), [mine]
        return dist.barrier(**common), []

    def __repr__(self) -> str:
        return f"{self.kind} {self.op} {self.dtype} {self.count} (seed {self.seed})"


def _stress(groups: Groups, core: str, first: int, count: int) -> list[str]:
    ours, gloo = group_of(core), dist.new_group(backend="gloo")
    rank, size = groups.world.rank, groups.world.size
    wrong: list[str] = []
    pending: list[tuple[Draw, Any, list[Tensor]]] = []

    def compare() -> None:
        for draw, work, found in pending:
            if work is not None:
                work.wait()
            theirs, expected = draw.start(gloo, rank)
            if theirs is not None:
                theirs.wait()
            if not all(map(torch.equal, found, expected)):
                wrong.append(repr(draw))
        pending.clear()

    for seed in range(first, first + count):
        draw = Draw(seed, size)
        pending.append((draw, *draw.start(ours, rank)))
        if len(pending) == 7:  # several under way at a time
            compare()
    compare()
    return wrong


@pytest.mark.parametrize(
    ("core", "ranks", "count"),
    [("C", 2, 500), ("C", 4, 300), ("C", 3, 200), ("Python", 2, 100), ("Python", 3, 60)],
)
def test_random_collectives_give_what_gloo_gives(
    pool: Any, core: str, ranks: int, count: int
) -> None:
    assert pool.run(_stress, core, 10_000 * ranks, count, ranks=ranks) == [[]] * ranks


@pytest.mark.long
@pytest.mark.parametrize(("core", "ranks"), [("C", 2), ("C", 3), ("C", 4), ("Python", 4)])
def test_ten_thousand_random_collectives(pool: Any, core: str, ranks: int) -> None:
    count = 10_000 if core == "C" else 1000
    assert pool.run(_stress, core, 100_000 * ranks, count, ranks=ranks) == [[]] * ranks


# ---- under DDP and FSDP2


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(24, 60), nn.Tanh(), nn.Linear(60, 50), nn.Tanh(),
                         nn.Linear(50, 6))  # fmt: skip


def trained(model: nn.Module, rank: int, steps: int = 4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        model(torch.randn(8, 24, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> list[Tensor]:
    return [
        each.detach().full_tensor() if hasattr(each, "full_tensor") else each.detach()
        for each in model.parameters()
    ]


def ddp(group: Any, **options: Any) -> nn.Module:
    return DistributedDataParallel(network(), process_group=group, **options)


def fsdp(group: Any) -> nn.Module:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, "cpu")
    model = network()
    for layer in (model[0], model[2]):  # type: ignore[index]
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _wrapped(groups: Groups, wrap: Callable[[Any], nn.Module], core: str) -> float:
    """The largest difference from what the same gives over gloo."""
    results = []
    for group in (group_of(core), dist.new_group(backend="gloo")):
        model = wrap(group)
        trained(model, groups.world.rank)
        results.append(weights(model))
    untouched = weights(network())
    assert all((mine != was).any() for mine, was in zip(results[0], untouched, strict=True))
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_ddp_and_fully_shard_give_what_gloo_gives(pool: Any, wrap: Any, core: str) -> None:
    assert pool.run(_wrapped, wrap, core, ranks=2) == [0.0] * 2  # two numbers, one order
    assert max(pool.run(_wrapped, wrap, core, ranks=3)) < 1e-6


def _buckets(groups: Groups, backend: str) -> list[float]:
    """The same training with one bucket, with many, and with those regrouped after a step."""
    group = dist.new_group(backend=backend)
    found = []
    for options in (
        {"bucket_cap_mb": 25},
        {"bucket_cap_mb": 0.001},
        {"bucket_cap_mb": 0.004, "find_unused_parameters": True},  # buckets stay as first made
    ):
        model = ddp(group, **options)
        trained(model, groups.world.rank)
        found.append(weights(model.module))
    return [
        float(max((a - b).abs().max() for a, b in zip(found[0], other, strict=True)))
        for other in found[1:]
    ]


@pytest.mark.parametrize("ranks", [3, 4])
def test_bits_do_not_depend_on_buckets(pool: Any, ranks: int) -> None:
    assert pool.run(_buckets, BACKEND, ranks=ranks) == [[0.0, 0.0]] * ranks


# ---- groups of some ranks; what goes to gloo


def _parts(groups: Groups) -> list[Any]:
    rank = groups.world.rank
    pairs = [dist.new_group([0, 2], backend=BACKEND), dist.new_group([1, 3], backend=BACKEND)]
    alone = [dist.new_group([r], backend=BACKEND) for r in range(4)][rank]
    mine = torch.full((3,), float(rank))
    dist.all_reduce(mine, group=pairs[rank % 2])
    own = torch.full((70_000,), float(rank))
    dist.all_reduce(own, group=alone)
    return [mine[0].item(), own.sum().item() / 70_000]


def test_groups_of_some_ranks_and_of_one(pool: Any) -> None:
    found = pool.run(_parts, ranks=4)
    assert found == [[2.0, 0.0], [4.0, 1.0], [2.0, 2.0], [4.0, 3.0]]


def _everything_else(groups: Groups) -> dict[str, Any]:
    rank, found = groups.world.rank, {}
    told = torch.full((2,), float(rank))
    if rank == 0:
        dist.send(told + 7, 1)
    else:
        dist.recv(told, 0)
    found["sent"] = told.tolist()
    ring = torch.zeros(1)
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, told[:1], 1 - rank), dist.P2POp(dist.irecv, ring, 1 - rank)]
    ):
        work.wait()
    found["exchanged"] = ring.tolist()
    out = torch.zeros(2)
    dist.all_to_all_single(out, torch.tensor([10.0 * rank, 10.0 * rank + 1]))
    found["all to all"] = out.tolist()
    places = [torch.zeros(1) for _ in range(2)] if rank == 0 else None
    dist.gather(torch.tensor([float(rank)]), places)
    found["gathered"] = [each.item() for each in places] if places else []
    last = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last) * (rank + 1)
    dist.all_reduce(last)
    found["channels last"] = last.unique().tolist()
    dist.all_reduce(turned := torch.tensor([3.0 + 2j]))
    found["complex"] = [turned.real.item(), turned.imag.item()]
    functional = torch.distributed._functional_collectives
    gathered = getattr(functional, "all_gather_single", functional.all_gather_tensor)
    found["functional"] = (
        gathered(torch.tensor([rank]), 0, dist.group.WORLD).tolist()
        + functional.all_reduce(torch.tensor([rank]), "sum", dist.group.WORLD).tolist()
    )
    dist.barrier()
    return found


def test_what_shared_memory_does_not_do_goes_to_gloo(pool: Any) -> None:
    zero, one = pool.run(_everything_else, ranks=2)
    assert (zero["sent"], one["sent"]) == ([0.0, 0.0], [7.0, 7.0])
    assert (zero["exchanged"], one["exchanged"]) == ([7.0], [0.0])
    assert (zero["all to all"], one["all to all"]) == ([0.0, 10.0], [1.0, 11.0])
    assert zero["gathered"] == [0.0, 1.0]
    for found in (zero, one):
        assert found["channels last"] == [3.0]
        assert found["complex"] == [6.0, 4.0]
        assert found["functional"] == [0, 1, 1]


def _refused(groups: Groups) -> list[str]:
    said = []
    for action in (
        lambda: dist.all_reduce(torch.ones(4, 4)[:, 1]),
        lambda: dist.all_reduce(torch.ones(4).int(), dist.ReduceOp.BXOR),
        lambda: dist.all_reduce(torch.ones(4).int(), dist.ReduceOp.AVG),
        lambda: SCATTER(torch.ones(2), torch.ones(5)),
    ):
        with pytest.raises(ValueError, match=r".") as refused:
            action()
        said.append(str(refused.value))
    return said


def test_what_nobody_does_is_refused_by_name(pool: Any) -> None:
    for said in pool.run(_refused, ranks=2):
        assert "strides [4]: use .contiguous()" in said[0]
        assert "torch.int32 by BXOR" in said[1]
        assert "average of torch.int32" in said[2]
        assert "2 equal pieces is needed, given shape [5]" in said[3]


# ---- different calls; ranks that cannot share


def _mixed_up(groups: Groups, core: str, async_op: bool) -> str:
    group, rank = group_of(core), groups.world.rank
    first, second = torch.ones(8), torch.ones(8)
    try:
        with peer_failures():
            if rank == 0:
                dist.all_reduce(first, group=group, async_op=async_op)
            work = dist.all_reduce(second.int() if rank else second, group=group, async_op=async_op)
            if async_op:
                work.wait()
    except RanksDiffer as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("async_op", [False, True])
def test_different_calls_are_an_error_on_both(pool: Any, core: str, async_op: bool) -> None:
    for said in pool.run(_mixed_up, core, async_op, ranks=2):
        assert "do not make the same collectives" in said
        assert "rank 0: collective 1, all_reduce (sum) of 8 float32" in said
        assert "rank 1: collective 1, all_reduce (sum) of 8 int32" in said


def _form(context: Any, transport: str, blind: int | None) -> list[Any]:
    def no_place(*_: Any) -> Any:
        raise OSError("no such process here")

    where = "shoal.comm.shared_memory.memory._open"
    patch = mock.patch(where, no_place) if context.rank == blind else mock.patch("os.sep", "/")
    with patch:
        try:
            groups = Groups.form(
                context.rank, context.world_size, context.store, context.generation,
                transport=transport, timeout_s=30,  # type: ignore[arg-type]
            )  # fmt: skip
        except WorldError as error:
            return [str(error)]
    total = groups.world.all_reduce(torch.ones(1), "metric").item()
    groups.statistics.all_gather(torch.ones(1), "metric")
    groups.close()
    return [groups.transport, groups.reason, total]


def test_what_carries_the_groups(pool: Any) -> None:
    shared = "shared_memory" if native.available() else "shared_memory_python"
    assert pool.call(_form, "auto", None, ranks=3) == [[shared, None, 3.0]] * 3
    assert pool.call(_form, "shared_memory", None, ranks=2) == [[shared, None, 2.0]] * 2
    assert pool.call(_form, "gloo", None, ranks=2) == [["gloo", None, 2.0]] * 2


def test_one_rank_that_cannot_share_means_gloo_for_all(pool: Any) -> None:
    reason = "rank 2: no such process here"
    assert pool.call(_form, "auto", 2, ranks=3) == [["gloo", reason, 3.0]] * 3
    for (said,) in pool.call(_form, "shared_memory", 1, ranks=2):
        assert "cannot share memory: rank 1: no such process here" in said
        assert "--comm gloo" in said


def _left(groups: Groups, core: str) -> str:
    group = group_of(core)
    if groups.world.rank == 1:
        group.shutdown()
        groups.world.all_reduce(torch.ones(1), "metric")
        return ""
    try:
        with peer_failures():
            work = dist.all_reduce(torch.ones(8), group=group, async_op=True)
            with pytest.raises(RuntimeError) as raised:
                work.wait()
            assert is_peer_failure(raised.value)
            assert not work.is_success()
            dist.barrier(group=group)
    except PeerLost as error:
        return str(error)
    finally:
        groups.world.all_reduce(torch.ones(1), "metric")
    return "nothing"


@pytest.mark.parametrize("core", CORES)
def test_a_rank_that_has_left_is_an_error_at_once(pool: Any, core: str) -> None:
    said, _ = pool.run(_left, core, ranks=2)
    assert said.startswith("rank 1 has left the group")
