"""launch: the interpreter of Plans, the only place that changes anything.

Three processes, always called so:

    parent                              child                          init (PID 1 inside)
      fork ───────────────────────────▶ unshare
           ◀──────────── unshared ─────
      write setgroups, uid_map, gid_map (or newuidmap)
      enter outside steps
           ────────────── go ─────────▶ clock, unshare cgroup
                                        fork ────────────────────────▶ new root, inside steps, pivot, drop
                                        wait for init                  fork ─▶ payload: exec
           ◀──────────── started, stopped, exit; or failed ────────────
           ────────────── signal ─────────────────────────────────────▶ kill the payload
      release outside steps in reverse, return the status

The parent is here, the other two and the payload in child.py. One socket pair carries the messages, JSON objects, one
a packet. Nobody outlives the one before: the kernel's death signal runs down the chain, and init ends when the socket
closes; with init the kernel ends everything in its PID namespace.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import select
import signal
import socket
import sys
import termios
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from devns import terminal
from devns.child import FORWARDED, PACKET, SHORT, Call, Errand, child, guard, is_terminal, receive, wait_for
from devns.errors import DevnsError, StepError, Unsupported

Plan = dict[str, Any]
Explain = Callable[[str, int, "str | None"], tuple[str, "str | None"]]

_PATIENCE = 3000  # milliseconds for init to end everything, before it is killed itself
_TAKEN = (*FORWARDED, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)
_BUNDLED = ("devns_mount", "devns_network", "devns_cgroup")  # whose effects may run


class Child:
    """What an outside step is given: `pid`, whose /proc/PID/ns/* are the new namespaces, and `note` for the user."""

    def __init__(self, pid: int, note: Callable[[str], None]) -> None:
        self.pid = pid
        self.note = note
        self.watched: dict[int, Callable[[], object]] = {}

    def watch(self, fd: int, callback: Callable[[], object]) -> None:
        """Call `callback`, once, when `fd` is readable or at its end while the payload runs."""
        self.watched[fd] = callback


class Running:
    """A launch that has begun; made by `started`."""

    def __init__(self, pid: int, control: socket.socket, trace: Callable[[int], None]) -> None:
        self.pid = pid  # the child's; 0 when it has been waited for
        self.status: int | None = None
        self.result: str | None = None  # what a payload that is a function returned
        self._control = control
        self._trace = trace
        self._master: int | None = None
        self._relay: terminal.Relay | None = None
        self._forwards = False
        self._ending = False
        self._said = ""  # what a payload that is a function returned so far
        self._children: list[Child] = []  # what outside steps were given

    def wait(self, *, watch: MutableMapping[int, Callable[[], object]] | None = None, forward: bool = True) -> int:
        """Wait for the end; returns the exit status as a shell counts it: 0-255, 128+n on a signal.

        Where there is an own terminal, the caller's is relayed to it meanwhile. `watch` are more descriptors and what
        to call when one is readable; a callback that sees an end removes its own. `forward` hands the caller's
        signals on, from the main thread only, for only there can Python take them.
        """
        self._forwards = forward
        callbacks = {} if watch is None else watch
        callbacks[self._control.fileno()] = self._hear
        for given in self._children:
            for fd, callback in given.watched.items():
                callbacks[fd] = _once(callbacks, fd, callback)
        with _signals(forward) as wake:
            if wake >= 0:
                callbacks[wake] = lambda: self._forward(wake)
            if self._master is None:
                with _kept_modes():
                    terminal.serve(None, callbacks)
            else:
                with terminal.Relay(self._master, stdin=0, stdout=1) as self._relay:
                    terminal.serve(self._relay, callbacks)
        status = self.collect()
        if self._said:
            answer = json.loads(self._said)
            self._take(answer)
            self.result = answer["value"]
        return status

    def signal(self, number: int) -> None:
        """Send a signal to the payload."""
        with contextlib.suppress(OSError):  # it has ended: as after kill(2) of a zombie, nothing happens
            self._control.send(json.dumps({"signal": number}).encode())

    def end(self) -> None:
        """Tell init to end everything inside. Harmless when it has ended; `wait` then returns 125."""
        self._ending = True
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def collect(self) -> int:
        """Wait for the child, and so for init and all that the kernel ends with its PID namespace."""
        if self.pid:
            if self._ending and not _ends_within(self.pid, _PATIENCE):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)  # stuck, in a mount of a dead server for example: init dies too
            code = wait_for(self.pid)
            self.pid = 0
            if self.status is None:  # init ended without a word: the kernel's OOM killer, or somebody's SIGKILL
                self.status = code
        return self.status or 0

    def lend(self, given: Child) -> None:
        """An outside step has been given this: what it watches is watched in `wait`."""
        self._children.append(given)

    def go(self, own_terminal: bool) -> None:
        """Let the child go on; with an own terminal, until init has opened it."""
        try:
            self._control.send(b'{"go": true}')
        except OSError:
            raise _Gone from None
        while own_terminal and self._master is None:
            data, ancillary, _flags, _address = self._control.recvmsg(PACKET, socket.CMSG_SPACE(4))
            if not data:
                raise _Gone
            self._take(json.loads(data))
            if ancillary:
                fds = array.array("i")
                fds.frombytes(ancillary[0][2])
                self._master = fds[0]
                os.set_inheritable(fds[0], False)

    def expect(self, key: str) -> None:
        """The next message must be this one."""
        message = receive(self._control)
        if message is None:
            raise _Gone
        self._take(message)
        if key not in message:
            raise RuntimeError(f"expected {key}, got {message}")

    def _hear(self) -> bool:
        """A message of init: true when it was the last."""
        message = receive(self._control)
        if message is None:
            return True
        self._take(message)
        return "exit" in message

    def _take(self, message: Mapping[str, Any]) -> None:
        if "failed" in message:
            raise _Failed(message["failed"])
        if "refused" in message:
            raise DevnsError(message["refused"]["message"], hint=message["refused"]["hint"])
        if "bug" in message:
            raise RuntimeError(f"in the new namespaces:\n{message['bug']}")
        if "step" in message:
            self._trace(message["step"])
        if "result" in message:
            self._said += message["result"]
        if "stopped" in message:
            self._suspend()
        if "exit" in message:
            self.status = message["exit"]

    def _forward(self, wake: int) -> bool:
        for number in os.read(wake, 64):
            if number not in _TAKEN:
                continue  # the caller's own: whatever has a handler in Python comes by here
            if number in (signal.SIGWINCH, signal.SIGCONT):
                if self._relay is not None:
                    self._relay.resume() if number == signal.SIGCONT else self._relay.resize()
            elif self.status is None:
                self.signal(signal.SIGSTOP if number == signal.SIGTSTP else number)
            elif number != signal.SIGTSTP:
                return True  # it has ended, and nobody reads the rest of what it said: the caller gives that up
        return False

    def _suspend(self) -> None:
        """The payload was stopped. Under a shell the parent stops too, as that expects, and then both go on; a program
        that only uses devns is never stopped by what it runs."""
        if self._relay is not None:
            self._relay.suspend()
        elif self._forwards and _has_terminal():
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            return
        self.signal(signal.SIGCONT)


def _once(callbacks: MutableMapping[int, Callable[[], object]], fd: int, callback: Callable[[], object]) -> Any:
    """A callback that removes its own, and ends nothing."""

    def called() -> None:
        callbacks.pop(fd, None)
        callback()

    return called


def _ends_within(pid: int, milliseconds: int) -> bool:
    """Does our child `pid` end in this time? It is not waited for. pidfd_open(2)"""
    try:
        fd = os.pidfd_open(pid)
    except OSError:  # gone already, or a kernel before 5.3, which has none
        return False
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(milliseconds))
    finally:
        os.close(fd)


class _Gone(Exception):
    """The child ended between two messages."""


class _Failed(Exception):
    """What the child could not do: {"op", "errno", "path"}."""


@contextlib.contextmanager
def _shortage(op: str = "launch") -> Iterator[None]:
    """Where the machine has not enough of something, that is the failure of `op`, and no bug."""
    try:
        yield
    except OSError as error:
        if error.errno not in SHORT:
            raise
        raise _Failed({"op": op, "errno": error.errno, "path": None}) from None


@contextlib.contextmanager
def started(
    plan: Plan,
    *,
    call: Call | None = None,
    stdio: Sequence[int] = (0, 1, 2),
    keep: Sequence[int] = (),
    note: Callable[[str], None] = lambda text: None,
    explain: Explain | None = None,
    trace: Callable[[str], None] | None = None,
    effects: Collection[str] = _BUNDLED,
) -> Iterator[Running]:
    """Launch `plan` and hold it: on leaving the context what still runs inside ends, and outside steps are released.

    `call` is run inside instead of the Plan's `argv`, with the descriptors `keep` and no others open. `stdio` are the
    descriptors the payload gets as 0, 1 and 2; where 0 and 1 are the caller's terminal it gets one of its own instead.
    `trace` is told each step as it runs. Outside steps are resolved only in the packages `effects`. Raises StepError
    naming the step that failed.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # or the fork would hold, and perhaps say, the same words once more
    tell_step = trace or (lambda text: None)
    errand = Errand(plan, call, stdio, keep, all(map(is_terminal, stdio[:2])), traced=trace is not None)
    with contextlib.ExitStack() as held:
        try:
            with _shortage():
                held.enter_context(_standard_streams())
                ours, theirs = map(held.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            with _shortage("fork"):
                pid = os.fork()
            if pid == 0:
                ours.close()
                guard(theirs, lambda: child(errand, theirs))
            theirs.close()
            running = Running(pid, ours, lambda number: tell_step(_line(plan["inside"][number])))
            held.callback(running.collect)
            held.callback(running.end)
            with _shortage():
                running.expect("unshared")
                tell_step(f"unshare {' '.join(plan['namespaces'])}")
                _write_maps(plan["identity"], pid)
                for step in plan["outside"]:
                    tell_step(_line(step))
                    running.lend(given := Child(pid, note))
                    held.enter_context(_effect(step["op"], effects)(step, given))
                # Once more, so that what runs inside has ended before what it stood on is released.
                held.callback(running.collect)
                held.callback(running.end)
                for text in plan["notes"]:
                    note(text)
                running.go(errand.own_terminal)
            yield running
        except _Failed as failure:
            raise _explained(failure.args[0], explain) from None
        except _Gone:
            running.end()
            status = running.collect()
            raise StepError("launch", errno.EPIPE, None, f"the child ended early, with status {status}") from None


def launch(plan: Plan, **options: Any) -> int:
    """Run `plan` to its end and return its exit status; the options are those of `started`."""
    with started(plan, **options) as running:
        return running.wait()


def _line(step: Mapping[str, Any]) -> str:
    return " ".join([step["op"], *(f"{key}={value}" for key, value in step.items() if key not in ("op", "text"))])


# --- the id maps: user_namespaces(7), newuidmap(1) --------------------------------------------------------------------


def _write_maps(ids: Mapping[str, Any], pid: int) -> None:
    if "newuidmap" in ids:
        for helper, which in (("newuidmap", "uid_map"), ("newgidmap", "gid_map")):
            _run_helper([ids[helper], str(pid), *(str(number) for row in ids[which] for number in row)])
        return
    # Without a privilege over the group ids, gid_map may be written only after setgroups(2) was given up: otherwise a
    # group that denies access could be dropped. user_namespaces(7)
    texts = {name: "\n".join(" ".join(map(str, row)) for row in ids[name]) for name in ("uid_map", "gid_map")}
    for name, text in {"setgroups": "deny" if ids["map"] == "single" else "allow", **texts}.items():
        try:
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise _Failed({"op": "uid_map", "errno": error.errno, "path": f"/proc/{pid}/{name}"}) from None


def _run_helper(argv: Sequence[str]) -> None:
    ear, mouth = os.pipe2(os.O_CLOEXEC)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, mouth, 2)]
        pid = os.posix_spawn(argv[0], list(argv), {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, file_actions=actions)
        os.close(mouth)
        words = os.read(ear, 1 << 12).decode(errors="replace").strip()
        status = wait_for(pid)
    finally:
        os.close(ear)
    if status:
        raise Unsupported(
            f"{argv[0]} refused the id map: {words or f'status {status}'}",
            hint='devns check; or set map = "single" in [user]',
        )


# --- outside steps ----------------------------------------------------------------------------------------------------


def _effect(name: str, packages: Collection[str]) -> Callable[..., contextlib.AbstractContextManager[Any]]:
    """The context manager that an outside step names, `module:function`."""
    module, _, function = name.partition(":")
    if module.partition(".")[0] not in packages:
        raise Unsupported(f"{name}: not an effect of an enabled plugin", hint="devns plugin list")
    import importlib

    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]  # the plugin's promise


# --- failures ---------------------------------------------------------------------------------------------------------


class ExecError(StepError):
    """The command could not be started: 127 where it is not there, 126 where it is and cannot run."""

    def __init__(self, number: int, path: str) -> None:
        missing = number == errno.ENOENT
        why = "command not found inside" if missing else f"cannot be run inside: {os.strerror(number).lower()}"
        super().__init__("exec", number, path, f"{path}: {why}")
        self.exit_code = 127 if missing else 126


def _explained(failure: Mapping[str, Any], explain: Explain | None) -> StepError:
    op, number, path = failure["op"], failure["errno"] or 0, failure["path"]
    if op == "exec":
        return ExecError(number, path)
    if explain is None:
        return StepError(op, number, path, f"{op}{f' {path}' if path else ''}: {os.strerror(number).lower()}")
    message, hint = explain(op, number, path)
    return StepError(op, number, path, message, hint=hint)


# --- the parent's signals ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _signals(forward: bool) -> Iterator[int]:
    """Signals come in at a descriptor while this holds: its number, or -1 where they cannot be taken."""
    with _shortage():
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        try:
            before = signal.set_wakeup_fd(write, warn_on_full_buffer=False) if forward else None
        except ValueError:  # not in the main thread
            before = None
        if before is None:
            yield -1
            return
        # What the caller ignores it goes on ignoring, as nohup(1) wants it.
        taken = [number for number in _TAKEN if signal.getsignal(number) is not signal.SIG_IGN]
        handlers = {number: signal.signal(number, lambda number, frame: None) for number in taken}
        try:
            yield read
        finally:
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            signal.set_wakeup_fd(before)
    finally:
        os.close(read)
        os.close(write)


@contextlib.contextmanager
def _standard_streams() -> Iterator[None]:
    """0, 1 and 2 are open while this holds: what is opened next must not be taken for the payload's streams."""
    opened = []
    try:
        while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
            opened.append(fd)
        os.close(fd)
        yield
    finally:
        for fd in opened:
            os.close(fd)


@contextlib.contextmanager
def _kept_modes() -> Iterator[None]:
    """The modes of the caller's terminal are as before afterwards, where the payload holds it as one of its streams."""
    saved = {fd: termios.tcgetattr(fd) for fd in (0, 1, 2) if is_terminal(fd)}
    try:
        yield
    finally:
        for fd, modes in saved.items():
            if terminal.in_foreground(fd):
                with contextlib.suppress(termios.error):
                    termios.tcsetattr(fd, termios.TCSANOW, modes)


def _has_terminal() -> bool:
    """Is there a controlling terminal, so that a shell may be waiting for us to stop?"""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
