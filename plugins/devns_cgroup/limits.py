"""The effect of [cgroup]: a control group for one environment, made, filled, read back, and removed. cgroups(7)"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from devns.api import Unsupported
from devns_cgroup import groups

if TYPE_CHECKING:
    from devns.api import Child, Step

_EMPTY_WITHIN = 1.0  # seconds from SIGKILL until a group can be removed
_INSTEAD = {
    "pids": "by RLIMIT_NPROC, for each user inside",
    "memory": "by RLIMIT_DATA, for each process by itself and not for all together (ulimit -Sd hard lifts it)",
}


@contextlib.contextmanager
def hold(step: Step, child: Child, *, root: str = "") -> Iterator[None]:
    """Put `child` under the limits of `step`, say what enforces which, and remove the groups when it has ended.

    `{"limits": {"memory": bytes, "cpu": cores, ...}, "instead": [limits that an rlimit stands in for], "enforce"}`.
    Raises Unsupported where `enforce` is "fail" and a limit cannot be enforced. `root` is where this machine is seen.
    """
    wanted: groups.Limits = step["limits"]
    missing: dict[str, str] = {}
    enforced: list[str] = []
    with contextlib.ExitStack() as held:
        for directory, limits in _directories(wanted, missing, root).items():
            try:
                failed = held.enter_context(_group(directory, limits, child, root))
                enforced += limits.keys() - failed.keys()
                missing.update(failed)
            except PermissionError:
                missing.update(dict.fromkeys(limits, f"its control group is not delegated to you: {directory}"))
            except OSError as error:
                reason = f"{error.strerror or error}: {error.filename or directory}".lower()
                missing.update(dict.fromkeys(limits, reason))
            except _Refused as refusal:
                missing.update(dict.fromkeys(limits, str(refusal)))
        _report(step, enforced, missing, child.note)
        yield


def _report(step: Step, enforced: list[str], missing: dict[str, str], note: Callable[[str], None]) -> None:
    said = {limit: groups.shown(limit, value) for limit, value in step["limits"].items()}
    fatal = [limit for limit in missing if limit not in step["instead"]]
    if fatal and step["enforce"] == "fail":
        raise Unsupported(
            f"{said[fatal[0]]} cannot be enforced here: {missing[fatal[0]]}",
            hint='devns check names the ways; or set enforce = "warn" in [cgroup]',
        )
    if enforced:
        note(f"limits: {', '.join(said[limit] for limit in said if limit in enforced)}")
    for limit, reason in missing.items():
        how = _INSTEAD[limit] if limit in step["instead"] else "not enforced here"
        note(f"{said[limit]}: {how}: {reason}")


class _Refused(Exception):
    """A group that could be made and must not be."""


def _directories(wanted: groups.Limits, missing: dict[str, str], root: str) -> dict[str, dict[str, float]]:
    """Directory -> its limits; those that have none join `missing`."""
    own = groups.directories(_read(f"{root}/proc/self/cgroup"), _read(f"{root}/proc/self/mountinfo"))
    controllers = _read(f"{root}{groups.base(own[''])}/cgroup.controllers") if "" in own else ""
    found = groups.places(wanted, own, controllers)
    places: dict[str, dict[str, float]] = {}
    for limit, value in wanted.items():
        if limit in found:
            places.setdefault(found[limit], {})[limit] = value
        else:
            missing[limit] = groups.absence(limit)
    return places


# --- one group --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _group(directory: str, limits: dict[str, float], child: Child, root: str) -> Iterator[dict[str, str]]:
    """A group of the child's own beneath `directory`, with `limits`; gives those that it refused, and why.

    Whatever is left in it at last is killed.
    """
    above = f"{root}{directory}"
    unified = os.path.exists(f"{above}/cgroup.controllers")
    path = f"{above}/devns-{child.pid}"
    _sweep(above, root)
    with contextlib.ExitStack() as held:
        if unified:
            held.callback(_leave, above)
        _make(path)
        held.callback(_remove, path)
        if unified:
            _enable(above, {groups.CONTROLLERS[limit] for limit in limits}, child.pid)
        _write(f"{path}/cgroup.procs", str(child.pid))
        yield _fill(path, groups.unified_writes(limits) if unified else groups.legacy_writes(limits))
        if _oom_kills(path):
            limit = groups.shown("memory", limits["memory"]) if "memory" in limits else "what there is"
            child.note(f"out of memory: {limit} was not enough, and the kernel ended processes")


def _fill(path: str, writes: list[tuple[str, str, str]]) -> dict[str, str]:
    """Limit -> why it isn't held. A kernel can lack one file of a controller, and take a value it doesn't keep."""
    failed = {}
    for limit, file, value in writes:
        try:
            _write(f"{path}/{file}", value)
        except OSError as error:
            failed[limit] = f"{file}: {error.strerror or error}".lower()
            continue
        found = _read(f"{path}/{file}").strip()
        if not groups.holds(file, value, found):
            failed[limit] = f"{file} was set to {value} and says {found or 'nothing'}"
    return failed


def _enable(above: str, controllers: set[str], child: int) -> None:
    """Give the groups beneath `above` these controllers.

    A group that hands controllers down may hold no process itself: devns and its helpers move to a group beside the
    environment's. Processes of others are left where they are, and then it cannot be.
    """
    if controllers <= set(_read(f"{above}/cgroup.subtree_control").split()):
        return
    pids = [int(word) for word in _read(f"{above}/cgroup.procs").split()]
    ours = [pid for pid in pids if pid == child or _descends(pid, os.getpid())]
    if len(ours) < len(pids):
        raise _Refused(f"other processes share its control group: {above}")
    supervisor = f"{above}/{groups.SUPERVISOR}"
    with contextlib.suppress(FileExistsError):
        _make(supervisor)
    for pid in ours:
        if pid != child:
            _write(f"{supervisor}/cgroup.procs", str(pid))
    # The child follows before anything is enabled, with an unlimited group: it still waits for its start.
    _write(f"{above}/devns-{child}/cgroup.procs", str(child))
    for name in sorted(controllers):  # one at a time: a list is refused as a whole when one of it is missing
        _write(f"{above}/cgroup.subtree_control", f"+{name}")


def _leave(above: str) -> None:
    """Back to where we were found, unless other environments still need it so."""
    supervisor = f"{above}/{groups.SUPERVISOR}"
    with contextlib.suppress(OSError):
        groups_left = [name for name in os.listdir(above) if os.path.isdir(f"{above}/{name}")]
        if groups_left != [groups.SUPERVISOR]:
            return
        for name in _read(f"{above}/cgroup.subtree_control").split():
            _write(f"{above}/cgroup.subtree_control", f"-{name}")
        for pid in _read(f"{supervisor}/cgroup.procs").split():
            _write(f"{above}/cgroup.procs", pid)
        os.rmdir(supervisor)


def _remove(path: str) -> None:
    deadline = time.monotonic() + _EMPTY_WITHIN
    while True:
        try:
            os.rmdir(path)
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                return  # the next launch sweeps it
        with contextlib.suppress(OSError):
            _write(f"{path}/cgroup.kill", "1")  # since Linux 5.14
        for pid in _read(f"{path}/cgroup.procs").split():
            with contextlib.suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.01)


def _sweep(above: str, root: str) -> None:
    """Remove what a launch left behind that was killed: rmdir(2) takes no group with a process in it."""
    with contextlib.suppress(OSError):
        for name in os.listdir(above):
            if re.fullmatch(r"devns-\d+", name) and not os.path.exists(f"{root}/proc/{name[len('devns-') :]}"):
                with contextlib.suppress(OSError):
                    os.rmdir(f"{above}/{name}")


def _oom_kills(path: str) -> bool:
    said = _read(f"{path}/memory.events") or _read(f"{path}/memory.oom_control")
    return re.search(r"^oom_kill [1-9]", said, re.MULTILINE) is not None


def _descends(pid: int, ancestor: int) -> bool:
    while pid not in (0, 1, ancestor):
        # /proc/PID/stat: "PID (name) state ppid ...", and a name may hold anything
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        pid = int(fields[1]) if len(fields) > 1 else 0
    return pid == ancestor


# --- files of the kernel ----------------------------------------------------------------------------------------------


def _make(path: str) -> None:
    os.mkdir(path, 0o755)


def _read(path: str) -> str:
    """A small file of the kernel; empty where it is not there."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:  # write(2) doesn't know the path
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(fd)
