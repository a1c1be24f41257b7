"""Downloads: into a cache whose files are named by their SHA-256, hashed while they arrive, eight at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import queue
import select
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from devns.debian.errors import Untrusted
from devns.debian.mirrors import Route, hide
from devns.debian.transport import NoSuchPart, Session
from devns.errors import DevnsError, Unsupported

CONNECTIONS = 8
_BLOCK = 1 << 20
_ELSEWHERE = "the mirror is being updated, or broken: try again later, or another mirror"


@dataclass(frozen=True)
class Wanted:
    """A file to be had: where, of which size and hash, and the path in the cache where it goes."""

    url: str
    path: str
    size: int
    sha256: str


class Downloads:
    """Files on their way into the cache, the largest first, by threads of its own: a context manager.

    Whoever waits for other things too polls `fileno()`, and calls `take` when it is readable. The first error stops
    everything and is raised by `take`; what is complete by then stays in the cache. Nothing may fork meanwhile.
    """

    def __init__(
        self,
        wanted: Sequence[Wanted],
        route: Route,
        *,
        advance: Callable[[int], None] = lambda count: None,
        ready: Callable[[Wanted], None] = lambda file: None,
        connections: int = CONNECTIONS,
    ) -> None:
        """`advance` is told bytes and `ready` each file as it is complete and verified, both by `take`."""
        self.left = len(wanted)
        self._advance = advance
        self._ready = ready
        self._jobs: queue.SimpleQueue[Wanted] = queue.SimpleQueue()
        for file in sorted(wanted, key=lambda file: -file.size):
            self._jobs.put(file)
        self._news: queue.SimpleQueue[int | Wanted | BaseException] = queue.SimpleQueue()
        self._sessions = [Session(route) for _ in range(min(connections, len(wanted)))]
        self._threads: list[threading.Thread] = []
        self._telling = threading.Lock()  # a thread left behind must not write where another file is open by then
        self._directory = os.path.dirname(wanted[0].path) if wanted else ""

    def __enter__(self) -> Downloads:
        self._ear, self._mouth = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for session in self._sessions:
            self._threads.append(threading.Thread(target=self._work, args=(session,), daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        while not self._jobs.empty():
            with contextlib.suppress(queue.Empty):
                self._jobs.get_nowait()
        for session in self._sessions:
            session.stop()
        for thread in self._threads:
            thread.join(timeout=1.0)  # one that still looks for an address is left behind
        os.close(self._ear)
        with self._telling:
            os.close(self._mouth)
            self._mouth = -1

    def fileno(self) -> int:
        return self._ear

    def wait(self) -> None:
        """Until all are there."""
        poll = select.poll()
        poll.register(self._ear, select.POLLIN)
        while self.left:
            poll.poll()
            self.take()

    def take(self) -> bool:
        """Deal with what has come since; true when nothing more will."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._ear, 1 << 16)  # before the queue is emptied: who adds to it afterwards wakes us again
        with contextlib.suppress(queue.Empty):
            while True:
                said = self._news.get_nowait()
                if isinstance(said, BaseException):
                    raise said
                if isinstance(said, Wanted):
                    self.left -= 1
                    self._ready(said)
                else:
                    self._advance(said)
        return not self.left

    def _tell(self, news: int | Wanted | BaseException) -> None:
        self._news.put(news)
        with self._telling, contextlib.suppress(BlockingIOError):  # full: it will be woken anyway
            if self._mouth >= 0:
                os.write(self._mouth, b"!")

    def _work(self, session: Session) -> None:
        try:
            with session:
                while True:
                    file = self._jobs.get_nowait()
                    fetch(file, session, advance=self._tell)
                    self._tell(file)
        except queue.Empty:
            return
        except OSError as error:
            self._tell(on_disk(error, self._directory))
        except BaseException as error:
            self._tell(error)


def fetch(wanted: Wanted, session: Session, *, advance: Callable[[int], None] = lambda count: None) -> None:
    """Have one file in the cache.

    A file that is there is believed only after it was hashed. Of two processes that want the same one, one fetches and
    the other waits. What an interrupted download left is used, and only the rest fetched; as the whole is hashed in
    the end, two versions can't be spliced.
    """
    if is_good(wanted):
        advance(wanted.size)
        return
    os.makedirs(os.path.dirname(wanted.path), mode=0o700, exist_ok=True)
    with _locked(wanted.path + ".part", session) as (fd, path):
        if not is_good(wanted):
            part = _Part(fd, wanted, advance)
            part.adopt()
            session.retry(wanted.url, lambda: _complete(part, session))
            os.rename(path, wanted.path)
            return
        os.unlink(path)  # another process had it meanwhile
    advance(wanted.size)


def on_disk(error: OSError, directory: str) -> Unsupported:
    """What an error of the cache's file system means to the one who reads it."""
    where = os.fsdecode(error.filename) if error.filename else directory
    return Unsupported(f"{where}: {error.strerror or error}", hint="is there room left, and may you write there?")


def is_good(wanted: Wanted) -> bool:
    """Whether the cache has this file, byte for byte. Its name proves nothing: disks rot, and others may write."""
    try:
        fd = os.open(wanted.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    with open(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != wanted.size:
            return False
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
        return digest.hexdigest() == wanted.sha256


class _Part:
    """A file on its way: what is on disk of it, and the hash of that."""

    def __init__(self, fd: int, wanted: Wanted, advance: Callable[[int], None]) -> None:
        self.fd = fd
        self.wanted = wanted
        self.advance = advance
        self.length = 0
        self.digest = hashlib.sha256()
        self.tag: str | None = None
        self.pieces = 0  # answers that are in it
        self._told = 0

    def adopt(self) -> None:
        """Go on with what an interrupted process left."""
        while block := os.pread(self.fd, _BLOCK, self.length):
            self._count(block)
        self.pieces = 1 if self.length else 0
        if self.length >= self.wanted.size:  # as long as it should be, and still no cache file: it was a wrong one
            self.restart()

    def restart(self) -> None:
        os.ftruncate(self.fd, 0)
        self.length, self.digest, self.tag, self.pieces = 0, hashlib.sha256(), None, 0

    def write(self, block: bytes) -> None:
        if self.length + len(block) > self.wanted.size:
            self.restart()
            raise Untrusted(f"{hide(self.wanted.url)}: more than the {self.wanted.size} bytes promised")
        rest = memoryview(block)
        try:
            while rest:
                rest = rest[os.pwrite(self.fd, rest, self.length + len(block) - len(rest)) :]
        except OSError as error:  # not the network's, which is tried again
            raise on_disk(error, self.wanted.path) from error
        self._count(block)

    def _count(self, block: bytes) -> None:
        self.digest.update(block)
        self.length += len(block)
        if self.length > self._told:  # after a restart the same bytes don't count again
            self.advance(min(self.length, self.wanted.size) - self._told)
            self._told = min(self.length, self.wanted.size)


def _complete(part: _Part, session: Session) -> None:
    """Fetch what is missing; if the whole is wrong and was pieced together, all of it again."""
    wanted = part.wanted
    while True:
        try:
            with session.open(wanted.url, size=wanted.size, start=part.length, tag=part.tag) as answer:
                if answer.start != part.length:
                    part.restart()
                part.tag, part.pieces = answer.tag, part.pieces + 1
                total = wanted.size if answer.length is None else answer.start + answer.length
                if total != wanted.size:
                    part.restart()
                    raise Untrusted(
                        f"{hide(wanted.url)}: the server has {total} bytes of it, the index promises {wanted.size}",
                        hint=_ELSEWHERE,
                    )
                for block in answer.blocks:
                    part.write(block)
        except NoSuchPart:
            part.restart()
            continue
        found, length, pieces = part.digest.hexdigest(), part.length, part.pieces
        if length == wanted.size and found == wanted.sha256:
            return
        part.restart()
        if pieces < 2:
            what = f"SHA-256 {found} instead of {wanted.sha256}" if length == wanted.size else f"only {length} bytes"
            raise Untrusted(
                f"{hide(wanted.url)}: not the file that was promised: {what}",
                hint=_ELSEWHERE,
            )


@contextlib.contextmanager
def _locked(path: str, session: Session) -> Iterator[tuple[int, str]]:
    """The file `path`, open and nobody else's, and its path; waits for a process that has it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        fd = os.open(path, flags, 0o600)
        try:
            if _lock(fd) and _is_same(fd, path):
                yield fd, path
                return
        finally:
            os.close(fd)
        if session.stopped:
            raise DevnsError(f"{path}: stopped while another process had it")
        time.sleep(0.05)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks. Two writers make one wrong file, which its hash gives away.
        return True
    return True


def _is_same(fd: int, path: str) -> bool:
    """Whether `path` is still the file `fd`: who had the lock before may have renamed it."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
