"""lock: which exact packages a project's environment is made of, as its `.devns.lock` says.

The file names no server: where packages come from is for each machine to say. What it pins is believed by its hash, so
it acts only where it was made, or after `devns trust`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

FILE = ".devns.lock"
VERSION = 1
SIZE_MAX = 4 << 20  # bytes


@dataclass(frozen=True)
class Pinned:
    """One .deb: `archive` is Debian's "main" or "security" or the URL of another, `filename` its path there."""

    name: str
    version: str
    architecture: str
    size: int  # bytes
    sha256: str
    filename: str
    archive: str = "main"


@dataclass(frozen=True)
class Lock:
    """`base` makes the template's own layer and `more` the one above it, of what the project adds.

    `request` is the hash of what the templates ask for, `recipe` the number of the way in which a tree is made of
    packages, `built` the time that nothing in the tree is newer than, in seconds since the epoch.
    """

    version: int
    recipe: int
    source: str = field(metadata={"key": "from"})
    architecture: str
    request: str
    built: int
    base: tuple[Pinned, ...]
    more: tuple[Pinned, ...] = ()

    @property
    def packages(self) -> dict[str, Pinned]:
        """By name."""
        return {pinned.name: pinned for pinned in (*self.base, *self.more)}


def text(lock: Lock) -> str:
    """The file: a line a package, so that a diff shows which of them changed."""
    lines = [
        "# Made by devns lock, which also renews it: the exact packages of this project's environment.",
        f"version = {lock.version}",
        f"recipe = {lock.recipe}",
        f"from = {json.dumps(lock.source)}",
        f"architecture = {json.dumps(lock.architecture)}",
        f"request = {json.dumps(lock.request)}",
        f"built = {lock.built}",
        *_rows("base", lock.base),
        *_rows("more", lock.more),
    ]
    return "\n".join(lines) + "\n"


def _rows(key: str, pinned: Sequence[Pinned]) -> list[str]:
    # A JSON string is a TOML one, and so is a number.
    rows = [
        "  { " + ", ".join(f"{name} = {json.dumps(value)}" for name, value in asdict(one).items()) + " },"
        for one in pinned
    ]
    return [f"{key} = [", *rows, "]"]


def changes(old: Lock | None, new: Lock) -> list[tuple[str, str | None, str | None]]:
    """(name, version before, version now) for each package that is not what it was; None where it was not."""
    before, after = old.packages if old else {}, new.packages
    return [
        (name, before[name].version if name in before else None, after[name].version if name in after else None)
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
