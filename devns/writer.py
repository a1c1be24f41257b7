"""writer: the one writer of strangers' files. Every path is reached from the descriptor of the root, never by name.

A symlink that an archive brings must not lead the entries after it out of the root. So parents are resolved inside
the root one component at a time, the last component is made anew (O_EXCL) and never followed, and modes, owners and
times are set on descriptors. What runs here may stand in a namespace whose root is a stranger's: nothing is imported
late, and no file is reached but by the descriptors given.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from devns.archive import LIMITS, ArchiveError, Entry, Limits, show
from devns.durable import refused
from devns.errors import DevnsError

# O_PATH, because a directory need not be readable to be walked through.
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SYMLINKS_MAX = 40  # MAXSYMLINKS, path_resolution(7)
_KEPT = 32  # descriptors of parent directories
_TIME_MIN, _TIME_MAX = -(2**31) * 10**9, 2**33 * 10**9  # nanoseconds; beyond, os.utime overflows or file systems wrap
_COPY = 1 << 20
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


# --- directories by descriptor ----------------------------------------------------------------------------------------


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def walk(root_fd: int, path: bytes, made: Callable[[bytes], None] | None = None) -> int:
    """An O_PATH descriptor of the directory `path`, resolved as a process whose root is `root_fd` would.

    With `made` what is missing on the way is created, and `made` is told its real path. Raises OSError: ENOENT,
    ENOTDIR, ELOOP, or EXDEV when a directory was moved while it was walked through.
    """
    todo = path.split(b"/")[::-1]  # a stack: a symlink's text is put on top of what is left
    here = os.open(b".", _DIRECTORY, dir_fd=root_fd)
    names: list[bytes] = []  # of the directories between the root and here,
    above: list[tuple[int, int]] = []  # and what ".." must find
    followed = 0
    try:
        while todo:
            name = todo.pop()
            if name in (b"", b".") or (name == b".." and not names):
                continue
            try:
                there = os.open(name, _DIRECTORY, dir_fd=here)
            except FileNotFoundError:
                if made is None:
                    raise
                _make_directory(here, name, 0o755)
                made(b"/".join([*names, name]))
                todo.append(name)
                continue
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                target = _readlink(here, name)
                followed += 1
                if followed > _SYMLINKS_MAX:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
                if target.startswith(b"/"):
                    there = os.open(b".", _DIRECTORY, dir_fd=root_fd)
                    names, above = [], []
                    os.close(here)
                    here = there
                todo.extend(reversed(target.split(b"/")))
                continue
            if name == b"..":
                names.pop()
                expected = above.pop()
            else:
                names.append(name)
                above.append(_identity(here))
                expected = None
            os.close(here)
            here = there
            if expected and _identity(here) != expected:
                raise OSError(errno.EXDEV, "a directory was moved meanwhile")
        return here
    except BaseException:
        os.close(here)
        raise


def _readlink(directory: int, name: bytes) -> bytes:
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.EINVAL:  # neither a directory nor a symlink
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        raise


def _make_directory(parent: int, name: bytes, mode: int) -> bool:
    """False when something is there already: another worker may have been faster."""
    try:
        os.mkdir(name, mode, dir_fd=parent)
    except FileExistsError:
        return False
    return True


class Tree:
    """A root and the descriptors of the directories last used in it. `made`: as for `walk`."""

    def __init__(self, root_fd: int, made: Callable[[bytes], None] | None = None) -> None:
        self.root_fd = root_fd
        self._made = made
        self._open: dict[bytes, int] = {}  # least recently used first

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *error: object) -> None:
        self.forget()

    def forget(self) -> None:
        """After a directory or a symlink was removed: a descriptor may no longer be what its path means."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def directory(self, path: bytes) -> int:
        """The directory's descriptor. It stays the Tree's, and good for the next dozen calls."""
        if not path:
            return self.root_fd
        fd = self._open.pop(path, None)
        if fd is None:
            fd = self._reach(path)
        self._keep(path, fd)
        return fd

    def _reach(self, path: bytes) -> int:
        """From the nearest directory that is open, keeping those on the way: the next path is often a neighbour's."""
        here, at = self.root_fd, 0
        above = path.rfind(b"/")
        while above > 0:
            if path[:above] in self._open:
                here, at = self._open[path[:above]], above + 1
                break
            above = path.rfind(b"/", 0, above)
        while True:
            end = path.find(b"/", at)
            name = path[at:] if end < 0 else path[at:end]
            try:
                here = os.open(name, _DIRECTORY, dir_fd=here)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                return walk(self.root_fd, path, self._made)
            if end < 0:
                return here
            self._keep(path[:end], here)
            at = end + 1

    def _keep(self, path: bytes, fd: int) -> None:
        if len(self._open) >= _KEPT:
            os.close(self._open.pop(next(iter(self._open))))
        self._open[path] = fd

    def parent(self, path: bytes) -> tuple[int, bytes]:
        above, _, name = path.rpartition(b"/")
        return self.directory(above), name


# --- entries ----------------------------------------------------------------------------------------------------------


class Owner(NamedTuple):
    """Whom an archive says a file belongs to, where that isn't root."""

    path: bytes
    uid: int
    gid: int
    mode: int


class Directory(NamedTuple):
    """What is set on a directory when nothing will be written in it any more."""

    mode: int
    uid: int
    gid: int
    mtime: int  # nanoseconds
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


@dataclass
class Unpacked:
    """What was written, and what of the archive was left out."""

    entries: int = 0
    size: int = 0  # bytes of files
    nodes: int = 0  # devices and FIFOs, left out
    special: int = 0  # setuid, setgid and sticky bits, taken away
    xattrs: int = 0  # left out


@contextmanager
def open_umask() -> Iterator[None]:
    """The modes given to mkdir(2) and open(2) are the modes meant."""
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


def failed(path: bytes, error: OSError) -> DevnsError:
    """What is wrong with an entry that could not be written: it, or the disk."""
    if error.errno in _DISK:
        return refused(show(path), error)
    return ArchiveError(f"{show(path)}: {error.strerror or error}")


class Writer:
    """Writes entries beneath a root: the last entry of a name wins, but never through a link that was there before.

    `merge` is how packages share a tree: what is a directory stays one, also by a symlink that stays in the root.
    """

    def __init__(
        self,
        root_fd: int,
        *,
        keep_special: bool,
        owners: bool,
        merge: bool = False,
        clamp: int | None = None,
        record: Callable[[Owner], None] = lambda owner: None,
        limits: Limits = LIMITS,
    ) -> None:
        self.done = Unpacked()
        self.directories: dict[bytes, Directory] = {}  # what is to be set on each at the end
        self.found: set[bytes] = set()  # those of them that a merge found there already
        self.root_fd = root_fd
        self._tree = Tree(root_fd, self._made)
        self._keep_special = keep_special
        self._owners = owners
        self._merge = merge
        self._clamp = _TIME_MAX if clamp is None else clamp * 10**9
        self._record = record
        self._limits = limits
        self._mtime = 0  # of the entry being written, which is also given to the parents it lacks

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._tree.forget()

    def write(self, entry: Entry, data: Iterable[memoryview | bytes] = ()) -> None:
        self.done.entries += 1
        self._mtime = max(_TIME_MIN, min(entry.mtime, self._clamp, _TIME_MAX))
        try:
            if entry.kind == "file":
                self._file(entry, data)
            elif entry.kind == "directory":
                self._directory(entry)
            elif entry.kind == "symlink":
                self._symlink(entry)
            elif entry.kind == "hardlink":
                self._hardlink(entry)
            else:  # a device would be refused by the kernel or, worse, not; nobody needs a FIFO from an archive
                self.done.nodes += 1
                return
        except OSError as error:
            raise failed(entry.path, error) from error
        if (entry.uid or entry.gid) and entry.kind != "hardlink" and not (self._merge and entry.kind == "directory"):
            self._record(Owner(entry.path, entry.uid, entry.gid, entry.mode))

    def finish(self) -> None:
        """Set the directories' modes, owners and times: last, as writing needs the first and changes the last."""
        self._tree.forget()  # there may be few descriptors
        self.done.xattrs += settle(self.root_fd, self.directories, owners=self._owners)

    def _made(self, path: bytes) -> None:
        """A parent that the archive has not: as the first that needed it, but what others of a merge say counts."""
        if not self._merge:
            self._pend(path, Directory(0o755, 0, 0, self._mtime))

    def _pend(self, path: bytes, directory: Directory) -> None:
        self.directories[path] = directory
        if len(self.directories) > self._limits.directories:
            raise ArchiveError(f"the archive has more than {self._limits.directories} directories")

    def _mode(self, entry: Entry) -> int:
        """Without `keep_special` only a directory's sticky bit stays, which takes rights and gives none."""
        mode = entry.mode
        if not self._keep_special:
            mode &= 0o1777 if entry.kind == "directory" else 0o777
            self.done.special += mode != entry.mode
        return mode

    def _clear(self, path: bytes) -> tuple[int, bytes]:
        """Remove what stands where an entry belongs; its parent and name again.

        A directory goes only when it's empty. GNU tar and bsdtar refuse the others, too.
        """
        parent, name = self._tree.parent(path)
        mode = os.lstat(name, dir_fd=parent).st_mode
        if not stat.S_ISDIR(mode):
            os.unlink(name, dir_fd=parent)
        elif self._merge:
            raise IsADirectoryError(errno.EISDIR, "a directory is there already")
        else:
            os.rmdir(name, dir_fd=parent)
        if not stat.S_ISREG(mode):
            self._tree.forget()
        return self._tree.parent(path)

    @contextmanager
    def _created(self, path: bytes) -> Iterator[int]:
        """A new file, which nobody else can read until it has its owner and mode."""
        parent, name = self._tree.parent(path)
        try:
            fd = os.open(name, _NEW_FILE, 0o600, dir_fd=parent)
        except FileExistsError:
            parent, name = self._clear(path)
            fd = os.open(name, _NEW_FILE, 0o600, dir_fd=parent)
        try:
            yield fd
        finally:
            os.close(fd)

    def _file(self, entry: Entry, data: Iterable[memoryview | bytes]) -> None:
        with self._created(entry.path) as fd:
            for piece in data:
                _write(fd, piece)
            self.done.size += entry.size
            if self._owners and (entry.uid or entry.gid):
                os.fchown(fd, entry.uid, entry.gid)  # before the mode: chown(2) takes setuid away
            os.fchmod(fd, self._mode(entry))
            if entry.xattrs:
                kept = self._kept_xattrs(entry.xattrs)
                self.done.xattrs += _set_xattrs(fd, kept)
            os.utime(fd, ns=(self._mtime, self._mtime))

    def _directory(self, entry: Entry) -> None:
        path = entry.path
        if path:
            parent, name = self._tree.parent(path)
            if not _make_directory(parent, name, 0o700):
                if self._is_directory(parent, name, path):
                    self.found.add(path)
                else:
                    parent, name = self._clear(path)
                    os.mkdir(name, 0o700, dir_fd=parent)
        # Without its owner's rights the root could neither be used nor removed.
        mode = self._mode(entry) | (0 if path else 0o700)
        xattrs = self._kept_xattrs(entry.xattrs) if entry.xattrs else ()
        self._pend(path, Directory(mode, entry.uid, entry.gid, self._mtime, xattrs))

    def _is_directory(self, parent: int, name: bytes, path: bytes) -> bool:
        mode = os.lstat(name, dir_fd=parent).st_mode
        if self._merge and stat.S_ISLNK(mode):
            os.close(walk(self.root_fd, path))  # raises where the symlink leads to no directory
            return True
        return stat.S_ISDIR(mode)

    def _symlink(self, entry: Entry) -> None:
        parent, name = self._tree.parent(entry.path)
        try:
            os.symlink(entry.target, name, dir_fd=parent)
        except FileExistsError:
            if not _is_symlink_to(parent, name, entry.target):
                parent, name = self._clear(entry.path)
                os.symlink(entry.target, name, dir_fd=parent)
        if self._owners and (entry.uid or entry.gid):
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        os.utime(name, ns=(self._mtime, self._mtime), dir_fd=parent, follow_symlinks=False)
        self.done.xattrs += len(entry.xattrs)  # a symlink can't have any that we keep. xattr(7)

    def _hardlink(self, entry: Entry) -> None:
        """Another name for a regular file of the root. What the header says of modes and owners is the file's own."""
        for attempt in ("first", "cleared"):
            source, old = self._tree.parent(entry.target)
            parent, name = self._tree.parent(entry.path)
            if not stat.S_ISREG(os.lstat(old, dir_fd=source).st_mode):
                raise OSError(errno.EINVAL, f"a hard link to {show(entry.target)}, which is not a file")
            if old == name and _identity(source) == _identity(parent):
                raise OSError(errno.EINVAL, "a hard link to itself")
            try:
                os.link(old, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
                return
            except FileExistsError:
                if attempt == "cleared":
                    raise
                self._clear(entry.path)
            except OSError as error:
                if error.errno != errno.EMLINK:  # ext4 has 65 000 names for a file
                    raise
                return self._copy(source, old, entry.path)

    def _copy(self, source: int, old: bytes, path: bytes) -> None:
        file = os.open(old, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
        try:
            status = os.fstat(file)
            with self._created(path) as fd:
                while piece := os.read(file, _COPY):
                    _write(fd, piece)
                if self._owners:
                    os.fchown(fd, status.st_uid, status.st_gid)
                os.fchmod(fd, stat.S_IMODE(status.st_mode))
                _set_xattrs(fd, ((os.fsencode(name), os.getxattr(file, name)) for name in os.listxattr(file)))
                os.utime(fd, ns=(status.st_mtime_ns, status.st_mtime_ns))
        finally:
            os.close(file)

    def _kept_xattrs(self, xattrs: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[bytes, bytes], ...]:
        """What an archive may set: the user's own, but neither overlayfs' marks nor ours; file capabilities as setuid.

        A planted user.overlay.redirect or .opaque would change what an overlay of this tree shows. overlayfs.rst
        """
        kept = tuple(
            (name, value)
            for name, value in xattrs
            if (name.startswith(b"user.") and not name.startswith((b"user.overlay.", b"user.devns.")))
            or (name == b"security.capability" and self._keep_special)
        )
        self.done.xattrs += len(tuple(xattrs)) - len(kept)
        return kept


def _is_symlink_to(parent: int, name: bytes, target: bytes) -> bool:
    """Then it stays, never gone for a moment: another worker may be walking through it, as through `lib`."""
    try:
        return os.readlink(name, dir_fd=parent) == target
    except OSError:
        return False


def _write(fd: int, piece: memoryview | bytes) -> None:
    while len(piece) > (written := os.write(fd, piece)):
        piece = piece[written:]


def _set_xattrs(fd: int, xattrs: Iterable[tuple[bytes, bytes]]) -> int:
    """How many this file system, or this namespace, did not take."""
    refused = 0
    for name, value in xattrs:
        try:
            os.setxattr(fd, name, value)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EBADF):
                raise
            refused += 1
    return refused


def settle(root_fd: int, directories: Mapping[bytes, Directory], *, owners: bool) -> int:
    """Set what directories shall be, those beneath first: above may be what can't be entered afterwards.

    Returns how many extended attributes were refused.
    """
    refused = 0
    with Tree(root_fd) as tree:
        for path in sorted(directories, reverse=True):
            try:
                refused += _settle(tree, path, directories[path], owners)
            except OSError as error:
                # A later entry made something else of it; or it's a symlink that was kept.
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise failed(path, error) from error
    return refused


def _settle(tree: Tree, path: bytes, directory: Directory, owners: bool) -> int:
    parent, name = tree.parent(path)
    fd = os.open(name or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if owners and (directory.uid or directory.gid):
            os.fchown(fd, directory.uid, directory.gid)
        os.fchmod(fd, directory.mode)
        refused = _set_xattrs(fd, directory.xattrs)
        os.utime(fd, ns=(directory.mtime, directory.mtime))
        return refused
    finally:
        os.close(fd)
