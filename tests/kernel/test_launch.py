"""launch, run for real: statuses, signals, descriptors, terminals, and what is left when somebody is killed."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from devns import launch, linux
from devns.errors import StepError
from devns.ops import bind, directory, namespace, setenv, symlink, tmpfs
from devns.spec import Namespaces

_libc = ctypes.CDLL(None, use_errno=True)
CHECKOUT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def run(plan: Any, **options: Any) -> tuple[int, str]:
    """The status and the standard output of a launch, with nothing for a terminal."""
    read, write = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    try:
        with launch.started(plan, stdio=(null, write, write), **options) as running:
            os.close(write)
            said = b""
            while data := os.read(read, 1 << 16):
                said += data
            return running.wait(), said.decode()
    finally:
        os.close(read)
        os.close(null)


def sh(planned: Callable[..., Any], script: str, *steps: Any, **changes: Any) -> tuple[int, str]:
    return run(planned(*steps, argv=("/bin/sh", "-c", script), **changes))


@pytest.mark.parametrize("status", [0, 1, 7, 125, 126, 127, 128, 200, 255])
def test_the_exit_status_is_the_payloads(planned: Any, status: int) -> None:
    assert sh(planned, f"exit {status}")[0] == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGSEGV, signal.SIGUSR1])
def test_a_signal_that_ends_the_payload_is_128_and_its_number(planned: Any, number: int) -> None:
    assert sh(planned, f"kill -{int(number)} $$")[0] == 128 + number


@pytest.mark.parametrize(("command", "status"), [("no-such-command", 127), ("/no/such", 127), ("/etc/hostname", 126)])
def test_a_command_that_cannot_be_started_is_126_or_127(planned: Any, command: str, status: int) -> None:
    with pytest.raises(StepError) as caught:
        run(planned(argv=(command,)))
    assert caught.value.exit_code == status
    assert command in caught.value.message


def test_E_33_a_command_that_looks_like_an_option_is_a_command(planned: Any) -> None:
    for name in ("--help", "-c", "@file"):
        with pytest.raises(StepError, match="command not found inside"):
            run(planned(argv=(name,)))


def test_signals_sent_to_the_launch_reach_the_payload(planned: Any) -> None:
    script = "trap 'echo got; exit 42' TERM; echo ready; while :; do sleep 0.05; done"
    read, write = os.pipe()
    with launch.started(planned(argv=("/bin/sh", "-c", script)), stdio=(0, write, write)) as running:
        os.close(write)
        assert os.read(read, 100) == b"ready\n"
        running.signal(signal.SIGTERM)
        assert os.read(read, 100) == b"got\n"
        assert running.wait() == 42
    os.close(read)


def test_X_23_orphans_are_reaped_and_the_end_waits_for_the_main_process_alone(planned: Any) -> None:
    script = (
        "i=0; while [ $i -lt 200 ]; do (sleep 0 & ) ; i=$((i+1)); done; sleep 0.3;"
        "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l; sleep 1000 & exit 3"
    )
    assert sh(planned, script) == (3, "0\n")


def test_E_01_the_payload_has_three_descriptors_and_no_more(planned: Any, canary: Any) -> None:
    extra = [os.open("/", os.O_RDONLY) for _ in range(20)]
    for fd in extra:
        os.set_inheritable(fd, True)
    try:
        status, said = sh(planned, "ls /proc/self/fd; ls /proc/1/fd 2>&1 | tail -n 1")
    finally:
        for fd in extra:
            os.close(fd)
    assert status == 0
    # 3 is the directory that ls itself reads; init's own are closed to everyone.
    assert said.split("\n", 4)[:4] == ["0", "1", "2", "3"]
    assert "Permission denied" in said


def test_E_34_the_environment_holds_what_was_asked_for_and_nothing_else(planned: Any, canary: Any) -> None:
    os.environ["AWS_SECRET_ACCESS_KEY"] = canary.token
    try:
        _status, said = run(planned(setenv("ASKED", "yes"), argv=("/bin/cat", "/proc/self/environ")))
    finally:
        del os.environ["AWS_SECRET_ACCESS_KEY"]
    names = {line.partition("=")[0] for line in said.split("\0") if line}
    assert "ASKED" in names
    assert canary.token not in said
    assert {name for name in names if not name.startswith("LC_")} <= {
        *("ASKED", "HOME", "USER", "LOGNAME", "PATH", "DEVNS", "TERM", "COLORTERM", "NO_COLOR", "LANG", "TZ"),
    }


def test_E_25_no_capability_is_left_and_none_can_come_back(planned: Any) -> None:
    _status, said = sh(planned, "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status")
    fields = dict(line.split(":\t") for line in said.splitlines())
    assert {key: int(value, 16) for key, value in fields.items()} == {
        "CapInh": 0,
        "CapPrm": 0,
        "CapEff": 0,
        "CapBnd": 0,
        "CapAmb": 0,
        "NoNewPrivs": 1,
        "Seccomp": 2,
    }


def test_E_25_root_has_what_package_managers_need_and_never_sys_admin(planned: Any, as_root: Any) -> None:
    _status, said = sh(planned, "grep -E '^Cap' /proc/self/status", **as_root)
    fields = {key: int(value, 16) for key, value in (line.split(":\t") for line in said.splitlines())}
    kept = {0, 1, 3, 4, 5, 6, 7, 10, 18, 31}  # linux/capability.h: chown ... setfcap
    assert fields == {
        "CapInh": 0,
        "CapPrm": sum(1 << bit for bit in kept),
        "CapEff": sum(1 << bit for bit in kept),
        "CapBnd": sum(1 << bit for bit in kept),
        "CapAmb": 0,
    }


def test_E_19_outer_processes_cannot_be_seen_or_signalled(inside: Any) -> None:
    outer = os.getpid()

    def attempt() -> tuple[bool, str]:
        try:
            os.kill(outer, 0)
        except OSError as error:
            return os.path.exists(f"/proc/{outer}"), errno.errorcode[error.errno or 0]
        return os.path.exists(f"/proc/{outer}"), "reached"

    assert inside()(attempt) == (False, "ESRCH")


@pytest.mark.parametrize("shared", [True, False])
def test_E_17_abstract_sockets_of_the_host_cannot_be_reached(inside: Any, canary: Any, shared: bool) -> None:
    name = f"\0devns-canary-{canary.token}"
    canary.socket.listen(1)
    if shared and linux.landlock_abi() < 6:
        pytest.skip("Landlock scopes: this kernel has none before Linux 6.12")

    def attempt() -> int:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(name)

    steps = () if shared else (namespace("net"),)
    assert attempt() == 0
    assert inside(*steps)(attempt) == (errno.EPERM if shared else errno.ECONNREFUSED)


def test_E_19_without_a_pid_namespace_the_callers_processes_cannot_be_signalled(inside: Any) -> None:
    if linux.landlock_abi() < 6:
        pytest.skip("Landlock scopes: this kernel has none before Linux 6.12")
    outer = os.getpid()

    def attempt() -> int:
        try:
            os.kill(outer, 0)
        except OSError as error:
            return error.errno or 0
        return 0

    assert inside(namespaces=Namespaces(pid=False))(attempt) == errno.EPERM


def test_E_12_nobody_inside_makes_a_user_namespace(inside: Any) -> None:
    def attempt() -> int:
        return 0 if _libc.unshare(0x10000000) == 0 else ctypes.get_errno()

    assert inside()(attempt) in (errno.EPERM, errno.ENOSPC)


def test_X_21_when_the_parent_is_killed_everything_inside_is_gone_within_a_second(tmp_path: Any) -> None:
    program = (
        "import sys, os; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/plugins']\n"
        "import devns\n"
        "box = devns.namespaces(pid=True)\n"
        "box.run(['/bin/sh', '-c', 'sleep 1000 & sleep 1000 & echo started; wait'])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, CHECKOUT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"started\n"
    family = _descendants(parent.pid)
    assert len(family) == 5  # child, init, sh, and two sleeps
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 1
    while (left := [pid for pid in family if _alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    parent.stdout.close()
    assert left == []


def _descendants(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as listing:
        children = [int(word) for word in listing.read().split()]
    return [*children, *(below for child in children for below in _descendants(child))]


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_without_a_pid_namespace_what_the_payload_left_behind_is_ended_too(planned: Any) -> None:
    status, said = sh(planned, "sleep 1000 & echo $!; exit 5", namespaces=Namespaces(pid=False))
    assert status == 5
    assert not _alive(int(said))


def test_an_init_that_dies_without_a_word_is_137(planned: Any) -> None:
    read, write = os.pipe()
    with launch.started(planned(argv=("/bin/sh", "-c", "echo up; sleep 1000")), stdio=(0, write, write)) as running:
        os.close(write)
        assert os.read(read, 10) == b"up\n"
        (init,) = _descendants(running.pid)[:1]
        os.kill(init, signal.SIGKILL)
        assert running.wait() == 137
    os.close(read)


def test_leaving_the_context_ends_what_runs(planned: Any) -> None:
    with launch.started(planned(argv=("/bin/sleep", "1000"))) as running:
        family = [running.pid, *_descendants(running.pid)]
    assert [pid for pid in family if _alive(pid)] == []


def test_a_step_that_fails_is_named_with_its_op_and_nothing_is_left(planned: Any) -> None:
    plan = planned(bind("/no/such/thing", "/mnt"), argv=("/bin/true",))
    with pytest.raises(StepError) as caught:
        run(plan)
    assert (caught.value.op, caught.value.errno, caught.value.path) == ("bind", errno.ENOENT, "/no/such/thing")


def test_E_05_no_module_is_imported_from_the_new_root(planned: Any, tmp_path: Any) -> None:
    root = tmp_path / "root"
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w').close(); open('/sprung', 'w').close()\n"
    for place in sys.path[1:]:
        if place.startswith("/usr") or place.startswith("/lib"):
            for name in ("idlelib_trap", "traceback", "encodings/punycode", "wave", "sitecustomize"):
                path = root / place.lstrip("/") / f"{name}.py"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(trap)
    root.mkdir(exist_ok=True)
    plan = planned(argv=("/no/such/\udcff",))
    plan["inside"] = [bind(str(root), "/", readonly=False, own=True), *(s for s in plan["inside"] if s["op"] == "proc")]
    plan["cwd"] = "/"
    with pytest.raises(StepError):
        run(plan)
    assert not (tmp_path / "sprung").exists()
    assert not (root / "sprung").exists()


@pytest.mark.parametrize("target", ["/proc", "/sys", "/dev"])
def test_E_09_a_system_directory_that_is_a_symlink_is_refused(planned: Any, tmp_path: Any, target: str) -> None:
    root, trap = tmp_path / "root", tmp_path / "trap"
    trap.mkdir()
    root.mkdir()
    (root / target.lstrip("/")).symlink_to(trap)
    plan = planned(argv=("/bin/true",))
    kept = [s for s in plan["inside"] if s.get("dst") == target and s["op"] in ("proc", "dev")] or [tmpfs(target)]
    plan["inside"] = [bind(str(root), "/", readonly=False, own=True), *kept]
    plan["cwd"] = "/"
    with pytest.raises(StepError):
        run(plan)
    assert list(trap.iterdir()) == []


LINKS = {
    "absolute": "{trap}",
    "relative": "../../../../../../../..{trap}",
    "dangling": "{trap}/not/there",
    "loop": "work",
    "through proc": "/proc/1/root{trap}",
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("make", ["bind", "tmpfs", "directory", "symlink parent"])
def test_E_06_a_symlink_planted_in_a_root_never_leads_to_the_host(
    planned: Any, tmp_path: Any, kind: str, make: str
) -> None:
    root, trap, source = tmp_path / "root", tmp_path / "trap", tmp_path / "source"
    for path in (root, trap, source):
        path.mkdir()
    (source / "hello").write_text("hello")
    (root / "work").symlink_to(LINKS[kind].format(trap=trap))
    step = {
        "bind": bind(str(source), "/work", readonly=False),
        "tmpfs": tmpfs("/work"),
        "directory": directory("/work/deep/er"),
        "symlink parent": symlink("/work/link", "/etc"),
    }[make]
    plan = planned(argv=("/bin/true",))
    plan["inside"] = [bind(str(root), "/", readonly=False, own=True), step]
    plan["cwd"] = "/"
    with pytest.raises(StepError):  # at the latest there is no /bin/true in this root
        run(plan)
    assert list(trap.iterdir()) == []
    assert sorted(os.listdir(tmp_path)) == ["root", "source", "trap"]


def test_a_mount_point_is_never_made_on_the_host(planned: Any, tmp_path: Any) -> None:
    (tmp_path / "project").mkdir()
    plan = planned(bind(str(tmp_path / "project"), "/mnt", readonly=False), argv=("/bin/true",))
    plan["inside"].append(tmpfs("/mnt/new"))  # past make_plan, which refuses it first
    with pytest.raises(StepError) as caught:
        run(plan)
    assert (caught.value.op, caught.value.errno) == ("tmpfs", errno.EROFS)
    assert os.listdir(tmp_path / "project") == []


def test_the_plan_is_json_and_stands_for_itself(planned: Any) -> None:
    plan = planned(argv=("/bin/sh", "-c", "echo same"))
    assert run(json.loads(json.dumps(plan))) == (0, "same\n")


def test_each_step_is_told_while_it_runs(planned: Any) -> None:
    said: list[str] = []
    run(planned(tmpfs("/scratch"), argv=("/bin/true",)), trace=said.append)
    assert [line for line in said if line.startswith("tmpfs dst=/scratch ")]
    assert said[0].startswith("unshare ")


def terminal(planned: Any, script: str, *, keys: bytes = b"", answer: bytes = b"") -> tuple[int, bytes]:
    """Run `script` from a process whose terminal is a pty of ours: press `keys` when `answer` has been said."""
    pid, master = os.forkpty()
    if pid == 0:
        try:
            os._exit(launch.launch(planned(argv=("/bin/sh", "-c", script))))
        finally:
            os._exit(99)
    said = b""
    pressed = False
    while True:
        ready, _, _ = select.select([master], [], [], 20)
        assert ready, f"nothing more was said after {said!r}"
        try:
            data = os.read(master, 1 << 16)
        except OSError:  # EIO: the other end is closed
            break
        said += data
        if keys and not pressed and answer in said:
            os.write(master, keys)
            pressed = True
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(master)
    return status, said


def test_a_terminal_inside_is_an_own_one(planned: Any) -> None:
    status, said = terminal(planned, "tty; test -t 0 && test -t 1 && test -t 2; exit 6")
    assert (status, said) == (6, b"/dev/pts/0\r\n")


def test_ctrl_c_interrupts_the_payload_and_not_devns(planned: Any) -> None:
    status, said = terminal(
        planned,
        "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.05; done",
        keys=b"\x03",
        answer=b"ready",
    )
    assert status == 9
    assert b"caught" in said


def test_E_13_nothing_pushed_into_a_terminal_arrives_at_the_callers(planned: Any) -> None:
    program = (
        "import fcntl\n"
        "for number in (0x5412, 0x100005412):\n"
        "    try: fcntl.ioctl(0, number, b'x'); print('pushed')\n"
        "    except (OSError, OverflowError) as error: print('refused')\n"
    )
    _status, said = terminal(planned, f'/usr/bin/python3 -I -c "{program}"')
    assert said.split() == [b"refused", b"refused"]
