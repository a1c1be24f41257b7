"""The built-in engine of mode = "user": a network of the environment's own, with no helper and no tap device.

    parent ── engine ── gate

The engine is a process of its own in the host's network, with the caller's rights and fewer: it carries bytes between
sockets there and sockets of the gateway's namespace (gate.py), which the environment sees as all the world. It ends
when the parent does, by whatever; with it every socket, and with the gate the namespace, the wire and the rules.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from devns.api import PR_SET_DUMPABLE, PR_SET_PDEATHSIG, Unsupported, close_all_but, prctl

if TYPE_CHECKING:
    from devns.api import Child, Step

_PACKET = 1 << 16
_READY_WITHIN = 10.0  # seconds; it needs some tens of milliseconds
_REPORT_WITHIN = 2.0  # seconds
_SHOWN = 10  # attempts that were refused
_PROBE6 = "2001:db8::1"  # any address out there: is there a way to IPv6's internet?


class NotHere(Exception):
    """The engine cannot run on this kernel: why."""


@contextlib.contextmanager
def hold(step: Step, child: Child) -> Iterator[None]:
    """Carry the network of `child` while this is held; afterwards the user is told what was refused.

    Raises NotHere where the kernel lacks what the engine needs, and Unsupported for a port that is taken.
    """
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(_listener(address, port)) for address, port, _inside in step["publish"]]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        held.enter_context(ours)
        above = os.getpid()
        pid = os.fork()
        if pid == 0:
            _engine(step, child.pid, listeners, theirs, above)
        theirs.close()
        held.callback(_collect, pid)
        held.callback(ours.shutdown, socket.SHUT_RDWR)
        for listener in listeners:
            listener.close()
        ours.settimeout(_READY_WITHIN)
        words = _hear(ours)
        if "ready" not in words:
            raise NotHere(words.get("failed", "it ended before it was ready"))
        ended: list[bool] = []

        def on_word() -> None:
            ended.append(True)
            why = _hear(ours).get("failed", "it was killed")
            child.note(f"network: the engine has ended ({why}): from now on the environment has no network")

        child.watch(ours.fileno(), on_word)
        yield
        if not ended:
            ours.settimeout(_REPORT_WITHIN)
            with contextlib.suppress(OSError):
                ours.send(b"end")
            _tell(_hear(ours).get("denied", {}), child)


def _listener(address: str, port: int) -> socket.socket:
    """A port of the host, opened before anything runs: a taken one is an error and never the next one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address, port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise Unsupported(
            f"network: port {port} of {address} cannot be opened: {os.strerror(error.errno or 0).lower()}",
            hint="publish another port in [network], or end what holds it: ss -ltnp",
        ) from None
    return listener


def _hear(ours: socket.socket) -> dict[str, Any]:
    try:
        data = ours.recv(_PACKET)
    except OSError:
        data = b""
    return json.loads(data) if data else {}


def _tell(denied: dict[str, int], child: Child) -> None:
    """One line for each attempt that was refused, the most frequent first."""
    often = sorted(denied, key=lambda attempt: -denied[attempt])
    for attempt in often[:_SHOWN]:
        times = "" if denied[attempt] == 1 else f", {denied[attempt]} times"
        child.note(f"network: {attempt} was refused{times}")
    if len(often) > _SHOWN:
        child.note(f"network: {len(often) - _SHOWN} more were refused")


def _collect(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


# --- the engine's process ---------------------------------------------------------------------------------------------


def _engine(step: Step, pid: int, listeners: list[socket.socket], parent: socket.socket, above: int) -> NoReturn:
    try:
        _detach([parent.fileno(), *(listener.fileno() for listener in listeners)])
        if os.getppid() != above:
            os._exit(0)
        # Loaded here and not by the parent, which never uses it; and what the gate does not need, while it works.
        from devns_network import gate, netlink

        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        routes = netlink.Netlink()
        v6 = netlink.route_kind(routes, socket.inet_pton(socket.AF_INET6, _PROBE6)) == netlink.UNICAST
        routes.close()
        if os.fork() == 0:
            close_all_but([0, 1, 2, far.fileno()])
            gate.serve(pid, far, v6=v6, opened=step["host_loopback"])
        far.close()
        from devns_network import carrier

        most = carrier.descriptors()
        try:
            made = carrier.Gate(near)
        except carrier.GateClosed as error:
            parent.send(json.dumps({"failed": str(error)}).encode())
            os._exit(1)
        engine = carrier.Carrier(step, made, listeners, parent, most)
        carrier.lock_in()
        parent.send(b'{"ready": true}')
        engine.run()
    except Exception as error:  # a bug of ours: nothing may unwind into the parent's frames
        with contextlib.suppress(OSError):
            parent.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
    finally:
        os._exit(0)


def _detach(keep: list[int]) -> None:
    """Away from the terminal, whose Ctrl-C is for the payload, and from all that the parent has open."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 0)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    close_all_but([0, 1, 2, *keep])
