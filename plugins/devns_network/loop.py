"""The engine's event loop: one epoll, a callback for each descriptor, and what is done every half second."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable

IN, OUT, ENDED = select.EPOLLIN, select.EPOLLOUT, select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
ERROR = select.EPOLLERR
EVERYTHING = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET  # told once, when it changes

_TICK = 0.5  # seconds
_AT_ONCE = 256  # events

Callback = Callable[[int], None]  # told which events there are


class Loop:
    """`now` is the time of the turn, in seconds of the monotonic clock. What a callback raises ends the loop: each
    deals with what a stranger can make happen."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._ticks: list[Callable[[], None]] = []
        self._again: list[Callable[[], None]] = []
        self._closing: list[socket.socket] = []
        self._runs = True

    def watch(self, watched: socket.socket, events: int, callback: Callback) -> None:
        self._callbacks[watched.fileno()] = callback
        self._epoll.register(watched.fileno(), events)

    def hand_over(self, watched: socket.socket, callback: Callback) -> None:
        """From now on it is another's."""
        self._callbacks[watched.fileno()] = callback

    def change(self, watched: socket.socket, events: int) -> None:
        self._epoll.modify(watched.fileno(), events)

    def close(self, watched: socket.socket) -> None:
        """Watched no more, and closed at the end of the turn: an event of this turn must not be taken for one of the
        next socket with the same number."""
        self._callbacks.pop(watched.fileno(), None)  # closing it takes it out of the epoll, too
        self._closing.append(watched)

    def every_tick(self, callback: Callable[[], None]) -> None:
        self._ticks.append(callback)

    def soon(self, callback: Callable[[], None]) -> None:
        """In the next turn, after everybody else had theirs."""
        self._again.append(callback)

    def stop(self) -> None:
        self._runs = False

    def run(self) -> None:
        tick = self.now + _TICK
        while self._runs:
            events = self._epoll.poll(0 if self._again else _TICK, _AT_ONCE)
            self.now = now = time.monotonic()
            for fd, what in events:
                callback = self._callbacks.get(fd)
                if callback is not None:
                    callback(what)
            if self._again:
                again, self._again = self._again, []
                for turn in again:
                    turn()
            if now >= tick:
                tick = now + _TICK
                for due in self._ticks:
                    due()
            if self._closing:
                for closed in self._closing:
                    closed.close()
                self._closing.clear()
