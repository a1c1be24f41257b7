"""durable: files, directories and locks that are whole after a crash: written, synced, renamed, in that order."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from devns import linux
from devns.errors import DevnsError, Unsupported

ELSEWHERE = "export DEVNS_STORE=/another/directory"


@contextmanager
def telling(path: str) -> Iterator[None]:
    """What the kernel refuses becomes the sentence that the user reads: about the file it names, else about `path`."""
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else ""
        what = named if named.startswith("/") and not named.startswith("/proc/self/fd/") else path
        raise refused(what, error) from error


def refused(what: str, error: OSError) -> DevnsError:
    """That sentence, with a hint at what helps."""
    number = error.errno or 0
    said = f"{what}: {os.strerror(number).lower()}"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return DevnsError(said, hint=f"free some space, or {ELSEWHERE}")
    if number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EROFS):
        return Unsupported(f"{said}: this file system cannot hold a store", hint=ELSEWHERE)
    return DevnsError(said, hint="ulimit -n 1024" if number == errno.EMFILE else None)


def read(path: str) -> bytes:
    """All of a file. What waits for a writer, or is a link, is not read."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        data = part = os.read(fd, 1 << 16)
        while len(part) == 1 << 16:
            part = os.read(fd, 1 << 16)
            data += part
        return data
    finally:
        os.close(fd)


def write(path: str, data: bytes) -> None:
    """A new file, on disk when this returns. It is made where nobody looks, and renamed then."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        _fsync(file.fileno())


def make_directory(path: str, mode: int) -> None:
    """A directory of exactly this mode."""
    with suppress(FileExistsError):
        os.mkdir(path, mode)
    os.chmod(path, mode)  # without the umask, and without a set-group-ID bit from above


def make_private(path: str) -> None:
    """A directory only for its owner; those above it, where they are missing, for the owner to write in."""
    missing: list[str] = []
    above = os.path.dirname(path)
    while not os.path.lexists(above):
        missing.append(above)
        above = os.path.dirname(above)
    for directory in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(directory, 0o755)
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)


def sync(directory: str) -> None:
    """The names in a directory are on disk when this returns."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def _fsync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has nothing to sync there. fsync(2)
            raise


def sync_file_system(path: str) -> None:
    """Everything on the file system of a directory is on disk when this returns."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        linux.syncfs(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        os.sync()  # of all file systems, and it tells no error: the best there is without the other
    finally:
        os.close(fd)


def rename_new(old: str, new: str) -> bool:
    """Rename a directory to a name that nothing has; False where something has it."""
    try:
        linux.renameat2(linux.AT_FDCWD, old, linux.AT_FDCWD, new, linux.RENAME_NOREPLACE)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            return _rename_plainly(old, new)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


def exchange(new: str, old: str) -> None:
    """`new` takes the place of `old`, which is where `new` was then. Where nothing is at `old` it is a rename."""
    try:
        linux.renameat2(linux.AT_FDCWD, new, linux.AT_FDCWD, old, linux.RENAME_EXCHANGE)
    except OSError as error:
        if error.errno == errno.ENOENT:
            os.rename(new, old)
        elif error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # as above: two steps, with a gap between
            os.rename(old, f"{new}.old")
            os.rename(new, old)
        else:
            raise


def _rename_plainly(old: str, new: str) -> bool:
    """NFS and some FUSE file systems know no flags. rename(2) replaces a directory only if it is empty: no loss."""
    try:
        os.rename(old, new)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        return False
    return True


def flock(path: str, operation: int) -> int:
    """A descriptor of the file at `path` that holds flock(2) `operation`. BlockingIOError as from flock(2).

    It is released by closing it, never by LOCK_UN, so what was forked meanwhile keeps it. The file may be deleted by
    whoever holds it exclusively. On a read-only file system it is locked where it is there.
    """
    while True:
        fd = _open_lock(path)
        try:
            fcntl.flock(fd, operation)
            if _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # deleted by its holder while we waited: the next file of this name is another one


def _open_lock(path: str) -> int:
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o600)  # over NFS only what is open for writing is locked
    except OSError as error:
        if error.errno != errno.EROFS or not os.path.lexists(path):
            raise
        return os.open(path, flags | os.O_RDONLY)


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
