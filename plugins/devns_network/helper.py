"""The effect of mode = "user": a helper, pasta or slirp4netns, that carries the environment's packages.

parent ── guard ── helper

The guard is a process that does nothing but wait: for the parent to end, however that happens, and then it ends the
helper; or for the helper to end by itself. The kernel's death signal would not do: a helper that changes its
credentials, as these two do to lock themselves in, loses it. prctl(2), PR_SET_PDEATHSIG
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from devns.api import Unsupported

if TYPE_CHECKING:
    from devns.api import Child, Step

_READY_WITHIN = 10.0  # seconds; both need some tens of milliseconds
_GRACE = 1.0  # seconds between the request to end and SIGKILL
_SAID_MAX = 4096  # bytes of what the helper said that an error repeats
_READY_FD = 3  # of the helper
_DNS = "10.0.2.3"  # where slirp4netns answers for the host's resolver; pasta does where it is told to


@contextlib.contextmanager
def hold(step: Step, child: Child) -> Iterator[None]:
    """Start the helper on the namespaces of `child`, wait until it is ready, and end exactly that process at last.

    Raises Unsupported with what the helper said, where it gives up.
    """
    with contextlib.ExitStack() as held:
        said = os.memfd_create("said")
        held.callback(os.close, said)
        # The place is needed only until the helper has written there, and nothing stays if the parent is killed later.
        with tempfile.TemporaryDirectory(prefix="devns-network-") as scratch:
            if not _start_guarded(step, child.pid, f"{scratch}/ready", said, held):
                words = os.pread(said, _SAID_MAX, 0).decode(errors="replace").split()
                raise Unsupported(
                    f"network: {step['engine']} did not start: {' '.join(words) or 'it said nothing'}",
                    hint='set mode = "host" or "none" in [network]',
                )
        yield


def arguments(step: Step, pid: int, ready: str) -> list[str]:
    """The helper's command line. Both leave the host's loopback open unless they are told otherwise."""
    return _pasta(step, pid, ready) if step["engine"] == "pasta" else _slirp4netns(step, pid)


def _pasta(step: Step, pid: int, ready: str) -> list[str]:
    published = [f"{address}/{outside}:{inside}" for address, outside, inside in step["publish"]]
    opened = [str(port) for port in step["host_loopback"]]
    has_v6 = any(":" in address for address, _outside, _inside in step["publish"])
    return [
        *(step["program"], "--foreground", "--quiet", "--config-net"),
        *([] if has_v6 else ["--ipv4-only"]),
        # The gateway's address, the loopback addresses by TCP and by UDP: each has to be closed by itself.
        *("--no-map-gw", "-u", "none", "-U", "none"),
        *[word for rule in published or ["none"] for word in ("-t", rule)],
        *[word for rule in opened or ["none"] for word in ("-T", rule)],
        *("--dns-forward", _DNS, "--pid", ready, "--", str(pid)),
    ]


def _slirp4netns(step: Step, pid: int) -> list[str]:
    return [
        *(step["program"], "--configure", "--mtu=65520"),
        *("--disable-host-loopback", "--enable-sandbox", "--enable-seccomp"),
        *(f"--ready-fd={_READY_FD}", "--", str(pid), "tap0"),
    ]


# --- the parent -------------------------------------------------------------------------------------------------------


def _start_guarded(step: Step, pid: int, ready: str, said: int, held: contextlib.ExitStack) -> bool:
    """Start guard and helper, which end with `held`. True when the helper is ready, False when it has given up."""
    os.mkfifo(ready, 0o600)
    # Open for both, so that neither side ever waits for the other, and a reader never sees the end.
    ear = os.open(ready, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    held.callback(os.close, ear)
    watched, life = os.pipe2(os.O_CLOEXEC)
    held.callback(os.close, watched)
    guard = os.fork()
    if guard == 0:
        _guard(arguments(step, pid, ready), ear, said, watched)
    held.callback(_collect, guard)
    held.callback(os.close, life)  # this is what ends the helper
    return _is_ready(ear, guard)


def _is_ready(ear: int, guard: int) -> bool:
    """Wait for the helper's word, or the guard's end."""
    poll = select.poll()
    poll.register(ear, select.POLLIN)
    pidfd = os.pidfd_open(guard)
    try:
        poll.register(pidfd, select.POLLIN)
        return [fd for fd, _event in poll.poll(_READY_WITHIN * 1000)][:1] == [ear]
    finally:
        os.close(pidfd)


def _collect(guard: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(guard, 0)


# --- the guard --------------------------------------------------------------------------------------------------------


def _guard(argv: list[str], ear: int, said: int, watched: int) -> NoReturn:
    try:
        os.setsid()  # the terminal's Ctrl-C is for the payload
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        ear, said, watched = _keep_only(ear, said, watched)
        helper = _start(argv, ear, said)
        pidfd = os.pidfd_open(helper)
        poll = select.poll()
        poll.register(watched, select.POLLIN)  # POLLHUP when the parent has closed its end, or is gone
        poll.register(pidfd, select.POLLIN)
        if any(fd == pidfd for fd, _event in poll.poll()):
            os._exit(1)
        os.killpg(helper, signal.SIGTERM)
        poll.unregister(watched)
        if not poll.poll(_GRACE * 1000):
            os.killpg(helper, signal.SIGKILL)
        os.waitpid(helper, 0)
        os._exit(0)
    finally:
        os._exit(1)


def _start(argv: list[str], ready: int, said: int) -> int:
    actions: list[Any] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, said, 1),
        (os.POSIX_SPAWN_DUP2, said, 2),
        (os.POSIX_SPAWN_DUP2, ready, _READY_FD),
    ]
    defaults = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)
    # An environment of our own: LD_PRELOAD and the like are for the payload.
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    try:
        # A group of its own: whatever it forks ends with it.
        return os.posix_spawn(argv[0], argv, environment, file_actions=actions, setpgroup=0, setsigdef=defaults)
    except OSError as error:
        os.write(said, f"{argv[0]}: {error.strerror}".encode())
        raise


def _keep_only(*fds: int) -> list[int]:
    """These alone, out of the way of what the helper gets; everything else that was inherited is closed.

    The launch's own socket most of all: init takes its end for the parent's end.
    """
    kept = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _READY_FD + 1) for fd in fds]
    low = 0
    for fd in sorted(kept):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))
    return kept
