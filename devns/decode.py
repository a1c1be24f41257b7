"""A table of a TOML file becomes a frozen dataclass, by its annotations; an error names the file and the key path.

    @dataclass(frozen=True)
    class Limits:                       # [limits]
        memory: int | None = field(default=None, metadata={"unit": "size"})    # memory = "4G"
        ports: tuple[int, ...] = field(default=(), metadata={"merge": "add"})  # adds up along `extends`
        source: str = field(default="", metadata={"key": "from"})              # from = "..."
        enforce: Literal["warn", "fail"] = "warn"
        clock: Clock | Literal[False] = False                                  # clock = true: a Clock of defaults

A field without a default is a required key. A `ValueError` of `__post_init__` becomes an error at the table's key.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from devns.errors import TemplateError

T = TypeVar("T")

_WORD_MAX = 60  # characters of a value that an error repeats
_INT_MAX = 2**63  # TOML promises 64 bits; Python would carry any number on, to where it hurts


@dataclass(frozen=True)
class At:
    """Where a value stands: its key path, and the file that said it. `origin` knows the files of keys further down."""

    file: str
    key: str = ""
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def child(self, name: str) -> At:
        return self._step(join(self.key, name))

    def item(self, index: int) -> At:
        return self._step(f"{self.key}[{index}]")

    def _step(self, key: str) -> At:
        return At(self.origin.get(key, self.file), key, self.origin)

    def error(self, why: str, *, hint: str | None = None) -> TemplateError:
        """The error to raise, fit for a terminal whatever the file contains."""
        where = f"{self.file}: {self.key}" if self.key else self.file
        return TemplateError(escape(f"{where}: {why}"), hint=hint and escape(hint))


@dataclass(frozen=True)
class Key:
    """One key that a table knows."""

    field: str
    kind: Any  # its annotation
    required: bool = False
    adds: bool = False  # lists add up along `extends` instead of replacing each other

    @property
    def table(self) -> type | None:
        """The dataclass among what this key may hold."""
        return next((kind for kind in _kinds(self.kind) if _is_table(kind)), None)


def keys(table: type) -> dict[str, Key]:
    """The keys of a table as its file writes them."""
    hints = get_type_hints(table)
    return {
        field.metadata.get("key", field.name): Key(
            field=field.name,
            kind=_measured(hints[field.name], field.metadata.get("unit")),
            required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
            adds=field.metadata.get("merge") == "add",
        )
        for field in dataclasses.fields(table)
        if field.init
    }


def decode(table: type[T], data: Any, at: At) -> T:
    """`data` as a `table`. Raises TemplateError for an unknown or missing key, a wrong type or an impossible value."""
    if not isinstance(data, dict):
        raise at.error(f"must be a table, not {_shown(data)}")
    known = keys(table)
    for name in data:
        if name not in known:
            raise at.child(name).error("no such key", hint=near(name, known) or f"known keys: {', '.join(known)}")
    for name, key in known.items():
        if key.required and name not in data:
            raise at.child(name).error("is required")
    values = {known[name].field: _value(known[name].kind, value, at.child(name)) for name, value in data.items()}
    try:
        return table(**values)
    except ValueError as problem:
        raise at.error(str(problem)) from None


# --- one value ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """A whole number that may be written with a unit. Stands in an annotation where `int` stood."""

    name: str
    pattern: str
    factors: Mapping[str, int]
    least: int = -_INT_MAX

    def read(self, value: Any) -> int | None:
        if isinstance(value, str) and (match := re.fullmatch(self.pattern, value, re.ASCII)):
            value = int(match[1]) * self.factors[match[2]]
        return value if type(value) is int and self.least <= value < _INT_MAX else None


# Memory is counted in powers of two, as in systemd.resource-control(5).
_UNITS = {
    "duration": _Unit(
        'a duration such as "90s", "-2h" or "+30d"',
        r"([+-]?\d{1,12})([smhdw])",
        {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800},
    ),
    "size": _Unit(
        'a size such as "512M" or "4G"',
        r"(\d{1,12})([KMGT])",
        {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40},
        least=0,
    ),
}

_SCALARS = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}


def _value(annotation: Any, value: Any, at: At) -> Any:
    kinds = _kinds(annotation)
    kind = next((kind for kind in kinds if _suits(kind, value)), None)
    if kind is None and value is True and len(kinds) > 1:  # `Uts | Literal[False]`: true asks for the defaults
        kind, value = next((kind for kind in kinds if _is_table(kind)), None), {}
    if kind is None:
        words = [word for kind in kinds for word in _words(kind)]
        choices = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        raise at.error(f"must be {_either(words)}, not {_shown(value)}", hint=near(value, choices))
    if _is_table(kind):
        return decode(kind, value, at)
    if get_origin(kind) is tuple:
        pairs = zip(_items(kind, value), value, strict=True)
        return tuple(_value(item, part, at.item(i)) for i, (item, part) in enumerate(pairs))
    if isinstance(value, dict):
        return {_text(name, at): _value(get_args(kind)[1], part, at.child(name)) for name, part in value.items()}
    if isinstance(kind, _Unit):
        return kind.read(value)
    if isinstance(value, str):
        return _text(value, at)
    return float(value) if kind is float else value


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """What a key may hold: the sides of a union. None is no value of TOML: it is a key that is not there."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for kind in get_args(annotation) if kind is not types.NoneType)
    return annotation if isinstance(annotation, tuple) else (annotation,)


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _measured(annotation: Any, unit: str | None) -> Any:
    """`annotation` with every whole number in it read in `unit`."""
    if unit is None:
        return annotation
    return tuple(_UNITS[unit] if kind is int else kind for kind in _kinds(annotation))


def _items(kind: Any, value: list[Any]) -> tuple[Any, ...]:
    """The kind of each item of a list."""
    items = get_args(kind)
    return items[:1] * len(value) if items[-1] is Ellipsis else items


def _suits(kind: Any, value: Any) -> bool:
    """Does `value` have the shape of `kind`? Never by equality alone: True == 1 in Python, not in TOML."""
    if isinstance(kind, _Unit):
        return kind.read(value) is not None
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list) and len(value) == len(_items(kind, value))
    if kind is int:
        return type(value) is int and -_INT_MAX <= value < _INT_MAX
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind in (str, bool):
        return type(value) is kind
    return isinstance(value, dict)


def _words(kind: Any) -> list[str]:
    """How an error names what would have been right."""
    if isinstance(kind, _Unit):
        return [kind.name]
    if get_origin(kind) is Literal:
        return [show(choice) for choice in get_args(kind)]
    if get_origin(kind) is tuple:
        items = get_args(kind)
        return ["a list" if items[-1] is Ellipsis else f"a list of {len(items)}"]
    return [_SCALARS.get(kind, "a table")]


def _text(value: str, at: At) -> str:
    if "\0" in value:  # no path, variable or argument of Linux can carry one
        raise at.error("contains a NUL character")
    return value


# --- words for people ---------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """`text` with nothing in it that a terminal would act on or not show: control, bidi and invisible characters."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def join(path: str, name: str) -> str:
    """The key path one further down, quoted as TOML would."""
    part = name if re.fullmatch(r"[A-Za-z0-9_-]+", name, re.ASCII) else json.dumps(name, ensure_ascii=False)
    return f"{path}.{part}" if path else part


def near(name: object, known: Iterable[object]) -> str | None:
    """The hint for a name that is not known, where one that is known is near."""
    if not isinstance(name, str) or len(name) > 64:  # nothing is near to that, and comparing takes quadratic time
        return None
    close = difflib.get_close_matches(name, [word for word in known if isinstance(word, str)], n=1)
    return f"did you mean {close[0]}?" if close else None


def show(value: Any) -> str:
    """A value as TOML writes it on one line, escaped."""
    if isinstance(value, dict):
        inside = ", ".join(f"{escape(join('', name))} = {show(part)}" for name, part in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, (str, bool)):
        return escape(json.dumps(value, ensure_ascii=False))
    return value.isoformat() if isinstance(value, (datetime.date, datetime.time)) else str(value)


def _shown(value: Any) -> str:
    """What was found instead: in full where that is short."""
    if isinstance(value, (dict, list)):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, (datetime.date, datetime.time)):
        return "a time" if isinstance(value, datetime.time) else "a date"
    text = show(value)
    return text if len(text) <= _WORD_MAX else f"{text[:_WORD_MAX]}..."


def _either(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
