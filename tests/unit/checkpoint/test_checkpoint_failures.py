"""A rank that cannot write: all ranks raise the same error, and earlier checkpoints are whole."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.checkpoint import Alone, Checkpoint, Piece, Snapshot, export, files, save
from shoal.errors import DiskFull, RunError
from shoal.layout import Part, Slice

OnRanks = Callable[..., list[Any]]
ROWS = 5000


def share(step: int, rank: int = 0, size: int = 1, rows: int = ROWS) -> Snapshot:
    start, stop = rows * rank // size, rows * (rank + 1) // size
    shape = (stop - start, 8)
    piece = Piece(torch.full(shape, float(step)), Part.of(Slice((rows, 8), (start, 0), shape)))
    return Snapshot(step=step, tensors={"w": piece}, fingerprint="f", strategy="dp3", position=step)


def check_only_step_1_is_there(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["step-000000001"]
    read = Checkpoint.open(folder / "step-000000001")
    read.verify()
    assert read.read("w")[0, 0] == 1


def path_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


class FailingWrite:
    """`os.write` that fails with `number` from the second chunk of one rank's file on."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.write = os.write

    def __call__(self, descriptor: int, data: memoryview) -> int:
        if path_of(descriptor).endswith(self.name) and os.fstat(descriptor).st_size:
            self.write(descriptor, data[:100])
            raise OSError(self.number, os.strerror(self.number))
        return self.write(descriptor, data)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_full_disk_on_one_rank_is_every_ranks_error(
    tmp_path: Path, on_ranks: OnRanks, monkeypatch: pytest.MonkeyPatch, rank: int, number: int
) -> None:
    save(tmp_path, share(1), Alone())
    name = f"rank-{rank:05d}.safetensors"
    monkeypatch.setattr(files.os, "write", FailingWrite(name, number))
    errors = on_ranks(3, lambda m: save(tmp_path, share(2, m.rank, 3), m))
    assert {type(error) for error in errors} == {DiskFull}
    assert len({str(error) for error in errors}) == 1
    error = errors[0]
    assert (error.rank, error.step, error.phase) == (rank, 2, "checkpoint")
    assert str(tmp_path) in error.message
    assert f"({ROWS * 8 * 4} bytes)" in error.message
    assert "were free" in error.message
    check_only_step_1_is_there(tmp_path)
    monkeypatch.undo()
    on_ranks(3, lambda m: save(tmp_path, share(2, m.rank, 3), m))
    assert torch.equal(
        Checkpoint.open(tmp_path / "step-000000002").read("w"), torch.full((ROWS, 8), 2.0)
    )


@pytest.mark.parametrize("name", ["manifest.json", "rank-00001.safetensors"])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_other_faults_are_every_ranks_error_too(
    tmp_path: Path, on_ranks: OnRanks, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    save(tmp_path, share(1), Alone())
    original: Callable[..., Any] = getattr(os, call)

    def fail(target: Any, *args: Any, **options: Any) -> Any:
        path = path_of(target) if call == "fsync" else str(target)
        if path.endswith(name):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return original(target, *args, **options)

    monkeypatch.setattr(files.os, call, fail)
    errors = on_ranks(3, lambda m: save(tmp_path, share(2, m.rank, 3), m))
    monkeypatch.undo()
    assert {type(error) for error in errors} == {RunError}
    assert len({str(error) for error in errors}) == 1
    assert "Permission denied" in str(errors[0])
    check_only_step_1_is_there(tmp_path)


def test_replacing_that_fails_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, share(1), Alone())
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(RunError, match="Input/output error"):
        save(tmp_path, share(1), Alone())
    monkeypatch.undo()
    check_only_step_1_is_there(tmp_path)


def test_a_file_that_does_not_arrive_at_rank_0(
    tmp_path: Path, on_ranks: OnRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts without a common disk: each writes, rank 0 sees only its own."""
    original = files.write

    def write(path: Path, chunks: Any) -> int:
        size = original(path, chunks)
        if path.name == "rank-00001.safetensors":
            path.unlink()
        return size

    monkeypatch.setattr(files, "write", write)
    for error in on_ranks(2, lambda m: save(tmp_path, share(2, m.rank, 2), m)):
        assert isinstance(error, RunError)
        assert "rank-00001.safetensors" in error.message
        assert "share" in (error.hint or "")


def test_a_folder_that_cannot_be_made(tmp_path: Path, on_ranks: OnRanks) -> None:
    (tmp_path / "file").write_text("not a folder")
    errors = on_ranks(2, lambda m: save(tmp_path / "file" / "c", share(1, m.rank, 2), m))
    assert {type(error) for error in errors} == {RunError}
    assert "Not a directory" in errors[0].message


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk here; RLIMIT_FSIZE and fakes cover the rest")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(tiny_disk: Path, on_ranks: OnRanks) -> None:
    """400 KiB hold one checkpoint of 160 kB and not another of 320 kB."""
    folder = tiny_disk / "checkpoints"
    on_ranks(3, lambda m: save(folder, share(1, m.rank, 3), m))
    before = os.statvfs(tiny_disk).f_bavail
    for _ in range(2):
        errors = on_ranks(3, lambda m: save(folder, share(2, m.rank, 3, rows=2 * ROWS), m))
        assert {type(error) for error in errors} == {DiskFull}
        assert "No space left on device" in errors[0].message
        check_only_step_1_is_there(folder)
        assert os.statvfs(tiny_disk).f_bavail == before
    (tiny_disk / "ballast").write_bytes(bytes(100_000))
    (tiny_disk / "model.safetensors").write_text("of yesterday")
    with pytest.raises(DiskFull, match=r"model\.safetensors could not be written"):
        export(Checkpoint.open(folder / "step-000000001"), tiny_disk / "model.safetensors")
    assert (tiny_disk / "model.safetensors").read_text() == "of yesterday"
    assert len(list(tiny_disk.iterdir())) == 3


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    save(tmp_path, share(1), Alone())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DiskFull, match="File too large"):
            save(tmp_path, share(2), Alone())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_only_step_1_is_there(tmp_path)
