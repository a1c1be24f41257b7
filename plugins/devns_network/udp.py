"""UDP: a pair of sockets for each flow, one inside, one outside; what is idle goes.

The first datagram of a flow comes to the socket that takes what nobody else does. From then on the kernel delivers the
flow to its own, connected socket by itself.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable

from devns_network import packets
from devns_network.loop import ENDED, IN, Loop
from devns_network.packets import Packet
from devns_network.policy import Policy
from devns_network.tcp import UNREACHABLE, outer_socket
from devns_network.wire import Wire

_FLOWS_MAX = 1024
_IDLE, _IDLE_TWO_WAY = 60.0, 180.0  # seconds. RFC 4787, 4.3, has two minutes as the least for a flow that is answered
_BUFFER = 1 << 16
_RECEIVE = 4 << 20  # bytes; the kernel gives what net.core.rmem_max allows
_AT_ONCE = 64
_ORIGINAL = (20, 74)  # IP_ORIGDSTADDR, IPV6_ORIGDSTADDR
_TTL = ((socket.IPPROTO_IP, socket.IP_TTL), (socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT))
_PROBING = 48  # hops: programs that trace a route begin with fewer, all others with 64 or more
_ERROR = struct.Struct("=IBBBxII")  # struct sock_extended_err, linux/errqueue.h
_FROM_ICMP = (2, 3)  # SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6


class Flow:
    __slots__ = ("answered", "head", "inner", "key", "outer", "used")

    def __init__(self, key: bytes, head: Packet, inner: socket.socket, outer: socket.socket, now: float) -> None:
        self.key = key
        self.head = head
        self.inner, self.outer = inner, outer
        self.used = now
        self.answered = False


class Udp:
    def __init__(self, loop: Loop, wire: Wire, policy: Policy, new_socket: Callable[[int], socket.socket]) -> None:
        self._loop = loop
        self._wire = wire
        self._policy = policy
        self._new_socket = new_socket
        self._flows: dict[bytes, Flow] = {}
        self._buffer = memoryview(bytearray(_BUFFER))
        loop.every_tick(self._sweep)

    def on_first(self, listener: socket.socket, events: int) -> None:
        """Datagrams of flows that there are not yet."""
        for _ in range(_AT_ONCE):
            try:
                data, ancillary, _flags, peer = listener.recvmsg(_BUFFER, 256)
            except OSError:
                return
            family = listener.family
            destination, port, ttl = b"", 0, 64
            for level, kind, value in ancillary:
                if kind in _ORIGINAL:
                    port = int.from_bytes(value[2:4], "big")
                    destination = value[4:8] if family == socket.AF_INET else value[8:24]
                elif (level, kind) in _TTL:
                    ttl = int.from_bytes(value[:4], "little")
            source = socket.inet_pton(family, peer[0])
            ports = peer[1].to_bytes(2, "big") + port.to_bytes(2, "big")
            self._begin(packets.datagram(source, destination, ports, len(data), ttl), data)

    def _begin(self, head: Packet, data: bytes) -> None:
        key = head.source + head.destination + head.ports
        flow = self._flows.get(key)
        if flow is None:
            if head.ttl <= 1:
                self._wire.report(head, ((11, 0), (3, 0)))  # time exceeded: the gateway is a hop
                return
            flow = self._open(key, head)
        if flow is not None:
            self._send(flow, data)

    def _open(self, key: bytes, head: Packet) -> Flow | None:
        target = self._policy.target("udp", head.destination, head.port, self._loop.now)
        if target is None:
            self._wire.report(head, UNREACHABLE[errno.EACCES])
            return None
        if len(self._flows) >= _FLOWS_MAX:
            self._close(min(self._flows.values(), key=lambda flow: flow.used))
        version = 4 if len(head.source) == 4 else 6
        outer = inner = None
        try:
            outer = outer_socket(target[0], socket.SOCK_DGRAM)
            outer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE)
            hear_errors(outer)
            if head.ttl < _PROBING:
                set_ttl(outer, head.ttl - 1)
            outer.connect(target[1:])
            inner = self._new_socket(version)
            inner.bind((socket.inet_ntop(inner.family, head.destination), head.port))
            inner.connect((socket.inet_ntop(inner.family, head.source), int.from_bytes(head.ports[:2], "big")))
        except OSError as error:
            for opened in (outer, inner):
                if opened is not None:
                    opened.close()
            self._wire.report(head, UNREACHABLE.get(error.errno or 0))
            return None
        flow = self._flows[key] = Flow(key, head, inner, outer, self._loop.now)
        self._loop.watch(inner, IN, lambda events: self._forth(flow))
        self._loop.watch(outer, IN, lambda events: self._back(flow, events))
        return flow

    def _send(self, flow: Flow, data: bytes) -> None:
        flow.used = self._loop.now
        try:
            flow.outer.send(data)
        except OSError as error:
            self._hear(flow, error)

    def _forth(self, flow: Flow) -> None:
        flow.used = self._loop.now
        buffer, receive, send = self._buffer, flow.inner.recv_into, flow.outer.send
        try:
            for _ in range(_AT_ONCE):
                count = receive(buffer)
                try:
                    send(buffer[:count])
                except BlockingIOError:
                    pass  # no room: lost, as on any wire
                except OSError as error:
                    self._hear(flow, error)
        except OSError:
            return  # BlockingIOError: that was all; ECONNREFUSED: the client is gone

    def _back(self, flow: Flow, events: int) -> None:
        flow.used = self._loop.now
        flow.answered = True
        if events & ENDED:
            self._hear(flow, None)
        buffer, receive, send = self._buffer, flow.outer.recv_into, flow.inner.send
        for _ in range(_AT_ONCE):
            try:
                count = receive(buffer)
            except BlockingIOError:
                return
            except OSError as error:
                self._hear(flow, error)
                return
            try:
                send(buffer[:count])
            except OSError:
                pass  # no room, or nobody there any more

    def _hear(self, flow: Flow, error: OSError | None) -> None:
        """Hand on what the network has said about the flow's datagrams."""
        for kind, code, rest, reporter in errors_of(flow.outer):
            if reporter is not None and len(reporter) == len(flow.head.source):
                self._wire.report(flow.head, ((kind, code), (kind, code)), reporter, rest)
            else:  # from the other family: a port of the host's loopback
                self._wire.report(flow.head, UNREACHABLE[errno.ECONNREFUSED])
        if error is not None and error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EPERM):
            self._wire.report(flow.head, UNREACHABLE[error.errno])

    def _close(self, flow: Flow) -> None:
        del self._flows[flow.key]
        self._loop.close(flow.inner)
        self._loop.close(flow.outer)

    def _sweep(self) -> None:
        now = self._loop.now
        for flow in list(self._flows.values()):
            if now - flow.used > (_IDLE_TWO_WAY if flow.answered else _IDLE):
                self._close(flow)


# --- errors of the network: ip(7), IP_RECVERR -------------------------------------------------------------------------


def hear_errors(outer: socket.socket) -> None:
    """Keep what ICMP says about what this socket sends, with who said it."""
    if outer.family == socket.AF_INET:
        outer.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
    else:
        outer.setsockopt(socket.IPPROTO_IPV6, 25, 1)  # IPV6_RECVERR


def set_ttl(outer: socket.socket, hops: int) -> None:
    if outer.family == socket.AF_INET:
        outer.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, hops)
    else:
        outer.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, hops)


def errors_of(outer: socket.socket) -> list[tuple[int, int, int, bytes | None]]:
    """The errors that were kept: type, code, the size that fits or 0, and the address of who said so."""
    found: list[tuple[int, int, int, bytes | None]] = []
    for _ in range(_AT_ONCE):
        try:
            _data, ancillary, _flags, _peer = outer.recvmsg(64, 512, socket.MSG_ERRQUEUE)
        except OSError:
            break
        for _level, kind, value in ancillary:
            if kind in (11, 25) and len(value) >= _ERROR.size:
                _number, origin, type_, code, info, _extra = _ERROR.unpack_from(value)
                if origin in _FROM_ICMP:
                    is_too_big = (origin, type_, code) == (2, 3, 4) or (origin, type_) == (3, 2)
                    found.append((type_, code, info if is_too_big else 0, _offender(value[_ERROR.size :])))
    return found


def _offender(address: bytes) -> bytes | None:
    """Who sent the error: a struct sockaddr_in or sockaddr_in6."""
    family = int.from_bytes(address[:2], "little")
    if family == socket.AF_INET:
        return address[4:8]
    return address[8:24] if family == socket.AF_INET6 else None
