"""The library as a program uses it: streams as subprocess.run has them, mistakes in a call, and what can travel."""

from __future__ import annotations

import builtins
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import devns
from devns import launch, ops, sealed, workflow
from devns.host import Host
from devns.library import Environment
from devns.plugins import load
from devns.workflow import Bench, Options

PIPE, STDOUT = subprocess.PIPE, subprocess.STDOUT


@pytest.fixture
def box(machine: Host) -> Environment:
    return Environment("host", Bench(machine, load(machine)), Options())


# --- streams ----------------------------------------------------------------------------------------------------------

SAYS = ["sh", "-c", "cat; echo err >&2; echo out"]


def test_stderr_goes_where_stdout_goes(box: Environment, tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as log:
        assert box.run(SAYS, stdin=subprocess.DEVNULL, stdout=log, stderr=STDOUT).returncode == 0
    assert (tmp_path / "log").read_text() == "err\nout\n"
    done = box.run(SAYS, input="in ", stdout=PIPE, stderr=STDOUT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "in err\nout\n", None)


def test_stderr_goes_to_the_callers_stdout_where_that_is_the_payloads(
    box: Environment, capfd: pytest.CaptureFixture[str]
) -> None:
    assert box.run(SAYS, input="in ", stderr=STDOUT).returncode == 0
    assert capfd.readouterr() == ("in err\nout\n", "")


@pytest.mark.parametrize(
    "options",
    [
        {"input": "x", "stdin": PIPE},
        {"capture_output": True, "stdout": PIPE},
        {"capture_output": True, "stderr": STDOUT},
        {"stdout": STDOUT},
    ],
)
def test_streams_that_contradict_each_other_are_a_mistake(box: Environment, options: Any) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ValueError, match=r"stdin|stdout|STDOUT"):
        box.run(["true"], **options)
    assert os.listdir("/proc/self/fd") == before


def test_text_is_decoded_as_asked_with_one_kind_of_line_end(box: Environment) -> None:
    script = ["printf", r"a\r\nb\rc\n\344\n"]
    assert box.run(script, stdout=PIPE).stdout == b"a\r\nb\rc\n\xe4\n"
    assert box.run(script, stdout=PIPE, encoding="latin-1").stdout == "a\nb\nc\nä\n"
    assert box.run(script, stdout=PIPE, text=True, errors="replace").stdout == "a\nb\nc\n\ufffd\n"
    assert box.run(["cat"], input="ä", stdout=PIPE, encoding="latin-1").stdout == "ä"
    with pytest.raises(UnicodeDecodeError):
        box.run(script, stdout=PIPE, text=True)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        ("ls", TypeError),
        (b"ls", TypeError),
        ([b"ls"], TypeError),
        ([1], TypeError),
        ([], ValueError),
        (["a\0b"], ValueError),
    ],
)
def test_what_is_no_command_is_the_callers_mistake(box: Environment, argv: Any, kind: type[Exception]) -> None:
    for run in (box.run, devns.namespaces().run):
        with pytest.raises(kind, match=r"argv|PathLike"):
            run(argv)


@pytest.mark.parametrize(
    ("env", "kind"),
    [
        ({"": "x"}, ValueError),
        ({"A=B": "x"}, ValueError),
        ({"A": "x\0"}, ValueError),
        ({"A": 1}, TypeError),
        ({b"A": "x"}, TypeError),
    ],
)
def test_C_16_what_is_no_variable_is_the_callers_mistake(box: Environment, env: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^env: "):
        box.run(["true"], env=env)


@pytest.mark.parametrize("options", [{"user": ""}, {"user": "a b"}, {"root": True, "user": "nobody"}])
def test_what_is_no_user_is_the_callers_mistake(options: Any) -> None:
    with pytest.raises(ValueError, match="user"):
        devns.open("host", **options)


def test_what_is_no_path_is_the_callers_mistake(box: Environment) -> None:
    for path in ("", "a\0b"):
        with pytest.raises(ValueError, match=r"^cwd: "):
            box.run(["true"], cwd=path)


def test_paths_are_words_and_a_relative_place_is_beneath_the_home(box: Environment, machine: Host) -> None:
    assert box.run([Path("/bin/sh"), "-c", "mkdir sub"]).args == ["/bin/sh", "-c", "mkdir sub"]
    assert box.run(["pwd"], cwd=Path("sub"), stdout=PIPE, text=True).stdout == f"{machine.home}/sub\n"


# --- what travels -----------------------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: dict[str, Callable[[], Any]] = {
    "infinite": lambda: complex("inf"),
    "no number": lambda: float("nan"),
    "too deep for a parser": lambda: nested(300),
    "too deep for anything": lambda: nested(100_000),
    "an object": object,
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_that_has_no_literal_is_the_functions_mistake(kind: str) -> None:
    with pytest.raises(TypeError, match="is not a literal"):
        devns.namespaces().call(VALUES[kind])


@pytest.mark.parametrize(
    "value",
    [None, True, -1.5, 2j, "ä\udcff\n", b"\0\xff", (), [{}], {"a": {1, 2}, (1,): set()}, "ü" * 30_000, nested(50)],
)
def test_a_literal_comes_back_as_it_was(value: Any) -> None:
    assert devns.namespaces().call(lambda: value) == value


def raises(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


class TimeoutError_(Exception):
    pass


TimeoutError_.__name__ = "TimeoutError"


def test_an_exception_comes_back_whole_or_as_its_text() -> None:
    call = devns.namespaces().call
    with pytest.raises(FileNotFoundError) as missing:
        call(lambda: os.stat("/no/such"))
    assert (missing.value.errno, missing.value.filename) == (2, "/no/such")
    with pytest.raises(OSError, match="Invalid cross-device link") as both:
        call(raises(OSError(18, "Invalid cross-device link", "/a", None, "/b")))
    assert (both.value.filename, both.value.filename2) == ("/a", "/b")
    with pytest.raises(UnicodeDecodeError):
        call(lambda: b"\xff".decode())
    with pytest.raises(devns.CallError, match="TimeoutError: mine"):
        call(raises(TimeoutError_("mine")))
    with pytest.raises(devns.CallError, match="SystemExit: 3"):
        call(raises(SystemExit(3)))
    group = getattr(builtins, "ExceptionGroup", None)
    if group is not None:  # from Python 3.11
        with pytest.raises(devns.CallError, match="ExceptionGroup: several"):
            call(raises(group("several", [ValueError("one")])))


def test_a_function_runs_with_the_effects_and_the_notes_of_a_command(
    box: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    def started(plan: Any, **options: Any) -> Any:
        told.update(options)
        raise RuntimeError("far enough")

    monkeypatch.setattr("devns.spaces.started", started)
    with pytest.raises(RuntimeError, match="far enough"):
        box.call(os.getpid)
    assert set(workflow.run_options(box._bench)) <= set(told)


# --- what a build says ------------------------------------------------------------------------------------------------


def sealed_shell(machine: Host, script: str) -> Any:
    usr = [ops.bind("/usr", "/usr"), *(ops.symlink(f"/{name}", f"usr/{name}") for name in ("bin", "lib", "lib64"))]
    argv = ["/bin/sh", "-c", script]
    return sealed.sealed_plan(
        machine, map="single", inside=[ops.tmpfs("/"), *usr, ops.dev()], argv=argv, env={"PATH": "/usr/bin"}
    )


def test_A_32_a_line_without_an_end_is_cut(machine: Host) -> None:
    lines: list[str] = []
    script = "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo last; exit 3"
    with pytest.raises(sealed.Ended) as ended:
        sealed.run_sealed(sealed_shell(machine, script), machine, line=lines.append)
    assert lines[-1] == "last"
    assert max(map(len, lines)) == 8192
    assert len(ended.value.message) < 12_000
    assert ended.value.message.endswith("  last")


# --- what is lent -----------------------------------------------------------------------------------------------------


def test_C_11_a_layer_that_becomes_a_link_after_the_plan_is_refused(planned: Any, tmp_path: Path) -> None:
    lower, secret = tmp_path / "lower", tmp_path / "secret"
    lower.mkdir()
    secret.mkdir()
    (secret / "key").write_text("42")
    step = ops.overlay("/data", lower=[str(lower)], upper=None, work=None, canonical=True)
    plan = planned(step, argv=("cat", "/data/key"))
    lower.rmdir()
    lower.symlink_to(secret)
    with pytest.raises(devns.StepError) as refused:
        launch.launch(plan)
    assert refused.value.op == "overlay"
