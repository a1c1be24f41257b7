"""Echo requests: answered when, and only when, the host's own was. A dead address stays dead, the time is the real one.

By the host's sockets for echo requests, where its net.ipv4.ping_group_range lets the user have them; else the answer is
"prohibited", and no silence. icmp(7)
"""

from __future__ import annotations

import errno
import socket

from devns_network import packets
from devns_network.loop import ENDED, IN, Loop
from devns_network.packets import ICMP, ICMPV6, Packet
from devns_network.policy import Policy
from devns_network.tcp import UNREACHABLE, outer_socket
from devns_network.udp import errors_of, hear_errors, set_ttl
from devns_network.wire import Wire

_SOCKETS_MAX = 128
_IDLE = 10.0  # seconds
_AT_ONCE = 64
_REMEMBERED = 64  # requests of one program that are not answered yet


class Echo:
    """The requests of one program to one address."""

    __slots__ = ("key", "outer", "requests", "ttl", "used")

    def __init__(self, key: bytes, outer: socket.socket, now: float) -> None:
        self.key = key
        self.outer = outer
        self.ttl = 0
        self.used = now
        self.requests: dict[bytes, Packet] = {}  # by sequence number


class Ping:
    def __init__(self, loop: Loop, wire: Wire, policy: Policy) -> None:
        self._loop = loop
        self._wire = wire
        self._policy = policy
        self._echoes: dict[bytes, Echo] = {}
        loop.every_tick(self._sweep)

    def on_request(self, request: Packet) -> None:
        if request.ttl <= 1:
            self._wire.report(request, ((11, 0), (3, 0)))  # time exceeded: the gateway is a hop
        elif self._policy.is_gateway(request.destination):
            self._wire.send_back(packets.echo_reply(request, request.body[6:]), request.source)
        else:
            self._send(request)

    def _send(self, request: Packet) -> None:
        key = request.source + request.destination + request.body[4:6]
        echo = self._echoes.get(key)
        try:
            if echo is None:
                echo = self._open(key, request)
            if echo is None:
                return
            if echo.ttl != request.ttl:
                set_ttl(echo.outer, request.ttl - 1)
                echo.ttl = request.ttl
            echo.used = self._loop.now
            echo.requests[request.body[6:8]] = request
            if len(echo.requests) > _REMEMBERED:
                del echo.requests[next(iter(echo.requests))]
            echo.outer.send(request.body[:2] + bytes(2) + request.body[4:])
        except OSError as error:
            self._wire.report(request, UNREACHABLE.get(error.errno or 0))

    def _open(self, key: bytes, request: Packet) -> Echo | None:
        name = "icmp" if request.protocol == ICMP else "icmpv6"
        target = self._policy.target(name, request.destination, 0, self._loop.now)
        if target is None:
            raise PermissionError(errno.EACCES, "closed")
        if len(self._echoes) >= _SOCKETS_MAX:
            self._close(min(self._echoes.values(), key=lambda echo: echo.used))
        outer = outer_socket(target[0], socket.SOCK_DGRAM, ICMP if request.protocol == ICMP else ICMPV6)
        try:
            hear_errors(outer)
            outer.connect((target[1], 0))
        except OSError:
            outer.close()
            raise
        echo = self._echoes[key] = Echo(key, outer, self._loop.now)
        self._loop.watch(outer, IN, lambda events: self._on_reply(echo, events))
        return echo

    def _on_reply(self, echo: Echo, events: int) -> None:
        if events & ENDED and echo.requests:
            about = next(reversed(echo.requests.values()))
            for kind, code, rest, reporter in errors_of(echo.outer):
                self._wire.report(about, ((kind, code), (kind, code)), reporter, rest)
        for _ in range(_AT_ONCE):
            try:
                reply = echo.outer.recv(1 << 16)
            except OSError:
                return
            request = echo.requests.pop(reply[6:8], None)
            if request is not None:  # the identifier is the socket's own; the program's comes back
                self._wire.send_back(packets.echo_reply(request, reply[6:]), request.source)

    def _close(self, echo: Echo) -> None:
        del self._echoes[echo.key]
        self._loop.close(echo.outer)

    def _sweep(self) -> None:
        for echo in list(self._echoes.values()):
            if self._loop.now - echo.used > _IDLE:
                self._close(echo)
