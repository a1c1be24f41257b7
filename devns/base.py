"""The core's own plugin: root, /proc, /sys, /dev, identity, hostname, namespaces, environment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from devns import build, diagnose
from devns.hooks import hookimpl
from devns.host import is_beneath
from devns.ops import (
    account,
    bind,
    clock,
    dev,
    directory,
    file,
    hostname,
    mask,
    mqueue,
    namespace,
    no_user_namespaces,
    overlay,
    proc,
    rlimit,
    setenv,
    symlink,
    tmpfs,
)
from devns.plan import Problem, Step

if TYPE_CHECKING:
    from devns.host import Host
    from devns.spec import Spec

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PASSED = ("TERM", "COLORTERM", "NO_COLOR", "LANG", "TZ")  # and LC_*: how the terminal and the language are
LIMITS = {"nproc": 4096, "nofile": 65536, "core": 0}  # each is a ceiling; nproc counts in the own user namespace
_HOST_DIRECTORIES = ("/usr", "/opt", "/etc")
_HOST_LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")


class Base:
    """Registered like any plugin, asked like any plugin."""

    @hookimpl
    def devns_check(self, spec: Spec, host: Host) -> Iterable[Problem]:
        spaces = [step["name"] for step in _namespaces(spec) if step["op"] == "namespace"]
        for found in (diagnose.problem(name, host, None) for name in ("userns", *spaces)):
            if found is not None:
                yield found

    @hookimpl
    def devns_plan(self, spec: Spec, host: Host) -> Iterable[Step]:
        yield from _namespaces(spec)
        yield from _root(spec, host)
        yield from _system(spec, host)
        yield from _environment(spec, host)


def _namespaces(spec: Spec) -> Iterator[Step]:
    spaces = spec.namespaces
    for name in ("pid", "ipc", "cgroup"):
        if getattr(spaces, name):
            yield namespace(name)
    if spaces.uts:
        yield namespace("uts")
        yield hostname(spaces.uts.hostname or spec.name)
    if spaces.time:
        yield namespace("time")
        yield clock(boottime=spaces.time.boottime, monotonic=spaces.time.monotonic)


def _root(spec: Spec, host: Host) -> Iterator[Step]:
    lower = build.lower_directories(spec, host)
    if lower:
        upper, work = build.upper_directories(spec, host) if spec.root.writable == "keep" else (None, None)
        lower = [host.realpath(path) for path in lower]
        yield overlay("/", lower=lower, upper=upper, work=work, readonly=spec.root.writable == "no", canonical=True)
        yield account(host.user, host.uid, host.gid, host.home, "/bin/bash")
        return
    yield from _host_root(spec, host)


def _host_root(spec: Spec, host: Host) -> Iterator[Step]:
    """The host's own programs, read-only; what is written elsewhere goes to the environment's own directory."""
    if spec.root.writable == "keep":
        upper, _work = build.upper_directories(spec, host)
        yield bind(upper, "/", readonly=False, own=True)
    else:
        yield tmpfs("/")
    for path in _HOST_DIRECTORIES:
        if host.kind(path) == "directory":
            yield from _lent(path, host)
    for path in _HOST_LINKS:
        target = host.readlink(path)
        if target is not None:
            yield symlink(path, target)
        elif host.kind(path) == "directory":
            yield from _lent(path, host)
    for path in ("/var/tmp", "/var/lib", "/var/cache", "/var/log", "/root", "/home", "/mnt", "/srv"):
        yield directory(path, default=True)
    yield file("/etc/passwd", _passwd(host), optional=True, default=True)
    yield file("/etc/group", _group(host), optional=True, default=True)
    yield file("/etc/nsswitch.conf", "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n", optional=True)


def _lent(path: str, host: Host) -> Iterator[Step]:
    """A directory of the host's, without what is the user's alone and lies there: a store in /opt, a home in /usr."""
    real, home = host.realpath(path), host.realpath(host.home)
    for own in host.own:
        if is_beneath(own, real):
            yield mask(path + own[len(real) :], default=True)
    status = host.stat(home)
    if is_beneath(home, real) and status and status.st_uid == host.uid:
        yield tmpfs(path + home[len(real) :], default=True)  # no mask: a project in it has to find a place
    yield bind(path, path, default=True)  # the last: of two defaults for one place the first counts


def _passwd(host: Host) -> str:
    rows = {0: "root:x:0:0:root:/root:/bin/sh", 65534: "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin"}
    rows.setdefault(host.uid, f"{host.user}:x:{host.uid}:{host.gid}::{host.home}:/bin/bash")
    return "".join(f"{row}\n" for row in rows.values())


def _group(host: Host) -> str:
    rows = {0: "root:x:0:", 65534: "nogroup:x:65534:"}
    rows.setdefault(host.gid, f"{host.user}:x:{host.gid}:")
    return "".join(f"{row}\n" for row in rows.values())


def _system(spec: Spec, host: Host) -> Iterator[Step]:
    # Where the PID namespace is the caller's a fresh procfs is not ours to mount: its own is carried in.
    yield proc(masked=not spec.user.nested) if spec.namespaces.pid else bind("/proc", "/proc", readonly=False)
    yield dev()
    if spec.namespaces.ipc:
        yield mqueue()
    # A sysfs can be mounted only with an own network namespace, and shows the machine: here is what programs count
    # processors and memory nodes by. The network plugin mounts a real one where it can.
    yield tmpfs("/sys", default=True)
    yield bind("/sys/devices/system", "/sys/devices/system", optional=True, default=True)
    yield tmpfs("/tmp", mode=0o1777, default=True)
    yield tmpfs("/run", default=True)
    if spec.user.identity in ("self", "root"):  # another user's is what the root says, whether it is there or not
        yield directory("/root" if spec.user.identity == "root" else host.home, default=True)
    if not spec.user.nested:
        yield no_user_namespaces()
    for name, ceiling in LIMITS.items():
        yield rlimit(name, ceiling, ceiling, default=True)


def _environment(spec: Spec, host: Host) -> Iterator[Step]:
    # pip, pipx and uv put programs here when the system's own directories are not theirs to write.
    yield setenv("PATH", f"{host.home}/.local/bin:{PATH}" if spec.user.identity == "self" else PATH, default=True)
    yield setenv("DEVNS", spec.name, default=True)
    passed = [*PASSED, *(key for key in host.environ if key.startswith("LC_"))]
    for key in passed:
        if key in host.environ:
            yield setenv(key, host.environ[key], default=True)
    explicit = {key: host.environ[key] for key in spec.env.passed if key in host.environ}
    for key, value in {**explicit, **spec.env.set}.items():
        yield setenv(key, value)
