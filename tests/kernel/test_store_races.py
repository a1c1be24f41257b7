"""Many devns at once over one store: builds of the same and of different environments, runs, and gc all the time.

Each process is the real command. Two rounds per commit; `DEVNS_ROUNDS=50` makes it fifty, which take some minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

from devns.store import Store
from tests.worlds import World, assert_world_sound

ROUNDS = int(os.environ.get("DEVNS_ROUNDS", "2"))
NAMES = ("red", "green", "blue")  # one root and one command in common, and one command of each one's own
LAYERS = 1 + 1 + len(NAMES)
Process = subprocess.Popen[str]
Start = Callable[..., Process]


@pytest.fixture
def world(tmp_path: Any, require: Any) -> World:
    require("userns", "overlay")
    made = World(str(tmp_path))
    for name in NAMES:
        made.template(name, "echo common > /etc/name", f"echo {name} > /srv/{name}")
    return made


@pytest.fixture
def start(world: World) -> Start:
    def run(*arguments: str) -> Process:
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(world.argv(*arguments), cwd=world.home, env=world.environ, text=True, **pipes)

    return run


class Ended(NamedTuple):
    """What a process that ended well said, and how many layers it told that it made."""

    out: str
    made: int


def ended(process: Process) -> Ended:
    out, err = process.communicate()
    assert process.returncode == 0, f"{process.args!r}: {err}"
    return Ended(out, err.splitlines().count("devns: write to disk"))


def race(start: Start, commands: Sequence[Sequence[str]], *, collectors: int) -> tuple[list[Ended], list[Any]]:
    """All the commands at once, and meanwhile so many gc, again and again. The second value is what gc took."""
    running = [start(*command) for command in commands]
    collecting = [start("gc", "--json") for _ in range(collectors)]
    taken: list[Any] = []
    while any(process.poll() is None for process in running):
        for number, collector in enumerate(collecting):
            if collector.poll() is not None:
                taken += json.loads(ended(collector).out)
                collecting[number] = start("gc", "--json")
        time.sleep(0.01)
    for collector in collecting:
        taken += json.loads(ended(collector).out)
    return list(map(ended, running)), taken


def test_X_07_X_09_X_10_sixteen_builds_and_runs_make_each_layer_once_whatever_gc_does(
    world: World, start: Start
) -> None:
    builds = [("build", name) for name in NAMES * 4]
    runs = [("run", name, "--", "sh", "-euc", "read x < /srv/$DEVNS; echo $x") for name in (*NAMES, NAMES[0])]
    wanted: dict[str, str] = {}
    for number in range(ROUNDS):
        done, taken = race(start, [*builds, *runs], collectors=2)
        assert [process.out for process in done] == [""] * len(builds) + [f"{command[1]}\n" for command in runs]
        assert taken == [], f"round {number}: gc took what somebody wanted"
        assert sum(process.made for process in done) == LAYERS, f"round {number}: {done}"
        manifests = world.manifests()
        wanted = wanted or manifests
        assert (len(manifests), manifests) == (LAYERS, wanted), f"round {number}: not the same bytes"
        assert_world_sound(world)
        ended(start("remove", *NAMES))
        race(start, [("gc",), ("gc",)], collectors=2)
        assert Store(world.store).layers() == ()
    assert_world_sound(world)


def test_X_08_builds_that_share_layers_in_another_order_all_end(world: World, start: Start) -> None:
    steps = ("echo 1 > /srv/1", "echo 2 > /srv/2", "echo 3 > /srv/3")
    orders = [(a, b) for a in steps for b in steps if a != b]
    names = [world.template(f"order{number}", *order) for number, order in enumerate(orders)]
    done, _ = race(start, [("build", name) for name in names * 2], collectors=1)
    assert sum(process.made for process in done) == 1 + len(steps) + len(orders)
    assert_world_sound(world)
