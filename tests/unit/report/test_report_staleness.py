"""The histogram of staleness on the page and in the closing lines."""

from shoal.report.staleness import staleness_rows, staleness_text

SUMMARY = {
    "staleness": {
        "bound": 2,
        "largest": 2,
        "mean": 1.125,
        "contributions": {"0": 2, "1": 10, "2": 4},
        "refused": 1,
        "taken_back": 0,
    }
}


def test_each_staleness_has_a_row_with_its_share() -> None:
    rows = {row.key: row.value for row in staleness_rows(SUMMARY)}
    assert rows["bound"] == "2"
    assert rows["1 step"].endswith("10 (62 %)")
    assert rows["1 step"].count("█") == 24
    assert rows["0 steps"].count("█") == 5
    assert rows["refused, not finite"] == "1"
    assert "claims taken back" not in rows


def test_one_line_says_how_stale_and_what_was_refused() -> None:
    said = "staleness 1.1 on average, at most 2 (bound 2), 1 contributions refused"
    assert staleness_text(SUMMARY) == said


def test_other_runs_and_damaged_summaries_have_none() -> None:
    assert staleness_rows({}) == []
    assert staleness_text({"staleness": {"mean": "much"}}) == ""
    assert staleness_rows({"staleness": {"contributions": {"0": "many"}}}) == []
