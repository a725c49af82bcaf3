"""Run the benchmarks, one after another, and write one dated page of results.

    python benchmarks/run.py [--rounds 3] [--only same_numerics,defaults] [--share 0.2]

Each question is a file here with `measure(rounds) -> str`. A page is written as far as it has come
after every section. Two runs at once would measure each other, so the second is refused.
"""

import argparse
import datetime
import fcntl
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import sys
import time
import traceback
from pathlib import Path

import workloads
from sidebyside import cores, processor

HERE = Path(__file__).parent
RESULTS = HERE / "results"
QUESTIONS = (
    "same_numerics",
    "defaults",
    "machine",
    "collectives",
    "startup",
    "overheads",
    "memory",
    "model_parallel",
    "bubble",
    "agreements",
    "same_accuracy",
    "two_hosts",
    "local_peers",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--only", default=",".join(QUESTIONS), help="questions, with commas")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps: a quick look")
    parser.add_argument("--out", type=Path, help="the page; results/DATE-cpu-N-cores.md otherwise")
    given = parser.parse_args()
    asked = given.only.split(",")
    unknown = sorted(set(asked) - set(QUESTIONS))
    if unknown:
        parser.error(f"no such question: {', '.join(unknown)} (there are {', '.join(QUESTIONS)})")
    with (HERE / ".gitignore").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as held:
            said = "benchmarks are running already: two would measure each other"
            raise SystemExit(said) from held
        _run(given.rounds, given.share, asked, given.out or _page())


def _run(rounds: int, share: float, asked: list[str], page: Path) -> None:
    workloads.prepare()
    sections = [_head(rounds, share)]
    page.parent.mkdir(exist_ok=True)
    for question in asked:
        print(question, file=sys.stderr, flush=True)
        started = time.monotonic()
        section = _section(question, rounds, share)
        minutes = (time.monotonic() - started) / 60
        sections.append(f"{section}\n\n({minutes:.1f} minutes)")
        page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(page.read_text(encoding="utf-8"))
    print(f"written to {page}")


def _section(question: str, rounds: int, share: float) -> str:
    """What a question's file measures; if it fails, that, so that the others still run."""
    if importlib.util.find_spec(question) is None:
        return f"## {question}\n\nNot measured: there is no benchmarks/{question}.py."
    try:
        measure = importlib.import_module(question).measure
        if "share" in inspect.signature(measure).parameters:
            return str(measure(rounds, share))
        return str(measure(rounds))
    except Exception as error:
        traceback.print_exc()
        return f"## {question}\n\nNot measured: {type(error).__name__}: {error}"


def _head(rounds: int, share: float) -> str:
    names = ("torch", "numpy")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    shortened = "" if share == 1 else f" Shortened to {share} of the steps: a quick look."
    load = os.getloadavg()[0]
    return (
        f"# {_today()}: {processor()}\n\n"
        f"{', '.join(versions)}, Python {platform.python_version()}, Linux {platform.release()}; "
        f"{rounds} rounds, interleaved; load when it began {load:.1f}. Figures are medians "
        f"(smallest to largest); ratios are of each round.{shortened}"
    )


def _today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def _page() -> Path:
    return RESULTS / f"{_today()}-cpu-{cores()}-cores.md"


if __name__ == "__main__":
    main()
