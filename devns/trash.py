"""trash: deleting a directory tree that may be hostile, by descriptor, without leaving it."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from devns import linux
from devns.errors import DevnsError


class ForeignFiles(DevnsError):
    """What is to be deleted holds files of other user ids: `delete_tree(path)` works where those ids are mapped."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path}: holds files of other user ids, which can be deleted only where these are mapped")
        self.path = path


class _Level:
    """A directory on the way down: its name in the one above, which it is, and the directories in it still to go."""

    __slots__ = ("identity", "name", "todo")

    def __init__(self, name: str, fd: int, todo: list[str]) -> None:
        status = os.fstat(fd)
        self.name = name
        self.identity = (status.st_dev, status.st_ino)
        self.todo = todo


def delete_tree(path: str) -> None:
    """Delete a file or a whole directory, however deep, unreadable or hostile; nothing where there is nothing.

    Each directory is opened in the one above it: no symbolic link is followed and no other mount entered, and a few
    descriptors are enough for any depth. Several processes can be at it. It imports nothing, so it also runs where
    importing is over. Raises ForeignFiles where another user id's files are in the way, DevnsError for a mount point.
    """
    above, name = os.path.split(os.path.abspath(path))
    try:
        here = os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    levels = [_Level("", here, [name])]
    mount = None
    patience = 1000  # for directories that are filled again, or whose listing passed over a name
    try:
        while True:
            if levels[-1].todo:
                name = levels[-1].todo.pop()
                fd = _enter(name, here)
                if fd is None:
                    continue
                below = _Level(name, fd, [])
                try:
                    mount = mount or _mount(fd)
                    if _mount(fd) != mount:
                        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
                    below.todo = _delete_files(fd)
                except BaseException:
                    os.close(fd)
                    raise
                if below.todo:
                    os.close(here)
                    here = fd
                    levels.append(below)
                    continue
                os.close(fd)
            elif len(levels) > 1:
                name = levels.pop().name
                up = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
                os.close(here)
                here = up
                if _Level("", here, []).identity != levels[-1].identity:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))  # moved away: this is no longer our tree
            else:
                return
            if not _rmdir(name, here):
                patience -= 1
                if not patience:
                    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
                levels[-1].todo.append(name)
    except PermissionError:
        if _is_foreign(name, here):
            raise ForeignFiles(path) from None
        raise
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DevnsError(f"{path}: something is mounted on {name} in it", hint="findmnt") from None
        raise
    finally:
        os.close(here)


def _enter(name: str, above: int) -> int | None:
    """Open a directory so that it can be emptied. What is none is deleted at once."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=above)
    except FileNotFoundError:
        return None
    except PermissionError:
        # Its mode keeps out the owner too. What is opened with O_PATH can be changed through /proc, and in no other
        # way that surely does not follow a symbolic link. open(2), fchmodat(2)
        handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        try:
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        finally:
            os.close(handle)
        fd = os.open(name, flags, dir_fd=above)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        _unlink(name, above)
        return None
    try:
        if os.fstat(fd).st_mode & 0o700 != 0o700:
            os.fchmod(fd, 0o700)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _delete_files(directory: int) -> list[str]:
    """Delete all but the directories in it, and return the names of these."""
    directories = []
    with suppress(FileNotFoundError), os.scandir(directory) as entries:  # another process may have deleted it
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.name)
            else:
                _unlink(entry.name, directory)
    return directories


def _rmdir(name: str, above: int) -> bool:
    """Is it gone? Not where it is not empty, or has become something else."""
    try:
        os.rmdir(name, dir_fd=above)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def _mount(fd: int) -> int:
    """Which mount this is; before Linux 5.8 only which file system, so that a bind mount of the same is not noticed."""
    try:
        return linux.mount_id(fd) or os.fstat(fd).st_dev
    except OSError:
        return os.fstat(fd).st_dev


def _is_foreign(name: str, above: int) -> bool:
    owners = {os.fstat(above).st_uid}
    with suppress(OSError):
        owners.add(os.stat(name, dir_fd=above, follow_symlinks=False).st_uid)
    return owners != {os.geteuid()}


def _unlink(path: str, directory: int | None = None) -> None:
    with suppress(FileNotFoundError, IsADirectoryError):
        os.unlink(path, dir_fd=directory)
