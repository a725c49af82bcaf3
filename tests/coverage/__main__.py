"""Runs the coverage table and writes its page.

python tests/coverage                                          # the table, docs/coverage.md
python tests/coverage --full                                   # every model, every strategy
python tests/coverage --models gpt,u-net --strategies pp2,tp2  # some cells, to look at
python tests/coverage --json found.json --resume               # go on where it was stopped

Exit status 1 if a cell is wrong, broken or hung.
"""

import argparse
import json
import os
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded anywhere

from cells import TIMEOUT_S, LastingRanks, Outcome, run_cell  # noqa: E402
from page import page  # noqa: E402
from plan import Cell, every_cell  # noqa: E402
from zoo import SUBJECTS  # noqa: E402

RANKS = 4
PAGE = TESTS.parent / "docs" / "coverage.md"


def main() -> int:
    options = _options()
    cells = every_cell(options.models, options.strategies, full=options.full)
    some = bool(options.models or options.strategies)
    found = _read(options.json) if options.resume else {}
    with LastingRanks(RANKS) as ranks:
        for cell in cells:
            if cell in found:
                continue
            found[cell] = run_cell(ranks, SUBJECTS[cell[0]], cell[1], timeout_s=options.timeout)
            _tell(cell, found[cell])
            _write(options.json, found)
    outcomes = {cell: found[cell] for cell in cells}
    if options.out is not None or not some:
        (options.out or PAGE).write_text(page(outcomes), encoding="utf-8")
    bad = sum(not outcome.good for outcome in outcomes.values())
    print(f"{len(outcomes)} cells, {bad} wrong", file=sys.stderr)
    return 1 if bad else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/coverage", description=__doc__)

    def names(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    parser.add_argument("--models", type=names, default=(), help="names of the zoo, with commas")
    parser.add_argument("--strategies", type=names, default=(), help="strategies, with commas")
    parser.add_argument("--full", action="store_true", help="every model under every strategy")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds for a cell")
    parser.add_argument("--out", type=Path, help="where the page goes")
    parser.add_argument("--json", type=Path, help="where everything that was found goes")
    parser.add_argument(
        "--resume", action="store_true", help="leave out the cells that --json's file has"
    )
    given = parser.parse_args()
    if given.resume and given.json is None:
        parser.error("--resume needs --json FILE")
    return given


def _read(path: Path) -> dict[Cell, Outcome]:
    """What an earlier run has written; nothing if there was none."""
    if not path.exists():
        return {}
    told = json.loads(path.read_text(encoding="utf-8"))
    return {(one.pop("model"), one.pop("strategy")): Outcome.of(one) for one in told}


def _write(path: Path | None, found: dict[Cell, Outcome]) -> None:
    """After each cell: the whole table takes an hour or two."""
    if path is None:
        return
    told = [{"model": m, "strategy": s, **o.to_json()} for (m, s), o in found.items()]
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def _tell(cell: Cell, outcome: Outcome) -> None:
    error = "" if outcome.error is None else f"{outcome.error:.1e}"
    reason = "" if outcome.verdict == "equal" else " ".join(outcome.reason.split())[:160]
    print(
        f"{cell[0]:<30} {cell[1]:<18} {outcome.verdict:<8} {error:<8} "
        f"{outcome.seconds:5.1f} s  {reason}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
