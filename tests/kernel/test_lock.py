"""Lock files, for real: the same tree in two stores, packages that are pinned, and who may say which."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from devns.debian import mirrors
from devns.errors import Unsupported
from devns.host import Host
from devns.store import delete_tree

CHECKOUT = Path(__file__).resolve().parents[2]
TEMPLATE = 'extends = "debian12"\n\n[root]\npackages = ["tree"]\n'
NOWHERE = {
    "DEVNS_DEBIAN_MIRROR": "http://127.0.0.1:1/debian",
    "DEVNS_DEBIAN_SECURITY_MIRROR": "http://127.0.0.1:1/debian-security",
}


class Project:
    """A project of one package more than its template, whose lock file was made once for all tests."""

    def __init__(self, place: Path, like: Path | None = None, parts: tuple[str, ...] = ("cache",)) -> None:
        self.home = place / "home"
        self.path = self.home / "project"
        (self.path / ".git").mkdir(parents=True)
        (self.path / ".devns.toml").write_text(TEMPLATE)
        self.lock = self.path / ".devns.lock"
        self.store = place / "store"
        if like:
            self.store.mkdir(mode=0o700)
            for part in parts:
                shutil.copytree(like / part, self.store / part, copy_function=_link, symlinks=True)
                os.chmod(self.store / part, 0o700)

    def made(self) -> list[str]:
        """The names of layers and environments."""
        return [path.name for part in ("layers", "environments") for path in (self.store / part).glob("*")]

    def devns(
        self, *arguments: str, store: Path | None = None, env: Mapping[str, str] = {}
    ) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "DEVNS"))}
        kept |= {key: value for key, value in os.environ.items() if key.startswith("DEVNS_") and "MIRROR" in key}
        kept |= {"HOME": str(self.home), "DEVNS_STORE": str(store or self.store), **env}
        kept |= {"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'plugins'}"}
        command = [sys.executable, "-m", "devns", *arguments]
        return subprocess.run(command, cwd=self.path, env=kept, capture_output=True, text=True, check=False)

    def layers(self, store: Path | None = None) -> list[Path]:
        found = json.loads(self.devns("info", "--json", store=store).stdout)["layers"]
        return [(store or self.store) / "layers" / key for key in found]


def _link(old: str, new: str) -> None:
    os.link(old, new, follow_symlinks=False)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that is locked and built."""
    try:
        mirrors.find(Host.probe())
    except Unsupported as error:
        pytest.skip(f"needs a Debian mirror: {error}")
    project = Project(tmp_path_factory.mktemp("first"))
    done = project.devns("lock", "--json")
    if done.returncode == 125 and "mirror" in done.stderr:
        pytest.skip(f"needs a Debian mirror that can be reached: {done.stderr}")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["packages"] == len(said["changes"]) > 50
    (row,) = (row for row in said["changes"] if row["name"] == "tree")
    assert (row["change"], row["from"]) == ("added", None)
    done = project.devns("build", "--locked")
    assert done.returncode == 0, done.stderr
    return project


@pytest.fixture
def project(first: Project, tmp_path: Path, require: Callable[..., None]) -> Project:
    """The same project elsewhere, with the template's layer and the packages at hand, and its lock file trusted."""
    require("userns", "overlay")
    made = Project(tmp_path, first.store, ("cache", "layers"))
    shutil.copy(first.lock, made.lock)
    assert made.devns("trust").returncode == 0
    delete_tree(str(made.layers()[1]))
    return made


@pytest.fixture
def bare(first: Project, tmp_path: Path, require: Callable[..., None]) -> Project:
    """The same, and nothing is made of the packages yet."""
    require("userns", "overlay")
    made = Project(tmp_path, first.store)
    shutil.copy(first.lock, made.lock)
    assert made.devns("trust").returncode == 0
    return made


def tree_hash(tree: Path) -> str:
    """Over every name, mode, owner, modification time and byte."""
    whole = hashlib.sha256()
    for directory, names, files in os.walk(tree, followlinks=False):
        names.sort()
        for name in ["", *sorted([*files, *(name for name in names if os.path.islink(f"{directory}/{name}"))])]:
            path = os.path.join(directory, name) if name else directory
            status = os.lstat(path)
            row = [os.path.relpath(path, tree), status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns]
            if os.path.islink(path):
                row.append(os.readlink(path))
            elif name and os.path.isfile(path):
                row.append(hashlib.sha256(Path(path).read_bytes()).hexdigest())
            whole.update(json.dumps(row).encode())
    return whole.hexdigest()


def test_two_builds_of_one_lock_in_two_stores_are_the_same_to_the_byte(first: Project, bare: Project) -> None:
    done = bare.devns("build", "--locked")
    assert done.returncode == 0, done.stderr
    pairs = list(zip(first.layers(), bare.layers(), strict=True))
    assert [one.name for one, _ in pairs] == [other.name for _, other in pairs]
    assert len(pairs) == 2
    for one, other in pairs:
        assert subprocess.run(["diff", "-r", "--no-dereference", one / "root", other / "root"]).returncode == 0
        assert tree_hash(one / "root") == tree_hash(other / "root")
        assert (one / "manifest").read_bytes() == (other / "manifest").read_bytes()


def test_nothing_in_a_locked_tree_is_newer_than_the_lock_says(first: Project) -> None:
    match = re.search(r"(?m)^built = (\d+)$", first.lock.read_text())
    assert match
    for layer in first.layers():
        late = [
            os.path.join(directory, name)
            for directory, names, files in os.walk(layer / "root")
            for name in (*names, *files)
            if os.lstat(os.path.join(directory, name)).st_mtime > int(match[1])
        ]
        assert late == []


def test_no_seed_key_log_or_machine_id_is_left_in_a_layer(first: Project) -> None:
    for layer in first.layers():
        root = layer / "root"
        left = [
            path.relative_to(root)
            for pattern in (
                "var/log/*.log",
                "var/log/apt/*",
                "var/lib/systemd/random-seed",
                "var/cache/apt/archives/*.deb",
                "var/cache/ldconfig/aux-cache",
                "etc/*-",
            )
            for path in root.glob(pattern)
        ]
        assert left == []
        assert not (root / "etc/machine-id").exists() or (root / "etc/machine-id").read_text() == ""


def test_a_lock_is_built_without_any_network_where_the_packages_are_at_hand(project: Project) -> None:
    done = project.devns("build", "--locked", env=NOWHERE)
    assert done.returncode == 0, done.stderr
    assert "tree v" in project.devns("run", "--", "tree", "--version", env=NOWHERE).stdout


def test_a_lock_that_fits_is_left_as_it_is(project: Project) -> None:
    before = project.lock.read_bytes()
    done = project.devns("lock", env=NOWHERE)
    assert (done.returncode, done.stdout.count("0 changed")) == (0, 1), done.stderr
    assert project.lock.read_bytes() == before


def test_S_07_what_is_locked_stays_when_the_archive_moves_on_and_update_shows_it(project: Project) -> None:
    """The lock names an older tree(1) than the archive has; so it is that one which is asked for."""
    text = project.lock.read_text()
    (row,) = re.findall(r'(?m)^.*name = "tree".*$', text)
    version = re.findall(r'version = "([^"]+)"', row)[0]
    old = row.replace(version, f"{version}~old")
    old = old.replace(re.findall(r'sha256 = "([^"]+)"', row)[0], "0" * 64)
    project.lock.write_text(text.replace(row, old))
    assert project.devns("trust").returncode == 0
    done = project.devns("build", "--locked")
    assert done.returncode == 125
    assert f"tree_{version}~old" in done.stderr  # no mirror has it
    assert "hint: the archive may have it no more: devns lock --update" in done.stderr
    done = project.devns("lock", "--update", "--json")
    assert json.loads(done.stdout)["changes"] == [
        {"change": "upgraded", "name": "tree", "from": f"{version}~old", "to": version}
    ]
    assert project.devns("build", "--locked").returncode == 0


def test_S_23_a_lock_that_somebody_else_wrote_does_nothing_until_it_is_trusted(first: Project, tmp_path: Path) -> None:
    project = Project(tmp_path, first.store)
    shutil.copy(first.lock, project.lock)
    for command in (["build"], ["run", "--", "true"], ["plan"]):
        done = project.devns(*command)
        assert done.returncode == 78
        assert f"{project.lock}: is not trusted" in done.stderr
    assert project.made() == []
    assert project.devns("trust").returncode == 0
    assert project.devns("plan").returncode == 0
    with open(project.lock, "a") as file:
        file.write("# another byte\n")
    assert project.devns("plan").returncode == 78


def test_S_23_the_digest_that_a_script_agrees_to_covers_the_lock(project: Project) -> None:
    seen = json.loads(project.devns("trust", "--show", "--json").stdout)
    assert seen["trusted"] is True
    assert [row["key"] for row in seen["grants"]] == [".devns.lock"]
    project.lock.write_text(project.lock.read_text() + "\n")
    done = project.devns("trust", "--sha256", seen["sha256"])
    assert done.returncode == 78
    assert project.devns("plan").returncode == 78


def test_a_lock_that_does_not_fit_the_template_is_said_and_made_anew(project: Project) -> None:
    (project.path / ".devns.toml").write_text(TEMPLATE.replace('"tree"', '"tree", "pv"'))
    done = project.devns("run", "--", "true")
    assert done.returncode == 78
    assert "the templates ask for other packages" in done.stderr
    assert "hint: devns lock" in done.stderr
    done = project.devns("lock", "--json")
    assert {row["name"] for row in json.loads(done.stdout)["changes"] if row["change"] == "added"} >= {"pv"}
    assert project.devns("plan").returncode == 0


def test_S_01_a_package_that_is_not_the_one_locked_is_fetched_again_or_refused(project: Project) -> None:
    """The cache is poisoned, and there is no network to mend it: nothing is made of it."""
    digest = re.findall(r'name = "tree".* sha256 = "([0-9a-f]+)"', project.lock.read_text())[0]
    poisoned = project.store / "cache" / "debs" / f"{digest}.deb"
    poisoned.unlink()  # it is a hard link
    poisoned.write_bytes(b"!<arch>\n")
    done = project.devns("build", "--locked", env=NOWHERE)
    assert done.returncode == 125
    assert "Traceback" not in done.stderr
    assert [layer.exists() for layer in project.layers()] == [True, False]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("version = 1", "version = 2", "a lock file of version 2"),
        ("version = 1", "version = one", ".devns.lock:2: not valid TOML"),
        ("recipe = ", "recipes = ", "no such key"),
        ('from = "debian:bookworm"', 'from = "debian:trixie"', "the templates ask for other packages"),
        ('sha256 = "', 'sha256 = "../', "sha256: cannot be"),
        ('filename = "pool/', 'filename = "../pool/', "filename: cannot be"),
        ('name = "adduser"', 'name = "../../adduser"', "name: cannot be"),
    ],
)
def test_a_lock_file_that_says_what_cannot_be_is_one_sentence(project: Project, old: str, new: str, said: str) -> None:
    before = project.made()
    project.lock.write_text(project.lock.read_text().replace(old, new, 1))
    project.devns("trust")
    done = project.devns("build")
    assert (done.returncode, "Traceback" in done.stderr) == (78, False), done.stderr
    assert ".devns.lock" in done.stderr
    assert said in done.stderr
    assert project.made() == before


def test_without_a_lock_file_locked_is_refused(first: Project, tmp_path: Path) -> None:
    project = Project(tmp_path, first.store)
    done = project.devns("build", "--locked")
    assert (done.returncode, "hint: devns lock" in done.stderr) == (78, True)
    (project.path / ".devns.toml").write_text('extends = "host"\n')
    done = project.devns("lock")
    assert (done.returncode, "there are no packages to lock" in done.stderr) == (78, True)
    assert not project.lock.exists()
