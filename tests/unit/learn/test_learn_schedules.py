"""Schedules at the points where their formulas give round numbers, and between them."""

import math
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UsageError, UserCodeError
from shoal.learn import build_schedule
from shoal.recipe import SIGNATURES, Component


def schedule(name: str, **options):
    return build_schedule(SimpleNamespace(name=name, options=options))


shares = st.floats(0, 1)
warmups = st.floats(0, 0.99)


@given(share=shares, warmup=warmups)
def test_constant_is_a_ramp_and_then_one(share, warmup):
    expected = 1.0 if share >= warmup else share / warmup
    assert schedule("constant", warmup=warmup)(share) == expected


@pytest.mark.parametrize(
    ("share", "expected"), [(0, 1), (0.25, 0.5 + math.sqrt(0.125)), (0.5, 0.5), (1, 0)]
)
def test_cosine_without_warmup(share, expected):
    assert schedule("cosine")(share) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("share", "expected"), [(0, 0), (0.1, 0.5), (0.2, 1), (0.6, 0.55), (1, 0.1), (1.1, 0.1)]
)
def test_cosine_with_warmup_and_final(share, expected):
    ours = schedule("cosine", warmup=0.2, final=0.1)
    assert ours(share) == pytest.approx(expected, abs=1e-15)


@given(a=shares, b=shares, warmup=warmups, final=shares)
def test_cosine_rises_and_then_falls_and_stays_between(a, b, warmup, final):
    ours = schedule("cosine", warmup=warmup, final=final)
    early, late = sorted((a, b))
    if late < warmup:
        assert ours(early) <= ours(late)
    elif early >= warmup:
        assert final - 1e-12 <= ours(late) <= ours(early) + 1e-12 <= 1 + 1e-12


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0, 0), (0.05, 0.5), (0.1, 1), (0.29, 1), (0.3, 0.5), (0.59, 0.5), (0.6, 0.25), (1, 0.25)],
)
def test_step_falls_at_its_shares(share, expected):
    ours = schedule("step", at=[0.3, 0.6], factor=0.5, warmup=0.1)
    assert ours(share) == pytest.approx(expected)


def test_every_signature_of_the_recipe_can_be_built():
    for name, signature in SIGNATURES["schedule"].items():
        options = signature().options()
        filled = build_schedule(Component(name=name, options=options))
        bare = schedule(name)
        assert [filled(i / 10) for i in range(11)] == [bare(i / 10) for i in range(11)]


def test_what_cannot_be_is_named():
    with pytest.raises(UsageError, match="did you mean cosine"):
        schedule("cosin")
    with pytest.raises(UsageError, match="warmpu"):
        schedule("cosine", warmpu=0.1)


def test_a_function_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "own_schedules.py").write_text(
        "def line(share, end=0.0):\n    return 1 + (end - 1) * share\n"
        "def wrong(share):\n    return 'low'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert schedule("own_schedules:line", end=0.5)(0.5) == 0.75
    with pytest.raises(UserCodeError, match=r"returned 'low' for share 0\.5"):
        schedule("own_schedules:wrong")(0.5)
    with pytest.raises(UsageError, match="unexpected keyword argument 'ende'"):
        schedule("own_schedules:line", ende=1)
    sys.modules.pop("own_schedules")
