"""Debian version numbers, compared as dpkg compares them: deb-version(7)."""

from __future__ import annotations

import re
from functools import lru_cache

# One component: a run of non-digits, then a run of digits, either may be empty.
_component = re.compile(r"([^0-9]*)([0-9]*)")
_grammar = re.compile(r"[0-9]+:[A-Za-z0-9.+~:-]+|[A-Za-z0-9.+~-]+")

Part = tuple[tuple[tuple[int, ...], int, str], ...]
Key = tuple[Part, Part, Part]


def is_version(text: str) -> bool:
    """Whether `text` has the letters of a version. dpkg is as lenient: it wants no digit in front."""
    return len(text) <= 256 and _grammar.fullmatch(text) is not None


def compare(a: str, b: str) -> int:
    """-1, 0 or 1: `a` is older than, the same as, or newer than `b`."""
    left, right = key(a), key(b)
    return (left > right) - (left < right)


def satisfies(version: str, relation: str, wanted: str) -> bool:
    """Whether `version` is `relation` (<<, <=, =, >=, >>) `wanted`; < and > are old spellings of <= and >=."""
    order = compare(version, wanted)
    if relation == "=":
        return order == 0
    if relation == "<<":
        return order < 0
    if relation == ">>":
        return order > 0
    return order <= 0 if relation in ("<=", "<") else order >= 0


@lru_cache(maxsize=8192)
def key(version: str) -> Key:
    """A value that sorts as the version does."""
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "0", version
    upstream, _, revision = rest.rpartition("-") if "-" in rest else (rest, "", "")
    return _part(epoch), _part(upstream), _part(revision)


def _part(text: str) -> Part:
    # No revision is revision 0. The last match is empty: the end of the string, which sorts after "~" and before all
    # else.
    return tuple((_letters(letters), len(digits), digits) for letters, digits in _runs(text or "0"))


def _runs(text: str) -> list[tuple[str, str]]:
    # Numbers are compared by length, then as text: no int(), whose cost and limit depend on the number of digits.
    return [(letters, digits.lstrip("0")) for letters, digits in _component.findall(text)]


def _letters(text: str) -> tuple[int, ...]:
    """First the tilde, then the end of the run, then letters, then everything else."""
    return (*(-1 if c == "~" else ord(c) if c.isalpha() else ord(c) + 256 for c in text), 0)
