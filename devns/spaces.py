"""spaces: a Python function, or a command, in fresh namespaces over the host's own files. For programs.

devns.namespaces(pid=True, hostname="box").call(socket.gethostname)  # "box"
"""

from __future__ import annotations

import ast
import builtins
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from devns import accounts, linux, workflow
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

    def run(self, argv: Sequence[str | os.PathLike[str]]) -> int:
        """Run a command in them, with this process' own standard streams; its exit status, 128+n on a signal."""
        plan = self._plan | {"argv": checked_command(argv)}
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
    spec = Spec("namespaces", "namespaces", user=who)
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
        "identity": identity(spec, host, accounts.find(spec, host, inside)),
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


def checked_command(argv: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The words of a command, as a list. TypeError and ValueError for what can be none, as subprocess.run has it."""
    if isinstance(argv, (str, bytes)):
        raise TypeError(f"argv: a list of strings, not {argv!r}: no shell is put in between")
    words = [os.fspath(word) for word in argv]
    for word in words:
        if not isinstance(word, str):
            raise TypeError(f"argv: strings, not {word!r}")
        if "\0" in word:
            raise ValueError(f"argv: a NUL in {word!r}")
    if not words:
        raise ValueError("argv: no command")
    return words


def run_call(
    plan: Plan,
    function: Callable[..., Value],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    host: Host,
    **options: Any,
) -> Value:
    """Launch `plan` with `function` for its payload; `options` are those of `launch.started`."""

    def call() -> str:
        try:
            return _literal("value", function(*args, **kwargs))
        except BaseException as error:  # it travels to the caller, whatever it is
            name = type(error).__name__
            kind = "built-in" if getattr(builtins, name, None) is type(error) else "other"
            try:
                return _literal(kind, (name, _arguments(error), str(error)))
            except TypeError:
                return _literal(kind, (name, (str(error),), str(error)))

    with started(plan, call=call, **{"explain": workflow.explain(host), **options}) as running:
        status = running.wait()
    name = getattr(function, "__name__", function)
    if running.result is None or status:
        raise CallError(f"{name}: ended inside with status {status}")
    try:
        kind, value = ast.literal_eval(running.result)
        if kind == "value":
            return value  # type: ignore[no-any-return]  # what the function returned, literally
        raised, arguments, text = value
    except _UNREADABLE:
        raise CallError(f"{name}: what came back is no value") from None
    raise _raised(raised, arguments, text) if kind == "built-in" else CallError(f"{raised}: {text}")


_UNREADABLE = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)  # what ast.literal_eval raises


def _arguments(error: BaseException) -> tuple[Any, ...]:
    if isinstance(error, OSError) and error.filename is not None and len(error.args) == 2:
        return (*error.args, error.filename, *([None, error.filename2] if error.filename2 is not None else []))
    return error.args


def _raised(name: str, arguments: Sequence[Any], text: str) -> Exception:
    """The built-in exception again, or the text of it where it is none that can be made of these."""
    known = getattr(builtins, name, None)
    if isinstance(known, type) and issubclass(known, Exception):
        with suppress(Exception):
            return known(*arguments)
    return CallError(f"{name}: {text}")


def _literal(kind: str, value: Any) -> str:
    """`value` as text that the parent will read as the same value; TypeError where there is no such text."""
    with suppress(*_UNREADABLE):  # infinite, or too deep: the text of it is none that can be read
        if _is_literal(value):
            text = ascii((kind, value))
            ast.literal_eval(text)
            return text
    raise TypeError(f"{type(value).__name__} is not a literal: only plain values come back from inside")


def _is_literal(value: Any) -> bool:
    if type(value) in (tuple, list, set):
        return all(map(_is_literal, value))
    if type(value) is dict:
        return all(_is_literal(key) and _is_literal(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, complex, str, bytes)
