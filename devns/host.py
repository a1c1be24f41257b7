"""Host: what this machine is, as a frozen, read-only view.

Everything is read beneath `root`, with symbolic links resolved inside it, so that a test describes a whole machine by
a directory of files. On a real machine `root` is "/" and the kernel resolves. Nothing here writes, starts or connects.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from devns.errors import Unsupported

if TYPE_CHECKING:
    from typing import Literal

    Kind = Literal["file", "directory", "other"]

_PATH = "/usr/local/bin:/usr/bin:/bin"  # where PATH is not set at all
_PATH_MAX, _SYMLINKS_MAX = 4096, 40  # <linux/limits.h>, path_resolution(7)
_ID_MAX = 0xFFFFFFFF  # (uid_t)-1 is no id, so a range ends below it
_DEPTH_MAX = 100  # directories in each other that `digest` goes down


@dataclass(frozen=True)
class Host:
    """One machine as one user sees it.

    `user` is never empty: the name in /etc/passwd, else $USER, else "user" (a uid without an entry is common in
    containers and with directory services). `home` and `cwd` are absolute; that they exist is not promised.
    `release` is the kernel's version without what a distribution appends to it: "6.1.0", not "6.1.0-21-amd64".
    All methods take absolute paths of this host and answer None (or nothing) where something is absent or unreadable.
    """

    root: str
    uid: int
    gid: int
    user: str
    groups: tuple[int, ...]
    home: str
    cwd: str
    environ: Mapping[str, str] = field(repr=False)  # it holds secrets, and a repr ends up in reports
    machine: str
    release: str

    @classmethod
    def probe(cls, *, cwd: str | None = None) -> Host:
        """This machine, this process's user, its environment and its working directory, or `cwd` in its place."""
        if cwd is None:
            try:
                cwd = os.getcwd()
            except OSError:  # removed while we stood in it
                cwd = "/"
        kernel = os.uname()
        return cls.make(
            uid=os.getuid(),
            gid=os.getgid(),
            groups=os.getgroups(),
            environ=os.environ,
            cwd=cwd,
            machine=kernel.machine,
            release=kernel.release,
        )

    @classmethod
    def make(
        cls,
        *,
        root: str = "/",
        uid: int,
        gid: int,
        groups: Iterable[int] = (),
        environ: Mapping[str, str],
        cwd: str = "/",
        machine: str,
        release: str,
    ) -> Host:
        """The host beneath `root`; who the user is and where the home is follows from its passwd and `environ`."""
        version = release[: next((at for at, char in enumerate(release) if char not in "0123456789."), None)]
        view = cls(
            root=root.rstrip("/") or "/",
            uid=uid,
            gid=gid,
            user="user",
            groups=tuple(sorted(set(groups))),
            home="/",
            cwd=cwd,
            environ=MappingProxyType(dict(environ)),
            machine=machine,
            release=version.rstrip("."),
        )
        known = [row for row in view._rows("/etc/passwd", columns=7) if row[0] and row[2].isdecimal()]
        own = next((row for row in known if int(row[2]) == uid), None)
        strangers = {row[0] for row in known}
        if own is not None:
            user = own[0]
        else:
            # `setpriv --reuid` leaves the old name behind: one that passwd gives to someone else is not ours.
            names = (environ.get(key, "") for key in ("USER", "LOGNAME"))
            user = next((name for name in names if _is_name(name) and name not in strangers), "user")
        homes = (environ.get("HOME", ""), own[5] if own else "")
        home = next((_normal(path) for path in homes if path.startswith("/")), "/")
        return replace(view, user=user, home=home)

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, path: str, limit: int = 1 << 20, *, symlinks: bool = True) -> str | None:
        """The text of a regular file of at most `limit` bytes; bytes that are no UTF-8 survive as surrogates.

        A longer file counts as unreadable: the first half of a table is worse than none. A FIFO or a device is never
        opened, because that can block or act. Without `symlinks` a path with a symbolic link in it is unreadable, too.
        """
        try:
            if symlinks:
                data = _content(self._inside(path), None, limit)
            else:
                with self._above(path) as (name, directory):
                    data = _content(name, directory, limit)
        except OSError:
            return None
        return None if data is None or len(data) > limit else data.decode("utf-8", "surrogateescape")

    def digest(self, path: str, *, size: int = 64 << 20, files: int = 20_000) -> str | None:
        """A sha256 of all that the file or directory `path` holds: names, kinds, permissions, bytes, and what symbolic
        links say, which are not followed. Times and owners do not count.

        Unreadable is also what has more than `size` bytes or `files` files, and a path with a symbolic link in it: ask
        for its `realpath`. So a link that is put there meanwhile leads nowhere.
        """
        try:
            with self._above(path) as (name, directory):
                return _Digest(size, files).of(name, directory)
        except OSError:
            return None

    def stat(self, path: str) -> os.stat_result | None:
        """Owner, mode and the rest of what `path` leads to."""
        try:
            return os.stat(self._inside(path))
        except OSError:
            return None

    def kind(self, path: str) -> Kind | None:
        """What `path` leads to; None also for a dangling symbolic link."""
        status = self.stat(path)
        if status is None:
            return None
        if stat.S_ISREG(status.st_mode):
            return "file"
        return "directory" if stat.S_ISDIR(status.st_mode) else "other"

    def listdir(self, path: str) -> tuple[str, ...]:
        """The sorted names in a directory; nothing where there is no such directory."""
        try:
            return tuple(sorted(os.listdir(self._inside(path))))
        except OSError:
            return ()

    def readlink(self, path: str) -> str | None:
        """What the symbolic link `path` itself says."""
        try:
            return os.readlink(self._inside(path, follow=False))
        except OSError:
            return None

    def access(self, path: str, mode: int) -> bool:
        """May the user do this (os.R_OK, os.W_OK, os.X_OK or several) to what `path` leads to? access(2)"""
        if self.root == "/":
            return os.access(path, mode)
        status = self.stat(path)
        if status is None:
            return False
        # On a machine described by files all of them are root's.
        if self.uid == 0:
            return not mode & os.X_OK or bool(status.st_mode & 0o111)
        return status.st_mode & mode == mode

    def xattr(self, path: str, name: str) -> bytes | None:
        """An extended attribute of what `path` leads to. xattr(7)"""
        try:
            return os.getxattr(self._inside(path), name)
        except OSError:
            return None

    def realpath(self, path: str) -> str:
        """`path` with every symbolic link resolved inside the root; what does not exist is kept as it is written."""
        try:
            return self._walk(path)
        except OSError:  # a loop, or too long
            return _normal(path)

    def which(self, name: str) -> str | None:
        """The program `name` from PATH, as an absolute path; only where nobody else could have put or changed it.

        Relative entries of PATH are passed over, and so is a program that anyone but root or the user owns, or can
        replace: the directories on the way, and through symbolic links, belong to root or the user and are not
        writable by others. The search then goes on.
        """
        if not name or "/" in name:
            return None
        for directory in self.environ.get("PATH", _PATH).split(":"):
            path = f"{directory.rstrip('/')}/{name}"
            if directory.startswith("/") and self._is_ours(path):
                return path
        return None

    def subordinate(self, which: Literal["uid", "gid"]) -> tuple[int, int] | None:
        """The longest usable range (first id, count) that subuid(5) or subgid(5) gives the user.

        A row that reaches the ids 0 or -1, or the user's own id, can be mapped by nobody and is passed over.
        """
        own = self.uid if which == "uid" else self.gid
        ranges = [
            (int(first), int(count))
            for name, first, count in self._rows(f"/etc/sub{which}", columns=3)
            if name in (self.user, str(self.uid)) and first.isdecimal() and count.isdecimal()
        ]
        usable = [
            (first, count)
            for first, count in ranges
            if 0 < first < first + count <= _ID_MAX and not first <= own < first + count
        ]
        return max(usable, key=lambda row: row[1], default=None)

    # --- where devns keeps its things ---------------------------------------------------------------------------------
    # XDG Base Directory Specification: a variable that is unset, empty or relative is ignored.

    @property
    def store(self) -> str:
        """$DEVNS_STORE (from the working directory where it is relative), else `devns` in the user's data directory."""
        said = self.environ.get("DEVNS_STORE")
        if not said:
            return self._xdg("DATA", ".local/share")
        return _normal(said if said.startswith("/") else f"{self.cwd}/{said}")

    @property
    def config(self) -> str:
        return self._xdg("CONFIG", ".config")

    @property
    def state(self) -> str:
        return self._xdg("STATE", ".local/state")

    @property
    def runtime(self) -> str | None:
        """`devns` in $XDG_RUNTIME_DIR. That it is the user's own is for those to check who create something there."""
        base = self.environ.get("XDG_RUNTIME_DIR", "")
        return _normal(f"{base}/devns") if base.startswith("/") else None

    @property
    def own(self) -> tuple[str, ...]:
        """Where devns keeps what no environment may see: the others, the records of trust, the user's templates."""
        return tuple(sorted({self.realpath(path) for path in (self.store, self.state, self.config)}))

    def private(self, path: str, real: str) -> str | None:
        """Why `path`, which really is `real`, is lent to nobody, however trusted; None where it may be lent."""
        for tree in ("/proc", "/sys", "/dev"):
            # What /proc/self/root or /proc/1/fd leads to depends on who asks: not even the way may pass there.
            if is_beneath(real, tree) or is_beneath(path, tree):
                return f"{tree} of the host is not lent: the environment has its own"
        if real == "/":
            return "the whole host is not lent"
        sessions = {"/run/user", *([self.realpath(self.runtime.rpartition("/")[0])] if self.runtime else [])}
        if any(is_beneath(real, sockets) or is_beneath(sockets, real) for sockets in sessions):
            return "the sockets of your session lie there"
        if is_beneath(self.realpath(self.home), real):
            return 'your home directory lies there: home = "host" in [mount] says so plainly'
        if any(is_beneath(real, own) or is_beneath(own, real) for own in self.own):
            return "devns keeps its environments, or what you trust, there"
        return None

    @property
    def kernel(self) -> tuple[int, int]:
        """The first two numbers of `release`, to be compared."""
        numbers = [int(part) for part in self.release.split(".") if part] + [0, 0]
        return numbers[0], numbers[1]

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _xdg(self, name: str, default: str) -> str:
        base = self.environ.get(f"XDG_{name}_HOME", "")
        return _normal(f"{base}/devns" if base.startswith("/") else f"{self.home}/{default}/devns")

    def _rows(self, path: str, *, columns: int) -> Iterator[list[str]]:
        """The rows of a colon-separated database. Big sites have big ones, hence the limit."""
        for line in (self.read(path, limit=1 << 24) or "").split("\n"):
            row = line.strip().split(":")
            if len(row) == columns and not line.startswith("#"):
                yield row

    @contextmanager
    def _above(self, path: str) -> Iterator[tuple[str, int]]:
        """The last name of `path`, and the directory it stands in, reached through no symbolic link and no ".."."""
        _check_possible(path)
        parts = [part for part in path.split("/") if part]
        if ".." in parts:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
        opened: list[int] = []
        try:
            opened.append(os.open(self.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            for part in parts[:-1]:
                flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                opened.append(os.open(part, flags, dir_fd=opened[-1]))
            yield parts[-1] if parts else ".", opened[-1]
        finally:
            for fd in opened:
                os.close(fd)

    def _inside(self, path: str, *, follow: bool = True) -> str:
        """Where `path` of this host lies for the kernel. OSError where no such path can be."""
        if not path.startswith("/"):
            raise ValueError(f"not an absolute path: {path!r}")
        _check_possible(path)
        return path if self.root == "/" else self.root + self._walk(path, follow=follow)

    def _walk(self, path: str, *, follow: bool = True, passed: list[str] | None = None) -> str:
        """`path` without symbolic links; `passed` collects every directory and link that the way leads through."""
        if len(path) > _PATH_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
        base = "" if self.root == "/" else self.root
        todo, done, links = path.split("/")[::-1], [""], 0
        while todo:
            part = todo.pop()
            if part in ("", "."):
                continue
            if part == "..":
                done = done[:-1] or [""]  # above the root there is the root
                continue
            here = "/".join([*done, part])
            if passed is not None:
                passed.append("/".join(done) or "/")
            try:
                target = os.readlink(base + here) if todo or follow else None
            except (OSError, ValueError):  # no link, or nothing there; ValueError: a NUL in it
                target = None
            if target is None:
                done.append(part)
                continue
            if passed is not None:
                passed.append(here)
            links += 1
            if links > _SYMLINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            if target.startswith("/"):
                del done[1:]
            todo.extend(target.split("/")[::-1])
        return "/".join(done) or "/"

    def _is_ours(self, path: str) -> bool:
        """Is `path` a program that this user may run, and that only root or the user can have put there?"""
        passed: list[str] = []
        base = "" if self.root == "/" else self.root
        try:
            real = self._walk(path, passed=passed)
            status = os.stat(base + real)
            # "/" belongs to whoever owns the machine: root, or in a user namespace that does not map root the overflow
            # id that stands for it.
            owners = {0, self.uid, os.stat(self.root).st_uid}
            holders = {self.realpath(os.path.dirname(path)), os.path.dirname(real)}
            return (
                stat.S_ISREG(status.st_mode)
                and self.access(real, os.X_OK)
                and _is_safe(status, owners, self.gid, sticky=False)
                and all(
                    _is_safe(os.lstat(base + way), owners, self.gid, sticky=way not in holders) for way in set(passed)
                )
            )
        except (OSError, ValueError):  # ValueError: a NUL in it
            return False


def _check_possible(path: str) -> None:
    """OSError where the kernel can have no such path."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _content(name: str, directory: int | None, limit: int) -> bytes | None:
    """What a regular file holds; with `directory` it is a file in that, and no symbolic link to one."""
    follow = directory is None
    if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=follow).st_mode):
        return None
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    with open(os.open(name, flags, dir_fd=directory), "rb") as file:
        return file.read(limit + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None


class _Digest:
    """One hash over a tree, and what it may still read. OSError where that is not enough."""

    def __init__(self, size: int, files: int) -> None:
        import hashlib  # it loads OpenSSL, which most reading does without

        self._hash = hashlib.sha256()
        self._size = size
        self._files = files

    def of(self, name: str, directory: int) -> str:
        if stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
        self._add(name, directory, b"", _DEPTH_MAX)
        return self._hash.hexdigest()

    def _add(self, name: str, directory: int, said: bytes, depth: int) -> None:
        self._files -= 1
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if self._files < 0 or depth == 0:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), name)
        if stat.S_ISLNK(status.st_mode):
            self._record(b"link", said, os.fsencode(os.readlink(name, dir_fd=directory)))
            return
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            self._record(b"other", said)  # never opened: that can block or act
            return
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=directory)
        try:
            status = os.fstat(fd)
            mode = b"%o" % stat.S_IMODE(status.st_mode)
            if stat.S_ISDIR(status.st_mode):
                names = sorted(os.listdir(fd))
                self._record(b"directory", said, mode, b"%d" % len(names))
                for below in names:
                    self._add(below, fd, os.fsencode(below), depth - 1)
            elif stat.S_ISREG(status.st_mode):
                self._record(b"file", said, mode, self._content(fd))
            else:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
        finally:
            os.close(fd)

    def _content(self, fd: int) -> bytes:
        import hashlib

        content = hashlib.sha256()
        while block := os.read(fd, 1 << 20):
            self._size -= len(block)
            if self._size < 0:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            content.update(block)
        return content.digest()

    def _record(self, *fields: bytes) -> None:
        """Each with its length before it, so that no two trees read alike."""
        self._hash.update(b"".join(b"%d:%s" % (len(field), field) for field in fields) + b"\n")


def refuse_setuid(uids: tuple[int, ...] | None = None, gids: tuple[int, ...] | None = None) -> None:
    """Raise Unsupported where this process runs with another's rights (a set-user-ID or set-group-ID program).

    `uids` and `gids` are the real, effective and saved ids, by default this process's own.
    devns does what its caller's environment says; with borrowed rights that would hand them to the caller.
    """
    for kind, ids in (("user", uids or os.getresuid()), ("group", gids or os.getresgid())):
        if len(set(ids)) > 1:
            said = ", ".join(map(str, ids))
            raise Unsupported(
                f"refusing to run set-{kind}-id: the real, effective and saved {kind} ids differ: {said}",
                hint="start devns as yourself; it needs no rights of anyone else",
            )


def _is_safe(status: os.stat_result, owners: set[int], gid: int, *, sticky: bool) -> bool:
    """Can nobody outside of `owners` change this? `sticky` accepts a shared directory that keeps what others put there.

    A group may write where root said so, or where it is the user's own.
    """
    if status.st_uid not in owners:
        return False
    if stat.S_ISLNK(status.st_mode):
        return True
    mode = status.st_mode
    shared = mode & stat.S_IWOTH or (mode & stat.S_IWGRP and status.st_uid != 0 and status.st_gid not in (0, gid))
    return not shared or bool(sticky and mode & stat.S_ISVTX)


def _is_name(name: str) -> bool:
    """Can this stand in a line of /etc/passwd and in a path?"""
    return bool(name) and not name.startswith(("-", ".")) and name.isprintable() and not set(name) & set(":/ ")


def is_beneath(path: str, top: str) -> bool:
    """Is the absolute `path` the directory `top`, or in it, as they are written?"""
    return path == top or path.startswith(top.rstrip("/") + "/")


def _normal(path: str) -> str:
    """normpath(), which keeps two leading slashes because POSIX lets it."""
    return "/" + os.path.normpath(path).lstrip("/")
