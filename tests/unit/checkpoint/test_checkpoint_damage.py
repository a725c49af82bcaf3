"""Every way in which a checkpoint can be other than what was written, found and named."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash

import shoal.checkpoint
from shoal.checkpoint import (
    Alone,
    Checkpoint,
    Piece,
    Snapshot,
    checkpoint_path,
    discard_after,
    list_checkpoints,
    newest_valid,
    prune,
    save,
)
from shoal.errors import CheckpointDamaged

FILE = "rank-00000.safetensors"


def save_step(folder: Path, step: int, value: float | None = None) -> Path:
    weight = torch.full((16, 4), float(step) if value is None else value)
    snapshot = Snapshot(
        step=step,
        tensors={"weight": Piece.whole(weight), "bias": Piece.whole(torch.ones(4))},
        fingerprint="f00d",
        strategy="single",
        position={"step": step},
    )
    return save(folder, snapshot, Alone()).path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    save_step(tmp_path, 300)
    save_step(tmp_path, 400)
    return tmp_path


def flip_bit(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def flip_in_tensor(path: Path) -> None:
    flip_bit(path / FILE, -100)


def flip_in_header(path: Path) -> None:
    content = (path / FILE).read_bytes()
    (path / FILE).write_bytes(content.replace(b"weight", b"weighu", 1))


def truncate_tensors(path: Path) -> None:
    content = (path / FILE).read_bytes()
    (path / FILE).write_bytes(content[:-8])


def empty_tensors(path: Path) -> None:
    (path / FILE).write_bytes(b"")


def lose_tensors(path: Path) -> None:
    (path / FILE).unlink()


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_manifest(path: Path) -> None:
    content = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(content[: len(content) // 2])


def flip_in_manifest(path: Path) -> None:
    content = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(content.replace(b'"step": 400', b'"step": 500', 1))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and sign it again: what its own checksum cannot find."""
    values = json.loads((path / "manifest.json").read_text())
    del values["checksum"]
    change(values)
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    values["checksum"] = xxhash.xxh3_128_hexdigest(canonical.encode())
    (path / "manifest.json").write_text(json.dumps(values))


def change(key: str, value: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda values: values.update({key: value}))


def change_entry(**changes: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda values: values["tensors"][0].update(changes))


def drop(key: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda values: values.pop(key))


def other_dtype(path: Path) -> None:
    """A file as long as the one that was written, of another type."""
    tensors = safetensors.torch.load_file(path / FILE)
    size = (path / FILE).stat().st_size
    weight = tensors["weight"].view(torch.int32)
    safetensors.torch.save_file(tensors | {"weight": weight}, path / FILE, {"format": "pt"})
    assert (path / FILE).stat().st_size == size


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip_in_tensor, rf"{FILE} is damaged: the checksum of weight"),
    "flipped header": (flip_in_header, rf"{FILE} is damaged"),
    "truncated": (truncate_tensors, rf"{FILE} is damaged: it has \d+ bytes of \d+"),
    "empty": (empty_tensors, rf"{FILE} is damaged: it has 0 bytes"),
    "missing": (lose_tensors, rf"{FILE} is damaged: No such file"),
    "other dtype": (other_dtype, "weight is torch.int32 .* the manifest says torch.float32"),
    "no manifest": (lose_manifest, "manifest.json is damaged: No such file"),
    "half a manifest": (cut_manifest, "manifest.json is damaged: it is not whole JSON"),
    "changed manifest": (flip_in_manifest, "manifest.json is damaged: its checksum"),
    "not a mapping": (
        lambda path: (path / "manifest.json").write_text("[]"),
        "manifest.json is damaged: it has no key `format`",
    ),
    "not text": (
        lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"),
        "manifest.json is damaged: it is not whole JSON",
    ),
    "other format": (change("format", 2), "its format is 2, and this version of Shoal reads 1"),
    "no step": (drop("step"), "step: Field required"),
    "text as step": (change("step", "400"), "step: Input should be a valid integer"),
    "unknown dtype": (change_entry(dtype="float31"), "weight has an unknown dtype 'float31'"),
    "wrong dtype": (change_entry(dtype="float64"), "manifest says torch.float64"),
    "outside": (change_entry(offset=[1, 0]), "1:17 reaches out of dimension 0"),
    "hole": (change_entry(shape=[15, 4]), "weight: 4 of 64 elements"),
    "other folder": (change_entry(file="../x.safetensors"), "tensors.0.file"),
    "unknown file": (change_entry(file="x.safetensors"), "x.safetensors is not among its files"),
    "unknown key": (change_entry(key="w"), rf"{FILE} is damaged: .*w"),
    "alias of nothing": (change("aliases", {"head": "tail"}), "head stands for tail"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_one_before_is_used(two: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(two / "step-000000400")
    with pytest.raises(CheckpointDamaged, match=message) as caught:
        Checkpoint.open(two / "step-000000400").verify()
    assert "step-000000400" in str(caught.value)
    named: list[CheckpointDamaged] = []
    found = newest_valid(two, named.append)
    assert found is not None
    assert found.step == 300
    assert [str(error) for error in named] == [str(caught.value)]


def test_reading_finds_a_flipped_bit_without_verify(two: Path) -> None:
    flip_in_tensor(two / "step-000000400")
    read = Checkpoint.open(two / "step-000000400")
    assert torch.equal(read.read("bias"), torch.ones(4))
    with pytest.raises(CheckpointDamaged, match="checksum of weight"):
        read.read("weight")


def test_all_damaged_lists_them(two: Path) -> None:
    flip_in_tensor(two / "step-000000300")
    cut_manifest(two / "step-000000400")
    with pytest.raises(CheckpointDamaged) as caught:
        newest_valid(two, lambda error: None)
    assert "step-000000300" in str(caught.value)
    assert "step-000000400" in str(caught.value)
    assert caught.value.exit_status == 3


def test_none_where_nothing_was_ever_saved(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nothing", print) is None
    assert newest_valid(tmp_path, print) is None
    assert list_checkpoints(tmp_path / "nothing") == ()


def test_a_half_written_folder_is_named_ignored_and_later_removed(two: Path) -> None:
    half = two / ".step-000000500.tmp"
    shutil.copytree(two / "step-000000400", half)
    (half / "manifest.json").unlink()
    named: list[CheckpointDamaged] = []
    found = newest_valid(two, named.append)
    assert found is not None
    assert found.step == 400
    assert [".step-000000500.tmp is half-written" in str(error) for error in named] == [True]
    save_step(two, 450)
    assert sorted(path.name for path in two.iterdir()) == [
        "step-000000300",
        "step-000000400",
        "step-000000450",
    ]


def test_only_a_half_written_one_means_none(tmp_path: Path) -> None:
    (tmp_path / ".step-000000001.tmp").mkdir()
    named: list[CheckpointDamaged] = []
    assert newest_valid(tmp_path, named.append) is None
    assert len(named) == 1


def test_a_checkpoint_of_the_same_step_is_replaced(two: Path) -> None:
    save_step(two, 400, value=-1.0)
    assert list_checkpoints(two) == (300, 400)
    assert Checkpoint.open(two / "step-000000400").read("weight")[0, 0] == -1
    assert len(list(two.iterdir())) == 2


@pytest.mark.parametrize("committed", [False, True])
def test_a_crash_while_replacing_loses_neither(two: Path, committed: bool) -> None:
    """Killed between the renames, or after both and before the old one was removed."""
    final, aside = two / "step-000000400", two / ".step-000000400.old"
    final.rename(aside)
    if committed:
        save_step(two / "elsewhere", 400, value=-1.0).rename(final)
        (two / "elsewhere").rmdir()
    found = newest_valid(two, print)
    assert found is not None
    assert found.step == 400
    assert found.read("weight")[0, 0] == (-1 if committed else 400)
    assert checkpoint_path(two, 400) == (final if committed else aside)
    save_step(two, 500)
    assert sorted(path.name for path in two.iterdir()) == [
        "step-000000300",
        "step-000000400",
        "step-000000500",
    ]
    assert Checkpoint.open(final).read("weight")[0, 0] == (-1 if committed else 400)


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_step(tmp_path, step)
    assert prune(tmp_path, keep=2, also={3, 99}) == (1, 2, 4)
    assert list_checkpoints(tmp_path) == (3, 5, 6)
    assert prune(tmp_path, keep=10) == ()
    with pytest.raises(ValueError, match="at least one"):
        prune(tmp_path, keep=0)
    assert discard_after(tmp_path, 3) == (5, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (2_000_000_000, 999_999_999):
        save_step(tmp_path, step)
    (tmp_path / "step-12").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert list_checkpoints(tmp_path) == (999_999_999, 2_000_000_000)


def test_nothing_is_unpickled() -> None:
    unsafe = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for file in Path(shoal.checkpoint.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = {alias.name.partition(".")[0] for alias in node.names}
                assert not modules & unsafe, file
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in unsafe, file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}
