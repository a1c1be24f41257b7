"""terminal: an own pty between the caller's terminal and the payload: raw mode, size, bytes both ways, job control.

    caller's terminal  <->  parent: Relay  <->  master | slave  <->  payload

The caller's terminal is never handed in: whoever holds it can type into it (TIOCSTI) and read on after we are gone.

Inside, before the payload runs, init calls `open_pty_at`, `imitate` (its fd 0 is still the caller's terminal) and
`lead_session`, sends the master to the parent, and after the last fork the payload calls `take_foreground`. That init
leads the session, and not the payload, has a reason: the group of a session's leader is orphaned, in which the kernel
drops SIGTSTP, and Ctrl-Z would do nothing. The price is that a hangup is told to init alone, which passes SIGHUP on.

The parent enters a `Relay` once it has the master, and lets `serve` run until the payload has ended.

Ctrl-Z is a byte like any other: it goes in, and the inner terminal stops the payload, or the payload's shell deals
with it. If the payload itself stops, init's waitpid(WUNTRACED) sees it and says so to the parent, which calls
`Relay.suspend`: the caller's terminal is given back and the parent stops, with its whole job, as if Ctrl-Z had been
typed at it. When the caller's shell continues the job, `suspend` returns and the parent tells init to killpg(SIGCONT).
While the job is in the background, output flows and input waits.

A parent killed by SIGKILL can't restore anything: then the terminal stays raw until `stty sane` or `reset`.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import stat
import struct
import termios
from errno import EIO, EPIPE

TYPE_CHECKING = False  # importing typing for its own constant would cost more than all the rest of this file
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import FrameType
    from typing import Any

TIOCSPTLCK, TIOCGPTPEER = 0x4004_5431, 0x5441  # asm-generic/ioctls.h, ioctl_tty(2)

CHUNK = 1 << 16  # one read; a pty hands out about 4 KiB
HIGH_WATER = 1 << 17  # bytes held in one direction before its reader has to wait
REMAINDER = 1 << 20  # bytes taken from the master after the end: more than a pty holds, less than a runaway writes
BACKGROUND_CHECK = 200  # milliseconds; a shell that brings a running job to the foreground sends no signal


# Inside: init and the payload -----------------------------------------------------------------------------------------


def open_pty_at(devpts: int) -> tuple[int, int]:
    """A new pty of the devpts instance whose root directory is open as `devpts`: (master, slave), both close-on-exec.

    The slave is opened through the master and not by its name: a name under /dev/pts is for the payload to replace.
    """
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    master = os.open("ptmx", flags, dir_fd=devpts)
    try:
        fcntl.ioctl(master, TIOCSPTLCK, struct.pack("i", 0))
        return master, fcntl.ioctl(master, TIOCGPTPEER, flags)
    except OSError:
        os.close(master)
        raise


def imitate(terminal: int, slave: int) -> None:
    """Give the slave the modes (the erase key, UTF-8, ...) and the size of `terminal`, which isn't raw yet."""
    termios.tcsetattr(slave, termios.TCSANOW, termios.tcgetattr(terminal))
    copy_size(terminal, slave)


def copy_size(terminal: int, pty: int) -> None:
    """Copy rows, columns and pixels to either end of a pty; where they change the kernel sends SIGWINCH inside."""
    size = fcntl.ioctl(terminal, termios.TIOCGWINSZ, b"\0" * 8)
    fcntl.ioctl(pty, termios.TIOCSWINSZ, size)


def lead_session(slave: int) -> None:
    """Init: start a session with the slave as its controlling terminal. The slave stays open, so that the master sees
    no end while the payload happens to have closed it. When the master goes, SIGHUP comes here and only here."""
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


def take_foreground(slave: int) -> None:
    """The payload, between fork and exec: make a process group, and put it in the foreground of init's session."""
    os.setpgid(0, 0)
    # From the background tcsetpgrp(3) is answered with SIGTTOU, unless that is blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
    try:
        os.tcsetpgrp(slave, os.getpgrp())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Outside: the caller's terminal ---------------------------------------------------------------------------------------


def in_foreground(terminal: int) -> bool:
    """Whether its keyboard is ours. True as well where it isn't our controlling terminal: no job control there."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return True


class Raw:
    """A terminal in raw mode while the context lasts, its own modes back after it, whatever ends it but SIGKILL.

    A SIGTERM or SIGHUP that nobody handles yet becomes `SystemExit(128 + n)` meanwhile, so that all contexts unwind.
    `leave` and `enter` may be called within, around a suspension.
    """

    def __init__(self, terminal: int) -> None:
        self.terminal = terminal
        self._saved: list[Any] | None = None
        self._raw: list[Any] | None = None
        self._handled: list[signal.Signals] = []

    def __enter__(self) -> Raw:
        self._catch()
        try:
            self.enter()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        while self._handled:
            signal.signal(self._handled.pop(), signal.SIG_DFL)

    def enter(self) -> None:
        """Raw from now on. Nothing happens in the background: there the modes are another's."""
        if not in_foreground(self.terminal):
            return
        now = termios.tcgetattr(self.terminal)
        if now != self._raw or self._saved is None:  # else: stopped while raw, and nobody changed it
            self._saved = now
        # TCSANOW everywhere: TCSAFLUSH loses what was typed ahead, TCSADRAIN hangs on a terminal stopped by Ctrl-S
        termios.tcsetattr(self.terminal, termios.TCSANOW, made_raw(now))
        self._raw = termios.tcgetattr(self.terminal)

    def leave(self) -> None:
        """The modes as they were found. In the background the shell has put back its own, and they stay."""
        saved, self._saved = self._saved, None
        if saved is not None and in_foreground(self.terminal):
            try:
                termios.tcsetattr(self.terminal, termios.TCSANOW, saved)
            except termios.error:
                pass  # hung up: no terminal, no modes

    def _catch(self) -> None:
        def unwind(number: int, _: FrameType | None) -> None:
            raise SystemExit(128 + number)

        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                try:
                    signal.signal(number, unwind)
                except ValueError:
                    return  # not the main thread, whose business signals are
                self._handled.append(number)


def made_raw(modes: list[Any]) -> list[Any]:
    """`modes` with every key a byte that goes through, and output as it is. cfmakeraw of termios(3)"""
    iflag, oflag, cflag, lflag, ispeed, ospeed, cc = modes
    iflag &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP)
    iflag &= ~(termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON)
    oflag &= ~termios.OPOST
    cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    cc = [*cc]
    cc[termios.VMIN], cc[termios.VTIME] = 1, 0
    return [iflag, oflag, cflag, lflag, ispeed, ospeed, cc]


# Outside: the relay ---------------------------------------------------------------------------------------------------


class Relay:
    """Bytes both ways between the caller's `stdin` and `stdout` and the master of an own pty, which it takes over.

    A context manager: inside it `stdin`, if a terminal, is raw. `serve` drives it; the launcher calls `resize` on
    SIGWINCH, `resume` on SIGCONT and `suspend` when init says that the payload has stopped. Nothing is read that can't
    be held: a slow terminal slows the payload down, and a payload that doesn't read, the typing.

    `hung_up` says that the caller's terminal, or the reader of `stdout`, is gone. The master is closed then; the
    launcher waits on for the payload's end.
    """

    def __init__(self, master: int, stdin: int = 0, stdout: int = 1) -> None:
        self.hung_up = False
        self._raw = Raw(stdin) if os.isatty(stdin) else None
        self._sized = next((fd for fd in (stdin, stdout) if os.isatty(fd)), None)  # whose size the pty has
        self._master, self._stdin, self._stdout = master, stdin, stdout
        self._input, self._output = bytearray(), bytearray()  # read and not yet written
        self._line_open = False  # the last byte typed was not a newline
        self._input_ended = self._output_ended = self._finished = self._background = False
        self._remainder = REMAINDER

    def __enter__(self) -> Relay:
        os.set_blocking(self._master, False)
        self._stdin, self._stdout = _own(self._stdin, os.O_RDONLY), _own(self._stdout, os.O_WRONLY)
        try:
            self.resize()
            if self._raw is not None:
                self._raw.__enter__()
                self._background = not in_foreground(self._raw.terminal)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._raw is not None:
                self._raw.__exit__()
        finally:
            self._close()

    def resize(self) -> None:
        """Pass the caller's window size in."""
        if self._sized is not None and self._master >= 0:
            try:
                copy_size(self._sized, self._master)
            except OSError:
                pass  # hung up, as the next read or write will say

    def resume(self) -> None:
        """Take up again what others may have changed while we were stopped: modes, size, who has the keyboard."""
        if self._raw is not None:
            self._background = not in_foreground(self._raw.terminal)
            self._raw.enter()
        self.resize()

    def suspend(self) -> None:
        """Give the terminal back and stop this process's whole job; return when it has been continued.

        By SIGTSTP to the process group, as the terminal itself would do it, and not by SIGSTOP to this process: a
        shell takes over only when all of a pipeline has stopped; and where nobody could continue us, in an orphaned
        group (the command of a terminal emulator), the kernel drops SIGTSTP, and the payload just goes on.
        """
        self._settle()
        if self._raw is not None:
            self._raw.leave()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            os.kill(0, signal.SIGTSTP)  # here we stand still
        finally:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL if handler is None else handler)
        self.resume()

    def hang_up(self) -> None:
        """Close the master: init gets SIGHUP, and the slave reads an end of file and fails to write with EIO."""
        self.hung_up = True
        self._output.clear()
        self._output_ended = self._input_ended = True
        self._close_master()

    # For `serve`

    def wanted(self) -> dict[int, int]:
        """What to poll for now."""
        want = {}
        if not self._input_ended and not self._background and len(self._input) < HIGH_WATER:
            want[self._stdin] = select.POLLIN
        if self._output:
            want[self._stdout] = select.POLLOUT
        if not self._output_ended:  # else it would report POLLHUP for ever
            reading = select.POLLIN if len(self._output) < HIGH_WATER else 0
            writing = select.POLLOUT if self._input else 0
            if reading or writing:
                want[self._master] = reading | writing
        return want

    def step(self, fd: int, events: int) -> None:
        """Move what moves without waiting, after poll(2) reported `events` for `fd`."""
        if fd == self._stdin:
            self._type(events)
        self._deliver()
        self._pull()
        self._push()

    def finish(self) -> None:
        """The payload has ended: no more input, and of output only what the pty still holds."""
        self._input_ended = self._finished = True

    def drained(self) -> bool:
        """Whether all output that there is has been written. Tries, and doesn't wait."""
        self._pull()
        self._push()
        return not self._output

    def before_poll(self) -> int | None:
        """Notice a return to the foreground, of which no signal tells. Returns how long to poll, in milliseconds."""
        if self._background and self._raw is not None and in_foreground(self._raw.terminal):
            self.resume()
        return BACKGROUND_CHECK if self._background else None

    # The four moves: stdin -> input -> master, master -> output -> stdout

    def _type(self, events: int) -> None:
        try:
            data = os.read(self._stdin, CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != EIO:
                raise
            data = b""
        if data:
            self._input += data
            self._line_open = not data.endswith(b"\n")
        elif self._raw is None:  # a pipe or a file: what a keyboard says for its end
            self._input += self._end_of_file()
            self._input_ended = True
        elif not in_foreground(self._raw.terminal):
            self._background = True  # and in an orphaned group, else we had been stopped: EIO
        elif events & (select.POLLHUP | select.POLLERR):
            self.hang_up()
        else:
            self._input += self._end_of_file()  # somebody made the terminal cooked, and the key was pressed

    def _deliver(self) -> None:
        while self._input and self._master >= 0:
            try:
                del self._input[: os.write(self._master, self._input)]
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != EIO:
                    raise
                self._input.clear()  # no slave is open, nobody will read it

    def _pull(self) -> None:
        while not self._output_ended and len(self._output) < HIGH_WATER:
            try:
                data = os.read(self._master, CHUNK)
            except BlockingIOError:
                return  # the kernel says so only when nothing is on its way any more, n_tty_read
            except OSError as error:
                if error.errno != EIO:
                    raise
                data = b""
            self._output += data
            if self._finished:
                self._remainder -= len(data)
            self._output_ended = not data or self._remainder <= 0

    def _push(self) -> None:
        while self._output:
            try:
                del self._output[: os.write(self._stdout, self._output)]
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (EIO, EPIPE):
                    raise
                self.hang_up()

    # Helpers

    def _end_of_file(self) -> bytes:
        """The key that ends the input in a terminal. In an open line the first only sends the line off, termios(3)."""
        modes = termios.tcgetattr(self._master)  # a master's are its slave's
        key: bytes = modes[6][termios.VEOF]
        if key == b"\0":  # _POSIX_VDISABLE: the payload wants no end
            return b""
        return key * 2 if modes[3] & termios.ICANON and self._line_open else key

    def _settle(self) -> None:
        """Before a stop, write what the payload said last, as to leave the alternate screen. In a second at most."""
        poll = select.poll()
        poll.register(self._stdout, select.POLLOUT)
        for _ in range(10):
            if self.drained():
                return
            poll.poll(100)

    def _close(self) -> None:
        os.close(self._stdin)
        os.close(self._stdout)
        self._close_master()

    def _close_master(self) -> None:
        master, self._master = self._master, -1
        if master >= 0:
            os.close(master)


def _own(fd: int, access: int) -> int:
    """A non-blocking descriptor for what `fd` is. O_NONBLOCK belongs to the open file, which we share with the shell
    that started us, and which would keep it if we are killed: so the file is opened once more. What can't be (another
    user's terminal, a socket) or needn't (a regular file) is duplicated, and may make the relay wait."""
    kind = os.fstat(fd).st_mode
    if stat.S_ISCHR(kind) or stat.S_ISFIFO(kind):
        try:
            return os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            pass
    return os.dup(fd)


def serve(relay: Relay | None, watch: Mapping[int, Callable[[], object]]) -> None:
    """Relay until a callback of `watch` returns something true, then until all output has been written.

    `watch` says what to call when an fd is readable or at its end (the control socket, the signal wakeup fd); entries
    may come and go meanwhile. The one that ended it is called no more, the others are while the rest of the output is
    on its way, which a reader who takes nothing may draw out for ever: a second true answer gives the rest up.
    Without a relay this is just the loop.
    """
    poll = select.poll()
    polled: dict[int, int] = {}
    finished: int | None = None  # the fd whose callback said so
    while not (finished is not None and (relay is None or relay.drained())):
        timeout = relay.before_poll() if relay is not None else None
        want = {fd: select.POLLIN for fd in watch if fd != finished}
        if relay is not None:
            want.update(relay.wanted())
        if want != polled:
            for fd in polled.keys() - want.keys():
                poll.unregister(fd)
            for fd in want:
                poll.register(fd, want[fd])
            polled = want
        ready = poll.poll(timeout)
        watched = [fd for fd, _ in ready if fd in watch]
        for fd in watched:
            callback = watch.get(fd)  # an earlier one may have removed it
            if callback is None or not callback():
                continue
            if finished is not None:
                return
            finished = fd
            if relay is not None:
                relay.finish()
        if relay is not None and not watched:  # else what was ready may have been closed, or is no longer ours to read
            for fd, events in ready:
                relay.step(fd, events)
