"""The command line as a user meets it: a real devns in a process of its own, a home and a store of the test's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
Devns = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def project(home: Path) -> Path:
    """A repository in the home, with nothing in it yet."""
    path = home / "work" / "project"
    (path / ".git").mkdir(parents=True)
    return path


@pytest.fixture
def devns(home: Path, tmp_path: Path) -> Devns:
    """`devns(*arguments, cwd=...)`: the finished process, its words captured."""

    def run(*arguments: str, cwd: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "DEVNS"))}
        env |= {"HOME": str(home), "DEVNS_STORE": str(tmp_path / "store")}
        env |= {"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'plugins'}", **options.pop("env", {})}
        return subprocess.run(
            [*options.pop("before", ()), sys.executable, "-m", "devns", *arguments],
            cwd=cwd or home,
            env=env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
            **options,
        )

    return run


def write(project: Path, text: str) -> Path:
    path = project / ".devns.toml"
    path.write_text(text)
    return path


# --- run --------------------------------------------------------------------------------------------------------------


def test_run_in_the_hosts_own_root_needs_no_network_and_an_empty_store(devns: Devns) -> None:
    done = devns("run", "host", "--", "sh", "-c", "echo $DEVNS; id -u; exit 4")
    assert (done.returncode, done.stdout, done.stderr) == (4, f"host\n{os.getuid()}\n", "")


def test_run_as_root_is_uid_0(devns: Devns) -> None:
    assert devns("run", "--root", "host", "--", "id", "-u").stdout == "0\n"


def test_run_with_a_range_of_ids_keeps_your_own(devns: Devns, require: Any) -> None:
    require("range")
    done = devns("run", "--map", "range", "host", "--", "sh", "-c", "id -u; cat /proc/self/uid_map | wc -l")
    assert done.stdout == f"{os.getuid()}\n3\n"


def test_run_as_another_user_is_that_user_with_its_name(devns: Devns) -> None:
    script = "id -un; echo $USER $LOGNAME $HOME; pwd"
    assert devns("run", "--user", "nobody", "host", "--", "sh", "-c", script).stdout == (
        "nobody\nnobody nobody /nonexistent\n/\n"
    )
    assert devns("run", "--user", "102:104", "host", "--", "sh", "-c", "id -u; id -g").stdout == "102\n104\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--user", "nobdy"), 78, 'host: user.as: no user "nobdy" inside\nhint: did you mean nobody?\n'),
        (("--user", "a b"), 125, "--user a b: no user\nhint: a name that is known inside, or numbers: 102, 102:104\n"),
        (("--user", ""), 125, "--user : no user\nhint: a name that is known inside, or numbers: 102, 102:104\n"),
        (("--root", "--user", "nobody"), 125, "--root is --user root: both cannot be said\n"),
    ],
)
def test_a_user_that_is_none_is_one_sentence(
    devns: Devns, arguments: tuple[str, ...], status: int, message: str
) -> None:
    done = devns("run", *arguments, "host", "--", "true")
    assert (done.returncode, done.stdout, done.stderr) == (status, "", f"devns: {message}")


def test_another_user_that_may_not_go_where_the_project_is_is_told_so(
    devns: Devns, project: Path, require: Any
) -> None:
    require("range")
    project.parent.chmod(0o755)
    project.chmod(0o700)
    write(project, 'extends = "host"\n')
    arguments = ("run", "--map", "range", "--user", "102")
    done = devns(*arguments, "--", "pwd", cwd=project)
    assert (done.returncode, done.stderr) == (
        125,
        f"devns: cannot start in {project}: who you are inside may not go there\nhint: devns run --workdir / ...\n",
    )
    assert devns(*arguments, "--workdir", "/", "--", "pwd", cwd=project).stdout == "/\n"


def test_run_without_a_command_says_how(devns: Devns) -> None:
    done = devns("run", "host")
    assert done.returncode == 125
    assert done.stderr == (
        "devns: run: no command\nhint: devns run [ENV] -- CMD: the command stands after two dashes\n"
    )


def test_what_stands_after_the_dashes_is_for_inside(devns: Devns) -> None:
    done = devns("run", "host", "--", "echo", "--root", "--", "-v", "--help")
    assert done.stdout == "--root -- -v --help\n"


def test_a_command_that_is_not_there_is_127_in_one_sentence(devns: Devns) -> None:
    done = devns("run", "host", "--", "no-such-command")
    assert (done.returncode, done.stderr) == (127, "devns: no-such-command: command not found inside\n")


def test_an_empty_command_is_127_too(devns: Devns) -> None:
    done = devns("run", "host", "--", "")
    assert (done.returncode, done.stderr) == (127, "devns: '': command not found inside\n")


def test_standard_streams_are_the_callers(devns: Devns, home: Path) -> None:
    done = devns("run", "host", "--", "sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_what_is_written_in_the_private_home_stays_and_the_hosts_home_does_not_see_it(devns: Devns, home: Path) -> None:
    before = sorted(os.listdir(home))
    assert devns("run", "host", "--", "sh", "-c", "echo kept > ~/file").returncode == 0
    assert devns("run", "host", "--", "sh", "-c", "cat ~/file").stdout == "kept\n"
    assert sorted(os.listdir(home)) == before


def test_variables_are_set_and_passed_on_request(devns: Devns) -> None:
    done = devns(
        *("run", "-e", "ONE=1", "-e", "TWO", "host", "--", "sh", "-c", "echo $ONE $TWO $THREE"),
        env={"TWO": "2", "THREE": "3"},
    )
    assert done.stdout == "1 2\n"


def test_verbose_tells_each_step(devns: Devns) -> None:
    done = devns("run", "-v", "host", "--", "true")
    assert "devns: unshare " in done.stderr
    assert "devns: bind dst=/usr " in done.stderr


# --- projects ---------------------------------------------------------------------------------------------------------


def test_init_writes_three_lines_that_run(devns: Devns, project: Path) -> None:
    done = devns("init", "host", cwd=project)
    assert done.stdout == f"{project}/.devns.toml\n"
    inner = project / "src"
    inner.mkdir()
    done = devns("run", "--", "sh", "-c", "pwd; touch here; ls ..", cwd=inner)
    assert done.stdout == f"{inner}\nsrc\n"
    assert (inner / "here").exists()
    again = devns("init", "host", cwd=project)
    assert again.returncode == 78
    assert "is there already" in again.stderr


def test_a_project_that_asks_for_more_acts_only_after_trust(devns: Devns, project: Path, home: Path) -> None:
    (home / "data").mkdir()
    (home / "data" / "secret").write_text("42")
    path = write(project, 'extends = "host"\n[mount]\nbind = [{ src = "~/data", dst = "/data" }]\n')
    refused = devns("run", "--", "cat", "/data/secret", cwd=project)
    assert (refused.returncode, refused.stdout) == (78, "")
    assert str(path) in refused.stderr
    assert "hint: devns trust" in refused.stderr
    assert not (project.parents[2] / "store" / "environments").exists()

    shown = devns("trust", "--show", "--json", cwd=project)
    assert [grant["key"] for grant in json.loads(shown.stdout)["grants"]] != []
    assert json.loads(shown.stdout)["trusted"] is False
    assert devns("trust", cwd=project).returncode == 0
    assert devns("run", "--", "cat", "/data/secret", cwd=project).stdout == "42"

    path.write_text(path.read_text() + "# changed\n")  # C-05: the record is for the bytes
    assert devns("run", "--", "true", cwd=project).returncode == 78
    assert devns("trust", cwd=project).returncode == 0
    assert devns("untrust", cwd=project).returncode == 0
    assert devns("run", "--", "true", cwd=project).returncode == 78


@pytest.mark.parametrize("variable", ["CI", "DEVNS_YES", "DEVNS_TRUST"])
def test_C_07_no_variable_implies_trust(devns: Devns, project: Path, variable: str) -> None:
    write(project, 'extends = "host"\n[user]\nas = "root"\n')
    assert devns("run", "--", "true", cwd=project, env={variable: "1"}).returncode == 78


def test_C_07_trust_can_be_pinned_to_a_digest(devns: Devns, project: Path) -> None:
    write(project, 'extends = "host"\n[user]\nas = "root"\n')
    digest = json.loads(devns("trust", "--show", "--json", cwd=project).stdout)["sha256"]
    assert devns("trust", "--sha256", "0" * 64, cwd=project).returncode == 78
    assert devns("run", "--", "true", cwd=project).returncode == 78
    assert devns("trust", "--sha256", digest, cwd=project).returncode == 0
    assert devns("run", "--", "id", "-u", cwd=project).stdout == "0\n"


def test_C_11_a_bind_that_leaves_the_project_by_a_symlink_is_refused(devns: Devns, project: Path, home: Path) -> None:
    (home / "elsewhere").mkdir()
    (project / "link").symlink_to(home / "elsewhere")
    write(project, 'extends = "host"\n[mount]\nbind = [{ src = "link", dst = "/data" }]\n')
    devns("trust", cwd=project)
    done = devns("run", "--", "ls", "/data", cwd=project)
    assert done.returncode == 78
    assert "leads out of the project" in done.stderr


BAD = {
    "unknown key": ('extends = "host"\n[root]\npackges = []\n', "packges"),
    "unknown table": ('extends = "host"\n[rot]\n', "rot"),
    "wrong type": ('extends = "host"\n[root]\npackages = "git"\n', "root.packages"),
    "boolean for a number": ('extends = "host"\n[cgroup]\npids = true\n', "cgroup.pids"),
    "date for a string": ("extends = 2026-01-01\n", "extends"),
    "no such word": ('extends = "host"\n[user]\nmap = "both"\n', "user.map"),
    "no such template": ('extends = "py27"\n', "py27"),
    "extends itself": ('extends = "./.devns.toml"\n', "extends"),
    "a path for a template": ('extends = "../../etc/passwd"\n', "extends"),
    "not TOML": ('extends = "host\n', ":1: "),
    "a table twice": ('extends = "host"\n[root]\n[root]\n', "root"),
    "bad package name": ('extends = "host"\n[root]\npackages = ["../x"]\n', "root.packages"),
    "bad hostname": ('extends = "host"\n[namespaces]\nuts = { hostname = "a b" }\n', "namespaces.uts.hostname"),
    "bad variable": ('extends = "host"\n[env.set]\n"A B" = "1"\n', "env.set"),
    "overlapping maps": (
        'extends = "host"\n[user]\nuid_map = [[0, 0, 10], [5, 100, 10]]\ngid_map = [[0, 0, 1]]\n',
        "user.uid_map",
    ),
    "no such source": ('[root]\nfrom = "docker:x"\n', "root.from"),
    "missing directory": ('[root]\nfrom = "dir:/no/such"\n', "/no/such"),
    "missing bind": ('extends = "host"\n[mount]\nbind = [{ src = "/no/such", dst = "/x" }]\n', "mount.bind"),
    "bind on the root": ('extends = "host"\n[mount]\nbind = [{ src = "/usr", dst = "/" }]\n', "mount"),
    "bind on proc": ('extends = "host"\n[mount]\nbind = [{ src = "/usr", dst = "/proc/x" }]\n', "mount"),
    "two mounts on one place": ('extends = "host"\n[mount]\ntmpfs = ["/data", "/data:size=1M"]\n', "/data"),
    "a mount point on the host": ('extends = "host"\n[mount]\ntmpfs = ["/usr/no-such-directory"]\n', "/usr/no-such"),
    "a size that is none": ('extends = "host"\n[mount]\ntmpfs = ["/data:size=big"]\n', "mount"),
    "a port that is none": ('extends = "host"\n[network]\nmode = "user"\npublish = ["99999:1"]\n', "network"),
    "a limit that is none": ('extends = "host"\n[cgroup]\nmemory = "lots"\n', "cgroup.memory"),
    "a network that is none": ('extends = "host"\n[network]\nmode = "bridge"\n', "network.mode"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_template_is_one_sentence_with_its_file_and_key_and_78(devns: Devns, project: Path, kind: str) -> None:
    text, key = BAD[kind]
    path = write(project, text)
    devns("trust", cwd=project)
    done = devns("run", "--", "true", cwd=project)
    assert done.returncode == 78
    first, *hints = done.stderr.rstrip("\n").split("\n")
    assert first.startswith("devns: ")
    assert len(hints) <= 1
    assert all(hint.startswith("hint: ") for hint in hints)
    assert key in first
    assert str(path) in first or kind in ("two mounts on one place", "a mount point on the host")


def test_a_fifo_for_a_project_file_is_refused_and_not_waited_for(devns: Devns, project: Path) -> None:
    os.mkfifo(project / ".devns.toml")
    done = devns("run", "--", "true", cwd=project, timeout=20)
    assert done.returncode == 78
    assert "FIFO" in done.stderr


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_plan_prints_the_very_document_that_is_launched(devns: Devns) -> None:
    plan = json.loads(devns("plan", "--json", "host", "--", "true").stdout)
    assert plan["argv"] == ["true"]
    assert [step["dst"] for step in plan["inside"] if step["op"] == "proc"] == ["/proc"]
    table = devns("plan", "host", "--", "true").stdout
    assert table.splitlines()[0].split() == ["WHAT", "HOW"]


def test_list_info_and_remove_look_after_what_is_there(devns: Devns, tmp_path: Path) -> None:
    assert devns("list").stdout.split() == ["NAME", "TEMPLATE", "STATE", "PROJECT"]
    devns("run", "host", "--", "touch", "/file")
    (row,) = json.loads(devns("list", "--json").stdout)
    assert (row["name"], row["template"], row["state"]) == ("host", "host", "ready")
    assert json.loads(devns("info", "--json", "host").stdout)["built"] is True
    assert devns("remove", "host").returncode == 0
    assert json.loads(devns("list", "--json").stdout) == []
    again = devns("remove", "host")
    assert (again.returncode, len(again.stderr.splitlines()) <= 2) == (125, True)


def test_what_other_ids_own_is_removed_too(devns: Devns, require: Any, tmp_path: Path) -> None:
    require("range")
    devns("run", "--root", "--map", "range", "host", "--", "sh", "-c", "mkdir -p /srv/deep; touch /srv/deep/file")
    assert devns("remove", "host").returncode == 0
    assert [str(path) for path in (tmp_path / "store" / "trash").iterdir()] == []


def test_every_listing_speaks_json(devns: Devns) -> None:
    for arguments in (("list",), ("template", "list"), ("plugin", "list"), ("check",)):
        assert isinstance(json.loads(devns(*arguments, "--json").stdout), list)


def test_a_program_reads_the_librarys_answer_as_from_subprocess(home: Path, tmp_path: Path, devns: Devns) -> None:
    program = (
        "import devns, json\n"
        "box = devns.open('host')\n"
        "done = box.run(['cat'], input='hello', capture_output=True)\n"
        "late = None\n"
        "try: box.run(['sleep', '1000'], timeout=0.3)\n"
        "except __import__('subprocess').TimeoutExpired as error: late = error.timeout\n"
        "value = box.call(lambda: __import__('sys').version_info[:2])\n"
        "print(json.dumps([done.returncode, done.stdout, late, value, box.name]))\n"
    )
    env = {**os.environ, "HOME": str(home), "DEVNS_STORE": str(tmp_path / "store")}
    env["PYTHONPATH"] = f"{CHECKOUT}:{CHECKOUT / 'plugins'}"
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=home, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert json.loads(done.stdout) == [0, "hello", 0.3, list(sys.version_info[:2]), "host"]


def test_H_01_without_user_namespaces_one_sentence_names_the_cause_and_the_mend(devns: Devns) -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare(1) to make a host without user namespaces")
    outer = [unshare, "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', "sh"]
    done = devns("run", "host", "--", "true", before=outer)
    assert done.returncode == 125
    *_you_are_root, first, second = done.stderr.splitlines()
    assert "max_user_namespaces" in first
    assert "max_user_namespaces" in second


def test_a_hundred_runs_leave_nothing_behind(devns: Devns, project: Path, home: Path) -> None:
    devns("init", "host", cwd=project)
    devns("run", "--", "true", cwd=project)

    def traces() -> tuple[list[str], str, list[str]]:
        files = sorted(str(path) for path in home.rglob("*"))
        with open("/proc/self/mountinfo") as listing:
            mounts = listing.read()
        return files, mounts, [pid for pid in os.listdir("/proc") if pid.isdigit() and _belongs(pid, home)]

    before = traces()
    for _ in range(100):
        assert devns("run", "--", "true", cwd=project).returncode == 0
    assert traces() == before


def _belongs(pid: str, home: Path) -> bool:
    """Was it started with this home, which is this test's alone?"""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"HOME={home}".encode() in file.read().split(b"\0")
    except OSError:
        return False
