"""What all tests share: a host made of files, the proof that a call only reads, and what works on this machine."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest

from devns.diagnose import Fact, probe
from devns.host import Host

# --- host(): a machine described by files -----------------------------------------------------------------------------


class MakeHost(Protocol):
    """The real Host, its root a directory that holds just these files, all of them root's.

    `files`: path -> content; None is a directory. What lies in a directory named bin or sbin is executable.
    `links`: path -> target. `modes`: path -> permission bits, for files and directories alike.
    `environ` is the whole environment. The first host of a test has `tmp_path` for its root.
    """

    def __call__(
        self,
        files: Mapping[str, str | bytes | None] = ...,
        *,
        links: Mapping[str, str] = ...,
        modes: Mapping[str, int] = ...,
        uid: int = ...,
        gid: int = ...,
        groups: Iterable[int] = ...,
        environ: Mapping[str, str] = ...,
        cwd: str = ...,
        machine: str = ...,
        release: str = ...,
    ) -> Host: ...


@pytest.fixture
def host(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeHost:
    roots = [tmp_path]

    def make(
        files: Mapping[str, str | bytes | None] = {},
        *,
        links: Mapping[str, str] = {},
        modes: Mapping[str, int] = {},
        uid: int = 1000,
        gid: int = 1000,
        groups: Iterable[int] = (),
        environ: Mapping[str, str] = {"HOME": "/home/user", "USER": "user", "PATH": "/usr/bin:/bin"},
        cwd: str = "/",
        machine: str = "x86_64",
        release: str = "6.12.0",
    ) -> Host:
        root = roots.pop() if roots else tmp_path_factory.mktemp("host")
        for path, content in files.items():
            _place(root, path, content)
        for path, target in links.items():
            _directories(root, path)
            (root / path.lstrip("/")).symlink_to(target)
        for path, mode in modes.items():
            (root / path.lstrip("/")).chmod(mode)
        return Host.make(
            root=str(root),
            uid=uid,
            gid=gid,
            groups=groups,
            environ=environ,
            cwd=cwd,
            machine=machine,
            release=release,
        )

    return make


def _place(root: Path, path: str, content: str | bytes | None) -> None:
    _directories(root, path)
    place = root / path.lstrip("/")
    if content is None:
        place.mkdir(exist_ok=True)
        place.chmod(0o755)
        return
    place.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
    place.chmod(0o755 if place.parent.name in ("bin", "sbin") else 0o644)


def _directories(root: Path, path: str) -> None:
    """The directories above `path`, whatever the umask is."""
    here = root
    for part in path.strip("/").split("/")[:-1]:
        here /= part
        if not here.exists():
            here.mkdir()
            here.chmod(0o755)


# --- no_effects(): audit events, https://docs.python.org/3/library/audit_events.html ----------------------------------

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EFFECTS = frozenset(
    """
    os.chdir os.chflags os.chmod os.chown os.exec os.fork os.forkpty os.kill os.killpg os.link os.lockf os.mkdir
    os.posix_spawn os.putenv os.remove os.removexattr os.rename os.rmdir os.setxattr os.spawn os.symlink os.system
    os.truncate os.unsetenv os.utime pty.spawn resource.prlimit resource.setrlimit signal.pthread_kill subprocess.Popen
    """.split()
)
# ctypes: whatever is called through it is seen by no hook, so looking it up is as bad.
_EFFECTFUL = ("socket.", "shutil.", "tempfile.", "fcntl.", "ctypes.", "urllib.", "http.client.", "syslog.", "sqlite3.")


class Effect(AssertionError):
    """Code that must only read tried to do something."""


class _Watch:
    """An audit hook cannot be taken away again: there is one, and it minds the thread that is watched."""

    thread: int | None = None
    seen: list[str]

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.thread is None or self.thread != threading.get_ident():
            return
        opens = event == "open" and arguments[2] & _WRITES
        if opens or event in _EFFECTS or event.startswith(_EFFECTFUL):
            self.seen.append(f"{event}{arguments!r:.200}")
            raise Effect(self.seen[-1])


_watch = _Watch()
sys.addaudithook(_watch)


@pytest.fixture
def no_effects() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """`with no_effects():` fails on a write, fork, exec, socket, mkdir, rename, ... and keeps it from happening.

    Reading and importing are free. What was tried fails the test even where the code under test swallowed the error.
    """

    @contextlib.contextmanager
    def watch() -> Iterator[None]:
        cached = sys.dont_write_bytecode
        sys.dont_write_bytecode, _watch.seen, _watch.thread = True, [], threading.get_ident()
        try:
            yield
        finally:
            sys.dont_write_bytecode, _watch.thread = cached, None
        if _watch.seen:
            raise Effect("; ".join(_watch.seen))

    return watch


# --- require(): what works on this machine ----------------------------------------------------------------------------


@functools.cache
def facts() -> Mapping[str, Fact]:
    with tempfile.TemporaryDirectory(prefix="devns-facts-") as scratch:
        return probe(Host.probe(), scratch)


def must_work() -> list[str]:
    return [name.strip() for name in os.environ.get("DEVNS_MUST_WORK", "").split(",") if name.strip()]


@pytest.fixture
def require() -> Callable[..., None]:
    """`require("userns", "overlay")` skips where one of them does not work here, and says why.

    Where $DEVNS_MUST_WORK lists it ("userns,overlay,range") the test fails instead. The names are those of
    `devns.diagnose.probe`.
    """

    def check(*names: str) -> None:
        for fact in (facts()[name] for name in names):
            if not fact.works and fact.id in must_work():
                pytest.fail(f"{fact.id} must work here: {fact.detail}; {fact.remedy}", pytrace=False)
            if not fact.works:
                pytest.skip(f"needs {fact.id}: {fact.detail}")

    return check


def pytest_sessionstart() -> None:
    unknown = sorted(set(must_work()) - set(facts())) if must_work() else ()
    if unknown:
        raise pytest.UsageError(f"DEVNS_MUST_WORK: {', '.join(unknown)}: none of {', '.join(facts())}")


def pytest_report_header() -> list[str]:
    here = Host.probe()
    shown = {"userns": "userns", "overlay": "overlay", "newuidmap": "range", "cgroup": "limits"}
    works = ", ".join(f"{name} {'yes' if facts()[id].works else 'no'}" for name, id in shown.items())
    lacking = ", ".join(name for name, fact in facts().items() if not fact.works)
    return [
        f"devns: Linux {here.release} {here.machine}, {here.user} ({here.uid}), {works}",
        f"devns: lacking here: {lacking or 'nothing'}; must work: {', '.join(must_work()) or 'nothing'}",
    ]
