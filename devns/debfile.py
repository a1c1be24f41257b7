"""debfile: what a .deb is made of, read and checked before any of its names is used: ar(5), deb(5), deb-control(5)."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from devns.archive import LIMITS, ArchiveError, Limits, Packing, Read, Stream, Tar, clean, show

CONTROL_LIMITS = replace(LIMITS, unpacked=32 << 20, entries=256)  # of control.tar, which is kept in memory


@dataclass(frozen=True)
class Member:
    name: str
    offset: int
    size: int


_AR_NUMBER = re.compile(rb"([0-9]{1,10}) *")
_AR_NAME = re.compile(rb"([A-Za-z0-9_][A-Za-z0-9_.+-]{0,14})/? *")


def ar_members(fd: int) -> list[Member]:
    """The members of an ar archive in a regular file, none of them read. A .deb has three; more than 16 are refused."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ArchiveError("not a regular file")
    if os.pread(fd, 8, 0) != b"!<arch>\n":
        raise ArchiveError("not an ar archive")
    members: list[Member] = []
    at = 8
    while at < status.st_size:
        header = os.pread(fd, 60, at)
        name, size = _AR_NAME.fullmatch(header[:16]), _AR_NUMBER.fullmatch(header[48:58])
        if len(header) != 60 or header[58:] != b"`\n" or not name or not size or len(members) == 16:
            raise ArchiveError("a damaged ar header")
        member = Member(name[1].decode(), at + 60, int(size[1]))
        at = member.offset + member.size
        if at > status.st_size:
            raise ArchiveError(f"{member.name}: cut off")
        if at & 1:
            if os.pread(fd, 1, at) != b"\n":
                raise ArchiveError(f"{member.name}: not padded")
            at += 1
        members.append(member)
    return members


def member_reader(fd: int, member: Member) -> Read:
    at, end = member.offset, member.offset + member.size

    def read(size: int) -> bytes:
        nonlocal at
        data = os.pread(fd, min(size, end - at), at)
        if not data and at < end:
            raise ArchiveError(f"{member.name}: cut off")
        at += len(data)
        return data

    return read


@dataclass(frozen=True)
class ControlFile:
    data: bytes
    mode: int
    mtime: int


@dataclass(frozen=True)
class Control:
    """What a .deb says of itself. Every name in it is checked and safe as a file name."""

    name: str
    version: str
    architecture: str
    key: str  # what dpkg files it under: the name, with ":architecture" when several may be installed
    paragraph: str
    files: Mapping[str, ControlFile]  # of control.tar, "control" too

    def conffiles(self) -> tuple[bytes, ...]:
        """The files that are the administrator's once installed, as `/etc/x`; without those that only go away."""
        listed = self.files.get("conffiles")
        lines = listed.data.split(b"\n") if listed else []
        for line in lines:
            path = line.removeprefix(b"remove-on-upgrade ")
            if line and (not _CONFFILE.fullmatch(path) or b"/" + clean(path) != path):
                raise ArchiveError(f"conffiles: {show(line)}: not the path of a file")
        return tuple(line for line in lines if line.startswith(b"/"))


_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_VERSION = re.compile(r"(?:[0-9]+:)?[A-Za-z0-9][A-Za-z0-9.+~-]*")
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9-]*")
_FIELD = re.compile(r"([!\"$-,.-9;-~][!-9;-~]*):(.*)")
_CONFFILE = re.compile(rb"/[^\s\0]+")
_INFO_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
# dpkg's own notes on an installed package, deb-control(5) has none of them; and its list of the package's files.
_RESERVED = {"status", "conffiles", "config-version", "triggers-pending", "triggers-awaited"}


def fields(paragraph: str) -> dict[str, str]:
    """The fields of one deb822 paragraph by their names in lower case, folded lines kept as they are."""
    found: dict[str, str] = {}
    last = ""
    for line in paragraph.split("\n"):
        match = _FIELD.fullmatch(line)
        if match and match[1].lower() not in found:
            last = match[1].lower()
            found[last] = match[2].strip(" \t")
        elif last and line[:1] in (" ", "\t") and line.strip():
            found[last] += f"\n{line}"
        else:
            raise ArchiveError(f"control: {show(line.encode())}: not a field, or one that was there before")
    return found


def read_control(files: Mapping[str, ControlFile]) -> Control:
    """Check the grammar of everything that will be used as a name, and that nothing speaks in dpkg's place."""
    if "control" not in files:
        raise ArchiveError("control.tar has no control file")
    try:
        paragraph = files["control"].data.decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise ArchiveError("control: not UTF-8") from error
    if "\0" in paragraph or "\r" in paragraph:
        raise ArchiveError("control: not text")
    found = fields(paragraph)
    for field in sorted(_RESERVED & set(found)):
        raise ArchiveError(f"control: {field}: only dpkg may say this")
    values = []
    for field, grammar in (("package", _PACKAGE), ("version", _VERSION), ("architecture", _ARCHITECTURE)):
        value = found.get(field, "")
        if not grammar.fullmatch(value) or len(value) > 128:
            raise ArchiveError(f"control: {field}: {show(value.encode())}: not valid")
        values.append(value)
    name, version, architecture = values
    key = f"{name}:{architecture}" if found.get("multi-arch") == "same" else name
    return Control(name, version, architecture, key, paragraph, files)


def _control_files(tar: Tar) -> Iterator[tuple[str, ControlFile]]:
    seen = set()
    for entry in tar:
        if entry.kind == "directory" and not entry.path:
            continue
        name = entry.path.decode("ascii", "replace")
        if entry.kind != "file" or not _INFO_NAME.fullmatch(name) or name == "list" or name in seen:
            raise ArchiveError(f"control.tar: {show(entry.path)}: not a control file, or there twice")
        seen.add(name)
        yield name, ControlFile(b"".join(tar.data()), entry.mode & 0o777, entry.mtime)


def open_deb(fd: int, limits: Limits = LIMITS) -> tuple[Control, Tar]:
    """A .deb's control part, read and checked, and its data archive, not yet read."""
    members = ar_members(fd)
    # deb(5): readers ignore members whose name starts with "_"; everything else has its one place.
    members = [*members[:1], *(member for member in members[1:] if not member.name.startswith("_"))]
    stems = [member.name for member in members[:1]] + [member.name.rpartition(".tar")[0] for member in members[1:]]
    if stems != ["debian-binary", "control", "data"]:
        raise ArchiveError("not a .deb: debian-binary, control.tar and data.tar must be there once each, in this order")
    version = member_reader(fd, members[0])(64)
    if members[0].size > 64 or not re.fullmatch(rb"2\.[0-9]+\n", version):
        raise ArchiveError(f"debian-binary: {show(version)}: not version 2")
    control = read_control(dict(_control_files(_deb_tar(fd, members[1], CONTROL_LIMITS))))
    return control, _deb_tar(fd, members[2], limits)


def _deb_tar(fd: int, member: Member, limits: Limits) -> Tar:
    packings: Mapping[str, Packing] = {"": "none", ".gz": "gz", ".xz": "xz", ".zst": "zst"}
    packing = packings.get(member.name.rpartition(".tar")[2])
    if packing is None:
        raise ArchiveError(f"{member.name}: packed in a way that isn't read (gz, xz and zst are)")
    return Tar(Stream(member_reader(fd, member), packing, limits))
