"""`predict` with all its options: find the models, make one of them if asked, predict, write.

    here                                     ranks
    members, best / soup / mean       ──▶    predict_on_rank × n, batch by batch
    scores, the file                  ◀──    parts, written by rank 0

Choosing and merging are done here, on one device; a strategy says how what was made predicts.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from shoal import data, env
from shoal.cluster import Cluster
from shoal.errors import Refused, UsageError, WorldError
from shoal.job import Resolved, resolve
from shoal.launch import Context, Ranks, stop_signals_heard
from shoal.predict.bench import Bench
from shoal.predict.choosing import How, check_how, make_one
from shoal.predict.inputs import asked_for, evaluation_of, labels_by
from shoal.predict.members import Member, members_of
from shoal.predict.on_rank import PredictTask, predict_on_rank
from shoal.predict.parts import PartsFolder, Rows, folder_beside
from shoal.predict.scores import Scores
from shoal.predict.writers import Naming, check_target, write
from shoal.recipe import SourceSpec
from shoal.run import Run


@dataclass(frozen=True)
class Options:
    """``how`` None: ensemble of several, or the one model. ``data`` None: what the recipe
    evaluates on. ``out`` None: nothing is written."""

    how: str | None = None
    strategy: str = "single"
    data: str | SourceSpec | None = None
    out: Path | None = None
    skip_damaged: bool = False


@dataclass(frozen=True, eq=False)
class Predictions:
    """What `predict` gives: probabilities [n, classes] by example, in the order of the data.

    ``labels`` are −1 where they are not known. ``forward_passes``: per example. ``used``: the names
    of the members that the model is made of.
    """

    how: str
    members: int
    used: tuple[str, ...]
    metrics: dict[str, float]
    out: Path | None
    classes: tuple[str, ...]
    rows: Rows
    forward_passes: int
    seconds: float
    notes: tuple[str, ...] = field(default=())
    bad_examples: int = 0

    @property
    def probabilities(self) -> Any:
        return self.rows.probabilities

    @property
    def predicted(self) -> Any:
        """The most probable class of each example, by number."""
        return self.rows.probabilities.argmax(1)

    @property
    def scores(self) -> Scores:
        """Of the examples whose labels are known."""
        return _scores(self.rows)

    def to_json(self) -> dict[str, Any]:
        """The contract's document."""
        return {
            "how": self.how,
            "members": self.members,
            "used": list(self.used),
            "metrics": self.metrics,
            "out": None if self.out is None else str(self.out),
            "examples": len(self.rows.ids),
            "bad_examples": self.bad_examples,
            "forward_passes": self.forward_passes,
            "seconds": round(self.seconds, 4),
            "notes": list(self.notes),
        }


def open_runs(runs: Sequence[Path | str | Run] | Path | str | Run) -> list[Run]:
    """Run folders by path. Raises `RunFolderError`."""
    several = [runs] if isinstance(runs, Path | str | Run) else list(runs)
    if not several:
        raise UsageError("predict needs a run", hint="As in shoal predict runs/digits-0001.")
    return [each if isinstance(each, Run) else Run.open(Path(each)) for each in several]


def predict_with(runs: Sequence[Run], options: Options) -> Predictions:
    """:func:`shoal.predict` with every option of the command line."""
    if env.torchrun_world() is not None:
        raise WorldError(
            "predict starts ranks of its own, and WORLD_SIZE says that others were started",
            hint="Call it without torchrun.",
        )
    if options.out is not None:
        check_target(options.out)
    found = members_of(runs, skip_damaged=options.skip_damaged)
    members = found.members
    how = check_how(options.how or ("ensemble" if len(members) > 1 else "best"), len(members))
    classes = check_classes(members)
    spec = evaluation_of(members[0].recipe) if options.data is None else asked_for(options.data)
    resolved = _resolved(members, how, options.strategy)
    feed = spec.open(members[0].recipe)
    about = {
        "models": [[m.name, m.checkpoint, Path(m.checkpoint, "manifest.json").stat().st_mtime_ns]
                   for m in members],
        "how": how,
        "data": [spec.source, spec.split, feed.fingerprint],
        "batch size": feed.batch_size,
    }  # fmt: skip
    with _parts(options.out, about) as parts:
        chosen, notes = _chosen(how, members, parts)
        known, why = labels_by(classes, feed.classes)
        task = PredictTask(
            members=tuple(member.to_json() for member in chosen[1]),
            ensemble=how == "ensemble",
            strategy=str(resolved.strategy),
            device=resolved.device,
            spec=spec,
            folder=str(parts.path.resolve()),
            first=parts.done(feed.steps_per_epoch),
            labels=None if known is None else known.tolist(),
        )
        told = _run(task, resolved)
        rows = _all_rows(parts, feed.steps_per_epoch)
        names = classes or tuple(map(str, range(rows.probabilities.shape[1])))
        if options.out is not None:
            write(options.out, [rows], Naming(names, spec.files()))
            parts.remove()
    return Predictions(
        how=how,
        members=len(members),
        used=tuple(chosen[0]),
        metrics=_scores(rows).metrics(),
        out=options.out,
        classes=names,
        rows=rows,
        forward_passes=len(chosen[1]),
        seconds=told["seconds"],
        notes=(*found.notes, *notes, *([why] if why else [])),
        bad_examples=told["bad"],
    )


def check_classes(members: Sequence[Member]) -> tuple[str, ...] | None:
    """The classes that all members answer with. Raises `Refused` where they differ."""
    first = _classes_of(members[0])
    for member in members[1:]:
        other = _classes_of(member)
        if other != first:
            differ = sorted(set(first or ()) ^ set(other or ())) or ["their order"]
            raise Refused(
                f"{members[0].name} and {member.name} answer with other classes: "
                f"{', '.join(differ[:5])}",
                hint="Only models that were trained on the same classes predict together.",
            )
    return first


def _classes_of(member: Member) -> tuple[str, ...] | None:
    recipe = member.recipe
    if recipe.objective.name in ("mse", "binary"):
        raise Refused(
            f"{member.name} was trained with {recipe.objective.name}, and predict needs a score "
            "for each class",
            hint="Train with cross_entropy, or an objective of your own on such scores.",
        )
    train, _ = data.resolve(recipe.data)
    return data.describe(train).classes


def _resolved(members: Sequence[Member], how: How, strategy: str) -> Resolved:
    """The strategy, checked; and the threads of a rank.

    An ensemble's depend on how many members there are and on the machine alone: the bits of a
    product may depend on the threads that it was shared among.
    """
    cluster = Cluster.local()
    resolved = resolve(members[0].recipe, strategy, cluster)
    if how != "ensemble":
        return resolved
    together = min(len(members), cluster.cores)
    return replace(resolved, threads=max(1, cluster.cores // together))


@contextlib.contextmanager
def _parts(out: Path | None, about: dict[str, Any]) -> Iterator[PartsFolder]:
    with contextlib.ExitStack() as stack:
        if out is None:
            made = tempfile.TemporaryDirectory(prefix="shoal-predict-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
        else:
            folder = folder_beside(out)
        yield stack.enter_context(PartsFolder.open(folder, about))


def _chosen(
    how: How, members: Sequence[Member], parts: PartsFolder
) -> tuple[tuple[list[str], list[Member]], tuple[str, ...]]:
    """((names of the members in it, what predicts), notes)."""
    if how == "ensemble":
        return ([member.name for member in members], list(members)), ()
    if len(members) == 1:
        return ([members[0].name], [members[0]]), ()
    # The same call is made when a prediction goes on: it makes the same weights again.
    made = make_one(how, Bench(members))
    names = [members[number].name for number in made.used]
    if made.state is None:
        return (names, [members[made.used[0]]]), made.notes
    file = parts.path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in made.state.items()}, file)
    one = replace(members[0], name=how, weights=str(file.resolve()))
    return (names, [one]), made.notes


def _run(task: PredictTask, resolved: Resolved) -> dict[str, Any]:
    """In this process if one device does it, else on ranks."""
    if resolved.strategy.world_size == 1:
        threads = torch.get_num_threads()
        try:
            with stop_signals_heard() as stop:
                alone = Context(
                    0, 1, 0, "file:/nowhere", "predict", resolved.threads, lambda _: None, stop
                )
                return predict_on_rank(alone, task)
        finally:
            torch.set_num_threads(threads)
    with Ranks(resolved.strategy.world_size, threads=resolved.threads) as ranks:
        told: dict[str, Any] = ranks.call(predict_on_rank, task)[0]
    return told


def _all_rows(parts: PartsFolder, steps: int) -> Rows:
    held = [parts.read(step) for step in range(steps)]
    return Rows(*(np.concatenate(each) for each in zip(*held, strict=True)))


def _scores(rows: Rows) -> Scores:
    known = rows.labels >= 0
    return Scores.of(rows.probabilities[known], rows.labels[known])
