"""unpack, writer, debfile: no archive touches what is outside its root, and what is honest arrives exact."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import random
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from devns import linux, unpack, writer
from devns.archive import LIMITS, ArchiveError, Limits
from devns.errors import DevnsError
from devns.progress import Silent
from devns.unpack import DebRecord, unpack_deb, unpack_debs, unpack_tar
from devns.writer import Owner, Unpacked, walk

Member = tuple[str, dict[str, Any]]
ME: dict[str, Any] = {"uid": os.getuid(), "gid": os.getgid()}


def picture(top: Path) -> dict[str, tuple[Any, ...]]:
    """All that can be seen of a tree; times but of directories only, which a refused archive may have touched."""
    found: dict[str, tuple[Any, ...]] = {}
    for directory, names, files in os.walk(top):
        for name in [*names, *files]:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            content: Any = os.readlink(path) if stat.S_ISLNK(status.st_mode) else None
            if stat.S_ISREG(status.st_mode):
                content = Path(path).read_bytes()
            found[os.path.relpath(path, top)] = (stat.filemode(status.st_mode), content, status.st_mtime_ns)
    return found


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """What must be the same before and after: files beside the root, and where it lies."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "secret").write_text("secret")
    (place / "secret").chmod(0o640)
    (place / "directory").mkdir(mode=0o750)
    os.utime(place / "secret", ns=(10**18, 10**18))
    os.utime(place / "directory", ns=(10**18, 10**18))
    before = picture(place)
    yield place
    assert picture(place) == before
    assert set(os.listdir(tmp_path)) <= {"outside", "root"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "root"
    place.mkdir()
    return place


def entry(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> Member:
    return name, {"type": kind, **fields}


def directory(name: str, mode: int = 0o755, **fields: Any) -> Member:
    return entry(name, tarfile.DIRTYPE, mode=mode, **fields)


def symlink(name: str, target: str, **fields: Any) -> Member:
    return entry(name, tarfile.SYMTYPE, linkname=target, mode=0o777, **fields)


def hardlink(name: str, target: str, **fields: Any) -> Member:
    return entry(name, tarfile.LNKTYPE, linkname=target, **fields)


def file(name: str, data: bytes = b"data", mode: int = 0o644, **fields: Any) -> Member:
    return entry(name, data=data, mode=mode, **fields)


def tarball(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for name, fields in members:
            info = tarfile.TarInfo(name)
            info.mtime = 1_600_000_000
            data = fields.pop("data", b"")
            for key, value in fields.items():
                setattr(info, key, value)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def unpacked(root: Path, *members: Member, limits: Limits = LIMITS, **options: Any) -> Unpacked:
    archive = root.parent / "archive.tar"
    archive.write_bytes(tarball(*members))
    root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    before = len(os.listdir("/proc/self/fd"))
    try:
        return unpack_tar(
            str(archive), root_fd, **{"keep_special": False, "owners": False, "limits": limits, **options}
        )
    finally:
        assert len(os.listdir("/proc/self/fd")) == before  # nothing is left open, also when it fails
        os.close(root_fd)
        archive.unlink()


def refused(root: Path, *members: Member, **options: Any) -> str:
    with pytest.raises(ArchiveError) as caught:
        unpacked(root, *members, **options)
    assert caught.value.message.startswith("archive.tar: ")
    return caught.value.message


def modes(root: Path) -> dict[str, str]:
    return {name: seen[0] for name, seen in picture(root).items()}


# --- the way in: paths and symlinks -----------------------------------------------------------------------------------


def test_what_is_honest_arrives_exact(root: Path, outside: Path) -> None:
    done = unpacked(
        root,
        directory("./"),
        directory("./etc", 0o750),
        file("./etc/f", b"hello", 0o640, mtime=1_234_567_890.5),
        file("./empty", b"", 0o600),
        file("./a b\n", bytes(range(256)) * 5000),
        symlink("./l", "/etc/f", mtime=7),
        hardlink("./hard", "./etc/f"),
    )
    assert picture(root) == {
        "etc": ("drwxr-x---", None, 16 * 10**17),
        "etc/f": ("-rw-r-----", b"hello", 1_234_567_890_500_000_000),
        "empty": ("-rw-------", b"", 16 * 10**17),
        "a b\n": ("-rw-r--r--", bytes(range(256)) * 5000, 16 * 10**17),
        "l": ("lrwxrwxrwx", "/etc/f", 7 * 10**9),
        "hard": ("-rw-r-----", b"hello", 1_234_567_890_500_000_000),
    }
    assert os.stat(root / "hard").st_ino == os.stat(root / "etc/f").st_ino
    assert (stat.S_IMODE(os.stat(root).st_mode), os.stat(root).st_mtime) == (0o755, 1_600_000_000)
    assert done == Unpacked(entries=7, size=5 + 256 * 5000)


@pytest.mark.parametrize("name", ["/etc/x", "//etc/x", "./etc/x", "etc//x", ".//etc/./x"])
def test_A_01_every_spelling_stays_beneath_the_root(root: Path, outside: Path, name: str) -> None:
    unpacked(root, file(name))
    assert (root / "etc/x").read_bytes() == b"data"


@pytest.mark.parametrize("name", ["../outside/x", "/../outside/x", "a/../../outside/x", "a/.."])
def test_A_01_dots_are_refused_and_nothing_is_written(root: Path, outside: Path, name: str) -> None:
    assert "'..' in it" in refused(root, file(name))
    assert os.listdir(root) == []


@pytest.mark.parametrize(
    "target", ["{outside}", "../outside", "/../../outside", "a/../../outside", "/l2", "{outside}/directory/.."]
)
@pytest.mark.parametrize("what", ["file", "directory", "symlink", "hardlink"])
def test_A_02_an_entry_through_a_symlink_stays_in_the_root(root: Path, outside: Path, target: str, what: str) -> None:
    target = target.format(outside=outside)
    members = {
        "file": [file("l/secret", b"planted", 0o777)],
        "directory": [directory("l/directory", 0o777), file("l/directory/x")],
        "symlink": [symlink("l/secret", "/etc/passwd")],
        "hardlink": [file("own"), hardlink("l/secret", "own")],
    }[what]
    unpacked(root, symlink("l2", str(outside)), symlink("l", target), *members)
    assert os.readlink(root / "l") == target


def test_A_02_a_chain_of_symlinks_is_followed_in_the_root_up_to_linuxs_limit(root: Path, outside: Path) -> None:
    def chain(length: int) -> list[Member]:
        links = [symlink(f"l{number}", f"l{number + 1}") for number in range(length)]
        return [directory(f"l{length}"), *links, file("l0/x")]

    unpacked(root, *chain(40))
    assert (root / "l40/x").exists()
    assert "symbolic links" in refused(root, symlink("m0", "l0"), file("m0/x"))
    assert "symbolic links" in refused(root, symlink("loop", "loop"), file("loop/x"))


def test_A_02_a_directory_replaced_by_a_symlink_is_not_remembered(root: Path, outside: Path) -> None:
    unpacked(root, directory("d"), file("d/first"), directory("e"), symlink("e", "/d"), file("e/second"))
    assert sorted(os.listdir(root / "d")) == ["first", "second"]
    unpacked(root, directory("x/y"), symlink("x/y", str(outside)), file("x/y/secret", b"planted"))
    assert (root / str(outside)[1:] / "secret").read_bytes() == b"planted"


def test_A_02_a_symlink_replaced_by_another_leads_where_the_last_one_says(root: Path, outside: Path) -> None:
    unpacked(root, symlink("l", "one"), file("l/x"), symlink("l", "two"), file("l/y"), symlink("l", "/"), file("l/z"))
    assert (os.listdir(root / "one"), os.listdir(root / "two")) == (["x"], ["y"])
    assert (root / "z").exists()


def test_A_02_a_symlink_to_what_is_not_there_yet_makes_it_in_the_root(root: Path, outside: Path) -> None:
    unpacked(root, symlink("var/run", "/run"), file("var/run/x"), directory("run", 0o711))
    assert modes(root) == {
        "run": "drwx--x--x",
        "run/x": "-rw-r--r--",
        "var": "drwxr-xr-x",
        "var/run": "lrwxrwxrwx",
    }


def test_A_03_a_chain_of_long_components_does_not_leave_the_root(root: Path, outside: Path) -> None:
    """CVE-2025-4517: the expanded path is longer than PATH_MAX, where realpath(3) gave up."""
    step, members, path = "d" * 247, [], ""
    for letter in "abcdefghijklmnop":
        members += [directory(path + step), symlink(path + letter, step)]
        path += step + "/"
    link = "/".join("abcdefghijklmnop") + "/" + "l" * 254
    members += [symlink(link, "../" * 16), symlink("escape", link + "/../outside"), file("escape/x")]
    unpacked(root, *members)


@pytest.mark.parametrize("name", ["../root/x", "a/../../root/x", "./../root/x", "../root/../outside/x"])
def test_A_04_leaving_and_coming_back_is_refused(root: Path, outside: Path, name: str) -> None:
    assert "'..' in it" in refused(root, directory("a"), file(name))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([hardlink("h", "/{outside}/secret")], "No such file"),
        ([hardlink("h", "../outside/secret")], "'..' in it"),
        ([symlink("l", "{outside}/secret"), hardlink("h", "l")], "not a file"),
        ([symlink("l", "{outside}"), hardlink("h", "l/secret")], "No such file"),
        ([directory("d"), hardlink("h", "d")], "not a file"),
        ([hardlink("h", "later"), file("later")], "No such file"),
        ([file("h"), hardlink("h", "h")], "to itself"),
        ([file("h"), symlink("l", "."), hardlink("l/h", "h")], "to itself"),
        ([file("f"), directory("h"), file("h/x"), hardlink("h", "f")], "not empty"),
    ],
)
def test_A_05_a_hard_link_is_to_a_file_of_this_tree_or_refused(
    root: Path, outside: Path, members: list[Member], said: str
) -> None:
    for _, fields in members:
        if "linkname" in fields:
            fields["linkname"] = fields["linkname"].format(outside=str(outside))
    assert said in refused(root, *(replaced(member) for member in members))


def replaced(member: Member) -> Member:
    return member[0], dict(member[1])


def test_A_05_a_hard_links_mode_and_time_are_the_files(root: Path, outside: Path) -> None:
    unpacked(root, file("f", mode=0o600, mtime=5), hardlink("h", "f", mode=0o6777, mtime=9))
    assert picture(root)["h"] == picture(root)["f"] == ("-rw-------", b"data", 5 * 10**9)


def test_A_05_a_file_over_a_hard_link_leaves_the_other_name_alone(root: Path, outside: Path) -> None:
    unpacked(root, file("f", b"old", 0o600), hardlink("h", "f"), file("h", b"new", 0o777))
    assert picture(root)["f"][:2] == ("-rw-------", b"old")
    assert picture(root)["h"][:2] == ("-rwxrwxrwx", b"new")


def test_A_06_the_root_itself_cannot_be_replaced(root: Path, outside: Path) -> None:
    for name in ("/", ".", "./", "//."):
        assert "with the name of a directory" in refused(root, symlink(name, str(outside)))
    unpacked(root, directory("./", 0o000))
    assert stat.S_IMODE(os.stat(root).st_mode) == 0o700  # else nobody could use or remove it


def test_A_07_a_directorys_mode_and_time_are_never_set_through_a_symlink(root: Path, outside: Path) -> None:
    unpacked(root, directory("d", 0o777, mtime=5), symlink("d", str(outside / "directory")))
    unpacked(root, symlink("e", str(outside / "directory")), directory("e", 0o777, mtime=5))
    assert os.readlink(root / "d") == str(outside / "directory")
    assert picture(root)["e"] == ("drwxrwxrwx", None, 5 * 10**9)


KINDS: dict[str, Callable[[str], Member]] = {
    "file": lambda name: file(name, b"new", 0o600),
    "directory": lambda name: directory(name, 0o700),
    "symlink": lambda name: symlink(name, "../outside/secret"),
    "hardlink": lambda name: hardlink(name, "first"),
}


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_A_08_the_last_entry_of_a_name_wins(root: Path, outside: Path, one: str, other: str) -> None:
    unpacked(root, file("first", b"first"), KINDS[one]("x"), KINDS[other]("x"))
    kinds = {"file": stat.S_ISREG, "directory": stat.S_ISDIR, "symlink": stat.S_ISLNK, "hardlink": stat.S_ISREG}
    assert kinds[other](os.lstat(root / "x").st_mode)
    assert (root / "first").read_bytes() == b"first"


def test_A_08_a_directory_with_files_is_not_replaced(root: Path, outside: Path) -> None:
    assert "not empty" in refused(root, directory("d"), file("d/x"), symlink("d", str(outside)))
    assert (root / "d/x").exists()


def test_A_08_a_file_is_no_parent(root: Path, outside: Path) -> None:
    assert "Not a directory" in refused(root, file("f"), file("f/x"))


# --- what is left out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_A_09_devices_and_fifos_are_left_out_and_counted(root: Path, outside: Path, kind: bytes) -> None:
    assert unpacked(root, entry("dev/x", kind, mode=0o666), file("y")).nodes == 1
    assert modes(root) == {"y": "-rw-r--r--"}


def test_A_11_a_device_0_0_is_no_whiteout_and_wh_names_are_names(root: Path, outside: Path) -> None:
    names = [".wh.", ".wh..", ".wh..wh..opq", ".wh.x", ".wh..wh.plnk"]
    done = unpacked(root, entry("x", tarfile.CHRTYPE, devmajor=0, devminor=0), *(file(f"d/{name}") for name in names))
    assert done.nodes == 1
    assert sorted(os.listdir(root / "d")) == sorted(names)


def test_A_10_special_bits_are_taken_away_and_counted(root: Path, outside: Path) -> None:
    done = unpacked(root, file("f", mode=0o7777), directory("d", 0o7777), directory("tmp", 0o1777), symlink("l", "f"))
    assert modes(root) == {"f": "-rwxrwxrwx", "d": "drwxrwxrwt", "tmp": "drwxrwxrwt", "l": "lrwxrwxrwx"}
    assert done.special == 2


def test_A_10_special_bits_are_kept_where_asked(root: Path, outside: Path) -> None:
    done = unpacked(root, file("f", mode=0o6755, **ME), directory("d", 0o3770, **ME), keep_special=True, owners=True)
    assert modes(root) == {"f": "-rwsr-sr-x", "d": "drwxrws--T"}
    assert done.special == 0


def attributes(path: Path) -> dict[str, bytes]:
    return {
        name: os.getxattr(path, name, follow_symlinks=False)
        for name in os.listxattr(path, follow_symlinks=False)
        if name.startswith("user.")
    }


def test_A_13_an_archive_sets_no_attributes_that_mean_something(
    root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bytes]] = []
    monkeypatch.setattr(os, "setxattr", lambda fd, name, value, *rest: seen.append((os.fsdecode(name), value)))
    names = [
        "overlay.redirect",
        "overlay.metacopy",
        "overlay.opaque",
        "overlay.whiteout",
        "overlay.origin",
        "devns.owner",
    ]
    bad = [f"user.{name}" for name in names] + ["trusted.overlay.opaque", "security.selinux", "security.capability"]
    bad += ["system.posix_acl_access", "system.posix_acl_default", "nonsense", "user"]
    headers = {f"SCHILY.xattr.{name}": "y" for name in [*bad, "user.mine"]}
    done = unpacked(
        root,
        file("f", pax_headers=dict(headers)),
        directory("d", pax_headers=dict(headers)),
        symlink("l", "f", pax_headers=dict(headers)),
    )
    assert seen == [("user.mine", b"y")] * 2
    assert done.xattrs == 3 * len(bad) + 1
    seen.clear()
    unpacked(root, file("g", pax_headers=dict(headers)), keep_special=True)
    assert sorted(seen) == [("security.capability", b"y"), ("user.mine", b"y")]


def test_A_14_attributes_that_the_file_system_refuses_are_counted(root: Path, outside: Path) -> None:
    many = {f"SCHILY.xattr.user.{number}": "v" * 60_000 for number in range(16)}
    done = unpacked(root, file("f", pax_headers=many))
    assert done.xattrs + len(attributes(root / "f")) == 16


def test_owners_are_told_and_not_changed(root: Path, outside: Path) -> None:
    told: list[Owner] = []
    members = [directory("d", uid=5), file("d/f", mode=0o4755, gid=42), file("g"), symlink("l", "g", uid=7, gid=8)]
    unpacked(root, *members, record=told.append)
    assert told == [(b"d", 5, 0, 0o755), (b"d/f", 0, 42, 0o4755), (b"l", 7, 8, 0o777)]
    assert {os.lstat(root / name).st_uid for name in ("d", "d/f", "g", "l")} == {os.getuid()}


def test_with_owners_every_file_is_given_away_by_its_descriptor(
    root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(os, "fchown", lambda fd, uid, gid: calls.append(("fchown", uid, gid)))
    monkeypatch.setattr(
        os, "chown", lambda path, uid, gid, **how: calls.append(("chown", path, uid, gid, how["follow_symlinks"]))
    )
    monkeypatch.setattr(os, "fchmod", lambda fd, mode: calls.append(("fchmod", mode)))
    members = [file("f", mode=0o4755, uid=5, gid=6), symlink("l", "f", gid=8), file("r", mode=0o600)]
    unpacked(root, *members, keep_special=True, owners=True)
    assert calls == [("fchown", 5, 6), ("fchmod", 0o4755), ("chown", b"l", 0, 8, False), ("fchmod", 0o600)]


# --- limits and oddities ----------------------------------------------------------------------------------------------


def test_A_22_names_are_bytes(root: Path, outside: Path) -> None:
    names = [
        "\udcff\udcfe",
        "\x1b]52;c;\x07",
        "a\nb",
        "\u202etxt",
        "e\u0301",
        "\u00e9",
        "A",
        "a",
        "n" * 255,
        " ",
        "-rf",
        "\\",
    ]
    unpacked(root, *(file(f"d/{name}", name.encode("utf-8", "surrogateescape")) for name in names))
    expected = sorted(name.encode("utf-8", "surrogateescape") for name in names)
    assert sorted(os.listdir(os.fsencode(root / "d"))) == expected
    assert refused(root, file("\x1b[2J/y"), file("\x1b[2J")).isprintable()


@pytest.mark.parametrize(
    ("mtime", "seconds"), [(-1, -1), (2**33, 2**33), (2**40, 2**33), (-(2**50), -(2**31)), (2**50, 2**33), (0, 0)]
)
def test_A_23_times_are_clamped_to_what_file_systems_take(
    root: Path, outside: Path, mtime: int, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "utime", lambda where, ns, **how: asked.append(ns[0] // 10**9))
    unpacked(root, file("f", mtime=mtime), symlink("l", "f", mtime=mtime), directory("d", mtime=mtime))
    assert asked == [seconds] * 3


def test_a_clamp_is_the_latest_time_a_file_gets(root: Path, outside: Path) -> None:
    unpacked(
        root, file("old", mtime=5), file("new", mtime=50), directory("d", mtime=50), file("i/x", mtime=50), clamp=10
    )
    times = {name: seen[2] // 10**9 for name, seen in picture(root).items()}
    assert times == {"old": 5, "new": 10, "d": 10, "i": 10, "i/x": 10}


def test_A_24_a_name_that_comes_a_thousand_times_leaves_its_last(root: Path, outside: Path) -> None:
    many: list[Member] = []
    for _ in range(250):
        many += [file("x", b"f"), directory("x"), symlink("x", "y"), file("x", b"last")]
    unpacked(root, *many)
    assert modes(root) == {"x": "-rw-r--r--"}


def test_A_25_deep_trees_and_few_descriptors_are_no_trouble(root: Path, outside: Path) -> None:
    """2000 levels is as deep as a name of 4096 bytes goes; 300 directories are more than the descriptors kept."""
    members = [directory("/".join(["d"] * depth)) for depth in (2000, 10, 1500, 1000, 1)]
    for number in range(300):
        members += [file(f"s{number}/x"), file(f"s{299 - number}/y")]
    archive = root.parent / "archive.tar"
    archive.write_bytes(tarball(*members))
    code = (
        "import os, resource, sys; from devns.unpack import unpack_tar;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
        "print(unpack_tar(sys.argv[1], os.open(sys.argv[2], os.O_RDONLY), keep_special=False, owners=False).entries)"
    )
    done = subprocess.run([sys.executable, "-c", code, archive, root], capture_output=True, text=True, check=False)
    found = len(os.listdir(root))
    archive.unlink()
    subprocess.run(["rm", "-rf", root / "d"], check=True)  # too deep for pytest
    assert (done.stdout, done.stderr, found) == ("605\n", "", 301)


def test_A_25_a_file_with_too_many_names_is_copied(root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **how: Any) -> None:
        raise OSError(31, "Too many links")

    monkeypatch.setattr(os, "link", full)
    unpacked(root, file("f", b"x" * 3_000_000, 0o640, mtime=5), hardlink("d/h", "f"), hardlink("f2", "d/h"))
    assert picture(root)["d/h"] == picture(root)["f2"] == picture(root)["f"]


def test_directories_are_bounded(root: Path, outside: Path) -> None:
    limits = replace(LIMITS, directories=10)
    assert "more than 10 directories" in refused(root, *(directory(f"d{n}") for n in range(11)), limits=limits)
    assert "more than 10 directories" in refused(root, file("/".join("abcdefghijkl")), limits=limits)


def test_A_26_a_truncated_archive_is_an_error(root: Path, outside: Path) -> None:
    whole = tarball(directory("d"), file("d/f", b"x" * 3000), hardlink("h", "d/f"), symlink("l", "h"))
    content = whole.rstrip(b"\0")
    for at in range(0, len(content) + 512, 512):
        archive = root.parent / "archive.tar"
        archive.write_bytes(whole[:at])
        root_fd = os.open(root, os.O_RDONLY)
        with pytest.raises(ArchiveError):
            unpack_tar(str(archive), root_fd, keep_special=False, owners=False)
        os.close(root_fd)
        archive.unlink()


def test_A_27_directories_without_rights_get_their_files_first(root: Path, outside: Path) -> None:
    unpacked(
        root,
        directory("no", 0),
        file("no/f", mode=0),
        directory("no/more", 0),
        file("no/more/g"),
        directory("ro", 0o555),
        file("ro/f"),
    )
    assert [stat.S_IMODE(os.stat(root / name).st_mode) for name in ("no", "ro", "ro/f")] == [0, 0o555, 0o644]
    for name in ("no", "no/more", "ro"):
        os.chmod(root / name, 0o755)
    assert stat.S_IMODE(os.stat(root / "no/f").st_mode) == 0
    assert (root / "no/more/g").exists()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o377])
def test_the_callers_umask_counts_for_nothing_and_stays(root: Path, outside: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        unpacked(root, file("a/f", mode=0o666), directory("b", 0o777))
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert modes(root) == {"a": "drwxr-xr-x", "a/f": "-rw-rw-rw-", "b": "drwxrwxrwx"}


def test_A_33_the_oddities_of_real_roots_work(root: Path, outside: Path) -> None:
    unpacked(
        root,
        directory("usr/bin"),
        symlink("bin", "usr/bin"),
        file("bin/busybox", b"b", 0o755),
        hardlink("bin/sh", "bin/busybox"),
        hardlink("usr/bin/ls", "bin/sh"),
        directory("run"),
        symlink("var/run", "/run"),
        file("var/run/lock", b""),
        symlink("dangling", "/nowhere"),
        file("with space/é", b""),
    )
    assert len({os.stat(root / "usr/bin" / name).st_ino for name in ("busybox", "sh", "ls")}) == 1
    assert (root / "run/lock").exists()
    assert os.readlink(root / "dangling") == "/nowhere"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
def test_an_archive_is_read_from_a_pipe_in_any_packing_and_its_bytes_are_counted(
    root: Path, outside: Path, pack: Any
) -> None:
    data = pack(tarball(file("f", os.urandom(20_000))))
    here, there = os.pipe()
    os.write(there, data)
    os.close(there)

    class Count(Silent):
        total = 0

        def advance(self, count: int = 1) -> None:
            self.total += count

    count = Count()
    root_fd = os.open(root, os.O_RDONLY)
    done = unpack_tar(here, root_fd, keep_special=False, owners=False, progress=count)
    os.close(root_fd)
    os.close(here)
    assert (done.size, count.total) == (20_000, len(data))


def test_a_full_disk_names_the_archive_and_the_file(root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any) -> int:
        raise OSError(28, "No space left on device")

    archive = root.parent / "archive.tar"
    archive.write_bytes(tarball(file("big", b"x")))
    root_fd = os.open(root, os.O_RDONLY)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DevnsError) as caught:
        unpack_tar(str(archive), root_fd, keep_special=False, owners=False)
    monkeypatch.undo()
    os.close(root_fd)
    archive.unlink()
    assert caught.value.message == "archive.tar: 'big': no space left on device"
    assert str(caught.value.hint).startswith("free some space")


# --- the walker -------------------------------------------------------------------------------------------------------


def planted(top: Path, chance: random.Random) -> list[str]:
    """A random tree of directories, files and symlinks of all kinds; some of its names."""
    names = ["a", "b", "c"]
    places = [""]
    for _ in range(chance.randint(3, 14)):
        path = f"{chance.choice(places)}/{chance.choice(names)}"
        if os.path.lexists(f"{top}{path}"):
            continue
        kind = chance.random()
        if kind < 0.45:
            os.mkdir(f"{top}{path}")
            places.append(path)
        elif kind < 0.9:
            steps = [chance.choice([*names, "..", ".", ""]) for _ in range(chance.randint(1, 4))]
            os.symlink(chance.choice(["", "/", "../", "../../../"]) + "/".join(steps) or ".", f"{top}{path}")
        else:
            os.close(os.open(f"{top}{path}", os.O_CREAT | os.O_WRONLY, 0o600))
    return names


def outcome(resolve: Callable[..., int], *arguments: Any) -> tuple[int, int] | int | None:
    try:
        fd = resolve(*arguments)
    except OSError as error:
        return error.errno
    status = os.fstat(fd)
    os.close(fd)
    return status.st_dev, status.st_ino


def test_A_02_paths_are_resolved_as_openat2_resolves_them_in_a_root(tmp_path: Path) -> None:
    """F6. Where openat2(2) is missing the oracle is linux.py's own walker, which keeps all parents open."""
    chance = random.Random(20260)
    for number in range(150):
        top = tmp_path / str(number)
        top.mkdir()
        names = planted(top, chance)
        root_fd = os.open(top, os.O_RDONLY)
        for _ in range(40):
            steps = [chance.choice([*names, *names, *names, "..", ".", ""]) for _ in range(chance.randint(1, 6))]
            path = (chance.choice(["", "/"]) + "/".join(steps)).encode()
            expected = outcome(linux.resolve_in, root_fd, path, os.O_PATH | os.O_DIRECTORY)
            assert (outcome(walk, root_fd, path), path) == (expected, path)
        os.close(root_fd)


def test_A_34_a_directory_that_is_moved_out_while_it_is_walked_leads_nowhere(
    root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a/b").mkdir(parents=True)
    (root / "l").symlink_to("a/b/../../a")
    real = os.open

    def racing(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == b".." and (root / "a/b").exists():
            os.rename(root / "a/b", root.parent / "moved")
        return real(path, flags, mode, dir_fd=dir_fd)

    root_fd = os.open(root, os.O_RDONLY)
    monkeypatch.setattr(os, "open", racing)
    with pytest.raises(OSError, match="moved meanwhile"):
        walk(root_fd, b"l")
    monkeypatch.undo()
    (root.parent / "moved").rmdir()
    os.close(root_fd)


# --- .deb -------------------------------------------------------------------------------------------------------------


def ar(*members: tuple[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, data in members:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) & 1)
    return out


CONTROL = (
    "Package: hello\nVersion: 1:2.0-3\nArchitecture: amd64\nMaintainer: someone\nDescription: short\n long\n .\n more\n"
)


def control_tar(control: str = CONTROL, **files: Any) -> bytes:
    members = [directory("./"), file("./control", control.encode())]
    for name, content in files.items():
        data, mode = content if isinstance(content, tuple) else (content, 0o644)
        members.append(file(f"./{name}", data.encode(), mode))
    return tarball(*members, form=tarfile.GNU_FORMAT)


def deb(*members: Member, control: str = CONTROL, **files: Any) -> bytes:
    data = tarball(directory("./"), *members, form=tarfile.GNU_FORMAT)
    return ar(
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", gzip.compress(control_tar(control, **files))),
        ("data.tar.xz", lzma.compress(data, preset=0)),
    )


def deb_into(root: Path, data: bytes, **expected: Any) -> DebRecord:
    path = root.parent / "hello.deb"
    path.write_bytes(data)
    root_fd = os.open(root, os.O_RDONLY)
    before = len(os.listdir("/proc/self/fd"))
    try:
        return unpack_deb(str(path), root_fd, owners=False, **expected)
    finally:
        assert len(os.listdir("/proc/self/fd")) == before
        os.close(root_fd)
        path.unlink()


def deb_refused(root: Path, data: bytes, **expected: Any) -> str:
    before = picture(root)
    with pytest.raises(ArchiveError) as caught:
        deb_into(root, data, **expected)
    assert caught.value.message.startswith("hello.deb: ")
    assert picture(root) == before
    return caught.value.message


def test_A_33_a_package_becomes_its_files_and_dpkgs_notes_on_it(root: Path, outside: Path) -> None:
    record = deb_into(
        root,
        deb(
            directory("./etc/"),
            file("./etc/hello.conf", b"conf", uid=5, gid=6),
            file("./usr/bin/hello", b"#!", 0o4755, gid=42),
            symlink("./usr/bin/hi", "hello"),
            hardlink("./usr/bin/hej", "./usr/bin/hello"),
            conffiles="/etc/hello.conf\n/etc/absent\nremove-on-upgrade /etc/gone\n",
            postinst=("#!/bin/sh\n", 0o755),
            md5sums="x  y\n",
            triggers="activate-noawait ldconfig\n",
        ),
    )
    md5 = hashlib.md5(b"conf", usedforsecurity=False).hexdigest()
    first, *others = CONTROL.rstrip("\n").split("\n")
    paragraph = [first, "Status: install ok unpacked", *others, "Conffiles:", f" /etc/hello.conf {md5}"]
    assert record.status.split("\n") == paragraph
    assert (record.name, record.version, record.architecture, record.key) == ("hello", "1:2.0-3", "amd64", "hello")
    assert record.scripts == ("postinst",)
    assert record.owners == ((b"etc/hello.conf", 5, 6, 0o644), (b"usr/bin/hello", 0, 42, 0o4755))
    assert record.size == 6
    assert modes(root)["usr/bin/hello"] == "-rwsr-xr-x"
    info = root / "var/lib/dpkg/info"
    assert sorted(os.listdir(info)) == [
        f"hello.{name}" for name in ("conffiles", "list", "md5sums", "postinst", "triggers")
    ]
    assert stat.S_IMODE(os.stat(info / "hello.postinst").st_mode) == 0o755
    assert (info / "hello.list").read_text() == "/.\n/etc\n/etc/hello.conf\n/usr/bin/hello\n/usr/bin/hi\n/usr/bin/hej\n"


def test_a_package_that_several_architectures_share_is_filed_under_its_own(root: Path, outside: Path) -> None:
    record = deb_into(root, deb(control=CONTROL.replace("Maintainer", "Multi-Arch: same\nMaintainer")))
    assert record.key == "hello:amd64"
    assert os.listdir(root / "var/lib/dpkg/info") == ["hello:amd64.list"]


def test_A_33_directories_and_symlinks_to_them_stay_as_under_dpkg(root: Path, outside: Path) -> None:
    (root / "usr/lib").mkdir(parents=True)
    os.chmod(root / "usr", 0o711)
    (root / "lib").symlink_to("usr/lib")
    (root / "abs").symlink_to("/usr")
    deb_into(
        root, deb(directory("./usr", 0o777), directory("./lib"), file("./lib/x"), directory("./abs"), file("./abs/y"))
    )
    assert modes(root)["lib"] == "lrwxrwxrwx"
    assert modes(root)["usr"] == "drwx--x--x"
    assert (root / "usr/lib/x").exists()
    assert (root / "usr/y").exists()


def test_A_02_a_package_is_not_led_out_by_a_symlink_of_the_root(root: Path, outside: Path) -> None:
    (root / "usr").symlink_to(outside)
    (root / "etc").symlink_to("../outside")
    assert "No such file" in deb_refused(root, deb(directory("./usr"), file("./usr/secret")))
    deb_into(root, deb(file("./usr/secret", b"planted"), file("./etc/secret", b"planted")))


def test_a_package_does_not_replace_a_directory(root: Path, outside: Path) -> None:
    (root / "x").mkdir()
    for member in (file("./x"), symlink("./x", "/etc"), hardlink("./x", "./f")):
        with pytest.raises(ArchiveError, match="a directory is there already"):
            deb_into(root, deb(file("./f"), member))


def with_parts(*parts: tuple[str, bytes]) -> bytes:
    return ar(*parts)


BINARY = ("debian-binary", b"2.0\n")
GOOD_CONTROL = ("control.tar.gz", gzip.compress(control_tar()))
GOOD_DATA = ("data.tar", tarball(file("./planted")))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not an ar archive"),
        (b"!<arch>\n", "not a .deb"),
        (with_parts(BINARY, GOOD_DATA, GOOD_CONTROL), "in this order"),
        (with_parts(GOOD_CONTROL, GOOD_DATA), "in this order"),
        (with_parts(BINARY, GOOD_CONTROL), "in this order"),
        (with_parts(BINARY, GOOD_CONTROL, GOOD_DATA, GOOD_DATA), "in this order"),
        (with_parts(BINARY, GOOD_CONTROL, GOOD_CONTROL, GOOD_DATA), "in this order"),
        (with_parts(BINARY, GOOD_CONTROL, ("data.tgz", b"")), "in this order"),
        (with_parts(BINARY, GOOD_CONTROL, GOOD_DATA, ("extra", b"")), "in this order"),
        (with_parts(BINARY, *[(f"_{n}", b"") for n in range(20)], GOOD_CONTROL, GOOD_DATA), "a damaged ar header"),
        (with_parts(("debian-binary", b"3.0\n"), GOOD_CONTROL, GOOD_DATA), "not version 2"),
        (with_parts(("debian-binary", b"2.0\n" * 50), GOOD_CONTROL, GOOD_DATA), "not version 2"),
        (with_parts(BINARY, ("control.tar.bz2", b"BZh9"), GOOD_DATA), "packed in a way that isn't read"),
        (with_parts(BINARY, ("control.tar.gz", b"\x1f\x8b\x08"), GOOD_DATA), "damaged gz data|ends in the middle"),
        (with_parts(BINARY, ("control.tar.xz", GOOD_CONTROL[1]), GOOD_DATA), "damaged xz data"),
        (with_parts(BINARY, GOOD_CONTROL, GOOD_DATA)[:-600], "data.tar: cut off"),
        (with_parts(BINARY, GOOD_CONTROL, GOOD_DATA) + b"x", "a damaged ar header"),
        (with_parts(BINARY, ("/0", b"x"), GOOD_CONTROL, GOOD_DATA), "a damaged ar header"),
        (with_parts(BINARY, ("../control.tar", b"x"), GOOD_DATA), "a damaged ar header"),
        (with_parts(BINARY, GOOD_CONTROL, GOOD_DATA).replace(b"4         `", b"-4        `"), "a damaged ar header"),
        (with_parts(BINARY, GOOD_CONTROL, GOOD_DATA).replace(b"4         `", b"9999999999`"), "debian-binary: cut off"),
        (with_parts(BINARY, GOOD_CONTROL, GOOD_DATA).replace(b"4         `", b"0x4       `"), "a damaged ar header"),
        (
            with_parts(("debian-binary", b"2.0\n\n"), GOOD_CONTROL, GOOD_DATA).replace(b"\n\ncontrol", b"\n!control"),
            "not padded",
        ),
    ],
)
def test_A_30_a_deb_with_anything_out_of_order_is_refused(root: Path, outside: Path, data: bytes, said: str) -> None:
    message = deb_refused(root, data)
    assert any(words in message for words in said.split("|")), message


def test_A_30_members_that_readers_must_ignore_are_ignored(root: Path, outside: Path) -> None:
    data = with_parts(BINARY, ("_gpgbuilder", b"abc"), GOOD_CONTROL, GOOD_DATA, ("_gpgorigin", b"x"))
    assert deb_into(root, data).files == (b"planted",)


@pytest.mark.parametrize(
    ("control", "said"),
    [
        (CONTROL.replace("hello", "../../x"), "package"),
        (CONTROL.replace("hello", "/etc/x"), "package"),
        (CONTROL.replace("hello", "Hello"), "package"),
        (CONTROL.replace("hello", "h"), "package"),
        (CONTROL.replace("hello", "a" * 200), "package"),
        (CONTROL.replace("hello", "hello\\n"), "package"),
        (CONTROL.replace("Package: hello\n", ""), "package"),
        (CONTROL.replace("1:2.0-3", "1/../../x"), "version"),
        (CONTROL.replace("1:2.0-3", "1.0 2"), "version"),
        (CONTROL.replace("1:2.0-3", ""), "version"),
        (CONTROL.replace("1:2.0-3", "\u0661"), "version"),
        (CONTROL.replace("amd64", "amd64/../x"), "architecture"),
        (CONTROL + "Package: other\n", "there before"),
        (CONTROL + "package: other\n", "there before"),
        (CONTROL + "\nPackage: second\n", "not a field"),
        (CONTROL + "no field\n", "not a field"),
        (CONTROL + "Status: install ok installed\n", "only dpkg may say this"),
        (CONTROL + "Conffiles:\n /etc/shadow 0\n", "only dpkg may say this"),
        (CONTROL + "Triggers-Pending: x\n", "only dpkg may say this"),
        (CONTROL + "X: a\0b\n", "not text"),
        (CONTROL + "X: a\rb\n", "not text"),
        (" folded\n" + CONTROL, "not a field"),
        ("", "not a field"),
    ],
)
def test_A_31_control_is_checked_before_any_of_it_is_a_name(root: Path, outside: Path, control: str, said: str) -> None:
    assert said in deb_refused(root, deb(file("./planted"), control=control))


def test_A_31_another_package_or_version_than_the_index_named_is_refused(root: Path, outside: Path) -> None:
    assert "is hello 1:2.0-3, not hello 1:2.0-4" in deb_refused(root, deb(), name="hello", version="1:2.0-4")
    assert "is hello 1:2.0-3, not hullo 1:2.0-3" in deb_refused(root, deb(), name="hullo", version="1:2.0-3")
    assert deb_into(root, deb(), name="hello", version="1:2.0-3").name == "hello"


@pytest.mark.parametrize(
    "line",
    [
        "etc/x",
        "../x",
        "/etc/../../x",
        "/etc/x y",
        "/",
        "//x",
        "/etc//x",
        "/x/",
        "/./x",
        "flag /etc/x",
        "remove-on-upgrade x",
    ],
)
def test_A_31_conffiles_are_absolute_clean_paths(root: Path, outside: Path, line: str) -> None:
    message = deb_refused(root, deb(file("./planted"), conffiles=line + "\n"))
    assert "conffiles: " in message or "'..' in it" in message


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([directory("sub"), file("sub/x")], "not a control file"),
        ([file("list")], "not a control file"),
        ([file("a:b")], "not a control file"),
        ([file("postinst"), file("postinst")], "there twice"),
        ([symlink("postinst", "/bin/sh")], "not a control file"),
        ([file("control"), file("./control")], "there twice"),
        ([], "no control file"),
        ([file("big", bytes(33 << 20))], "holds more than"),
    ],
)
def test_A_31_control_tar_holds_plain_files_with_plain_names(
    root: Path, outside: Path, members: list[Member], said: str
) -> None:
    control = tarball(*(replaced(member) for member in members))
    assert said in deb_refused(
        root, with_parts(BINARY, ("control.tar.xz", lzma.compress(control, preset=0)), GOOD_DATA)
    )


def test_A_31_a_name_with_a_newline_cannot_forge_the_list_of_files(root: Path, outside: Path) -> None:
    with pytest.raises(ArchiveError, match="list of files"):
        deb_into(root, deb(file("./a\n/etc/shadow")))


# --- many .debs -------------------------------------------------------------------------------------------------------


def package(
    tmp_path: Path, name: str, *members: Member, architecture: str = "amd64", **files: Any
) -> tuple[str, str, str]:
    control = f"Package: {name}\nVersion: 1.0\nArchitecture: {architecture}\nDescription: {name}\n"
    path = tmp_path / f"{name}.deb"
    path.write_bytes(deb(*members, control=control, **files))
    return str(path), name, "1.0"


ROOT: Any = {"architecture": "amd64", "built": 5}


def all_into(
    root: Path, *debs: tuple[str, str, str], workers: int = 2, owners: bool = False, **how: Any
) -> list[DebRecord]:
    before = len(os.listdir("/proc/self/fd"))
    try:
        return unpack_debs(debs, str(root), **{**ROOT, **how}, owners=owners, workers=workers)
    finally:
        assert len(os.listdir("/proc/self/fd")) == before
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


def test_many_packages_make_a_root_that_dpkg_can_configure(root: Path, tmp_path: Path) -> None:
    debs = [
        package(
            tmp_path,
            "zeta",
            directory("./etc", 0o755, mtime=3),
            directory("./lib"),
            file("./lib/z"),
            architecture="all",
        ),
        package(tmp_path, "alpha", directory("./etc", 0o700, mtime=4, gid=9), file("./etc/a", uid=7), file("./bin/a")),
    ]
    told: list[str] = []
    report = lambda record: told.append(record.name)  # noqa: E731
    records = unpack_debs(debs, str(root), **ROOT, owners=False, workers=2, report=report)
    assert sorted(told) == ["alpha", "zeta"]
    assert [record.name for record in records] == ["zeta", "alpha"]
    assert {name: os.readlink(root / name) for name in ("bin", "sbin", "lib", "lib64")} == {
        name: f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64")
    }
    assert (root / "usr/lib/z").exists()
    assert (root / "usr/bin/a").exists()
    dpkg = root / "var/lib/dpkg"
    assert sorted(os.listdir(dpkg)) == ["arch", "available", "info", "status", "triggers", "updates"]
    assert [(dpkg / name).read_text() for name in ("arch", "available", "info/format")] == ["amd64\n", "", "1\n"]
    assert (dpkg / "status").read_text() == f"{records[1].status}\n\n{records[0].status}\n\n"
    # As if zeta had been unpacked first: /etc is its.
    assert picture(root)["etc"] == ("drwxr-xr-x", None, 3 * 10**9)
    assert [record.owners for record in records] == [(), ((b"etc/a", 7, 0, 0o644),)]


def test_the_tree_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    chance = random.Random(7)
    debs = [
        package(
            tmp_path,
            f"p{number}",
            directory("./usr/share"),
            *(directory(f"./usr/share/d{n}", chance.choice([0o755, 0o700, 0o2775])) for n in range(number % 5)),
            *(file(f"./usr/share/d{n}/p{number}", b"x") for n in range(number % 5)),
            *(file(f"./usr/share/p{number}-{n}", bytes(chance.randrange(9000))) for n in range(5)),
        )
        for number in range(12)
    ]
    pictures = []
    for workers in (1, 2, 5):
        root = tmp_path / f"root{workers}"
        root.mkdir()
        all_into(root, *debs, workers=workers)
        pictures.append({name: seen for name, seen in picture(root).items() if "share" in name})
    assert len(pictures[0]) > 80
    assert pictures[0] == pictures[1] == pictures[2]


def test_an_arm64_root_has_no_lib64(root: Path, tmp_path: Path) -> None:
    all_into(root, package(tmp_path, "one", architecture="arm64"), architecture="arm64")
    assert not (root / "lib64").exists()
    assert (root / "var/lib/dpkg/arch").read_text() == "arm64\n"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (file("./usr/bin/x"), file("./usr/bin/x")),
        (file("./bin/x"), file("./usr/bin/x")),
        (symlink("./etc/x", "y"), directory("./etc/x")),
    ],
)
def test_two_packages_with_one_path_are_refused(root: Path, tmp_path: Path, one: Member, other: Member) -> None:
    debs = package(tmp_path, "one", replaced(one)), package(tmp_path, "other", replaced(other))
    with pytest.raises(DevnsError, match=r"both have|a directory is there already|No such file"):
        all_into(root, *debs)


def test_packages_that_ship_the_merged_links_agree_with_them(root: Path, tmp_path: Path) -> None:
    """As base-files does since trixie, while others still have files in /lib."""
    all_into(
        root,
        package(tmp_path, "base", symlink("./lib", "usr/lib")),
        package(tmp_path, "one", directory("./lib"), file("./lib/x")),
    )
    assert (root / "usr/lib/x").exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_error_of_a_worker_names_the_package(root: Path, tmp_path: Path, workers: int) -> None:
    good = [package(tmp_path, f"good{n}", file(f"./g{n}")) for n in range(3)]
    bad = package(tmp_path, "bad", file("./f"), hardlink("./h", "./nowhere"))
    with pytest.raises(ArchiveError, match=r"^bad 1\.0 \(bad\.deb\): 'h': No such file"):
        all_into(root, *good, bad, workers=workers)


def test_a_package_for_another_machine_is_refused(root: Path, tmp_path: Path) -> None:
    other = renamed(package(tmp_path, "bb", architecture="arm64"), tmp_path / "b.deb")
    with pytest.raises(ArchiveError, match=r"^bb 1\.0 \(b\.deb\): a package for arm64, not for amd64"):
        all_into(root, package(tmp_path, "aa"), other)


def renamed(deb: tuple[str, str, str], path: Path) -> tuple[str, str, str]:
    os.rename(deb[0], path)
    return str(path), deb[1], deb[2]


def test_a_root_with_packages_is_refused(root: Path, tmp_path: Path) -> None:
    all_into(root, package(tmp_path, "one"))
    with pytest.raises(DevnsError, match="has packages already"):
        all_into(root, package(tmp_path, "two"))


def test_a_missing_file_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DevnsError, match=r"^gone 1\.0 \(gone\.deb\): No such file"):
        all_into(root, package(tmp_path, "one"), (str(tmp_path / "gone.deb"), "gone", "1.0"))


def test_a_worker_that_is_killed_is_an_error_and_not_a_wait(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "_unpack_deb", lambda *arguments, **how: os.kill(os.getpid(), 9))
    with pytest.raises(DevnsError, match=r"^one 1\.0 \(one\.deb\): the process that unpacked it died"):
        all_into(root, package(tmp_path, "one"))


def test_packages_are_unpacked_as_they_arrive(root: Path, tmp_path: Path) -> None:
    debs = [package(tmp_path, name, file(f"./{name}")) for name in ("one", "two", "three")]
    ear, mouth = os.pipe()
    told: list[str] = []

    def report(record: DebRecord) -> None:
        told.append(record.name)
        coming = {"three": [1, 1, 77], "two": [0]}.get(record.name, [])  # what is told twice, or is none, is no harm
        os.write(mouth, b"".join(index.to_bytes(unpack.ARRIVAL, sys.byteorder) for index in coming))

    os.write(mouth, (2).to_bytes(unpack.ARRIVAL, sys.byteorder))
    try:
        records = unpack_debs(debs, str(root), **ROOT, owners=False, workers=2, report=report, arrivals=ear)
    finally:
        os.close(mouth)
        os.close(ear)
    assert told == ["three", "two", "one"]
    assert [record.name for record in records] == ["one", "two", "three"]


def test_a_package_that_never_arrives_is_an_error(root: Path, tmp_path: Path) -> None:
    debs = [package(tmp_path, name) for name in ("one", "two")]
    ear, mouth = os.pipe()
    os.write(mouth, (1).to_bytes(unpack.ARRIVAL, sys.byteorder))
    os.close(mouth)
    try:
        with pytest.raises(DevnsError, match=r"^one 1\.0 \(one\.deb\): it never came"):
            unpack_debs(debs, str(root), **ROOT, owners=False, workers=2, arrivals=ear)
    finally:
        os.close(ear)


def test_workers_end_when_their_parent_was_killed(root: Path, tmp_path: Path) -> None:
    """They hold its standard output, so that this waits for them."""
    debs = [package(tmp_path, name) for name in ("one", "two", "three")]
    code = (
        "import os, sys; from devns.unpack import unpack_debs; debs = eval(sys.argv[2]);"
        "kill = lambda record: os.kill(os.getpid(), 9);"
        "unpack_debs(debs, sys.argv[1], architecture='amd64', built=0, owners=False, workers=3, report=kill)"
    )
    done = subprocess.run([sys.executable, "-c", code, root, repr(debs)], capture_output=True, check=False, timeout=60)
    assert done.returncode == -9


def test_a_bug_in_a_worker_is_no_sentence_for_the_user(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **how: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(unpack, "_unpack_deb", broken)
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError.* at .*test_unpack\.py:\d+"):
        all_into(root, package(tmp_path, "one"))


def test_records_are_the_same_before_and_after_their_way_through_the_pipe(root: Path) -> None:
    record = deb_into(root, deb(directory("./d\udcff"), file("./d\udcff/\udc80", uid=3)))
    assert record.files == (b"d\xff/\x80",)
    assert unpack._decoded(json.dumps({"record": unpack._encoded(record)}).encode()) == record


FROZEN = """
import os, sys
from devns.unpack import unpack_debs, unpack_tar
def hook(event, arguments):
    if event == "import":
        os.write(2, repr(arguments).encode())
sys.path.clear(); sys.meta_path.clear(); sys.path_hooks.clear()
sys.addaudithook(hook)
root, other, archive, bad, *debs = sys.argv[1:]
unpack_tar(archive, os.open(other, os.O_RDONLY), keep_special=False, owners=False)
try:
    unpack_tar(bad, os.open(other, os.O_RDONLY), keep_special=False, owners=False)
except Exception as error:
    os.write(1, type(error).__name__.encode())
named = [(path, os.path.basename(path)[:-4], "1.0") for path in debs]
records = unpack_debs(named, root, architecture="amd64", built=0, owners=False, workers=2)
os.write(1, b" %d" % len(records))
"""


def test_E_05_nothing_is_imported_once_unpacking_began(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "good.tar").write_bytes(gzip.compress(tarball(file("\udcff"), directory("d"), symlink("l", "é"))))
    (tmp_path / "bad.tar").write_bytes(lzma.compress(tarball(file("a/\udcff")))[:-50])
    debs = [package(tmp_path, name, file(f"./{name}"), conffiles=f"/{name}\n")[0] for name in ("one", "two", "three")]
    arguments = [root, tmp_path / "other", tmp_path / "good.tar", tmp_path / "bad.tar", *debs]
    command = [sys.executable, "-c", FROZEN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    assert (done.stdout, done.stderr, done.returncode) == ("ArchiveError 3", "", 0)


def test_the_writer_and_unpack_open_no_path_by_its_name() -> None:
    """D1: but for the archive and the root, which the caller names, every path is relative to a descriptor."""
    for module in (writer, unpack):
        source = Path(str(module.__file__)).read_text()
        for call in (
            "os.path.join",
            "os.makedirs",
            "shutil",
            "pathlib",
            "extract",
            "os.rename",
            "os.walk",
            "with open(",
        ):
            assert call not in source, (module.__name__, call)
