"""Both cores, with ranks as threads: arithmetic, order of sums, what they say of wrong calls."""

import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.comm.shared_memory import native
from shoal.comm.shared_memory.call import Call, Kind, Operation
from shoal.comm.shared_memory.describe import error_of
from shoal.comm.shared_memory.failure import CallsDiffer, PeerGone
from shoal.comm.shared_memory.layout import LANE_BYTES, Layout
from shoal.comm.shared_memory.memory import Memory
from shoal.comm.shared_memory.native import NativeCore
from shoal.comm.shared_memory.outcome import Core, Outcome, Verdict
from shoal.comm.shared_memory.plain import PlainCore

CORES = [
    pytest.param(NativeCore, marks=pytest.mark.skipif(not native.available(), reason="not built")),
    PlainCore,
]
Make = Callable[[Memory], Core]
SMALL = {"chunk_bytes": 1024, "single_bytes": 128}  # so that small tensors take several ticks


class Together:
    """Ranks of one process."""

    def __init__(self, make: Make, size: int, fds: tuple[int, ...] | None = None) -> None:
        layout = Layout(size, **SMALL)
        buffer = mmap.mmap(-1, layout.total_bytes)
        self.memories = [
            Memory(buffer, layout, rank, tuple(range(900, 900 + size)), fds or (-1,) * size, "", 64)
            for rank in range(size)
        ]
        self.cores = [make(memory) for memory in self.memories]

    def run(self, calls: list[Call]) -> list[Outcome]:
        outcomes: list[Any] = [None] * len(calls)

        def one(rank: int) -> None:
            outcomes[rank] = self.cores[rank].run(calls[rank])

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    def all_reduce(self, tensors: list[Tensor], operation: Operation = Operation.SUM) -> Tensor:
        """The result, after it was found to be the same on all ranks."""
        results = [torch.empty_like(each) for each in tensors]
        calls = [
            Call(Kind.ALL_REDUCE, (given,), (result,), operation)
            for given, result in zip(tensors, results, strict=True)
        ]
        assert {outcome.verdict for outcome in self.run(calls)} == {Verdict.OK}
        for result in results[1:]:
            assert torch.equal(bits(result), bits(results[0]))
        return results[0]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def in_rank_order(tensors: list[Tensor]) -> Tensor:
    """r0 + r1 + r2 + …; 16-bit types in float32, rounded once."""
    wide = tensors[0].dtype in (torch.bfloat16, torch.float16)
    total = tensors[0].float() if wide else tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor.float() if wide else tensor
    return total.to(tensors[0].dtype)


FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("make", CORES)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_are_in_rank_order_to_the_bit(make: Make, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    ranks = Together(make, size)
    for count in (1, 31, 700, 5000):
        # Of very different size: in another order the sum would have other bits.
        scale = 10.0 ** torch.randint(-3, 4, (size, count), generator=generator)
        values = torch.randn(size, count, generator=generator, dtype=torch.float64) * scale
        tensors = list(values.to(dtype).unbind(0))
        expected = in_rank_order(tensors)
        assert torch.equal(bits(ranks.all_reduce(tensors)), bits(expected))
        if count > 1000 and size > 2 and dtype in (torch.float32, torch.float64):
            # So another order would be seen.
            assert not torch.equal(in_rank_order(tensors[::-1]), expected)


@pytest.mark.parametrize("make", CORES)
def test_bits_do_not_depend_on_where_an_element_lies(make: Make) -> None:
    ranks = Together(make, 3)
    values = torch.randn(3, 4001, generator=torch.Generator().manual_seed(1)) ** 5
    whole = ranks.all_reduce(list(values.unbind(0)))
    cut = [ranks.all_reduce([row.clone() for row in part.unbind(0)])
           for part in values.split([1, 7, 64, 1500, 2429], dim=1)]  # fmt: skip
    turned = ranks.all_reduce([row.flip(0) for row in values.unbind(0)])
    assert torch.equal(torch.cat(cut), whole)
    assert torch.equal(turned.flip(0), whole)


@pytest.mark.parametrize("make", CORES)
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_every_operation(make: Make, dtype: torch.dtype) -> None:
    ranks = Together(make, 3)
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randint(0, 100, (900,), generator=generator).to(dtype) for _ in range(3)]
    stacked = torch.stack(tensors)
    expected = {
        Operation.PRODUCT: tensors[0] * tensors[1] * tensors[2],
        Operation.MINIMUM: stacked.amin(0),
        Operation.MAXIMUM: stacked.amax(0),
        Operation.SUM: tensors[0] + tensors[1] + tensors[2],
    }
    for operation, result in expected.items():
        found = ranks.all_reduce(tensors, operation)
        if dtype in (torch.bfloat16, torch.float16) and operation in (
            Operation.PRODUCT, Operation.SUM,
        ):  # fmt: skip
            wide = [each.float() for each in tensors]
            product = wide[0] * wide[1] * wide[2]
            result = (product if operation == Operation.PRODUCT else sum(wide)).to(dtype)
        assert torch.equal(found, result), operation
    if dtype.is_floating_point:
        average = (in_rank_order([each.double() for each in tensors]) / 3).to(dtype)
        found = ranks.all_reduce(tensors, Operation.AVERAGE)
        torch.testing.assert_close(found, average, rtol=1e-6, atol=0) if dtype in (
            torch.float32, torch.float64,
        ) else torch.testing.assert_close(found, average)  # fmt: skip


@pytest.mark.parametrize("make", CORES)
def test_booleans_are_reduced_as_sets(make: Make) -> None:
    ranks = Together(make, 2)
    first, second = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    assert ranks.all_reduce([first, second]).tolist() == [True, True, False]
    assert ranks.all_reduce([first, second], Operation.PRODUCT).tolist() == [True, False, False]


@pytest.mark.skipif(not native.available(), reason="the C library was not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_of_every_value_of_16_bits(dtype: torch.dtype) -> None:
    """x + 0 for all x, and x + y rounded as torch rounds."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    ranks = Together(NativeCore, 2)
    found = ranks.all_reduce([every, torch.zeros_like(every)])
    number = ~every.isnan()
    assert torch.equal(found[number].float(), every[number].float())
    assert found[~number].isnan().all()
    other = every.roll(12345)
    found, expected = ranks.all_reduce([every, other]), in_rank_order([every, other])
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("make", CORES)
def test_no_number_stays_no_number(make: Make) -> None:
    ranks = Together(make, 3)
    rows = [torch.ones(3).index_fill(0, torch.tensor(rank), float("nan")) for rank in range(3)]
    for operation in Operation:
        assert ranks.all_reduce(rows, operation).isnan().all(), operation


@pytest.mark.parametrize("make", CORES)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 5, 3000])
def test_the_other_collectives(make: Make, size: int, count: int) -> None:
    ranks = Together(make, size)
    rows = [torch.arange(count) * 10 + rank for rank in range(size)]
    gathered = [[torch.empty_like(row) for _ in range(size)] for row in rows]
    calls = [
        Call(Kind.ALL_GATHER, (row,), tuple(places))
        for row, places in zip(rows, gathered, strict=True)
    ]
    assert {outcome.verdict for outcome in ranks.run(calls)} == {Verdict.OK}
    assert all(torch.equal(torch.stack(places), torch.stack(rows)) for places in gathered)
    told = [row.clone() for row in rows]
    ranks.run([Call(Kind.BROADCAST, (each,), (each,), root=size - 1) for each in told])
    assert all(torch.equal(each, rows[-1]) for each in told)
    sums = [torch.empty_like(row) for row in rows]
    pieces = [tuple(row + 100 * to for to in range(size)) for row in rows]
    ranks.run([Call(Kind.REDUCE_SCATTER, given, (place,))
               for given, place in zip(pieces, sums, strict=True)])  # fmt: skip
    for rank, found in enumerate(sums):
        assert torch.equal(found, sum(rows, torch.zeros_like(found)) + 100 * rank * size)
    assert {o.verdict for o in ranks.run([Call(Kind.BARRIER)] * size)} == {Verdict.OK}


# ---- what goes wrong


def said(ranks: Together, calls: list[Call], outcomes: list[Outcome]) -> list[str]:
    names = tuple(10 + rank for rank in range(len(calls)))
    return [
        f"{type(error).__name__}: {error}"
        for memory, call, core, outcome in zip(
            ranks.memories, calls, ranks.cores, outcomes, strict=True
        )
        for error in [error_of(memory, names, call, core.sequence, outcome)]
    ]


def reduce_of(tensor: Tensor, **more: Any) -> Call:
    return Call(Kind.ALL_REDUCE, (tensor,), (tensor,), **more)


ONES = torch.ones(1000)
DIFFERENT = {
    "type": (reduce_of(ONES.int()), "all_reduce (sum) of 1000 int32"),
    "size": (reduce_of(ONES[:999]), "all_reduce (sum) of 999 float32"),
    "operation": (reduce_of(ONES, operation=Operation.MAXIMUM), "all_reduce (maximum) of 1000"),
    "kind": (Call(Kind.BROADCAST, (ONES,), (ONES,), root=1), "broadcast from rank 1 of the group"),
    "barrier": (Call(Kind.BARRIER), "collective 1, barrier"),
}


@pytest.mark.parametrize("make", CORES)
@pytest.mark.parametrize("what", DIFFERENT)
def test_different_calls_are_named_on_both_sides(make: Make, what: str) -> None:
    other, words = DIFFERENT[what]
    mine = torch.ones(1000)
    ranks = Together(make, 2)
    calls = [reduce_of(mine), other]
    for text in said(ranks, calls, ranks.run(calls)):
        assert text.startswith(CallsDiffer.__name__)
        assert words in text
        assert "collective 1, all_reduce (sum) of 1000 float32" in text
        assert "rank 10" in text
        assert "rank 11" in text
    assert mine.eq(1).all()  # nothing was read before that


@pytest.mark.parametrize("make", CORES)
def test_who_is_late_is_named(make: Make) -> None:
    ranks = Together(make, 3)
    calls = [reduce_of(torch.ones(8), timeout_s=0.2)] * 2
    outcomes = ranks.run(calls)
    assert [outcome.verdict for outcome in outcomes] == [Verdict.TIMED_OUT] * 2
    error = error_of(ranks.memories[0], (5, 6, 7), calls[0], 1, outcomes[0])
    assert isinstance(error, PeerGone)
    assert "rank 7 has not arrived at collective 1, all_reduce (sum) of 8 float32" in str(error)
    assert "within 0.2 s" in str(error)


@pytest.mark.parametrize("make", CORES)
def test_who_has_left_is_named_and_for_whose_sake(make: Make) -> None:
    ranks = Together(make, 3)
    ranks.cores[1].leave(2)
    outcome = ranks.run([reduce_of(torch.ones(8), timeout_s=60)])[0]
    assert outcome == Outcome(Verdict.LEFT, 1)
    error = error_of(ranks.memories[0], (0, 1, 2), reduce_of(torch.ones(8)), 1, outcome)
    assert "rank 1 has left the group on account of rank 2" in str(error)


@pytest.mark.parametrize("make", CORES)
def test_what_a_rank_gave_before_it_ended_is_used(make: Make) -> None:
    """An ended process, that is a descriptor which can be read."""
    read, write = os.pipe()
    os.close(write)
    ranks = Together(make, 2, (-1, read))
    tensors = [torch.ones(8), torch.ones(8)]
    assert ranks.all_reduce(tensors).eq(2).all()
    assert ranks.run([reduce_of(tensors[0], timeout_s=60)])[0] == Outcome(Verdict.LOST, 1)
    os.close(read)


def test_memory_is_as_the_documents_say() -> None:
    assert Layout(2).total_bytes == 3_146_112
    assert Layout(4).total_bytes // 1024 == 5120
    assert LANE_BYTES % 64 == Layout(3).slot_bytes % 64 == 0
