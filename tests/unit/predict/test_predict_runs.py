"""Predictions with the members of trained runs: every way, files, faults."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from pyarrow import parquet

import shoal
from predicting import trained
from shoal.errors import CheckpointDamaged, Refused, RunFolderError, UsageError
from shoal.predict import Options, parts
from shoal.predict.bench import Bench
from shoal.predict.choosing import best, greedy_soup, make_one, matched
from shoal.predict.comparing import compare_with
from shoal.predict.members import members_of
from shoal.predict.merging import average
from shoal.run import Run


@pytest.fixture(scope="module")
def solo(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("solo") / "run", "single/solo:init=own:members=3")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain") / "run")


def test_an_ensemble_is_the_mean_of_its_members(solo):
    bench = Bench(members_of([solo], skip_damaged=False).members)
    found = shoal.predict(solo, "digits:test")
    feed = bench.setting(0).workload.evaluation
    expected = 0
    for number in range(3):
        model = bench.model(number)
        batches = (feed.read(s, 0, feed.batch_examples(s)) for s in range(feed.steps_per_epoch))
        expected = expected + np.concatenate(
            [model(b.inputs).detach().double().softmax(1).numpy() for b in batches]
        )
    assert np.allclose(found.probabilities, expected / 3, atol=1e-6)
    assert found.rows.ids.tolist() == list(range(360))
    assert found.metrics["accuracy"] == (found.predicted == found.rows.labels).mean()
    assert (found.members, found.forward_passes) == (3, 3)


def test_a_soup_is_never_worse_on_selection_than_the_best(solo):
    bench = Bench(members_of([solo], skip_damaged=False).members)
    used, soup = greedy_soup(bench, bench.states())
    assert used[0] == best(bench)
    assert bench.scores_of(soup).accuracy >= bench.scores(best(bench)).accuracy
    assert max(bench.scores(n).rank for n in range(3)) == bench.scores(best(bench)).rank


def test_matching_brings_independent_members_nearer(solo):
    bench = Bench(members_of([solo], skip_damaged=False).members)
    states = bench.states()
    aligned = matched(bench, states)

    def loss(those):
        return bench.scores_of(average(those)).loss

    assert loss(aligned) < loss(states)
    # Members that were matched are the same functions.
    assert bench.scores_of(aligned[1]).loss == pytest.approx(bench.scores(1).loss, rel=1e-5)


def test_an_average_across_a_barrier_is_warned_of(solo):
    notes = make_one("mean", Bench(members_of([solo], skip_damaged=False).members)).notes
    assert "crosses a barrier" in notes[0]


def test_statistics_are_estimated_and_not_averaged(tmp_path):
    model = {"name": "resnet", "depth": 18, "width": 4}
    run = trained(tmp_path / "run", "single/solo:members=2", model=model, steps=2)
    bench = Bench(members_of([run], skip_damaged=False).members)
    states = bench.states()
    plain, made = average(states), make_one("mean", bench).state
    moved = [key for key in plain if not np.array_equal(plain[key], made[key])]
    assert moved
    assert all("running_" in key or "num_batches" in key for key in moved)
    assert "layer4.1.bn2.running_var" in moved


def test_one_model_predicts_and_cannot_be_merged(plain):
    found = shoal.predict(plain)
    assert (found.how, found.members, len(found.rows.ids)) == ("ensemble", 1, 360)
    for how in ("mean", "greedy-soup", "matched-mean"):
        with pytest.raises(UsageError, match="there is one"):
            shoal.predict(plain, how=how)
    with pytest.raises(UsageError, match="must be one of"):
        shoal.predict(plain, how="median")


def test_choosing_on_what_was_trained_on_is_said(plain, solo):
    found = shoal.predict([plain, solo], how="best")
    assert any("favours what has overfitted" in note for note in found.notes)


def test_unlike_models_predict_together_and_are_not_merged(solo, tmp_path):
    wide = trained(tmp_path / "wide", model={"name": "mlp", "widths": [8]}, steps=2)
    assert shoal.predict([solo, wide]).members == 4
    with pytest.raises(Refused, match=r"wide are unlike models: 1.weight has shape \[16, 64\]"):
        shoal.predict([solo, wide], how="mean")


def _photos(folder, names):
    from PIL import Image

    random = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return str(folder)


def test_other_classes_are_refused_and_photos_without_classes_are_not(solo, tmp_path):
    photos = _photos(tmp_path / "photos", ["cat", "dog"])
    run = trained(tmp_path / "run", data={"train": photos}, steps=2, batch_size=4)
    with pytest.raises(Refused, match="other classes: 0, 1"):
        shoal.predict([solo, run])
    loose = tmp_path / "loose"
    shutil.copytree(tmp_path / "photos" / "dog", loose)
    out = tmp_path / "out.csv"
    found = shoal.predict(run, str(loose), out=out)
    assert found.metrics == {}
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png", "3.png"]
    assert {row["label"] for row in rows} == {""}
    assert {row["predicted"] for row in rows} <= {"cat", "dog"}
    # One class of the two that it knows: its label goes by the name.
    only = tmp_path / "only"
    shutil.copytree(tmp_path / "photos" / "dog", only / "dog")
    assert set(shoal.predict(run, str(only)).rows.labels) == {1}
    stranger = tmp_path / "stranger"
    shutil.copytree(tmp_path / "photos" / "dog", stranger / "fox")
    found = shoal.predict(run, str(stranger))
    assert set(found.rows.labels) == {-1}
    assert "knows no class `fox`" in found.notes[0]


def test_a_damaged_member_is_named_and_may_be_skipped(solo, tmp_path):
    run = Run(tmp_path / "solo")
    shutil.copytree(solo.path, run.path)
    (checkpoint,) = run.checkpoints_path.glob("step-*")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    entry = next(e for e in manifest["tensors"] if e["name"] == "replica-1/1.weight")
    file = checkpoint / entry["file"]
    content = bytearray(file.read_bytes())
    head = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + head])[entry["key"]]["data_offsets"]
    content[8 + head + start] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=r"member solo/1 is damaged: .*replica-1/1.weight"):
        shoal.predict(run)
    found = shoal.predict(run, skip_damaged=True)
    assert found.used == ("solo/0", "solo/2")
    assert "solo/1 is left out" in found.notes[0]


def test_a_run_without_checkpoints(plain, tmp_path):
    shutil.copytree(plain.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(RunFolderError, match="has no checkpoint yet"):
        shoal.predict(tmp_path / "run")


class Killed(BaseException):
    """What no handler sees to."""


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_second_call_goes_on_where_the_first_was_cut_off(solo, tmp_path, monkeypatch, suffix):
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    shoal.predict(solo, "digits:test", how="mean", out=whole)
    written, write = [], parts.PartsFolder.write

    def cut_off(folder, step, rows):
        if len(written) == 2:
            raise Killed
        written.append(step)
        write(folder, step, rows)

    monkeypatch.setattr(parts.PartsFolder, "write", cut_off)
    with pytest.raises(Killed):
        shoal.predict(solo, "digits:test", how="mean", out=out)
    assert not out.exists()
    folder = parts.folder_beside(out)
    (folder / "part-000001.safetensors").write_bytes(b"half")  # of a disk that lost power
    with pytest.raises(UsageError, match="something else: how"):
        shoal.predict(solo, "digits:test", how="best", out=out)
    written[:] = [None] * 3
    shoal.predict(solo, "digits:test", how="mean", out=out)
    assert written == [None] * 3 + [1, 2, 3]  # the first of four batches was there
    assert out.read_bytes() == whole.read_bytes()
    assert not folder.exists()


def test_files_that_cannot_be(plain, tmp_path):
    with pytest.raises(UsageError, match=r"\.parquet, \.csv, \.jsonl"):
        shoal.predict(plain, out=tmp_path / "out.xlsx")


def test_a_parquet_file_has_a_row_an_example(plain, tmp_path):
    out = tmp_path / "out.parquet"
    shoal.predict(plain, "digits:test", out=out)
    table = parquet.read_table(out)
    assert table.column_names == ["id", "label", "predicted", "probabilities"]
    assert table["id"].to_pylist() == list(range(table.num_rows))
    for row in table.to_pylist():
        assert sum(row["probabilities"]) == pytest.approx(1.0)
        assert row["predicted"] == str(max(range(10), key=row["probabilities"].__getitem__))


def test_the_comparison_has_every_way_and_a_page(solo, tmp_path):
    document = compare_with([solo], Options(out=tmp_path / "page.html")).document
    rows = {row["name"]: row for row in document["compared"]}
    assert list(rows) == [
        *("run/0", "run/1", "run/2", "mean member"),
        *("best", "mean", "greedy-soup", "matched-mean", "ensemble"),
    ]
    assert rows["ensemble"]["metrics"] == pytest.approx(shoal.predict(solo).metrics, rel=1e-5)
    assert rows["ensemble"]["forward_passes"] == 3
    low, high = rows["best"]["intervals"]["accuracy"]
    assert low <= rows["best"]["metrics"]["accuracy"] <= high
    assert [line["to"] for line in document["barriers"]] == ["run/1", "run/2"]
    assert all(line["barrier"] > line["matched"] >= 0 for line in document["barriers"])
    assert any("different basins" in note for note in document["notes"])
    assert document["how"] in document["recommendation"]
    page = (tmp_path / "page.html").read_text()
    assert "greedy-soup" in page
    assert "<script" not in page
    assert json.loads((tmp_path / "page.json").read_text())["how"] == document["how"]


def test_one_model_of_several_is_exported(solo, tmp_path):
    from safetensors.torch import load_file

    from shoal import export
    from shoal.checkpoint import Checkpoint, replicas

    target = tmp_path / "model.safetensors"
    with pytest.raises(UsageError, match=r"has \d models, and one file holds one"):
        export(solo, target)
    with pytest.raises(UsageError, match="it must be one of best"):
        export(solo, target, "median")
    export(solo, target, "mean")
    merged = load_file(target)
    state = Checkpoint.open(max(solo.checkpoints_path.glob("step-*")))
    mean = replicas.Mean.of(state)
    for name in mean.weights:
        if "running" not in name and mean.dtype(name).is_floating_point:
            assert torch.allclose(merged[name], mean.read(name), atol=1e-6)
    export(solo, target, "best")
    best = load_file(target)
    name = mean.weights[0]
    members = [replicas.one_of(state, n).read(name) for n in range(replicas.count(state))]
    assert any(torch.equal(best[name], member) for member in members)


def test_models_of_unlike_batches_predict_together(plain, tmp_path):
    other = trained(tmp_path / "other", batch_size=96)
    found = shoal.predict([plain, other], "digits:test", how="ensemble")
    assert len(found.probabilities) == len(shoal.predict(plain, "digits:test").probabilities)
    compared = compare_with([plain, other], Options()).document["compared"]
    rows = {row["name"]: row for row in compared}
    assert rows["ensemble"]["metrics"] == pytest.approx(found.metrics)
