"""Stores in places that are full, small, read-only, oddly named, or on file systems that lack something.

DEVNS_FAULTS=all tries each size of a disk and each limit of descriptors; every commit tries a few.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from devns import linux
from devns.diagnose import probe
from devns.host import Host
from devns.store import Store
from tests import tracer
from tests.tracer import Fault, Traced
from tests.worlds import CHECK, World, apart, assert_world_sound

ALL = bool(os.environ.get("DEVNS_FAULTS"))
_MS_RDONLY, _MS_REMOUNT, _MS_BIND = 0x1, 0x20, 0x1000  # linux/mount.h
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def world(tmp_path: Path, require: Any) -> Iterator[World]:
    require("userns", "overlay")
    made = World(str(tmp_path))
    yield made
    made.clear()  # what overlayfs keeps for itself is closed to pytest


def sentence(status: int, err: str) -> str:
    """What devns said went wrong: one sentence, and at most a hint; both, joined by a newline."""
    assert status == 125, err
    said = [line for line in err.splitlines() if not line.startswith(("{", "  "))]
    assert "Traceback" not in err
    assert said[0].startswith("devns: "), err
    assert [line[:6] for line in said[1:]] in ([], ["hint: "]), err
    return "\n".join(said)


def live(world: World) -> None:
    """All that can be done with an environment."""
    for arguments in (
        ("build", "tiny"),
        ("run", "tiny", "--", "sh", "-euc", f"{CHECK}; echo 1 > /srv/file; echo 2 > ~/file"),
        ("clone", "tiny", "copy"),
        ("run", "copy", "--", "sh", "-euc", "read x < /srv/file; read y < ~/file; test $x$y = 12"),
        ("diff", "copy"),
        ("reset", "--home", "copy"),
        ("run", "copy", "--", "sh", "-euc", f"{CHECK}; test ! -e /srv/file; test ! -e ~/file"),
        ("verify",),
        ("du",),
        ("remove", "copy"),
        ("gc",),
    ):
        done = world.devns(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
    assert_world_sound(world)


# --- where it stands --------------------------------------------------------------------------------------------------


NAMES = ["a b,c:d\\e'f\"g$(id)\nh", "lo,w:er=x", "-rf", "é" * 100, os.fsdecode(bytes([0xFF, 0xFE]))]


@pytest.mark.parametrize("name", NAMES if ALL else NAMES[:1])
def test_X_18_H_16_a_store_of_any_name_works(world: World, name: str) -> None:
    world.store = f"{world.place}/{name}/{name}"
    live(world)


def test_X_18_a_store_in_memory_works_or_says_why_not(world: World) -> None:
    disk = f"{world.place}/disk"
    os.mkdir(disk)
    world.store = f"{disk}/store"

    def use() -> bool:
        works = probe(Host.probe(), disk)["overlay"].works
        if works:
            live(world)
        else:
            done = world.devns("build", "tiny")
            assert "overlay" in sentence(done.returncode, done.stderr)
        return works

    assert apart(lambda: linux.mount("none", disk, "tmpfs"), use) in (True, False)


# --- a disk that is full ----------------------------------------------------------------------------------------------

KIB = 1 << 10
SIZES = [f"size={size}" for size in range(64 * KIB, 5 << 20, 64 * KIB)]
INODES = [f"nr_inodes={count}" for count in range(4, 120)]


@pytest.fixture
def disk(world: World) -> str:
    """Where a disk of one's own is mounted, and the store stands on it."""
    path = f"{world.place}/disk"
    os.mkdir(path)
    world.store = f"{path}/store"
    return path


@pytest.mark.parametrize("limits", [SIZES, INODES], ids=["bytes", "inodes"])
def test_X_12_a_build_on_a_disk_that_is_too_small_says_so_and_works_on_a_larger_one(
    world: World, disk: str, limits: list[str]
) -> None:
    ends = {
        apart(partial(_mount, disk, limit), partial(_outgrow, world, disk)) for limit in limits[:: 1 if ALL else 16]
    }
    assert {"told", "works"} == ends  # the smallest was too small, and the largest was not


def _mount(disk: str, limit: str) -> None:
    linux.mount("none", disk, "tmpfs", 0, limit)


def _mount_more(disk: str) -> None:
    linux.mount("none", disk, "tmpfs", _MS_REMOUNT, "size=64m,nr_inodes=10000")


def _outgrow(world: World, disk: str) -> str:
    first = world.devns("build", "--json", "tiny")
    if first.returncode:
        said = sentence(first.returncode, first.stderr)
        assert "no space" in said
        assert "\nhint: free some space" in said or f"\nhint: df -h {world.store}" in said
    _mount_more(disk)
    if os.path.lexists(world.store):
        assert_world_sound(world, again=lambda: world.build().layers)
    assert world.enter("tiny", CHECK) == 0
    return "told" if first.returncode else "works"


def _fill(disk: str) -> None:
    """Not a byte and not an inode is left."""
    with suppress(OSError), open(f"{disk}/bytes", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with suppress(OSError):
        for number in range(1 << 20):
            os.symlink("x" * 100, f"{disk}/{number}")


@pytest.mark.parametrize("said", ["gc", "remove other", "remove tiny other"])
def test_X_12_what_frees_space_works_on_a_disk_that_is_full(world: World, disk: str, said: str) -> None:
    def use() -> None:
        world.build()
        world.template("other", "echo other > /srv/other")
        assert world.enter("other", "echo 1 > /srv/file; echo 2 > ~/file") == 0
        if said == "gc":
            Store.open(world.store).remove("other")
        _fill(disk)
        free = os.statvfs(disk).f_bfree, os.statvfs(disk).f_ffree
        done = world.devns(*said.split())
        assert (done.returncode, done.stderr, free) == (0, "", (0, 0))
        assert os.statvfs(disk).f_bfree > 0
        assert_world_sound(world)

    apart(partial(_mount, disk, "size=8m,nr_inodes=300"), use)


def test_X_12_who_is_inside_goes_on_when_the_disk_is_full(world: World, disk: str) -> None:
    script = (
        "echo 1 > ~/file; echo here; read said; read x < /etc/name; echo $x;"
        "if echo 1 > /srv/new; then echo written; else echo refused; fi; rm ~/file"
    )

    def use() -> list[str]:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        world.build()
        command = world.argv("run", "tiny", "--", "sh", "-c", script)
        with subprocess.Popen(command, cwd=world.home, env=world.environ, **pipes) as inside:
            said = inside.stdout.readline() if inside.stdout else ""
            _fill(disk)
            said += inside.communicate("on\n")[0]
        return [said, str(inside.returncode), *os.listdir(f"{world.store}/environments/tiny/home")]

    assert apart(partial(_mount, disk, "size=8m,nr_inodes=300"), use) == ["here\ntwo\nrefused\n", "0"]


@pytest.mark.parametrize("said", ["reset --home tiny", "run tiny -- sh -c :", "clone tiny copy"])
def test_X_12_what_needs_space_says_so_on_a_full_disk_and_takes_nothing(world: World, disk: str, said: str) -> None:
    def use() -> str:
        assert world.enter("tiny", "echo 1 > /srv/file; echo 2 > ~/file") == 0
        _fill(disk)
        done = world.devns(*said.split())
        _mount_more(disk)
        assert world.enter("tiny", "read x < /srv/file; read y < ~/file; test $x$y = 12") == 0
        assert_world_sound(world)
        return sentence(done.returncode, done.stderr)

    told = apart(partial(_mount, disk, "size=8m,nr_inodes=300"), use)
    assert "no space" in told
    assert "\nhint: free some space" in told or "\nhint: df -h" in told


DESCRIPTORS = range(8, 40) if ALL else (9, 11, 13, 16, 20, 40)


@pytest.mark.parametrize("said", ["build --json tiny", "run tiny -- sh -c :", "clone tiny copy", "verify --json"])
def test_X_14_with_few_descriptors_it_works_or_says_what_to_do(world: World, said: str) -> None:
    ends = set()
    for limit in DESCRIPTORS:
        if not said.startswith("build"):
            world.build()
        limits = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (limit, limit))
        done = world.devns(*said.split(), preexec_fn=limits)
        ends.add(done.returncode)
        if done.returncode:
            told = sentence(done.returncode, done.stderr)
            assert "too many" in told
            assert "\nhint: ulimit -n" in told
        if os.path.lexists(world.store):
            assert_world_sound(world, again=lambda: world.build().layers)
            world.clear()
    assert ends == {0, 125}


# --- homes ------------------------------------------------------------------------------------------------------------


def _readonly(path: str) -> None:
    linux.mount(path, path, None, _MS_BIND)
    linux.mount(None, path, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | 0x6)  # nosuid, nodev: as it may be already


READS = ("--help", "list", "template list", "gc", "verify", "du")


def _reads_work(world: World, env: dict[str, str], cwd: str) -> None:
    for said in READS:
        done = world.devns(*said.split(), env=env, cwd=cwd)
        assert (done.returncode, done.stderr) == (0, ""), said


def test_X_16_in_a_read_only_home_all_that_only_reads_works_and_a_build_says_where_it_would_write(world: World) -> None:
    store = f"{world.home}/.local/share/devns"

    def use() -> str:
        env = {"DEVNS_STORE": ""}
        _reads_work(world, env, world.home)
        done = world.devns("build", "host", env=env)
        return sentence(done.returncode, done.stderr)

    said = apart(partial(_readonly, world.home), use)
    assert said.startswith(f"devns: {world.home}/.local")
    assert "read-only file system" in said
    assert "DEVNS_STORE" in said
    assert not os.path.lexists(store)


def test_X_16_a_store_on_a_disk_that_turned_read_only_is_read_and_not_written(world: World) -> None:
    world.build()

    def use() -> list[str]:
        for said in ("list", "info tiny", "verify --json", "du", "gc --dry-run"):
            done = world.devns(*said.split())
            assert (done.returncode, done.stderr.replace('{"event"', "").count("devns: ")) == (0, 0), done.stderr
        tried = [world.devns(*said.split()) for said in ("remove tiny", "reset tiny", "clone tiny copy", "build host")]
        return [sentence(done.returncode, done.stderr) for done in tried]

    for said in apart(partial(_readonly, world.store), use):
        assert "read-only file system" in said
    assert_world_sound(world)


@pytest.mark.parametrize("home", ["/nonexistent", "/", "/proc", "relative", ""])
def test_X_16_without_a_home_all_that_only_reads_works_and_a_build_says_where_it_would_write(
    world: World, home: str
) -> None:
    env = {"DEVNS_STORE": "", "HOME": home}
    if home in ("/nonexistent", "/", "/proc"):
        _reads_work(world, env, world.place)
        done = world.devns("build", "host", env=env, cwd=world.place)
        assert f"{home.rstrip('/')}/.local" in sentence(done.returncode, done.stderr) or home == "/nonexistent"
    assert sorted(os.listdir(world.place)) == ["home", "root.tar"]


@pytest.mark.parametrize("value", ["", "relative", "./x"])
def test_X_16_an_XDG_directory_that_is_none_is_passed_over(world: World, value: str) -> None:
    env = {"DEVNS_STORE": "", "XDG_DATA_HOME": value, "XDG_STATE_HOME": value, "XDG_CONFIG_HOME": value}
    done = world.devns("build", "--json", "tiny", env=env)
    assert done.returncode == 0, done.stderr
    made = f"{world.home}/.local/share/devns"
    assert sorted(os.listdir(f"{made}/layers")) == sorted(json.loads(done.stdout)["layers"])
    assert sorted(os.listdir(world.home)) == [".config", ".local"]


# --- file systems that lack something ---------------------------------------------------------------------------------

LACKS = [
    ("flock", "ENOLCK", "refused"),
    ("flock", "ENOSYS", "refused"),
    ("flock", "EOPNOTSUPP", "refused"),
    ("renameat2", "EINVAL", "works"),
    ("renameat2", "ENOSYS", "works"),
    ("renameat2", "EOPNOTSUPP", "works"),
    ("syncfs", "EINVAL", "works"),
    ("syncfs", "ENOSYS", "works"),
    ("fsync", "EINVAL", "works"),
    ("utimensat", "EPERM", "told"),
    ("chmod", "EPERM", "told"),
    ("fchmod", "EPERM", "told"),
    ("symlinkat", "EPERM", "told"),
    ("mkdir", "EROFS", "told"),
    ("rename", "EXDEV", "told"),
    ("renameat2", "ESTALE", "told"),
    ("fsconfig", "EINVAL", "told"),
]


@pytest.mark.parametrize(("call", "error", "end"), LACKS)
def test_X_17_a_file_system_without_something_works_or_is_refused_and_nothing_is_broken(
    world: World, call: str, error: str, end: str
) -> None:
    """As over NFS, FUSE or FAT, whose errors are given to every call of this kind, in each process."""
    missing = tracer.works()
    if missing:
        pytest.skip(missing)
    fault = Fault(error, calls=(call,))
    outcome = Traced(world.argv("build", "--json", "tiny"), env=world.environ, cwd=world.home, fault=fault).wait()
    assert (len(outcome.met) > 0, outcome.hung) == (True, 0)
    if end == "works":
        assert outcome.status == 0, outcome.err
    else:
        said = sentence(outcome.status, outcome.err)
        assert end == "told" or "this file system cannot hold a store\nhint: export DEVNS_STORE=" in said
    if os.path.lexists(f"{world.store}/version") or end == "works":
        assert_world_sound(world, again=lambda: world.build().layers)
    assert world.enter("tiny", CHECK) == 0


@pytest.mark.parametrize("error", ["EINVAL", "ENOSYS"])
@pytest.mark.parametrize("said", ["reset --home tiny", "clone tiny copy", "remove tiny", "gc"])
def test_X_17_where_rename_has_no_flags_what_is_there_is_changed_all_the_same(
    world: World, said: str, error: str
) -> None:
    missing = tracer.works()
    if missing:
        pytest.skip(missing)
    assert world.enter("tiny", "echo 1 > /srv/file; echo 2 > ~/file") == 0
    fault = Fault(error, calls=("renameat2",))
    outcome = Traced(world.argv(*said.split()), env=world.environ, cwd=world.home, fault=fault).wait()
    assert (outcome.status, outcome.hung) == (0, 0), outcome.err
    assert_world_sound(world)
    if said.startswith("clone"):
        assert world.enter("copy", "read x < /srv/file; read y < ~/file; test $x$y = 12") == 0
    else:
        gone = "" if said == "gc" else "test ! -e /srv/file; test ! -e ~/file;"
        assert world.enter("tiny", f"{gone} {CHECK}") == 0
