"""Spec: what a template asks for. Frozen, validated, and it knows nothing of the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Table = TypeVar("Table")


@dataclass(frozen=True)
class Root:
    """[root]: where the root file system comes from and whether what is written to it stays."""

    source: str = field(default="host", metadata={"key": "from"})  # host | debian:SUITE | tar:PATH | dir:PATH
    packages: tuple[str, ...] = field(default=(), metadata={"merge": "add"})
    writable: Literal["keep", "discard", "no"] = "keep"


@dataclass(frozen=True)
class Build:
    """[build]: commands run as root inside, each a cached layer."""

    run: tuple[str, ...] = field(default=(), metadata={"merge": "add"})
    inputs: tuple[str, ...] = field(default=(), metadata={"merge": "add"})


@dataclass(frozen=True)
class User:
    """[user]: who you are inside. Maps are rows of (inside, outside, count), as in user_namespaces(7)."""

    map: Literal["auto", "single", "range"] = "auto"
    identity: Literal["self", "root"] = field(default="self", metadata={"key": "as"})
    uid_map: tuple[tuple[int, int, int], ...] = ()
    gid_map: tuple[tuple[int, int, int], ...] = ()
    nested: bool = False


@dataclass(frozen=True)
class Uts:
    hostname: str | None = None  # the environment's name unless said


@dataclass(frozen=True)
class Time:
    """Clock offsets in seconds, time_namespaces(7). The file says "+30d", "-2h", "90s" or a whole number."""

    boottime: int = field(default=0, metadata={"unit": "duration"})
    monotonic: int = field(default=0, metadata={"unit": "duration"})


@dataclass(frozen=True)
class Namespaces:
    """[namespaces]: user and mount always; these can be switched off or tuned. The network's is [network] mode."""

    pid: bool = True
    ipc: bool = True
    cgroup: bool = True
    uts: Uts | Literal[False] = Uts()
    time: Time | Literal[False] = False


@dataclass(frozen=True)
class Env:
    """[env]: variables set inside, and names passed from the caller."""

    set: Mapping[str, str] = field(default_factory=dict)
    passed: tuple[str, ...] = field(default=(), metadata={"key": "pass", "merge": "add"})


@dataclass(frozen=True)
class Shell:
    program: str = "auto"


@dataclass(frozen=True)
class Spec:
    """One environment as its template describes it.

    `name` is the environment's name in the store; `project` the absolute path of the project's root, or None for a
    named template. `tables` holds the tables that plugins claimed, by their type: `spec.table(MountTable)`.
    """

    name: str
    template: str  # what `extends` started from, for people: "py311", or the project file's path
    project: str | None = None
    description: str = ""
    root: Root = Root()
    build: Build = Build()
    user: User = User()
    namespaces: Namespaces = Namespaces()
    env: Env = Env()
    shell: Shell = Shell()
    tables: Mapping[type, Any] = field(default_factory=dict)

    def table(self, kind: type[Table]) -> Table:
        """The table a plugin claimed with `kind`; its defaults where the template says nothing."""
        found = self.tables.get(kind)
        return found if found is not None else kind()
