"""decode: every annotation it knows, and what it says of everything else."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devns.decode import At, decode, escape, join, keys, near, show
from devns.errors import TemplateError

TOP = At("t.toml", "table")


@dataclass(frozen=True)
class Clock:
    offset: int = field(default=0, metadata={"unit": "duration"})


@dataclass(frozen=True)
class Bind:
    src: str
    dst: str = "/"


@dataclass(frozen=True)
class Table:
    text: str = ""
    flag: bool = False
    count: int = 0
    ratio: float = 0.0
    mode: Literal["ro", "rw", "none"] = "none"
    names: tuple[str, ...] = field(default=(), metadata={"merge": "add"})
    rows: tuple[tuple[int, int, int], ...] = ()
    pair: tuple[str, int] = ("", 0)
    set: Mapping[str, str] = field(default_factory=dict)
    binds: tuple[Bind, ...] = ()
    clock: Clock | Literal[False] = False
    memory: int | Literal["max"] | None = field(default=None, metadata={"unit": "size"})
    limit: Optional[int] = None  # noqa: UP045  # the older spelling must do as well
    either: Union[str, tuple[str, ...]] = ""  # noqa: UP007
    source: str = field(default="host", metadata={"key": "from"})
    cached: int = field(default=7, init=False)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({}, Table()),
        ({"text": "é\n"}, Table(text="é\n")),
        ({"flag": True, "count": -3, "ratio": 2}, Table(flag=True, count=-3, ratio=2.0)),
        ({"mode": "rw"}, Table(mode="rw")),
        ({"names": ["a", "b"]}, Table(names=("a", "b"))),
        ({"rows": [[0, 1000, 1], [1, 100000, 65535]]}, Table(rows=((0, 1000, 1), (1, 100000, 65535)))),
        ({"pair": ["a", 1]}, Table(pair=("a", 1))),
        ({"set": {"A": "1", "B": ""}}, Table(set={"A": "1", "B": ""})),
        ({"binds": [{"src": "/a"}, {"src": "/b", "dst": "/c"}]}, Table(binds=(Bind("/a"), Bind("/b", "/c")))),
        ({"clock": False}, Table(clock=False)),
        ({"clock": True}, Table(clock=Clock())),
        ({"clock": {"offset": "+30d"}}, Table(clock=Clock(30 * 86400))),
        ({"clock": {"offset": "-2h"}}, Table(clock=Clock(-7200))),
        ({"clock": {"offset": "90s"}}, Table(clock=Clock(90))),
        ({"clock": {"offset": -5}}, Table(clock=Clock(-5))),
        ({"memory": "4G"}, Table(memory=4 << 30)),
        ({"memory": "512M"}, Table(memory=512 << 20)),
        ({"memory": 4096}, Table(memory=4096)),
        ({"memory": "max"}, Table(memory="max")),
        ({"limit": 3}, Table(limit=3)),
        ({"either": "a"}, Table(either="a")),
        ({"either": ["a"]}, Table(either=("a",))),
        ({"from": "debian:trixie"}, Table(source="debian:trixie")),
    ],
)
def test_a_table_becomes_its_dataclass(data: dict[str, Any], wanted: Table) -> None:
    decoded = decode(Table, data, TOP)
    assert decoded == wanted
    assert type(decoded.ratio) is float


DURATION = 'a duration such as "90s", "-2h" or "+30d"'
SIZE = 'a size such as "512M" or "4G" or "max"'
KNOWN = "known keys: text, flag, count, ratio, mode, names, rows, pair, set, binds, clock, memory, limit, either, from"


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        ({"txet": 1}, "txet: no such key", "did you mean text?"),
        ({"source": "x"}, "source: no such key", KNOWN),
        ({"cached": 1}, "cached: no such key", KNOWN),
        ({"text": 1}, "text: must be a string, not 1", None),
        ({"text": datetime.date(2024, 1, 2)}, "text: must be a string, not a date", None),
        ({"text": datetime.time(1)}, "text: must be a string, not a time", None),
        ({"text": "a\0b"}, "text: contains a NUL character", None),
        ({"flag": 1}, "flag: must be true or false, not 1", None),
        ({"flag": "true"}, 'flag: must be true or false, not "true"', None),
        ({"count": True}, "count: must be a whole number, not true", None),
        ({"count": 1.0}, "count: must be a whole number, not 1.0", None),
        ({"count": 2**63}, "count: must be a whole number, not 9223372036854775808", None),
        ({"ratio": True}, "ratio: must be a number, not true", None),
        ({"ratio": float("nan")}, "ratio: must be a number, not nan", None),
        ({"ratio": float("inf")}, "ratio: must be a number, not inf", None),
        ({"mode": "rww"}, 'mode: must be "ro", "rw" or "none", not "rww"', "did you mean rw?"),
        ({"mode": True}, 'mode: must be "ro", "rw" or "none", not true', None),
        ({"names": "a"}, 'names: must be a list, not "a"', None),
        ({"names": ["a", 1]}, "names[1]: must be a string, not 1", None),
        ({"rows": [[0, 1]]}, "rows[0]: must be a list of 3, not a list", None),
        ({"rows": [[0, 1, 1], [0, True, 1]]}, "rows[1][1]: must be a whole number, not true", None),
        ({"set": {"A": 1}}, "set.A: must be a string, not 1", None),
        ({"set": {"a.b": 1}}, 'set."a.b": must be a string, not 1', None),
        ({"set": ["A"]}, "set: must be a table, not a list", None),
        ({"set": {"A\0": "x"}}, "set: contains a NUL character", None),
        ({"binds": [{"dst": "/a"}]}, "binds[0].src: is required", None),
        ({"binds": [{"scr": "/a"}]}, "binds[0].scr: no such key", "did you mean src?"),
        ({"clock": 1}, "clock: must be a table or false, not 1", None),
        ({"clock": 0}, "clock: must be a table or false, not 0", None),
        ({"clock": {"offset": "30"}}, f'clock.offset: must be {DURATION}, not "30"', None),
        ({"clock": {"offset": True}}, f"clock.offset: must be {DURATION}, not true", None),
        ({"memory": "4 G"}, f'memory: must be {SIZE}, not "4 G"', None),
        ({"memory": -1}, f"memory: must be {SIZE}, not -1", None),
        ({"memory": "99999999999T"}, f'memory: must be {SIZE}, not "99999999999T"', None),
        ({"limit": "3"}, 'limit: must be a whole number, not "3"', None),
        ({"either": 1}, "either: must be a string or a list, not 1", None),
        ({"text": {}}, "text: must be a string, not a table", None),
        ({"count": "x" * 99}, f'count: must be a whole number, not "{"x" * 59}...', None),
    ],
)
def test_whatever_does_not_fit_is_named_with_its_key_path(data: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(TemplateError) as caught:
        decode(Table, data, TOP)
    assert caught.value.message == f"t.toml: table.{message}"
    assert caught.value.hint == hint


def test_an_unknown_key_that_is_near_none_lists_the_known_ones() -> None:
    with pytest.raises(TemplateError) as caught:
        decode(Bind, {"src": "/", "zzzzzz": 1}, TOP)
    assert caught.value.hint == "known keys: src, dst"


def test_what_is_no_table_at_all_is_refused() -> None:
    with pytest.raises(TemplateError, match=r"^t.toml: table: must be a table, not true$"):
        decode(Table, True, TOP)


def test_a_value_error_of_post_init_becomes_an_error_at_the_table() -> None:
    @dataclass(frozen=True)
    class Picky:
        low: int = 0
        high: int = 0

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError(f"low ({self.low}) is above high ({self.high})")

    with pytest.raises(TemplateError) as caught:
        decode(Picky, {"low": 2, "high": 1}, TOP)
    assert caught.value.message == "t.toml: table: low (2) is above high (1)"


def test_an_error_names_the_file_that_said_the_value() -> None:
    origin = {"table.set": "user.toml", "table.set.A": "base.toml", "table.names[1]": "project.toml"}
    at = At("t.toml", "table", origin)
    said = []
    for data in ({"set": {"A": 1}}, {"set": {"B": 1}}, {"names": ["a", 1]}, {"names": [1]}):
        with pytest.raises(TemplateError) as caught:
            decode(Table, data, at)
        said.append(caught.value.message.split(":")[0])
    assert said == ["base.toml", "user.toml", "project.toml", "t.toml"]


def test_keys_know_names_as_written_and_what_adds_up() -> None:
    known = keys(Table)
    assert (known["from"].field, known["names"].adds, known["text"].adds) == ("source", True, False)
    assert (known["clock"].table, known["set"].table, keys(Bind)["src"].required) == (Clock, None, True)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b]52;c;eA==\x07", r"\x1b]52;c;eA==\x07"),
        ("a\rb\nc", r"a\rb\nc"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("zero\u200bwidth \u2066", r"zero\u200bwidth \u2066"),
        ("\x9b31m \x7f", r"\x9b31m \x7f"),
        ("\udcff", r"\udcff"),
        ("naïve 漢字 ok", "naïve 漢字 ok"),
    ],
)
def test_E_15_error_text_is_escaped_before_it_can_reach_a_terminal(raw: str, shown: str) -> None:
    assert escape(raw) == shown
    with pytest.raises(TemplateError) as caught:
        decode(Table, {"text": {raw: 1}, raw: 1}, At(raw))
    assert all(char.isprintable() for char in caught.value.message)
    assert caught.value.message.startswith(shown)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"src": "~/x", "n": [1, 2.5, True]}, '{ src = "~/x", n = [1, 2.5, true] }'),
        ('say "\x1b"', r'"say \"\u001b\""'),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        ({}, "{}"),
    ],
)
def test_a_value_is_shown_as_toml_on_one_line(value: object, text: str) -> None:
    assert show(value) == text


def test_key_paths_are_quoted_where_toml_would() -> None:
    assert [join("", "a"), join("a", "b-1"), join("a", "b.c"), join("a", "")] == ["a", "a.b-1", 'a."b.c"', 'a.""']


def test_nothing_is_near_to_a_name_of_thousands_of_characters() -> None:
    assert (near("mmemory", ["memory", "cpu"]), near("m" * 5000, ["memory"])) == ("did you mean memory?", None)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.datetimes() | st.times(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
_NAMES = st.sampled_from(["text", "count", "ratio", "mode", "names", "rows", "pair", "set", "binds", "clock", "memory"])


@settings(deadline=None)  # a busy machine is no failure
@given(st.dictionaries(_NAMES | st.text(max_size=4), _VALUES, max_size=4))
def test_C_26_any_data_gives_a_table_or_a_template_error(data: dict[str, Any]) -> None:
    try:
        outcome: Table | str = decode(Table, data, TOP)
    except TemplateError as problem:
        outcome = f"{problem.message} {problem.hint}"
    assert isinstance(outcome, Table) or outcome.isprintable()
