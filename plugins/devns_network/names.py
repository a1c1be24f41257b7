"""Names: a forwarder at 10.0.2.3, over UDP and TCP, to whatever resolver the host uses at the time. RFC 1035, RFC 5625

A question goes on as it came, but with a number of our own and from a socket of its own that is connected to the
resolver, so that nobody else can answer. Where the template says which names may be used, the others do not exist, and
the addresses of an allowed one are open while the answer holds.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial

from devns_network.loop import IN, OUT, Loop
from devns_network.policy import Policy
from devns_network.tcp import outer_socket

_RESOLV_CONF = "/etc/resolv.conf"
_SERVERS_MAX = 3  # MAXNS, resolv.conf(5)
_NEXT_AFTER = 2.0  # seconds until the next server is asked
_GIVEN_UP_AFTER = 8.0  # seconds
_ASKED_MAX = 256  # questions at once
_STREAMS_MAX = 64
_STREAM_IDLE = 30.0  # seconds
_AT_ONCE = 64
_LARGEST = 1 << 16
_TRANSFERS = (251, 252)  # IXFR, AXFR: a whole zone is no question of a program
_CNAME, _ADDRESSES = 5, {1: 4, 28: 16}  # A and AAAA, and how long they are
_SERVFAIL, _NXDOMAIN, _NOTIMP, _REFUSED = 2, 3, 4, 5

Answer = Callable[[bytes], None]


class Malformed(Exception):
    """No message as RFC 1035 has them."""


# --- messages ---------------------------------------------------------------------------------------------------------


def question(message: bytes) -> tuple[str, int, int]:
    """The one question of a query: its name, its type, and where it ends."""
    if len(message) < 17 or message[2] & 0xF8 or message[4:6] != b"\0\1":  # a response, another operation, not one
        raise Malformed
    name, place = _name(message, 12)
    if place + 4 > len(message):
        raise Malformed
    return name, int.from_bytes(message[place : place + 2], "big"), place + 4


def addresses(message: bytes) -> tuple[list[str], list[tuple[bytes, int]]]:
    """What an answer says of its question's name: all names it goes by, and its addresses with the shortest ttl on the
    way to them. Records of other names count for nothing."""
    if len(message) < 17 or not message[2] & 0x80 or message[4:6] != b"\0\1":
        raise Malformed
    name, place = _name(message, 12)
    names, place, ttl = [name], place + 4, 1 << 31
    aliases: dict[str, tuple[str, int]] = {}
    found: list[tuple[str, bytes, int]] = []
    for _ in range(int.from_bytes(message[6:8], "big")):
        owner, place = _name(message, place)
        if place + 10 > len(message):
            raise Malformed
        kind, lives = (
            int.from_bytes(message[place : place + 2], "big"),
            int.from_bytes(message[place + 4 : place + 8], "big"),
        )
        start, end = place + 10, place + 10 + int.from_bytes(message[place + 8 : place + 10], "big")
        if end > len(message):
            raise Malformed
        if kind == _CNAME:
            aliases[owner] = _name(message, start)[0], lives
        elif _ADDRESSES.get(kind) == end - start:
            found.append((owner, message[start:end], lives))
        place = end
    while names[-1] in aliases and len(names) <= len(aliases):
        alias, lives = aliases[names[-1]]
        names.append(alias)
        ttl = min(ttl, lives)
    return names, [(address, min(ttl, lives)) for owner, address, lives in found if owner == names[-1]]


def failure(query: bytes, code: int) -> bytes:
    """An answer that says no more than why there is none."""
    try:
        end = question(query)[2]
    except Malformed:
        end = 12
    counts = b"\0\1" if end > 12 else b"\0\0"
    return query[:2] + bytes([0x80 | query[2] & 0x79, 0x80 | code]) + counts + bytes(6) + query[12:end]


def _name(message: bytes, place: int) -> tuple[str, int]:
    """A name, in lower case, and where it ends. Pointers only ever lead backwards. RFC 1035, 4.1.4"""
    labels: list[bytes] = []
    after, bound = 0, place
    while True:
        if place >= len(message):
            raise Malformed
        length = message[place]
        if length >= 0xC0:
            after = after or place + 2
            place = int.from_bytes(message[place : place + 2], "big") & 0x3FFF
            if place >= bound:
                raise Malformed
            bound = place
        elif length > 63 or place + 1 + length > len(message) or len(labels) > 128:
            raise Malformed
        elif length:
            labels.append(message[place + 1 : place + 1 + length])
            place += 1 + length
        else:
            return b".".join(labels).decode("latin-1").lower(), after or place + 1


# --- the host's resolvers ---------------------------------------------------------------------------------------------


class Resolvers:
    """The servers of the host's resolv.conf, as it is now: it changes with the network that a laptop is in."""

    def __init__(self, path: str = _RESOLV_CONF) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._servers: list[tuple[int, tuple[str, int]]] = []

    def now(self) -> list[tuple[int, tuple[str, int]]]:
        """Family and address of each; the host itself where none is said, as resolv.conf(5) has it."""
        try:
            status = os.stat(self._path)
            seen = status.st_ino, status.st_mtime_ns
            if seen != self._seen:
                with open(self._path, encoding="utf-8", errors="replace") as file:
                    self._servers = _servers(file.read(1 << 16))
                self._seen = seen
        except OSError:
            self._seen, self._servers = None, []
        return self._servers or [(socket.AF_INET, ("127.0.0.1", 53))]


def _servers(text: str) -> list[tuple[int, tuple[str, int]]]:
    found: list[tuple[int, tuple[str, int]]] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        address, _, _scope = words[1].partition("%")
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                socket.inet_pton(family, address)
            except OSError:
                continue
            found.append((family, (words[1], 53)))
    return found[:_SERVERS_MAX]


# --- the forwarder ----------------------------------------------------------------------------------------------------


class Asked:
    """A question on its way: whom it was sent to, and what comes when that one says nothing."""

    __slots__ = ("answer", "began", "number", "outer", "query", "sent", "servers", "stream", "taken", "waiting")

    def __init__(self, query: bytes, answer: Answer, servers: list[tuple[int, tuple[str, int]]], now: float) -> None:
        self.query = query
        self.answer = answer
        self.servers = servers  # those that were not asked yet
        self.began = self.sent = now
        self.number = b""
        self.outer: socket.socket | None = None
        self.stream = False
        self.waiting = b""  # of a stream: what is still to be sent,
        self.taken = b""  # and what has been received


class Forwarder:
    def __init__(self, loop: Loop, policy: Policy, resolvers: Resolvers) -> None:
        self._loop = loop
        self._policy = policy
        self._resolvers = resolvers
        self._asked: set[Asked] = set()
        self._streams: dict[socket.socket, Stream] = {}
        loop.every_tick(self._sweep)

    def on_datagram(self, listener: socket.socket, events: int) -> None:
        for _ in range(_AT_ONCE):
            try:
                query, peer = listener.recvfrom(_LARGEST)
            except OSError:
                return
            self.ask(query, partial(self._reply, listener, peer), stream=False)

    @staticmethod
    def _reply(listener: socket.socket, peer: tuple[str, int], answer: bytes) -> None:
        try:
            listener.sendto(answer, peer)
        except OSError:
            pass  # lost, as any datagram may be

    def serve(self, inner: socket.socket) -> None:
        """A connection to the forwarder. RFC 7766"""
        if len(self._streams) >= _STREAMS_MAX:
            inner.close()
            return
        self._streams[inner] = stream = Stream(inner, self._loop.now)
        self._loop.watch(inner, IN, lambda events: self._on_stream(stream))

    def ask(self, query: bytes, answer: Answer, *, stream: bool) -> None:
        try:
            name, kind, _end = question(query)
        except Malformed:
            return  # who sends that waits for nothing
        ports = self._policy.ports_of(name)
        if not ports:
            self._policy.remember_name(name)
            answer(failure(query, _NXDOMAIN))
        elif kind in _TRANSFERS:
            answer(failure(query, _REFUSED))
        elif len(self._asked) >= _ASKED_MAX:
            answer(failure(query, _SERVFAIL))
        else:
            asked = Asked(query, answer, list(self._resolvers.now()), self._loop.now)
            asked.stream = stream
            self._asked.add(asked)
            self._ask_next(asked, _SERVFAIL)

    def _ask_next(self, asked: Asked, code: int) -> None:
        """Ask the next server; where there is none left, the answer is `code`."""
        self._drop(asked)
        while asked.servers:
            family, address = asked.servers.pop(0)
            try:
                outer = asked.outer = outer_socket(family, socket.SOCK_STREAM if asked.stream else socket.SOCK_DGRAM)
                asked.number = os.urandom(2)
                asked.sent = self._loop.now
                query = asked.number + asked.query[2:]
                if asked.stream:
                    asked.waiting, asked.taken = len(query).to_bytes(2, "big") + query, b""
                    outer.connect_ex(address)
                    self._loop.watch(outer, OUT, partial(self._on_server_stream, asked, outer))
                else:
                    outer.connect(address)
                    outer.send(query)
                    self._loop.watch(outer, IN, partial(self._on_answer, asked, outer))
                return
            except OSError:
                self._drop(asked)
        if asked.stream:  # there are resolvers that speak UDP alone: what they say is better than nothing
            asked.stream, asked.servers = False, list(self._resolvers.now())
            self._ask_next(asked, code)
        else:
            self._finish(asked, failure(asked.query, code))

    def _on_answer(self, asked: Asked, outer: socket.socket, events: int) -> None:
        try:
            answer = outer.recv(_LARGEST)
        except BlockingIOError:
            return
        except OSError:
            self._ask_next(asked, _SERVFAIL)
            return
        self._take(asked, answer)

    def _on_server_stream(self, asked: Asked, outer: socket.socket, events: int) -> None:
        try:
            if asked.waiting:
                asked.waiting = asked.waiting[outer.send(asked.waiting) :]
                if not asked.waiting:
                    self._loop.change(outer, IN)
                return
            data = outer.recv(_LARGEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._ask_next(asked, _SERVFAIL)
            return
        asked.taken += data
        if len(asked.taken) >= 2 + int.from_bytes(asked.taken[:2], "big"):
            self._take(asked, asked.taken[2 : 2 + int.from_bytes(asked.taken[:2], "big")])

    def _take(self, asked: Asked, answer: bytes) -> None:
        end = question(asked.query)[2]
        if answer[:2] != asked.number or answer[12:end].lower() != asked.query[12:end].lower():
            return  # of another question: the answer may still come
        code = answer[3] & 0xF
        if code in (_SERVFAIL, _NOTIMP, _REFUSED) and asked.servers:
            self._ask_next(asked, code)
            return
        try:
            allowed = self._learn(answer)
        except Malformed:
            allowed = not self._policy.deny_names
        self._finish(asked, asked.query[:2] + answer[2:] if allowed else failure(asked.query, _NXDOMAIN))

    def _learn(self, answer: bytes) -> bool:
        """Whether none of the names that a name leads to is denied; if so, its addresses are known from now on."""
        names, found = addresses(answer)
        if any(self._policy.deny_names.ports(name) for name in names):
            self._policy.remember_name(names[0])
            return False
        ports = self._policy.ports_of(names[0])
        for address, ttl in found:
            self._policy.learn(ports, address, ttl, self._loop.now)
        return True

    def _finish(self, asked: Asked, answer: bytes) -> None:
        self._drop(asked)
        self._asked.discard(asked)
        asked.answer(answer)

    def _drop(self, asked: Asked) -> None:
        outer, asked.outer = asked.outer, None
        if outer is not None:
            self._loop.close(outer)

    # --- connections --------------------------------------------------------------------------------------------------

    def _on_stream(self, stream: Stream) -> None:
        try:
            data = stream.inner.recv(_LARGEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end_stream(stream)
            return
        stream.used = self._loop.now
        stream.taken += data
        while len(stream.taken) >= 2:
            end = 2 + int.from_bytes(stream.taken[:2], "big")
            if len(stream.taken) < end:
                return
            query, stream.taken = stream.taken[2:end], stream.taken[end:]
            self.ask(query, partial(self._reply_stream, stream), stream=True)

    def _reply_stream(self, stream: Stream, answer: bytes) -> None:
        if stream.inner not in self._streams:
            return
        try:
            sent = stream.inner.send(len(answer).to_bytes(2, "big") + answer)
        except OSError:
            sent = 0
        if sent < 2 + len(answer):  # who does not read what was asked for
            self._end_stream(stream)

    def _end_stream(self, stream: Stream) -> None:
        if self._streams.pop(stream.inner, None) is not None:
            stream.inner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
            self._loop.close(stream.inner)

    def _sweep(self) -> None:
        now = self._loop.now
        for asked in list(self._asked):
            if now - asked.began > _GIVEN_UP_AFTER:
                self._finish(asked, failure(asked.query, _SERVFAIL))
            elif now - asked.sent > _NEXT_AFTER and asked.servers:
                self._ask_next(asked, _SERVFAIL)
        for stream in list(self._streams.values()):
            if now - stream.used > _STREAM_IDLE:
                self._end_stream(stream)


class Stream:
    """A program's connection to the forwarder."""

    __slots__ = ("inner", "taken", "used")

    def __init__(self, inner: socket.socket, now: float) -> None:
        self.inner = inner
        self.taken = b""
        self.used = now
