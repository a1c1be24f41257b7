"""The relay of an own pty, with real ptys, real job control and no namespaces."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import select
import signal
import socket
import struct
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from devns import terminal
from devns.terminal import Raw, Relay, serve

PATIENCE = 30.0  # seconds until a test gives up, and no more than that


class Pty(NamedTuple):
    master: int
    slave: int

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.slave)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def size(self) -> tuple[int, int]:
        rows, columns, _, _ = struct.unpack("4H", fcntl.ioctl(self.slave, termios.TIOCGWINSZ, b"\0" * 8))
        return rows, columns


@pytest.fixture
def held() -> Iterator[ExitStack]:
    """Whatever a test opens or starts is closed or killed at its end."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def outer(held: ExitStack) -> Pty:
    """The caller's terminal: the test types and reads at its master."""
    return new_pty(held)


@pytest.fixture
def inner(held: ExitStack) -> Pty:
    """The payload's own."""
    return new_pty(held)


def new_pty(held: ExitStack) -> Pty:
    devices = os.open("/dev", os.O_PATH | os.O_DIRECTORY)  # a devpts instance has its ptmx in its root, as /dev has one
    try:
        pty = Pty(*terminal.open_pty_at(devices))
    finally:
        os.close(devices)
    for fd in pty:
        held.callback(close, fd)
    return pty


def close(fd: int) -> None:
    with suppress(OSError):
        os.close(fd)


def pipe(held: ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for fd in ends:
        held.callback(close, fd)
    return ends


def start(held: ExitStack, function: Callable[[], object]) -> int:
    """A child process that runs `function` and exits, 1 if it raised."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    held.callback(stop, pid)
    return pid


def stop(pid: int) -> None:
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def status_of(pid: int) -> int:
    """The exit status as a shell counts it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        got, status = os.waitpid(pid, os.WNOHANG)
        if got:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.01)
    raise AssertionError(f"process {pid} has not ended")


def read(fd: int, enough: Callable[[bytearray], bool] = lambda got: False) -> bytes:
    """What arrives until it is `enough`, or until the end."""
    got = bytearray()
    while not enough(got):
        assert select.select([fd], [], [], PATIENCE)[0], f"nothing more after {bytes(got[-200:])!r}"
        try:
            data = os.read(fd, 1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:  # how a pty's master says that all slaves are closed
                raise
            break
        if not data:
            break
        got += data
    return bytes(got)


def read_to(fd: int, end: bytes) -> bytes:
    return read(fd, lambda got: got.endswith(end))


def eventually(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_raw(pty: Pty) -> bool:
    return not pty.modes()[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


def relay_until(held: ExitStack, done: int, inner: Pty, stdin: int, stdout: int, *not_its: int) -> int:
    """A process that relays until `done` is at its end. The test's own copies of what it takes are closed."""

    def parent() -> None:
        for fd in (inner.slave, *not_its):
            close(fd)
        with Relay(inner.master, stdin, stdout) as relay:
            serve(relay, {done: lambda: not os.read(done, 100)})

    pid = start(held, parent)
    os.close(inner.master)
    os.close(done)
    return pid


def payload(held: ExitStack, inner: Pty, done: int, function: Callable[[], object]) -> int:
    """A process that has the slave as its standard streams and `done`, until it ends, and nothing else."""

    def run() -> None:
        for fd in (0, 1, 2):
            os.dup2(inner.slave, fd)
        os.closerange(3, done)
        os.closerange(done + 1, 256)
        os.set_inheritable(done, True)
        function()

    pid = start(held, run)
    os.close(inner.slave)
    os.close(done)
    return pid


def write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


# Opening a pty --------------------------------------------------------------------------------------------------------


def test_a_new_pty_is_a_pair_that_a_program_does_not_inherit(inner: Pty) -> None:
    os.write(inner.slave, b"out\n")
    assert os.read(inner.master, 100) == b"out\r\n"
    assert os.ttyname(inner.slave).startswith("/dev/pts/")
    assert [os.get_inheritable(fd) for fd in inner] == [False, False]


def test_opening_a_pty_does_not_make_it_the_controlling_terminal(held: ExitStack) -> None:
    def leader() -> None:
        os.setsid()
        new_pty(ExitStack())
        with pytest.raises(OSError, match="No such device"):
            os.open("/dev/tty", os.O_RDWR)

    assert status_of(start(held, leader)) == 0


def test_a_pty_imitates_the_modes_and_the_size_of_the_callers_terminal(outer: Pty, inner: Pty) -> None:
    modes = outer.modes()
    modes[0] |= termios.IXANY
    modes[6][termios.VERASE] = b"\x08"
    termios.tcsetattr(outer.slave, termios.TCSANOW, modes)
    outer.resize(33, 101)
    terminal.imitate(outer.slave, inner.slave)
    assert inner.modes() == outer.modes()
    assert inner.size() == (33, 101)


# Raw mode -------------------------------------------------------------------------------------------------------------


def test_raw_mode_ends_with_its_context(outer: Pty) -> None:
    before = outer.modes()
    with Raw(outer.slave):
        assert is_raw(outer)
        assert not outer.modes()[1] & termios.OPOST
    assert outer.modes() == before


def test_raw_mode_ends_with_an_exception(outer: Pty) -> None:
    before = outer.modes()
    with pytest.raises(ZeroDivisionError), Raw(outer.slave):
        print(1 // 0)
    assert outer.modes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_raw_mode_ends_with_a_fatal_signal(outer: Pty, held: ExitStack, number: signal.Signals) -> None:
    before = outer.modes()

    def hold() -> None:
        with Raw(outer.slave):
            signal.pause()

    pid = start(held, hold)
    eventually(lambda: is_raw(outer))
    os.kill(pid, number)
    assert status_of(pid) == 128 + number
    assert outer.modes() == before


def test_raw_mode_leaves_signals_as_it_found_them(outer: Pty) -> None:
    def mine(number: int, frame: object) -> None: ...

    previous = signal.signal(signal.SIGTERM, mine)
    try:
        with Raw(outer.slave):
            assert signal.getsignal(signal.SIGTERM) is mine
            assert signal.getsignal(signal.SIGHUP) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_raw_mode_works_outside_the_main_thread(outer: Pty) -> None:
    seen = []

    def hold() -> None:
        with Raw(outer.slave):
            seen.append(is_raw(outer))
        seen.append(is_raw(outer))

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert seen == [True, False]


def test_what_was_typed_ahead_survives_the_change_of_modes(outer: Pty) -> None:
    os.write(outer.master, b"ahead\n")
    with Raw(outer.slave):
        assert os.read(outer.slave, 100) == b"ahead\n"


def test_modes_found_raw_by_a_stopped_holder_are_not_taken_for_the_callers(outer: Pty) -> None:
    before = outer.modes()
    with Raw(outer.slave) as raw:
        raw.enter()  # as after SIGSTOP and SIGCONT, where nobody called leave
        assert is_raw(outer)
    assert outer.modes() == before


# Bytes ----------------------------------------------------------------------------------------------------------------


def test_what_is_typed_goes_in_and_what_is_said_comes_out(outer: Pty, inner: Pty, held: ExitStack) -> None:
    alive, done = pipe(held)
    relay = relay_until(held, alive, inner, outer.slave, outer.slave, done)
    eventually(lambda: is_raw(outer))
    cat = payload(held, inner, done, lambda: os.execvp("cat", ["cat"]))
    os.write(outer.master, b"hello\n")
    assert read(outer.master, lambda got: got.count(b"\n") == 2) == b"hello\r\nhello\r\n"
    os.write(outer.master, b"\x04")
    assert (status_of(cat), status_of(relay)) == (0, 0)
    assert not is_raw(outer)


def test_the_interrupt_key_interrupts_the_payload_and_not_the_parent(outer: Pty, inner: Pty, held: ExitStack) -> None:
    alive, done = pipe(held)

    def sleep() -> None:
        terminal.lead_session(0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(1, b"ready")
        signal.pause()

    sleeper = payload(held, inner, done, sleep)
    relay = relay_until(held, alive, inner, outer.slave, outer.slave)
    read_to(outer.master, b"ready")
    os.write(outer.master, b"\x03")
    assert status_of(sleeper) == 128 + signal.SIGINT
    assert status_of(relay) == 0


def test_ten_megabytes_come_out_as_they_were_written(outer: Pty, inner: Pty, held: ExitStack) -> None:
    data = os.urandom(1 << 20) * 10
    alive, done = pipe(held)
    termios.tcsetattr(inner.slave, termios.TCSANOW, terminal.made_raw(inner.modes()))
    writer = payload(held, inner, done, lambda: write_all(1, data))
    relay = relay_until(held, alive, inner, outer.slave, outer.slave)
    got = read(outer.master, lambda got: len(got) >= len(data))
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    assert (status_of(writer), status_of(relay)) == (0, 0)


def test_ten_megabytes_go_in_as_they_were_typed(inner: Pty, held: ExitStack) -> None:
    data = os.urandom(1 << 20) * 10
    alive, done = pipe(held)
    source, typist = pipe(held)
    out, said = pipe(held)
    termios.tcsetattr(inner.slave, termios.TCSANOW, terminal.made_raw(inner.modes()))

    def digest() -> None:
        left, summary = len(data), hashlib.sha256()
        while left:
            chunk = os.read(0, 1 << 16)
            left -= len(chunk)
            summary.update(chunk)
        os.write(1, summary.hexdigest().encode())

    reader = payload(held, inner, done, digest)
    relay = relay_until(held, alive, inner, source, said, typist, out)
    os.close(said)
    os.close(source)
    write_all(typist, data)
    assert read(out) == hashlib.sha256(data).hexdigest().encode()
    assert (status_of(reader), status_of(relay)) == (0, 0)


def test_all_output_of_a_payload_that_ends_fast_arrives(outer: Pty, inner: Pty, held: ExitStack) -> None:
    said = b"".join(b"%d\n" % number for number in range(1, 100_001))
    alive, done = pipe(held)
    writer = payload(held, inner, done, lambda: write_all(1, said))
    relay = relay_until(held, alive, inner, outer.slave, outer.slave)
    wanted = said.replace(b"\n", b"\r\n")
    assert read(outer.master, lambda got: len(got) >= len(wanted)) == wanted
    assert (status_of(writer), status_of(relay)) == (0, 0)


def test_a_reader_who_starts_after_the_end_still_gets_everything(inner: Pty, held: ExitStack) -> None:
    alive, done = pipe(held)
    out, said = pipe(held)
    fcntl.fcntl(said, fcntl.F_SETPIPE_SZ, 4096)
    source, typist = pipe(held)
    writer = payload(held, inner, done, lambda: write_all(1, b"x" * 30_000))
    relay = relay_until(held, alive, inner, source, said, typist, out)
    os.close(said)
    assert status_of(writer) == 0
    assert read(out) == b"x" * 30_000
    assert status_of(relay) == 0


def test_what_writes_on_after_the_end_does_not_hold_the_relay(inner: Pty, held: ExitStack) -> None:
    source, _typist = pipe(held)
    nowhere = os.open("/dev/null", os.O_WRONLY)
    held.callback(os.close, nowhere)
    os.set_blocking(inner.slave, False)
    written = 0
    with Relay(os.dup(inner.master), source, nowhere) as relay:
        relay.finish()
        while relay.wanted():
            with suppress(BlockingIOError):
                written += os.write(inner.slave, b"x" * 4096)
            relay.drained()
            assert written < 1 << 24


def test_nothing_is_read_that_cannot_be_held(inner: Pty, held: ExitStack) -> None:
    _out, said = pipe(held)
    source, _typist = pipe(held)
    os.set_blocking(inner.slave, False)
    written = 0
    with Relay(os.dup(inner.master), source, said) as relay:
        master = next(fd for fd, events in relay.wanted().items() if os.isatty(fd))
        while relay.wanted().get(master, 0) & select.POLLIN:
            with suppress(BlockingIOError):
                written += os.write(inner.slave, b"x" * 4096)
            relay.step(master, select.POLLIN)
            assert written < 1 << 20


def test_output_goes_on_in_a_file_where_that_stands(inner: Pty, held: ExitStack, tmp_path: Path) -> None:
    log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    held.callback(os.close, log)
    os.write(log, b"before\n")
    alive, done = pipe(held)
    source, typist = pipe(held)
    writer = payload(held, inner, done, lambda: os.write(1, b"within"))
    relay = relay_until(held, alive, inner, source, log, typist)
    assert (status_of(writer), status_of(relay)) == (0, 0)
    os.write(log, b"\nafter\n")
    assert (tmp_path / "log").read_bytes() == b"before\nwithin\nafter\n"


def test_the_callers_files_stay_blocking(outer: Pty, inner: Pty, held: ExitStack) -> None:
    alive, done = pipe(held)
    relay = relay_until(held, alive, inner, outer.slave, outer.slave, done)
    eventually(lambda: is_raw(outer))
    assert os.get_blocking(outer.slave)  # shared with the relay, as with the shell that started it
    os.close(done)
    assert status_of(relay) == 0


def test_the_master_and_the_relays_own_files_are_closed_at_its_end(outer: Pty, inner: Pty) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Relay(os.dup(inner.master), outer.slave, outer.slave):
        pass
    assert set(os.listdir("/proc/self/fd")) == before


# The end of the input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", b"a line\n", b"a line\nand no end"])
def test_the_end_of_a_pipe_ends_the_payloads_input(inner: Pty, held: ExitStack, said: bytes) -> None:
    alive, done = pipe(held)
    source, typist = pipe(held)
    out, mouth = pipe(held)
    modes = inner.modes()
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(inner.slave, termios.TCSANOW, modes)
    cat = payload(held, inner, done, lambda: os.execvp("cat", ["cat"]))
    relay = relay_until(held, alive, inner, source, mouth, typist, out)
    os.close(mouth)
    write_all(typist, said)
    os.close(typist)
    assert read(out) == said.replace(b"\n", b"\r\n")
    assert (status_of(cat), status_of(relay)) == (0, 0)


def test_the_end_of_a_pipe_ends_one_read_and_not_the_next(inner: Pty, held: ExitStack) -> None:
    alive, done = pipe(held)
    source, typist = pipe(held)
    out, mouth = pipe(held)

    def twice() -> None:
        while os.read(0, 100):
            pass
        os.write(1, b"more" if select.select([0], [], [], 0)[0] else b"no more")

    reader = payload(held, inner, done, twice)
    relay = relay_until(held, alive, inner, source, mouth, typist, out)
    os.close(mouth)
    write_all(typist, b"a line\n")
    os.close(typist)
    assert read(out) == b"a line\r\nno more"
    assert (status_of(reader), status_of(relay)) == (0, 0)


def test_a_payload_that_reads_keys_gets_the_key_itself(inner: Pty, held: ExitStack) -> None:
    alive, done = pipe(held)
    source, typist = pipe(held)
    out, mouth = pipe(held)
    termios.tcsetattr(inner.slave, termios.TCSANOW, terminal.made_raw(inner.modes()))
    reader = payload(held, inner, done, lambda: os.write(1, os.read(0, 1).hex().encode()))
    relay = relay_until(held, alive, inner, source, mouth, typist, out)
    os.close(mouth)
    os.close(typist)
    assert read(out) == b"04"
    assert (status_of(reader), status_of(relay)) == (0, 0)


# Hangups --------------------------------------------------------------------------------------------------------------


def hung_up(held: ExitStack, inner: Pty, stdin: int, stdout: int, *not_its: int) -> tuple[int, int]:
    """A relay that exits with 7 if it was hung up, and an init that waits for SIGHUP and then ends with 9."""
    alive, done = pipe(held)

    def init() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
        for fd in (inner.master, stdin, stdout, *not_its):
            os.close(fd)
        terminal.lead_session(inner.slave)
        os.write(inner.slave, b"ready")
        signal.sigwait([signal.SIGHUP])
        raise SystemExit(9)

    def parent() -> None:
        for fd in (inner.slave, done, *not_its):
            os.close(fd)
        with Relay(inner.master, stdin, stdout) as relay:
            serve(relay, {alive: lambda: not os.read(alive, 100)})
            raise SystemExit(7 if relay.hung_up else 0)

    pids = start(held, parent), start(held, init)
    for fd in {*inner, alive, done, stdin, stdout}:
        os.close(fd)
    return pids


def test_a_terminal_that_goes_away_hangs_up_the_session_inside(outer: Pty, inner: Pty, held: ExitStack) -> None:
    stdout = os.dup(outer.slave)
    relay, init = hung_up(held, inner, outer.slave, stdout, outer.master)
    read_to(outer.master, b"ready")
    os.close(outer.master)
    assert (status_of(init), status_of(relay)) == (9, 7)


def test_an_output_that_nobody_reads_any_more_hangs_up_the_session_inside(inner: Pty, held: ExitStack) -> None:
    source, typist = pipe(held)
    out, mouth = pipe(held)
    relay, init = hung_up(held, inner, source, mouth, typist, out)
    read_to(out, b"ready")
    os.close(out)
    os.write(typist, b"an echo that finds nobody\n")
    assert (status_of(init), status_of(relay)) == (9, 7)


# The loop -------------------------------------------------------------------------------------------------------------


def test_the_loop_serves_others_and_lets_them_come_and_go(held: ExitStack) -> None:
    one, two = pipe(held), pipe(held)
    heard: list[bytes] = []
    watch: dict[int, Callable[[], object]] = {}

    def first() -> None:
        heard.append(os.read(one[0], 100))
        del watch[one[0]]
        watch[two[0]] = second
        os.write(one[1], b"unheard")
        os.write(two[1], b"second")

    def second() -> bool:
        heard.append(os.read(two[0], 100))
        return True

    watch[one[0]] = first
    os.write(one[1], b"first")
    serve(None, watch)
    assert heard == [b"first", b"second"]


def test_a_second_end_gives_up_output_that_nobody_takes(inner: Pty, held: ExitStack) -> None:
    _out, mouth = pipe(held)
    source, _typist = pipe(held)
    fcntl.fcntl(mouth, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(inner.slave, False)
    assert os.write(inner.slave, b"x" * 16_000) > 4096
    ended, killed = pipe(held), pipe(held)

    def end() -> bool:
        os.write(killed[1], b"!")
        return True

    os.write(ended[1], b"!")
    with Relay(os.dup(inner.master), source, mouth) as relay:
        serve(relay, {ended[0]: end, killed[0]: lambda: True})
        assert not relay.drained()


# Size and job control -------------------------------------------------------------------------------------------------
#
#     the test: terminal emulator    shell: leads the outer session    parent: Relay    init: leads the inner    payload


class Shell:
    """A shell with job control and one job, the parent; the test is the terminal emulator and tells it what to do."""

    def __init__(self, held: ExitStack, outer: Pty, job: Callable[[], object], *, background: bool = False) -> None:
        self.outer = outer
        self._ear, mouth = socket.socketpair()
        held.callback(self._ear.close)
        self.pid = start(held, lambda: self._run(mouth, job, background))
        mouth.close()

    def heard(self) -> str:
        """What became of the job: "stopped", or its exit status."""
        self._ear.settimeout(PATIENCE)
        return self._ear.recv(100).decode()

    def do(self, what: str) -> None:
        """fg or bg, or wait: for the job, once it runs in the background."""
        self._ear.send(what.encode())

    def _run(self, mouth: socket.socket, job: Callable[[], object], background: bool) -> None:
        os.close(self.outer.master)
        os.setsid()
        fcntl.ioctl(self.outer.slave, termios.TIOCSCTTY, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                os.setpgid(0, 0)
                if not background:
                    os.tcsetpgrp(self.outer.slave, os.getpid())
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTTOU])
                mouth.close()
                job()
                os._exit(0)
            traceback.print_exc()
            os._exit(1)
        with suppress(OSError):
            os.setpgid(pid, pid)
        order = mouth.recv(100) if background else b"wait"
        while True:
            if order == b"fg":
                os.tcsetpgrp(self.outer.slave, pid)
            if order in (b"fg", b"bg"):
                os.killpg(pid, signal.SIGCONT)
            if order == b"front":  # as bash does with a job that runs already
                os.tcsetpgrp(self.outer.slave, pid)
            if order != b"bg":
                _, status = os.waitpid(pid, os.WUNTRACED)
                os.tcsetpgrp(self.outer.slave, os.getpgrp())
                mouth.send(b"stopped" if os.WIFSTOPPED(status) else b"%d" % os.waitstatus_to_exitcode(status))
                if not os.WIFSTOPPED(status):
                    return
            order = mouth.recv(100)


def launch(outer: Pty, function: Callable[[], object]) -> None:
    """The parent: an inner pty, an init, a payload, and a relay that follows the protocol of a stopped payload."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inner = new_pty(ExitStack())
    if os.fork() == 0:
        ours.close()
        os.close(inner.master)
        init(inner.slave, outer.slave, theirs, function)
    theirs.close()
    ours.recv(10)
    os.close(inner.slave)
    wake, wake_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_end)
    for number in (signal.SIGWINCH, signal.SIGCONT):
        signal.signal(number, lambda number, frame: None)
    with Relay(inner.master, outer.slave, outer.slave) as relay:

        def hear() -> bool:
            message = ours.recv(10)
            if message == b"stopped":
                relay.suspend()
                ours.send(b"continue")
            return message == b"ended"

        def signalled() -> None:
            for number in os.read(wake, 100):
                if number == signal.SIGWINCH:
                    relay.resize()
                elif number == signal.SIGCONT:
                    relay.resume()

        serve(relay, {ours.fileno(): hear, wake: signalled})


def init(slave: int, callers: int, control: socket.socket, function: Callable[[], object]) -> None:
    terminal.imitate(callers, slave)
    terminal.lead_session(slave)
    pid = os.fork()
    if pid == 0:
        try:
            for fd in (0, 1, 2):
                os.dup2(slave, fd)
            terminal.take_foreground(0)
            control.send(b"begun")
            function()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    while True:
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            break
        control.send(b"stopped")
        control.recv(10)
        os.killpg(pid, signal.SIGCONT)
    control.send(b"ended")
    os._exit(0)


def cat() -> None:
    os.write(1, b"ready\n")
    os.execvp("cat", ["cat"])


def test_the_size_is_there_at_the_start_and_every_change_reaches_the_payload(outer: Pty, held: ExitStack) -> None:
    outer.resize(24, 80)

    def watcher() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
        for _ in range(2):
            os.write(1, b"%d x %d\n" % Pty(-1, 0).size())
            signal.sigwait([signal.SIGWINCH])
        os.write(1, b"%d x %d\n" % Pty(-1, 0).size())

    shell = Shell(held, outer, lambda: launch(outer, watcher))
    assert read_to(outer.master, b"\n") == b"24 x 80\r\n"
    outer.resize(50, 132)
    assert read_to(outer.master, b"\n") == b"50 x 132\r\n"
    outer.resize(1, 1)
    assert read_to(outer.master, b"\n") == b"1 x 1\r\n"
    assert shell.heard() == "0"


def test_the_suspend_key_stops_a_plain_command_and_fg_continues_it(outer: Pty, held: ExitStack) -> None:
    before = outer.modes()
    shell = Shell(held, outer, lambda: launch(outer, cat))
    read_to(outer.master, b"ready\r\n")
    for _ in range(2):
        assert is_raw(outer)
        os.write(outer.master, b"\x1a")
        assert shell.heard() == "stopped"
        assert outer.modes() == before
        shell.do("fg")
        eventually(lambda: is_raw(outer))
    os.write(outer.master, b"back\n")
    assert read(outer.master, lambda got: got.count(b"back\r\n") == 2).startswith(b"^Z^Z")
    os.write(outer.master, b"\x04")
    assert shell.heard() == "0"
    assert outer.modes() == before


def test_a_pipeline_that_the_parent_is_part_of_stops_and_continues_with_it(outer: Pty, held: ExitStack) -> None:
    report, told = pipe(held)

    def job() -> None:
        pager = os.fork()
        if pager == 0:
            signal.pause()
        os.write(told, b"%d" % pager)
        launch(outer, cat)
        os.kill(pager, signal.SIGKILL)

    def state() -> str:
        with open(f"/proc/{pager}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0]

    shell = Shell(held, outer, job)
    pager = int(os.read(report, 100))
    read_to(outer.master, b"ready\r\n")
    os.write(outer.master, b"\x1a")
    assert shell.heard() == "stopped"
    eventually(lambda: state() == "T")
    shell.do("fg")
    eventually(lambda: state() == "S")
    os.write(outer.master, b"\x04")
    assert shell.heard() == "0"


def test_what_a_payload_says_before_it_stops_itself_is_out_before_the_shell_is_back(
    outer: Pty, held: ExitStack
) -> None:
    def editor() -> None:
        os.write(1, b"goodbye" * 1000)
        os.kill(0, signal.SIGSTOP)

    shell = Shell(held, outer, lambda: launch(outer, editor))
    arrived = read(outer.master, lambda got: len(got) == 7000)
    assert shell.heard() == "stopped"
    assert arrived == b"goodbye" * 1000
    shell.do("fg")
    assert shell.heard() == "0"


def test_a_size_that_changed_during_a_suspension_is_passed_on(outer: Pty, held: ExitStack) -> None:
    outer.resize(24, 80)

    def sleeper() -> None:
        os.write(1, b"ready\n")
        os.kill(0, signal.SIGSTOP)
        os.write(1, b"%d x %d\n" % Pty(-1, 0).size())

    shell = Shell(held, outer, lambda: launch(outer, sleeper))
    assert shell.heard() == "stopped"
    outer.resize(40, 100)
    shell.do("fg")
    assert read_to(outer.master, b"100\r\n").endswith(b"40 x 100\r\n")
    assert shell.heard() == "0"


def test_in_the_background_output_flows_input_waits_and_the_modes_are_the_shells(outer: Pty, held: ExitStack) -> None:
    before = outer.modes()

    def worker() -> None:
        os.kill(0, signal.SIGSTOP)
        os.write(1, b"working")
        os.write(1, b"got " + os.read(0, 100))

    shell = Shell(held, outer, lambda: launch(outer, worker))
    assert shell.heard() == "stopped"
    os.write(outer.master, b"early\n")
    read_to(outer.master, b"early\r\n")  # echoed by the caller's terminal
    shell.do("bg")
    assert read_to(outer.master, b"working") == b"working"
    assert outer.modes() == before
    shell.do("front")  # no SIGCONT comes with this
    read_to(outer.master, b"got early\r\n")
    assert shell.heard() == "0"
    assert outer.modes() == before


def test_a_job_started_in_the_background_leaves_the_terminal_alone(outer: Pty, held: ExitStack) -> None:
    before = outer.modes()
    shell = Shell(held, outer, lambda: launch(outer, cat), background=True)
    assert read_to(outer.master, b"\n") == b"ready\r\r\n"  # both terminals turn a newline into two bytes
    assert outer.modes() == before
    shell.do("front")
    eventually(lambda: is_raw(outer))
    os.write(outer.master, b"\x04")
    assert shell.heard() == "0"
    assert outer.modes() == before


def test_modes_are_raw_again_after_a_stop_that_nobody_announced(outer: Pty, held: ExitStack) -> None:
    before = outer.modes()
    shell = Shell(held, outer, lambda: launch(outer, cat))
    read_to(outer.master, b"ready\r\n")
    eventually(lambda: is_raw(outer))
    os.kill(os.tcgetpgrp(outer.master), signal.SIGSTOP)
    assert shell.heard() == "stopped"
    termios.tcsetattr(outer.slave, termios.TCSANOW, before)  # as a shell does
    shell.do("fg")
    eventually(lambda: is_raw(outer))
    os.write(outer.master, b"\x04")
    assert shell.heard() == "0"
    assert outer.modes() == before


def test_without_a_shell_that_could_continue_it_nothing_is_stopped(outer: Pty, held: ExitStack) -> None:
    def leader() -> None:
        os.setsid()
        fcntl.ioctl(outer.slave, termios.TIOCSCTTY, 0)
        launch(outer, cat)

    pid = start(held, leader)
    read_to(outer.master, b"ready\r\n")
    os.write(outer.master, b"\x1a")
    os.write(outer.master, b"still here\n")
    read(outer.master, lambda got: got.count(b"still here\r\n") == 2)
    os.write(outer.master, b"\x04")
    assert status_of(pid) == 0
