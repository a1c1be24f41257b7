"""Trust: which project files may act. Whoever clones a repository has not agreed to what its `.devns.toml` asks for.

Without trust a project may choose a template that is installed already, packages, and literal variables for what runs
inside, but none that tells a program what to run, to load or to talk to. Anything else waits for `devns trust`, which
writes one record: the hash of the file's place and of every byte that the user saw. Another byte, another place, or
another included file asks again. Nothing else gives trust: no key of a template (there is none to give it), no
environment variable, no answer from a pipe, no trusted directory above.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, cast

from devns.decode import escape, join, show
from devns.errors import TemplateError, Unsupported
from devns.lock import FILE as LOCK_FILE
from devns.template import FILE, Document, under

if TYPE_CHECKING:
    from devns.host import Host

SCHEMA = 1
_RECORD_MAX = 16 << 20
_NAMED = 2  # grants that the one sentence of `require` names
_VALUE_MAX = 60  # characters of each

# What needs no trust. Everything beneath a path of two is meant with it.
_HARMLESS = (("description",), ("root", "packages"), ("env", "set"))

# Variables that make a usual program run or load something, read its configuration elsewhere, or talk to somebody else:
# of the loader and libc, shells, interpreters and their package managers, what starts an editor, a pager or a helper,
# and the network. A shell in a cloned project obeys them before its user has typed a word. Case does not count.
_HOOKS = """
    LD_* GLIBC_* GCONV_PATH LOCPATH NLSPATH HOSTALIASES LOCALDOMAIN RES_OPTIONS TERMCAP TERMINFO*
    PATH HOME SHELL ENV BASH* SHELLOPTS PROMPT* PS[0-4] IFS CDPATH FPATH ZDOTDIR INPUTRC HIST* MAILCHECK MAILPATH
    TMPDIR XDG_* DEVNS* DBUS_* DISPLAY WAYLAND_*
    PYTHON* PIP_* PIPX_* UV_* POETRY_* PERL* RUBY* GEM_* BUNDLE_* NODE_* NPM_* YARN_* PNPM_* DENO_* PHP* LUA_* R_*
    JAVA_* JDK_* _JAVA_* CLASSPATH MAVEN_* GRADLE_* DOTNET_* GO* CARGO_* RUST* JULIA_*
    EDITOR *_EDITOR FCEDIT VISUAL *PAGER BROWSER LESS* MANPATH MANOPT VIM* EXINIT EMACS* PSQLRC *_ASKPASS *_COMMAND
    *_WRAPPER *_OPTIONS *FLAGS MAKE* GNUMAKE* CMAKE_* CC CXX LD PKG_CONFIG* GIT_* SSH_* SUDO_* GPG* GNUPG* DOCKER_*
    APT_* DPKG_*
    *_PROXY SSL_* OPENSSL_* CURL_* WGET* REQUESTS_* *_CA_BUNDLE KRB5*
""".split()

# How dangerous a table is, most dangerous first: what reaches the host before what only narrows. A table not named here
# is a plugin's from elsewhere, and comes before all of them.
_TABLES = ("mount", "network", "build", "user", "namespaces", "root", "env", "shell", "cgroup")


@dataclass(frozen=True)
class Grant:
    """One thing a project file asks for: its key path, and the value as TOML writes it. Both are fit for a terminal."""

    key: str
    value: str


@dataclass(frozen=True)
class Changes:
    """What a project file asks for now and did not when it was last trusted, and the other way round."""

    added: tuple[Grant, ...]
    removed: tuple[Grant, ...]


def grants(document: Document) -> tuple[Grant, ...]:
    """What the project's own files ask for beyond what needs no trust, the most dangerous first; and its lock file."""
    pinned = sum(len(rows) for rows in document.locked.values() if isinstance(rows, list))
    return (*_said(document), *([Grant(LOCK_FILE, f"{pinned} packages by their hashes")] if document.lock else []))


def _said(document: Document) -> tuple[Grant, ...]:
    asked = [path_value for path_value in _leaves((), document.own) if not _is_harmless(*path_value)]
    ranked = sorted(asked, key=lambda path_value: _rank(path_value[0]))  # stable: else as the file has it
    return tuple(Grant(escape(_key(path)), show(_brief(path, value))) for path, value in ranked)


def digest(document: Document) -> str:
    """What the user agrees to: the project file's place, and the bytes of all files but the bundled ones."""
    if document.lock is None:
        return _files_digest(document)
    return hashlib.sha256(f"{_files_digest(document)} {_lock_digest(document)}".encode()).hexdigest()


def _files_digest(document: Document) -> str:
    files = [
        [file.kind, file.path, hashlib.sha256(file.data).hexdigest()]
        for file in document.files
        if file.kind != "bundled"
    ]
    return hashlib.sha256(json.dumps([SCHEMA, document.project, files]).encode()).hexdigest()


def is_trusted(document: Document, host: Host) -> bool:
    """Is there a record for exactly this, and one for the lock file beside it, if there is one? A file without grants
    needs none."""
    return _is_recorded(_files_digest(document), document.files[0].path, host) and is_lock_trusted(document, host)


def is_lock_trusted(document: Document, host: Host) -> bool:
    """Was the lock file, byte for byte, made or trusted here? Where there is none it is."""
    return document.lock is None or _is_recorded(_lock_digest(document), document.lock.path, host)


def trust_lock(document: Document, host: Host) -> None:
    """Record that the user made the document's lock file, or agrees to it."""
    if document.lock is not None:
        _record(_lock_digest(document), document.lock.path, (), host)


def require(document: Document, host: Host) -> None:
    """Raise TemplateError where a project file asks for something and nobody has trusted it."""
    if document.lock is not None and not is_lock_trusted(document, host):
        raise TemplateError(
            f"{escape(document.lock.path)}: is not trusted, and says which packages are believed",
            hint="devns trust; or devns lock --update, to make it anew",
        )
    asked = _said(document)
    if not asked or _is_recorded(_files_digest(document), document.files[0].path, host):
        return
    named = ", ".join(f"{grant.key} = {_short(grant.value)}" for grant in asked[:_NAMED])
    more = f" and {len(asked) - _NAMED} more" if len(asked) > _NAMED else ""
    why = "has changed since it was trusted" if _last(document, host) else "is not trusted"
    raise TemplateError(f"{escape(document.files[0].path)}: {why}, and asks for {named}{more}", hint="devns trust")


def trust(document: Document, host: Host, *, expect: str | None = None) -> str:
    """Record that the user agrees to `document` as it was read, and return its digest.

    `expect` is the digest agreed to elsewhere, in a script for example: any other raises TemplateError. Raises
    Unsupported where the record cannot be kept safely.
    """
    now = digest(document)
    if document.project is None:
        raise TemplateError(f"{document.template}: a named template needs no trust")
    if expect is not None and expect.strip().lower() != now:
        raise TemplateError(f"{escape(document.template)}: its sha256 is {now}, not {escape(expect)}")
    _record(_files_digest(document), document.files[0].path, grants(document), host)
    trust_lock(document, host)
    return now


def untrust(path: str, host: Host) -> bool:
    """Forget every record of the project file at `path`, or of the one in the directory `path`. Was there any?"""
    directory, name = os.path.split(path)
    # The file itself may have become a link since: its directory is what is resolved.
    project = host.realpath(directory if name == FILE else path)
    files = (f"{project}/{FILE}", f"{project}/{LOCK_FILE}")
    names = [name for name, record in _records(host) if record["path"] in files]
    try:
        with _directory(host) as opened:
            if opened is not None:
                for name in names:
                    _unlink(name, opened)
    except OSError as problem:
        raise _unwritable(host, problem) from None
    return bool(names)


def changes(document: Document, host: Host) -> Changes:
    """How the grants differ from when this file was last trusted; all are added where it never was."""
    last = _last(document, host)
    before = [Grant(key, value) for key, value in last["grants"]] if last else []
    now = grants(document)
    return Changes(
        added=tuple(grant for grant in now if grant not in set(before)),
        removed=tuple(grant for grant in before if grant not in set(now)),
    )


# --- what a file asks for -----------------------------------------------------------------------------------------

_Path = tuple[str, ...]


def _leaves(path: _Path, value: Any) -> Iterator[tuple[_Path, Any]]:
    """Every single thing said: a value, an item of a list, and a table or list that says nothing by being empty."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _leaves((*path, name), part)
    elif isinstance(value, list) and value:
        for part in value:
            yield path, part
    elif path:
        yield path, value


def _is_harmless(path: _Path, value: Any) -> bool:
    if path[:2] == ("env", "set") and len(path) > 2 and any(fnmatchcase(path[2].upper(), hook) for hook in _HOOKS):
        return False
    return any(path[: len(harmless)] == harmless for harmless in _HARMLESS) or (
        value == {} and any(harmless[: len(path)] == path for harmless in _HARMLESS)
    )


def _rank(path: _Path) -> int:
    if path[:2] == ("root", "repository"):  # whoever signs there is root in the environment, today and tomorrow
        return -2
    return _TABLES.index(path[0]) if path[0] in _TABLES else -1


def _brief(path: _Path, value: Any) -> Any:
    """`value` without the pages of a key: the fingerprint beside it says which one may sign, and no other can."""
    if path[:2] == ("root", "repository") and isinstance(value, dict):
        key = value.get("key")
        if isinstance(key, str) and "\n" in key:
            return {**value, "key": key.lstrip().partition("\n")[0]}
    return value


def _key(path: _Path) -> str:
    key = ""
    for name in path:
        key = join(key, name)
    return key


def _short(value: str) -> str:
    return value if len(value) <= _VALUE_MAX else f"{value[:_VALUE_MAX]}..."


# --- the records: <state>/trust/<digest>.json -----------------------------------------------------------------------
# Anything in there that is not exactly what this file writes counts as not there.


def _is_recorded(name: str, path: str, host: Host) -> bool:
    record = _read_record(name, host)
    return record is not None and record["path"] == path


def _lock_digest(document: Document) -> str:
    """Of a lock file in its place; it has a record of its own, as it changes more often than what it is made for."""
    data = document.lock.data if document.lock else b""
    said = [SCHEMA, "lock", document.project, hashlib.sha256(data).hexdigest()]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _record(name: str, path: str, agreed: Sequence[Grant], host: Host) -> None:
    record = {
        "schema": SCHEMA,
        "sha256": name,
        "path": path,
        "when": time.time_ns(),
        "grants": [[grant.key, grant.value] for grant in agreed],
    }
    _write_record(name, json.dumps(record).encode(), host)


def _last(document: Document, host: Host) -> dict[str, Any] | None:
    """The newest record of this project file, of whatever bytes."""
    place = document.files[0].path
    return max(
        (record for _, record in _records(host) if record["path"] == place),
        key=lambda record: cast(int, record["when"]),
        default=None,
    )


def _records(host: Host) -> list[tuple[str, dict[str, Any]]]:
    with _directory(host) as directory:
        names = os.listdir(directory) if directory is not None else []
    stems = [name[: -len(".json")] for name in sorted(names) if name.endswith(".json")]
    return [(f"{stem}.json", record) for stem in stems if (record := _read_record(stem, host)) is not None]


def _read_record(name: str, host: Host) -> dict[str, Any] | None:
    with _directory(host) as directory:
        if directory is None:
            return None
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            with open(os.open(f"{name}.json", flags, dir_fd=directory), "rb") as file:
                if not _is_own(os.fstat(file.fileno()), stat.S_IFREG, host):
                    return None
                data = file.read(_RECORD_MAX + 1)
            return _checked(name, json.loads(data)) if len(data) <= _RECORD_MAX else None
        except (OSError, ValueError, RecursionError):
            return None


def _checked(name: str, record: Any) -> dict[str, Any] | None:
    """`record`, if it is one that `trust` could have written under this name."""
    shape = {"schema": int, "sha256": str, "path": str, "when": int, "grants": list}
    if not isinstance(record, dict) or {key: type(value) for key, value in record.items()} != shape:
        return None
    pairs = all(
        isinstance(grant, list) and len(grant) == 2 and all(isinstance(text, str) for text in grant)
        for grant in record["grants"]
    )
    return record if record["schema"] == SCHEMA and record["sha256"] == name and pairs else None


def _write_record(name: str, data: bytes, host: Host) -> None:
    """Beside its place and renamed over it: a crash leaves the record before, or this one."""
    where = f"{host.state}/trust"
    try:
        os.makedirs(under(host, f"{host.realpath(host.state)}/trust"), mode=0o700, exist_ok=True)
        with _directory(host) as directory:
            if directory is None:
                hint = f"chmod 700 {where}"
                raise Unsupported(f"{where}: not a directory that only you can write to", hint=hint)
            temporary = f".{name}.{secrets.token_hex(4)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                with open(os.open(temporary, flags, 0o600, dir_fd=directory), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(temporary, f"{name}.json", src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                _unlink(temporary, directory)
                raise
            os.fsync(directory)
    except OSError as problem:
        raise _unwritable(host, problem) from None


def _unwritable(host: Host, problem: OSError) -> Unsupported:
    return Unsupported(f"{host.state}/trust: cannot be written: {os.strerror(problem.errno or 0).lower()}")


def _unlink(name: str, directory: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


@contextmanager
def _directory(host: Host) -> Iterator[int | None]:
    """The directory of the records, open; None where there is none, or where others could have put one there."""
    try:
        where = under(host, f"{host.realpath(host.state)}/trust")
        directory = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield directory if _is_own(os.fstat(directory), stat.S_IFDIR, host) else None
    finally:
        os.close(directory)


def _is_own(status: os.stat_result, kind: Literal[0o100000, 0o040000], host: Host) -> bool:
    """Of this kind, the user's, and writable by nobody else."""
    return stat.S_IFMT(status.st_mode) == kind and status.st_uid == host.uid and not status.st_mode & 0o022
