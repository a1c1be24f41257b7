"""devns itself, killed or refused something at every system call that changes anything: builds, gc, remove, reset and
clone, each the real command with all the processes it starts.

A point is one call of one process (tests/tracer.py). Every commit meets a sample of them, the same each time, that
takes each kind of call in turn. All of them are met on demand, which takes a quarter of an hour for kills and as long
for each kind of error:

    DEVNS_FAULTS=all    pytest tests/kernel/test_store_faults.py       all points
    DEVNS_FAULTS=1/2    pytest tests/kernel/test_store_faults.py       the first half of them, in one process
    DEVNS_FAULTS=2/2    pytest tests/kernel/test_store_faults.py       the other, in another

With one mapped id only: who is traced gains no privileges, so newuidmap(1) fails.
"""

from __future__ import annotations

import functools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from devns import trees
from devns.copying import copy_tree
from devns.diagnose import probe
from devns.errors import DevnsError
from devns.host import Host
from devns.store import Store
from devns.trash import delete_tree
from devns.verbs.clone import clone
from devns.verbs.gc import gc
from devns.verbs.remove import remove
from devns.verbs.reset import reset
from tests import tracer
from tests.tracer import KILL, KILL_ALL, Fault, Outcome, Point, Traced
from tests.worlds import CHECK, World, assert_world_sound, tree

_WHICH = os.environ.get("DEVNS_FAULTS", "")
_SEED = 20  # of the sample


# --- what is disturbed ------------------------------------------------------------------------------------------------


def _nothing(world: World) -> None:
    """The first build makes the store, too."""


def _used(world: World) -> None:
    """An environment in which somebody wrote, and wrote over another list of layers before."""
    world.template("tiny", "echo before > /etc/name")
    assert world.enter("tiny", "echo 1 > /srv/before; echo 1 > ~/file") == 0
    world.template("tiny", "echo two > /etc/name; rm /etc/old; mkdir /srv/made; ln -s made /srv/link")
    assert world.enter("tiny", "rm /etc/name; mkdir /srv/new; echo 2 > /srv/new/file; ln -s file /srv/new/link") == 0


def _abandoned(world: World) -> None:
    """Layers that nobody names, what killed commands left, and downloads."""
    world.build()
    world.template("other", "echo other > /etc/name", "mkdir /srv/more")
    world.build("other")
    Store.open(world.store).remove("other")
    for place in ("staging/left/root/etc", "trash/gone/deep/deeper", "cache/debs"):
        os.makedirs(f"{world.store}/{place}")
    for place in ("staging/left/root/etc/name", "trash/gone/deep/file", f"cache/debs/{'a' * 64}.deb"):
        with open(f"{world.store}/{place}", "w") as file:
            file.write("x")


def _build(world: World) -> object:
    return world.build().layers, world.manifests()


def _gc(world: World) -> object:
    gc(world.bench(), cache=True)
    return None


def _remove(world: World) -> object:
    """Removed, or removed before."""
    try:
        remove("tiny", world.bench())
    except DevnsError as error:
        return error.message == "tiny: no such environment"
    return True


def _reset(world: World) -> object:
    reset("tiny", world.bench(), home=True)
    return None


def _clone(world: World) -> object:
    try:
        clone("tiny", "copy", world.bench())
    except DevnsError as error:
        return error.message == "copy: there is such an environment already"
    return True


class Deed(NamedTuple):
    """A command, the store before it, the same thing done again, and an environment that must work afterwards."""

    arguments: tuple[str, ...]
    before: Callable[[World], None]
    again: Callable[[World], object]
    enters: tuple[str, str] | None = None


DEEDS = {
    "build": Deed(("build", "--json", "tiny"), _nothing, _build, ("tiny", CHECK)),
    "gc": Deed(("gc", "--cache"), _abandoned, _gc, ("tiny", CHECK)),
    "remove": Deed(("remove", "tiny"), _used, _remove),
    "reset": Deed(("reset", "--home", "tiny"), _used, _reset, ("tiny", f"{CHECK}; test ! -e ~/file")),
    "clone": Deed(("clone", "tiny", "copy"), _used, _clone, ("copy", "test ! -e /etc/name; test -L /srv/new/link")),
}


# By which status a command ends that is killed or gets these signals; Ctrl-C is typed twice by many.
ENDS = {
    KILL_ALL: -9,
    "SIGINT": 130,
    "SIGINT SIGINT": 130,
    "SIGTERM": -15,
    "SIGHUP": -1,
    "SIGQUIT": -3,
    "SIGPIPE": 0,
    "SIGTSTP": 0,
}

# --- the sweep --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place() -> Iterator[str]:
    """For the hundreds of stores: in memory where overlayfs takes that, or every one of them would wait for a disk."""
    here = "/dev/shm" if os.access("/dev/shm", os.W_OK) and probe(Host.probe(), "/dev/shm")["overlay"].works else None
    path = tempfile.mkdtemp(prefix="devns-faults-", dir=here)
    yield path
    delete_tree(path)


class Sweep:
    """One deed, done undisturbed once, so that its points and what is there in the end are known."""

    def __init__(self, world: World, deed: Deed) -> None:
        self.deed = deed
        self.world = world
        deed.before(world)
        self._kept = f"{world.store}-before"
        if os.path.lexists(world.store):
            self._copy(world.store, self._kept)
        outcome = self.start().wait()
        assert (outcome.status, outcome.hung) == (0, 0), outcome.err
        self.points = outcome.points
        deed.again(self.world)
        gc(self.world.bench(), cache=True)
        self.wanted = tree(self.world.store)
        self.home = tree(self.world.home)

    def start(self, fault: Fault | None = None) -> Traced:
        """The deed begins, in a store as it was before."""
        self.world.clear()
        if os.path.lexists(self._kept):
            self._copy(self._kept, self.world.store)
        return Traced(self.world.argv(*self.deed.arguments), env=self.world.environ, cwd=self.world.home, fault=fault)

    def _copy(self, old: str, new: str) -> None:
        os.mkdir(new)
        host = self.world.bench().host
        trees.run(host, lambda: copy_tree("/old", "/new"), read={"/old": old}, write={"/new": new}, map="single")

    def check(self, fault: Fault) -> str | None:
        """Meet the fault and look at what is left. Returns what is wrong with it."""
        outcome = self.start(fault).wait()
        try:
            _assert_ended_well(outcome, fault)
            if os.path.lexists(self.world.store):
                again, world = self.deed.again, self.world
                assert_world_sound(world, again=lambda: again(world), wanted=self.wanted)
                if self.deed.enters:
                    assert world.enter(*self.deed.enters) == 0
            assert tree(self.world.home) == self.home, "I4"
        except (AssertionError, DevnsError) as error:
            return f"{fault.what} at {fault.point}: {error}\n{outcome.err}"
        return None

    def meet(self, what: str, points: list[Point], capsys: pytest.CaptureFixture[str]) -> None:
        wrong = [said for point in points if (said := self.check(Fault(what, point)))]
        with capsys.disabled():
            of = (
                f"{len(points)}"
                if len(points) == len(self.points)
                else f"{len(points)} (of {len(self.points)} there are)"
            )
            print(f"\n{' '.join(self.deed.arguments)}: {what}: {len(points) - len(wrong)} of {of} points safe")
        assert wrong == [], "\n\n".join(wrong)


def _assert_ended_well(outcome: Outcome, fault: Fault) -> None:
    """The fault was met, nobody is left, and who could still say what is wrong said it in one sentence."""
    assert outcome.met == [fault.point], f"met {outcome.met}"
    assert outcome.hung == 0, f"I4: {outcome.hung} processes left"
    assert "Traceback" not in outcome.err + outcome.out
    if fault.what in ENDS or (fault.what == KILL and fault.point and fault.point.process == 0):
        assert outcome.status == ENDS.get(fault.what, -9)
        return
    assert outcome.status in (0, 125), f"ended with {outcome.status}"
    if outcome.status == 125 and fault.point and (fault.point.process, fault.point.call) != (0, "write"):
        sentences = [line for line in outcome.err.splitlines() if not line.startswith(("{", "  ", "hint: "))]
        assert len(sentences) == 1, "not one sentence"
        assert sentences[0].startswith("devns: ")


def sample(points: list[Point], count: int) -> list[Point]:
    """So many of the points, each kind of call in turn; or all those that DEVNS_FAULTS asks for."""
    if _WHICH == "all":
        return points
    if _WHICH:
        shard, _, shards = _WHICH.partition("/")
        return points[int(shard) - 1 :: int(shards)]
    chance = random.Random(_SEED)
    kinds: dict[str, list[Point]] = {}
    for point in chance.sample(points, len(points)):
        kinds.setdefault(point.call, []).append(point)
    queues = list(kinds.values())
    found: list[Point] = []
    while len(found) < count and any(queues):
        for queue in queues:
            if queue and len(found) < count:
                found.append(queue.pop())
    return found


@pytest.fixture(scope="module")
def sweeps(place: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sweep]:
    """`sweeps("gc")`: each deed is done undisturbed once."""

    @functools.cache
    def make(name: str) -> Sweep:
        return Sweep(World(str(tmp_path_factory.mktemp(name)), store=f"{place}/{name}/store"), DEEDS[name])

    return make


@pytest.fixture(params=DEEDS)
def sweep(request: pytest.FixtureRequest, sweeps: Callable[[str], Sweep], require: Any) -> Sweep:
    require("userns", "overlay")
    missing = tracer.works()
    if missing:
        pytest.skip(missing)
    return sweeps(request.param)


def test_X_01_X_02_a_kill_at_any_changing_system_call_leaves_a_sound_store(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    """All the processes of a command are killed where one of them is about to change something."""
    sweep.meet(KILL_ALL, sample(sweep.points, 8), capsys)


def test_X_01_X_02_the_kill_of_one_process_at_any_changing_system_call_leaves_a_sound_store(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the processes that a command starts is killed, and the others go on."""
    sweep.meet(KILL, sample([point for point in sweep.points if point.process], 4), capsys)


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT", "EMFILE", "EIO"])
def test_X_04_X_12_X_13_X_14_an_error_of_any_changing_system_call_is_told_and_leaves_a_sound_store(
    sweep: Sweep, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.meet(error, sample(sweep.points, 2), capsys)


@pytest.mark.parametrize("signals", [what for what in ENDS if what.startswith("SIG")])
def test_X_20_a_signal_at_any_changing_system_call_ends_it_as_it_should_and_leaves_a_sound_store(
    sweep: Sweep, signals: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.meet(signals, sample(sweep.points, 1), capsys)
