"""What starting costs, told by names and not by the clock: each module is imported alone, in a fresh interpreter.

The interpreter has no site-packages (-S), so a module that passes here also needs nothing but Python itself.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PLUGINS = REPOSITORY / "plugins"

# What `import devns` must not bring: the next command that somebody types waits for it.
HEAVY = "typer rich click pluggy tomli pysequoia dataclasses inspect ast json ctypes socket subprocess ssl"

# What a warm `devns run` imports, and the effects of bundled plugins, which launch loads by the names in their steps.
FAST = ("launch", "child", "linux", "ops", "seccomp", "terminal", "store", "fast", "errors")
SLOW = "typer rich click pluggy tomli pysequoia dataclasses inspect asyncio importlib.metadata urllib.request"
EFFECTS = sorted(
    {name for path in PLUGINS.rglob("*.py") for name in re.findall(r'"(devns_[\w.]+):\w+"', path.read_text())}
)


def test_importing_devns_imports_nothing_else_of_ours_and_nothing_heavy() -> None:
    modules = imported("devns")
    assert sorted(name for name in modules if name.startswith("devns")) == ["devns"]
    assert modules & set(HEAVY.split()) == set()


@pytest.mark.parametrize("room", [room for room in FAST if (REPOSITORY / "devns" / f"{room}.py").exists()])
def test_a_room_of_the_fast_lane_imports_nothing_slow(room: str) -> None:
    assert imported(f"devns.{room}") & set(SLOW.split()) == set()


@pytest.mark.parametrize("module", EFFECTS)
def test_an_effect_of_a_bundled_plugin_imports_nothing_slow(module: str) -> None:
    assert imported(module) & set(SLOW.split()) == set()


def imported(module: str) -> set[str]:
    """The names of all modules that are there after `import module`."""
    code = "import sys; sys.path[:0] = sys.argv[2:]; __import__(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-I", "-S", "-B", "-c", code, module, str(REPOSITORY), str(PLUGINS)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())
