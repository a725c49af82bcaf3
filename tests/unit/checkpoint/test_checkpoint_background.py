"""Copies that training cannot change, and saves that it does not wait for."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.checkpoint import (
    Alone,
    Background,
    Checkpoint,
    Copies,
    Piece,
    SavedCheckpoint,
    Snapshot,
    list_checkpoints,
    save,
)
from shoal.errors import DiskFull, RunError
from shoal.layout import Part, Slice

SAVED = SavedCheckpoint(Path("x"), 3, 0.1)


def snapshot(**tensors: Tensor) -> Snapshot:
    pieces = {name: Piece.whole(tensor) for name, tensor in tensors.items()}
    return Snapshot(step=1, tensors=pieces, fingerprint="f", strategy="single", position=1)


def values(taken: Snapshot) -> dict[str, list[Any]]:
    return {name: piece.tensor.tolist() for name, piece in taken.tensors.items()}


def test_a_copy_keeps_its_values_while_training_goes_on() -> None:
    weight, count = torch.arange(6.0).reshape(2, 3), torch.tensor(7)
    taken = Copies().take(snapshot(weight=weight, count=count))
    weight.add_(1)
    count.add_(1)
    assert values(taken) == {"weight": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], "count": 7}


def test_buffers_are_kept_as_long_as_they_fit() -> None:
    copies = Copies()
    first = copies.take(snapshot(w=torch.ones(4), b=torch.ones(2))).tensors
    second = copies.take(snapshot(w=torch.zeros(4), b=torch.ones(3, dtype=torch.float64))).tensors
    assert second["w"].tensor.data_ptr() == first["w"].tensor.data_ptr()
    assert second["w"].tensor.tolist() == [0, 0, 0, 0]
    assert second["b"].tensor.dtype == torch.float64
    assert second["b"].tensor.tolist() == [1, 1, 1]


def test_copies_are_row_major_and_keep_their_places(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    rows = Piece(torch.randn(5, 4).t(), Part.of(Slice((8, 5), (4, 0), (4, 5))))
    given = replace(snapshot(images=images), tensors={"i": Piece.whole(images), "r": rows})
    taken = Copies().take(given)
    assert all(piece.tensor.is_contiguous() for piece in taken.tensors.values())
    assert taken.tensors["r"].part == rows.part
    assert torch.equal(taken.tensors["r"].tensor, rows.tensor)
    assert torch.equal(taken.tensors["i"].tensor, images)


def test_what_no_file_can_hold_is_refused_by_the_save(tmp_path: Path) -> None:
    taken = Copies().take(snapshot(w=torch.eye(3).to_sparse()))
    with pytest.raises(RunError, match=r"w is a torch\.sparse_coo tensor of float32"):
        save(tmp_path, taken, Alone())


def test_a_result_is_given_once() -> None:
    background = Background()
    assert background.finish() is None
    background.start(lambda: SAVED)
    assert background.finish() is SAVED
    assert background.finish() is None
    assert background.hidden_s >= 0


def test_an_error_is_raised_once_where_it_is_waited_for() -> None:
    def fail() -> SavedCheckpoint:
        raise DiskFull("no space")

    background = Background()
    assert not background.failed
    background.start(fail)
    with pytest.raises(DiskFull, match="no space"):
        background.finish()
    assert not background.failed
    background.start(lambda: SAVED)
    assert background.finish() is SAVED


def test_a_failure_can_be_seen_before_it_is_waited_for() -> None:
    begun = threading.Event()

    def fail() -> SavedCheckpoint:
        begun.wait(20)
        raise DiskFull("no space")

    background = Background()
    background.start(fail)
    assert not background.failed
    begun.set()
    while not background.failed:  # the test's own limit of time ends it
        pass
    with pytest.raises(DiskFull):
        background.finish()


def test_two_saves_at_once_are_refused() -> None:
    end = threading.Event()

    def hold() -> SavedCheckpoint:
        end.wait(20)
        return SAVED

    background = Background()
    background.start(hold)
    with pytest.raises(RuntimeError, match="in flight"):
        background.start(lambda: SAVED)
    end.set()
    assert background.finish() is SAVED


def test_what_rank_0_does_afterwards_fails_for_all(
    tmp_path: Path, on_ranks: Callable[..., list[Any]]
) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied")

    errors = on_ranks(2, lambda m: save(tmp_path, snapshot(w=torch.ones(3)), m, refuse))
    assert {type(error) for error in errors} == {RunError}
    assert len({str(error) for error in errors}) == 1
    assert errors[0].rank == 0
    # It came too late to take the checkpoint back.
    assert list_checkpoints(tmp_path) == (1,)
    Checkpoint.open(tmp_path / "step-000000001").verify()
