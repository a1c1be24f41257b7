"""sealed: the Plan of a build step, and how it is run: as root, with nothing of the host but what is given, and with
the host's network only where that is given too.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from devns import diagnose
from devns.accounts import ROOT
from devns.durable import telling
from devns.errors import DevnsError
from devns.identity import ROOT_CAPABILITIES, identity
from devns.launch import Explain, started
from devns.ops import bind, dev, hostname, loopback, no_user_namespaces, overlay, proc, tmpfs
from devns.plan import SCHEMA
from devns.spec import Spec, User
from devns.trash import ForeignFiles, delete_tree

if TYPE_CHECKING:
    from devns.host import Host

Step = dict[str, Any]
Plan = dict[str, Any]
Watch = dict[int, Callable[[], object]]

LIMITS = {"nproc": [4096, 4096], "nofile": [65536, 65536], "core": [0, 0]}
# What a build sees of the caller's environment: nothing, or a layer would depend on who made it.
ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TERM": "dumb",
    "TZ": "UTC",
    "DEVNS": "build",
    "DEBIAN_FRONTEND": "noninteractive",
}
_LINE_MAX = 8 << 10  # of a longer line the rest is not told, and what waits for its end is no more than this
_SAID_MAX = 500  # characters of each line that an error repeats
_POINTS = ("/dev", "/proc", "/run", "/sys", "/tmp")


class Ended(DevnsError):
    """What ran inside ended with another status than 0."""


@dataclass(frozen=True)
class Place:
    """Where a layer is made: `root` becomes its tree. What stands on others has them as `lower`, topmost first, the
    record of the first of these, and `scratch`, a directory on the file system of `root` that is gone afterwards. Who
    may use the host's network is lent these mounts and variables for it."""

    root: str
    lower: Sequence[str] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    scratch: str = ""
    lent: Sequence[Step] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def sealed_plan(
    host: Host,
    *,
    map: str,
    inside: Iterable[Step],
    argv: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cwd: str = "/",
    network: bool = False,
) -> Plan:
    """Root inside by `map` ("single" or "range"), every namespace its own, fsync answered. Of networks there is `lo`
    alone, or with `network` the host's.

    A build syncs once, when it is finished, and starts anew when it was interrupted; so nothing in between waits for
    the disk.
    """
    ids = identity(Spec("build", "build", user=User(map=map, identity="root")), host, ROOT)  # type: ignore[arg-type]
    filters = ["deny", "emulate-root"] if ids["map"] == "single" else ["deny"]
    return {
        "schema": SCHEMA,
        "name": "build",
        "argv": list(argv),
        "cwd": cwd,
        "env": dict(env or {}),
        "identity": ids,
        "namespaces": ["cgroup", "ipc", "mount", *([] if network else ["net"]), "pid", "user", "uts"],
        "clock": None,
        "confine": {
            "capabilities": list(ROOT_CAPABILITIES),
            "seccomp": [*filters, "ignore-sync"],
            "nested": False,
            "setuid_bits": True,
            "scoped": True,
        },
        "rlimits": LIMITS,
        "inside": [*inside, hostname("localhost"), *([] if network else [loopback()]), no_user_namespaces()],
        "outside": [],
        "notes": [],
    }


@contextmanager
def stacked(place: Place, host: Host, mounts: Sequence[Step] = ()) -> Iterator[list[Step]]:
    """The steps that make `/` of the layers beneath, what is written going to `place.root`; /proc, /dev, empty /tmp and
    /run, what is lent, and `mounts`, parents first.
    """
    mounts = [*place.lent, *mounts]
    # Mount points that a layer lacks would be made in the new one and stay in it. So they lie beneath all layers.
    beneath, work = f"{place.scratch}/points", f"{place.scratch}/work"
    with _umask():
        for path in _POINTS:
            os.makedirs(f"{beneath}{path}")
        for step in mounts:
            made = f"{beneath}{step['dst']}"
            is_file = step["op"] == "file" or (step["op"] == "bind" and not os.path.isdir(step["src"]))
            os.makedirs(os.path.dirname(made) if is_file else made, exist_ok=True)
            if is_file and not os.path.lexists(made):
                os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    try:
        yield [
            overlay("/", lower=[*place.lower, beneath], upper=place.root, work=work, volatile=True),
            proc(),
            dev(),
            tmpfs("/tmp", mode=0o1777),
            tmpfs("/run"),
            *mounts,
        ]
    finally:
        delete_tree(beneath)
        delete(work, host)  # overlayfs refuses one that was used as volatile before


def delete(path: str, host: Host) -> None:
    """Delete a tree that may belong to subordinate ids: their own root does it, in a namespace where they are."""
    try:
        with telling(path):
            delete_tree(path)
    except ForeignFiles:
        above, name = os.path.split(path)
        plan = sealed_plan(host, map="range", inside=[tmpfs("/"), bind(above, "/above", readonly=False)])

        def call() -> str:
            delete_tree(f"/above/{name}")
            return ""

        run_sealed(plan, host, call=call)


def run_sealed(
    plan: Plan,
    host: Host,
    *,
    call: Callable[[], str] | None = None,
    line: Callable[[str], None] = lambda text: None,
    what: str = "a build step",
    keep: Sequence[int] = (),
    beside: Callable[[Watch], AbstractContextManager[Any]] = lambda watch: nullcontext(),
) -> str:
    """Run to the end; each line it says goes to `line`. Returns what `call` returned, which has the descriptors `keep`.

    `beside` is held while it runs, entered only when nothing forks here any more, and may add to what is waited for:
    a descriptor, and what to call when it is readable. Raises Ended with the last lines where `what` ends with another
    status than 0.
    """
    last: deque[str] = deque(maxlen=20)
    rest = b""

    def hear(final: bool = False) -> bool:
        nonlocal rest
        try:
            data = os.read(ear, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            watch.pop(ear, None)
        rest += data
        *whole, rest = rest.split(b"\n")
        if len(rest) > _LINE_MAX:
            whole, rest = [*whole, rest], b""
        for raw in [*whole, *([rest] if final and rest else [])]:
            text = raw.decode(errors="replace").rstrip().rpartition("\r")[2][:_LINE_MAX]  # as a terminal shows it
            last.append(text[:_SAID_MAX])
            line(text)
        return False

    opened: list[int] = []
    try:
        with telling(what):
            opened.append(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
            opened += os.pipe2(os.O_CLOEXEC)
        null, ear, mouth = opened
        os.set_blocking(ear, False)
        watch: Watch = {ear: hear}
        with (
            _umask(),
            started(plan, call=call, stdio=(null, mouth, mouth), keep=keep, explain=_explaining(host)) as running,
        ):
            os.close(opened.pop())  # the mouth: the ear must hear when the last other one is closed
            with beside(watch):
                status = running.wait(watch=watch, forward=False)
            hear(final=True)
    finally:
        for fd in opened:
            os.close(fd)
    if status:
        said = "\n".join(f"  {text}" for text in last)
        raise Ended(f"{what} ended with status {status}:\n{said}" if last else f"{what} ended with status {status}")
    return running.result or ""


def enter(plan: Plan, host: Host) -> int:
    """Run it on the caller's own streams, to look around; returns its status."""
    with _umask(), started(plan, explain=_explaining(host)) as running:
        return running.wait()


def _explaining(host: Host) -> Explain:
    return partial(diagnose.explain, host=host)


@contextmanager
def _umask() -> Iterator[None]:
    """The usual one, whatever the caller's: a layer is the same whoever made it."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)
