"""The command line's door: whose modules it runs, and how it ends when nobody listens or nothing makes sense."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from devns.__main__ import _own_path

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = "import sys\nfrom devns.__main__ import main\nsys.exit(main())\n"  # as installers write one
MODULES = "__future__ typing importlib json ast dataclasses contextlib typer rich click pluggy tomli socket ctypes"


@pytest.fixture
def door(tmp_path: Path) -> Any:
    """`door(*arguments)`: devns started by its script, in an empty home that is the working directory."""
    home, bin = tmp_path / "home", tmp_path / "bin"
    home.mkdir()
    bin.mkdir()
    (bin / "devns").write_text(SCRIPT)

    def run(*arguments: str, entry: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
        env = {"HOME": str(home), "PATH": "/usr/bin:/bin", "DEVNS_STORE": str(tmp_path / "store")}
        env["PYTHONPATH"] = f"{entry}{CHECKOUT}:{CHECKOUT / 'plugins'}"
        env["PYTHONDONTWRITEBYTECODE"] = "1"
        command = [*options.pop("before", ()), sys.executable, *options.pop("how", (str(bin / "devns"),)), *arguments]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.run(command, cwd=home, env=env, text=True, check=False, **{**streams, **options})

    return run


# --- whose modules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["script", *(["-P -m"] if sys.version_info >= (3, 11) else [])])
def test_P_01_modules_in_the_working_directory_are_never_imported(door: Any, tmp_path: Path, how: str) -> None:
    bare = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    for name in set(MODULES.split()) - set(bare.stdout.split()):  # what Python loads itself is not ours to guard
        (tmp_path / "home" / f"{name}.py").write_text(f"raise SystemExit('sprung: {name}')")
    options: dict[str, Any] = {"how": ("-P", "-m", "devns")} if how == "-P -m" else {"entry": ":"}
    for arguments in (("--version",), ("template", "list"), ("plan", "host")):
        done = door(*arguments, **options)
        assert (done.returncode, done.stderr) == (0, "")


def test_P_01_the_working_directory_is_dropped_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "beneath").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ["", ".", "beneath", str(tmp_path), f"{tmp_path}/", f"{tmp_path}/./beneath/..", f"{tmp_path}/link"]
    assert _own_path([*names, "/usr/lib", f"{tmp_path}/beneath"]) == ["/usr/lib", f"{tmp_path}/beneath"]


def test_where_devns_itself_lies_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    assert _own_path(["", str(CHECKOUT)]) == [str(CHECKOUT)]


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_X_20_a_reader_that_is_gone_is_141_and_no_word(door: Any) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        assert [(door(*words, stdout=write).returncode) for words in (("template", "list"), ("plan", "host"))] == [
            141
        ] * 2
        assert door("template", "list", stdout=write).stderr == ""
        assert door("template", "show", "nope", stderr=write).returncode == 141
    finally:
        os.close(write)


def test_X_20_a_full_disk_beneath_the_answer_is_one_sentence(door: Any) -> None:
    with open("/dev/full", "w") as full:
        done = door("template", "list", "--json", stdout=full)
        assert (done.returncode, done.stderr) == (
            125,
            "devns: standard output cannot be written: no space left on device\n",
        )
        assert door("template", "show", "nope", stderr=full).returncode == 78


def test_X_24_streams_that_the_caller_closed_are_nothing_and_not_the_next_file(door: Any) -> None:
    shut = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    assert door("template", "list", before=shut).returncode == 0
    assert door("template", "show", "nope", before=shut).returncode == 78


def test_a_command_line_that_makes_no_sense_is_2_and_says_why(door: Any) -> None:
    done = door("run", "--no-such-option")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--no-such-option" in done.stderr
    assert door("no-such-verb").returncode == 2


def test_X_20_an_interrupt_while_modules_are_loaded_is_130_and_no_word(door: Any, tmp_path: Path) -> None:
    late = tmp_path / "late"
    late.mkdir()
    (late / "pluggy.py").write_text("raise KeyboardInterrupt")
    done = door("template", "list", entry=f"{late}:")
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("variable", ["=x", "A B=1", "1=2", ""])
def test_C_16_a_variable_without_a_name_is_refused_before_anything_is_done(door: Any, variable: str) -> None:
    done = door("plan", "-e", variable, "host")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == f"devns: -e {variable}: no name of a variable\nhint: -e NAME, or -e NAME=VALUE\n"


def test_a_relative_place_to_start_is_beneath_the_one_that_it_would_be(door: Any, tmp_path: Path) -> None:
    assert f"{tmp_path}/home/sub" in door("plan", "-w", "sub", "host").stdout
    assert '"cwd": "/srv"' in door("plan", "--json", "-w", "/srv", "host").stdout
