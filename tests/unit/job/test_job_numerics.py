"""What `auto` tries, and what it makes of it."""

import dataclasses
from importlib import import_module

import pytest

from shoal.cluster import Cluster, Device, Host, computes_in_bf16
from shoal.job import Remembered, as_begun, resolve, settled
from shoal.job.numerics import Tried, candidates, choose, steps_needed
from shoal.recipe import Recipe
from shoal.strategy import Strategy

LOSSES = (2.3, 2.1, 1.9, 1.8, 1.7, 1.6)


def tried(strategy, step_s, losses=LOSSES, failed=None):
    return Tried(strategy, step_s, tuple(losses), failed)


def recipe(*changes):
    values = {
        "name": "r",
        "batch_size": 64,
        "steps": 900,
        "model": "mlp",
        "data": {"train": "digits:train"},
        "objective": "cross_entropy",
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    return Recipe.from_dict(values).with_changes(*changes)


def machine():
    device = Device(kind="cpu", name="a device", count=2, memory_bytes=2**30)
    return Cluster(name="local", hosts=(Host(name="h", cores=2, devices=(device,)),))


@pytest.fixture(params=[True, False])
def bf16_processor(request, monkeypatch):
    # By name the attribute `resolve` of the package would be found: the function.
    module = import_module("shoal.job.resolve")
    monkeypatch.setattr(module, "computes_in_bf16", lambda: request.param)
    return request.param


def test_images_are_tried_in_channels_last_too():
    plain = Strategy.parse("dp2+compile")
    names = [str(each) for each in candidates(plain, images=True)]
    assert names == ["dp2+compile", "dp2+bf16+compile+channels_last", "dp2+compile+channels_last"]
    assert [str(each) for each in candidates(plain, images=False)] == [
        "dp2+compile",
        "dp2+bf16+compile",
    ]


def test_the_fastest_wins_and_says_by_how_much():
    strategy, reason = choose(
        [tried("dp2", 0.4), tried("dp2+bf16+channels_last", 0.2), tried("dp2+channels_last", 0.3)]
    )
    assert str(strategy) == "dp2+bf16+channels_last"
    assert "2.0 times as fast as dp2" in reason


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (tried("dp2+bf16", 0.38), "1.05 times as fast"),
        (tried("dp2+bf16", 0.2, [2.3, 2.4, 2.2, 2.1, 2.0, 2.0]), "hurts the loss"),
        (tried("dp2+bf16", 0.2, [2.3, *[float("nan")] * 5]), "hurts the loss"),
        (tried("dp2+bf16", 0.2, [float("nan")] * 6), "another loss to begin with"),
        (tried("dp2+bf16", 0.2, [2.4, *LOSSES[1:]]), "another loss to begin with"),
        (tried("dp2+bf16", float("inf"), (), "no kernel"), "does not run (no kernel)"),
    ],
    ids=["no gain", "loss", "nan", "nan at once", "another loss", "failed"],
)
def test_the_plain_one_stays_and_says_why(other, why):
    strategy, reason = choose([tried("dp2", 0.4), other])
    assert str(strategy) == "dp2"
    assert why in reason


def test_tried_goes_there_and_back():
    for each in (tried("dp2", 0.5), tried("dp2", float("inf"), (), "why")):
        assert Tried.from_json(each.to_json()) == each


def test_auto_tries_where_the_processor_and_the_recipe_allow_it(bf16_processor):
    resolved = resolve(recipe(), "auto", machine())
    assert resolved.tries is bf16_processor
    assert any("no instructions for bf16" in reason for reason in resolved.reasons) is (
        not bf16_processor
    )
    for strategy, change in (
        ("dp2", "seed=1"),
        ("auto+bf16", "seed=1"),
        ("auto", "precision=float32"),
        ("auto", "precision=bf16"),
    ):
        assert not resolve(recipe(change), strategy, machine()).tries


def test_what_the_ranks_say_settles_it(bf16_processor):
    resolved = dataclasses.replace(resolve(recipe(), "auto", machine()), tries=True)
    done = settled(resolved, [tried("dp2", 0.4), tried("dp2+bf16", 0.2)])
    assert (str(done.strategy), done.tries) == ("dp2+bf16", False)
    short = settled(resolved, [], "too few steps")
    assert (str(short.strategy), short.reasons[-1]) == ("dp2", "too few steps")
    stopped = settled(resolved, [tried("dp2", 0.4)])
    assert str(stopped.strategy) == "dp2"


def test_a_run_that_goes_on_keeps_its_numerics(bf16_processor):
    resolved = resolve(recipe(), "auto", machine())
    again = as_begun(resolved, Strategy.parse("dp4+bf16+channels_last"))
    assert (str(again.strategy), again.tries) == ("dp2+bf16+channels_last", False)


def test_trying_takes_a_fifth_of_the_steps_at_most():
    assert steps_needed(3) == 75


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2\n", False),
        ("", False),
    ],
)
def test_bf16_instructions_are_read_from_the_kernel(tmp_path, text, found):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text)
    assert computes_in_bf16(tmp_path) is found


# ---- what was found out before


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def remembered(*changes, strategy="dp2"):
    resolved = resolve(recipe(*changes), strategy, machine())
    return Remembered.of(recipe(*changes), resolved, machine())


def test_what_was_tried_is_known_to_a_run_of_another_length(cache):
    assert remembered().load() is None
    found = [tried("dp2", 0.4), tried("dp2+bf16", float("inf"), (), "no kernel")]
    remembered().save(found)
    assert remembered("steps=5", "seed=3", "name=other").load() == found
    assert [path.suffix for path in (cache / "shoal/auto").iterdir()] == [".json"]


@pytest.mark.parametrize("change", ["batch_size=32", "model.widths=[8]", "optimizer.lr=0.2"])
def test_another_kind_of_run_is_another_file(cache, change):
    assert remembered(change).path != remembered().path


def test_the_users_own_components_are_not_remembered(cache):
    own = remembered("model=collections:OrderedDict")
    own.save([tried("dp2", 0.4)])
    assert (own.path, own.load()) == (None, None)


@pytest.mark.parametrize("text", ["", "[1]", '[{"x": 1}]', "null"])
def test_a_file_that_makes_no_sense_is_none(cache, text):
    trials = remembered()
    trials.path.parent.mkdir(parents=True)
    trials.path.write_text(text)
    assert trials.load() is None


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(cache):
    (cache / "shoal").write_text("a file")
    remembered().save([tried("dp2", 0.4)])
    assert remembered().load() is None


def test_losses_that_go_another_way_down_do_no_harm():
    """A wild start, measured: rounding alone changes such a path."""
    plain = tried("dp2", 0.55, [8.0, 2.62, 1.71, 1.15, 0.73])
    strategy, _ = choose([plain, tried("dp2+bf16", 0.28, [8.01, 2.80, 1.46, 0.97, 0.78])])
    assert str(strategy) == "dp2+bf16"
