"""A real shell in a real terminal: what a user's fingers do, and what the terminal looks like afterwards."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

CHECKOUT = Path(__file__).parents[2]
PROMPT = r"[a-z0-9_-]+@host:[^\n]*[$] "
Start = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start("shell", "host")`: devns in a terminal of 30 lines of 100 columns, driven by pexpect."""
    home = tmp_path / "home"
    home.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "DEVNS"))}
    env |= {"HOME": str(home), "DEVNS_STORE": str(tmp_path / "store"), "SHELL": "/bin/bash", "TERM": "xterm-256color"}
    env |= {"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'plugins'}"}
    started = []

    def spawn(*arguments: str, program: list[str] | None = None) -> Any:
        command = [*(program or [sys.executable, "-m", "devns"]), *arguments]
        child = pexpect.spawn(
            command[0], command[1:], env=env, cwd=str(home), timeout=30, encoding="utf-8", dimensions=(30, 100)
        )
        started.append(child)
        return child

    yield spawn
    for child in started:
        child.close(force=True)


@pytest.fixture
def shell(start: Start) -> Any:
    """A shell in the host's own root, at its first prompt, without what bash says of a new home."""
    child = start("shell", "host")
    child.expect(r"[$] ")
    child.sendline("PS1='\\u@\\h:\\w$ '; bind 'set enable-bracketed-paste off'")
    child.expect(PROMPT)
    return child


def ask(shell: Any, line: str) -> str:
    """What the shell says to a line, without the echo."""
    shell.sendline(line)
    shell.expect(PROMPT)
    return str(shell.before).partition("\n")[2].strip()


def end(child: Any, line: str = "exit") -> int:
    child.sendline(line)
    child.expect(pexpect.EOF)
    child.close()
    return int(child.exitstatus)


def run_sleep(shell: Any) -> None:
    """A job in the foreground: a key typed before it is there would be the shell's own."""
    shell.sendline("sh -c 'echo asl''eep; exec sleep 1000'")
    shell.expect("asleep\r\n")


def test_a_shell_has_an_own_terminal_of_the_callers_size_and_its_status_is_devns_status(shell: Any) -> None:
    assert ask(shell, "tty") == "/dev/pts/0"
    assert ask(shell, "stty size") == "30 100"
    assert ask(shell, "echo $TERM $DEVNS") == "xterm-256color host"
    assert end(shell, "exit 3") == 3


def test_a_window_that_changes_its_size_changes_it_inside(shell: Any) -> None:
    shell.setwinsize(41, 133)
    shell.sendline("sleep 0.2; stty size")
    shell.expect("41 133\r\n")  # readline draws its line anew as well, so there may be more prompts than one
    assert end(shell) == 0


def test_ctrl_c_interrupts_what_runs_and_leaves_the_shell(shell: Any) -> None:
    run_sleep(shell)
    shell.sendintr()
    shell.expect(PROMPT)
    assert ask(shell, "echo $?") == "130"
    assert end(shell) == 0


def test_ctrl_z_is_job_control_of_the_shell_inside(shell: Any) -> None:
    run_sleep(shell)
    shell.send("\x1a")
    shell.expect("Stopped")
    shell.expect(PROMPT)
    assert "Stopped" in ask(shell, "jobs")
    shell.sendline("kill -9 %1; sleep 0.3; jobs")
    shell.expect("Killed")
    assert end(shell) == 0


def test_ctrl_z_of_a_command_without_a_shell_stops_devns_and_fg_goes_on(start: Start) -> None:
    outer = start("--norc", "--noprofile", "-i", program=["/bin/bash"])
    outer.expect(r"[$] ")
    outer.sendline("PS1='out''er$ '; bind 'set enable-bracketed-paste off'")
    outer.expect("outer[$] ")
    outer.sendline(f"{sys.executable} -m devns run host -- sh -c 'echo begun; read line; echo got $line'")
    outer.expect("begun\r\n")
    outer.send("\x1a")
    outer.expect("Stopped")
    outer.expect(r"outer[$] ")
    outer.sendline("fg")
    outer.expect("devns run host")
    outer.sendline("hello")
    outer.expect("got hello\r\n")
    outer.expect(r"outer[$] ")
    outer.sendline("exit")
    outer.expect(pexpect.EOF)


def test_the_terminal_is_as_it_was_even_after_the_shell_inside_is_killed(start: Start) -> None:
    outer = start("--norc", "--noprofile", "-i", program=["/bin/bash"])
    outer.expect(r"[$] ")
    outer.sendline("PS1='out''er$ '; bind 'set enable-bracketed-paste off'")
    outer.expect("outer[$] ")
    before = modes(outer)
    outer.sendline(f"{sys.executable} -m devns run host -- sh -c 'echo begun; sleep 0.2; kill -9 $$'")
    outer.expect("begun\r\n")
    outer.expect(r"outer[$] ")
    assert ask_outer(outer, "echo $?") == "137"
    assert modes(outer) == before
    outer.sendline("exit")
    outer.expect(pexpect.EOF)


def modes(outer: Any) -> str:
    return ask_outer(outer, "stty -g")


def ask_outer(outer: Any, line: str) -> str:
    outer.sendline(line)
    outer.expect(r"outer[$] ")
    return str(outer.before).partition("\n")[2].strip()


def test_all_that_a_fast_payload_says_arrives(start: Start) -> None:
    child = start("run", "host", "--", "seq", "20000")
    child.expect(pexpect.EOF)
    child.close()
    assert child.before.split() == [str(number) for number in range(1, 20001)]


def test_a_terminal_that_hangs_up_ends_what_runs_inside(tmp_path: Path, start: Start) -> None:
    child = start("run", "host", "--", "sh", "-c", "echo begun; sleep 1000")
    child.expect("begun")
    (inside,) = children(child.pid)
    child.close(force=False)  # the other end of the terminal, as when a window is closed
    child.wait() if child.isalive() else None
    with pytest.raises(ProcessLookupError):
        os.kill(inside, 0)


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as listing:
        return [int(word) for word in listing.read().split()]


def test_the_modes_of_the_terminal_are_raw_only_while_it_runs(start: Start) -> None:
    child = start("run", "host", "--", "sh", "-c", "echo begun; read line; echo $line")
    child.expect("begun")
    assert not termios.tcgetattr(child.fileno())[3] & termios.ICANON
    child.sendline("done")
    child.expect("done")
    child.expect(pexpect.EOF)
