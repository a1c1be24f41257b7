"""[cgroup]: limits on memory, processor time and processes, enforced by whatever this host gives its user.

Three rungs: a delegated subtree of the unified hierarchy, directories of version 1 that belong to the user, and
resource limits of single processes. What none of them can do is said, and never dropped silently.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Literal

from devns.api import Host, Problem, Spec, Step, hookimpl, outside, rlimit
from devns_cgroup import groups

_PIDS_MAX = 1 << 22  # PID_MAX_LIMIT, include/linux/threads.h
_UNLIMITED = (1 << 63) - 1
_NPROC_SINCE = (5, 14)  # RLIMIT_NPROC counts in each user namespace; before, all processes of the user on the machine


@dataclass(frozen=True)
class CgroupTable:
    """[cgroup]. Sizes are in bytes ("4G" in the file), `cpu` is in cores, `cpu_weight` is 100 unless said.

    `memory_high` slows the environment down where `memory` ends processes; `swap` comes on top of `memory`.
    `enforce`: what happens where this host cannot hold a limit.
    """

    memory: int | None = field(default=None, metadata={"unit": "size"})
    memory_high: int | None = field(default=None, metadata={"unit": "size"})
    swap: int | None = field(default=None, metadata={"unit": "size"})
    cpu: float | None = None
    cpu_weight: int | None = None
    pids: int | None = None
    enforce: Literal["warn", "fail"] = "warn"

    def __post_init__(self) -> None:
        least = 1 << 20
        for key in ("memory", "memory_high"):
            size = getattr(self, key)
            if size is not None and size < least:
                raise ValueError(f'{key}: {size} bytes are too few for a program: "512M" is half a gigabyte')
        if self.cpu is not None and not 0.01 <= self.cpu <= 4096:
            raise ValueError(f"cpu: {self.cpu:g} is not between 0.01 and 4096 cores")
        if self.cpu_weight is not None and not 1 <= self.cpu_weight <= 10000:
            raise ValueError(f"cpu_weight: {self.cpu_weight} is not between 1 and 10000")
        if self.pids is not None and not 4 <= self.pids <= _PIDS_MAX:
            raise ValueError(f"pids: {self.pids} is not between 4 and {_PIDS_MAX}: devns itself needs two")

    @property
    def limits(self) -> dict[str, float]:
        """What is asked for, by name."""
        said = {key.name: getattr(self, key.name) for key in fields(self) if key.name != "enforce"}
        return {name: value for name, value in said.items() if value is not None}


# --- the hooks --------------------------------------------------------------------------------------------------------


@hookimpl
def devns_table() -> tuple[str, type]:
    return "cgroup", CgroupTable


@hookimpl
def devns_check(spec: Spec, host: Host) -> Iterable[Problem]:
    table = spec.table(CgroupTable)
    missing = _missing(table, host)
    instead = _instead(missing, spec, host) if table.enforce == "warn" else _alike(spec, host)
    for limit, reason in missing.items():
        said = groups.shown(limit, table.limits[limit])
        if limit not in instead:
            yield Problem("cgroup", f"{said} cannot be enforced here: {reason}", _remedy(host), table.enforce == "fail")


@hookimpl
def devns_plan(spec: Spec, host: Host) -> Iterable[Step]:
    table = spec.table(CgroupTable)
    if not table.limits:
        return
    missing = _missing(table, host)
    instead = _instead(missing, spec, host)
    if table.pids is not None and host.kernel >= _NPROC_SINCE:
        yield rlimit("nproc", table.pids, table.pids)  # beside the group: the core's own default may be lower
    if "memory" in instead and table.memory is not None:
        # Data and not address space: Java, Go and V8 reserve address space that they never use. A soft limit, for
        # it holds each process alone, and a sanitizer's shadow memory may have to be let through.
        yield rlimit("data", table.memory, _UNLIMITED)
    counted = _alike(spec, host) if table.enforce == "fail" else instead
    yield outside("devns_cgroup.limits:hold", limits=table.limits, instead=sorted(counted), enforce=table.enforce)


# --- what this host can do --------------------------------------------------------------------------------------------


def _missing(table: CgroupTable, host: Host) -> dict[str, str]:
    """Limit -> why no control group can hold it, as far as that can be seen before it is tried."""
    limits = table.limits
    own = groups.directories(host.read("/proc/self/cgroup") or "", host.read("/proc/self/mountinfo") or "")
    unified = groups.base(own[""]) if "" in own else ""
    found = groups.places(limits, own, host.read(f"{unified}/cgroup.controllers") or "")
    missing = {}
    for limit in limits:
        if limit not in found:
            missing[limit] = groups.absence(limit)
        elif not all(_is_writable(path, host) for path in (found[limit], f"{found[limit]}/cgroup.procs")):
            missing[limit] = f"its control group is not delegated to you: {found[limit]}"
        elif found[limit] == unified and not _can_hand_down(unified, groups.CONTROLLERS[limit], host):
            missing[limit] = f"other processes share its control group: {found[limit]}"
    return missing


def _can_hand_down(directory: str, controller: str, host: Host) -> bool:
    """A group with processes in it can give no controller to groups beneath it; devns alone would move out."""
    enabled = (host.read(f"{directory}/cgroup.subtree_control") or "").split()
    return controller in enabled or len((host.read(f"{directory}/cgroup.procs") or "").split()) <= 1


def _instead(missing: Iterable[str], spec: Spec, host: Host) -> set[str]:
    """The limits among `missing` that a resource limit comes near to."""
    possible = {"memory"} | ({"pids"} if host.kernel >= _NPROC_SINCE and host.uid != 0 else set())
    return possible & set(missing)


def _alike(spec: Spec, host: Host) -> set[str]:
    """The limits that a resource limit holds as well as a group would: the number of processes, where there is only
    one user inside to count them for. The machine's root is never counted."""
    one_user = spec.user.identity == "self" or spec.user.map == "single"
    return {"pids"} if one_user and host.kernel >= _NPROC_SINCE and host.uid != 0 else set()


def _remedy(host: Host) -> str:
    if host.kind("/run/systemd/system") == "directory" and host.kind("/sys/fs/cgroup/cgroup.controllers"):
        return "systemd-run --user --scope -p Delegate=yes devns ..."
    return "ask root for a control group of your own: cgroups(7), Delegation"


def _is_writable(path: str, host: Host) -> bool:
    status = host.stat(path)
    if status is None:
        return False
    shift = 6 if status.st_uid == host.uid else 3 if status.st_gid in (host.gid, *host.groups) else 0
    return host.uid == 0 or bool((status.st_mode >> shift) & 0o2)
