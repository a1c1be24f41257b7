"""archive: strict, streaming readers of what strangers packed: tar, plain or in gz, xz, zst. `unpack` does the writing.

Two readers that understand one archive differently are how a file gets past the one that checks. So a construct
that tar programs read in two ways, or that no honest writer makes, is refused by its name and never guessed at.
"""

from __future__ import annotations

import importlib
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from devns.errors import DevnsError, Unsupported

Read = Callable[[int], bytes]  # like a file's `read`: at most so many bytes, b"" at the end
Kind = Literal["file", "hardlink", "symlink", "directory", "character device", "block device", "fifo"]
Packing = Literal["none", "gz", "xz", "zst"]

CHUNK = 1 << 18
BLOCK = 512


class ArchiveError(DevnsError):
    """The archive is damaged, hostile or of a kind that isn't read; whoever made it must act."""


@dataclass(frozen=True)
class Limits:
    """What an archive may ask for. More is an error before it is memory or disk."""

    packed: int = 8 << 30  # bytes read
    unpacked: int = 32 << 30  # bytes after decompression, headers included
    entries: int = 2_000_000
    directories: int = 250_000  # their modes wait in memory for the end
    ratio: int = 200  # unpacked / packed, once `ratio_from` bytes came out; text reaches 10, zeros 6800 (xz)
    ratio_from: int = 64 << 20
    path: int = 4096
    component: int = 255
    long_name: int = 64 << 10  # a GNU long name record
    extension: int = 1 << 20  # a PAX record block
    xattrs: int = 64
    xattr: int = 64 << 10


LIMITS = Limits()


def show(path: bytes) -> str:
    """A stranger's name for an error message: quoted, and without control, bidi or other unprintable characters."""
    text = repr(path[:200].decode("utf-8", "backslashreplace"))
    return text if len(path) <= 200 else text[:-1] + "..." + text[-1]


def clean(path: bytes, limits: Limits = LIMITS) -> bytes:
    """The path of an entry relative to the root: `/x`, `./x`, `x/` and `.//x` are all `x`; any `..` is refused.

    The one rule for names from archives. b"" is the root itself. A backslash or a colon is an ordinary character.
    """
    if len(path) > limits.path:
        raise ArchiveError(f"{show(path)}: a path of {len(path)} bytes, more than {limits.path}")
    if b"\0" in path:
        raise ArchiveError(f"{show(path)}: a path with a NUL in it")
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise ArchiveError(f"{show(path)}: a path with '..' in it")
    if max(map(len, parts), default=0) > limits.component:
        raise ArchiveError(f"{show(path)}: a file name of more than {limits.component} bytes")
    return b"/".join(parts)


# --- decompression ----------------------------------------------------------------------------------------------------


class _Decoder(Protocol):
    """One compressed member, as lzma.LZMADecompressor has it; the others are dressed up to look like it."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)  # 16 + 15: gzip, with its CRC and length checked

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(data or self._zlib.unconsumed_tail, max_length)


class _Zstandard:
    """The PyPI module has no `max_length`: feed it so little that even a bomb stays small (4 bytes make 128 KiB)."""

    _FEED = 256

    def __init__(self, decoder: Any) -> None:
        self._zstd = decoder
        self._data = memoryview(b"")

    @property
    def eof(self) -> bool:
        return bool(self._zstd.eof)

    @property
    def needs_input(self) -> bool:
        return not self._data

    @property
    def unused_data(self) -> bytes:
        return bytes(self._zstd.unused_data) + bytes(self._data)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        self._data = memoryview(data) if data else self._data
        now, self._data = self._data[: self._FEED], self._data[self._FEED :]
        return bytes(self._zstd.decompress(now))


def _import_zstd() -> Any:
    """Python 3.14's module, or PyPI's, or None. At import: later the import system may be frozen."""
    for name in ("compression.zstd", "zstandard"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


_zstd = _import_zstd()
_DAMAGE: tuple[type[Exception], ...] = (zlib.error, lzma.LZMAError, EOFError, *([_zstd.ZstdError] if _zstd else []))


def _decoder(packing: Packing) -> _Decoder:
    if packing == "gz":
        return _Gzip()
    if packing == "xz":
        # `xz -9` needs 65 MiB; a header may claim 4 GiB.
        return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=128 << 20)
    if _zstd is None:
        raise Unsupported("zstd data can't be read: this Python has no zstd module", hint="pip install 'devns[zstd]'")
    decoder = _zstd.ZstdDecompressor()
    return _Zstandard(decoder.decompressobj()) if _zstd.__name__ == "zstandard" else decoder


def _members(read: Read, packing: Packing) -> Iterator[bytes]:
    """The plain bytes of every member of a compressed file, never more than a few MiB at once.

    Zeros between and after members are padding, as xz and tape blocks have it; anything else must be a whole member.
    """
    data = read(CHUNK)
    while data:
        member = _decoder(packing)
        while not member.eof:
            if member.needs_input:
                data = data or read(CHUNK)
                if not data:
                    raise ArchiveError(f"the {packing} data ends in the middle")
            yield member.decompress(data, CHUNK)
            data = b""
        data = member.unused_data.lstrip(b"\0")
        while not data and (more := read(CHUNK)):
            data = more.lstrip(b"\0")


def _plain(read: Read) -> Iterator[bytes]:
    while data := read(CHUNK):
        yield data


class Stream:
    """The plain bytes of a source, taken in pieces and counted against the limits."""

    def __init__(self, read: Read, packing: Packing = "none", limits: Limits = LIMITS) -> None:
        self.limits = limits
        self._packing = packing
        self._read = read
        self._in = self._out = 0
        self._chunks = _plain(self._counted) if packing == "none" else _members(self._counted, packing)
        self._chunk = memoryview(b"")

    def _counted(self, size: int) -> bytes:
        data = self._read(size)
        self._in += len(data)
        if self._in > self.limits.packed:
            raise ArchiveError(f"the archive is larger than {self.limits.packed} bytes")
        return data

    def _more(self) -> bool:
        """Have something in `_chunk`; False at the end."""
        limits = self.limits
        while not self._chunk:
            try:
                chunk = next(self._chunks, None)
            except _DAMAGE as error:
                raise ArchiveError(f"damaged {self._packing} data: {error}") from error
            if chunk is None:
                return False
            self._out += len(chunk)
            if self._out > limits.unpacked:
                raise ArchiveError(f"the archive holds more than {limits.unpacked} bytes")
            if self._out > limits.ratio_from and self._out > limits.ratio * self._in:
                raise ArchiveError(f"the archive unpacks to more than {limits.ratio} times its size")
            self._chunk = memoryview(chunk)
        return True

    def check_room(self, size: int) -> None:
        """Refuse what a header announces before any of it is read."""
        if size - len(self._chunk) > self.limits.unpacked - self._out:
            raise ArchiveError(f"the archive holds more than {self.limits.unpacked} bytes")

    def pieces(self, size: int) -> Iterator[memoryview]:
        """The next `size` bytes, fewer only at the end."""
        while size and self._more():
            piece = self._chunk[:size]
            self._chunk = self._chunk[len(piece) :]
            size -= len(piece)
            yield piece

    def take(self, size: int) -> bytes:
        """The next `size` bytes at once, fewer only at the end."""
        if size <= len(self._chunk):
            now, self._chunk = self._chunk[:size], self._chunk[size:]
            return bytes(now)
        return b"".join(self.pieces(size))

    def drain(self) -> None:
        """Read to the end, so that the source's checksums are seen to be right."""
        self._chunk = memoryview(b"")
        while self._more():
            self._chunk = memoryview(b"")


_MAGIC: tuple[tuple[bytes, Packing], ...] = (
    (b"\x1f\x8b", "gz"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zst"),
)
_NOT_READ = ((b"BZh", "bzip2"), (b"LZIP", "lzip"), (b"\x04\x22\x4d\x18", "lz4"), (b"\x1f\x9d", "compress"),
             (b"\x5d\0\0", "lzma"), (b"PK\3\4", "zip"), (b"!<arch>\n", "ar"), (b"7z\xbc\xaf", "7z"),
             (b"070701", "cpio"))  # fmt: skip


def open_tar(read: Read, limits: Limits = LIMITS) -> Tar:
    """A tar archive, plain or compressed: its first bytes tell."""
    start = b""
    while len(start) < 8 and (more := read(CHUNK)):
        start += more
    for magic, name in _NOT_READ:
        if start.startswith(magic):
            raise ArchiveError(f"this is {name} data; tar archives are read plain or packed by gz, xz or zst")
    packing: Packing = next((packing for magic, packing in _MAGIC if start.startswith(magic)), "none")
    rest = memoryview(start)

    def joined(size: int) -> bytes:
        nonlocal rest
        now, rest = bytes(rest[:size]), rest[size:]
        return now or read(size)

    return Tar(Stream(joined, packing, limits))


# --- tar: POSIX.1-2017 pax(1), "ustar Interchange Format"; GNU tar manual, "Basic Tar Format" -------------------------


@dataclass(frozen=True)
class Entry:
    """One member of a tar archive, checked: the path is relative and clean, b"" is the root itself."""

    path: bytes
    kind: Kind
    mode: int  # 0o7777 at most
    uid: int
    gid: int
    size: int  # 0 for all but files
    mtime: int  # nanoseconds
    target: bytes = b""  # a symlink's text; a hard link's clean path
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


_KINDS: Mapping[bytes, Kind] = {
    b"0": "file",
    b"\0": "file",
    b"1": "hardlink",
    b"2": "symlink",
    b"3": "character device",
    b"4": "block device",
    b"5": "directory",
    b"6": "fifo",
}
_EXTENSIONS = (b"L", b"K", b"x", b"g")
# Mode, owners, time and device: PAX may override them, or nobody needs them. But other readers take a bad number
# anywhere for the end of the archive.
_UNUSED = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))
_STRANGE = {
    b"7": "a contiguous file",
    b"A": "a Solaris ACL",
    b"D": "a GNU dump directory",
    b"M": "a GNU multi-volume part",
    b"N": "a GNU old long name",
    b"S": "a GNU sparse file",
    b"V": "a GNU volume label",
    b"X": "a Solaris extended header",
}
_RECORD = re.compile(rb"([1-9][0-9]{0,7}) ([^=\0\n]+)=")
_DECIMAL = re.compile(rb"[0-9]{1,20}")
_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")
_XATTR = b"SCHILY.xattr."
_USED = (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"hdrcharset")
_UTF8 = b"ISO-IR 10646 2000 UTF-8"
_ID_MAX = 0xFFFFFFFE  # 0xffffffff is -1, which chown(2) takes for "leave as it is"


def _number(field: bytes, what: str, *, blank: bool = False) -> int:
    """A header's number: octal digits, or GNU's base 256."""
    if field[0] & 0x80:
        if field[0] not in (0x80, 0xFF):
            raise ArchiveError(f"the {what} of an entry is not a number")
        value = int.from_bytes(field[1:], "big")
        return value if field[0] == 0x80 else value - (1 << 8 * (len(field) - 1))
    digits = field.rstrip(b" \0").lstrip(b" ")
    if not digits and blank:
        return 0
    if not digits.isdigit() or digits.strip(b"01234567"):
        raise ArchiveError(f"the {what} of an entry is not a number")
    return int(digits, 8)


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """`LENGTH KEY=VALUE\\n` again and again, to the last byte. A key twice is refused, as readers differ over it."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        match = _RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1] != 0x0A:
            raise ArchiveError("a PAX header is malformed")
        if match[2] in records:
            raise ArchiveError(f"a PAX header gives {show(match[2])} twice")
        records[match[2]] = data[match.end() : end - 1]
        at = end
    return records


def _pax_number(pax: Mapping[bytes, bytes], key: bytes) -> int | None:
    value = pax.get(key)
    if value is None:
        return None
    if not _DECIMAL.fullmatch(value):
        raise ArchiveError(f"a PAX header's {show(key)} is not a number")
    return int(value)


def _pax_time(value: bytes) -> int:
    """Seconds with any number of decimals -> nanoseconds, rounded down as timestamps are."""
    match = _TIME.fullmatch(value)
    if not match:
        raise ArchiveError("a PAX header's 'mtime' is not a time")
    fraction = match[3] or b""
    nanoseconds = int(match[2]) * 10**9 + int(fraction[:9].ljust(9, b"0"))
    if not match[1]:
        return nanoseconds
    return -nanoseconds - (1 if fraction[9:].strip(b"0") else 0)


class Tar:
    """The entries of a tar archive in order. The content of a file is read by `data()` before the next entry is."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._limits = stream.limits
        self._left = 0  # of the current file
        self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        extensions: dict[bytes, Any] = {}  # what stands before an entry: b"L", b"K" or b"x" -> its content
        count = 0
        kind = b""
        while header := self._header():
            kind = header[156:157]
            count += kind not in (b"L", b"K", b"x")  # which are bounded, being one each for an entry
            if count > self._limits.entries:
                raise ArchiveError(f"the archive has more than {self._limits.entries} entries")
            if kind in _EXTENSIONS:
                self._extend(header, extensions)
            else:
                yield self._entry(header, extensions)
                extensions = {}
        if extensions or kind == b"g":
            raise ArchiveError("the archive ends after an extension header, before the entry it belongs to")
        self._stream.drain()  # what follows the end is no part of the archive, but its checksum is

    def data(self) -> Iterator[memoryview]:
        """The content of the entry that was yielded last, in pieces."""
        for piece in self._stream.pieces(self._left):
            self._left -= len(piece)
            yield piece
        if self._left:
            raise ArchiveError("the archive ends in the middle of a file")

    def _skip(self, size: int) -> None:
        if sum(map(len, self._stream.pieces(size))) != size:
            raise ArchiveError("the archive ends in the middle of a file")

    def _header(self) -> bytes | None:
        """The next header block, checked; None at the two blocks of zeros that end an archive."""
        self._skip(self._left + self._padding)
        self._left = self._padding = 0
        block = self._stream.take(BLOCK)
        if len(block) != BLOCK:
            raise ArchiveError("the archive ends without its end marker")
        if not any(block):
            if any(second := self._stream.take(BLOCK)) or len(second) != BLOCK:
                raise ArchiveError("the archive's end marker is one block of zeros, not two")
            return None
        if _number(block[148:156], "checksum") != sum(block[:148]) + sum(block[156:]) + 8 * 0x20:
            raise ArchiveError("the checksum of an entry's header is wrong")
        for start, end in _UNUSED:
            _number(block[start:end], "number", blank=True)
        if block[257:265] not in (b"ustar\x0000", b"ustar  \0"):
            raise ArchiveError("an entry's header is neither ustar, PAX nor GNU tar")
        return block

    def _size(self, header: bytes) -> int:
        size = _number(header[124:136], "size")
        if size < 0:
            raise ArchiveError("the size of an entry is negative")
        return size

    def _extend(self, header: bytes, extensions: dict[bytes, Any]) -> None:
        """Keep what an extension header says about the next entry. One each, and GNU's never together with PAX."""
        kind = header[156:157]
        size = self._size(header)
        limit = self._limits.long_name if kind in b"LK" else self._limits.extension
        if size > limit:
            raise ArchiveError(f"an extension header of {size} bytes, more than {limit}")
        if kind in extensions or (extensions and (kind in b"xg" or b"x" in extensions)):
            raise ArchiveError("extension headers that don't go together stand before one entry")
        whole = size + -size % BLOCK
        data = self._stream.take(whole)
        if len(data) != whole:
            raise ArchiveError("the archive ends in the middle of a header")
        if any(data[size:]):  # tarfile would look for more records there
            raise ArchiveError("an extension header with something in its padding")
        data = data[:size]
        if kind == b"g":
            # git and others leave a comment there; what would change every later entry is honoured by few readers.
            for key in _pax_records(data):
                if key in _USED or key.startswith((_XATTR, b"GNU.sparse.")):
                    raise ArchiveError(f"a global PAX header sets {show(key)}")
        elif kind == b"x":
            extensions[kind] = _pax_records(data)
        else:
            extensions[kind] = data.rstrip(b"\0")
            if not extensions[kind] or not data.endswith(b"\0"):
                raise ArchiveError("a GNU long name is empty or has no end")

    def _entry(self, header: bytes, extensions: Mapping[bytes, Any]) -> Entry:
        flag = header[156:157]
        pax: Mapping[bytes, bytes] = extensions.get(b"x", {})
        raw = self._name(header, extensions, pax)
        path = clean(raw, self._limits)
        if flag not in _KINDS:
            raise ArchiveError(f"{show(path)}: {_STRANGE.get(flag, f'an entry of type {show(flag)}')}: not read")
        kind: Kind = _KINDS[flag]
        # The oldest readers know a directory by its slash, those after them only where the type is NUL.
        slash = raw.endswith((b"/", b"/.")) or (flag == b"\0" and _text(header[:100]).endswith(b"/"))
        if kind != "directory" and (not path or slash):
            raise ArchiveError(f"{show(raw)}: a {kind} with the name of a directory")
        sparse = next((key for key in pax if key.startswith(b"GNU.sparse.")), None)
        if sparse:
            raise ArchiveError(f"{show(path)}: a sparse file: not read")
        if pax.get(b"hdrcharset", b"BINARY") not in (b"BINARY", _UTF8):
            raise ArchiveError(f"{show(path)}: a PAX header in another character set")
        uid, gid = (self._id(header[at : at + 8], pax, key) for at, key in ((108, b"uid"), (116, b"gid")))
        mode = _number(header[100:108], "mode")
        if not 0 <= mode <= 0o177777:  # some writers leave the file type in
            raise ArchiveError(f"{show(path)}: mode {mode:o}")
        mtime = _pax_time(pax[b"mtime"]) if pax.get(b"mtime") else _number(header[136:148], "time", blank=True) * 10**9
        size = self._content(header, pax, path, kind)
        target = self._target(header, extensions, pax, path, kind)
        return Entry(path, kind, mode & 0o7777, uid, gid, size, mtime, target, self._xattrs(pax, path) if pax else ())

    def _name(self, header: bytes, extensions: Mapping[bytes, Any], pax: Mapping[bytes, bytes]) -> bytes:
        name = _text(header[:100])
        if header[257:263] == b"ustar\0":
            prefix = _text(header[345:500])
            name = prefix + b"/" + name if prefix else name
        elif any(header[345:500]):  # old GNU: times and sparse maps; some readers take it for ustar's prefix
            raise ArchiveError(f"{show(name)}: a GNU header with more than a name")
        name = pax.get(b"path", extensions.get(b"L", name))
        if not name:
            raise ArchiveError("an entry without a name")
        return bytes(name)

    def _target(
        self, header: bytes, extensions: Mapping[bytes, Any], pax: Mapping[bytes, bytes], path: bytes, kind: Kind
    ) -> bytes:
        if kind not in ("hardlink", "symlink"):
            return b""
        target: bytes = pax.get(b"linkpath", extensions.get(b"K", _text(header[157:257])))
        if not target or b"\0" in target or len(target) >= self._limits.path:
            raise ArchiveError(f"{show(path)}: a {kind} to {show(target)}")
        if kind == "symlink":
            return target
        target = clean(target, self._limits)
        if not target:
            raise ArchiveError(f"{show(path)}: a hardlink to the root directory")
        return target

    def _id(self, field: bytes, pax: Mapping[bytes, bytes], key: bytes) -> int:
        number = _pax_number(pax, key) if pax.get(key) else None
        number = _number(field, key.decode(), blank=True) if number is None else number
        if not 0 <= number <= _ID_MAX:
            raise ArchiveError(f"an entry's {key.decode()} is {number}")
        return number

    def _content(self, header: bytes, pax: Mapping[bytes, bytes], path: bytes, kind: Kind) -> int:
        """Set up `data()`; the size. PAX's may only say what the header's eleven octal digits can't."""
        size = self._size(header)
        larger = _pax_number(pax, b"size")
        if larger is not None and larger != size:
            if larger < 8**11:
                raise ArchiveError(f"{show(path)}: a size of {size} bytes in its header, of {larger} in PAX")
            size = larger
        if size and kind != "file":
            raise ArchiveError(f"{show(path)}: a {kind} of {size} bytes")
        self._stream.check_room(size)
        self._left, self._padding = size, -size % BLOCK
        return size

    def _xattrs(self, pax: Mapping[bytes, bytes], path: bytes) -> tuple[tuple[bytes, bytes], ...]:
        found = tuple((key[len(_XATTR) :], value) for key, value in pax.items() if key.startswith(_XATTR))
        if len(found) > self._limits.xattrs or any(len(value) > self._limits.xattr for _, value in found):
            raise ArchiveError(f"{show(path)}: too many or too large extended attributes")
        return found
