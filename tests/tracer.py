"""tracer: a command with all that it starts, disturbed at one system call that changes something, by ptrace(2).

strace(1) can do that to one process. Of a tree it counts the calls of each process for itself and disturbs all of
them, so that most points of a tree cannot be met alone. Here a point is one call of one process, and is met alone.

Whoever is traced may gain no privileges: newuidmap(1) and other set-user-ID programs fail.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from devns import linux

MACHINE = "x86_64"  # the only one whose numbers and registers are known here
_ARCH = 0xC000003E  # linux/audit.h

# asm/unistd_64.h. What makes, changes or takes away files, mounts and namespaces.
NUMBERS = {
    "write": 1, "open": 2, "pwrite64": 18, "writev": 20, "flock": 73, "fsync": 74, "fdatasync": 75, "truncate": 76,
    "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88,
    "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "mknod": 133, "pivot_root": 155, "mount": 165,
    "umount2": 166, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "openat": 257, "mkdirat": 258, "mknodat": 259,
    "fchownat": 260, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266, "fchmodat": 268,
    "unshare": 272, "utimensat": 280, "fallocate": 285, "syncfs": 306, "renameat2": 316, "copy_file_range": 326,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "mount_setattr": 442,
}  # fmt: skip
_NAMES = {number: name for name, number in NUMBERS.items()}
_FLAGS = {"open": 1, "openat": 2}  # which argument holds the flags: without these two nothing is made or emptied
_MAKES = os.O_CREAT | os.O_TRUNC

# linux/ptrace.h
_CONT, _GETREGS, _SETREGS, _SEIZE, _GETEVENTMSG, _LISTEN = 7, 12, 13, 0x4206, 0x4201, 0x4208
_FORK, _VFORK, _CLONE, _EXEC, _SECCOMP, _STOP = 1, 2, 3, 4, 7, 128
_OPTIONS = 1 << _FORK | 1 << _VFORK | 1 << _CLONE | 1 << _EXEC | 1 << _SECCOMP | 1 << 20  # the last: PTRACE_O_EXITKILL
_RAX, _ORIG_RAX = 10, 15  # sys/user.h: struct user_regs_struct, by its words
_WALL = 0x4000_0000  # __WALL, wait(2)

KILL = "the process is killed"
KILL_ALL = "all processes are killed"
PATIENCE = 120  # seconds, after which whoever still runs has hung

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


class Point(NamedTuple):
    """The `number`-th call of its kind in the `process`-th process that was started; counted from 1, and 0 is the
    command itself."""

    process: int
    call: str
    number: int


class Fault(NamedTuple):
    """What happens at a point: KILL, KILL_ALL, the name of the error that the call returns, undone, or the names of
    signals, which the command gets one after the other, each where it comes to the next point itself.

    Without a point it happens at every call of the kinds in `calls`.
    """

    what: str
    point: Point | None = None
    calls: tuple[str, ...] = ()

    def meets(self, point: Point) -> bool:
        return point == self.point if self.point else point.call in self.calls


@dataclass(frozen=True)
class Outcome:
    """How the command ended (negative: by a signal), what it said, which points it passed, and which of these met the
    fault. `hung` is how many processes were left when patience was over."""

    status: int
    out: str
    err: str
    points: list[Point]
    met: list[Point]
    hung: int


class Traced:
    """A command that runs under the tracer, which is a process of its own: several can run at once."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str,
        fault: Fault | None = None,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        """`prepare` is called in the command's process first."""
        self._said = [os.memfd_create(name) for name in ("stdout", "stderr")]
        self._report, report = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.setsid()
                found = _trace(argv, dict(env), cwd, self._said, fault, prepare)
                with open(report, "w") as file:
                    json.dump(found, file)
                status = 0
            finally:
                os._exit(status)
        os.close(report)

    def wait(self) -> Outcome:
        with open(self._report) as file:
            report = file.read()
        os.waitpid(self.pid, 0)
        said = []
        for fd in self._said:
            with open(fd, "rb") as file:
                file.seek(0)
                said.append(file.read().decode(errors="replace"))
        found: dict[str, Any] = json.loads(report)
        points = {name: [Point(*point) for point in found[name]] for name in ("points", "met")}
        return Outcome(found["status"], said[0], said[1], points["points"], points["met"], found["hung"])


def works() -> str | None:
    """Why nothing can be traced here; None where it can."""
    if os.uname().machine != MACHINE:
        return f"the tracer knows the registers of {MACHINE} alone"
    try:
        found = Traced(["/bin/true"], env={}, cwd="/").wait()
    except ValueError:  # no report: ptrace(2) was refused
        return "processes may not be traced here: ptrace(2)"
    return None if found.status == 0 else f"/bin/true ended with {found.status} when it was traced"


# --- the tracer's own process -----------------------------------------------------------------------------------------


def _trace(
    argv: Sequence[str],
    env: dict[str, str],
    cwd: str,
    said: Sequence[int],
    fault: Fault | None,
    prepare: Callable[[], object],
) -> dict[str, Any]:
    waits, go = os.pipe()
    first = os.fork()
    if first == 0:
        try:
            os.close(go)
            os.read(waits, 1)
            null = os.open("/dev/null", os.O_RDONLY)
            for number, fd in enumerate((null, *said)):
                os.dup2(fd, number)
            os.chdir(cwd)
            linux.close_all_but((0, 1, 2))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            prepare()
            linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
            linux.seccomp_set_filter(_program())
            os.execve(argv[0], list(argv), env)
        finally:
            os._exit(127)
    _ptrace(_SEIZE, first, 0, _OPTIONS)
    os.write(go, b"x")
    return _Tracer(first, fault).run()


class _Tracer:
    def __init__(self, first: int, fault: Fault | None) -> None:
        self.first = first
        self.fault = fault
        self.status = 0
        self.order = {first: 0}  # pid -> which process that is
        self.alive = {first}
        self.early: set[int] = set()  # stopped before the fork that made it was told
        self.seen: dict[tuple[int, str], int] = {}
        self.points: list[Point] = []
        self.met: list[Point] = []
        self.hung = 0
        self.signals: list[str] = []  # still to be sent

    def run(self) -> dict[str, Any]:
        signal.signal(signal.SIGALRM, lambda number, frame: self._give_up())
        signal.alarm(PATIENCE)
        while self.alive or self.early:
            try:
                pid, status = os.waitpid(-1, _WALL)
            except ChildProcessError:
                break
            if not os.WIFSTOPPED(status):
                self.alive.discard(pid)
                self.early.discard(pid)
                if pid == self.first:
                    self.status = os.waitstatus_to_exitcode(status)
                continue
            with suppress(ProcessLookupError):  # killed meanwhile: its end is told next
                self._stopped(pid, status)
        return {"status": self.status, "points": self.points, "met": self.met, "hung": self.hung}

    def _stopped(self, pid: int, status: int) -> None:
        event, number = status >> 16, os.WSTOPSIG(status)
        if pid not in self.order:
            self.early.add(pid)
        elif event == _SECCOMP:
            self._call(pid)
        elif event in (_FORK, _VFORK, _CLONE):
            self._born(_message(pid))
            _ptrace(_CONT, pid)
        elif event == _STOP and number in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            _ptrace(_LISTEN, pid)
            os.kill(pid, signal.SIGCONT)  # as by fg, or nothing would ever go on
        else:
            _ptrace(_CONT, pid, 0, 0 if event else number)

    def _born(self, pid: int) -> None:
        self.order[pid] = len(self.order)
        self.alive.add(pid)
        if pid in self.early:
            self.early.discard(pid)
            with suppress(ProcessLookupError):
                _ptrace(_CONT, pid)

    def _call(self, pid: int) -> None:
        """A process is about to make a call that changes something."""
        process, call = self.order[pid], _NAMES[_message(pid)]
        number = self.seen[process, call] = self.seen.get((process, call), 0) + 1
        point = Point(process, call, number)
        self.points.append(point)
        if self.signals and process == 0:
            os.kill(self.first, getattr(signal, self.signals.pop(0)))
        if self.fault and self.fault.meets(point):
            self.met.append(point)
            if self.fault.what.startswith("SIG"):
                self.signals = self.fault.what.split()
                os.kill(self.first, getattr(signal, self.signals.pop(0)))
            elif self.fault.what in (KILL, KILL_ALL):
                for victim in [pid] if self.fault.what == KILL else self.alive:
                    with suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
                return
            else:
                _fail(pid, getattr(errno, self.fault.what))
        _ptrace(_CONT, pid)

    def _give_up(self) -> None:
        self.hung = len(self.alive)
        for pid in self.alive | self.early:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _program() -> bytes:
    """A seccomp filter that stops the caller before each of the calls, told which by its number. seccomp(2)"""

    def trace(number: int) -> tuple[int, int, int, int]:
        return 0x06, 0, 0, 0x7FF0_0000 | number  # SECCOMP_RET_TRACE

    allow = (0x06, 0, 0, 0x7FFF_0000)
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, _ARCH), allow, (0x20, 0, 0, 0)]  # of another ABI nothing is seen
    for name, number in NUMBERS.items():
        if name == "write":  # of one byte: Python's signal handler wakes a poll(2) by it, and no disk can refuse that
            size = [(0x20, 0, 0, 16 + 8 * 2), (0x15, 0, 1, 1), allow, trace(number)]
            code += [(0x15, 0, len(size), number), *size]
        elif name in _FLAGS:
            flags = [(0x20, 0, 0, 16 + 8 * _FLAGS[name]), (0x45, 0, 1, _MAKES), trace(number), allow]
            code += [(0x15, 0, len(flags), number), *flags]
        else:
            code += [(0x15, 0, 1, number), trace(number)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in [*code, allow])


def _ptrace(request: int, pid: int, address: Any = 0, data: Any = 0) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _message(pid: int) -> int:
    value = ctypes.c_ulong()
    _ptrace(_GETEVENTMSG, pid, 0, ctypes.addressof(value))
    return value.value


def _fail(pid: int, number: int) -> None:
    """The call is not made, and returns this error."""
    registers = (ctypes.c_ulong * 27)()
    _ptrace(_GETREGS, pid, 0, ctypes.addressof(registers))
    registers[_ORIG_RAX] = ctypes.c_ulong(-1).value
    registers[_RAX] = ctypes.c_ulong(-number).value
    _ptrace(_SETREGS, pid, 0, ctypes.addressof(registers))
