"""diagnose, the half that reads: every cause is told from what a machine shows, and never as a bare "permission denied"."""

from __future__ import annotations

import contextlib
import errno as E
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from devns import ops
from devns.diagnose import (
    ANSWERS,
    CAUSES,
    Fact,
    Mount,
    apparmor_profile,
    explain,
    install,
    limits_fact,
    mount_of,
    mounts,
    problem,
    range_problem,
    tun_problem,
    userns_problem,
)
from devns.plan import Problem

if TYPE_CHECKING:
    from tests.conftest import MakeHost

NoEffects = Callable[[], contextlib.AbstractContextManager[None]]


def mountinfo(*rows: str) -> dict[str, str]:
    """`point type options features` as /proc/self/mountinfo tells them."""
    lines = []
    for row in rows:
        point, kind, options, features = (row.split(" ") + ["rw", "rw"])[:4]
        lines.append(f"22 27 0:21 / {point} {options} shared:1 - {kind} none {features}\n")
    return {"/proc/self/mountinfo": "".join(lines)}


def status(**fields: int) -> dict[str, str]:
    return {"/proc/self/status": "Name:\tpython3\n" + "".join(f"{key}:\t{value}\n" for key, value in fields.items())}


FIRST = {"/proc/self/uid_map": "         0          0 4294967295\n"}
NESTED = {"/proc/self/uid_map": "      1000       1000          1\n"}
NO_USERS = {"/proc/sys/user/max_user_namespaces": "0\n"}
UBUNTU = {"/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n"}
FILTERED = status(Seccomp=2, Threads=1)
NS = {f"/proc/self/ns/{name}": "" for name in ("user", "pid", "ipc", "uts", "net", "cgroup", "time", "mnt")}
PROC = "/proc proc"

PROFILE = """\
sudo tee /etc/apparmor.d/devns <<'EOF'
abi <abi/4.0>,
include <tunables/global>
profile devns "/usr/bin/devns" flags=(unconfined) {
  userns,
}
