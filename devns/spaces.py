"""spaces: a Python function, or a command, in fresh namespaces over the host's own files. For programs.

devns.namespaces(pid=True, hostname="box").call(socket.gethostname)  # "box"
"""

from __future__ import annotations

import ast
import builtins
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from devns import linux, workflow
from devns.errors import DevnsError
from devns.host import Host
from devns.identity import identity
from devns.launch import Plan, launch, started
from devns.ops import hostname as hostname_step
from devns.ops import loopback, proc
from devns.plan import SCHEMA
from devns.spec import Spec, User

Value = TypeVar("Value")


class CallError(DevnsError):
    """A function raised inside, and what it raised is no built-in exception: the text of it."""


class Namespaces:
    """Which namespaces, and who to be in them; made by `devns.namespaces`."""

    def __init__(self, plan: Plan, host: Host) -> None:
        self._plan = plan
        self._host = host

    def plan(self) -> Plan:
        """The document that `call` and `run` launch, as `devns plan --json` prints one."""
        return self._plan

    def call(self, function: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        """`function(*args, **kwargs)` in a forked process in fresh namespaces, and its value.

        The value travels as a Python literal: None, bool, int, float, complex, str, bytes, and tuples, lists, dicts
        and sets of these, so nothing that came from inside is ever run. A built-in exception is raised here
        again, another one as CallError. Modules the function needs must have been imported before.
        """
        return run_call(self._plan, function, args, kwargs, self._host)

    def run(self, argv: Sequence[str]) -> int:
        """Run a command in them, with this process' own standard streams; its exit status, 128+n on a signal."""
        plan = self._plan | {"argv": list(argv)}
        return launch(plan, explain=workflow.explain(self._host))


def namespaces(
    *,
    user: bool = True,
    pid: bool = False,
    uts: bool = False,
    ipc: bool = False,
    net: bool = False,
    cgroup: bool = False,
    time: Mapping[str, int] | None = None,
    hostname: str | None = None,
    root: bool = False,
    uid_map: Sequence[tuple[int, int, int]] = (),
    gid_map: Sequence[tuple[int, int, int]] = (),
) -> Namespaces:
    """Fresh namespaces around the host's own root file system.

    `user` and a mount namespace are always there: without a user namespace an ordinary user can make no other.
    `hostname` implies `uts`; `time` is {"boottime": seconds, "monotonic": seconds}. With `root` the function is uid 0
    there, with every capability over its own namespaces. Rows of the maps are (inside, outside, count).
    """
    if not user:
        raise ValueError("user=False: only a user namespace lets an ordinary user make the others")
    host = Host.probe()
    who = User(identity="root" if root else "self", uid_map=tuple(uid_map), gid_map=tuple(gid_map))
    asked = {"pid": pid, "uts": uts or hostname is not None, "ipc": ipc, "net": net, "cgroup": cgroup}
    names = [name for name, wanted in asked.items() if wanted]
    inside = [proc(masked=False)] if pid else []
    inside += [hostname_step(hostname)] if hostname is not None else []
    inside += [loopback()] if net else []
    plan: Plan = {
        "schema": SCHEMA,
        "name": "namespaces",
        "argv": [],
        "cwd": os.getcwd(),
        "env": dict(os.environ),
        "identity": identity(Spec("namespaces", "namespaces", user=who), host),
        "namespaces": sorted({"user", "mount", *names, *(["time"] if time else [])}),
        "clock": {"boottime": 0, "monotonic": 0, **time} if time else None,
        # The function is the caller's own: it keeps every power it has over its own namespaces, as after unshare(1).
        "confine": {
            "capabilities": list(linux.CAPABILITIES) if root else [],
            "seccomp": [],
            "nested": True,
            "setuid_bits": True,
            "scoped": False,
        },
        "rlimits": {},
        "inside": inside,
        "outside": [],
        "notes": [],
    }
    return Namespaces(plan, host)


def run_call(
    plan: Plan, function: Callable[..., Value], args: Sequence[Any], kwargs: Mapping[str, Any], host: Host
) -> Value:
    """Launch `plan` with `function` for its payload."""

    def call() -> str:
        try:
            return repr(("value", _literal(function(*args, **kwargs))))
        except BaseException as error:  # it travels to the caller, whatever it is
            arguments = error.args if _is_literal(error.args) else (str(error),)
            return repr(("raised", type(error).__name__, arguments, str(error)))

    with started(plan, call=call, explain=workflow.explain(host)) as running:
        status = running.wait()
    if running.result is None or status:
        raise CallError(f"{getattr(function, '__name__', function)}: ended inside with status {status}")
    kind, *rest = ast.literal_eval(running.result)
    if kind == "value":
        return rest[0]  # type: ignore[no-any-return]  # what the function returned, literally
    name, arguments, text = rest
    known = getattr(builtins, name, None)
    if isinstance(known, type) and issubclass(known, Exception):
        raise known(*arguments)
    raise CallError(f"{name}: {text}")


def _literal(value: Any) -> Any:
    if not _is_literal(value):
        raise TypeError(f"{type(value).__name__} is not a literal: only plain values come back from inside")
    return value


def _is_literal(value: Any) -> bool:
    if type(value) in (tuple, list, set):
        return all(map(_is_literal, value))
    if type(value) is dict:
        return all(_is_literal(key) and _is_literal(item) for key, item in value.items())
    if type(value) is float:
        return value == value and abs(value) != float("inf")
    return value is None or type(value) in (bool, int, complex, str, bytes)
