"""changes: what was written over layers: files by the marks that overlayfs leaves, packages by dpkg's own database.

It runs where nothing but the trees is to be seen (devns.trees), so paths are followed plainly; nobody but the
environment itself changes them meanwhile.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

_STATUS = "var/lib/dpkg/status"
_BLOCK = 1 << 20


class Layers:
    """The merged view of directories, topmost first, as overlayfs has it.

    https://docs.kernel.org/filesystems/overlayfs.html
    """

    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = roots

    def find(self, path: str) -> tuple[str, os.stat_result] | None:
        """Where `path` ("etc/name") really lies, and what it is; None where it is not, or was deleted."""
        parts = path.split("/")
        for root in self.roots:
            here, covers = root, False
            for number, part in enumerate(parts, 1):
                here = f"{here}/{part}"
                try:
                    status = os.lstat(here)
                except (FileNotFoundError, NotADirectoryError):
                    break
                if is_whiteout(status):
                    return None
                if number == len(parts):
                    return here, status
                if not stat.S_ISDIR(status.st_mode):
                    return None
                covers = covers or is_opaque(here)
            if covers:
                return None
        return None

    def names(self, path: str) -> set[str]:
        """What a directory holds."""
        found: set[str] = set()
        for root in self.roots:
            with suppress(FileNotFoundError, NotADirectoryError):
                found.update(os.listdir(f"{root}/{path}"))
        return {name for name in found if self.find(f"{path}/{name}")}


def is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(path: str) -> bool:
    """Does this directory cover what lies beneath it?"""
    try:
        return os.getxattr(path, "user.overlay.opaque", follow_symlinks=False) == b"y"
    except OSError:
        return False


# --- files ------------------------------------------------------------------------------------------------------------


def files(
    upper: str, lower: Sequence[str], *, made: Collection[str] = (), accounts: Mapping[str, int] = {}
) -> list[tuple[str, str]]:
    """("added" | "modified" | "deleted", path) for what `upper` changes of `lower` (topmost first), sorted by path.

    Of what is deleted only the top is named. A file that was written with what it had, and one whose times alone are
    new, did not change. Left out is what entering makes: the mount points `made`, with the directories on their way,
    and in each file of `accounts` one line whose third field is that number.
    """
    layers = Layers(lower)
    found: list[tuple[str, str]] = []
    todo = [("", False)]
    while todo:
        directory, covers = todo.pop()
        here = f"{upper}{directory}"
        covers = covers or is_opaque(here)
        names = os.listdir(here)
        if covers:
            found += [("deleted", f"{directory}/{name}") for name in layers.names(directory[1:]).difference(names)]
        for name in names:
            path = f"{directory}/{name}"
            try:
                status = os.lstat(f"{upper}{path}")
            except FileNotFoundError:  # it runs, and was faster
                continue
            before = layers.find(path[1:])
            if is_whiteout(status):
                found += [("deleted", path)] if before else []
                continue
            if path in accounts and _only_account(f"{upper}{path}", before and before[0], accounts[path]):
                continue
            if before is None:
                if path not in made and not (stat.S_ISDIR(status.st_mode) and _leads(path, made)):
                    found.append(("added", path))
            elif _differs(f"{upper}{path}", status, *before):
                found.append(("modified", path))
            if stat.S_ISDIR(status.st_mode):
                todo.append((path, covers))
    return sorted(found, key=lambda change: change[1])


def _leads(path: str, made: Collection[str]) -> bool:
    return any(place.startswith(f"{path}/") for place in made)


def _differs(new: str, status: os.stat_result, old: str, before: os.stat_result) -> bool:
    if (status.st_mode, status.st_uid, status.st_gid) != (before.st_mode, before.st_uid, before.st_gid):
        return True
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(new) != os.readlink(old)
    if stat.S_ISREG(status.st_mode):
        return status.st_size != before.st_size or not _equal(new, old)
    return status.st_rdev != before.st_rdev


def _equal(one: str, other: str) -> bool:
    with open(one, "rb", buffering=0) as left, open(other, "rb", buffering=0) as right:
        while True:
            data = left.read(_BLOCK)
            if data != right.read(_BLOCK):
                return False
            if not data:
                return True


def _only_account(new: str, old: str | None, number: int) -> bool:
    """Is all that was added to an account file the line of this id?"""
    try:
        before = _read(old) if old else b""
        after = _read(new)
    except (OSError, ValueError):
        return False
    rows = after[len(before) :].strip(b"\n").split(b"\n")
    return after.startswith(before) and len(rows) == 1 and rows[0].split(b":")[2:3] == [b"%d" % number]


def _read(path: str) -> bytes:
    """A small regular file; ValueError for anything else."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_size > 64 << 20:
            raise ValueError(path)
        return file.read(64 << 20) or b""


# --- packages ---------------------------------------------------------------------------------------------------------


def packages(upper: str, lower: Sequence[str]) -> list[tuple[str, str | None, str | None]]:
    """(name, version before, version now) for each package of dpkg's that is not what it was; None where it was not."""
    before, after = Layers(lower).find(_STATUS), Layers([upper, *lower]).find(_STATUS)
    if after is None or before == after:
        return []
    try:
        old, new = _installed(_read(before[0])) if before else {}, _installed(_read(after[0]))
    except (OSError, ValueError):  # not a database, so dpkg has none
        return []
    return [(name, old.get(name), new.get(name)) for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def _installed(status: bytes) -> dict[str, str]:
    """Package -> version of dpkg's status file: what is unpacked at least. A second architecture is named."""
    found: dict[str, str] = {}
    for paragraph in status.decode(errors="replace").split("\n\n"):
        said = dict(line.split(": ", 1) for line in paragraph.split("\n") if ": " in line and not line.startswith(" "))
        name, version, state = said.get("Package"), said.get("Version"), said.get("Status", "").split(" ")
        if name and version and state[-1] not in ("not-installed", "config-files"):
            found[f"{name}:{said.get('Architecture')}" if name in found else name] = version
    return found
