"""TCP: a connection is held until the host's own has succeeded, so that it fails as that fails.

    SYN seen, kept from the kernel ──▶ connect() outside ──▶ succeeded: the same SYN again; accept(); both are joined
                                                        └──▶ failed: a reset, or an ICMP error; on a timeout nothing

A second copy of a SYN that waits replaces the first, for its timestamp. What never comes to be accepted (the client has
given up) ends the outer connection with a reset.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from devns_network import packets
from devns_network.loop import ERROR, EVERYTHING, IN, OUT, Loop
from devns_network.packets import Packet
from devns_network.policy import Policy, Target
from devns_network.relay import ABORT, Relay
from devns_network.wire import Wire

Connect = Callable[[tuple[str, int]], "tuple[socket.socket, int] | None"]  # from a peer to a socket and its errno

_PENDING_MAX = 1024
_CONNECTING = 150.0  # seconds; the kernel gives up before, tcp(7), tcp_syn_retries
_ACCEPTED_WITHIN = 10.0  # seconds
_AT_ONCE = 64
# What each error of connect() is to the client, as (type, code) of ICMP and of ICMPv6. On what is not here it hears
# nothing, and its own timer speaks.
UNREACHABLE = {
    errno.ENETUNREACH: ((3, 0), (1, 0)),
    errno.EHOSTUNREACH: ((3, 1), (1, 3)),
    errno.EACCES: ((3, 13), (1, 1)),
    errno.EPERM: ((3, 13), (1, 1)),
    errno.ECONNREFUSED: ((3, 3), (1, 4)),
}


class Pending:
    """A connection that one side has asked for and the other has not answered yet."""

    __slots__ = ("early", "key", "outer", "ready", "since", "syn")

    def __init__(self, key: bytes, syn: Packet, outer: socket.socket | None, since: float) -> None:
        self.key = key
        self.syn = syn
        self.outer = outer  # None: the engine itself is asked, for names
        self.since = since
        self.ready = False
        self.early = False  # the outer side has more to say already


class Tcp:
    def __init__(
        self,
        loop: Loop,
        wire: Wire,
        policy: Policy,
        relay: Relay,
        *,
        most: int,
        serve_names: Callable[[socket.socket], None],
    ) -> None:
        self._loop = loop
        self._wire = wire
        self._policy = policy
        self._relay = relay
        self._most = most  # connections at once
        self._carried = 0
        self._serve_names = serve_names
        self._pending: dict[bytes, Pending] = {}
        loop.every_tick(self._sweep)

    # --- from inside --------------------------------------------------------------------------------------------------

    def on_syn(self, syn: Packet) -> None:
        key = syn.source + syn.destination + syn.ports
        pending = self._pending.get(key)
        if pending is not None:
            pending.syn = syn
            if pending.ready:
                self._wire.send_again(syn)
            return
        if self._carried + len(self._pending) >= self._most:
            return
        if len(self._pending) >= _PENDING_MAX:
            # The one that has waited longest, for an answer that most come in milliseconds: its client tries again.
            self._give_up(next(iter(self._pending.values())))
        if syn.destination in self._policy.dns:
            if syn.port == 53:
                pending = self._pending[key] = Pending(key, syn, None, self._loop.now)
                self._let_in(pending)
            else:
                self._wire.send_back(packets.reset(syn), syn.source)
            return
        target = self._policy.target("tcp", syn.destination, syn.port, self._loop.now)
        if target is None:
            self._refuse(syn, errno.EACCES)
            return
        self._connect(key, syn, target)

    def _connect(self, key: bytes, syn: Packet, target: Target) -> None:
        try:
            outer = outer_socket(target[0], socket.SOCK_STREAM)
        except OSError:
            return  # no more descriptors: as if it were lost, for now
        number = outer.connect_ex(target[1:])
        if number not in (0, errno.EINPROGRESS):
            outer.close()
            self._refuse(syn, number)
            return
        pending = self._pending[key] = Pending(key, syn, outer, self._loop.now)
        self._loop.watch(outer, EVERYTHING, lambda events: self._on_connect(pending, outer, events))

    def _on_connect(self, pending: Pending, outer: socket.socket, events: int) -> None:
        if pending.ready:
            pending.early = True  # it waits until the other side is there
            return
        number = outer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events & ERROR else 0
        if number or not events & (OUT | IN):
            if events & ERROR:
                del self._pending[pending.key]
                self._refuse(pending.syn, number)
                self._loop.close(outer)
            return
        pending.early = bool(events & IN)
        prepare(outer)
        self._let_in(pending)

    def _let_in(self, pending: Pending) -> None:
        pending.ready = True
        pending.since = self._loop.now
        self._wire.send_again(pending.syn)

    def on_accept(self, listener: socket.socket, events: int) -> None:
        for _ in range(_AT_ONCE):
            try:
                inner, peer = listener.accept()
            except OSError:
                return
            inner.setblocking(False)
            try:
                key = self._key(inner, peer)
            except OSError:
                inner.close()  # reset already
                continue
            pending = self._pending.pop(key, None)
            if pending is None:
                inner.close()  # with a reset: who has asked for it, did not wait
            elif pending.outer is None:
                self._serve_names(inner)
            else:
                self._carry(inner, pending.outer, pending.early)

    @staticmethod
    def _key(inner: socket.socket, peer: tuple[str, int]) -> bytes:
        family = inner.family
        own: tuple[str, int] = inner.getsockname()
        ports = peer[1].to_bytes(2, "big") + own[1].to_bytes(2, "big")
        return socket.inet_pton(family, peer[0]) + socket.inet_pton(family, own[0]) + ports

    def _carry(self, inner: socket.socket, outer: socket.socket, early: bool) -> None:
        self._carried += 1
        self._relay.join(inner, outer, early, self._on_end)

    def _on_end(self) -> None:
        self._carried -= 1

    def _refuse(self, syn: Packet, number: int) -> None:
        if number in (errno.ECONNREFUSED, errno.ECONNRESET):
            self._wire.send_back(packets.reset(syn), syn.source)
        else:
            self._wire.report(syn, UNREACHABLE.get(number))

    # --- in the other direction, and by the environment's own loopback ------------------------------------------------

    def serve(self, listener: socket.socket, connect: Connect) -> None:
        """What `listener` accepts is carried to the socket that `connect` makes for the peer, with what connect_ex()
        said."""
        self._loop.watch(listener, IN, lambda events: self._on_outside(listener, connect))

    def _on_outside(self, listener: socket.socket, connect: Connect) -> None:
        for _ in range(_AT_ONCE):
            try:
                near, peer = listener.accept()
            except OSError:
                return
            near.setblocking(False)
            made = connect(peer) if self._carried < self._most else None
            if made is None or made[1] not in (0, errno.EINPROGRESS):
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
                near.close()
                if made is not None:
                    made[0].close()
                continue
            prepare(near)
            prepare(made[0])
            self._loop.watch(made[0], EVERYTHING, lambda events: None)
            self._carry(near, made[0], False)

    def _sweep(self) -> None:
        now = self._loop.now
        for pending in list(self._pending.values()):
            if now - pending.since > (_ACCEPTED_WITHIN if pending.ready else _CONNECTING):
                self._give_up(pending)

    def _give_up(self, pending: Pending) -> None:
        del self._pending[pending.key]
        if pending.outer is not None:
            self._loop.close(pending.outer)


def outer_socket(family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket of the host's network. IPv4 is never spoken through one of IPv6."""
    made = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return made


def prepare(connected: socket.socket) -> None:
    """As the connections that are accepted from inside: they inherit it from their listener."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)  # if this process is killed, both ends see a reset
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # the two ends no longer ask each other
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
