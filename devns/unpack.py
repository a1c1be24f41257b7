"""unpack: a tarball, one .deb, or all the .debs of a Debian system at once, beneath a root that is open already."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from devns.archive import LIMITS, ArchiveError, Entry, Limits, open_tar, show
from devns.debfile import Control, open_deb
from devns.errors import DevnsError, Unsupported
from devns.progress import Progress, Silent
from devns.writer import Directory, Owner, Unpacked, Writer, open_umask, settle, walk

ARRIVAL = 4  # bytes that say of one package that it is there
_INFO = b"var/lib/dpkg/info/"
_SCRIPTS = ("config", "preinst", "postinst", "prerm", "postrm")
# Merged /usr, which every Debian since bookworm has: where the loader is in /lib64, that is a link, too.
_MERGED = (b"bin", b"sbin", b"lib")
_MERGED_ALSO: Mapping[str, tuple[bytes, ...]] = {"amd64": (b"lib64",)}


def _file_name(path: str | bytes) -> str:
    return show(os.path.basename(os.fsencode(path)))[1:-1]


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Name the archive in whatever goes wrong with it."""
    start = f"{name}: " if name else ""
    try:
        yield
    except DevnsError as error:
        raise type(error)(f"{start}{error.message}", hint=error.hint) from error
    except OSError as error:
        raise ArchiveError(f"{start}{error.strerror or error}") from error


@contextmanager
def _opened(path: str | bytes | int) -> Iterator[int]:
    if isinstance(path, int):
        yield path
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


# --- tarballs ---------------------------------------------------------------------------------------------------------


def unpack_tar(
    archive: str | bytes | int,
    root_fd: int,
    *,
    keep_special: bool,
    owners: bool,
    progress: Progress | None = None,
    clamp: int | None = None,
    record: Callable[[Owner], None] = lambda owner: None,
    limits: Limits = LIMITS,
) -> Unpacked:
    """Unpack a tar archive (a path, or a descriptor that is read to its end) beneath an empty directory.

    `keep_special` keeps setuid, setgid and file capabilities: only for a tree that no other user can reach.
    `owners` gives the files to the archive's uids and gids; `record` is told them in either case. `clamp` (seconds
    since the epoch) is the latest time a file gets. `progress` is advanced by the bytes read. Raises DevnsError; what
    was written until then is for the caller to throw away.
    """
    watch = progress or Silent()
    # A descriptor has no name: the caller knows it.
    with _about("" if isinstance(archive, int) else _file_name(archive)), open_umask(), _opened(archive) as fd:

        def read(size: int) -> bytes:
            data = os.read(fd, size)
            watch.advance(len(data))
            return data

        tar = open_tar(read, limits)
        with Writer(
            root_fd, keep_special=keep_special, owners=owners, clamp=clamp, record=record, limits=limits
        ) as writer:
            for entry in tar:
                writer.write(entry, tar.data())
            writer.finish()
            return writer.done


# --- one .deb ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DebRecord:
    """One package as unpacked: what dpkg's database says of it, and what is left to do."""

    name: str
    version: str
    architecture: str
    key: str  # what dpkg files it under in info/: the name, or name:architecture
    status: str  # its paragraph for var/lib/dpkg/status, without a newline at the end
    scripts: tuple[str, ...]  # of preinst, postinst, prerm, postrm, config: those it has
    size: int  # bytes of files
    owners: tuple[Owner, ...]  # whose owner or group isn't root
    files: tuple[bytes, ...]  # the paths of all but directories
    directories: Mapping[bytes, Directory]


def unpack_deb(
    path: str, root_fd: int, *, owners: bool, name: str | None = None, version: str | None = None
) -> DebRecord:
    """Do what `dpkg --unpack` does, maintainer scripts apart, in a root that has not this package.

    The package must be `name` at `version` where these are given. Conffiles are put in place under their own names:
    with no .dpkg-new beside them, `dpkg --configure` takes them for installed. What is a directory stays one, also
    through a symlink (/lib), and keeps its owner, mode and times, as under dpkg. Raises DevnsError naming the .deb.
    """
    with _about(_file_name(path)), open_umask():
        record, found = _unpack_deb(path, root_fd, owners=owners, name=name, version=version, architecture=None)
        created = {path: entry for path, entry in record.directories.items() if path not in found and path}
        settle(root_fd, created, owners=owners)
        return replace(record, owners=record.owners + _directory_owners(created))


def _directory_owners(directories: Mapping[bytes, Directory]) -> tuple[Owner, ...]:
    return tuple(Owner(path, d.uid, d.gid, d.mode) for path, d in directories.items() if d.uid or d.gid)


def _unpack_deb(
    path: str, root_fd: int, *, owners: bool, name: str | None, version: str | None, architecture: str | None
) -> tuple[DebRecord, set[bytes]]:
    """Without setting what directories shall be; with the directories that were there before."""
    with _opened(path) as fd:
        control, data = open_deb(fd)
        for said, wanted in ((control.name, name), (control.version, version)):
            if wanted is not None and said != wanted:
                raise ArchiveError(f"the package in it is {control.name} {control.version}, not {name} {version}")
        if architecture and control.architecture not in (architecture, "all"):
            raise ArchiveError(f"a package for {control.architecture}, not for {architecture}")
        sums: dict[bytes, str] = {}
        conffiles = dict.fromkeys(control.conffiles())
        listing: list[bytes] = []
        files: list[bytes] = []
        owned: list[Owner] = []
        with Writer(root_fd, keep_special=True, owners=owners, merge=True, record=owned.append) as writer:
            for entry in data:
                place = b"/" + (entry.path or b".")
                if b"\n" in place:
                    raise ArchiveError(f"{show(place)}: a name that dpkg's list of files can't hold")
                listing.append(place)
                if entry.kind != "directory":
                    files.append(entry.path)
                if place in conffiles and entry.kind == "file":
                    writer.write(entry, _summed(data.data(), place, sums))
                else:
                    writer.write(entry, data.data())
            size = writer.done.size
            _write_info(writer, control, listing)
    record = DebRecord(
        control.name,
        control.version,
        control.architecture,
        control.key,
        _status(control, {place: sums[place] for place in conffiles if place in sums}),
        tuple(script for script in _SCRIPTS if script in control.files),
        size,
        tuple(owned),
        tuple(files),
        writer.directories,
    )
    return record, writer.found


def _summed(pieces: Iterable[memoryview], place: bytes, sums: dict[bytes, str]) -> Iterator[memoryview]:
    md5 = hashlib.md5(usedforsecurity=False)  # what dpkg tells a changed conffile by
    for piece in pieces:
        md5.update(piece)
        yield piece
    sums[place] = md5.hexdigest()


def _status(control: Control, sums: Mapping[bytes, str]) -> str:
    lines = control.paragraph.split("\n")
    package = next(at for at, line in enumerate(lines) if line.lower().startswith("package:"))
    lines.insert(package + 1, "Status: install ok unpacked")
    if sums:
        lines.append("Conffiles:")
        lines += [f" {_string(place)} {md5}" for place, md5 in sums.items()]
    return "\n".join(lines)


def _write_info(writer: Writer, control: Control, listing: Sequence[bytes]) -> None:
    """dpkg's own files on the package: what control.tar has, but for `control`, and the list of its files."""
    stem = _INFO + control.key.encode()
    for name, file in control.files.items():
        if name != "control":
            _put(writer, stem + b"." + name.encode(), file.data, file.mode, file.mtime)
    _put(writer, stem + b".list", b"".join(line + b"\n" for line in listing), 0o644, control.files["control"].mtime)


def _put(writer: Writer, path: bytes, data: bytes, mode: int, mtime: int) -> None:
    writer.write(Entry(path, "file", mode, 0, 0, len(data), mtime), [data] if data else [])


def _string(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# --- all the .debs of a system ----------------------------------------------------------------------------------------


Deb = tuple[str, str, str]  # path, and what its package must be: name, version


def _label(deb: Deb) -> str:
    path, name, version = deb
    return f"{name} {version} ({_file_name(path)})"


def unpack_debs(
    debs: Sequence[Deb],
    root: str,
    *,
    architecture: str,
    built: int,
    owners: bool,
    workers: int,
    report: Callable[[DebRecord], None] = lambda record: None,
    arrivals: int | None = None,
) -> list[DebRecord]:
    """Unpack `debs` (path, name, version) for `architecture` beneath the directory `root`, which has no packages yet.
    What is of none of them gets the time `built`, in seconds since the epoch.

    Worker processes share the work, the biggest package first; `report` is called here for each that is done. Where
    packages are still on their way, `arrivals` is a descriptor from which the place in `debs` of each that is there
    can be read, ARRIVAL bytes in the machine's order, until its end.

    The result depends on the order of `debs` only: where two packages have the same directory, the first one's mode,
    owner and time count, as if dpkg had unpacked them in this order; where two have the same file, nothing is
    guessed. Writes dpkg's database as far as `dpkg --configure -a` needs it. Raises DevnsError naming the package and
    its .deb.
    """
    root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with open_umask():
            return _unpack_debs(debs, root_fd, architecture, built * 1_000_000_000, owners, workers, report, arrivals)
    finally:
        os.close(root_fd)


def _unpack_debs(
    debs: Sequence[Deb],
    root_fd: int,
    architecture: str,
    built: int,
    owners: bool,
    workers: int,
    report: Callable[[DebRecord], None],
    arrivals: int | None,
) -> list[DebRecord]:
    merged = _MERGED + _MERGED_ALSO.get(architecture, ())
    prepared = _prepare(root_fd, architecture, merged, built)

    def job(index: int) -> DebRecord:
        path, name, version = debs[index]
        with _about(_label(debs[index])):
            return _unpack_deb(path, root_fd, owners=owners, name=name, version=version, architecture=architecture)[0]

    done: dict[int, DebRecord] = {}
    with _crew(min(workers, len(debs)), job) as crew:
        for index, record in _share(crew, debs, arrivals):
            done[index] = record
            report(record)

    records = [done[index] for index in range(len(debs))]
    _refuse_conflicts(records, merged)
    directories: dict[bytes, Directory] = {}
    for index, record in enumerate(records):
        mine = {path: entry for path, entry in record.directories.items() if _real(path, merged) not in directories}
        directories.update((_real(path, merged), entry) for path, entry in mine.items())
        records[index] = replace(record, owners=record.owners + _directory_owners(mine))
    with Writer(root_fd, keep_special=False, owners=owners) as writer:
        by_name = sorted(records, key=lambda record: (record.name, record.architecture))
        status = "".join(f"{record.status}\n\n" for record in by_name)
        _put(writer, b"var/lib/dpkg/status", _bytes(status), 0o644, built)
    settle(root_fd, {**prepared, **directories}, owners=owners)
    return records


def _size(deb: Deb) -> int:
    with _about(_label(deb)):
        return os.stat(deb[0]).st_size


def _prepare(root_fd: int, architecture: str, merged: Sequence[bytes], mtime: int) -> dict[bytes, Directory]:
    """Merged /usr, and an empty dpkg database. dpkg(1), FILES; https://wiki.debian.org/UsrMerge"""
    with Writer(root_fd, keep_special=False, owners=False) as writer:
        for name in merged:
            writer.write(Entry(b"usr/" + name, "directory", 0o755, 0, 0, 0, mtime))
            writer.write(Entry(name, "symlink", 0o777, 0, 0, 0, mtime, b"usr/" + name))
        for name in (b"info", b"updates", b"triggers"):
            writer.write(Entry(b"var/lib/dpkg/" + name, "directory", 0o755, 0, 0, 0, mtime))
        if _exists(root_fd, b"var/lib/dpkg", b"status"):
            raise DevnsError("the root has packages already")
        _put(writer, _INFO + b"format", b"1\n", 0o644, mtime)
        _put(writer, b"var/lib/dpkg/arch", architecture.encode() + b"\n", 0o644, mtime)
        _put(writer, b"var/lib/dpkg/available", b"", 0o644, mtime)
        writer.finish()
        return writer.directories


def _exists(root_fd: int, directory: bytes, name: bytes) -> bool:
    fd = walk(root_fd, directory)
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    finally:
        os.close(fd)
    return True


def _real(path: bytes, merged: Sequence[bytes]) -> bytes:
    top, slash, _ = path.partition(b"/")
    return b"usr/" + path if slash and top in merged else path


def _refuse_conflicts(records: Sequence[DebRecord], merged: Sequence[bytes]) -> None:
    """One path, two packages: dpkg has rules for that (Replaces, diversions), and needs an order for them."""
    holder = {_real(path, merged): record.key for record in records for path in record.files}
    for record in records:
        for path in (*record.files, *record.directories):
            other = holder.get(_real(path, merged), record.key)
            if other != record.key and path not in merged:
                raise DevnsError(
                    f"{record.key} and {other} both have {show(b'/' + path)}",
                    hint="leave one of them out, and install it inside with apt-get",
                )


# --- workers: a pipe with indexes to each, a pipe with a line of JSON for each package back ---------------------------


class _Worker(NamedTuple):
    pid: int
    tasks: int
    answers: int


@contextmanager
def _crew(count: int, job: Callable[[int], DebRecord]) -> Iterator[list[_Worker]]:
    """Processes that do the job for each index they are sent. They end with the block, whatever happens."""
    crew: list[_Worker] = []
    try:
        for _ in range(count):
            crew.append(_start_worker(job, crew))
        yield crew
    finally:
        for worker in crew:
            os.close(worker.tasks)
            os.close(worker.answers)
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)  # on success it had nothing to do
        for worker in crew:
            with suppress(ChildProcessError):
                os.waitpid(worker.pid, 0)


def _start_worker(job: Callable[[int], DebRecord], before: Sequence[_Worker]) -> _Worker:
    tasks, tasks_end = os.pipe()
    answers_end, answers = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            # Held open here, they would hide from the others that the parent is gone.
            for fd in (tasks_end, answers_end, *(fd for worker in before for fd in worker[1:])):
                os.close(fd)
            while task := os.read(tasks, 4):
                line = memoryview(_answer(job, int.from_bytes(task, "little")))
                while line:
                    line = line[os.write(answers, line) :]
        finally:
            os._exit(0)
    os.close(tasks)
    os.close(answers)
    return _Worker(pid, tasks_end, answers_end)


def _share(crew: Sequence[_Worker], debs: Sequence[Deb], arrivals: int | None) -> Iterator[tuple[int, DebRecord]]:
    """Give each worker that is free the biggest of `debs` that is there, until all are done."""
    todo: list[tuple[int, int]] = []  # a heap of (minus the size, place in debs)
    missing = set(range(len(debs)))

    def arrived(index: int) -> None:
        if index in missing:
            missing.remove(index)
            heapq.heappush(todo, (-_size(debs[index]), index))

    free = list(crew)
    busy: dict[int, tuple[_Worker, int, bytearray]] = {}
    poll = select.poll()
    for worker in crew:
        poll.register(worker.answers, select.POLLIN)
    if arrivals is None:
        for index in range(len(debs)):
            arrived(index)
    else:
        poll.register(arrivals, select.POLLIN)
    part = b""
    while missing or todo or busy:
        while todo and free:
            worker, (_, index) = free.pop(), heapq.heappop(todo)
            busy[worker.answers] = worker, index, bytearray()
            with suppress(BrokenPipeError):  # it died: the end of its answers says so
                os.write(worker.tasks, index.to_bytes(4, "little"))
        for fd, _ in poll.poll():
            if fd == arrivals:
                part += (data := os.read(fd, 1 << 12))
                if not data:
                    poll.unregister(fd)
                    if missing:
                        raise DevnsError(f"{_label(debs[min(missing)])}: it never came")
                while len(part) >= ARRIVAL:
                    index, part = int.from_bytes(part[:ARRIVAL], sys.byteorder), part[ARRIVAL:]
                    arrived(index)
                continue
            if fd not in busy:
                raise DevnsError("a process that unpacks packages died (out of memory?)")
            worker, index, line = busy[fd]
            line += (data := os.read(fd, 1 << 16))
            if not data:
                raise DevnsError(f"{_label(debs[index])}: the process that unpacked it died (out of memory?)")
            if line.endswith(b"\n"):
                del busy[fd]
                free.append(worker)
                yield index, _decoded(line)


def _answer(job: Callable[[int], DebRecord], index: int) -> bytes:
    answer: dict[str, Any]
    try:
        answer = {"record": _encoded(job(index))}
    except DevnsError as error:
        answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    except BaseException as error:  # our bug; its traceback would have to read source files here
        at = error.__traceback__
        while at and at.tb_next:
            at = at.tb_next
        where = f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}" if at else "?"
        answer = {"error": "RuntimeError", "message": f"{error!r} at {where}", "hint": None}
    return json.dumps(answer).encode() + b"\n"


def _encoded(record: DebRecord) -> dict[str, Any]:
    plain = ("name", "version", "architecture", "key", "status", "scripts", "size")
    return {
        **{name: getattr(record, name) for name in plain},
        "owners": [(_string(owner.path), *owner[1:]) for owner in record.owners],
        "files": [_string(path) for path in record.files],
        "directories": [(_string(path), *entry[:4]) for path, entry in record.directories.items()],
    }


def _decoded(line: bytes | bytearray) -> DebRecord:
    answer = json.loads(line)
    if "error" in answer:
        if answer["error"] == "RuntimeError":
            raise RuntimeError(answer["message"])
        kind = {"Unsupported": Unsupported, "ArchiveError": ArchiveError}.get(answer["error"], DevnsError)
        raise kind(answer["message"], hint=answer["hint"])
    record = answer["record"]
    record["scripts"] = tuple(record["scripts"])
    record["owners"] = tuple(Owner(_bytes(path), *rest) for path, *rest in record["owners"])
    record["files"] = tuple(_bytes(path) for path in record["files"])
    record["directories"] = {_bytes(path): Directory(*rest) for path, *rest in record["directories"]}
    return DebRecord(**record)
