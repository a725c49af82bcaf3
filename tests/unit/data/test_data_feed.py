"""The feed: any cut of a step gives the same examples; files are decoded, and bad ones named."""

import gc
import itertools
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shoal.data import Batch, open_feed
from shoal.data.feed import Feed
from shoal.data.order import order
from shoal.errors import BadExample
from shoal.recipe import SourceSpec

Write = Callable[..., Path]


def feed_of(source: Any, batch_size: int = 50, **options: Any) -> Feed:
    given = {"seed": 0, "shuffle": True, "on_bad_example": "raise", **options}
    return open_feed(SourceSpec.model_validate(source), batch_size=batch_size, **given)


def joined(parts: list[Batch]) -> Batch:
    names = ("inputs", "targets", "ids", "rows")
    tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Batch(**tensors, bad=tuple(record for part in parts for record in part.bad))


def assert_equal(first: Batch, second: Batch) -> None:
    for name in ("inputs", "targets", "ids", "rows"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert first.bad == second.bad


def cuts(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size), max_size=6).map(lambda inner: [0, *sorted(inner), size])


@pytest.fixture(scope="module")
def digits_resized() -> Feed:
    transform = {"image_size": 19, "augment": "crop_flip"}
    return feed_of({"source": "digits:train", "transform": transform})


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_cut_of_a_step_reads_the_same(digits_resized: Feed, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 100))
    size = digits_resized.batch_examples(step)
    borders = data.draw(cuts(size))
    whole = digits_resized.read(step, 0, size)
    parts = [digits_resized.read(step, a, b) for a, b in itertools.pairwise(borders)]
    assert_equal(joined(parts), whole)


@pytest.fixture
def photos(write_folder: Write) -> Path:
    root = write_folder("photos", {"cat": 13, "dog": 10}, size=(20, 14), suffix="jpg")
    (root / "cat" / "005.jpg").write_bytes(b"not an image")
    cut = root / "dog" / "003.jpg"
    cut.write_bytes(cut.read_bytes()[:-60])
    return root


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_cut_of_files_reads_the_same(photos: Path, data: st.DataObject) -> None:
    source = {"source": str(photos), "transform": {"image_size": 9, "augment": "crop_flip"}}
    with feed_of(source, 10, on_bad_example="skip") as feed:
        step = data.draw(st.integers(0, 8))
        size = feed.batch_examples(step)
        borders = data.draw(cuts(size))
        parts = [feed.read(step, a, b) for a, b in itertools.pairwise(borders)]
        assert_equal(joined(parts), feed.read(step, 0, size))


def test_an_epoch_has_every_example_once_and_the_next_another_order() -> None:
    feed = feed_of("digits:train", 100)
    assert (feed.examples, feed.steps_per_epoch) == (1437, 15)
    assert [feed.batch_examples(step) for step in (0, 13, 14, 15)] == [100, 100, 37, 100]
    batches = [feed.read(step, 0, feed.batch_examples(step)) for step in range(30)]
    first, second = (torch.cat([b.ids for b in batches[a : a + 15]]) for a in (0, 15))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(1437))
    assert not torch.equal(first, second)
    assert (first.numpy() == order(np.arange(1437), examples=1437, seed=0, epoch=0)).all()


def test_the_order_across_the_blocks_that_a_feed_keeps(write_idx: Write) -> None:
    root = str(write_idx(train=10_000))
    feed = feed_of(root, 4500)
    ids = torch.cat([feed.read(step, 0, feed.batch_examples(step)).ids for step in (0, 1, 2)])
    assert (ids.numpy() == order(np.arange(10_000), examples=10_000, seed=0, epoch=0)).all()
    late = feed.read(3, 4000, 4200).ids.numpy()
    expected = order(np.arange(4000, 4200), examples=10_000, seed=0, epoch=1)
    assert (late == expected).all()


def test_without_shuffling_the_order_is_the_files() -> None:
    feed = feed_of("digits:test", 100, shuffle=False)
    ids = torch.cat([feed.read(step, 0, feed.batch_examples(step)).ids for step in range(4)])
    assert ids.tolist() == list(range(360))


def test_targets_go_with_their_images() -> None:
    from shoal.data.sources import Digits

    loaded = Digits().load("train")
    feed = feed_of({"source": "digits:train", "transform": {"normalize": False}})
    batch = feed.read(3, 5, 45)
    assert (batch.targets.numpy() == loaded.labels[batch.ids]).all()
    assert (batch.inputs.numpy() == loaded.pixels[batch.ids] / np.float32(16)).all()
    assert batch.rows.tolist() == list(range(5, 45))
    assert len(batch) == 40


def test_positions_state_and_what_the_feed_knows() -> None:
    feed = feed_of("digits:train", 100)
    assert feed.position(0) == {"epoch": 0, "position": 0}
    assert feed.position(31) == {"epoch": 2, "position": 100}
    assert feed.classes == tuple("0123456789")
    assert feed.fingerprint == feed.description.fingerprint
    for step, start, stop in ((-1, 0, 1), (0, 0, 101), (14, 0, 38), (0, 5, 4), (0, -1, 4)):
        with pytest.raises(IndexError):
            feed.read(step, start, stop)
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        feed_of("digits", 0)


def test_empty_ranges_have_the_right_shapes(photos: Path) -> None:
    transform = {"image_size": 17, "augment": "crop_flip"}
    for source, shape in (
        ({"source": "digits:train", "transform": transform}, (0, 1, 17, 17)),
        ({"source": "digits:train"}, (0, 1, 8, 8)),
        ({"source": str(photos), "transform": transform}, (0, 3, 17, 17)),
    ):
        with feed_of(source, 10) as feed:
            batch = feed.read(1, 4, 4)
        assert batch.inputs.shape == shape
        assert batch.inputs.dtype == torch.float32
        assert batch.targets.shape == batch.ids.shape == batch.rows.shape == (0,)
        assert batch.ids.dtype == batch.targets.dtype == batch.rows.dtype == torch.int64


def test_augmentation_is_the_example_s_own_and_for_training_only() -> None:
    source = {"source": "digits:train", "transform": {"augment": "crop_flip"}}
    feed, other_batches = feed_of(source, 50), feed_of(source, 33)
    rows = {}
    for step in range(29):
        batch = feed.read(step, 0, feed.batch_examples(step))
        rows.update(zip(batch.ids.tolist(), batch.inputs, strict=True))
    for step in range(5):
        batch = other_batches.read(step, 0, 33)
        for example, image in zip(batch.ids.tolist(), batch.inputs, strict=True):
            assert torch.equal(image, rows[example])
    plain = feed_of("digits:train", 50)
    assert not torch.equal(plain.read(0, 0, 50).inputs, feed.read(0, 0, 50).inputs)
    evaluated = feed_of(source, 50, shuffle=False).read(0, 0, 50)
    assert torch.equal(
        evaluated.inputs, feed_of("digits:train", 50, shuffle=False).read(0, 0, 50).inputs
    )


def test_files_decode_to_their_pixels(write_folder: Write) -> None:
    root = write_folder("photos", {"cat": 3, "dog": 4})
    with feed_of(
        {"source": str(root), "transform": {"normalize": False}}, 7, shuffle=False
    ) as feed:
        batch = feed.read(0, 0, 7)
    assert batch.targets.tolist() == [0, 0, 0, 1, 1, 1, 1]
    for row, name in ((0, "cat/000.png"), (6, "dog/003.png")):
        expected = np.asarray(Image.open(root / name)).transpose(2, 0, 1) / np.float32(255)
        assert (batch.inputs[row].numpy() == expected).all()


def test_a_bad_image_is_named_under_raise(photos: Path) -> None:
    with feed_of(str(photos), 23, shuffle=False) as feed:
        with pytest.raises(BadExample, match=r"cat/005.jpg cannot be read: not an image") as caught:
            feed.read(0, 0, 23)
        assert "and 1 more" in str(caught.value)
        assert caught.value.step == 0
        with pytest.raises(BadExample, match=r"dog/003.jpg cannot be read: .*truncated"):
            feed.read(0, 13, 23)
        assert len(feed.read(0, 6, 13)) == 7


def test_a_bad_image_is_left_out_under_skip_and_the_others_stay(
    photos: Path, write_folder: Write
) -> None:
    whole = write_folder("whole", {"cat": 13, "dog": 10}, size=(20, 14), suffix="jpg")
    with (
        feed_of(str(photos), 23, on_bad_example="skip") as feed,
        feed_of(str(whole), 23) as undamaged,
    ):
        batch, full = feed.read(0, 0, 23), undamaged.read(0, 0, 23)
    assert {record.id for record in batch.bad} == {5, 16}
    assert {Path(record.where).name for record in batch.bad} == {"005.jpg", "003.jpg"}
    assert all(record.why for record in batch.bad)
    kept = ~torch.isin(full.ids, torch.tensor([5, 16]))
    for name in ("inputs", "targets", "ids", "rows"):
        assert torch.equal(getattr(batch, name), getattr(full, name)[kept]), name


def test_empty_vanished_and_wholly_bad_batches(write_folder: Write) -> None:
    root = write_folder("photos", {"cat": 4})
    with feed_of(str(root), 4, shuffle=False, on_bad_example="skip") as feed:
        (root / "cat" / "000.png").write_bytes(b"")
        (root / "cat" / "001.png").unlink()
        batch = feed.read(0, 0, 4)
        assert batch.ids.tolist() == [2, 3]
        assert [record.why for record in batch.bad] == [
            "the file is empty",
            "No such file or directory",
        ]
        nothing = feed.read(0, 0, 2)
    assert nothing.inputs.shape == (0, 3, 12, 12)
    assert len(nothing.bad) == 2


def test_pillow_s_warnings_stay_inside(
    write_folder: Write, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    root = write_folder("photos", {"cat": 2}, size=(20, 20))
    palette = Image.new("RGB", (20, 20), "red").convert("P")
    palette.save(root / "cat" / "p.png", transparency=bytes([0, 255]))
    # 400 pixels are then between the size that Pillow warns of and the one that it refuses.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    warnings.simplefilter("always")
    with feed_of(str(root), 3) as feed:
        assert len(feed.read(0, 0, 3)) == 3
    assert [str(warning.message) for warning in recwarn] == []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with feed_of(str(root), 3) as feed, pytest.raises(BadExample, match="exceeds limit"):
        feed.read(0, 0, 3)


def test_prefetching_changes_nothing(photos: Path) -> None:
    with feed_of(str(photos), 8, on_bad_example="skip") as feed:
        expected = [feed.read(step, 2, 7) for step in range(2)]
        feed.prefetch(0, 2, 7)
        feed.prefetch(0, 2, 7)
        assert_equal(feed.read(0, 2, 7), expected[0])
        feed.prefetch(1, 2, 7)
        assert_equal(feed.read(0, 2, 7), expected[0])
        assert_equal(feed.read(1, 2, 7), expected[1])
        feed.prefetch(0, 0, 8)
        feed.prefetch(1, 2, 7)
        assert_equal(feed.read(1, 2, 7), expected[1])
    memory = feed_of("digits:train")
    memory.prefetch(0, 0, 50)
    assert len(memory.read(0, 0, 50)) == 50


def test_prefetching_decodes_while_others_work(
    write_folder: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shoal.data import readers

    root = write_folder("photos", {"cat": 4})
    decoded = threading.Event()

    def watched(path: Path, size: int) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        decoded.set()
        return np.zeros((3, size, size), dtype=np.uint8)

    monkeypatch.setattr(readers, "decode", watched)
    with feed_of(str(root), 4) as feed:
        feed.prefetch(0, 0, 4)
        assert decoded.wait(5)
        assert len(feed.read(0, 0, 4)) == 4


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("shoal-decode")]


def test_no_thread_is_left_behind(write_folder: Write) -> None:
    root = write_folder("photos", {"cat": 4})
    feed = feed_of(str(root), 4)
    feed.prefetch(0, 0, 4)
    feed.close()
    assert decoding_threads() == []
    assert len(feed.read(0, 0, 4)) == 4
    del feed
    gc.collect()
    limit = time.monotonic() + 60
    while decoding_threads() and time.monotonic() < limit:
        time.sleep(0.01)
    assert decoding_threads() == []


def test_a_batch_moves_and_changes_type() -> None:
    batch = feed_of("digits:train").read(0, 0, 4)
    moved = batch.to("cpu", torch.float64, channels_last=True)
    assert moved.inputs.dtype == torch.float64
    assert moved.inputs.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved.inputs.float(), batch.inputs)
    assert moved.targets.dtype == moved.ids.dtype == torch.int64
