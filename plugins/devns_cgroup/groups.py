"""Where this process's control groups lie and what has to be written there: cgroups(7). Pure, and free of dataclasses,
for both the plan (from `Host`) and the effect (from this machine) ask here."""

from __future__ import annotations

import re
from collections.abc import Mapping

SUPERVISOR = "devns-supervisor"  # the group devns itself moves to, so that the one above may have controllers

CONTROLLERS = {
    "memory": "memory",
    "memory_high": "memory",
    "swap": "memory",
    "cpu": "cpu",
    "cpu_weight": "cpu",
    "pids": "pids",
}
_PERIOD = 100_000  # microseconds, the kernel's default: cpu.max, cpu.cfs_period_us
_PAGE_MAX = 1 << 16  # bytes: the largest page there is; memory limits are rounded down to pages

Limits = Mapping[str, float]


def directories(cgroup: str, mountinfo: str) -> dict[str, str]:
    """Controller -> this process's own directory, and "" -> that in the unified hierarchy.

    `cgroup` and `mountinfo` are the texts of /proc/self/cgroup and /proc/self/mountinfo. What is not mounted, mounted
    read-only, or lies outside of what is mounted (as in a container), is left out.
    """
    own: dict[str, str] = {}
    for line in cgroup.splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for name in names.split(",") if number != "0" else [""]:
            own[name] = path
    found: dict[str, str] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.partition(" ")[0]
        if kind not in ("cgroup", "cgroup2") or len(fields) < 6 or "ro" in fields[5].split(","):
            continue
        top, place = _unescape(fields[3]), _unescape(fields[4])
        options = after.split(" ")[-1].split(",")
        for name in [""] if kind == "cgroup2" else [name for name in options if name in own]:
            inside = _below(own.get(name), top)
            if inside is not None:
                found[name] = place + inside
    return found


def base(directory: str) -> str:
    """The group beneath which environments get theirs: one up, where an earlier launch moved us to the supervisor's."""
    return directory.removesuffix(f"/{SUPERVISOR}")


def places(wanted: Limits, own: Mapping[str, str], controllers: str) -> dict[str, str]:
    """Limit -> directory, for those whose controller is here. `controllers` is what cgroup.controllers of the own
    directory in the unified hierarchy says; a controller is either there or in a hierarchy of version 1."""
    unified = controllers.split()
    found = {}
    for limit in wanted:
        controller = CONTROLLERS[limit]
        if "" in own and controller in unified:
            found[limit] = base(own[""])
        elif controller in own and limit != "memory_high":  # version 1 has a soft limit only, which is another thing
            found[limit] = own[controller]
    return found


def absence(limit: str) -> str:
    """Why places() has nothing for `limit`."""
    if limit == "memory_high":
        return "only the unified hierarchy has it, and its memory controller is not in use here"
    return f"no {CONTROLLERS[limit]} controller is within reach"


def unified_writes(limits: Limits) -> list[tuple[str, str, str]]:
    """(limit, file, value): Documentation/admin-guide/cgroup-v2.rst"""
    files = {
        "memory": "memory.max",
        "memory_high": "memory.high",
        "swap": "memory.swap.max",
        "cpu": "cpu.max",
        "cpu_weight": "cpu.weight",
        "pids": "pids.max",
    }
    values = {limit: f"{int(value)}" for limit, value in limits.items()}
    if "cpu" in limits:
        values["cpu"] = f"{_quota(limits['cpu'])} {_PERIOD}"
    return [(limit, files[limit], values[limit]) for limit in files if limit in limits]


def legacy_writes(limits: Limits) -> list[tuple[str, str, str]]:
    """The same for version 1, in an order the kernel takes: memory and swap together never below memory alone.

    Documentation/admin-guide/cgroup-v1/memory.rst, Documentation/scheduler/sched-bwc.rst
    """
    writes = []
    if "memory" in limits:
        writes.append(("memory", "memory.limit_in_bytes", f"{int(limits['memory'])}"))
    if "swap" in limits and "memory" in limits:
        writes.append(("swap", "memory.memsw.limit_in_bytes", f"{int(limits['memory'] + limits['swap'])}"))
    if "cpu" in limits:
        writes.append(("cpu", "cpu.cfs_period_us", f"{_PERIOD}"))
        writes.append(("cpu", "cpu.cfs_quota_us", f"{_quota(limits['cpu'])}"))
    if "cpu_weight" in limits:  # 100 is the default there, 1024 here
        writes.append(("cpu_weight", "cpu.shares", f"{max(2, int(limits['cpu_weight'] * 1024 / 100))}"))
    if "pids" in limits:
        writes.append(("pids", "pids.max", f"{int(limits['pids'])}"))
    return writes


def holds(file: str, written: str, read: str) -> bool:
    """Does `file` say what was written to it? Memory is rounded down to pages."""
    said, found = written.split(), read.split()
    if file.startswith("memory.") and len(found) == 1 and found[0].isdecimal():
        return 0 <= int(said[0]) - int(found[0]) < _PAGE_MAX
    return said == found


def shown(limit: str, value: float) -> str:
    """ "memory 4G", "cpu 1.5", "pids 1024"."""
    if CONTROLLERS[limit] == "memory" and value:
        for letter, factor in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
            if value % factor == 0:
                return f"{limit} {int(value) // factor}{letter}"
    return f"{limit} {value:g}" if limit == "cpu" else f"{limit} {int(value)}"


def _quota(cores: float) -> int:
    return max(1000, round(cores * _PERIOD))  # the kernel's least


def _below(path: str | None, top: str) -> str | None:
    """`path` as seen from a mount whose root is `top`."""
    if path is None or ".." in path.split("/"):
        return None
    top = top.rstrip("/")
    return path[len(top) :].rstrip("/") if path == top or path.startswith(f"{top}/") else None


def _unescape(path: str) -> str:
    """proc(5): space, tab, newline and backslash are written in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
