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

One socket pair carries the messages, JSON objects, one a packet. Nobody outlives the one before: the kernel's death
signal runs down the chain, and init ends when the socket closes; with init the kernel ends everything in its PID
namespace.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from devns import linux, ops, seccomp, terminal
from devns.errors import DevnsError, StepError, Unsupported

Plan = dict[str, Any]
Call = Callable[[], str]  # a payload that is a function: what it returns goes to the parent
Explain = Callable[[str, int, "str | None"], tuple[str, "str | None"]]

_PACKET = 1 << 16
_SCRATCH = ("/tmp", "/mnt", "/run", "/media", "/srv", "/home")  # somewhere to mount on, out of everyone's sight
_FLAGS = {
    "mount": linux.CLONE_NEWNS,
    "pid": linux.CLONE_NEWPID,
    "uts": linux.CLONE_NEWUTS,
    "ipc": linux.CLONE_NEWIPC,
    "net": linux.CLONE_NEWNET,
    "time": linux.CLONE_NEWTIME,
    "user": linux.CLONE_NEWUSER,
}
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
EFFECTS = ("devns_mount", "devns_network", "devns_cgroup")  # the packages whose effects are ours


class Child:
    """What an outside step is given: `pid`, whose /proc/PID/ns/* are the new namespaces, and `note` for the user."""

    def __init__(self, pid: int, note: Callable[[str], None]) -> None:
        self.pid = pid
        self.note = note


class Running:
    """A launch that has begun. `wait` returns the exit status as a shell counts it: 0-255, 128+n on a signal."""

    def __init__(self, child: int, control: socket.socket, master: int | None) -> None:
        self.child = child
        self.status: int | None = None
        self.result: str | None = None  # what a payload that is a function returned
        self._control = control
        self._master = master

    def signal(self, number: int) -> None:
        """Send a signal to the payload."""
        with contextlib.suppress(OSError):  # it has ended: as after kill(2) of a zombie, nothing happens
            self._send({"signal": number})

    def wait(self) -> int:
        """Wait for the end, with the caller's terminal relayed where there is an own one, and signals forwarded.

        Signals are forwarded from the main thread only, for only there can Python take them.
        """
        wake, handlers = _take_signals()
        callbacks = {self._control.fileno(): self._hear, wake: lambda: self._forward(wake)}
        try:
            if self._master is None:
                _serve({fd: callback for fd, callback in callbacks.items() if fd >= 0})
            else:
                self._relay(callbacks)
        finally:
            _give_signals_back(handlers)
        return self._collect()

    def _relay(self, callbacks: dict[int, Callable[[], bool]]) -> None:
        assert self._master is not None
        with terminal.Relay(self._master, 0, 1) as relay:
            self.relay = relay
            terminal.serve(relay, {fd: callback for fd, callback in callbacks.items() if fd >= 0})

    def _hear(self) -> bool:
        """One message of init: true when it was the last."""
        message = _receive(self._control)
        if message is None:
            return True
        if "failed" in message:
            raise _Failed(message["failed"])
        if "bug" in message:
            raise RuntimeError(f"in the new namespaces:\n{message['bug']}")
        if "result" in message:
            self.result = (self.result or "") + message["result"]
        if "stopped" in message:
            self._suspend()
        if "exit" in message:
            self.status = message["exit"]
            return True
        return False

    def _forward(self, wake: int) -> bool:
        for number in os.read(wake, 64):
            if number == signal.SIGWINCH:
                if self._master is not None:
                    self.relay.resize()
            elif number == signal.SIGTSTP:
                self.signal(signal.SIGSTOP)
            else:
                self.signal(number)
        return False

    def _suspend(self) -> None:
        """The payload was stopped: so does the parent stop, as the shell that started it expects; then both go on."""
        if self._master is not None:
            self.relay.suspend()
        else:
            os.kill(os.getpid(), signal.SIGSTOP)
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """End everything inside, at once. Harmless when it has ended."""
        if self.child:
            self._control.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, signal.SIGKILL)

    def _collect(self) -> int:
        if self.status is None or self.child:
            code = _status(os.waitpid(self.child, 0)[1])
            self.child = 0
            if self.status is None:  # init ended without a word: the kernel's OOM killer, or somebody's SIGKILL
                self.status = code
        return self.status

    def _send(self, message: Mapping[str, Any]) -> None:
        self._control.send(json.dumps(message).encode())


class _Failed(Exception):
    """What the child could not do: `op`, `errno`, `path`."""


@contextlib.contextmanager
def started(
    plan: Plan,
    *,
    call: Call | None = None,
    stdio: Sequence[int] = (0, 1, 2),
    note: Callable[[str], None] = lambda text: None,
    explain: Explain | None = None,
) -> Iterator[Running]:
    """Launch `plan` and hold it: on leaving the context whatever still runs inside ends, and outside steps are released.

    `call` is run inside instead of the Plan's `argv`. `stdio` are the descriptors the payload gets as 0, 1 and 2; where
    0 and 1 are the caller's terminal it gets one of its own instead. Raises StepError naming the step that failed.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    with contextlib.ExitStack() as held:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        held.enter_context(ours)
        own_terminal = all(_is_terminal(fd) for fd in stdio[:2])
        pid = os.fork()
        if pid == 0:
            ours.close()
            _guard(theirs, lambda: _child(plan, theirs, call, stdio, own_terminal))
        theirs.close()
        running = Running(pid, ours, None)
        held.callback(_end, running)
        try:
            _expect(ours, "unshared", running)
            _write_maps(plan["identity"], pid)
            for step in plan["outside"]:
                held.enter_context(_effect(step["op"])(step, Child(pid, note)))
            for text in plan["notes"]:
                note(text)
            running._send({"go": True})
            if own_terminal:
                running._master = _receive_master(ours, running)
            yield running
        except _Failed as failure:
            raise _explained(failure.args[0], explain) from None
        except BrokenPipeError:  # the child died between two messages
            raise StepError("launch", errno.EPIPE, None, f"the child ended early: {running._collect()}") from None


def launch(plan: Plan, **options: Any) -> int:
    """Run `plan` to its end and return its exit status; the options are those of `started`."""
    with started(plan, **options) as running:
        return running.wait()


# --- the parent -------------------------------------------------------------------------------------------------------


def _end(running: Running) -> None:
    running.kill()
    if running.child:
        running._collect()


def _effect(name: str) -> Callable[[dict[str, Any], Child], contextlib.AbstractContextManager[Any]]:
    module, _, function = name.partition(":")
    if module.partition(".")[0] not in EFFECTS:
        raise Unsupported(f"{name}: not an effect of an enabled plugin", hint="devns plugin list")
    import importlib

    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def _write_maps(ids: Mapping[str, Any], pid: int) -> None:
    def rows(which: str) -> list[str]:
        return [" ".join(map(str, row)) for row in ids[which]]

    try:
        if "newuidmap" in ids:
            for helper, which in (("newuidmap", "uid_map"), ("newgidmap", "gid_map")):
                _run_helper([ids[helper], str(pid), *" ".join(rows(which)).split()])
            return
        # Without a privilege over the group ids, gid_map may be written only after setgroups(2) was given up:
        # otherwise a group that denies access could be dropped. user_namespaces(7)
        for name, text in (
            ("setgroups", "deny" if ids["map"] == "single" else "allow"),
            ("uid_map", "\n".join(rows("uid_map"))),
            ("gid_map", "\n".join(rows("gid_map"))),
        ):
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
    except OSError as error:
        raise _Failed({"op": "uid_map", "errno": error.errno, "path": error.filename}) from None


def _run_helper(argv: Sequence[str]) -> None:
    said, ear = os.pipe()
    try:
        actions = [(os.POSIX_SPAWN_DUP2, ear, 2)]
        pid = os.posix_spawn(argv[0], argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, file_actions=actions)
        os.close(ear)
        words = os.read(said, 1 << 12).decode(errors="replace").strip()
        status = _status(os.waitpid(pid, 0)[1])
    finally:
        os.close(said)
    if status:
        raise Unsupported(
            f"{argv[0]} refused the id map: {words or f'status {status}'}",
            hint='devns check --explain range; or set map = "single" in [user]',
        )


def _expect(control: socket.socket, key: str, running: Running) -> None:
    message = _receive(control)
    if message is None:
        raise BrokenPipeError
    if "failed" in message:
        raise _Failed(message["failed"])
    if "bug" in message:
        raise RuntimeError(f"in the new namespaces:\n{message['bug']}")
    if key not in message:
        raise RuntimeError(f"expected {key}, got {message}")


def _receive_master(control: socket.socket, running: Running) -> int:
    """The master of the own terminal, which init opened in the devpts inside."""
    data, ancillary, _flags, _address = control.recvmsg(_PACKET, socket.CMSG_SPACE(4))
    message = json.loads(data) if data else None
    if message is None:
        raise BrokenPipeError
    if "failed" in message:
        raise _Failed(message["failed"])
    if "bug" in message:
        raise RuntimeError(f"in the new namespaces:\n{message['bug']}")
    fds = array.array("i")
    fds.frombytes(ancillary[0][2])
    os.set_inheritable(fds[0], False)
    return fds[0]


def _explained(failure: Mapping[str, Any], explain: Explain | None) -> StepError:
    op, number, path = failure["op"], failure["errno"] or 0, failure["path"]
    if op == "exec":
        return _Exec(op, number, path, *_exec_sentence(number, path))
    if explain is not None:
        message, hint = explain(op, number, path)
        return StepError(op, number, path, message, hint=hint)
    where = f" {path}" if path else ""
    return StepError(op, number, path, f"{op}{where}: {os.strerror(number).lower()}")


class _Exec(StepError):
    """The command could not be started: 127 where it is not there, 126 where it is and cannot run."""

    def __init__(self, op: str, number: int, path: str, message: str) -> None:
        super().__init__(op, number, path, message)
        self.exit_code = 127 if number == errno.ENOENT else 126


def _exec_sentence(number: int, path: str) -> tuple[str]:
    if number == errno.ENOENT:
        return (f"{path}: command not found inside",)
    return (f"{path}: cannot be run inside: {os.strerror(number).lower()}",)


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def _take_signals() -> tuple[int, dict[int, Any]]:
    """Route signals to a descriptor; -1 in a thread where that cannot be."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        old = {-1: signal.set_wakeup_fd(write, warn_on_full_buffer=False)}
    except ValueError:
        os.close(read)
        os.close(write)
        return -1, {}
    old |= {-2: read, -3: write}
    for number in (*FORWARDED, signal.SIGWINCH, signal.SIGTSTP):
        old[number] = signal.signal(number, lambda number, frame: None)
    return read, old


def _give_signals_back(old: dict[int, Any]) -> None:
    if old:
        for number, handler in old.items():
            if number > 0:
                signal.signal(number, handler)
        signal.set_wakeup_fd(old[-1])
        os.close(old[-2])
        os.close(old[-3])


def _serve(callbacks: Mapping[int, Callable[[], bool]]) -> None:
    """Call back for each readable descriptor until one of them says that it was the last."""
    poll = select.poll()
    for fd in callbacks:
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _event in poll.poll():
            if callbacks[fd]():
                return


# --- the messages -----------------------------------------------------------------------------------------------------


def _receive(control: socket.socket) -> dict[str, Any] | None:
    try:
        data = control.recv(_PACKET)
    except ConnectionResetError:
        return None
    return json.loads(data) if data else None


def _guard(control: socket.socket, run: Callable[[], None]) -> NoReturn:
    """Whatever happens in a forked process: it is said to the parent, and the process ends here."""
    op = "launch"
    try:
        run()
    except _StepFailed as failure:
        error = failure.error
        path = failure.path or error.filename
        path = os.fsdecode(path) if isinstance(path, (str, bytes)) else None
        _tell(control, {"failed": {"op": failure.op, "errno": error.errno, "path": path}})
    except OSError as error:
        _tell(control, {"failed": {"op": op, "errno": error.errno, "path": None}})
    except BaseException as error:  # a bug of ours: its frames travel as text, nothing may unwind into the caller
        _tell(control, {"bug": _frames(error)})
    os._exit(125)


def _tell(control: socket.socket, message: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the parent is gone: nobody is left to tell
        control.send(json.dumps(message).encode())


def _frames(error: BaseException) -> str:
    """A traceback by hand: the traceback module would import, and the import system is frozen."""
    lines, frame = [], error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        lines.append(f"  {code.co_filename}:{frame.tb_lineno} in {code.co_name}")
        frame = frame.tb_next
    return "\n".join([*lines, f"{type(error).__name__}: {error}"])


class _StepFailed(Exception):
    def __init__(self, op: str, error: OSError, path: str | None = None) -> None:
        super().__init__(op)
        self.op, self.error, self.path = op, error, path


@contextlib.contextmanager
def _step(op: str, path: str | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _StepFailed(op, error, path) from None


def _status(code: int) -> int:
    """An exit status as a shell counts it. waitpid(2)"""
    if os.WIFSIGNALED(code):
        return 128 + os.WTERMSIG(code)
    return os.WEXITSTATUS(code)


# --- the child --------------------------------------------------------------------------------------------------------


def _child(plan: Plan, control: socket.socket, call: Call | None, stdio: Sequence[int], own_terminal: bool) -> None:
    parent = os.getppid()
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    # An own session: the terminal's Ctrl-C reaches the parent alone, which forwards it once.
    os.setsid()
    for number in (*FORWARDED, signal.SIGTSTP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    ids = plan["identity"]
    with _step("unshare"):
        flags = 0
        for name in plan["namespaces"]:
            flags |= _FLAGS.get(name, 0)
        linux.unshare(flags)
    _tell(control, {"unshared": True})
    if _receive(control) is None:
        return
    if plan["clock"]:
        with _step("clock"), open("/proc/self/timens_offsets", "w") as offsets:
            offsets.write("".join(f"{name} {seconds} 0\n" for name, seconds in plan["clock"].items()))
    linux.prctl(linux.PR_SET_DUMPABLE, 0)  # from here on no other process may look into this one
    with _step("identity"):
        if ids["map"] == "range":
            os.setresgid(*[ids["gid_map"][0][0]] * 3)
            os.setresuid(*[ids["uid_map"][0][0]] * 3)
            linux.prctl(linux.PR_SET_DUMPABLE, 0)
    if "cgroup" in plan["namespaces"]:
        # After the parent has put this process in its cgroup: the other way round the environment would see the
        # host's tree as its root. cgroup_namespaces(7)
        with _step("unshare"):
            linux.unshare(linux.CLONE_NEWCGROUP)
    mask = os.umask(0o022)
    pid = os.fork()
    if pid == 0:
        _guard(control, lambda: _init(plan, control, call, stdio, own_terminal, mask))
    control.close()
    linux.set_capabilities(())
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of credentials takes it away: prctl(2)
    if os.getppid() != parent:
        os.kill(pid, signal.SIGKILL)
    os._exit(_status(os.waitpid(pid, 0)[1]))


# --- init -------------------------------------------------------------------------------------------------------------


def _init(
    plan: Plan, control: socket.socket, call: Call | None, stdio: Sequence[int], own_terminal: bool, mask: int
) -> None:
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    _freeze_imports()
    programs = _programs(plan["confine"])
    _enter(plan["inside"])
    _drop(plan, programs)
    slave = _open_terminal(control) if own_terminal else -1
    wake, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for number in (*FORWARDED, signal.SIGCHLD):
        signal.signal(number, lambda number, frame: None)
    result_read, result = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(result_read)
        signal.set_wakeup_fd(-1)
        _guard(control, lambda: _payload(plan, call, stdio, slave, result, mask))
    os.close(result)
    if slave >= 0:
        os.close(slave)
    _keep_only(control.fileno(), wake, wake_write, result_read)
    _supervise(pid, control, wake, result_read)


def _freeze_imports() -> None:
    """From here on nothing is imported: after the pivot Python would look for modules in the new root, and run them."""
    sys.path.clear()
    sys.meta_path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()


def _enter(inside: Sequence[dict[str, Any]]) -> None:
    """Build the new root of the inside steps and make it the root."""
    opened: list[ops.Opened] = []
    for step in inside:
        opener = ops.OPENS.get(step["op"])
        with _step(step["op"], step.get("src") or step.get("dst")):
            opened.append(opener(step) if opener else [])
    pivots = bool(inside) and inside[0].get("dst") == "/"
    with _step("scratch"):
        root = ops.NewRoot(_mount_scratch())
        if not pivots:
            root.fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for step, fds in zip(inside, opened, strict=True):
        with _step(step["op"], step.get("dst")):
            ops.APPLIES[step["op"]](step, root, fds)
    for mount_fd in root.readonly:
        with _step("readonly"):
            linux.mount_setattr(mount_fd, linux.MOUNT_ATTR_RDONLY, recursive=False)
    with _step("pivot_root"):
        if pivots:
            os.fchdir(root.fd)
            linux.pivot_root(".", ".")
        else:
            os.chdir("/")
            linux.umount2(root.scratch, linux.MNT_DETACH)
            return
        linux.umount2(".", linux.MNT_DETACH)
        os.chdir("/")


def _programs(limits: Mapping[str, Any]) -> list[bytes]:
    options = {"nested": limits["nested"], "setuid_bits": limits["setuid_bits"]}
    return seccomp.program(limits["seccomp"], os.uname().machine, **options)


def _mount_scratch() -> str:
    for path in _SCRATCH:
        try:
            linux.mount("devns", path, "tmpfs", 0, "mode=755")
        except FileNotFoundError:
            continue
        return path
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), _SCRATCH[0])


def _drop(plan: Plan, programs: Sequence[bytes]) -> None:
    """Become who the payload is, with no more than it needs. Nothing is taken back after this."""
    ids, limits = plan["identity"], plan["confine"]
    with _step("capabilities"):
        linux.drop_bounding(limits["capabilities"])
        if ids["map"] == "range":
            os.setresgid(*[ids["gid"]] * 3)
            os.setresuid(*[ids["uid"]] * 3)
        linux.set_capabilities(limits["capabilities"])
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    with _step("seccomp"):
        for program in programs:
            linux.seccomp_set_filter(program)


def _open_terminal(control: socket.socket) -> int:
    with _step("terminal"):
        pts = os.open("/dev/pts", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        master, slave = terminal.open_pty_at(pts)
        os.close(pts)
        control.sendmsg([b"{}"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [master]))])
        os.close(master)
        return slave


def _keep_only(*fds: int) -> None:
    """Close what the caller left open: a descriptor of the host is a way back to it."""
    low = 3
    for fd in sorted(fds):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def _supervise(payload: int, control: socket.socket, wake: int, result: int) -> NoReturn:
    """PID 1: reap whoever ends, pass signals on, tell the parent how the payload fares, and end with it."""
    poll = select.poll()
    for fd in (control.fileno(), wake, result):
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _event in poll.poll():
            if fd == control.fileno():
                message = _receive(control)
                if message is None:  # the parent is gone
                    os._exit(125)
                _pass_on(payload, message["signal"])
            elif fd == result:
                data = os.read(result, 1 << 14)
                if not data:
                    poll.unregister(result)
                else:
                    _tell(control, {"result": data.decode("latin-1")})
            else:
                for number in os.read(wake, 256):
                    if number == signal.SIGCHLD:
                        _reap(payload, control, result)
                    else:
                        _pass_on(payload, number)


def _pass_on(payload: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        if number in (signal.SIGSTOP, signal.SIGCONT):
            os.killpg(payload, number)  # the payload leads a process group of its own
        else:
            os.kill(payload, number)


def _reap(payload: int, control: socket.socket, result: int) -> None:
    while True:
        try:
            pid, code = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid != payload:
            continue
        if os.WIFSTOPPED(code):
            _tell(control, {"stopped": os.WSTOPSIG(code)})
            continue
        while data := os.read(result, 1 << 14):
            _tell(control, {"result": data.decode("latin-1")})
        _tell(control, {"exit": _status(code)})
        _end_group(payload)
        os._exit(0)


def _end_group(payload: int) -> None:
    """Without a PID namespace the kernel does not end what is left: end the payload's group and what came to us."""
    if os.getpid() == 1:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(payload, signal.SIGKILL)
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as listing:
                left = [int(word) for word in listing.read().split()]
        except OSError:
            return
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


# --- the payload ------------------------------------------------------------------------------------------------------


def _payload(
    plan: Plan, call: Call | None, stdio: Sequence[int], slave: int, result: int, mask: int
) -> None:
    os.setsid()
    sources = [slave if slave >= 0 and _is_terminal(fd) else _or_null(fd) for fd in stdio]
    sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in sources]
    for number, fd in enumerate(sources):
        os.dup2(fd, number, inheritable=True)
    if slave >= 0:
        terminal.make_controlling(0)
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            with contextlib.suppress(OSError):
                signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with _step("cwd", plan["cwd"]):
        os.chdir(plan["cwd"])
        if not os.getcwd().startswith("/"):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), plan["cwd"])
    ops.apply_rlimits(plan["rlimits"])
    os.umask(mask)
    if call is not None:
        os.environ.clear()
        os.environ.update(plan["env"])
        answer = call().encode()
        while answer:
            answer = answer[os.write(result, answer) :]
        os._exit(0)
    linux.close_on_exec_from(3)
    _exec(plan["argv"], plan["env"])


def _or_null(fd: int) -> int:
    """`fd`, or /dev/null where the caller had closed it."""
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    return fd


def _exec(argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """execvp(3): a name without a slash is looked for along the PATH inside."""
    name = argv[0]
    places = [name] if "/" in name else [f"{part or '.'}/{name}" for part in env.get("PATH", "/usr/bin:/bin").split(":")]
    failure = OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    for path in places:
        try:
            os.execve(path, argv, env)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                failure = error
    raise _StepFailed("exec", failure, name)


__all__ = ["Child", "DevnsError", "Running", "launch", "started"]
