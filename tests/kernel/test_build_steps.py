"""[build] run, for real: what a command sees, what becomes of what it writes, and when it runs again."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from devns.build import LAYERS_MAX
from devns.debian import mirrors
from devns.debian.errors import MirrorError
from devns.debian.transport import Session
from devns.errors import Unsupported
from devns.host import Host

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAMS = "sh cat chmod chown echo env id ln ls mkdir mv pwd readlink rm rmdir sleep stat touch wc"


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest root that commands run in: a shell, a few programs, and the libraries they are linked with."""
    path = tmp_path_factory.mktemp("root")
    for name in ("bin", "sbin", "lib", "lib64"):
        (path / "usr" / name).mkdir(parents=True)
        (path / name).symlink_to(f"usr/{name}")
    for name in ("etc", "root", "var", "srv"):
        (path / name).mkdir()
    (path / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (path / "etc" / "group").write_text("root:x:0:\n")
    (path / "srv" / "lower").mkdir()
    (path / "srv" / "lower" / "old").write_text("old")
    (path / "srv" / "gone").write_text("gone")
    found = [shutil.which(name) for name in PROGRAMS.split()]
    programs = [os.path.realpath(program) for program in found if program]
    said = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    for name, program in zip(PROGRAMS.split(), found, strict=True):
        assert program is not None, f"this machine has no {name}"
        shutil.copy(program, path / "usr" / "bin" / name)
    for library in sorted(set(re.findall(r"(/\S+)(?: \(0x|:$)", said)) - set(programs)):
        if ".so" in library:
            place = path / library.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, place)
    return path


class Project:
    """A project above that root, and a devns with a store of its own."""

    def __init__(self, place: Path, root: Path) -> None:
        self.home = place / "home"
        self.path = self.home / "work" / "project"
        (self.path / ".git").mkdir(parents=True)
        self.store = place / "store"
        self.root = root

    def write(self, build: str, *, more: str = "") -> None:
        """The project file, trusted."""
        text = f'[root]\nfrom = "dir:{self.root}"\n[network]\nmode = "none"\n{more}\n[build]\n{build}\n'
        (self.path / ".devns.toml").write_text(text)
        assert self.devns("trust").returncode == 0

    def devns(self, *arguments: str, env: Mapping[str, str] = {}, **options: Any) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "DEVNS"))}
        kept |= {"HOME": str(self.home), "DEVNS_STORE": str(self.store), **env}
        kept |= {"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'plugins'}"}
        if "input" not in options:
            options["stdin"] = subprocess.DEVNULL
        return subprocess.run(
            [sys.executable, "-m", "devns", *arguments],
            cwd=self.path,
            env=kept,
            capture_output=True,
            text=True,
            check=False,
            **options,
        )

    def run(self, script: str, *arguments: str) -> str:
        done = self.devns("run", *arguments, "--", "sh", "-c", script)
        assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
        return done.stdout

    def layers(self) -> list[str]:
        """The keys of the layers the project stands on, bottom first; "" stands for one that is not made yet."""
        found: list[str] = json.loads(self.devns("info", "--json").stdout)["layers"]
        return [key if (self.store / "layers" / key).is_dir() else "" for key in found]

    def made(self, number: int = 0) -> Path:
        return self.store / "layers" / self.layers()[number] / "root"


@pytest.fixture
def project(tmp_path: Path, root: Path, require: Any) -> Project:
    require("userns", "overlay")
    return Project(tmp_path, root)


@pytest.fixture(params=["single", "range"])
def map(request: pytest.FixtureRequest, require: Any) -> str:
    if request.param == "range":
        require("range")
    return str(request.param)


# --- what a command does ----------------------------------------------------------------------------------------------


def test_what_a_command_writes_is_there_inside(project: Project, map: str) -> None:
    project.write('run = ["echo one > /srv/one", "cat /srv/one > /srv/two; id -u >> /srv/two"]')
    assert project.run("cat /srv/one /srv/two", "--map", map) == "one\none\n0\n"
    assert sorted(os.listdir(project.root / "srv")) == ["gone", "lower"]


def test_what_a_command_deletes_is_gone_inside_and_a_directory_made_anew_is_empty(project: Project, map: str) -> None:
    project.write('run = ["rm /srv/gone; rm -r /srv/lower; mkdir /srv/lower; echo new > /srv/lower/new", "true"]')
    assert project.run("ls /srv /srv/lower", "--map", map) == "/srv:\nlower\n\n/srv/lower:\nnew\n"


def test_a_layer_holds_what_the_command_wrote_and_nothing_else(project: Project) -> None:
    (project.path / "list").write_text("x")
    project.write('run = ["mkdir /made; rm /srv/gone; cat list"]\ninputs = ["list"]')
    assert project.devns("build").returncode == 0
    made = project.made()
    assert sorted(os.listdir(made)) == ["made", "srv"]
    status = os.lstat(made / "srv" / "gone")
    assert (stat.S_ISCHR(status.st_mode), status.st_rdev) == (True, 0)
    assert sorted(os.listdir(made.parent)) == ["layer.json", "manifest", "root"]
    assert [os.listdir(project.store / part) for part in ("staging", "trash")] == [[], []]


def test_owners_are_kept_where_there_is_a_range_and_forgotten_where_there_is_none(project: Project, map: str) -> None:
    project.write('run = ["touch /srv/file; chown 7:8 /srv/file"]')
    assert project.run("stat -c %u:%g /srv/file", "--root", "--map", map) == {"single": "0:0\n", "range": "7:8\n"}[map]


def test_a_command_is_root_in_an_environment_that_is_the_same_for_everybody(project: Project) -> None:
    project.write('run = ["env > /srv/env; stat -c %a /srv/env >> /srv/env"]', more='[env]\nset = { SAID = "1" }')
    done = project.devns("build", env={"SECRET": "token", "LANG": "xx", "TERM": "odd"}, umask=0o077)
    assert done.returncode == 0
    lines = set((project.made() / "srv" / "env").read_text().splitlines())
    assert {"SAID=1", "HOME=/root", "USER=root", "LC_ALL=C.UTF-8", "TERM=dumb", "644"} <= lines
    assert not [line for line in lines if "token" in line or "odd" in line or "xx" in line]


def test_a_command_has_no_network_unless_the_template_says_so(project: Project) -> None:
    project.write('run = ["cat /proc/net/dev > /srv/net; ls /etc/resolv.conf || echo none > /srv/resolver"]')
    assert project.devns("build").returncode == 0
    interfaces = (project.made() / "srv" / "net").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    assert (project.made() / "srv" / "resolver").read_text() == "none\n"


def test_with_network_a_command_sees_the_hosts_and_what_the_plugin_lends(project: Project) -> None:
    script = "cat /proc/net/dev > /srv/net; cat /etc/hosts > /srv/hosts; echo $https_proxy > /srv/proxy"
    project.write(f"run = ['{script}']\nnetwork = true")
    done = project.devns("build", env={"https_proxy": "http://proxy.invalid:3128"})
    assert done.returncode == 0, done.stderr
    with open("/proc/net/dev") as here:
        names = [line.split(":")[0].strip() for line in here.readlines()[2:]]
    made = project.made() / "srv"
    assert [line.split(":")[0].strip() for line in (made / "net").read_text().splitlines()[2:]] == names
    assert "localhost" in (made / "hosts").read_text()
    assert (made / "proxy").read_text() == "http://proxy.invalid:3128\n"
    assert sorted(os.listdir(project.made())) == ["srv"]  # nothing of what was lent stays


def test_network_needs_trust(project: Project) -> None:
    project.write('run = ["true"]')
    path = project.path / ".devns.toml"
    path.write_text(path.read_text() + "network = true\n")
    done = project.devns("build")
    assert done.returncode == 78
    grants = json.loads(project.devns("trust", "--show", "--json").stdout)["grants"]
    assert {"key": "build.network", "value": "true"} in [{k: g[k] for k in ("key", "value")} for g in grants]


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_a_command_stands_in_the_project_and_sees_its_inputs_alone_and_cannot_change_them(project: Project) -> None:
    (project.path / "list").write_text("words")
    (project.path / "secret").write_text("token")
    (project.path / "src" / "deep").mkdir(parents=True)
    (project.path / "src" / "deep" / "file").write_text("deep")
    script = (
        "pwd > /srv/seen; ls -a >> /srv/seen; cat list src/deep/file >> /srv/seen; "
        "for path in list src/deep/file src/new; do if echo x > $path; then exit 9; fi; done; echo scratch > new"
    )
    project.write(f"run = ['{script}']\ninputs = ['list', 'src']")
    done = project.devns("build")
    assert done.returncode == 0, done.stderr
    seen = (project.made() / "srv" / "seen").read_text()
    assert seen == f"{project.path}\n.\n..\nlist\nsrc\nwordsdeep"
    assert sorted(os.listdir(project.path)) == [".devns.toml", ".git", "list", "secret", "src"]
    assert sorted(os.listdir(project.made())) == ["srv"]


def test_the_whole_project_can_be_an_input(project: Project) -> None:
    project.write("run = ['ls -a > /srv/seen']\ninputs = ['.']")
    assert project.devns("build").returncode == 0
    assert (project.made() / "srv" / "seen").read_text() == ".\n..\n.devns.toml\n.git\n"


def test_a_command_runs_again_when_what_it_saw_changed_and_not_before(project: Project) -> None:
    (project.path / "list").write_text("1")
    steps = "run = ['echo a > /srv/a', 'cat list > /srv/list', 'echo c > /srv/c']\ninputs = ['list']\n"
    project.write(steps)
    assert project.devns("build").returncode == 0
    first = project.layers()
    assert (len(first), "" in first) == (3, False)
    os.utime(project.path / "list", (0, 0))
    again = project.devns("build")
    assert (again.returncode, again.stderr) == (0, "")
    assert project.layers() == first

    (project.path / "list").write_text("2")
    assert project.layers() == ["", "", ""]  # each of them could have read it
    assert project.devns("build").returncode == 0
    assert project.run("cat /srv/list") == "2"
    (project.path / "list").write_text("1")
    assert project.layers() == first  # what was made before is still there

    project.write(steps.replace("echo c", "echo d"))
    assert project.layers() == [*first[:2], ""]
    project.write(steps, more='[env]\nset = { OTHER = "1" }')
    assert project.layers() == ["", "", ""]


def test_a_variable_of_one_call_builds_nothing_anew(project: Project) -> None:
    project.write('run = ["env > /srv/env"]')
    assert project.devns("build").returncode == 0
    done = project.devns("run", "-e", "ONE=1", "--", "sh", "-c", "echo $ONE; cat /srv/env")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ONE" not in done.stdout.split("\n", 1)[1]


def test_what_a_named_template_runs_is_shared_by_all_projects_that_extend_it(project: Project, tmp_path: Path) -> None:
    templates = project.home / ".config" / "devns" / "templates"
    templates.mkdir(parents=True)
    (templates / "tools.toml").write_text(f'[root]\nfrom = "dir:{project.root}"\n[build]\nrun = ["echo t > /srv/t"]\n')
    keys = []
    for name in ("one", "two"):
        project.path = project.home / name
        project.path.mkdir()
        (project.path / "list").write_text(name)
        text = 'extends = "tools"\n[build]\nrun = ["cat list > /srv/list"]\ninputs = ["list"]\n'
        (project.path / ".devns.toml").write_text(text)
        assert project.devns("trust").returncode == 0
        assert project.run("cat /srv/t /srv/list") == f"t\n{name}"
        keys.append(project.layers())
    assert keys[0][0] == keys[1][0]
    assert keys[0][1] != keys[1][1]


def test_C_11_an_input_that_leaves_the_project_by_a_symlink_is_refused(project: Project, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("token")
    (project.path / "link").symlink_to(tmp_path / "secret")
    (project.path / "src").mkdir()
    (project.path / "src" / "link").symlink_to(tmp_path / "secret")
    project.write("run = ['cat link']\ninputs = ['link']")
    done = project.devns("build")
    assert (done.returncode, "leads out of the project" in done.stderr) == (78, True)
    project.write("run = ['readlink src/link > /srv/said; ! cat src/link']\ninputs = ['src']")
    assert project.devns("build").returncode == 0
    assert (project.made() / "srv" / "said").read_text() == f"{tmp_path / 'secret'}\n"


def test_an_input_that_changes_while_a_command_runs_makes_no_layer(project: Project) -> None:
    (project.path / "list").write_text("1")
    project.write("run = ['cat list; sleep 2']\ninputs = ['list']")
    with subprocess.Popen(
        [sys.executable, "-c", f"import time; time.sleep(1); open({str(project.path / 'list')!r}, 'w').write('2')"]
    ):
        done = project.devns("build")
    assert done.returncode == 125
    assert "its input list changed while it ran" in done.stderr
    assert os.listdir(project.store / "layers") == []


# --- failures ---------------------------------------------------------------------------------------------------------


def test_what_a_command_says_is_told_line_by_line(project: Project) -> None:
    project.write("run = ['echo out; echo err >&2; echo $((6 * 7))']")
    lines = project.devns("build").stderr.splitlines()
    assert lines[1:4] == ["devns: out", "devns: err", "devns: 42"]
    project.write("run = ['echo one; echo two']")
    events = [json.loads(line) for line in project.devns("build", "--json").stderr.splitlines()]
    assert [event["text"] for event in events if event["event"] == "note"] == ["one", "two"]


def test_a_command_that_fails_is_named_with_its_last_lines_and_leaves_nothing(project: Project, map: str) -> None:
    project.write('run = ["echo fine > /srv/fine", "mkdir /made; echo first; echo last; false; echo never", "true"]')
    done = project.devns("build", "--map", map)
    assert done.returncode == 125
    said = done.stderr[done.stderr.index("devns: build step 2 of 3 (mkdir /made; echo first;") :]
    assert "ended with status 1:\n  first\n  last\nhint: devns build --shell-on-failure\n" in said
    assert "never" not in done.stderr.replace("echo never", "")
    assert [path.name.split("-")[0] for path in (project.store / "layers").iterdir()] == ["run"]
    done = project.devns("build", "--map", map)  # what stands is used, what could not be deleted outside is gone now
    assert "build step 1" not in done.stderr
    assert [os.listdir(project.store / part) for part in ("trash",)] == [[]]


def test_after_a_failure_a_shell_opens_in_what_was_made(project: Project, map: str) -> None:
    (project.path / "list").write_text("words")
    project.write('run = ["echo half > /srv/half; false"]\ninputs = ["list"]')
    done = project.devns("build", "--map", map, "--shell-on-failure", input="cat /srv/half list; echo $HOME; pwd\n")
    assert done.returncode == 125
    assert done.stdout == f"half\nwords/root\n{project.path}\n"
    assert "build step 1 of 1" in done.stderr
    assert list((project.store / "layers").iterdir()) == []


def test_a_root_without_a_shell_is_one_sentence(project: Project, tmp_path: Path) -> None:
    project.root = tmp_path / "empty"
    (project.root / "etc").mkdir(parents=True)
    project.write('run = ["true"]')
    done = project.devns("build")
    assert done.returncode == 125
    assert done.stderr.splitlines()[-1] == "devns: build step 1 of 1 (true): /bin/sh: command not found inside"


def test_more_layers_than_can_be_mounted_are_refused(project: Project) -> None:
    most = LAYERS_MAX - 1  # and the root itself
    project.write(f"run = {[f'echo {number} >> /srv/all' for number in range(most)]}")
    assert project.run("wc -l < /srv/all") == f"{most}\n"
    project.write(f"run = {[f'echo {number}' for number in range(most + 1)]}")
    done = project.devns("build")
    assert (done.returncode, done.stderr.count("\n")) == (78, 2)
    assert "can lie on each other" in done.stderr


def test_two_builds_at_once_run_a_command_once(project: Project) -> None:
    project.write("run = ['sleep 1; echo said']")
    command = [sys.executable, "-m", "devns", "build"]
    env = {**os.environ, "HOME": str(project.home), "DEVNS_STORE": str(project.store)}
    env |= {"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'plugins'}"}
    both = [
        subprocess.Popen(
            command, cwd=project.path, env=env, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(said).count("devns: said\n") == 1


# --- packages that a project adds -------------------------------------------------------------------------------------


def test_packages_that_a_project_adds_lie_on_the_templates_own_layer(tmp_path: Path, require: Any) -> None:
    require("userns", "overlay")
    host = Host.probe()
    try:
        found = mirrors.find(host)
        with Session(found.route) as session:
            session.read(f"{found.main}/dists/bookworm/InRelease", limit=1 << 20)
    except (MirrorError, Unsupported) as error:
        pytest.skip(f"needs archive, a Debian mirror that can be reached: {error}")
    project = Project(tmp_path, tmp_path)
    keys, said = [], []
    for package in ("tree", "jq"):
        text = f'extends = "debian12"\n[root]\npackages = ["{package}"]\n[network]\nmode = "none"\n'
        (project.path / ".devns.toml").write_text(text)
        assert project.devns("trust").returncode == 0
        done = project.devns("build")
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
        keys.append(project.layers())
        assert project.run(f"{package} --version >/dev/null; dpkg --audit; dpkg --verify; command -v {package}") == (
            f"/usr/bin/{package}\n"
        )
        var = project.made(1) / "var"
        assert not (var / "lib/apt/lists").exists()
        assert sorted(os.listdir(var / "cache")) in ([], ["debconf"], ["debconf", "ldconfig"])
    assert keys[0][0] == keys[1][0]
    assert keys[0][1] != keys[1][1]
    assert ["unpack:" in words for words in said] == [True, False]
