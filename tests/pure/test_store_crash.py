"""A store that is killed, or refused something, at every system call that changes anything.

A small life of a store runs in a process of its own, which is killed at one of these calls (tests/tracer.py), or lets
that call fail. Afterwards the store is sound, and the same life succeeds. A real build is disturbed in
tests/kernel/test_store_faults.py.
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

import pytest

from devns.trash import delete_tree
from tests import tracer
from tests.store_checks import assert_store_sound, live
from tests.tracer import KILL_ALL, Fault, Outcome, Point, Traced

_REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_LIVE = (
    "import os, sys; sys.path.insert(0, sys.argv[1]); from tests.store_checks import told; os._exit(told(sys.argv[2]))"
)
_TOLD = 3


@pytest.fixture
def places() -> Iterator[str]:
    """A directory for stores, in memory where there is such a place: hundreds are made."""
    path = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    yield path
    delete_tree(path)


def _argv(path: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-B", "-c", _LIVE, _REPOSITORY, path]


def _start(path: str, fault: Fault | None = None) -> Traced:
    return Traced(_argv(path), env={}, cwd="/", fault=fault)


def _sweep(places: str, what: str, status: tuple[int, ...]) -> str:
    """Meet `what` at every point, each in a store of its own. Returns how many were safe, of how many."""
    missing = tracer.works()
    if missing:
        pytest.skip(missing)
    life = _start(f"{places}/plain").wait()
    assert life.status == 0, life.err
    points, safe = life.points, 0
    for pair in zip(points[::2], [*points[1::2], None], strict=False):  # two at once: there is more than one core
        running = [(point, _start(_at(places, point), Fault(what, point))) for point in pair if point is not None]
        for point, disturbed in running:
            path, found = _at(places, point), disturbed.wait()
            _assert_ended(found, point, status)
            if os.path.lexists(path):
                assert_store_sound(path, again=partial(live, path))
            safe += 1
            delete_tree(path)
    return f"{safe} of {len(points)} points safe"


def _assert_ended(found: Outcome, point: Point, status: tuple[int, ...]) -> None:
    assert (found.met, found.hung) == ([point], 0)
    assert found.status in status, f"{point}: ended with {found.status}: {found.err}"


def _at(places: str, point: Point) -> str:
    return f"{places}/{point.call}-{point.number}"


def test_X_01_X_02_a_kill_at_any_changing_system_call_leaves_a_sound_store(
    places: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _sweep(places, KILL_ALL, (-9,))
    with capsys.disabled():
        print(f"\nkilled: {said}")


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_X_04_an_error_of_any_changing_system_call_is_told_and_leaves_a_sound_store(
    places: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _sweep(places, error, (0, _TOLD))
    with capsys.disabled():
        print(f"\n{error}: {said}")


def test_X_06_all_is_on_disk_before_a_layer_gets_its_name_and_the_name_is_right_after(places: str) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    calls = "trace=?mkdir,?mkdirat,renameat2,?symlink,?symlinkat,write,fsync,syncfs"
    strace = ["strace", "-qq", "-e", calls, "-o", f"{places}/trace", "-yy"]
    life = subprocess.run([*strace, *_argv(f"{places}/plain")], capture_output=True, text=True, check=False)
    if life.returncode == 1 and "ptrace" in life.stderr.lower():
        pytest.skip(f"strace may not trace here: {life.stderr.splitlines()[0]}")
    assert life.returncode == 0, life.stderr
    with open(f"{places}/trace") as file:
        trace = file.readlines()
    named = [at for at, line in enumerate(trace) if line.startswith("renameat2") and "/layers/" in line]
    assert len(named) == 2
    for at in named:
        before = [line for line in trace[:at] if re.match(r"syncfs|write|symlink|mkdir|fsync", line)]
        assert before[-1].startswith("syncfs")
        after = next(line for line in trace[at + 1 :] if line.startswith("fsync"))
        assert f"<{places}/plain/layers>" in after
