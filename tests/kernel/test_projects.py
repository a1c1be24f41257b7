"""Projects that nobody here wrote: their own test suites say the same inside as on the host."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from devns import unpack

pytestmark = pytest.mark.network

CHECKOUT = Path(__file__).parents[2]
TEMPLATES = {(3, 11): "py311", (3, 13): "py313"}
SETTINGS = """\
description = "A stranger's project"
extends = "{template}"

[env.set]
CI = "1"
"""
# Versions are fixed: what a release of tomorrow brings says nothing about devns. What they need besides follows from
# what the host's pip chose.
PROJECTS = {
    "pluggy": ("1.6.0", ("pytest==8.4.2",)),
    "click": ("8.4.2", ("pytest==8.4.2",)),
    "attrs": ("25.4.0", ("pytest==8.4.2", "hypothesis==6.151.9", "cloudpickle==3.1.2", "pympler==1.1")),
}
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=results.xml")

Devns = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def template() -> str:
    """The template that has the Python which runs this test, so that both sides are the same."""
    if sys.version_info[:2] not in TEMPLATES:
        pytest.skip("needs Python 3.11 or 3.13, which templates have, and this is another")
    return TEMPLATES[sys.version_info[:2]]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that the tests of the Debian root use too, so that the layer is built once."""
    said = os.environ.get("DEVNS_TEST_STORE")
    return Path(said) if said else tmp_path_factory.getbasetemp() / "shared-store"


@pytest.fixture
def devns(tmp_path: Path, store: Path) -> Iterator[Devns]:
    """`devns(*arguments, cwd=...)`: its words captured; it must end well. Afterwards its environments are gone."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "DEVNS"))}
    environ |= {key: value for key, value in os.environ.items() if key.startswith("DEVNS_DEBIAN_")}
    environ |= {"HOME": str(tmp_path / "home"), "DEVNS_STORE": str(store)}
    environ |= {"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'plugins'}"}
    (tmp_path / "home").mkdir()

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return _run([sys.executable, "-m", "devns", *arguments], cwd, environ)

    before = set(os.listdir(store / "environments")) if store.exists() else set()
    yield run
    made = sorted(set(os.listdir(store / "environments")) - before)
    if made:
        run("remove", *made, cwd=tmp_path)


@pytest.mark.parametrize("name", PROJECTS)
def test_the_projects_own_tests_end_inside_as_on_the_host(
    name: str, template: str, devns: Devns, tmp_path: Path
) -> None:
    version, tools = PROJECTS[name]
    host = _unpack(_sdist(name, version, tmp_path), tmp_path / "on-the-host")
    project = tmp_path / "home" / "work" / host.name
    shutil.copytree(host, project)
    (project / ".devns.toml").write_text(SETTINGS.format(template=template))

    python = str(tmp_path / "venv" / "bin" / "python")
    environ = {**os.environ, "CI": "1"}
    _run([sys.executable, "-m", "venv", str(tmp_path / "venv")], tmp_path, environ)
    _run([python, "-m", "pip", "install", ".", *tools], host, environ)
    frozen = _run([python, "-m", "pip", "freeze", "--exclude", name], host, environ).stdout.split("\n")
    _run([python, *PYTEST], host, environ, expect=(0, 1))

    passed = [word for key in sorted(os.environ) if key.startswith("PIP_") and "INDEX" in key for word in ("-e", key)]
    if name == "click" and shutil.which("less"):  # it tries the pager where there is one
        devns("run", "--root", "--", "apt-get", "install", "-y", "less", cwd=project)
    devns("run", *passed, "--", "python", "-m", "pip", "install", ".", *filter(None, frozen), cwd=project)
    devns("run", "--", "sh", "-c", 'python "$@" || test $? = 1', "sh", *PYTEST, cwd=project)

    outside, inside = _outcomes(host), _outcomes(project)
    assert inside == outside
    assert list(outside.values()).count(("passed",)) > 100


# --- helpers ----------------------------------------------------------------------------------------------------------


def _run(
    argv: Sequence[str], cwd: Path, environ: dict[str, str], expect: Sequence[int] = (0,)
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        argv, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode in expect, f"{' '.join(argv)}: {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done


def _sdist(name: str, version: str, directory: Path) -> Path:
    """The source distribution, through pip: only it knows where this machine's index is."""
    argv = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, f"{name}=={version}"]
    done = subprocess.run(argv, cwd=directory, capture_output=True, text=True, check=False)
    found = [path for path in directory.iterdir() if path.name.startswith(f"{name}-{version}.")]
    if not found:
        reason = f"a package index that has {name} {version}: {(done.stderr.splitlines() or ['pip said nothing'])[-1]}"
        if "index" in os.environ.get("DEVNS_MUST_WORK", "").split(","):
            pytest.fail(f"index must work here: {reason}", pytrace=False)
        pytest.skip(f"needs index, {reason}")
    return found[0]


def _unpack(sdist: Path, directory: Path) -> Path:
    """The one directory in it."""
    directory.mkdir()
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        unpack.unpack_tar(str(sdist), descriptor, keep_special=False, owners=False)
    finally:
        os.close(descriptor)
    (project,) = directory.iterdir()
    return project


def _outcomes(project: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """(class, test) -> what became of it, from the report of a run of pytest."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for case in ElementTree.parse(project / "results.xml").getroot().iter("testcase"):  # noqa: S314  # pytest wrote it
        key = (case.get("classname", ""), case.get("name", ""))
        became = tuple(child.tag for child in case if child.tag in ("failure", "error", "skipped"))
        found[key] = (*found.get(key, ()), *(became or ("passed",)))
    return found
