"""Stores that were damaged, booby-trapped, or left in pieces with files of other ids, and what takes care of that.

DEVNS_FAULTS=all damages each file in each way; every commit damages each in one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from devns import linux
from devns.errors import DevnsError
from devns.store import Store
from devns.verbs.listing import listing
from tests.worlds import CHECK, TOOLS, World, apart, assert_world_sound, tree

ALL = bool(os.environ.get("DEVNS_FAULTS"))
_MS_BIND = 0x1000  # linux/mount.h


@pytest.fixture
def world(tmp_path: Path, require: Any) -> Iterator[World]:
    require("userns", "overlay")
    made = World(str(tmp_path))
    yield made
    made.clear()  # what overlayfs keeps for itself, and what other ids own, is closed to pytest


# --- each file of a store, damaged in each way ------------------------------------------------------------------


def _empty(path: str) -> None:
    os.truncate(path, 0)


def _cut(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def _flip(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def _zeros(path: str) -> None:
    """As some file systems leave what was not synced when the power went."""
    size = os.path.getsize(path)
    with open(path, "wb") as file:
        file.write(bytes(size))


def _as_directory(path: str) -> None:
    os.unlink(path)
    os.mkdir(path)


def _as_link(path: str) -> None:
    os.rename(path, f"{path}~")
    os.symlink(f"{path}~", path)


DAMAGES: dict[str, Callable[[str], None]] = {
    "empty": _empty,
    "cut": _cut,
    "flip": _flip,
    "zeros": _zeros,
    "deleted": os.unlink,
    "directory": _as_directory,
    "link": _as_link,
}


def _files(top: str) -> list[str]:
    """The files beneath a directory that hold something, links left out."""
    found = [os.path.join(above, name) for above, _, names in os.walk(top) for name in names]
    return sorted(path for path in found if not os.path.islink(path) and os.path.isfile(path) and os.path.getsize(path))


@contextmanager
def damaged(world: World, path: str, damage: Callable[[str], None]) -> Iterator[None]:
    """A file is damaged meanwhile."""
    kept = f"{world.place}/kept"
    shutil.copy2(path, kept)
    damage(path)
    yield
    for left in (path, f"{path}~"):
        if os.path.isdir(left) and not os.path.islink(left):
            os.rmdir(left)
        elif os.path.lexists(left):
            os.unlink(left)
    shutil.move(kept, path)


def test_X_27_verify_finds_every_damage_to_every_file_of_a_layer_or_a_record(world: World) -> None:
    world.build()
    files = [*_files(f"{world.store}/layers"), f"{world.store}/environments/tiny/environment.json"]
    missed = []
    tried = [(path, kind) for path in files for kind in DAMAGES]
    for path, kind in tried if ALL else tried[:: len(DAMAGES) - 1]:  # which takes each kind in turn
        with damaged(world, path, DAMAGES[kind]):
            if not world.problems():
                missed.append(f"{kind} {path}")
    assert missed == []
    assert world.problems() == []  # and nothing is found where all was put back
    assert_world_sound(world)


@pytest.mark.parametrize("kind", DAMAGES)
def test_X_27_a_damaged_record_is_made_anew_and_harms_no_other_environment(world: World, kind: str) -> None:
    """Each file that devns reads: the records of layers and environments, manifests and locks."""
    world.template("other", "echo other > /srv/other")
    world.build("other")
    world.build()
    (own,) = set(world.layers()) - set(world.layers("other"))
    for path in (f"layers/{own}/layer.json", "environments/tiny/environment.json", f"locks/layer@{own}.lock"):
        if path.endswith(".lock") and kind == "flip":
            continue  # there is nothing in it
        DAMAGES[kind](f"{world.store}/{path}")
        assert [row["name"] for row in listing(world.bench())] == ["other", "tiny"]
        assert world.enter("other", "read x < /srv/other; test $x = other") == 0
        if path.endswith(".lock") and kind in ("directory", "link"):
            with pytest.raises(DevnsError) as refused:
                world.enter("tiny", CHECK)
            assert f"{world.store}/{path}" in refused.value.message
            os.rename(f"{world.store}/{path}", f"{world.place}/was-the-lock")
        assert world.enter("tiny", CHECK) == 0
        if os.path.lexists(f"{world.store}/{path}~"):
            os.unlink(f"{world.store}/{path}~")
        assert_world_sound(world)


@pytest.mark.parametrize("kind", DAMAGES)
def test_X_27_a_damaged_version_is_one_sentence_or_is_mended(world: World, kind: str) -> None:
    world.build()
    before = tree(world.store)
    path = f"{world.store}/version"
    with damaged(world, path, DAMAGES[kind]):
        done = world.devns("list")
        if kind in ("deleted", "cut", "flip"):  # the number itself is still there, or is written anew
            assert (done.returncode, done.stderr) == (0, "")
        else:
            assert (done.returncode, len(done.stderr.splitlines())) in ((125, 1), (125, 2)), done.stderr
            assert done.stderr.startswith(f"devns: {world.store}")
    assert tree(world.store) == before
    assert_world_sound(world)


# --- what deletes does not leave the store ----------------------------------------------------------------------

TRAPS = """
    cd {place}; ln -s {canary} directory; ln -s {canary}/file file; ln -s / root; ln -s .. up; ln -s /proc/1/root proc
    mkdir deep; cd deep; ln -s {canary} a; ln -s ../../../../../../.. b; ln -s . loop
"""


@pytest.mark.parametrize("said", ["remove tiny", "reset --home tiny", "gc"])
def test_X_11_what_deletes_follows_no_link_out_of_the_store(world: World, said: str) -> None:
    canary = f"{world.place}/canary"
    os.mkdir(canary)
    with open(f"{canary}/file", "w") as file:
        file.write("kept")
    script = "".join(TRAPS.format(place=place, canary=canary) for place in ("/srv", "~"))
    assert world.enter("tiny", script) == 0
    if said == "gc":
        world.template("tiny", TRAPS.format(place="/srv", canary=canary))
        world.build()
        Store.open(world.store).remove("tiny")
    before = tree(canary), os.stat(canary).st_ctime_ns, os.stat(f"{canary}/file").st_ctime_ns, tree(world.home)
    done = world.devns(*said.split())
    assert (done.returncode, done.stderr) == (0, "")
    after = tree(canary), os.stat(canary).st_ctime_ns, os.stat(f"{canary}/file").st_ctime_ns, tree(world.home)
    assert after == before
    assert_world_sound(world)


@pytest.mark.parametrize("said", ["remove tiny", "reset --home tiny"])
def test_X_11_what_is_mounted_in_an_environment_is_not_deleted_with_it(world: World, said: str) -> None:
    """By the user, on the host: a bind mount of something else beneath the home."""
    canary = f"{world.place}/canary"
    os.mkdir(canary)
    with open(f"{canary}/file", "w") as file:
        file.write("kept")
    assert world.enter("tiny", "mkdir ~/mounted") == 0
    point = f"{world.store}/environments/tiny/home/mounted"

    def use() -> list[str]:
        done = world.devns(*said.split())
        return [str(done.returncode), done.stderr, *os.listdir(canary)]

    status, err, *left = apart(lambda: linux.mount(canary, point, None, _MS_BIND), use)
    assert (status, left) == ("125", ["file"])
    assert len(err.splitlines()) <= 2
    assert "Traceback" not in err
    assert_world_sound(world)


# --- what other ids own -----------------------------------------------------------------------------------------

FOREIGN = "mkdir -p /srv/deep/deeper; echo 1 > /srv/deep/deeper/file; chown -R 7:8 /srv/deep; chmod 0 /srv/deep"
RANGE = '[user]\nmap = "range"'


@pytest.fixture
def ranged(tmp_path: Path, require: Any) -> Iterator[World]:
    """A world whose environments have a range of ids."""
    require("userns", "overlay", "range")
    made = World(str(tmp_path), tools=(*TOOLS, "chown", "chmod"))
    made.template("tiny", FOREIGN, more=RANGE)
    yield made
    made.clear()


def _leftovers(world: World) -> list[str]:
    return [*os.listdir(f"{world.store}/staging"), *os.listdir(f"{world.store}/trash")]


@pytest.mark.parametrize("said", ["gc", "build other"])
def test_X_30_a_build_that_was_killed_leaves_files_of_other_ids_and_the_next_command_takes_them(
    ranged: World, said: str
) -> None:
    ranged.template("tiny", f"{FOREIGN}; echo here; while :; do :; done", more=RANGE)
    ranged.template("other", "echo other > /srv/other", more=RANGE)
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(ranged.argv("build", "tiny"), cwd=ranged.home, env=ranged.environ, **pipes) as build:
        assert any(line == "devns: here\n" for line in build.stderr or ())
        build.send_signal(signal.SIGKILL)
    assert build.returncode == -signal.SIGKILL
    left = [name for name in os.listdir(f"{ranged.store}/staging") if os.path.isdir(f"{ranged.store}/staging/{name}")]
    assert len(left) == 2  # the layer, and where its mount points lay
    done = ranged.devns(*said.split())
    assert done.returncode == 0, done.stderr
    assert _leftovers(ranged) == []
    assert_world_sound(ranged)


@pytest.mark.parametrize("said", ["remove tiny", "reset --home tiny"])
def test_X_30_files_of_other_ids_that_are_closed_go_with_their_environment(ranged: World, said: str) -> None:
    inside = FOREIGN.replace("/srv/deep", "/srv/more") + "; " + FOREIGN.replace("/srv", "~")
    done = ranged.devns("run", "--root", "tiny", "--", "sh", "-euc", inside)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    done = ranged.devns(*said.split())
    assert (done.returncode, done.stderr, _leftovers(ranged)) == (0, "", [])
    assert_world_sound(ranged)


def test_X_30_without_newuidmap_it_says_what_is_missing_and_later_takes_what_was_left(ranged: World) -> None:
    ranged.build()
    path = f"{ranged.place}/bin"
    os.mkdir(path)
    done = ranged.devns("remove", "tiny", env={"PATH": path})
    assert done.returncode == 0, done.stderr  # nobody wrote in it
    done = ranged.devns("gc", env={"PATH": path})
    assert done.returncode == 125
    assert "belongs to another user id; no range of user ids: newuidmap is in no directory of PATH" in done.stderr
    assert [line.startswith("hint: ") for line in done.stderr.splitlines()] == [False, True]
    done = ranged.devns("gc")
    assert (done.returncode, done.stderr, _leftovers(ranged)) == (0, "", [])
    assert os.listdir(f"{ranged.store}/layers") == []
    assert_world_sound(ranged)
