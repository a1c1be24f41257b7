"""The wheel holds what it should, and the wheel, the editable install and a bare checkout resolve the same names."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("devns", "devns_cgroup", "devns_mount", "devns_network")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(built("wheel", REPOSITORY, tmp_path_factory.mktemp("wheel"))) as file:
        yield file


def test_the_wheel_holds_our_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops - {top for top in tops if top.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_holds_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    assert missing(wheel, REPOSITORY / "devns", "devns/") == []
    assert missing(wheel, REPOSITORY / "plugins", "") == []


def test_the_wheel_holds_the_templates(wheel: zipfile.ZipFile) -> None:
    assert missing(wheel, REPOSITORY / "templates", "devns/templates/") == []
    assert "devns/templates/py311.toml" in wheel.namelist()


def test_the_wheel_holds_the_keys_of_debians_archive(wheel: zipfile.ZipFile) -> None:
    assert [name for name in wheel.namelist() if name.startswith("devns/debian/keys/")] != []


def test_the_bundled_plugins_are_registered_as_an_outsiders_would_be(wheel: zipfile.ZipFile) -> None:
    entries = text(wheel, "entry_points.txt")
    assert "[console_scripts]\ndevns = devns.__main__:main\n" in entries
    assert (
        "[devns]\ncgroup = devns_cgroup.plugin\nmount = devns_mount.plugin\nnetwork = devns_network.plugin\n" in entries
    )


def test_the_wheel_needs_nothing_that_is_compiled_for_one_machine(wheel: zipfile.ZipFile) -> None:
    assert "Root-Is-Purelib: true\nTag: py3-none-any\n" in text(wheel, "WHEEL")


def test_a_wheel_built_from_the_source_archive_is_the_same(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    with tarfile.open(built("sdist", REPOSITORY, tmp_path)) as archive:
        for member in archive:
            if member.isfile():
                path = tmp_path / "source" / member.name.partition("/")[2]
                path.parent.mkdir(parents=True, exist_ok=True)
                data = archive.extractfile(member)
                assert data is not None
                path.write_bytes(data.read())
    with zipfile.ZipFile(built("wheel", tmp_path / "source", tmp_path)) as again:
        assert contents(again) == contents(wheel)


def test_wheel_editable_install_and_checkout_resolve_the_same_names(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    with zipfile.ZipFile(built("editable", REPOSITORY, tmp_path)) as editable:
        (pointer,) = (name for name in editable.namelist() if name.endswith(".pth"))
        places = editable.read(pointer).decode().split()
    assert places == [str(REPOSITORY), str(REPOSITORY / "plugins")]  # as pythonpath says for a bare pytest
    for package in PACKAGES:
        homes = [place for place in places if (Path(place) / package / "__init__.py").exists()]
        assert len(homes) == 1
        assert f"{package}/__init__.py" in wheel.namelist()


def built(kind: str, source: Path, target: Path) -> Path:
    """Build by the hook that pip calls, without isolation and so without a network: the path of what was made."""
    code = "import sys, hatchling.build as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
    command = [sys.executable, "-I", "-c", code, kind, str(target)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target / result.stdout.split()[-1]


def missing(wheel: zipfile.ZipFile, directory: Path, prefix: str) -> list[str]:
    """The files of `directory` that the wheel lacks beneath `prefix`."""
    files = (path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    wanted = {prefix + path.relative_to(directory).as_posix() for path in files}
    return sorted(wanted - set(wheel.namelist()))


def contents(wheel: zipfile.ZipFile) -> dict[str, int]:
    return {entry.filename: entry.CRC for entry in wheel.infolist()}


def text(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()
