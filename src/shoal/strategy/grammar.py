"""Reads the notation into parts, and says where in the text a mistake is.

    pp2.dp2.tp2 / zero1 / mb:8 + bf16         (without the spaces)
    axes          options        executions

    read("dp2/zero1+bf16")    # {"axes": (("dp", 2),), "zero": Zero(1), "bf16": True}

Options and executions may stand in any order among themselves; `str` writes the notation's order.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shoal.errors import Refused, StrategyError
from shoal.strategy.agreements import AGREEMENTS
from shoal.strategy.kinds import Kind, Whole, Word, did_you_mean
from shoal.strategy.parts import CHUNKS, GROUP, SCHEDULES, Compress, Schedule, Zero

AXES = ("pp", "dp", "cp", "tp", "ep")
ZEROS = ("zero1", "zero2", "zero3")
FLAGS = ("sp", "offload")
OPTIONS = (*ZEROS, *AGREEMENTS, "compress", "mb", *FLAGS, *SCHEDULES)
EXECUTIONS = ("bf16", "compile", "channels_last", "recompute", "exact")

DEGREE = Whole(1, "N, the degree of an axis")
MICROBATCHES = Whole(1, "mb:M: M, the number of microbatches", "mb:{}")
SHARDS = Whole(1, "exact:V: V, the logical shards", "exact:{}")
RECOMPUTE = Word(("selective",), "recompute:…: what is recomputed")


@dataclass(frozen=True)
class Token:
    """A piece of the text and the number of its first character, from 1."""

    text: str
    column: int

    def split(self, separator: str) -> Iterator["Token"]:
        """The pieces between separators."""
        column = self.column
        for piece in self.text.split(separator):
            yield Token(piece, column)
            column += len(piece) + len(separator)


def read(text: str) -> dict[str, Any]:
    """The fields of a `Strategy`. Raises StrategyError naming character and part."""
    stray = re.search(r"[^A-Za-z0-9_.:/+=-]", text)
    if stray is not None:
        raise StrategyError(
            f"character {stray.start() + 1}, {stray[0]!r}, is no part of the notation",
            hint="A strategy looks like dp2, or pp2.dp2.tp2/zero1/1f1b+bf16.",
        )
    first, *executions = Token(text, 1).split("+")
    axes, *options = first.split("/")
    values = _axes(axes)
    for token in options:
        _add(values, token, _option)
    for token in executions:
        _add(values, token, _execution)
    return values


@contextmanager
def _at(token: Token) -> Iterator[None]:
    """Errors inside say where the token stands."""
    try:
        yield
    except StrategyError as error:
        where = f"character {token.column}" + (f", {token.text!r}" if token.text else "")
        raise type(error)(f"{where}: {error.message}", hint=error.hint) from None


def _add(values: dict[str, Any], token: Token, reader: Callable[[Token], dict[str, Any]]) -> None:
    """What one token says, put beside what is known."""
    with _at(token):
        for key, value in reader(token).items():
            if key in values:
                raise _twice(key, values[key], value)
            values[key] = value


def _twice(key: str, first: object, second: object) -> StrategyError:
    if first == second:
        what = str(first) if key in ("zero", "agreement", "compress", "schedule") else key
        return Refused(f"{what} is given twice", hint="Leave one of the two out.")
    names = {"zero": "stages of ZeRO", "agreement": "agreements", "schedule": "schedules"}
    what = names.get(key, f"values of {key}")
    return Refused(f"two {what}, {first} and {second}", hint=f"Keep one: {first} or {second}.")


def _axes(token: Token) -> dict[str, Any]:
    if token.text in ("single", "auto"):
        return {"axes": (), "is_auto": token.text == "auto"}
    degrees: dict[str, int] = {}
    for part in token.split("."):
        with _at(part):
            name, degree = _axis(part)
            if name in degrees:
                raise _axis_twice(name, degrees[name], degree)
            degrees[name] = degree
    return {"axes": tuple(degrees.items())}


def _axis_twice(name: str, first: int, second: int) -> Refused:
    near = " or ".join(sorted({f"{name}{first}", f"{name}{second}"}))
    return Refused(
        f"{name} is given twice, as {name}{first} and {name}{second}",
        hint=f"Nearest that works: {near}.",
    )


def _axis(part: Token) -> tuple[str, int]:
    if not part.text:
        raise StrategyError(
            "an axis is missing: single, auto, or axes with degrees, as in dp2 or pp2.dp4"
        )
    if part.text in ("single", "auto"):
        raise StrategyError(f"{part.text} stands alone, without other axes")
    match = re.fullmatch(r"([A-Za-z_]*)(-?[0-9]*)", part.text)
    name, digits = match.groups() if match else (part.text, "")
    if name not in AXES:
        raise _no_axis(part.text, name, digits)
    if not digits or digits == "-":
        raise StrategyError(f"{name} needs a degree, as in {name}2")
    degree = DEGREE.read(digits)
    if degree < 1:
        raise Refused(
            f"the degree of {name} is {degree}, and must be 1 or more",
            hint=f"Nearest that works: {name}1, which is the same as leaving {name} out.",
        )
    DEGREE.check(degree)
    return name, degree


def _no_axis(text: str, name: str, digits: str) -> StrategyError:
    if text.split(":")[0] in OPTIONS:
        return StrategyError(f"{text} is an option", hint=f"Write /{text} after the axes.")
    if text.split(":")[0] in EXECUTIONS:
        return StrategyError(f"{text} is an execution", hint=f"Write +{text} at the end.")
    hint = None if digits else did_you_mean(name, ("single", "auto"))
    hint = hint or did_you_mean(name, AXES, "{}" + (digits.lstrip("-") or "2"))
    return StrategyError(f"no axis {text!r}: there are {', '.join(AXES)}, single, auto", hint=hint)


def _option(token: Token) -> dict[str, Any]:
    name, *pieces = token.text.split(":")
    if name in AGREEMENTS:
        return {"agreement": AGREEMENTS[name].read(pieces)}
    if name == "compress":
        return {"compress": Compress.read(pieces)}
    if name in SCHEDULES:
        return {"schedule": _schedule(name, pieces)}
    if re.fullmatch(r"zero[0-9]", name):
        return {"zero": _zero(int(name[-1]), pieces)}
    if name == "mb":
        return {"mb": _only(name, pieces, MICROBATCHES)}
    if name in FLAGS:
        _none(name, pieces)
        return {name: True}
    raise _no_option(token.text, name)


def _zero(stage: int, pieces: list[str]) -> Zero:
    return Zero(stage, _only(f"zero{stage}", pieces, GROUP) if pieces else None)


def _schedule(name: str, pieces: list[str]) -> Schedule:
    if name == "interleaved":
        return Schedule(name, _only(name, pieces, CHUNKS))
    _none(name, pieces)
    return Schedule(name)


def _no_option(text: str, name: str) -> StrategyError:
    if name in EXECUTIONS:
        return StrategyError(f"{text} is an execution", hint=f"Write +{text} at the end.")
    if re.fullmatch(rf"({'|'.join(AXES)})[0-9]+", name):
        return StrategyError(f"{text} is an axis", hint=f"Join axes with dots: dp2.{text}.")
    message = f"no option {name!r}: there are {', '.join(OPTIONS)}"
    return StrategyError(message, hint=did_you_mean(name, OPTIONS))


def _execution(token: Token) -> dict[str, Any]:
    name, *pieces = token.text.split(":")
    if name == "recompute":
        return {name: _only(name, pieces, RECOMPUTE) if pieces else "full"}
    if name == "exact":
        return {name: _only(name, pieces, SHARDS)}
    if name in EXECUTIONS:
        _none(name, pieces)
        return {name: True}
    if "/" in token.text:
        option = token.text.partition("/")[2]
        raise StrategyError(
            "options stand before executions", hint=f"Write /{option} before the +."
        )
    if name in OPTIONS:
        raise StrategyError(f"{token.text} is an option", hint=f"Write /{token.text} before the +.")
    message = f"no execution {name!r}: there are {', '.join(EXECUTIONS)}"
    raise StrategyError(message, hint=did_you_mean(name, EXECUTIONS))


def _none(name: str, pieces: list[str]) -> None:
    if pieces:
        raise StrategyError(f"{name} takes no value; given {':'.join(pieces)!r}")


def _only(name: str, pieces: list[str], kind: Kind) -> Any:
    """The one value of an option."""
    if len(pieces) != 1:
        given = f"; given {':'.join(pieces)!r}" if pieces else ""
        raise StrategyError(f"{name} needs one value: {kind.what}: {kind.allowed}{given}")
    value = kind.read(pieces[0])
    kind.check(value)
    return value
