"""trees: work on directory trees that hold files of every id an environment may have.

A process does it that is root over all of these, sees the directories it was given and nothing else, and has no
network: what lies in the trees may be hostile. The functions to run there must have imported all they need.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from devns import diagnose, manifest, sealed
from devns.durable import refused
from devns.errors import DevnsError
from devns.ops import bind, tmpfs
from devns.store import ForeignFiles

if TYPE_CHECKING:
    from devns.host import Host

BLOCK = 512  # bytes; the unit of st_blocks, whatever the file system's own is. stat(3type)


def run(
    host: Host,
    function: Callable[[], Any],
    *,
    read: Mapping[str, str] = {},
    write: Mapping[str, str] = {},
    map: str | None = None,
) -> Any:
    """The JSON value that `function` returns, run where these directories are: place inside -> path on the host.

    `map` is by default the widest that this host grants. Raises DevnsError for what the kernel refuses.
    """
    binds = [bind(path, place) for place, path in read.items()]
    binds += [bind(path, place, readonly=False) for place, path in write.items()]
    map = map or widest(host)
    plan = sealed.sealed_plan(host, map=map, inside=[tmpfs("/"), *binds])
    # Ownership is not pretended here: what is asked for is done, or an error.
    plan["confine"]["seccomp"] = [name for name in plan["confine"]["seccomp"] if name != "emulate-root"]
    places = {**read, **write}
    lacking = diagnose.range_problem(host) if map == "single" else None

    def call() -> str:
        try:
            return json.dumps(function())
        except OSError as error:
            told = refused(_outside(error.filename, places), error)
            if lacking and error.errno in (errno.EACCES, errno.EPERM):  # root inside is refused nothing of its own
                said = f"{told.message}: it belongs to another user id; {lacking.message}"
                raise DevnsError(said, hint=lacking.remedy) from None
            raise told from None

    return json.loads(sealed.run_sealed(plan, host, call=call, what="the walk through the store") or "null")


def widest(host: Host) -> str:
    """ "range" where this host can map one, else "single"."""
    return "range" if diagnose.maps_subordinates(host) else "single"


def _outside(path: object, places: Mapping[str, str]) -> str:
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not isinstance(path, str):
        return next(iter(places.values()))
    for place, outside in places.items():
        if path == place or path.startswith(f"{place}/"):
            return outside + path[len(place) :]
    return path


# --- deleting ---------------------------------------------------------------------------------------------------------


@contextmanager
def finishing(host: Host) -> Iterator[None]:
    """What a removal from the store left in its trash, because other ids own it, is deleted where these are mapped."""
    try:
        yield
    except ForeignFiles as left:
        sealed.delete(left.path, host)


# --- recording --------------------------------------------------------------------------------------------------------

# What overlayfs notes in an upper directory for itself, some of it at random: nobody asks a lower one for it, and
# without it the same recipe makes the same bytes. Documentation/filesystems/overlayfs.rst, "UUID and fsid"
_NOTES = ("user.overlay.uuid", "user.overlay.origin", "user.overlay.impure")


def record(host: Host, directory: str, map: str, *, built: int | None = None) -> dict[str, Any]:
    """Write the manifest of `directory`/root beside it: what a layer's record keeps of it. See devns.manifest.

    With `built`, in seconds since the epoch, nothing in the tree is newer than that afterwards.
    """
    owner = (host.uid, host.gid) if map == "range" else None  # who stay themselves inside

    def finish() -> dict[str, Any]:
        settle("/layer/root", built)
        return manifest.write("/layer/root", f"/layer/{manifest.FILE}", owner=owner)

    return {"manifest": run(host, finish, write={"/layer": directory}, map=map)}


def settle(root: str, latest: int | None) -> None:
    """Take away what overlayfs noted in a tree, and give what is newer than `latest`, in seconds since the epoch, that
    time; on the file system of `root` alone.

    https://reproducible-builds.org/specs/source-date-epoch/
    """
    device, times = os.lstat(root).st_dev, ((latest or 0) * 1_000_000_000,) * 2
    noted = "user.overlay.uuid" in _attributes(root)  # else it never was an upper directory
    todo = [root]
    while todo:
        path = todo.pop()
        status = os.lstat(path)
        if status.st_dev != device:
            continue
        if noted:
            for name in _attributes(path):
                if name in _NOTES:
                    os.removexattr(path, name, follow_symlinks=False)
        if latest is not None and status.st_mtime_ns > times[0]:
            os.utime(path, ns=times, follow_symlinks=False)
        if status.st_mode & 0o170000 == 0o040000:
            todo += [f"{path}/{name}" for name in os.listdir(path)]


def _attributes(path: str) -> list[str]:
    with suppress(OSError):  # a file system without them
        return os.listxattr(path, follow_symlinks=False)
    return []


# --- measuring --------------------------------------------------------------------------------------------------------


def sizes(host: Host, directory: str, paths: Iterable[str]) -> dict[str, int]:
    """How many bytes of disk each of `paths`, relative to `directory`, takes; a file of many names counts once in all.

    What is not there takes none.
    """
    wanted = list(paths)
    if not wanted:
        return {}

    def measure() -> list[int]:
        seen: set[tuple[int, int]] = set()
        return [usage(f"/store/{path}", seen) for path in wanted]

    return dict(zip(wanted, run(host, measure, read={"/store": directory}), strict=True))


def usage(path: str, seen: set[tuple[int, int]]) -> int:
    """The bytes of disk beneath a path that no other user changes meanwhile; inodes in `seen` are counted already."""
    total, todo = 0, [path]
    while todo:
        path = todo.pop()
        with suppress(FileNotFoundError, NotADirectoryError):  # the owner may be at work in it
            status = os.lstat(path)
            if status.st_nlink > 1:
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
            total += status.st_blocks * BLOCK
            if status.st_mode & 0o170000 == 0o040000:
                todo += [f"{path}/{name}" for name in os.listdir(path)]
    return total
