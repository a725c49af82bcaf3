"""The procedure of the article that Shoal began with, from beginning to end, beside what it is not.

    python examples/article.py [--steps 90] [--parts 2] [--out runs/article]       (make article)

ResNet-101 with depthwise-separable convolutions; images of 224×224 that enter it as 56×56; the
samples cut into equal parts, one model a part, no synchronisation; then the models are merged, and
predict in parallel. Beside it, at equal samples: one device, synchronous and asynchronous data
parallelism. The images are scikit-learn's digits, enlarged; give your own with --data FOLDER.

Everything is printed as it was measured, the merge of models that were started apart included.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import shoal
from shoal.errors import ShoalError
from shoal.predict import Options, open_runs
from shoal.predict.comparing import compare_with

RECIPE = Path(__file__).parents[1] / "recipes" / "resnet101.yaml"


def main() -> None:
    given = _options()
    recipe = shoal.Recipe.from_yaml(RECIPE).with_changes(
        f"steps={given.steps}", f"evaluate.every={given.steps} steps",
        f"checkpoint.every={given.steps} steps", *([f"data.train={given.data}"] * bool(given.data)),
    )  # fmt: skip
    beside = ("single", f"dp{given.parts}", f"dp{given.parts}/async:2")
    rows = [train(recipe, strategy, given.out) for strategy in beside]
    apart = {}
    for start in ("same", "own"):
        strategy = f"dp{given.parts}/solo" + (":init=own" if start == "own" else "")
        rows.append(train(recipe, strategy, given.out))
        if rows[-1]["error"] is None:
            apart[start] = merge(Path(rows[-1]["run"]))
    print(table(rows), "", *lines_of(apart), sep="\n")
    (given.out / "article.json").write_text(
        json.dumps({"trained": rows, "merged": apart}, indent=2) + "\n", encoding="utf-8"
    )
    print(f"\nin {given.out / 'article.json'}, and a page beside each run that was merged")


def train(recipe: shoal.Recipe, strategy: str, folder: Path) -> dict[str, Any]:
    """Train the recipe with a strategy; what came of it, or why it did not run."""
    text = f"{strategy}+bf16+channels_last"
    began = time.perf_counter()
    try:
        run = shoal.train(recipe, text, out=folder / strategy.replace("/", "_").replace(":", "-"))
    except ShoalError as error:
        return {"strategy": strategy, "error": str(error)}
    summary = run.summary
    if summary["state"] == "stopped":  # by Ctrl-C or a signal: that was meant for all of this
        raise SystemExit(130)
    return {
        "strategy": strategy,
        "error": None,
        "run": str(run.path),
        "samples": summary["samples"],
        "samples_per_second": summary["samples_per_second"],
        "metrics": summary["metrics"],
        "members": summary.get("members"),
        "seconds": round(time.perf_counter() - began, 1),
    }


def merge(run: Path) -> dict[str, Any]:
    """The models of a run, merged and predicting together, on examples that none was chosen on."""
    document: dict[str, Any] = compare_with(open_runs([run]), Options()).document
    return document


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'trained':<18} {'samples':>8} {'samples/s':>10} {'loss':>8} {'accuracy':>9}"]
    for row in rows:
        if row["error"] is not None:
            lines.append(f"{row['strategy']:<18} {row['error']}")
            continue
        metrics = row["metrics"]
        lines.append(
            f"{row['strategy']:<18} {row['samples']:>8} {row['samples_per_second']:>10.1f} "
            f"{metrics['loss']:>8.3f} {metrics['accuracy']:>9.3f}"
            + (f"   mean of {len(row['members'])} members" if row["members"] else "")
        )
    return "\n".join(lines)


def lines_of(apart: dict[str, dict[str, Any]]) -> list[str]:
    """What merging and predicting together gave, for each way to start."""
    said = []
    for start, document in apart.items():
        where = "the same weights" if start == "same" else "weights of their own"
        said.append(f"{document['members']} models from {where}, each on its part of the data:")
        for row in document["compared"]:
            if row["error"] is not None:
                said.append(f"  {row['name']:<16} {row['error']}")
                continue
            low, high = row["intervals"]["accuracy"]
            said.append(
                f"  {row['name']:<16} accuracy {row['metrics']['accuracy']:.3f} "
                f"({low:.3f} to {high:.3f})"
            )
        said += [f"  {note}" for note in document["notes"]]
        said.append("")
    return [*said, *WHY]


WHY = (
    "Averaged weights are a good model only where the models lie in one basin of the loss. From",
    "the same start they do for a while, and less the longer they train apart; from starts of",
    "their own unit 7 of one has nothing to do with unit 7 of the other, and their mean is near",
    "chance. What helps: a shared start, meeting more often (local:H), matching the units first",
    "(matched-mean); or not merging: the ensemble, which costs a forward pass for each model.",
)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=90, help="of 32 images each")
    parser.add_argument("--parts", type=int, default=2, help="of the samples, one model each")
    parser.add_argument("--data", help="a folder of images, one folder a class")
    parser.add_argument("--out", type=Path, default=Path("runs/article"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
