"""archive: a tar archive is read as tarfile reads it, or refused by a sentence; nothing in it grows without bound."""

from __future__ import annotations

import gzip
import io
import lzma
import random
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devns import archive
from devns.archive import LIMITS, ArchiveError, Entry, Limits, Stream, Tar, clean, open_tar, show
from devns.errors import Unsupported

END = bytes(1024)
KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.LNKTYPE: "hardlink",
    tarfile.SYMTYPE: "symlink",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.DIRTYPE: "directory",
    tarfile.FIFOTYPE: "fifo",
}


def checked(block: bytes) -> bytes:
    """The header with the checksum it must have."""
    total = sum(block[:148]) + sum(block[156:]) + 8 * 0x20
    return block[:148] + b"%06o\0 " % total + block[156:]


def header(
    name: bytes = b"x", kind: bytes = b"0", size: int | bytes = 0, target: bytes = b"", **fields: bytes
) -> bytes:
    """One ustar header block; `fields` override mode, uid, gid, mtime, magic or prefix by their raw bytes."""
    raw_size = size if isinstance(size, bytes) else b"%011o\0" % size
    parts = {"mode": b"0000644\0", "uid": b"0000000\0", "gid": b"0000000\0", "mtime": b"%011o\0" % 1, **fields}
    block = name.ljust(100, b"\0") + parts["mode"] + parts["uid"] + parts["gid"] + raw_size + parts["mtime"]
    block += b" " * 8 + kind + target.ljust(100, b"\0") + parts.get("magic", b"ustar\x0000") + bytes(80)
    return checked((block + parts.get("prefix", b"")).ljust(512, b"\0"))


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(data: bytes = b"", **arguments: Any) -> bytes:
    return header(size=len(data), **arguments) + padded(data)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    body = []
    for key, value in records:
        rest = b" " + key + b"=" + value + b"\n"
        length = len(rest) + 1
        while length != len(rest) + len(b"%d" % length):
            length += 1
        body.append(b"%d" % length + rest)
    return member(b"".join(body), name=b"pax", kind=kind)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    return member(name, name=b"././@LongLink", kind=kind, magic=b"ustar  \0")


def reading(data: bytes, limits: Limits = LIMITS) -> Tar:
    return open_tar(io.BytesIO(data).read, limits)


def entries(data: bytes, limits: Limits = LIMITS) -> list[Entry]:
    return list(reading(data, limits))


def contents(data: bytes) -> dict[bytes, bytes]:
    tar = reading(data)
    return {entry.path: b"".join(tar.data()) for entry in tar}


def refused(data: bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(ArchiveError) as caught:
        contents(data) if limits is LIMITS else entries(data, limits)
    return caught.value.message


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "path"),
    [
        (b"x", b"x"),
        (b"./x", b"x"),
        (b"/x", b"x"),
        (b"//x", b"x"),
        (b"././/./x", b"x"),
        (b"a//b/./c", b"a/b/c"),
        (b"/a/b", b"a/b"),
        (b"C:\\x", b"C:\\x"),
        (b"a\\..\\b", b"a\\..\\b"),
        (b"...", b"..."),
        (b"..x/y..", b"..x/y.."),
        (b"~/x", b"~/x"),
        (b"%2e%2e/x", b"%2e%2e/x"),
        (b" ", b" "),
        (b"\xff\xfe", b"\xff\xfe"),
        (b"a\nb", b"a\nb"),
    ],
)
def test_A_01_a_name_is_taken_relative_to_the_root_however_it_is_spelt(spelling: bytes, path: bytes) -> None:
    assert [entry.path for entry in entries(header(spelling) + END)] == [path]


@pytest.mark.parametrize(
    "spelling",
    b".. ../x /.. /../x a/.. a/../x a/../../x ./../x x/./.. a//../..//b ../../../x ..//x //../x a/b/../../../x".split(),
)
@pytest.mark.parametrize("by", ["name", "prefix", "pax", "gnu", "hardlink"])
def test_A_01_a_name_with_two_dots_is_refused_wherever_it_stands(spelling: bytes, by: str) -> None:
    data = {
        "name": header(spelling),
        "prefix": header(b"x", prefix=spelling),
        "pax": pax((b"path", spelling)) + header(),
        "gnu": long_name(spelling + b"\0") + header(magic=b"ustar  \0"),
        "hardlink": header(kind=b"1", target=spelling),
    }[by]
    assert "'..' in it" in refused(data + END)


def test_A_03_a_path_or_a_component_longer_than_linux_takes_is_refused() -> None:
    longest = b"/".join([b"d" * 255] * 15) + b"/" + b"f" * 255
    assert clean(longest) == longest
    assert "a path of 4352 bytes" in refused(pax((b"path", longest + b"/" + b"g" * 256)) + header() + END)
    assert "more than 255 bytes" in refused(pax((b"path", b"d" * 256 + b"/x")) + header() + END)


@pytest.mark.parametrize("spelling", [b"/", b".", b"./", b"/.", b"//", b"./."])
@pytest.mark.parametrize("kind", [b"0", b"1", b"2", b"3", b"6"])
def test_A_06_only_a_directory_may_be_the_root(spelling: bytes, kind: bytes) -> None:
    assert "with the name of a directory" in refused(header(spelling, kind, target=b"x") + END)
    assert [entry.path for entry in entries(header(spelling, b"5") + END)] == [b""]


def test_a_file_with_a_directorys_name_is_refused_as_some_readers_make_it_one() -> None:
    assert "with the name of a directory" in refused(header(b"x/") + END)
    assert "with the name of a directory" in refused(header(b"x/", b"\0") + END)


def test_A_20_gnu_long_names_are_capped_and_must_be_one_plain_string() -> None:
    path = b"/".join([b"d" * 200] * 3)
    assert [entry.path for entry in entries(long_name(path + b"\0") + header(magic=b"ustar  \0") + END)] == [path]
    assert "has no end" in refused(long_name(path) + header(magic=b"ustar  \0") + END)
    assert "is empty" in refused(long_name(b"") + header() + END)
    assert "is empty" in refused(long_name(b"\0\0") + header() + END)
    assert "NUL" in refused(long_name(b"a\0b\0") + header() + END)
    assert "more than 65536" in refused(long_name(b"a" * 70_000) + header() + END)
    assert "a path of 60000 bytes" in refused(long_name(b"a/" * 30_000 + b"\0") + header() + END)


def test_a_gnu_long_link_is_the_target() -> None:
    target = b"t" * 180
    found = entries(long_name(target + b"\0", b"K") + header(kind=b"2", magic=b"ustar  \0") + END)
    assert [(entry.kind, entry.target) for entry in found] == [("symlink", target)]


def test_A_22_names_are_bytes_and_messages_show_them_without_control_characters() -> None:
    names = [
        b"\xff\xfe",
        b"\x1b]52;c;x\x07",
        b"a\nb",
        "\u202eexe".encode(),
        b"\x80" * 255,
        "\ud800".encode("utf-8", "surrogatepass"),
    ]
    assert list(contents(b"".join(header(b"d/" + name[:90]) for name in names) + END)) == [
        b"d/" + n[:90] for n in names
    ]
    for name in names:
        assert show(name).isprintable()
    assert len(show(b"\n" * 4000)) < 500


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [
        b"\xff" * 12,  # -1
        b"\x80" + b"\xff" * 11,  # 2**88 - 1
        b"\x80\0\0\0\x7f" + b"\xff" * 7,  # 2**63 - 1
        b"\xc0" + bytes(11),
        b"-0000000001\0",
        b"+0000000001\0",
        b"0x000000001\0",
        b"0000000009 \0",
        b"1_0\0".ljust(12, b"\0"),
        b"12\x0034".ljust(12, b"\0"),
        b"\0" * 12,
        b" " * 12,
        b"\x0012".ljust(12, b"\0"),
        b"77777777777\0",
        "\u0661".encode().ljust(12, b"\0"),
    ],
)
def test_A_17_a_size_that_is_no_honest_number_is_refused_at_once(size: bytes) -> None:
    started = time.monotonic()
    message = refused(header(size=size) + END, replace(LIMITS, unpacked=1 << 32))
    assert any(word in message for word in ("not a number", "negative", "holds more than"))
    assert time.monotonic() - started < 60  # it would be years


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": b"7777777\0"},
        {"mode": b"\x80\0\0\0\xff\xff\xff\xff"},
        {"mode": b"\xff" * 8},
        {"uid": b"\x80\0\0\2\0\0\0\0"},
        {"uid": b"\x80\0\0\0\xff\xff\xff\xff"},  # -1 to chown(2)
        {"gid": b"\xff" * 8},
        {"gid": b"rootroot"},
        {"mtime": b"tomorrow".ljust(12)},
    ],
)
def test_A_23_a_mode_or_owner_that_cannot_be_is_refused(fields: dict[str, bytes]) -> None:
    refused(header(**fields) + END)


@pytest.mark.parametrize("value", [b"nan", b"inf", b"1e9", b"0x1", b"-", b"", b".5", b"1_0", b"--1", b"9" * 30, b"1 "])
def test_A_23_a_pax_time_that_is_no_decimal_number_is_refused(value: bytes) -> None:
    if value:
        assert "is not a time" in refused(pax((b"mtime", value)) + header() + END)
    else:  # POSIX: an empty value means that the header's counts
        assert entries(pax((b"mtime", value)) + header() + END)[0].mtime == 10**9


@pytest.mark.parametrize(
    ("value", "nanoseconds"),
    [
        (b"0", 0),
        (b"1.5", 1_500_000_000),
        (b"1.0000000019", 1_000_000_001),
        (b"-1.5", -1_500_000_000),
        (b"-0.0000000001", -1),
        (b"1700000000.123456789", 1_700_000_000_123_456_789),
        (b"7.", 7_000_000_000),
    ],
)
def test_pax_times_are_exact_nanoseconds_rounded_down(value: bytes, nanoseconds: int) -> None:
    assert entries(pax((b"mtime", value)) + header() + END)[0].mtime == nanoseconds


def test_base_256_numbers_and_file_types_in_modes_are_read() -> None:
    block = header(mode=b"0100755\0", uid=b"\x80\0\0\0\0\x0f\x42\x40", mtime=b"\xff" * 11 + b"\xfe")
    assert entries(block + END) == [Entry(b"x", "file", 0o755, 1_000_000, 0, 0, -2 * 10**9)]


# --- PAX and what does not go together --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pax((b"size", b"3")) + member(b"abcd"), "a size of 4 bytes in its header, of 3 in PAX"),
        (pax((b"size", b"1024")) + member(b""), "of 1024 in PAX"),
        (pax((b"size", b"-1")) + member(b""), "is not a number"),
        (pax((b"size", b"")) + member(b""), "is not a number"),
        (pax((b"path", b"")) + header(), "without a name"),
        (pax((b"path", b"a\0b")) + header(), "NUL"),
        (pax((b"path", b"a"), (b"path", b"b")) + header(), "twice"),
        (pax((b"path", b"a")) + pax((b"path", b"b")) + header(), "don't go together"),
        (pax((b"path", b"a")) + long_name(b"b\0") + header(), "don't go together"),
        (long_name(b"b\0") + pax((b"path", b"a")) + header(), "don't go together"),
        (long_name(b"b\0") + long_name(b"c\0") + header(), "don't go together"),
        (pax((b"comment", b"a")) + pax((b"comment", b"a"), kind=b"g") + header(), "don't go together"),
        (pax((b"linkpath", b"")) + header(kind=b"2", target=b"t"), "a symlink to ''"),
        (pax((b"hdrcharset", b"latin1")) + header(), "character set"),
        (pax((b"path", b"a")), "before the entry it belongs to"),
        (long_name(b"a\0"), "before the entry it belongs to"),
        (pax((b"comment", b"a"), kind=b"g"), "before the entry it belongs to"),
        (pax((b"comment", b"a"))[:-9] + b"9 path=p\n" + header(), "in its padding"),
        (pax((b"path", b"a")) + header(b"x/", kind=b"\0"), "with the name of a directory"),
        (header(kind=b"5", size=512) + bytes(512), "a directory of 512 bytes"),
        (header(kind=b"1", size=512, target=b"t") + bytes(512), "a hardlink of 512 bytes"),
        (header(kind=b"2", size=512, target=b"t") + bytes(512), "a symlink of 512 bytes"),
        (header(kind=b"2"), "a symlink to ''"),
        (header(kind=b"1", target=b"./"), "a hardlink to the root directory"),
        (header(b""), "without a name"),
    ],
)
def test_A_18_what_two_readers_would_read_differently_is_refused(data: bytes, said: str) -> None:
    assert said in refused(data + END)


def test_A_18_pax_gives_the_size_that_eleven_octal_digits_cannot() -> None:
    big = 8**11 + 5
    tar = reading(pax((b"size", b"%d" % big)) + header(size=0), replace(LIMITS, unpacked=1 << 40))
    assert next(iter(tar)).size == big


@pytest.mark.parametrize(
    "body",
    [
        b"garbage",
        b"8 path=a\n",  # it is 9
        b"11 path=a\n",
        b"010 path=a\n",
        b"-10 path=a\n",
        b"9 path=ab",
        b"4 a=\n",
        b"6 =ab\n",
        b"99999999 path=a\n",
        b"10 path a\n",
        b"10 path=a\n\0",
        b"3 \n",
    ],
)
def test_A_21_malformed_pax_records_are_refused(body: bytes) -> None:
    assert "malformed" in refused(member(body, kind=b"x") + header() + END)


@pytest.mark.parametrize(
    "key", [b"path", b"linkpath", b"size", b"uid", b"mtime", b"SCHILY.xattr.user.x", b"GNU.sparse.major"]
)
def test_A_21_a_global_header_may_comment_but_not_change_entries(key: bytes) -> None:
    assert "a global PAX header sets" in refused(pax((key, b"1"), kind=b"g") + header() + END)
    assert len(entries(pax((b"comment", b"c0ffee"), kind=b"g") + header() + END)) == 1


def test_A_21_extension_headers_are_capped_and_many_records_take_no_time() -> None:
    records = [(b"k%d" % number, b"") for number in range(60_000)]
    assert len(entries(pax(*records) + header() + END)) == 1
    assert "more than 1048576" in refused(header(kind=b"x", size=(1 << 20) + 1) + END)
    assert "more than 10 entries" in refused(pax((b"comment", b""), kind=b"g") * 11 + END, replace(LIMITS, entries=10))


def test_A_14_extended_attributes_are_capped() -> None:
    attributes = [(b"SCHILY.xattr.user.%d" % number, b"v") for number in range(64)]
    assert entries(pax(*attributes) + header() + END)[0].xattrs[0] == (b"user.0", b"v")
    assert "extended attributes" in refused(pax(*attributes, (b"SCHILY.xattr.user.64", b"")) + header() + END)
    assert "extended attributes" in refused(pax((b"SCHILY.xattr.user.a", bytes(65_537))) + header() + END)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"a")) + header(),
            "sparse",
        ),
        (pax((b"GNU.sparse.map", b"0,1,-5,9223372036854775807")) + header(), "sparse"),
        (pax((b"GNU.sparse.size", b"9223372036854775807")) + header(), "sparse"),
        (header(kind=b"S", magic=b"ustar  \0"), "a GNU sparse file"),
    ],
)
def test_A_16_sparse_files_are_refused_by_name(data: bytes, said: str) -> None:
    assert said in refused(data + END)


def test_A_16_a_huge_file_is_refused_before_any_of_it_is_read() -> None:
    assert "holds more than" in refused(header(size=b"\x80" + (8 << 60).to_bytes(11, "big")) + END)


@pytest.mark.parametrize("kind", [b"7", b"D", b"M", b"N", b"V", b"X", b"A", b"Z", b"\xff", b" "])
def test_A_09_types_that_are_not_read_are_refused_by_name(kind: bytes) -> None:
    assert refused(header(kind=kind) + END).endswith(": not read")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (header(magic=bytes(8)), "neither ustar, PAX nor GNU"),
        (header(magic=b"ustar\x0001"), "neither ustar, PAX nor GNU"),
        (header(magic=b"ustar  \0", prefix=b"p"), "a GNU header with more than a name"),
        (header()[:148] + b"0000000\0" + header()[156:], "checksum"),
        (b"\x01" * 512, "checksum"),
    ],
)
def test_headers_of_other_formats_are_refused(data: bytes, said: str) -> None:
    assert said in refused(data + END)


# --- ends -------------------------------------------------------------------------------------------------------------


def some_archive() -> bytes:
    return (
        header(b"./", b"5")
        + member(bytes(range(256)) * 20, name=b"big")
        + pax((b"path", b"p" * 150), (b"comment", b"c" * 700))
        + member(b"x")
        + long_name(b"q" * 700 + b"\0", b"K")
        + header(b"link", b"2", magic=b"ustar  \0")
        + member(b"last " * 300, name=b"last")
        + header(b"hard", b"1", target=b"last")
        + END
    )


def test_A_26_an_archive_cut_at_any_block_is_refused() -> None:
    data = some_archive()
    assert len(contents(data)) == 6
    for at in range(0, len(data), 512):
        assert "ends" in refused(data[:at]) or "end marker" in refused(data[:at])


def test_A_26_an_archive_cut_within_a_block_is_refused() -> None:
    data = some_archive()
    for at in range(1, len(data), 97):
        refused(data[:at])


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_A_26_compressed_data_cut_anywhere_is_refused(pack: Any) -> None:
    data = pack(some_archive())
    assert len(contents(data)) == 6
    for at in range(1, len(data), 7):
        refused(data[:at])


def test_A_26_what_follows_the_end_is_no_part_of_the_archive() -> None:
    data = some_archive()
    for tail in (b"\0" * 9216, b"garbage", header(b"../x") + END):
        assert contents(data + tail) == contents(data)


def test_A_26_one_block_of_zeros_is_no_end() -> None:
    assert "one block of zeros" in refused(header() + bytes(512) + header(b"y") + END)


def test_A_26_a_wrong_checksum_after_the_end_is_seen() -> None:
    packed = bytearray(gzip.compress(some_archive() + bytes(1 << 20)))
    packed[-5] ^= 1  # of the length and CRC-32 at the end
    assert "damaged gz data" in refused(bytes(packed))


# --- decompression ----------------------------------------------------------------------------------------------------


def plain(data: bytes, packing: archive.Packing, limits: Limits = LIMITS) -> bytes:
    return Stream(io.BytesIO(data).read, packing, limits).take(1 << 40)


@pytest.mark.parametrize(("pack", "packing"), [(gzip.compress, "gz"), (lzma.compress, "xz")])
def test_several_members_and_their_padding_are_one_stream(pack: Any, packing: archive.Packing) -> None:
    assert plain(pack(b"one") + pack(b"") + bytes(8) + pack(b"two") + bytes(512), packing) == b"onetwo"


@pytest.mark.parametrize(("pack", "packing"), [(gzip.compress, "gz"), (lzma.compress, "xz")])
def test_garbage_after_a_compressed_stream_is_refused(pack: Any, packing: archive.Packing) -> None:
    with pytest.raises(ArchiveError, match="damaged"):
        plain(pack(b"one") + b"garbage and more of it", packing)


@pytest.mark.parametrize("packing", ["gz", "xz"])
@given(data=st.binary(max_size=200))
@settings(max_examples=60, deadline=None, database=None)
def test_random_bytes_are_damage_and_never_a_traceback(packing: archive.Packing, data: bytes) -> None:
    magic = b"\x1f\x8b\x08\0" if packing == "gz" else b"\xfd7zXZ\0"
    with pytest.raises(ArchiveError):
        plain(magic + data, packing)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"BZh91AY", "bzip2"),
        (b"PK\3\4....", "zip"),
        (b"\x04\x22\x4d\x18....", "lz4"),
        (b"LZIP\1...", "lzip"),
        (b"\x5d\0\0\x80\0", "lzma"),
        (b"!<arch>\n", "ar"),
        (b"\x1f\x9d......", "compress"),
    ],
)
def test_other_packings_are_refused_by_name(start: bytes, name: str) -> None:
    assert f"this is {name} data" in refused(start + bytes(1024))


def bomb(pack: Any, megabytes: int) -> bytes:
    return bytes(pack(bytes(1 << 20)) * megabytes)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_A_15_a_bomb_is_refused_soon_after_64_MiB(pack: Any) -> None:
    whole = pack(header(size=1 << 30)) + bomb(pack, 200)
    tar = reading(whole)
    assert next(iter(tar)).size == 1 << 30
    came: list[int] = []
    with pytest.raises(ArchiveError, match="more than 200 times"):
        came.extend(map(len, tar.data()))
    assert 60 << 20 < sum(came) < 72 << 20


def test_A_15_the_total_and_the_number_of_entries_are_bounded() -> None:
    assert "holds more than 4096" in refused(header() * 20 + END, replace(LIMITS, unpacked=4096))
    assert "more than 3 entries" in refused(header() * 4 + END, replace(LIMITS, entries=3))
    assert "larger than 1024" in refused(header() * 4 + END, replace(LIMITS, packed=1024))


MEMORY_CHILD = """
import io, lzma, resource, sys, zlib
from devns.archive import ArchiveError, open_tar
resource.setrlimit(resource.RLIMIT_AS, (256 << 20, 256 << 20))
compressor = zlib.compressobj(9, wbits=31) if sys.argv[1] == "gz" else lzma.LZMACompressor(preset=0)
packed = io.BytesIO(b"".join([*(compressor.compress(bytes(1 << 20)) for _ in range(100)), compressor.flush()]))
try:
    list(open_tar(packed.read))
except ArchiveError as error:
    print(error)
"""


@pytest.mark.parametrize("packing", ["gz", "xz"])
def test_A_15_a_bomb_needs_no_memory(packing: str) -> None:
    """100 MiB of zeros in one member: read as a tar archive its end marker comes first, and the rest is drained."""
    command = [sys.executable, "-c", MEMORY_CHILD, packing]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "more than 200 times" in done.stdout


def test_A_15_xz_may_not_ask_for_more_memory_than_its_largest_preset() -> None:
    packed = bytearray(lzma.compress(b"x" * 4096))
    # The block header, after 12 bytes of stream header: its size, flags, the filter 0x21, one byte of properties
    # (the dictionary's size), ..., CRC-32. xz-file-format.txt, 3.1 and 5.3.1
    end = 12 + packed[12] * 4
    packed[packed.index(b"\x21\x01", 12) + 2] = 40  # 4 GiB - 1
    packed[end : end + 4] = zlib.crc32(packed[12:end]).to_bytes(4, "little")
    with pytest.raises(ArchiveError, match=r"[Mm]emory"):
        plain(bytes(packed), "xz")


def test_zstd_without_a_module_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_zstd", None)
    with pytest.raises(Unsupported) as caught:
        entries(b"\x28\xb5\x2f\xfd" + bytes(100))
    assert caught.value.hint == "pip install 'devns[zstd]'"


class FakeZstd:
    """Expands each byte to 1000, ends at a "!": what zstandard's decompressobj looks like."""

    def __init__(self) -> None:
        self.eof = False
        self.unused_data = b""
        self.largest = 0

    def decompress(self, data: bytes) -> bytes:
        self.largest = max(self.largest, len(data))
        body, end, rest = bytes(data).partition(b"!")
        if end:
            self.eof, self.unused_data = True, rest
        return b"".join(bytes([byte]) * 1000 for byte in body)


def test_A_15_zstandard_which_has_no_bound_is_fed_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeZstd] = []

    def decompressobj() -> FakeZstd:
        made.append(FakeZstd())
        return made[-1]

    module = SimpleNamespace(
        __name__="zstandard", ZstdDecompressor=lambda: SimpleNamespace(decompressobj=decompressobj)
    )
    monkeypatch.setattr(archive, "_zstd", module)
    assert plain(b"a" * 5000 + b"!" + b"b" * 3 + b"!\0\0", "zst") == b"a" * 5_000_000 + b"b" * 3000
    assert [decoder.largest <= 1024 for decoder in made] == [True, True]
    with pytest.raises(ArchiveError, match="ends in the middle"):
        plain(b"a" * 5000, "zst")


# --- against tarfile --------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "d", "e-mail", "x y", "é", "\udcff", "n" * 90, "l" * 140, "\n"])
PATHS = st.builds("/".join, st.lists(NAMES, min_size=1, max_size=3))
MEMBERS = st.fixed_dictionaries(
    {
        "name": PATHS,
        "type": st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, *KINDS]),
        "data": st.binary(max_size=1200),
        "mode": st.integers(0, 0o7777),
        "uid": st.sampled_from([0, 1000, 2_097_151, 2_097_152, 4_000_000_000]),
        "mtime": st.sampled_from([0, 1, 1_700_000_000, 8_589_934_592, -5]),
        "linkname": PATHS,
    }
)


def packed_by_tarfile(members: Iterable[dict[str, Any]], form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for fields in members:
            info = tarfile.TarInfo(fields["name"])
            for key in ("type", "mode", "uid", "mtime"):
                setattr(info, key, fields[key])
            if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                info.linkname = fields["linkname"]
            data = fields["data"] if info.isreg() else b""
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # this format can't say it
                continue
    return out.getvalue()


def normal(path: str) -> bytes:
    parts = path.encode("utf-8", "surrogateescape").split(b"/")
    return b"/".join(part for part in parts if part not in (b"", b"."))


def read_by_tarfile(data: bytes) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        for info in tar:
            target = b""
            if info.islnk():
                target = normal(info.linkname)
            elif info.issym():
                target = info.linkname.encode("utf-8", "surrogateescape")
            file = tar.extractfile(info) if info.isreg() else None
            kind = KINDS.get(info.type, "?")
            found.append(
                (
                    normal(info.name),
                    kind,
                    info.mode & 0o7777,
                    info.uid,
                    int(info.mtime // 1),
                    target,
                    file.read() if file else b"",
                )
            )
    return found


def read_by_us(data: bytes) -> list[tuple[Any, ...]] | None:
    tar = reading(data)
    try:
        return [
            (entry.path, entry.kind, entry.mode, entry.uid, entry.mtime // 10**9, entry.target, b"".join(tar.data()))
            for entry in tar
        ]
    except ArchiveError:
        return None


@given(
    members=st.lists(MEMBERS, max_size=5),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(max_examples=150, deadline=None, database=None)
def test_A_19_what_tarfile_writes_is_read_as_tarfile_reads_it(members: list[dict[str, Any]], form: int) -> None:
    data = packed_by_tarfile(members, form)
    assert read_by_us(data) == read_by_tarfile(data)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed in headers, the checksum made right again: what a fuzzer needs to get past it."""
    blocks = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(blocks) // 512) * 512
        field = chance.choice(
            [(0, 8), (100, 136), (136, 148), (156, 157), (157, 165), (257, 265), (345, 360), (0, 512)]
        )
        for _ in range(chance.randint(1, 3)):
            blocks[at + chance.randrange(*field)] = chance.choice(b"\0 0157LKxg5/.-\x80\xff=\n")
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at : at + 512] = checked(bytes(blocks[at : at + 512]))
    return bytes(blocks)


@given(
    members=st.lists(MEMBERS, min_size=1, max_size=3),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=300, deadline=None, database=None)
def test_A_19_a_changed_archive_is_read_as_tarfile_reads_it_or_refused(
    members: list[dict[str, Any]], form: int, seed: int
) -> None:
    data = mutated(packed_by_tarfile(members, form), random.Random(seed))
    ours = read_by_us(data)
    if ours is not None:
        assert ours == read_by_tarfile(data)
