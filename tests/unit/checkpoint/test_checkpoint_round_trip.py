import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.checkpoint import Alone, Checkpoint, Piece, Snapshot, export, newest_valid, save
from shoal.errors import RanksDiffer, ReplicasDiffer, RunError
from shoal.layout import Part, Slice

OnRanks = Callable[..., list[Any]]


def snapshot(tensors: dict[str, Tensor], step: int = 400, **changes: Any) -> Snapshot:
    return pieces({name: Piece.whole(t) for name, t in tensors.items()}, step, **changes)


def pieces(held: dict[str, Piece], step: int = 400, **changes: Any) -> Snapshot:
    values: dict[str, Any] = {
        "fingerprint": "f00d",
        "strategy": "dp3",
        "position": {"epoch": 2, "step": step},
        **changes,
    }
    return Snapshot(step=step, tensors=held, **values)


def rows(tensor: Tensor, start: int, stop: int) -> Piece:
    offset = (start, *(0 for _ in tensor.shape[1:]))
    cut = tensor[start:stop]
    return Piece(cut, Part.of(Slice(tuple(tensor.shape), offset, tuple(cut.shape))))


def fail(error: Exception) -> None:
    raise AssertionError(error)


def same_bits(a: Tensor, b: Tensor) -> bool:
    def bits(t: Tensor) -> Tensor:
        return t.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def every_kind() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(4, 3, 5, 5, generator=generator)
    return {
        "float64": torch.randn(3, 2, generator=generator, dtype=torch.float64),
        "float32": torch.tensor([1.0, -0.0, float("nan"), float("inf"), 1e-42]),
        "float16": torch.randn(7, generator=generator).half(),
        "bfloat16": torch.randn(5, 3, generator=generator).bfloat16(),
        "float8": torch.randn(5, generator=generator).to(torch.float8_e4m3fn),
        "complex64": torch.randn(3, generator=generator, dtype=torch.complex64).conj(),
        "int64": torch.tensor([2**62 + 1, -5]),
        "uint8": torch.arange(9, dtype=torch.uint8),
        "bool": torch.tensor([[True, False, True]]),
        "scalar": torch.tensor(7),
        "scalar32": torch.tensor(0.1),
        "empty": torch.zeros(0, 3),
        "empty64": torch.zeros(4, 0, dtype=torch.float64),
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "strided": torch.arange(20)[::3],
        "expanded": torch.tensor([1.5]).expand(4),
        "channels_last": image.to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(2, 2, generator=generator)),
    }


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    given_tensors = every_kind()
    saved = save(tmp_path, snapshot(given_tensors), Alone())
    read = Checkpoint.open(saved.path)
    read.verify()
    assert read.names == tuple(given_tensors)
    for name, tensor in given_tensors.items():
        result = read.read(name)
        assert same_bits(result, tensor.detach().resolve_conj()), name
        assert result.is_contiguous()
        assert not result.requires_grad
    assert saved.bytes == sum(path.stat().st_size for path in saved.path.iterdir())


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    given_tensors = every_kind()
    saved = save(tmp_path, snapshot(given_tensors), Alone())
    loaded = safetensors.torch.load_file(saved.path / "rank-00000.safetensors")
    assert loaded.keys() == given_tensors.keys()
    for name, tensor in given_tensors.items():
        assert same_bits(loaded[name], tensor.detach().resolve_conj()), name


def test_the_manifest_says_what_was_given(tmp_path: Path) -> None:
    weight = torch.ones(2, 3)
    given_snapshot = snapshot(
        {"embed": weight, "embed/exp_avg": weight * 2},
        sync={"outer": 1},
        train={"best": {"step": 300, "value": 0.25}, 7: "seven", 10: "ten"},
        optimizer={"groups": []},
        aliases={"head": "embed"},
    )
    saved = save(tmp_path, given_snapshot, Alone())
    assert saved.path == tmp_path / "step-000000400"
    read = Checkpoint.open(saved.path)
    manifest = json.loads((saved.path / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["strategy"] == "dp3"
    assert manifest["fingerprint"] == "f00d"
    assert read.manifest.position == {"epoch": 2, "step": 400}
    assert read.manifest.sync == {"outer": 1}
    assert read.manifest.train["best"]["value"] == 0.25
    assert read.manifest.train["7"] == "seven"
    assert read.step == 400
    assert read.weights == ("embed",)
    assert torch.equal(read.read("head"), weight)
    assert "head" in read
    assert "tail" not in read


def cut(tensors: dict[str, Tensor], rank: int, size: int) -> dict[str, Piece]:
    def bounds(n: int) -> tuple[int, int]:
        return n * rank // size, n * (rank + 1) // size

    held = {name: rows(t, *bounds(len(t))) for name, t in tensors.items() if t.dim()}
    return held | {name: Piece.whole(t) for name, t in tensors.items() if not t.dim()}


def test_three_ranks_save_slices_and_others_are_read(tmp_path: Path, on_ranks: OnRanks) -> None:
    whole = {
        "weight": torch.arange(70.0).reshape(7, 10),
        "bias": torch.arange(2, dtype=torch.bfloat16),  # rank 0 holds none of its two rows
        "count": torch.tensor(5),
        "empty": torch.zeros(0, 2),
    }
    results = on_ranks(3, lambda m: save(tmp_path, pieces(cut(whole, m.rank, m.size)), m))
    assert len({(saved.path, saved.bytes) for saved in results}) == 1
    read = newest_valid(tmp_path, fail)
    assert read is not None
    assert len(read.manifest.files) == 3
    for name, tensor in whole.items():
        assert same_bits(read.read(name), tensor), name
    middle = Slice((7, 10), (1, 3), (4, 5))
    assert torch.equal(read.read("weight", middle), whole["weight"][1:5, 3:8])
    assert read.read("weight", Slice((7, 10), (7, 0), (0, 10))).shape == (0, 10)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_layout_reads_as_any_other(
    tmp_path: Path, on_ranks: OnRanks, data: st.DataObject
) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    size = data.draw(st.integers(1, 4))
    saved = on_ranks(size, lambda m: save(tmp_path, pieces(cut({"t": tensor}, m.rank, size)), m))
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    part = Slice(shape, tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
    expected = tensor[tuple(slice(a, b) for a, b in ends)]
    assert torch.equal(Checkpoint.open(saved[0].path).read("t", part), expected)


def test_replicas_share_the_writing(tmp_path: Path, on_ranks: OnRanks) -> None:
    whole = {f"layer.{i}": torch.full((64, 4), float(i)) for i in range(9)}
    saved = on_ranks(3, lambda m: save(tmp_path, snapshot(whole), m))
    manifest = Checkpoint.open(saved[0].path).manifest
    written = Counter(entry.file for entry in manifest.tensors)
    assert list(written.values()) == [3, 3, 3]
    assert len(manifest.tensors) == 9


def test_replicas_that_differ_are_not_saved(tmp_path: Path, on_ranks: OnRanks) -> None:
    def work(meeting: Any) -> Any:
        weight = torch.zeros(4)
        weight[2] = 1e-7 if meeting.rank == 1 else 0.0
        return save(tmp_path, snapshot({"bias": torch.ones(2), "fc.weight": weight}), meeting)

    errors = on_ranks(3, work)
    assert {str(error) for error in errors} == {str(errors[0])}
    assert isinstance(errors[0], ReplicasDiffer)
    assert errors[0].rank == 1
    assert "fc.weight" in errors[0].message
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_are_not_at_the_same_step_are_named(tmp_path: Path, on_ranks: OnRanks) -> None:
    errors = on_ranks(
        2, lambda m: save(tmp_path, snapshot({"a": torch.ones(1)}, step=4 + m.rank), m)
    )
    for error in errors:
        assert isinstance(error, RanksDiffer)
        assert "step is 5 on rank 1 and 4 on rank 0" in error.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("held", "kind", "message"),
    [
        ([rows(torch.ones(4), 0, 2), rows(torch.ones(4), 3, 4)], RunError, "1 of 4 elements"),
        ([rows(torch.ones(4), 0, 3), rows(torch.ones(4), 2, 4)], RunError, "overlap"),
        (
            [rows(torch.ones(4), 0, 2), rows(torch.ones(4).double(), 2, 4)],
            RanksDiffer,
            "float32 .* and float64",
        ),
        ([rows(torch.ones(4), 0, 2), rows(torch.ones(6), 2, 6)], RanksDiffer, "different ranks"),
    ],
)
def test_pieces_that_do_not_fit_are_refused_on_all_ranks(
    tmp_path: Path, on_ranks: OnRanks, held: list[Piece], kind: type[RunError], message: str
) -> None:
    errors = on_ranks(2, lambda m: save(tmp_path, pieces({"fc.weight": held[m.rank]}), m))
    for error in errors:
        assert isinstance(error, kind)
        with pytest.raises(kind, match=message):
            raise error
        assert "fc.weight" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_cannot_hold_is_refused_by_name(tmp_path: Path, on_ranks: OnRanks) -> None:
    odd = torch.zeros(2, dtype=torch.complex128)

    def work(meeting: Any) -> Any:
        tensors = {"fine": torch.ones(2)} if meeting.rank == 0 else {"odd": odd}
        return save(tmp_path, snapshot(tensors), meeting)

    for error in on_ranks(2, work):
        assert isinstance(error, RunError)
        assert "odd" in error.message
        assert "complex128" in error.message
        assert error.rank == 1
        assert error.traceback is not None
    with pytest.raises(RunError, match="sparse"):
        save(tmp_path, snapshot({"s": torch.eye(2).to_sparse()}), Alone())
    with pytest.raises(RunError, match="reserves"):
        save(tmp_path, snapshot({"__metadata__": torch.eye(2)}), Alone())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("item", ["position", "train"])
def test_infinity_in_the_manifest_is_refused_not_changed(tmp_path: Path, item: str) -> None:
    with pytest.raises(RunError, match="JSON"):
        save(tmp_path, snapshot({"a": torch.ones(1)}, **{item: {"x": float("inf")}}), Alone())
    assert list(tmp_path.iterdir()) == []


def test_a_piece_must_have_its_slices_shape() -> None:
    with pytest.raises(ValueError, match=r"cannot be \["):
        Piece(torch.ones(3), Part.whole((4,)))


def test_asking_for_what_is_not_there(tmp_path: Path) -> None:
    read = Checkpoint.open(save(tmp_path, snapshot({"fc.weight": torch.ones(2)}), Alone()).path)
    with pytest.raises(RunError, match=r"no tensor 'fc\.wieght'") as caught:
        read.read("fc.wieght")
    assert caught.value.hint is not None
    assert "fc.weight" in caught.value.hint
    with pytest.raises(RunError, match=r"\(3,\) is asked for"):
        read.read("fc.weight", Slice.whole((3,)))


def test_export_is_plain_weights(tmp_path: Path, on_ranks: OnRanks) -> None:
    whole = {
        "embed.weight": torch.arange(12.0).reshape(4, 3),
        "embed.weight/exp_avg": torch.ones(4, 3),
        "norm.num_batches_tracked": torch.tensor(3),
        "odd/name": torch.ones(2),
    }

    def work(meeting: Any) -> Any:
        held = pieces(cut(whole, meeting.rank, 2), aliases={"head.weight": "embed.weight"})
        return save(tmp_path / "c", held, meeting)

    read = Checkpoint.open(on_ranks(2, work)[0].path)
    out = tmp_path / "new" / "model.safetensors"
    exported = export(read, out)
    loaded = safetensors.torch.load_file(out)
    assert exported.tensors == len(loaded) == 4
    assert exported.bytes == out.stat().st_size
    assert torch.equal(loaded.pop("head.weight"), whole["embed.weight"])
    for name, tensor in loaded.items():
        assert same_bits(tensor, whole[name])
    assert [path.name for path in out.parent.iterdir()] == ["model.safetensors"]
