"""What a setting may be, said where it is declared, and checked in one place.

A hint carries the range of a value and ``option`` its meaning:
``gamma: NonNegative = option(0.01, "radius of the weight perturbation")``. ``coerce`` reads a
value as the hint says and refuses what lies outside; the parts, the run's settings,
``fastadv.step`` and the attacks call it, so the command line, a ``config.toml`` and Python are
held to the same words. A number without a range is any finite one.
"""

from __future__ import annotations

import functools
import math
import numbers
import os
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fastadv.by_epoch import Phases, Points, Ramp, read
from fastadv.errors import UserError, brief, unknown

# What float32 holds, the type that parts compute in; a larger number is infinite there.
LARGEST = 3.4028234663852886e38
# What int64 holds: counters, seeds and sizes live in such tensors.
LARGEST_WHOLE = 2**63 - 1
# No publication takes more passes in one update; a typing mistake must not run for days.
MOST_PASSES = 10_000

_FRACTION = re.compile(r"\s*([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(?:/\s*([0-9.]+)\s*)?")
_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,30}\s*")


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``, the ends included unless ``open_low``, ``open_high``.

    None leaves that side open: then what float32 (int64 for whole numbers) holds is the end.
    """

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low is None or value > self.low or (value == self.low and not self.open_low)
        below = (
            self.high is None or value < self.high or (value == self.high and not self.open_high)
        )
        return above and below

    def __str__(self) -> str:
        if (self.low, self.high) == (0, 1) and not (self.open_low or self.open_high):
            return "between 0 and 1"
        ends = []
        if self.low is not None:
            ends.append(f"{'above' if self.open_low else 'at least'} {self.low:g}")
        if self.high is not None:
            ends.append(f"{'below' if self.open_high else 'at most'} {self.high:g}")
        return " and ".join(ends)


@dataclass(frozen=True)
class SavedNetworks:
    """Marks an option that holds networks: on the command line and in a ``config.toml`` they are
    written as paths of run folders or weight files, and the run loads them before its step."""


def holds_networks(hint: Any) -> bool:
    """True if an option with this hint is marked with ``SavedNetworks``."""
    return get_origin(hint) is Annotated and any(
        isinstance(mark, SavedNetworks) for mark in get_args(hint)[1:]
    )


NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, open_high=True)]
ShareAboveZero = Annotated[float, Range(0, 1, open_low=True)]
AnyNumber = Annotated[float, Range()]
Count = Annotated[int, Range(1)]
Passes = Annotated[int, Range(1, MOST_PASSES)]
Restarts = Annotated[int, Range(1, 64)]  # each has a stream of noise of its own
CountOrZero = Annotated[int, Range(0)]


@dataclass(frozen=True)
class MayChange:
    """Marks a number that may change with the epoch (``by_epoch.py``); ``ramps`` is False if only
    phases fit, as for whole numbers."""

    ramps: bool = True


@dataclass(frozen=True)
class OrAuto:
    """Marks a number that may also be the word "auto": found by measuring."""


@dataclass(frozen=True)
class OrCode:
    """Marks a choice in whose place code of the user's own can be named: ``module:callable``."""


CountOrAuto = Annotated[int, Range(1), OrAuto()]

ChangingNonNegative = Annotated[float | Ramp | Phases, Range(0), MayChange()]
ChangingPasses = Annotated[int | Phases, Range(1, MOST_PASSES), MayChange(ramps=False)]


def option(default: Any, meaning: str) -> Any:
    """A dataclass field with a default and what it means: a phrase for a line of help, with its
    unit if it has one."""
    return field(default=default, metadata={"meaning": meaning})


def meanings(owner: Any) -> Mapping[str, str]:
    """What the options of a dataclass mean: name -> phrase, of those made by ``option``."""
    return {
        entry.name: entry.metadata["meaning"]
        for entry in fields(owner)
        if "meaning" in entry.metadata
    }


def declared(owner: Any) -> Mapping[str, Any]:
    """Every hint of a class or function, with its range: name -> hint."""
    return _hints(owner)


@functools.cache
def _hints(owner: Any) -> Mapping[str, Any]:
    return types.MappingProxyType(get_type_hints(owner, include_extras=True))


def checked(owner: Any, **given: Any) -> dict[str, Any]:
    """``given`` as the hints of ``owner`` (a class or function) say: name -> value."""
    hints = declared(owner)
    return {name: coerce(name, value, hints[name]) for name, value in given.items()}


def check_fields(instance: Any, names: Iterable[str]) -> None:
    """Set each of the fields called ``names`` to what its hint makes of it."""
    hints = declared(type(instance))
    for name in names:
        # ``object``: a frozen dataclass is checked like any other.
        object.__setattr__(instance, name, coerce(name, getattr(instance, name), hints[name]))


def plain_type(hint: Any) -> Any:
    """``hint`` without its None and its range; of several types the first."""
    if get_origin(hint) in (Union, types.UnionType):
        return plain_type(next(kind for kind in get_args(hint) if kind is not type(None)))
    return plain_type(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def may_change(hint: Any) -> bool:
    """True if a value of ``hint`` may change with the epoch."""
    return any(_changing(kind) is not None for kind in _alternatives(hint))


def may_be_auto(hint: Any) -> bool:
    """True if ``hint`` allows the word "auto" in place of a number."""
    kinds = [get_args(kind)[1:] for kind in _alternatives(hint) if get_origin(kind) is Annotated]
    return any(isinstance(mark, OrAuto) for marks in kinds for mark in marks)


def _may_be_code(kind: Any) -> bool:
    marks = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return any(isinstance(mark, OrCode) for mark in marks)


def may_be_absent(hint: Any) -> bool:
    """True if ``hint`` allows None."""
    return type(None) in _alternatives(hint)


def describe(hint: Any) -> str:
    """What a hint allows beyond its type, as words for a list of options; "" for everything."""
    kinds = [kind for kind in _alternatives(hint) if kind is not type(None)]
    if len(kinds) != 1:
        return ""
    kind = kinds[0]
    choices = get_args(plain_type(kind)) if get_origin(plain_type(kind)) is Literal else ()
    if choices:
        *words, last = [*map(str, choices), *["module:function"] * _may_be_code(kind)]
        return f"{', '.join(words)} or {last}" if words else last
    if get_origin(kind) is Annotated:
        return str(_range_of(kind))
    if get_origin(kind) is tuple:
        entries = dict.fromkeys(describe(entry) for entry in get_args(kind) if entry is not ...)
        return f"each {', '.join(entries)}" if any(entries) else ""
    return ""


def coerce(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the hint's type; texts such as "8/255", "true" and "10" are read.

    Raises ``UserError`` in one sentence, with ``name`` and what is allowed, when it does not fit.
    """
    kinds = _alternatives(hint)
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) != 1:
        return value  # several types: the part that declares them looks for itself
    if value == "auto" and may_be_auto(hint):
        return value
    within = _range_of(kinds[0])
    changing = _changing(kinds[0])
    kind = plain_type(kinds[0])
    if changing is not None:
        return _by_epoch(name, value, Annotated[kind, within], changing)
    if get_origin(kind) is Literal:
        if isinstance(value, str) and ":" in value and _may_be_code(kinds[0]):
            return value
        if not isinstance(value, str) or value not in get_args(kind):
            raise unknown(name, value, get_args(kind))
        return value
    if kind is bool:
        return _boolean(name, value)
    if kind is int:
        allowed = "a whole number or auto" if may_be_auto(hint) else "a whole number"
        return _in_range(name, _whole(name, value, allowed), within, LARGEST_WHOLE)
    if kind is float:
        return _in_range(name, parse_number(value, name), within, LARGEST)
    if kind is Points:
        return _points(name, value)
    if kind is str:
        if not isinstance(value, (str, os.PathLike)):
            raise UserError(f"{name} must be a text, not {brief(value)}.")
        return os.fspath(value)
    if get_origin(kind) is tuple:
        return _several(name, value, get_args(kind))
    return value


def parse_number(text: Any, name: str = "number") -> float:
    """``"8/255"``, ``"0.03"`` or ``3e-2`` as a float; nothing is evaluated.

    Raises ``UserError`` when ``text`` is not one number or a fraction of two.
    """
    if isinstance(text, numbers.Real) and not isinstance(text, bool):
        number: Any = text
        try:
            return float(number)
        except OverflowError:
            return math.inf if number > 0 else -math.inf
    match = _FRACTION.fullmatch(text) if isinstance(text, str) else None
    try:
        if match is None:
            raise ValueError
        return float(match[1]) / float(match[2] or 1)
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"{name} must be a number such as 0.03 or a fraction such as 8/255, not {brief(text)}."
        ) from None


def _changing(kind: Any) -> MayChange | None:
    marks = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, MayChange)), None)


def _by_epoch(name: str, value: Any, hint: Any, changing: MayChange) -> Any:
    """A number, or a ramp or phases whose values fit ``hint``."""
    pieces = read(name, value) if isinstance(value, str) else None
    if pieces is not None:
        kind, parts = pieces
        if kind == "ramp":
            (start, end), (epochs, _) = parts
            numbers_ = [parse_number(each, name) for each in (start, end, epochs)]
            value = Ramp(*numbers_)
        else:
            epoch, one = (f"each {part} of {name} (value@epoch)" for part in ("epoch", "value"))
            value = Phases(
                [(parse_number(first, epoch), coerce(one, each, hint)) for first, each in parts]
            )
    if isinstance(value, Ramp) and not changing.ramps:
        raise UserError(f"{name} is a whole number: take phases such as 2@0,5@30, not a ramp.")
    if isinstance(value, (Ramp, Phases)):
        for each in value.values():
            coerce(name, each, hint)
        return value
    return coerce(name, value, hint)


def _points(name: str, value: Any) -> Points:
    if isinstance(value, Points):
        return value
    try:
        pieces = read(name, value) if isinstance(value, str) else None
    except UserError:  # names ramps and phases, which points are not
        pieces = None
    if pieces is None or pieces[0] != "phases":
        raise UserError(f"{name} takes value@epoch, such as 0@0,0.1@5,0@30, not {brief(value)}.")
    return Points([(parse_number(e, name), parse_number(v, name)) for e, v in pieces[1]])


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if _changing(hint) is not None:
        return (hint,)
    if holds_networks(hint):
        hint = get_args(hint)[0]
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _range_of(kind: Any) -> Range:
    if get_origin(kind) is not Annotated:
        return Range()
    return next((mark for mark in get_args(kind)[1:] if isinstance(mark, Range)), Range())


def _in_range(name: str, value: Any, within: Range, largest: float) -> Any:
    # Compared as "not inside": a NaN is inside nothing.
    if -largest <= value <= largest and value in within:
        return value
    allowed = str(within)
    if allowed and (-largest <= value <= largest or value != value):
        raise UserError(f"{name} must be {allowed}, not {value:g}.")
    before = f"{allowed} and " if allowed else ""
    if isinstance(value, int):
        raise UserError(f"{name} must be {before}below 2^63, and this number is not.")
    if math.isfinite(value):
        raise UserError(f"{name} must be {before}a number that float32 holds, not {value:g}.")
    raise UserError(f"{name} must be {before}finite, not {value:g}.")


def _whole(name: str, value: Any, allowed: str) -> int:
    # Never by way of a float, which rounds a seed above 2^53.
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    try:
        number = parse_number(value, name)
    except UserError:
        raise UserError(f"{name} must be {allowed}, not {brief(value)}.") from None
    if not math.isfinite(number) or number != int(number):
        raise UserError(f"{name} must be {allowed}, not {brief(value)}.")
    return int(number)


def _boolean(name: str, value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise UserError(f"{name} must be true or false, not {brief(value)}.")
    return words[str(value).lower()]


def _several(name: str, value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    """A tuple from a sequence, one value, or a text such as "3,4"."""
    if isinstance(value, str):
        value = [entry.strip() for entry in value.split(",")]
    tolist = getattr(value, "tolist", None)  # of a tensor or an array, which may have no length
    value = value if tolist is None else tolist()
    entries = list(value) if isinstance(value, Iterable) else [value]
    if kinds[-1] is ...:
        if not entries:
            raise UserError(f"{name} needs at least one value, such as 3,4.")
        return tuple(_entry(name, entry, kinds[0]) for entry in entries)
    if len(entries) != len(kinds):
        raise UserError(f"{name} takes {len(kinds)} values such as 0,1.5, not {len(entries)}.")
    return tuple(_entry(name, entry, kind) for entry, kind in zip(entries, kinds, strict=True))


def _entry(name: str, value: Any, kind: Any) -> Any:
    # Layer groups are texts that people write as numbers.
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return coerce(name, value, kind)
