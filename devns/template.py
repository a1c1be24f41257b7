"""Templates: finds, reads and merges them (`extends`), and knows who said what. What a table means is not known here.

A project's `.devns.toml` is written by whoever wrote the repository: it is read once, from a regular file of bounded
size that nobody else can have put there, and the bytes that were read are those that are parsed, hashed and trusted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import tomli

from devns import lock
from devns.decode import At, Key, escape, join, keys, near
from devns.errors import TemplateError
from devns.spec import tables

if TYPE_CHECKING:
    from devns.host import Host

    Kind = Literal["bundled", "user", "project"]

FILE = ".devns.toml"
SIZE_MAX = 256 << 10
LINES_MAX = 10_000
DEPTH_MAX = 16  # dots in a key, brackets in each other, and both together; parsers recurse or go quadratic in them
WORD_MAX = 256  # characters of a key or a number; Python's int() takes quadratic time
VALUES_MAX = 20_000
EXTENDS_MAX = 8

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class SourceFile:
    """One file as it was read. `path` is where it lies on the host."""

    path: str
    data: bytes = field(repr=False)
    kind: Kind


@dataclass(frozen=True)
class Document:
    """A template with everything it extends, merged.

    `files` begins with the template itself, followed by what it extends, in order. `origin` maps the key path of every
    value ("root.packages", and "root.packages[3]" in a list that adds up) to the file that said it. `own` is what the
    project's files say by themselves, without the named templates they extend; empty for a named template. `lock` is
    the project's lock file, and `locked` what it says.
    """

    name: str  # the environment's
    template: str  # for people: the template's name, or the project file's path
    project: str | None  # the project's directory, without symbolic links in it
    data: dict[str, Any]
    origin: Mapping[str, str]
    files: tuple[SourceFile, ...]
    own: dict[str, Any]
    home: str  # what "~" means in it
    lock: SourceFile | None = None
    locked: Mapping[str, Any] = field(default_factory=dict)

    def at(self, name: str | None = None) -> At:
        """Where the top-level key `name` stands, or the document itself: for errors."""
        top = At(self.files[0].path, "", self.origin)
        return top if name is None else top.child(name)


@dataclass(frozen=True)
class Listed:
    """One line of `devns template list`."""

    name: str
    description: str
    where: Kind
    path: str


def load(name: str | None, host: Host, *, claims: Mapping[str, type] | None = None, locked: bool = True) -> Document:
    """The template `name`, or without one the project's file, found upward from the working directory.

    `claims` are the tables of plugins: they say which lists add up. Without `locked` a lock file is not looked at.
    Raises TemplateError.
    """
    if name is not None:
        project, first = None, _named(name, host, None)
        if first is None:
            raise TemplateError(f"{escape(name)}: no such template", hint=_near_template(name, host))
    else:
        project = find_project(host)
        if project is None:
            hint = "devns init writes one; devns template list shows what can be named instead"
            raise TemplateError(f"{escape(host.cwd)}: no {FILE} here or above, up to the repository's root", hint=hint)
        first = _read(host, f"{project}/{FILE}", "project")
    chain = _chain(first, name or first.path, host)
    known = {table: Key(field=table, kind=kind) for table, kind in tables(claims or {}).items()}
    data: dict[str, Any] = {}
    own: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for file, said in reversed(chain):
        data = _merge(data, said, known, At(file.path), origin)
        if file.kind == "project":
            own = _merge(own, said, known, At(file.path), {})
    pins = None
    if project and locked and _lstat(host, f"{project}/{lock.FILE}"):
        pins = _read(host, f"{project}/{lock.FILE}", "project", size_max=lock.SIZE_MAX)
    return Document(
        name=_project_name(project) if project else str(name),
        template=name or first.path,
        project=project,
        data=data,
        origin=origin,
        files=tuple(file for file, _ in chain),
        own=own,
        home=host.home,
        lock=pins,
        locked=parse(pins.data, pins.path) if pins else {},
    )


def find_project(host: Host) -> str | None:
    """The directory of the nearest `.devns.toml`, from the working directory upward.

    The way up ends at the repository's root (which is still looked at), and never climbs into the home directory, "/"
    or another file system: a file there would speak for everything beneath it.
    """
    here = host.realpath(host.cwd)
    ends = {"/", host.realpath(host.home)}
    while True:
        if _lstat(host, f"{here}/{FILE}"):
            return here
        above = os.path.dirname(here)
        if {here, above} & ends or _lstat(host, f"{here}/.git"):
            return None
        status, next_status = _lstat(host, here), _lstat(host, above)
        if not status or not next_status or status.st_dev != next_status.st_dev:
            return None
        here = above


def base(document: Document) -> str | None:
    """The named template that a document is, or that a project's file extends; None where it extends none."""
    named = next((file for file in document.files if file.kind != "project"), None)
    return os.path.basename(named.path).removesuffix(".toml") if named else None


def is_known(name: str, host: Host) -> bool:
    """Is there a template of this name, the user's or a bundled one?"""
    return _named(name, host, None) is not None


def list_templates(host: Host) -> tuple[Listed, ...]:
    """Every named template, the user's before a bundled one of its name; one that cannot be read says why."""
    places: tuple[tuple[Kind, str, tuple[str, ...]], ...] = (
        ("bundled", _bundled(), tuple(os.listdir(_bundled()))),
        ("user", _users(host), host.listdir(_users(host))),
    )
    found: dict[str, Listed] = {}
    for kind, directory, names in places:
        for name in (entry[: -len(".toml")] for entry in names if entry.endswith(".toml")):
            if _NAME.fullmatch(name):
                path = f"{directory}/{name}.toml"
                found[name] = Listed(name, _description(host, path, kind), kind, path)
    return tuple(found[name] for name in sorted(found))


def named_layers(host: Host) -> dict[str, str]:
    """The layers that templates of the user name, each with the template's name. TemplateError where one cannot be
    read: it may name some."""
    found: dict[str, str] = {}
    for listed in list_templates(host):
        if listed.where == "user":
            root = parse(_read(host, host.realpath(listed.path), "user").data, listed.path).get("root")
            layers = root.get("layers") if isinstance(root, dict) else None
            found |= {name: listed.name for name in layers or () if isinstance(name, str)}
    return found


def add(name: str, text: str, host: Host) -> str:
    """Write a new template of the user; its path. Whole or not at all, and over no other."""
    directory = host.realpath(_users(host))
    path, beside = f"{directory}/{name}.toml", f"{directory}/.{name}.{secrets.token_hex(4)}"
    try:
        os.makedirs(under(host, directory), mode=0o700, exist_ok=True)
        with open(under(host, beside), "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(under(host, beside), under(host, path))
        finally:
            os.unlink(under(host, beside))
    except OSError as problem:
        raise TemplateError(escape(f"{path}: {os.strerror(problem.errno or 0).lower()}")) from None
    return path


def is_name(name: str) -> bool:
    """Fit for a template."""
    return _NAME.fullmatch(name) is not None


def under(host: Host, path: str) -> str:
    """Where a path of the host, already free of symbolic links, lies for the kernel."""
    return path if host.root == "/" else host.root + path


# --- which files ----------------------------------------------------------------------------------------------------


def _chain(first: SourceFile, said: str, host: Host) -> list[tuple[SourceFile, dict[str, Any]]]:
    """The file and what it extends, step by step, each with its data less the key `extends`."""
    chain: list[tuple[SourceFile, dict[str, Any]]] = []
    names = [said]
    file = first
    while True:
        data = parse(file.data, file.path)
        parent = data.pop("extends", None)
        chain.append((file, data))
        if parent is None:
            return chain
        at = At(file.path, "extends")
        if not isinstance(parent, str):
            raise at.error("must be a string")
        names.append(parent)
        if len(chain) > EXTENDS_MAX:
            raise at.error(f"more than {EXTENDS_MAX} templates deep: {' -> '.join(names)}")
        file = _extended(parent, file, host)
        if any(file.path == other.path for other, _ in chain):
            raise at.error(f"goes in a circle: {' -> '.join(names)}")


def _extended(said: str, by: SourceFile, host: Host) -> SourceFile:
    """What `extends = "debian12"` or `extends = "./base.toml"` means in the file `by`."""
    at = At(by.path, "extends")
    if "/" not in said:
        found = _named(said, host, by)
        if found is None:
            raise at.error(f"no such template: {said[:WORD_MAX]}", hint=_near_template(said, host))
        return found
    parts = said.split("/")
    if parts[0] != "." or set(parts[1:]) & {"", ".", ".."} or not said.endswith(".toml") or not said.isprintable():
        hint = 'a template\'s name, or a file beside or beneath this one: "./base.toml"'
        raise at.error(f"not possible: {json.dumps(said, ensure_ascii=False)}", hint=hint)
    return _read(host, "/".join([os.path.dirname(by.path), *parts[1:]]), by.kind, depth=len(parts) - 1)


def _named(name: str, host: Host, by: SourceFile | None) -> SourceFile | None:
    """The user's template of that name, else the bundled one. A user's that extends its own name means the bundled."""
    if not _NAME.fullmatch(name):
        return None
    path = host.realpath(f"{_users(host)}/{name}.toml")  # a link is fine: the directory is the user's own
    if _lstat(host, path) and not (by and by.path == path):
        for directory in (host.config, _users(host)):
            if status := host.stat(directory):
                _refuse_shared(status, directory, host)
        return _read(host, path, "user")
    path = f"{_bundled()}/{name}.toml"
    return _read(host, path, "bundled") if os.path.lexists(path) else None


def _near_template(name: str, host: Host) -> str:
    known = [listed.name for listed in list_templates(host)]
    return near(name, known) or f"there is: {', '.join(known)}"


def _users(host: Host) -> str:
    return f"{host.config}/templates"


def _bundled() -> str:
    """Beside the modules in a wheel, beside the package in a checkout."""
    package = os.path.dirname(os.path.abspath(__file__))
    beside = os.path.join(package, "templates")
    return beside if os.path.isdir(beside) else os.path.join(os.path.dirname(package), "templates")


def _project_name(project: str) -> str:
    """The environment's name: fit for a path and a host name, and never another project's."""
    words = re.sub(r"[^a-z0-9]+", "-", os.path.basename(project).lower())[:40].strip("-")
    return f"{words or 'project'}-{hashlib.sha256(os.fsencode(project)).hexdigest()[:8]}"


def _description(host: Host, path: str, kind: Kind) -> str:
    """The comment on the first line, or what the template says of itself."""
    try:
        file = _read(host, host.realpath(path) if kind == "user" else path, kind)
        data = parse(file.data, path)
    except TemplateError as problem:
        return problem.message
    first = file.data.decode().split("\n", 1)[0].strip()
    return escape(first.lstrip("# ") if first.startswith("#") else str(data.get("description", "")))


# --- reading one file -----------------------------------------------------------------------------------------------


def _read(host: Host, path: str, kind: Kind, *, depth: int = 1, size_max: int = SIZE_MAX) -> SourceFile:
    """Open once, never through a symbolic link in the last `depth` parts, look at what was opened, and read that."""
    parts = path.rsplit("/", depth)
    where = parts[0] or "/"
    inside = where if kind == "bundled" else under(host, where)
    opened: list[int] = []
    try:
        opened.append(os.open(inside, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
        for part in parts[1:-1]:
            opened.append(os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=opened[-1]))
        directories = opened[:]
        # O_NONBLOCK: a FIFO opens at once instead of waiting for its writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        opened.append(os.open(parts[-1], flags, dir_fd=opened[-1]))
        status = os.fstat(opened[-1])
        if not stat.S_ISREG(status.st_mode):
            raise At(path).error(f"must be a regular file, not {_word(status.st_mode)}")
        if kind != "bundled":
            _refuse_shared(status, path, host)
            for i, fd in enumerate(directories):
                _refuse_shared(os.fstat(fd), "/".join(parts[: i + 1]) or "/", host)
        data = _read_all(opened[-1], size_max)
    except OSError as problem:
        raise At(path).error(_why_not(problem)) from None
    finally:
        for fd in opened:
            os.close(fd)
    if len(data) > size_max:
        raise At(path).error(f"larger than {size_max >> 10} KiB")
    return SourceFile(path, data, kind)


def _read_all(fd: int, size_max: int) -> bytes:
    """The bytes of a file, and at most one more than allowed."""
    data = b""
    while len(data) <= size_max and (more := os.read(fd, size_max + 1 - len(data))):
        data += more
    return data


def _refuse_shared(status: os.stat_result, path: str, host: Host) -> None:
    """Refuse what another user wrote or can replace. A group may write where it is the user's own, or root's doing."""
    if status.st_uid not in (host.uid, 0):
        hint = "copy it to a directory of your own"
        raise At(path).error(f"belongs to another user (uid {status.st_uid}): not read", hint=hint)
    mode = status.st_mode
    if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and status.st_gid not in (host.gid, 0) and status.st_uid != 0):
        raise At(path).error("can be changed by other users: not read", hint=f"chmod go-w {path}")


def _why_not(problem: OSError) -> str:
    if problem.errno == errno.ELOOP:
        return "is a symbolic link: not followed"
    if problem.errno == errno.ENOTDIR:
        return "is not beneath plain directories: symbolic links on the way are not followed"
    return f"cannot be read: {os.strerror(problem.errno or 0).lower()}"


def _word(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _lstat(host: Host, path: str) -> os.stat_result | None:
    try:
        return os.lstat(under(host, path))
    except (OSError, ValueError):
        return None


# --- parsing and merging --------------------------------------------------------------------------------------------

# Strings and comments, as the parser will see them: nothing in them counts. One that does not end reaches to the end of
# its line, or of the file, so that no alternative fails and is tried again from every quote.
_QUIET = re.compile(
    r"""
      "{3} (?: \\? . )*?  (?: "{3,5} | \Z )
    | '{3} .*?            (?: '{3,5} | \Z )
    | " (?: \\. | [^"\\\n] )* "?
    | ' [^'\n]* '?
    | \# [^\n]*
    """,
    re.DOTALL | re.VERBOSE,
)


def parse(data: bytes, path: str) -> dict[str, Any]:
    """TOML, or a TemplateError with the line; what would take the parser long is refused before it begins."""
    try:
        text = data.decode()
    except UnicodeDecodeError as problem:
        raise At(f"{path}:{data.count(10, 0, problem.start) + 1}").error("is not UTF-8") from None
    if text.count("\n") > LINES_MAX:
        raise At(path).error(f"more than {LINES_MAX} lines")
    bare = _QUIET.sub("_", text)
    if any(key.count(".") > DEPTH_MAX for key in re.split(r"[=,\[\]{}\n]", bare)):
        raise At(path).error(f"a key with more than {DEPTH_MAX} dots")
    if re.search(rf"[\w+-]{{{WORD_MAX + 1}}}", bare):
        raise At(path).error(f"a number or bare key of more than {WORD_MAX} characters")
    if _depth(bare) > DEPTH_MAX:
        raise At(path).error(f"brackets more than {DEPTH_MAX} deep")
    try:
        parsed = tomli.loads(text)
    except tomli.TOMLDecodeError as problem:
        why = problem.msg[:1].lower() + problem.msg[1:]
        raise At(f"{path}:{problem.lineno}").error(f"not valid TOML: {why}") from None
    except (ValueError, RecursionError):
        raise At(path).error("not valid TOML") from None
    _refuse_large(parsed, At(path))
    return parsed


def _refuse_large(data: dict[str, Any], at: At) -> None:
    """What is left of the tricks once it is parsed: dotted keys in nested tables, thousands of keys on a line."""
    level: list[Any] = [data]
    values = 0
    for _ in range(DEPTH_MAX + 1):
        names = [name for value in level if isinstance(value, dict) for name in value]
        if any(len(name) > WORD_MAX for name in names):
            raise at.error(f"a key of more than {WORD_MAX} characters")
        level = [part for value in level for part in _parts(value)]
        values += len(level)
        if values > VALUES_MAX:
            raise at.error(f"more than {VALUES_MAX} values")
        if not level:
            return
    raise at.error(f"tables more than {DEPTH_MAX} deep")


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _depth(bare: str) -> int:
    deepest = depth = 0
    for bracket in re.findall(r"[\[\]{}]", bare):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


def _merge(
    old: dict[str, Any], new: dict[str, Any], known: Mapping[str, Key], at: At, origin: dict[str, str]
) -> dict[str, Any]:
    """`new` over `old`: tables merge, lists add up where their key says so, anything else replaces."""
    merged = dict(old)
    for name, value in new.items():
        before, key = old.get(name), known.get(name)
        path = join(at.key, name)
        origin[path] = at.file
        if isinstance(value, dict):
            table = key.table if key else None
            before = before if isinstance(before, dict) else {}
            value = _merge(before, value, keys(table) if table else {}, At(at.file, path), origin)
        elif isinstance(value, list) and key and key.adds:
            before = before if isinstance(before, list) else []
            value = before + _new_items(before, value)
            origin |= {f"{path}[{i}]": at.file for i in range(len(before), len(value))}
        merged[name] = value
    return merged


def _new_items(before: list[Any], more: list[Any]) -> list[Any]:
    """`more` without what `before` or itself has already; by text, as tables cannot be in a set."""
    seen = {_canonical(item) for item in before}
    fresh: dict[str, Any] = {}
    for item in more:
        fresh.setdefault(_canonical(item), item)
    return [item for text, item in fresh.items() if text not in seen]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)
