"""Decimation keeps what an eye would look for; values become text with units."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.report.decimate import extremes, running_mean
from shoal.report.values import moment_text, rank_table, rows, seconds_text, text_of

FLOATS = st.floats(allow_nan=True, allow_infinity=False, width=32)


@given(st.lists(FLOATS, max_size=400), st.integers(4, 60))
def test_extremes_keep_ends_minimum_and_maximum(values: list[float], limit: int) -> None:
    column = np.array(values, dtype=np.float64)
    kept = extremes(column, limit)
    assert len(kept) <= max(limit, 0)
    assert np.all(np.diff(kept) > 0)
    if len(column):
        assert (kept[0], kept[-1]) == (0, len(column) - 1)
    if np.isfinite(column).any():
        assert np.nanmin(column[kept]) == np.nanmin(column)
        assert np.nanmax(column[kept]) == np.nanmax(column)


@given(st.integers(10, 300), st.integers(4, 40), st.data())
def test_every_bucket_keeps_its_own_peak(size: int, limit: int, data: st.DataObject) -> None:
    values = np.zeros(size)
    peak = data.draw(st.integers(0, size - 1))
    values[peak] = 1.0
    assert peak in extremes(values, limit)


def test_a_stretch_of_nan_still_breaks_the_line() -> None:
    values = np.ones(1000)
    values[300:600] = np.nan
    assert np.isnan(values[extremes(values, 50)]).any()


@given(st.lists(FLOATS.filter(lambda x: abs(x) < 1e6 or math.isnan(x)), max_size=60))
def test_running_mean_is_the_mean_of_the_window(values: list[float]) -> None:
    column = np.array(values, dtype=np.float64)
    means = running_mean(column, 5)
    for position, mean in enumerate(means):
        window = column[max(0, position - 2) : position + 3]
        known = window[np.isfinite(window)]
        expected = known.mean() if len(known) else math.nan
        assert mean == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("memory_bytes", 3 * 2**30, "3 GiB"),
        ("links.bytes_per_s", 2**20, "1 MiB/s"),
        ("matmul_flops_per_s.bf16", 182e9, "182 GFLOP/s"),
        ("step_s.forward", 0.05, "50 ms"),
        ("seconds", 78.4, "1 min 18 s"),
        ("samples_per_second", 853.2, "853.2 /s"),
        ("lr", 0.0005, "0.0005"),
        ("steps", 12000, "12,000"),
        ("seed", 12000, "12000"),
        ("ledger", False, "no"),
        ("clip_norm", None, "none"),
        ("lr", math.nan, "nan"),
        ("steps", 10**400, "a number too large to show"),
        ("betas", [0.9, 0.999], "0.9, 0.999"),
    ],
)
def test_numbers_have_the_unit_of_their_key(key: str, value: object, text: str) -> None:
    assert text_of(value, key) == text


def test_nested_values_become_paths() -> None:
    found = rows({"model": {"name": "mlp", "widths": [64, 32]}, "links": [{"gbps": 10}], "x": {}})
    assert [(row.key, row.value) for row in found] == [
        ("model.name", "mlp"),
        ("model.widths", "64, 32"),
        ("links[0].gbps", "10"),
        ("x", "none"),
    ]
    assert len(rows({str(i): i for i in range(5000)})) == 401


def test_moments_and_short_times() -> None:
    assert moment_text(1760000000.5) == "2025-10-09 08:53:20 UTC"
    assert moment_text("2026-01-01T00:00:00Z") == "2026-01-01T00:00:00Z"
    assert moment_text(None) == ""
    assert seconds_text(0.0004) == "400 µs"
    assert seconds_text(0.05) == "50 ms"


def test_a_table_of_ranks_needs_a_number() -> None:
    assert rank_table([("gradient", []), ("metric", "x")], "purpose") is None
    table = rank_table([("gradient", [1024, 2048]), ("start-up", [512])], "purpose")
    assert table is not None
    assert table.head == ("purpose", "rank 0", "rank 1")
    assert table.rows == (("gradient", "1 KiB", "2 KiB"), ("start-up", "512 B", "–"))
