"""Spec: what a template asks for. Frozen, validated, and it knows nothing of the machine."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from devns.decode import At, decode, keys, near, show
from devns.lock import VERSION as LOCK_VERSION
from devns.lock import Lock

if TYPE_CHECKING:
    from devns.template import Document

Table = TypeVar("Table")


@dataclass(frozen=True)
class Repository:
    """[[root.repository]]: an archive of packages beside Debian's, and the one key whose signature counts for it.

    `uri` is what stands above dists/, without a last slash; `key` an armored certificate itself, or the absolute path
    of a file that has it; `fingerprint` that of its primary key, in small letters.
    """

    uri: str
    suite: str
    key: str
    fingerprint: str
    components: tuple[str, ...] = ("main",)


@dataclass(frozen=True)
class Root:
    """[root]: where the root file system comes from and whether what is written to it stays."""

    source: str = field(default="host", metadata={"key": "from"})  # host | debian:SUITE | tar:PATH | dir:PATH
    packages: tuple[str, ...] = field(default=(), metadata={"merge": "add"})
    repositories: tuple[Repository, ...] = field(default=(), metadata={"key": "repository", "merge": "add"})
    writable: Literal["keep", "discard", "no"] = "keep"
    # Finished layers of the store, bottom first, in place of the one that `from` and templates' packages would make.
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Build:
    """[build]: commands run as root inside, each a cached layer. They see `inputs`, which are project files, and no
    network unless `network` says so."""

    run: tuple[str, ...] = field(default=(), metadata={"merge": "add"})
    inputs: tuple[str, ...] = field(default=(), metadata={"merge": "add"})
    network: bool = False


@dataclass(frozen=True)
class User:
    """[user]: who you are inside: "self", "root", or another USER[:GROUP], each a name that the root knows or a number.
    Maps are rows of (inside, outside, count), as in user_namespaces(7)."""

    map: Literal["auto", "single", "range"] = "auto"
    identity: str = field(default="self", metadata={"key": "as"})
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
class Said:
    """Who said what, as far as it decides which layers are shared: what stands in a named template makes the same
    layers beneath every project that extends it.

    `packages` and `repositories` are those that the project's own files add to a named template's; `inputs` says for
    each command of [build] how many of the inputs it sees: those named by the file it stands in and by what that
    extends; `env` are the variables that commands see: the templates' own, whatever a single call adds.
    """

    packages: tuple[str, ...] = ()
    repositories: tuple[Repository, ...] = ()
    inputs: tuple[int, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


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
    said: Said = Said()
    lock: Lock | None = None  # the exact packages, where the project has a lock file

    def table(self, kind: type[Table]) -> Table:
        """The table a plugin claimed with `kind`; its defaults where the template says nothing."""
        found = self.tables.get(kind)
        return found if found is not None else kind()


# --- from a document to a Spec ------------------------------------------------------------------------------------

CORE: Mapping[str, type] = MappingProxyType(
    {"root": Root, "build": Build, "user": User, "namespaces": Namespaces, "env": Env, "shell": Shell}
)

_SOURCES = ("host", "debian:SUITE", "tar:PATH", "dir:PATH")
_SUITE = re.compile(r"[a-z][a-z0-9.-]*")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9-]+)?(=[A-Za-z0-9][A-Za-z0-9.+:~-]*)?")  # deb-control(5)
_URI = re.compile(r"https?://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~+%=,:@-]+)*/?")
_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]*(?:/[A-Za-z0-9._+~-]+)*")
_FINGERPRINT = re.compile(r"[0-9A-Fa-f]{40}|[0-9A-Fa-f]{64}")
_ARMOR = "-----BEGIN PGP PUBLIC KEY BLOCK-----"
_LAYER = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}-[0-9a-f]{32,64}")  # as devns.store names them
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # environ(7)
_ACCOUNT = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}|[0-9]{1,10}")  # useradd(8), without its "$"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOSTNAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")  # RFC 1123, 2.1
_HOSTNAME_MAX = 64  # HOST_NAME_MAX, gethostname(2)
_VARIABLE_MAX = 128 << 10  # MAX_ARG_STRLEN: "NAME=value" and its NUL, execve(2)
_ID_MAX = 2**32 - 1  # (uid_t)-1 is no id, so a range ends below it
_ROWS_MAX = 340  # user_namespaces(7)


def tables(claims: Mapping[str, type]) -> dict[str, type]:
    """Every table a template may have: those of plugins, and the core's own, which no plugin can replace."""
    return {**claims, **CORE}


def make_spec(document: Document, claims: Mapping[str, type]) -> Spec:
    """What `document` asks for. `claims` maps the tables that plugins claimed to their dataclasses.

    Raises TemplateError for whatever can be known to be wrong without looking at the machine.
    """
    known = tables(claims)
    decoded: dict[str, Any] = {}
    description = ""
    for name, data in document.data.items():
        at = document.at(name)
        if name == "description":
            description = decode(_Description, {name: data}, document.at()).description
        elif name in known:
            decoded[name] = decode(known[name], data, at)
        else:
            raise at.error("no such table" if isinstance(data, dict) else "no such key", hint=_belongs(name, known))
    core = {name: decoded.get(name, kind()) for name, kind in CORE.items()}
    _check_root(core["root"], document.at("root"))
    _check_build(core["build"], document.at("build"))
    _check_user(core["user"], document.at("user"))
    _check_namespaces(core["namespaces"], document.at("namespaces"))
    _check_env(core["env"], document.at("env"))
    _check_shell(core["shell"], document.at("shell"))
    root = _found(core["root"], document)
    return Spec(
        name=document.name,
        template=document.template,
        project=document.project,
        description=description,
        **{**core, "root": root},
        tables={known[name]: table for name, table in decoded.items() if name not in CORE},
        said=_said(document, root, core["build"], core["env"]),
        lock=_lock(document),
    )


def _lock(document: Document) -> Lock | None:
    if document.lock is None:
        return None
    lock = decode(Lock, dict(document.locked), At(document.lock.path))
    if lock.version != LOCK_VERSION:
        said = f"a lock file of version {lock.version}, and this devns knows {LOCK_VERSION}"
        raise At(document.lock.path).error(said, hint="devns lock")
    return lock


def _said(document: Document, root: Root, build: Build, env: Env) -> Said:
    ranks = {file.path: -number for number, file in enumerate(document.files)}  # what is extended is below
    own = {file.path for file in document.files if file.kind == "project"}
    based = document.at("root").child("from").file not in own  # else there is nothing of a template's to add to

    def added(key: str, values: tuple[Table, ...]) -> tuple[Table, ...]:
        list = document.at("root").child(key)
        return tuple(value for i, value in enumerate(values) if based and list.item(i).file in own)

    packages, repositories = added("packages", root.packages), added("repository", root.repositories)
    if not build.run:
        return Said(packages, repositories)
    inputs = [ranks[document.at("build").child("inputs").item(i).file] for i in range(len(build.inputs))]
    run = [ranks[document.at("build").child("run").item(i).file] for i in range(len(build.run))]
    seen = tuple(sum(rank <= step for rank in inputs) for step in run)
    return Said(packages, repositories, seen, env.set)


@dataclass(frozen=True)
class _Description:
    description: str


def _belongs(name: str, known: Mapping[str, type]) -> str:
    """The hint for a top-level name that nobody claims: the table it may be a key of, or a name like it."""
    holder = next((table for table, kind in known.items() if name in keys(kind)), None)
    if holder:
        return f"{name} belongs in [{holder}]"
    return near(name, [*known, "description", "extends"]) or f"there is: {', '.join(sorted(known))}"


def _found(root: Root, document: Document) -> Root:
    """`root` with its paths made absolute and its repositories written in one way."""
    at = document.at("root")
    kind, _, path = root.source.partition(":")
    if kind in ("tar", "dir"):
        root = replace(root, source=f"{kind}:{_beside(path, at.child('from'), document)}")
    repositories = []
    for i, repository in enumerate(root.repositories):
        key = repository.key
        if not key.startswith(_ARMOR):
            key = _beside(key, at.child("repository").item(i), document)
        fingerprint = repository.fingerprint.replace(" ", "").lower()
        uri = repository.uri.rstrip("/")
        repositories.append(replace(repository, uri=uri, key=key, fingerprint=fingerprint))
    return replace(root, repositories=tuple(repositories))


def _beside(path: str, at: At, document: Document) -> str:
    """`path` made absolute: "~" is the user's home, the rest is beside the file that says it."""
    if path == "~" or path.startswith("~/"):
        path = document.home + path[1:]
    return posixpath.normpath(posixpath.join(posixpath.dirname(at.file), path))


def _check_root(root: Root, at: At) -> None:
    kind, colon, rest = root.source.partition(":")
    says = at.child("from")
    if kind == "oci":
        raise says.error("oci: is not there yet", hint=f"one of {', '.join(_SOURCES)}")
    if root.source != "host" and (kind not in ("debian", "tar", "dir") or not colon):
        raise says.error(f"no such source: {show(root.source)}", hint=f"one of {', '.join(_SOURCES)}")
    if kind == "debian" and not _SUITE.fullmatch(rest):
        raise says.error(f"no name of a suite: {show(rest)}", hint='"debian:bookworm"')
    if kind in ("tar", "dir") and (not rest or (rest.startswith("~") and rest[1:2] not in ("", "/"))):
        raise says.error(f"no path: {show(rest)}", hint=f'"{kind}:./path", "{kind}:~/path" or "{kind}:/path"')
    for i, name in enumerate(root.packages):
        if not _PACKAGE.fullmatch(name):
            raise at.child("packages").item(i).error(f"no name of a package: {show(name)}")
    for i, repository in enumerate(root.repositories):
        _check_repository(repository, at.child("repository").item(i))
        if kind != "debian":
            raise at.child("repository").item(i).error(f"is for a debian: root, not {show(root.source)}")
    for i, name in enumerate(root.layers):
        if not _LAYER.fullmatch(name):
            raise at.child("layers").item(i).error(f"no name of a layer: {show(name)}", hint="devns du names them")
    if root.layers and kind == "host":
        raise at.child("layers").error("the host's own root has no layers")


def _check_repository(repository: Repository, at: At) -> None:
    uri, suite = repository.uri, repository.suite
    if re.match(r"[a-z]+://[^/]*@", uri):  # who reads the file, or the root that it makes, would read that as well
        raise at.child("uri").error("has a user in it", hint="a repository that wants a password can't be used")
    if not _URI.fullmatch(uri) or ".." in uri.split("/"):
        raise at.child("uri").error(f"no URL of a repository: {show(uri)}", hint="https://HOST/PATH, above dists/")
    if suite.endswith("/"):
        raise at.child("suite").error(f"a flat repository, which has no suites: {show(suite)}: devns reads none")
    for key, value in (("suite", suite), *(("components", name) for name in repository.components)):
        if not _COMPONENT.fullmatch(value) or ".." in value.split("/"):
            raise at.child(key).error(f"no name of a {key.rstrip('s')}: {show(value)}")
    if not repository.components:
        raise at.child("components").error("is empty", hint='["main"] is what it is when it is left out')
    if not _FINGERPRINT.fullmatch(repository.fingerprint.replace(" ", "")):
        why = "40 hexadecimal digits, which gpg --show-keys prints; the short id of a key can be forged"
        raise at.child("fingerprint").error(f"no fingerprint: {show(repository.fingerprint)}", hint=why)
    if not repository.key.startswith(_ARMOR) and not (repository.key.isprintable() and repository.key.strip()):
        raise at.child("key").error('must be a path, or begin with "-----BEGIN PGP PUBLIC KEY BLOCK-----"')


def _check_build(build: Build, at: At) -> None:
    for i, path in enumerate(build.inputs):
        if not path or path.startswith(("/", "~")) or ".." in path.split("/"):
            raise at.child("inputs").item(i).error(f"must be a path beneath the project, not {show(path)}")
    for i, command in enumerate(build.run):
        if not command.strip():
            raise at.child("run").item(i).error("is empty")


def is_identity(text: str) -> bool:
    """Can this be a USER[:GROUP], each a name or a number?"""
    parts = text.split(":")
    return len(parts) <= 2 and all(_ACCOUNT.fullmatch(part) and not _is_beyond(part) for part in parts)


def _is_beyond(part: str) -> bool:
    return part.isdecimal() and int(part) >= _ID_MAX


def _check_user(user: User, at: At) -> None:
    if not is_identity(user.identity):
        hint = '"self", "root", the name of a user inside, or numbers: "102", "102:104"'
        raise at.child("as").error(f"no user: {show(user.identity)}", hint=hint)
    for given, other in (("uid_map", "gid_map"), ("gid_map", "uid_map")):
        if getattr(user, given) and not getattr(user, other):
            raise at.child(other).error(f"is required where there is a {given}")
        _check_map(getattr(user, given), at.child(given))


def _check_map(rows: tuple[tuple[int, int, int], ...], at: At) -> None:
    if len(rows) > _ROWS_MAX:
        raise at.error(f"more than {_ROWS_MAX} rows")
    for i, (inside, outside, count) in enumerate(rows):
        if min(inside, outside) < 0 or count < 1 or max(inside, outside) + count > _ID_MAX:
            raise at.item(i).error(f"no range of ids: [{inside}, {outside}, {count}]")
    for side, column in (("inside", 0), ("outside", 1)):
        ranges = sorted((row[column], row[column] + row[2], i) for i, row in enumerate(rows))
        for (_, end, first), (start, _, second) in pairwise(ranges):
            if start < end:
                raise at.error(f"rows {first} and {second} overlap {side}, at id {start}")


def _check_namespaces(namespaces: Namespaces, at: At) -> None:
    hostname = namespaces.uts.hostname if namespaces.uts else None
    if hostname is not None and not (len(hostname) <= _HOSTNAME_MAX and _HOSTNAME.fullmatch(hostname)):
        hint = "letters, digits and hyphens, in parts joined by dots"
        raise at.child("uts").child("hostname").error(f"no host name: {show(hostname)}", hint=hint)


def _check_env(env: Env, at: At) -> None:
    for name, value in env.set.items():
        variable = at.child("set").child(name)
        _check_variable(name, variable)
        if len(f"{name}={value}".encode()) >= _VARIABLE_MAX:
            raise variable.error(f"longer than {_VARIABLE_MAX >> 10} KiB, which no program can be given")
    for i, name in enumerate(env.passed):
        _check_variable(name, at.child("pass").item(i))


def is_variable(name: str) -> bool:
    """Can this be the name of a variable that a shell knows, too?"""
    return _VARIABLE.fullmatch(name) is not None


def _check_variable(name: str, at: At) -> None:
    if not is_variable(name):
        raise at.error(f"no name of a variable: {show(name)}")


def _check_shell(shell: Shell, at: At) -> None:
    program = shell.program
    if not program or ("/" in program and not program.startswith("/")):
        raise at.child("program").error(f'must be "auto", a name or an absolute path, not {show(program)}')
