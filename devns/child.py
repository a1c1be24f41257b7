"""child: what runs on the other side of the fork: child, init (PID 1 inside), and the payload.

The words and the messages are those of launch.py. Nothing here returns to its caller: each process ends in `guard`.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from devns import linux, ops, seccomp, terminal
from devns.errors import DevnsError

Plan = dict[str, Any]
Call = Callable[[], str]  # a payload that is a function: what it returns goes to the parent

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
PACKET = 1 << 16
_TEXT = 1 << 13  # characters of an error that travel
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


SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC)  # what a machine can be out of


class Errand:
    """What one launch is to do: the Plan, or `call` instead of its argv; whose streams; whether steps are told."""

    def __init__(
        self,
        plan: Plan,
        call: Call | None,
        stdio: Sequence[int],
        keep: Sequence[int],
        own_terminal: bool,
        traced: bool,
    ) -> None:
        self.plan = plan
        self.call = call
        self.stdio = stdio
        self.keep = keep  # descriptors that `call` uses
        self.own_terminal = own_terminal
        self.traced = traced
        self.umask = 0o022  # the caller's, given back to the payload
        self.parent = os.getpid()
        # What the caller ignores stays ignored, as nohup(1) wants it.
        self.ignored = [number for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]


# --- the messages -----------------------------------------------------------------------------------------------------


def receive(control: socket.socket) -> dict[str, Any] | None:
    try:
        data = control.recv(PACKET)
    except ConnectionResetError:
        return None
    return json.loads(data) if data else None


def guard(control: socket.socket, run: Callable[[], None]) -> NoReturn:
    """Whatever happens in a forked process: it is said to the parent, and the process ends here."""
    try:
        run()
    except StepFailed as failure:
        error = failure.error
        path = failure.path or error.filename
        path = os.fsdecode(path) if isinstance(path, (str, bytes)) else None
        tell(control, {"failed": {"op": failure.op, "errno": error.errno, "path": path}})
    except DevnsError as error:
        tell(control, {"refused": {"message": error.message, "hint": error.hint}})
    except OSError as error:
        tell(control, _shortage(error) or {"bug": _frames(error)})
    except BaseException as error:  # a bug of ours: its frames travel as text, nothing may unwind into the caller
        tell(control, {"bug": _frames(error)})
    os._exit(125)


def _shortage(error: OSError) -> dict[str, Any] | None:
    """The failure of no step in particular, where the machine has not enough of something: then it is no bug."""
    return {"failed": {"op": "launch", "errno": error.errno, "path": None}} if error.errno in SHORT else None


def tell(control: socket.socket, message: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the parent is gone: nobody is left to tell
        control.send(json.dumps(message).encode())


def _frames(error: BaseException) -> str:
    """A traceback by hand: the traceback module would import, and the import system is frozen."""
    lines, frame = [], error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        lines.append(f"  {code.co_filename}:{frame.tb_lineno} in {code.co_name}")
        frame = frame.tb_next
    return "\n".join([*lines, f"{type(error).__name__}: {error}"])[-_TEXT:]


class StepFailed(Exception):
    def __init__(self, op: str, error: OSError, path: str | None = None) -> None:
        super().__init__(op)
        self.op, self.error, self.path = op, error, path


@contextlib.contextmanager
def _step(op: str, path: str | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StepFailed(op, error, path) from None


def wait_for(pid: int) -> int:
    """Wait for a process of ours; its exit status, or 125 where the caller ignores SIGCHLD, which keeps it from us."""
    try:
        return exit_status(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return 125


def exit_status(code: int) -> int:
    """An exit status as a shell counts it. waitpid(2)"""
    if os.WIFSIGNALED(code):
        return 128 + os.WTERMSIG(code)
    return os.WEXITSTATUS(code)


# --- the child --------------------------------------------------------------------------------------------------------


def child(errand: Errand, control: socket.socket) -> None:
    """Unshare, be mapped, start init and wait for it."""
    plan = errand.plan
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    # What else the caller has open is a way back to the host, or a pipe whose end somebody waits for.
    linux.close_all_but([0, 1, 2, control.fileno(), *errand.stdio, *errand.keep])
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
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
    tell(control, {"unshared": True})
    if receive(control) is None:
        return
    if plan["clock"]:
        with _step("clock"), open("/proc/self/timens_offsets", "w") as offsets:
            offsets.write("".join(f"{name} {seconds} 0\n" for name, seconds in plan["clock"].items()))
    linux.prctl(linux.PR_SET_DUMPABLE, 0)  # from here on no other process may look into this one
    with _step("identity"):
        # As root inside, where there is one: only it may give the new root's files to others.
        if ids["map"] == "range" and _maps_root(ids["uid_map"]) and _maps_root(ids["gid_map"]):
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            linux.prctl(linux.PR_SET_DUMPABLE, 0)
    if "cgroup" in plan["namespaces"]:
        # After the parent has put this process in its cgroup: the other way round the environment would see the
        # host's tree as its root. cgroup_namespaces(7)
        with _step("unshare"):
            linux.unshare(linux.CLONE_NEWCGROUP)
    errand.umask = os.umask(0o022)
    # Opened now: when init pivots, the root of this process changes with it, and there need be no /dev in the new one.
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    with _step("fork"):
        pid = os.fork()
    if pid == 0:
        guard(control, lambda: _init(errand, control, null))
    # Whoever waits for the end of a pipe waits for this process too: it keeps none.
    _keep_only(null)
    linux.set_capabilities(())
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of credentials takes it away: prctl(2)
    if os.getppid() != errand.parent and "pid" in plan["namespaces"]:
        os.kill(pid, signal.SIGKILL)
    os._exit(exit_status(os.waitpid(pid, 0)[1]))


# --- init -------------------------------------------------------------------------------------------------------------


def _init(errand: Errand, control: socket.socket, null: int) -> None:
    plan = errand.plan
    _die_with_child(plan)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    _freeze_imports()
    programs = _programs(plan["confine"])
    _enter(plan["inside"], (lambda number: tell(control, {"step": number})) if errand.traced else None)
    _drop(plan, programs)
    slave = _open_terminal(control, errand.stdio) if errand.own_terminal else -1
    wake, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for number in (*FORWARDED, signal.SIGCHLD):
        signal.signal(number, lambda number, frame: None)
    result_read, result = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(result_read, False)
    with _step("fork"):
        pid = os.fork()
    if pid == 0:
        os.close(result_read)
        signal.set_wakeup_fd(-1)
        guard(control, lambda: _payload(errand, slave, result, null))
    os.close(result)
    _keep_only(null, control.fileno(), wake, wake_write, result_read, *([slave] if slave >= 0 else []))
    _supervise(pid, control, wake, result_read)


def _maps_root(rows: Sequence[Sequence[int]]) -> bool:
    return any(row[0] == 0 for row in rows)


def _die_with_child(plan: Plan) -> None:
    """As PID 1 init takes all with it, so it may be killed. Without a PID namespace it has to end the others first: it
    lives until it sees that the parent's socket is closed."""
    if "pid" in plan["namespaces"]:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)


def _freeze_imports() -> None:
    """From here on nothing is imported: after the pivot Python would look for modules in the new root, and run them."""
    sys.path.clear()
    sys.meta_path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()


def _enter(inside: Sequence[dict[str, Any]], trace: Callable[[int], None] | None) -> None:
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
    for number, (step, fds) in enumerate(zip(inside, opened, strict=True)):
        if trace:
            trace(number)
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
        if "groups" in ids:
            os.setgroups(ids["groups"])
        if ids["map"] == "range":
            os.setresgid(*[ids["gid"]] * 3)
            os.setresuid(*[ids["uid"]] * 3)
        linux.set_capabilities(limits["capabilities"])
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        _die_with_child(plan)
    if limits["scoped"]:
        with _step("landlock"):
            _scope(plan["namespaces"])
    with _step("seccomp"):
        for program in programs:
            linux.seccomp_set_filter(program)


def _scope(namespaces: Sequence[str]) -> None:
    """Where a namespace is the caller's, Landlock keeps what it would have kept, on kernels that can: the abstract
    sockets of the host's network, and signals to the caller's other processes."""
    scopes = 0 if "net" in namespaces else linux.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
    scopes |= 0 if "pid" in namespaces else linux.LANDLOCK_SCOPE_SIGNAL
    if scopes and linux.landlock_abi() >= 6:
        linux.landlock_scope(scopes)


def _open_terminal(control: socket.socket, stdio: Sequence[int]) -> int:
    """An own terminal in the devpts inside, init its session's leader; the master goes to the parent."""
    with _step("terminal"):
        pts = os.open("/dev/pts", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        master, slave = terminal.open_pty_at(pts)
        os.close(pts)
        terminal.imitate(stdio[0], slave)
        terminal.lead_session(slave)
        control.sendmsg([b"{}"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [master]))])
        os.close(master)
        return slave


def _keep_only(null: int, *fds: int) -> None:
    """Keep these; 0, 1 and 2 become `null`."""
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    linux.close_all_but([0, 1, 2, *fds])


def _supervise(payload: int, control: socket.socket, wake: int, result: int) -> NoReturn:
    """PID 1: reap whoever ends, pass signals on, tell the parent how the payload fares, and end with it."""
    poll = select.poll()
    for fd in (control.fileno(), wake, result):
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _event in poll.poll():
            if fd == control.fileno():
                message = receive(control)
                if message is None:  # the parent is gone, or gives up
                    _end_group(payload)
                    os._exit(125)
                _pass_on(payload, message["signal"])
            elif fd == result:
                if not _hand_on(result, control):
                    poll.unregister(result)
            else:
                for number in os.read(wake, 256):
                    if number == signal.SIGCHLD:
                        _reap(payload, control, result)
                    elif number in FORWARDED:
                        _pass_on(payload, number)


def _hand_on(result: int, control: socket.socket) -> bool:
    """What a function returned so far goes to the parent; false at its end."""
    try:
        while data := os.read(result, 1 << 13):  # at most six times that as JSON, which one packet holds
            tell(control, {"result": data.decode("latin-1")})
    except BlockingIOError:
        return True
    return False


def _pass_on(payload: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        # What a terminal says to all in its foreground goes to the group that the payload leads.
        if number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGINT, signal.SIGQUIT):
            os.killpg(payload, number)
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
            tell(control, {"stopped": os.WSTOPSIG(code)})
            continue
        _hand_on(result, control)
        tell(control, {"exit": exit_status(code)})
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
        select.poll().poll(5)  # milliseconds: to end takes them a moment


# --- the payload ------------------------------------------------------------------------------------------------------


def _payload(errand: Errand, slave: int, result: int, null: int) -> None:
    plan = errand.plan
    if slave >= 0:
        terminal.take_foreground(slave)
    else:
        os.setsid()
    sources = [slave if slave >= 0 and is_terminal(fd) else fd if _is_open(fd) else null for fd in errand.stdio]
    sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in sources]
    for number, fd in enumerate(sources):
        os.dup2(fd, number, inheritable=True)
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            with contextlib.suppress(OSError):
                signal.signal(number, signal.SIG_DFL)
    for number in errand.ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if "pid" not in plan["namespaces"]:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    with _step("cwd", plan["cwd"]):
        os.chdir(plan["cwd"])
        if not os.getcwd().startswith("/"):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), plan["cwd"])
    ops.apply_rlimits(plan["rlimits"])
    os.umask(errand.umask)
    if errand.call is not None:
        os.environ.clear()
        os.environ.update(plan["env"])
        linux.close_all_but([0, 1, 2, result, *errand.keep])
        answer = json.dumps(_answer(errand.call)).encode()
        while answer:
            answer = answer[os.write(result, answer) :]
        os._exit(0)
    linux.close_on_exec_from(3)
    _exec(plan["argv"], plan["env"])


def _answer(call: Call) -> dict[str, Any]:
    """What a function comes to: {"value"}, or an error as `guard` says it. The result's pipe is all it has left."""
    try:
        return {"value": call()}
    except DevnsError as error:
        return {"refused": {"message": error.message, "hint": error.hint}}
    except OSError as error:
        return _shortage(error) or {"bug": _frames(error)}
    except BaseException as error:
        return {"bug": _frames(error)}


def is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def _is_open(fd: int) -> bool:
    """The caller may have closed its own."""
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def _exec(argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """execvp(3): a name without a slash is looked for along the PATH inside."""
    name = argv[0]
    if not name:
        raise StepFailed("exec", OSError(errno.ENOENT, os.strerror(errno.ENOENT)), "''")
    places = (
        [name] if "/" in name else [f"{part or '.'}/{name}" for part in env.get("PATH", "/usr/bin:/bin").split(":")]
    )
    failure = OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    for path in places:
        try:
            os.execve(path, list(argv), env)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                failure = error
    raise StepFailed("exec", failure, name)
