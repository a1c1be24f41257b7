"""A store that is killed, or refused something, at every system call that changes anything.

A small life of a store runs in a process of its own under strace(1), which kills it at the n-th call of each kind, or
lets that call fail. Afterwards the store is sound, and the same life succeeds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import pytest

from devns.trash import delete_tree
from tests.store_checks import assert_store_sound, live

_REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_LIVE = (
    "import os, sys; sys.path.insert(0, sys.argv[1]); from tests.store_checks import told; os._exit(told(sys.argv[2]))"
)
_CALLS = """
    mkdir mkdirat rename renameat renameat2 unlink unlinkat rmdir symlink symlinkat link linkat chmod fchmod fchmodat
    write pwrite64 ftruncate setxattr fsetxattr fsync fdatasync syncfs flock open openat
""".split()
_TOLD = 3


class Point(NamedTuple):
    """The `number`-th call of its kind."""

    call: str
    number: int


@pytest.fixture
def places() -> Iterator[str]:
    """A directory for stores, in memory where there is such a place: hundreds are made."""
    path = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    yield path
    delete_tree(path)


def _traced(path: str, calls: str, *options: str) -> subprocess.Popen[bytes]:
    strace = ["strace", "-f", "-qq", "-e", f"trace={calls}", *options]
    python = [sys.executable, "-I", "-S", "-B", "-c", _LIVE, _REPOSITORY, path]
    return subprocess.Popen([*strace, *python], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _disturbed(path: str, point: Point, fault: str) -> subprocess.Popen[bytes]:
    return _traced(path, point.call, "-o", "/dev/null", "-e", f"inject={point.call}:{fault}:when={point.number}")


def _trace(places: str) -> list[str]:
    """The calls of an undisturbed life, one a line. Skips where nothing can be traced."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    calls = ",".join(f"?{call}" for call in _CALLS)  # "?": not every machine has all of them
    life = _traced(f"{places}/plain", calls, "-o", f"{places}/trace", "-yy")
    said = life.communicate()[1].decode()
    if life.returncode == 1 and "ptrace" in said.lower():
        pytest.skip(f"strace may not trace here: {said.splitlines()[0]}")
    assert life.returncode == 0, said
    with open(f"{places}/trace") as file:
        return [line.split(maxsplit=1)[1] for line in file]


def _points(trace: list[str]) -> list[Point]:
    """Every call that changes something; of those that open a file the ones that may create it."""
    seen: dict[str, int] = {}
    points = []
    for line in trace:
        call = line.partition("(")[0]
        if call in _CALLS:
            seen[call] = seen.get(call, 0) + 1
            if call not in ("open", "openat") or "O_CREAT" in line:
                points.append(Point(call, seen[call]))
    return points


def _sweep(places: str, fault: str, status: tuple[int, ...]) -> str:
    """Meet `fault` at every point, each in a store of its own. Returns how many were safe, of how many."""
    points = _points(_trace(places))
    safe = 0
    for pair in zip(points[::2], [*points[1::2], None], strict=False):  # two at once: there is more than one core
        running = [(point, _disturbed(_at(places, point), point, fault)) for point in pair if point is not None]
        for point, life in running:
            said = life.communicate()[1].decode()
            assert life.returncode in status, f"{point}: ended with {life.returncode}: {said}"
            path = _at(places, point)
            if os.path.lexists(path):
                assert_store_sound(path, again=partial(live, path))
            safe += 1
            delete_tree(path)
    return f"{safe} of {len(points)} points safe"


def _at(places: str, point: Point) -> str:
    return f"{places}/{point.call}-{point.number}"


def test_X_01_X_02_a_kill_at_any_changing_system_call_leaves_a_sound_store(
    places: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _sweep(places, "signal=SIGKILL", (-9,))
    with capsys.disabled():
        print(f"\nkilled: {said}")


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_X_04_an_error_of_any_changing_system_call_is_told_and_leaves_a_sound_store(
    places: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _sweep(places, f"error={error}", (0, _TOLD))
    with capsys.disabled():
        print(f"\n{error}: {said}")


def test_X_06_all_is_on_disk_before_a_layer_gets_its_name_and_the_name_is_right_after(places: str) -> None:
    trace = _trace(places)
    named = [at for at, line in enumerate(trace) if line.startswith("renameat2") and "/layers/" in line]
    assert len(named) == 2
    for at in named:
        before = [line for line in trace[:at] if re.match(r"syncfs|write|symlink|mkdir|fsync", line)]
        assert before[-1].startswith("syncfs")
        after = next(line for line in trace[at + 1 :] if line.startswith("fsync"))
        assert f"<{places}/plain/layers>" in after
