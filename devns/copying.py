"""copying: a directory tree with all that overlayfs and its owners see in it, into an empty directory.

It runs where the trees are all there is to be seen, as root over all in them (devns.trees); nobody changes either
meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

_BLOCK = 1 << 20
_ATTRIBUTES = ("user.", "security.capability", "system.posix_acl_")  # what who owns a file may set


def copy_tree(old: str, new: str) -> None:
    """Copy what the directory `old` holds into the empty `new`, and what it is itself: modes, owners, times, extended
    attributes, symbolic and hard links, FIFOs, holes and overlayfs' whiteouts. A socket, which nobody serves, is not
    copied."""
    names: dict[tuple[int, int], str] = {}  # of files that have several
    todo = [""]
    directories = []
    while todo:
        path = todo.pop()
        status = os.lstat(f"{old}{path}")
        if stat.S_ISDIR(status.st_mode):
            if path:
                os.mkdir(f"{new}{path}", 0o700)
            directories.append((path, status))
            todo += [f"{path}/{name}" for name in os.listdir(f"{old}{path}")]
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in names:
            os.link(f"{new}{names[identity]}", f"{new}{path}", follow_symlinks=False)
            continue
        if stat.S_ISSOCK(status.st_mode):
            continue
        _make(f"{old}{path}", f"{new}{path}", status)
        _dress(f"{old}{path}", f"{new}{path}", status)
        if status.st_nlink > 1:
            names[identity] = path
    for path, status in reversed(directories):  # the inner first: what is made in a directory changes its times
        _dress(f"{old}{path}", f"{new}{path}", status)


def _make(old: str, new: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(old), new)
    elif stat.S_ISREG(status.st_mode):
        _copy_file(old, new, status.st_size)
    else:  # a whiteout, the one device that needs no privilege, or a FIFO. mknod(2)
        os.mknod(new, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev)


def _copy_file(old: str, new: str, size: int) -> None:
    """Its data alone: where it has holes, the copy has them too. lseek(2)"""
    source = os.open(old, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        target = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            end = 0
            while end < size:
                try:
                    start = os.lseek(source, end, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:  # nothing but a hole is left
                        raise
                    break
                end = os.lseek(source, start, os.SEEK_HOLE)
                while start < end:
                    data = os.pread(source, min(_BLOCK, end - start), start)
                    if not data:
                        break
                    start += os.pwrite(target, data, start)
            os.truncate(target, size)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _dress(old: str, new: str, status: os.stat_result) -> None:
    """Owner first, as chown(2) takes setuid and capabilities away; times last."""
    link = stat.S_ISLNK(status.st_mode)
    if (status.st_uid, status.st_gid) != _owner(new):
        os.chown(new, status.st_uid, status.st_gid, follow_symlinks=False)
    if not link:
        os.chmod(new, stat.S_IMODE(status.st_mode))
    if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
        for name in _attributes(old):
            os.setxattr(new, name, os.getxattr(old, name, follow_symlinks=False), follow_symlinks=False)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _owner(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_uid, status.st_gid


def _attributes(path: str) -> list[str]:
    with suppress(OSError):  # a file system without them
        return [name for name in os.listxattr(path, follow_symlinks=False) if name.startswith(_ATTRIBUTES)]
    return []
