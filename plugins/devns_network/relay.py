"""Bytes between two connected sockets, both ways, until both have ended: what one end does, the other end sees.

A direction is copied at first, and moved by splice(2) through a pipe once a whole buffer came at once. Events are told
once, when something changes, so each direction goes on until there is nothing to read or no room to write. Reading
stops while the other side has no room: that is all there is of flow control, and it is enough.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable

from devns_network.loop import ENDED, EVERYTHING, IN, OUT, Loop

ABORT, GRACE = b"\1\0\0\0" + bytes(4), bytes(8)  # struct linger: close with a reset, or after all has been sent

_BUFFER = 1 << 16
_SIP = 1 << 12  # what is read at a time while too much waits already
_WAITING = 16 << 20  # bytes that were read and cannot be written yet, of all connections together
# A fragment of a socket's queue takes one slot of a pipe, however small it is: the 16 slots of an ordinary pipe move
# little at a time. 256 of them halve the processor time for each byte.
_PIPE = 1 << 20
_F_SETPIPE_SZ = 1031  # linux/fcntl.h; fcntl.F_SETPIPE_SZ since Python 3.10, where its C library knew it
_PIPES = 48  # in use at once; each user may have 64 MiB of them, pipe(7)
_SPARE = 16
_TURN = 16  # rounds before others have theirs
_NONE = (-1, -1)  # no pipe
_MOVE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Half:
    """One direction of a connection."""

    __slots__ = (
        *("bulk", "ended", "link", "other", "pipe", "piped", "sink", "sink_fd", "source", "source_fd", "waiting"),
    )

    def __init__(self, link: Link, source: socket.socket, sink: socket.socket) -> None:
        self.link = link
        self.source, self.source_fd = source, source.fileno()
        self.sink, self.sink_fd = sink, sink.fileno()
        self.pipe = _NONE
        self.piped = 0  # bytes in the pipe
        self.waiting = b""  # bytes that were read, and had no room
        self.ended = False
        self.bulk = False
        self.other: Half


class Link:
    """Two sockets that are one connection."""

    __slots__ = ("back", "dead", "forth", "inner", "on_end", "outer")

    def __init__(self, inner: socket.socket, outer: socket.socket, on_end: Callable[[], None]) -> None:
        self.inner, self.outer = inner, outer
        self.forth, self.back = Half(self, inner, outer), Half(self, outer, inner)
        self.forth.other, self.back.other = self.back, self.forth
        self.dead = False
        self.on_end = on_end


class Relay:
    """All connections that are carried, with the buffer and the pipes they share."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._buffer = memoryview(bytearray(_BUFFER))
        self._waiting = 0
        self._spare: list[tuple[int, int]] = []
        self._pipes = 0

    def join(self, inner: socket.socket, outer: socket.socket, early: bool, on_end: Callable[[], None]) -> None:
        """Carry what comes between the two, until `on_end` is called. `outer` is watched already; `early` says that
        something has been told of it, which is told once."""
        link = Link(inner, outer, on_end)
        forth, back = link.forth, link.back
        self._loop.hand_over(outer, lambda events: self._on_events(back, forth, events))
        self._loop.watch(inner, EVERYTHING, lambda events: self._on_events(forth, back, events))
        if early:
            self._pump(back)

    def _on_events(self, reading: Half, writing: Half, events: int) -> None:
        # Reading first: what arrived before a reset is delivered before it.
        if events & (IN | ENDED):
            self._pump(reading, told_more=bool(events & ENDED))
        if events & OUT and (writing.piped or writing.waiting):
            self._pump(writing)

    def _pump(self, half: Half, told_more: bool = True) -> None:
        """Move what can be moved. With `told_more` false a short read means that all has been read."""
        if half.ended or half.link.dead:
            return
        try:
            for _ in range(_TURN):
                if half.piped:
                    half.piped -= os.splice(half.pipe[0], half.sink_fd, half.piped, flags=_MOVE)
                    if not half.piped:
                        self._give_back(half)
                    continue
                if half.waiting:
                    self._send_waiting(half)
                    continue
                moves = half.bulk and self._pipes < _PIPES
                count = self._splice_in(half) if moves else self._copy(half)
                if not count:
                    self._end(half)
                    return
                if not (moves or told_more or half.waiting) and self._is_short(count):
                    return
            self._loop.soon(lambda: self._pump(half))
        except BlockingIOError:
            pass
        except OSError:
            self._abort(half)

    def _copy(self, half: Half) -> int:
        buffer = self._buffer if self._waiting < _WAITING else self._buffer[:_SIP]
        count = half.source.recv_into(buffer)
        if count:
            try:
                sent = half.sink.send(buffer[:count])
            except BlockingIOError:
                sent = 0
            if sent < count:
                half.waiting = bytes(buffer[sent:count])
                self._waiting += count - sent
            half.bulk = half.bulk or count == _BUFFER
        return count

    def _is_short(self, count: int) -> bool:
        return count < (_BUFFER if self._waiting < _WAITING else _SIP)

    def _send_waiting(self, half: Half) -> None:
        sent = half.sink.send(half.waiting)
        half.waiting = half.waiting[sent:]
        self._waiting -= sent

    def _splice_in(self, half: Half) -> int:
        half.pipe = self._spare.pop() if self._spare else self._new_pipe()
        self._pipes += 1
        try:
            half.piped = os.splice(half.source_fd, half.pipe[1], _PIPE, flags=_MOVE)
        finally:
            if not half.piped:
                self._give_back(half)
        return half.piped

    def _new_pipe(self) -> tuple[int, int]:
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.fcntl(write, _F_SETPIPE_SZ, _PIPE)
        except OSError:
            pass  # the user has too many large ones: an ordinary one is slower
        return read, write

    def _give_back(self, half: Half) -> None:
        """An empty pipe goes to who needs one next: a connection that is idle holds none."""
        pipe, half.pipe = half.pipe, _NONE
        self._pipes -= 1
        if len(self._spare) < _SPARE and not half.piped:
            self._spare.append(pipe)
        else:
            os.close(pipe[0])
            os.close(pipe[1])

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end(self, half: Half) -> None:
        """One side says no more, and may still listen."""
        half.ended = True
        if half.other.ended:
            self._close(half.link, GRACE)
        else:
            half.sink.shutdown(socket.SHUT_WR)

    def _abort(self, half: Half) -> None:
        """One side was reset. What the other direction has received is delivered first, as far as there is room."""
        other = half.other
        try:
            while not (other.piped or other.waiting or other.ended):
                count = other.source.recv_into(self._buffer)
                if not count:
                    break
                other.sink.send(self._buffer[:count])
        except OSError:
            pass
        self._close(half.link, ABORT)

    def _close(self, link: Link, how: bytes) -> None:
        if link.dead:
            return
        link.dead = True
        for half in (link.forth, link.back):
            self._waiting -= len(half.waiting)
            if half.pipe is not _NONE:
                self._give_back(half)
        for end in (link.inner, link.outer):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, how)
            self._loop.close(end)
        link.on_end()
