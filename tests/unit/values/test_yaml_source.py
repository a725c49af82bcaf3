"""Files of YAML and JSON: values, lines, and mistakes that are pointed at."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shoal.errors import RecipeError
from shoal.yaml_source import dump, load, loads, problems

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def write(tmp_path: Path, text: str, name: str = "file.yaml") -> Path:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(plain)
def test_what_is_dumped_loads_equal(tmp_path: Path, value: Any) -> None:
    assert load(write(tmp_path, dump(value))).value == value
    assert load(write(tmp_path, json.dumps(value, indent="\t"), "file.json")).value == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0x1f", 31),
        ("-0", 0),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("no", False),
        ("On", True),
        ("~", None),
        ("", None),
        (".inf", float("inf")),
        ("inf", "inf"),
        ("1e", "1e"),
        ("'1e-3'", "1e-3"),
        ("5 steps", "5 steps"),
    ],
)
def test_scalars(tmp_path: Path, text: str, value: object) -> None:
    found = load(write(tmp_path, f"key: {text}\n")).value["key"]
    assert found == value
    assert type(found) is type(value)


def test_a_piece_of_yaml() -> None:
    assert loads("1e-3") == 0.001
    assert loads("{a: [1, x]}") == {"a": [1, "x"]}
    assert loads("") is None
    for text in ("[1", "{a: 1, a: 2}", "&a [*a]", "!!python/name:os.sep x", "\x07"):
        with pytest.raises(ValueError, match=r"YAML|twice|itself"):
            loads(text)


def test_lines(tmp_path: Path) -> None:
    text = "# a comment\na: 1\nb:\n  c: {d: 2,\n      e: 3}\n  f:\n    - x\n    - g: 4\n"
    document = load(write(tmp_path, text))
    assert document.line(()) == 2
    assert document.line(("b",)) == 3
    assert document.line(("b", "c", "e")) == 5
    assert document.line(("b", "f", 1)) == 8
    assert document.line(("b", "f", 1, "g")) == 8
    assert document.line(("b", "f", 2)) is None
    assert document.line(("b", "x")) is None
    assert document.nearest_line(("b", "c", "x", "y")) == 4


def test_merged_keys(tmp_path: Path) -> None:
    text = "base: &base {x: 1, y: 2}\nmore:\n  <<: *base\n  y: 3\n"
    document = load(write(tmp_path, text))
    assert document.value["more"] == {"x": 1, "y": 3}
    assert document.line(("more", "x")) == 1
    assert document.line(("more", "y")) == 4


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a: is given twice, first in line 1"),
        ("m:\n  - {a: 1}\n  - {a: 1, a: 2}\n", 3, "m.1.a: is given twice"),
        ("a: [1, 2\nb: 3\n", 2, "is not YAML"),
        ("a: 1\n b: 2\n", 2, "is not YAML"),
        ("a: 1\n---\nb: 2\n", 2, "is not YAML"),
        ("a: &x [1, *x]\n", 1, "contains itself"),
        ("a: !!python/object/apply:os.getcwd []\n", 1, "is not YAML"),
        ("? [1, 2]\n: 3\n", 1, "is not YAML"),
        ("a: \x07\n", None, "is not YAML"),
        ("[" * 1500, None, "nested too deeply"),
    ],
)
def test_files_that_are_not_yaml(tmp_path: Path, text: str, line: int | None, says: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load(file)
    (problem,) = caught.value.problems
    assert (problem.file, problem.line) == (str(file), line)
    assert says in str(problem)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [('{"a": 1,\n "b": }', 2, "is not JSON"), ('{"a": 1,\n "a": 2}', 2, "is given twice")],
)
def test_files_that_are_not_json(tmp_path: Path, text: str, line: int, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write(tmp_path, text, "file.json"))
    assert caught.value.problems[0].line == line
    assert says in str(caught.value)


def test_missing_files_name_their_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "", "digits.yaml")
    write(tmp_path, "", "notes.txt")
    with pytest.raises(RecipeError, match=r"no such file\nDid you mean .*digits\.yaml\?") as caught:
        load(tmp_path / "digts.yaml")
    assert caught.value.exit_status == 2
    assert caught.value.problems[0].file == str(tmp_path / "digts.yaml")
    with pytest.raises(RecipeError, match=r"In .*: digits\.yaml\."):
        load(tmp_path / "zzz")
    with pytest.raises(RecipeError, match="no folder"):
        load(tmp_path / "none" / "x.yaml")
    with pytest.raises(RecipeError, match="can't be read"):
        load(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    with pytest.raises(RecipeError, match="UTF-8"):
        load(tmp_path / "bytes.yaml")


class Inner(BaseModel):
    """A part with checks of its own."""

    model_config = ConfigDict(extra="forbid")
    lr: float = Field(gt=0)
    name: str = "sgd"


class Outer(BaseModel):
    """Every shape that a file of ours has."""

    model_config = ConfigDict(extra="forbid")
    optimizer: Inner
    either: str | Inner | None = None
    several: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] = {}
    over: int | Literal["batch"] = "batch"


TEXT = """optimizer:
  lr: {lr}
either: {either}
several: [{several}]
by_name:
  one: {{lr: {one}}}
over: {over}
"""
GOOD = {"lr": "1", "either": "x", "several": "", "one": "1", "over": "3"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lr": "-1"}, "2: optimizer.lr: must be more than 0, given -1"),
        ({"lr": "1\n  lrr: 2"}, "3: optimizer.lrr: is not a known key: did you mean 'lr'?"),
        ({"lr": "1\n  zzzz: 2"}, "3: optimizer.zzzz: is not a known key: known: lr, name"),
        ({"either": "{lr: 1, nam: 2}"}, "3: either.nam: is not a known key: did you mean 'name'?"),
        ({"several": "{lr: 1}, {lr: x}"}, '4: several.1.lr: must be a number, given "x"'),
        ({"several": "{}"}, "4: several.0.lr: is missing"),
        ({"one": "0"}, "6: by_name.one.lr: must be more than 0, given 0"),
        ({"over": "all"}, "7: over: must be a whole number or 'batch', given \"all\""),
    ],
)
def test_pydantics_findings(tmp_path: Path, change: dict[str, str], expected: str) -> None:
    document = load(write(tmp_path, TEXT.format(**{**GOOD, **change})))
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(document.value)
    (problem,) = problems(caught.value, document, Outer)
    assert str(problem) == f"{document.file}:{expected}"
    (without,) = problems(caught.value, None, Outer)
    assert str(without) == expected.partition(": ")[2]
