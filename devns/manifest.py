"""manifest: what a layer's tree held when it was finished, a line a file, and what is another thing now.

A line is a JSON list: path, kind ("file", "directory", "link", ...), permissions, uid, gid, size, SHA-256 of the bytes
or what the link says, extended attributes. Lines are sorted by the parts of their paths. Times are not recorded. Ids
are those inside, so that they mean the same wherever the layer is.

It runs where the tree is all there is to be seen, as root over all in it (devns.trees); nobody changes it meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any

FILE = "manifest"  # its name, beside the tree

Row = list[Any]

_FIELDS = ("path", "kind", "mode", "owner", "group", "size", "content", "attributes")
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
}
_CHUNK = 32_768  # files whose digests are in memory at once
_ATTRIBUTES = ("user.", "security.capability")  # what a layer itself can have; other names are the host's


def write(root: str, path: str, *, owner: tuple[int, int] | None = None) -> dict[str, Any]:
    """Write the manifest of the tree `root` to the new file `path`: `{"sha256", "entries"}` of it.

    Raises OSError for a file that cannot be read.
    """
    whole = hashlib.sha256()
    entries = 0
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        for row in _scan(root):
            if row[6] is None:
                raise OSError(errno.EIO, os.strerror(errno.EIO), f"{root}/{row[0]}")
            line = json.dumps(row).encode() + b"\n"
            whole.update(line)
            file.write(line)
            entries += 1
        if owner:
            os.fchown(file.fileno(), *owner)
    return {"sha256": whole.hexdigest(), "entries": entries}


def digest(path: str) -> str:
    """The SHA-256 of a manifest itself."""
    return _digest(path) or ""


def compare(root: str, path: str) -> list[tuple[str, str]]:
    """(path, problem) for each file of the tree `root` that is not as the manifest at `path` has it.

    `problem` is "missing", "extra", or which of its fields are others: "content", "mode, owner".
    """
    found: list[tuple[str, str]] = []
    with open(path, "rb") as file:
        recorded = (json.loads(line) for line in file)
        now = _scan(root)
        old, new = next(recorded, None), next(now, None)
        while old is not None or new is not None:
            if new is None or (old is not None and _order(old) < _order(new)):
                found.append((f"/{old[0]}", "missing"))  # type: ignore[index]  # one of the two is there
                old = next(recorded, None)
            elif old is None or _order(new) < _order(old):
                found.append((f"/{new[0]}", "extra"))
                new = next(now, None)
            else:
                if old != new:
                    fields = zip(_FIELDS, old, new, strict=False)
                    found.append((f"/{old[0]}", ", ".join(name for name, was, is_ in fields if was != is_)))
                old, new = next(recorded, None), next(now, None)
    return found


def _order(row: Row) -> list[str]:
    path: str = row[0]
    return path.split("/")


# --- one tree ---------------------------------------------------------------------------------------------------------


def _scan(root: str) -> Iterator[Row]:
    """The rows of a tree, in order; None for the content of what cannot be read."""
    walk = _walk(root)
    while chunk := list(itertools.islice(walk, _CHUNK)):
        digests = iter(_digests([f"{root}/{row[0]}" for row in chunk if row[1] == "file"]))
        for row in chunk:
            if row[1] == "file":
                row[6] = next(digests)
            yield row


def _walk(root: str) -> Iterator[Row]:
    """All rows but for the files' digests."""
    todo = [""]
    while todo:
        path = todo.pop()
        place = f"{root}/{path}"
        status = os.lstat(place)
        kind = stat.S_IFMT(status.st_mode)
        row = [
            path,
            _KINDS[kind],
            stat.S_IMODE(status.st_mode),
            status.st_uid,
            status.st_gid,
            0,
            "",
            _attributes(place),
        ]
        if kind == stat.S_IFREG:
            row[5] = status.st_size
        elif kind == stat.S_IFLNK:
            row[6] = os.readlink(place)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            row[6] = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        elif kind == stat.S_IFDIR:
            above = f"{path}/" if path else ""
            todo += [f"{above}{name}" for name in sorted(os.listdir(place), reverse=True)]
        yield row


def _attributes(path: str) -> dict[str, str]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError:  # a file system without them
        return {}
    kept = sorted(name for name in names if name.startswith(_ATTRIBUTES))
    return {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in kept}


def _digests(paths: Sequence[str]) -> list[str | None]:
    """The digest of each, made by as many processes as there are processors, at most four."""
    workers = min(len(os.sched_getaffinity(0)), 4) if len(paths) > 256 else 1
    results: list[list[str | None]] = [[] for _ in range(workers)]
    others = []
    for worker in range(1, workers):
        memory = os.memfd_create("digests", os.MFD_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _send(memory, paths[worker::workers])
                status = 0
            finally:
                os._exit(status)
        others.append((worker, pid, memory))
    results[0] = [_digest(path) for path in paths[::workers]]
    for worker, pid, memory in others:
        if os.waitpid(pid, 0)[1]:
            raise OSError(errno.EIO, os.strerror(errno.EIO), paths[worker])
        with open(memory, "rb") as file:
            file.seek(0)
            results[worker] = json.load(file)
    return [results[number % workers][number // workers] for number in range(len(paths))]


def _send(memory: int, paths: Sequence[str]) -> None:
    data = json.dumps([_digest(path) for path in paths]).encode()
    while data:
        data = data[os.write(memory, data) :]


def _digest(path: str) -> str | None:
    """None for what the disk does not give back."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    whole = hashlib.sha256()
    try:
        while data := os.read(fd, 1 << 18):
            whole.update(data)
    except OSError:
        return None
    finally:
        os.close(fd)
    return whole.hexdigest()
