"""What the engine's process does: the sockets of the gateway and of the host's network, put together in one loop."""

from __future__ import annotations

import array
import errno
import json
import os
import socket
from functools import partial
from typing import Any

from devns_network import gate, netlink, packets
from devns_network.loop import IN, Loop
from devns_network.names import Forwarder, Resolvers
from devns_network.packets import Packet
from devns_network.ping import Ping
from devns_network.policy import Policy
from devns_network.relay import Relay
from devns_network.tcp import Tcp, outer_socket
from devns_network.udp import Udp
from devns_network.wire import Wire

_FDS_MAX = 250  # in one message: SCM_MAX_FD, unix(7), is 253
_AT_ONCE = 64
_RESERVED = 300  # descriptors that are for no connection
_PACKET = 1 << 16


class GateClosed(Exception):
    """The gate has ended; what it said, if anything."""


class Gate:
    """The engine's end of the gate: what it handed over at first, and more sockets when they are asked for."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        words, fds = self._receive()
        if "failed" in words:
            raise GateClosed(words["failed"])
        self.sockets = {name: socket.socket(fileno=fd) for name, fd in zip(words["sockets"], fds, strict=True)}
        self._spare: dict[str, list[int]] = {}

    def new_socket(self, kind: str, version: int) -> socket.socket:
        """A transparent, unbound socket of the gateway: "udp" or "tcp"."""
        spare = self._spare.setdefault(f"{kind}{version}", [])
        if not spare:
            self.control.send(f"{kind}{version}".encode())
            spare += self._receive()[1]
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        made = socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM, 0, spare.pop())
        made.setblocking(False)
        return made

    def last_words(self) -> str:
        try:
            return str(json.loads(self.control.recv(_PACKET))["failed"])
        except (OSError, ValueError, KeyError):
            return "the gateway's process was killed"

    def _receive(self) -> tuple[dict[str, Any], array.array[int]]:
        fds = array.array("i")
        data, ancillary, _flags, _address = self.control.recvmsg(_PACKET, socket.CMSG_SPACE(_FDS_MAX * fds.itemsize))
        if not data:
            raise GateClosed("it ended")
        for _level, _kind, value in ancillary:
            fds.frombytes(value[: len(value) - len(value) % fds.itemsize])
        return json.loads(data), fds


class Carrier:
    """The engine of one environment: ready when it is made. `run` returns when the parent is gone, and raises
    GateClosed when the gate is. `most` is how many descriptors there may be."""

    def __init__(
        self, step: dict[str, Any], made: Gate, listeners: list[socket.socket], parent: socket.socket, most: int
    ) -> None:
        self._gate = made
        self._parent = parent
        self._loop = loop = Loop()
        routes = netlink.Netlink()
        allow = step["allow"]
        self._policy = policy = Policy(
            lambda address: netlink.route_kind(routes, address),
            allow=None if allow is None else [tuple(rule) for rule in allow],
            deny=[tuple(rule) for rule in step["deny"]],
            host_loopback=step["host_loopback"],
        )
        wire = Wire(made.sockets)
        names = Forwarder(loop, policy, Resolvers())
        self._tcp = Tcp(loop, wire, policy, Relay(loop), most=max(16, (most - _RESERVED) // 2), serve_names=names.serve)
        udp = Udp(loop, wire, policy, lambda version: made.new_socket("udp", version))
        self._ping = Ping(loop, wire, policy)
        self._v6 = "tcp6" in made.sockets
        for version in (4, 6) if self._v6 else (4,):
            first, tcp, datagrams, dns = (made.sockets[f"{name}{version}"] for name in ("first", "tcp", "udp", "dns"))
            loop.watch(first, IN, partial(self._on_first, first))
            loop.watch(tcp, IN, partial(self._tcp.on_accept, tcp))
            loop.watch(datagrams, IN, partial(udp.on_first, datagrams))
            loop.watch(dns, IN, partial(names.on_datagram, dns))
        for port in step["host_loopback"]:
            self._tcp.serve(made.sockets[f"opened {port}"], partial(self._to_host, port))
        for listener, (_address, _outside, inside) in zip(listeners, step["publish"], strict=True):
            self._tcp.serve(listener, partial(self._to_guest, inside))
        loop.watch(made.control, IN, self._on_gate)
        loop.watch(parent, IN, self._on_parent)

    def run(self) -> None:
        self._loop.run()

    def _on_gate(self, events: int) -> None:
        raise GateClosed(self._gate.last_words())  # it speaks only when it is asked

    def _on_parent(self, events: int) -> None:
        try:
            if self._parent.recv(_PACKET):
                self._parent.send(json.dumps({"denied": self._policy.denied}).encode())
        except OSError:
            pass  # it is gone
        self._loop.stop()

    def _on_first(self, first: socket.socket, events: int) -> None:
        """The first packet of a connection, or an echo request."""
        for _ in range(_AT_ONCE):
            try:
                packet: Packet | None = packets.parse(first.recv(_PACKET))
            except OSError:
                return
            if packet is not None:
                if packet.protocol == packets.TCP:
                    self._tcp.on_syn(packet)
                else:
                    self._ping.on_request(packet)

    # --- published ports, and the host's that are opened --------------------------------------------------------------

    def _to_host(self, port: int, peer: tuple[str, int]) -> tuple[socket.socket, int] | None:
        try:
            outer = outer_socket(socket.AF_INET, socket.SOCK_STREAM)
            return outer, outer.connect_ex(("127.0.0.1", port))
        except OSError:
            return None

    def _to_guest(self, port: int, peer: tuple[str, int]) -> tuple[socket.socket, int] | None:
        """A connection to the environment in the name of `peer`, which inside is seen as itself; never as loopback."""
        version = 6 if ":" in peer[0] and self._v6 else 4
        try:
            inner = self._gate.new_socket("tcp", version)
        except OSError:
            return None
        gateway, guest = (gate.GATEWAY6, gate.GUEST6) if version == 6 else (gate.GATEWAY, gate.GUEST)
        source = (gateway, 0) if _is_near(peer[0]) or (":" in peer[0]) != (version == 6) else peer[:2]
        for address in (source, (source[0], 0), (gateway, 0)):
            try:
                inner.bind(address)
                return inner, inner.connect_ex((guest, port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES, errno.EINVAL):
                    break
        inner.close()
        return None


def _is_near(address: str) -> bool:
    """One that would mean another inside: loopback, link-local, or of the wire itself."""
    return address.startswith(("127.", "10.0.2.", "169.254.", "fe80:", "fd00:d:", "::ffff:")) or address == "::1"


def descriptors() -> int:
    """As many as this process may have, up to what thousands of idle connections need."""
    import resource

    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, 1 << 16) if hard != resource.RLIM_INFINITY else 1 << 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def lock_in() -> None:
    """No files but the host's resolv.conf, no processes, no capabilities, and no other calls than the loop's."""
    import resource

    from devns.api import (
        LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET,
        LANDLOCK_SCOPE_SIGNAL,
        PR_SET_NO_NEW_PRIVS,
        allow_only,
        landlock_files,
        prctl,
        seccomp_set_filter,
        set_capabilities,
    )

    for limit, value in ((resource.RLIMIT_NPROC, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_AS, _MEMORY)):
        resource.setrlimit(limit, (value, value))
    set_capabilities(())
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    try:
        readable = [os.path.dirname(os.path.realpath("/etc/resolv.conf"))]
        landlock_files(readable, LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | LANDLOCK_SCOPE_SIGNAL)
    except OSError:
        pass  # a kernel without Landlock: the filter still lets it open files to read only
    seccomp_set_filter(allow_only(_CALLS, os.uname().machine))


_MEMORY = 1 << 30  # bytes of address space
_CALLS = (
    *("epoll_wait", "epoll_pwait", "epoll_ctl", "recvfrom", "sendto", "recvmsg", "sendmsg", "splice", "read", "write"),
    *("accept4", "socket", "connect", "bind", "getsockname", "getpeername", "getsockopt", "setsockopt", "shutdown"),
    *("close", "fcntl", "ioctl", "pipe2", "openat", "newfstatat", "fstat", "lseek", "getrandom", "clock_gettime"),
    *("mmap", "munmap", "mremap", "brk", "madvise", "futex", "rt_sigreturn", "rt_sigprocmask", "rt_sigaction"),
    *("restart_syscall", "getpid", "exit_group"),
)
