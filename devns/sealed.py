"""sealed: the Plan of a build step, and how it is run: nothing of the host but what is given, no network, as root."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from devns.errors import DevnsError
from devns.identity import ROOT_CAPABILITIES, identity
from devns.launch import Explain, started
from devns.ops import hostname, loopback, no_user_namespaces
from devns.plan import SCHEMA
from devns.spec import Spec, User

if TYPE_CHECKING:
    from devns.host import Host

Step = dict[str, Any]
Plan = dict[str, Any]

LIMITS = {"nproc": [4096, 4096], "nofile": [65536, 65536], "core": [0, 0]}


def sealed_plan(
    host: Host,
    *,
    map: str,
    inside: Iterable[Step],
    argv: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Plan:
    """Root inside by `map` ("single" or "range"), every namespace its own, `lo` alone for a network, fsync answered.

    A build syncs once, when it is finished, and starts anew when it was interrupted; so nothing in between waits for
    the disk.
    """
    ids = identity(Spec("build", "build", user=User(map=map, identity="root")), host)  # type: ignore[arg-type]
    filters = ["deny", "emulate-root"] if ids["map"] == "single" else ["deny"]
    return {
        "schema": SCHEMA,
        "name": "build",
        "argv": list(argv),
        "cwd": "/",
        "env": dict(env or {}),
        "identity": ids,
        "namespaces": ["cgroup", "ipc", "mount", "net", "pid", "user", "uts"],
        "clock": None,
        "confine": {
            "capabilities": list(ROOT_CAPABILITIES),
            "seccomp": [*filters, "ignore-sync"],
            "nested": False,
            "setuid_bits": True,
            "scoped": True,
        },
        "rlimits": LIMITS,
        "inside": [*inside, hostname("localhost"), loopback(), no_user_namespaces()],
        "outside": [],
        "notes": [],
    }


def run_sealed(
    plan: Plan,
    *,
    call: Callable[[], str] | None = None,
    line: Callable[[str], None] = lambda text: None,
    explain: Explain | None = None,
) -> str:
    """Run to the end; each line it says goes to `line`. Returns what `call` returned.

    Raises DevnsError with the last lines where it ends with another status than 0.
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
        for raw in [*whole, *([rest] if final and rest else [])]:
            text = raw.decode(errors="replace").rstrip()
            last.append(text)
            line(text)
        return False

    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    ear, mouth = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(ear, False)
    watch: dict[int, Callable[[], object]] = {ear: hear}
    try:
        with started(plan, call=call, stdio=(null, mouth, mouth), explain=explain) as running:
            os.close(mouth)
            mouth = -1
            status = running.wait(watch=watch)
            hear(final=True)
    finally:
        for fd in (null, ear, *([mouth] if mouth >= 0 else [])):
            os.close(fd)
    if status:
        said = "\n".join(f"  {text}" for text in last)
        raise DevnsError(f"a build step ended with status {status}:\n{said}")
    return running.result or ""
