"""YAML and JSON files read with the line of every key, so that each mistake can be pointed at.

    document = load(Path("recipes/digits.yaml"))
    document.value["optimizer"]["lr"]          # 0.001: `1e-3` is a number here, as in YAML 1.2
    document.line(("optimizer", "lr"))         # 7

    try:
        Recipe.model_validate(document.value)
    except ValidationError as error:
        raise RecipeError(problems(error, document, Recipe)) from None

Scalars follow the core schema of YAML 1.2 (plus `yes`, `no`, `on`, `off`): dates, times of day and
numbers with leading zeros stay text. :func:`dump` writes text that :func:`load` reads back equal.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from shoal.errors import Problem, RecipeError

KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_SCALARS: tuple[tuple[str, str, str], ...] = (
    (f"{_TAG}null", r"~|null|Null|NULL|", "~nN\0"),
    (f"{_TAG}bool", r"(?i:true|false|yes|no|on|off)", "tTfFyYnNoO"),
    (f"{_TAG}int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        f"{_TAG}float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    (_MERGE, r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class's own attribute


class _Dumper(yaml.SafeDumper):
    """Knows the same scalars as the loader, so that the text `1e-3` is written in quotes."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class's own attribute

    def ignore_aliases(self, data: Any) -> bool:
        """Equal parts are written out, not as references."""
        return True


def _write_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # YAML 1.1 takes these for ends of lines, and folds them to blanks unless they are escaped.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _write_text)
for _tag, _pattern, _first in _SCALARS:
    _firsts = ["" if letter == "\0" else letter for letter in _first]
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _firsts)


@dataclass(frozen=True)
class YamlDocument:
    """What a file holds, as plain dicts, lists and scalars, and where each key of it stands."""

    file: str
    value: Any
    _root: yaml.Node | None = field(default=None, repr=False, compare=False)

    def line(self, path: KeyPath) -> int | None:
        """The line (from 1) of the key or element at ``path``; None where there is none."""
        node = self._root
        line = None if node is None else node.start_mark.line + 1
        for part in path:
            step = _child(node, part)
            if step is None:
                return None
            node, line = step
        return line

    def nearest_line(self, path: KeyPath) -> int | None:
        """The line of ``path``, or of the innermost part around it that is in the file."""
        for length in range(len(path), -1, -1):
            line = self.line(path[:length])
            if line is not None:
                return line
        return None


def load(path: Path | str) -> YamlDocument:
    """Read a file of YAML, or of JSON if its name ends in `.json`.

    Raises RecipeError with file and line: a missing file, text that is not YAML or JSON, a key
    given twice, a structure that contains itself.
    """
    path = Path(path)
    text, file = _read(path), str(path)
    if path.suffix != ".json":
        return YamlDocument(file, *_compose(text, file))
    value = _parse_json(text, file)
    # JSON may be indented with tabs, which YAML forbids; inside its strings they can't occur.
    return YamlDocument(file, value, _compose(text.replace("\t", " "), file)[1])


def loads(text: str) -> Any:
    """The value of a piece of YAML, such as `1e-3` or `{a: [1, 2]}`. Raises ValueError."""
    try:
        return _compose(text, None)[0]
    except RecipeError as error:
        raise ValueError(str(error)) from None


def dump(value: Any) -> str:
    """YAML text of plain dicts, lists and scalars, keys in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def problems(
    error: ValidationError, document: YamlDocument | None, model: type[BaseModel]
) -> tuple[Problem, ...]:
    """Pydantic's findings as problems: dotted key, file and line, what was given, what is allowed.

    ``document`` is the file that the values came from, or None; ``model`` the class that was to be
    made of them: its fields are the names that an unknown key is compared with.
    """
    messages: dict[KeyPath, list[str]] = {}
    inputs: dict[KeyPath, Any] = {}
    branches: set[KeyPath] = set()
    for detail in error.errors(include_url=False):
        path, known = _walk(model, detail["loc"], detail["type"] == "extra_forbidden")
        # Pydantic counts only the elements that are right: too few of them follows from the others.
        if len(path) < len(detail["loc"]) or detail["type"] == "too_short":
            branches.add(path)
        message = _message(detail, known)
        if message not in messages.setdefault(path, []):
            messages[path].append(message)
        is_whole = detail["type"] == "value_error" and isinstance(detail["input"], dict | BaseModel)
        if detail["type"] not in ("missing", "extra_forbidden") and not is_whole:
            inputs[path] = detail["input"]
    found = []
    for path, texts in messages.items():
        # One of several forms was meant: what is wrong inside it says more than "is not the other".
        if path in branches and any(p[: len(path)] == path != p for p in messages):
            continue
        text = _join(texts)
        if path in inputs and "given" not in text:
            text += f", given {_short(inputs[path])}"
        place = () if document is None else (document.file, document.nearest_line(path))
        found.append(Problem(_dotted(path), text, *place))
    return tuple(sorted(found, key=lambda problem: problem.line or 0))


def nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean 'x'?`, or the whole list if nothing is near; empty if nothing is known."""
    if not known:
        return ""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.55)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _read(path: Path) -> str:
    file = str(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError([Problem("", "there is no such file", file)], hint=_near(path)) from None
    except UnicodeDecodeError as error:
        reason = f"is not text in UTF-8 (byte {error.start})"
    except OSError as error:
        reason = f"can't be read: {error.strerror or error}"
    raise RecipeError([Problem("", reason, file)])


def _near(path: Path) -> str:
    """The names beside a missing file that come closest to it."""
    folder = path.parent
    if not folder.is_dir():
        return f"There is no folder {folder} either."
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    if close := difflib.get_close_matches(path.name, names, n=3, cutoff=0.5):
        return "Did you mean " + " or ".join(str(folder / name) for name in close) + "?"
    readable = [name for name in names if name.endswith((".yaml", ".yml", ".json"))][:8]
    return f"In {folder}: {', '.join(readable) or 'no YAML or JSON file'}."


def _compose(text: str, file: str | None) -> tuple[Any, yaml.Node | None]:
    """The value and the tree of its nodes. Raises RecipeError."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        found = [] if root is None else list(_structure_problems(root, file))
        if found:
            raise RecipeError(found)
        return (None if root is None else loader.construct_document(root)), root
    except yaml.MarkedYAMLError as error:
        raise RecipeError([_syntax_problem(error, file)]) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError([Problem("", f"is not YAML: {_first_line(error)}", file)]) from None


def _parse_json(text: str, file: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = Problem(
            "", f"is not JSON: {error.msg} (column {error.colno})", file, error.lineno
        )
        raise RecipeError([problem]) from None
    except (RecursionError, ValueError) as error:
        raise RecipeError([Problem("", f"is not JSON: {_first_line(error)}", file)]) from None


def _syntax_problem(error: yaml.MarkedYAMLError, file: str | None) -> Problem:
    mark = error.problem_mark or error.context_mark
    text = ", ".join(part for part in (error.problem, error.context) if part)
    where = "" if mark is None else f" (column {mark.column + 1})"
    return Problem("", f"is not YAML: {text}{where}", file, None if mark is None else mark.line + 1)


def _first_line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _structure_problems(root: yaml.Node, file: str | None) -> Iterator[Problem]:
    """Keys given twice, and nodes that contain themselves through a reference."""
    seen: set[int] = set()
    above: list[int] = []

    def visit(node: yaml.Node, path: KeyPath) -> Iterator[Problem]:
        if id(node) in above:
            text = "contains itself through a reference"
            yield Problem(_dotted(path), text, file, node.start_mark.line + 1)
            return
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            return
        seen.add(id(node))
        above.append(id(node))
        if isinstance(node, yaml.MappingNode):
            yield from _repeated(node, path, file)
        for part, child in _children(node):
            yield from visit(child, (*path, part))
        above.pop()

    yield from visit(root, ())


def _children(node: yaml.Node) -> list[tuple[str | int, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        return [(str(key.value), value) for key, value in node.value]
    return list(enumerate(node.value))


def _repeated(node: yaml.MappingNode, path: KeyPath, file: str | None) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        line = key.start_mark.line + 1
        if key.value in first:
            text = f"is given twice, first in line {first[key.value]}: keep one of the two"
            yield Problem(_dotted((*path, key.value)), text, file, line)
        first.setdefault(key.value, line)


def _child(node: yaml.Node | None, part: str | int) -> tuple[yaml.Node, int] | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
        if not 0 <= part < len(node.value):
            return None
        return node.value[part], node.value[part].start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        # The last one counts: what `<<` merges in stands before the node's own keys.
        for key, value in reversed(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value == str(part):
                return value, key.start_mark.line + 1
    return None


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _walk(
    model: type[BaseModel], loc: KeyPath, unknown_key: bool
) -> tuple[KeyPath, tuple[str, ...]]:
    """``loc`` without pydantic's labels of union branches, and the fields known where it ends."""
    here: tuple[Any, ...] = (model,)
    known = _field_names(here)
    path: list[str | int] = []
    for index, part in enumerate(loc):
        here = tuple(_flatten(here))
        known = _field_names(here)
        inner = _step(here, part)
        if inner is None and not (unknown_key and index == len(loc) - 1):
            continue
        path.append(part)
        here = inner or ()
    return tuple(path), known


def _flatten(annotations: Sequence[Any]) -> Iterator[Any]:
    """The alternatives of unions and the insides of `Annotated`, one by one."""
    for annotation in annotations:
        origin = get_origin(annotation)
        if origin is None or origin in (tuple, list, dict, Mapping, Sequence):
            yield annotation
        elif hasattr(annotation, "__metadata__"):
            yield from _flatten((annotation.__origin__,))
        elif getattr(origin, "__name__", "") in ("Union", "UnionType"):
            yield from _flatten(get_args(annotation))
        else:
            yield annotation


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _field_names(annotations: Sequence[Any]) -> tuple[str, ...]:
    models = [each for each in annotations if _is_model(each)]
    return tuple(dict.fromkeys(name for each in models for name in each.model_fields))


def _step(annotations: Sequence[Any], part: str | int) -> tuple[Any, ...] | None:
    """The types that ``part`` may have inside any of these; None if none of them has it."""
    found: list[Any] = []
    for annotation in annotations:
        origin = get_origin(annotation)
        if _is_model(annotation):
            if part in annotation.model_fields:
                found.append(annotation.model_fields[str(part)].annotation)
        elif origin in (tuple, list, Sequence) and isinstance(part, int):
            found.extend(each for each in get_args(annotation) if each is not Ellipsis)
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            found.append(get_args(annotation)[1])
        elif annotation is Any:
            found.append(Any)
    return tuple(found) or None


_PLAIN: Mapping[str, str] = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "none_required": "must be null",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be {ge:g} or more",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be {le:g} or less",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "mapping_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "too_short": "must have {min_length} or more elements",
    "too_long": "must have {max_length} elements at most",
    "string_too_short": "must not be empty",
}


def _message(detail: Mapping[str, Any], known: tuple[str, ...]) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return f"is not a known key: {nearest(str(detail['loc'][-1]), known)}"
    if kind in _PLAIN:
        return _PLAIN[kind].format(**detail.get("ctx", {}))
    return str(detail["msg"]).removeprefix("Value error, ")


def _join(texts: Sequence[str]) -> str:
    """`must be a, or must be b` as `must be a or b`."""
    first, *rest = texts
    return " or ".join([first, *(text.removeprefix("must be ") for text in rest)])


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
