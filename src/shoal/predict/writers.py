"""The file of predictions: a row an example, as .parquet, .csv or .jsonl.

id   file     label   predicted   probabilities            label: null where it is not known
0    a.png    cat     cat         [0.98, 0.02]             file: of a folder of images

write(target, rows, Naming(classes, files))      # the file is there whole or not at all
"""

import contextlib
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import UsageError
from shoal.predict.parts import Rows


@dataclass(frozen=True)
class Naming:
    """What numbers are called: classes by label, files by example; None: the numbers stay."""

    classes: tuple[str, ...]
    files: tuple[str, ...] | None = None

    def records(self, rows: Rows) -> Iterator[dict[str, Any]]:
        """A mapping for each example."""
        for number, label, given in zip(*rows, strict=True):
            record: dict[str, Any] = {"id": int(number)}
            if self.files is not None:
                record["file"] = self.files[number]
            record["label"] = self.classes[label] if label >= 0 else None
            record["predicted"] = self.classes[given.argmax()]
            record["probabilities"] = given.tolist()
            yield record


def check_target(target: Path) -> None:
    """Raise `UsageError` for a file that predictions cannot be written to."""
    if target.suffix not in _WRITERS:
        raise UsageError(
            f"--out {target}: predictions are written as {', '.join(_WRITERS)}, by the suffix",
            hint="As in --out predictions.csv.",
        )
    if target.is_dir():
        raise UsageError(f"--out {target} is a folder", hint="Give a file in it.")


def write(target: Path, parts: Iterable[Rows], naming: Naming) -> None:
    """Write all parts, in order, and put the file in its place."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        _WRITERS[target.suffix](temporary, parts, naming)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _write_csv(path: Path, parts: Iterable[Rows], naming: Naming) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        named = ["file"] if naming.files is not None else []
        table.writerow(["id", *named, "label", "predicted", *(f"p:{c}" for c in naming.classes)])
        for rows in parts:
            for record in naming.records(rows):
                probabilities = record.pop("probabilities")
                table.writerow([*record.values(), *map(repr, probabilities)])


def _write_lines(path: Path, parts: Iterable[Rows], naming: Naming) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for rows in parts:
            stream.writelines(json.dumps(record) + "\n" for record in naming.records(rows))


def _write_parquet(path: Path, parts: Iterable[Rows], naming: Naming) -> None:
    import pyarrow as arrow  # takes a third of a second
    from pyarrow import parquet

    fields = [("id", arrow.int64())]
    if naming.files is not None:
        fields.append(("file", arrow.string()))
    fields += [("label", arrow.string()), ("predicted", arrow.string())]
    schema = arrow.schema([*fields, ("probabilities", arrow.list_(arrow.float64()))])
    with contextlib.closing(parquet.ParquetWriter(path, schema)) as table:
        for rows in parts:
            table.write_table(arrow.Table.from_pylist(list(naming.records(rows)), schema=schema))


_WRITERS: dict[str, Callable[[Path, Iterable[Rows], Naming], None]] = {
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".jsonl": _write_lines,
}
