"""Debian as a source, against a mirror made on the spot and signed with a throw-away key."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devns.debian import archive
from devns.debian.errors import MirrorError, Untrusted
from devns.errors import TemplateError, Unsupported
from devns.progress import Silent, Unit
from tests.pure.test_debian_kit import BASE, Signer, date, deb, paragraph, publish, release_text, serving

if TYPE_CHECKING:
    from devns.host import Host
    from tests.conftest import MakeHost

SIGNER = Signer()
FUTURE, PAST = 4_000_000_000.0, 1_500_000_000.0
MAIN = (*BASE, paragraph("tool", "1.0", depends="lib"), paragraph("lib", "2.0"))
SECURITY = (paragraph("lib", "2.0+deb12u1"),)


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A whole mirror: main and security side by side in one directory."""
    root = tmp_path / "mirror" / "debian"
    publish(root, SIGNER, "bookworm", MAIN)
    publish(root, SIGNER, "bookworm-updates")
    publish(root.parent / "debian-security", SIGNER, "bookworm-security", SECURITY)
    return root


def machine(host: MakeHost, url: str | Path) -> Host:
    said = f"file://{url}" if isinstance(url, Path) else url
    return host(environ={"HOME": "/home/user", "DEVNS_DEBIAN_MIRROR": said})


def select(
    where: Host, tmp_path: Path, packages: Sequence[str] = ("tool",), suite: str = "bookworm"
) -> archive.Selection:
    return archive.select(
        suite,
        packages,
        architecture="amd64",
        host=where,
        cache=str(tmp_path / "cache"),
        trust=lambda suite: SIGNER.trust,
    )


def test_a_request_becomes_packages_of_all_suites_and_the_root_learns_where_they_are(
    host: MakeHost, mirror: Path, tmp_path: Path
) -> None:
    found = select(machine(host, mirror), tmp_path)
    assert [(p.name, p.version, p.archive) for p in found.packages] == [
        ("apt", "1", "main"),
        ("base-files", "1", "main"),
        ("lib", "2.0+deb12u1", "security"),
        ("tool", "1.0", "main"),
    ]
    assert set(found.released) == {"bookworm", "bookworm-updates", "bookworm-security"}
    assert found.size == sum(len(deb(package.name)) for package in found.packages)
    assert found.sources == (
        f"Types: deb\nURIs: file://{mirror}\nSuites: bookworm bookworm-updates\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n"
        f"Types: deb\nURIs: file://{mirror}-security\nSuites: bookworm-security\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )


def test_what_was_selected_is_fetched_once_and_each_is_told_as_it_comes(
    host: MakeHost, mirror: Path, tmp_path: Path
) -> None:
    with serving(root=mirror.parent) as server:
        where = machine(host, f"{server.url}/debian")
        found = select(where, tmp_path)
        told: list[str] = []
        cache = str(tmp_path / "cache")
        with archive.fetching(found, host=where, cache=cache, ready=lambda package: told.append(package.name)) as going:
            going.wait()
        paths = {package.name: archive.path_of(package, cache) for package in found.packages}
        asked = len(server.asked)
        assert archive.fetch(found, host=where, cache=str(tmp_path / "cache")) == paths
        assert len(server.asked) == asked
    assert sorted(told) == sorted(paths) == ["apt", "base-files", "lib", "tool"]
    for name, path in paths.items():
        assert os.path.basename(path) == f"{hashlib.sha256(deb(name)).hexdigest()}.deb"
        assert Path(path).read_bytes() == deb(name)


def test_an_index_that_did_not_change_is_not_fetched_again(host: MakeHost, mirror: Path, tmp_path: Path) -> None:
    with serving(root=mirror.parent) as server:
        where = machine(host, f"{server.url}/debian")
        first = select(where, tmp_path)
        assert select(where, tmp_path) == first
        assert sum("by-hash" in path for path, _ in server.asked) == 3
        kept = {path.name for path in (tmp_path / "cache" / "indexes").glob("*-amd64-*")}
        publish(mirror, SIGNER, "bookworm", (*MAIN, paragraph("new")))
        assert "new" in {package.name for package in select(where, tmp_path, ["new"]).packages}
        now = {path.name for path in (tmp_path / "cache" / "indexes").glob("*-amd64-*")}
        assert (len(kept), len(now), len(kept & now)) == (3, 3, 2)


def test_S_22_a_poisoned_index_in_the_cache_is_fetched_again(host: MakeHost, mirror: Path, tmp_path: Path) -> None:
    where = machine(host, mirror)
    first = select(where, tmp_path)
    for path in (tmp_path / "cache" / "indexes").glob("*-amd64-*"):
        path.write_bytes(path.read_bytes().replace(b"Version: 1.0", b"Version: 6.6"))
    assert select(where, tmp_path) == first


def test_S_13_a_mirror_without_a_signature_is_refused(host: MakeHost, mirror: Path, tmp_path: Path) -> None:
    for path in mirror.parent.glob("*/dists/*/InRelease"):
        path.write_bytes(release_text())
    with pytest.raises(Untrusted, match="not a signed Release file"):
        select(machine(host, mirror), tmp_path)
    assert not (tmp_path / "cache").exists()


def test_S_13_what_apt_is_told_to_believe_unsigned_is_refused_all_the_same(
    host: MakeHost, mirror: Path, tmp_path: Path
) -> None:
    for path in mirror.parent.glob("*/dists/*/InRelease"):
        path.write_bytes(release_text())
    conf = (
        'Acquire { AllowInsecureRepositories "true"; AllowWeakRepositories "true"; }; APT::Get::AllowUnauthenticated 1;'
    )
    entry = f"deb [trusted=yes allow-insecure=yes] file://{mirror}{{}} bookworm{{}} main\n"
    sources = entry.format("", "") + entry.format("-security", "-security")
    machine = host({"/etc/apt/apt.conf": conf, "/etc/apt/sources.list": sources})
    with pytest.raises(Untrusted, match="not a signed Release file"):
        select(machine, tmp_path)


def test_S_13_a_mirror_that_has_only_an_unsigned_release_is_refused(
    host: MakeHost, mirror: Path, tmp_path: Path
) -> None:
    signed = mirror / "dists" / "bookworm" / "InRelease"
    signed.rename(signed.with_name("Release"))
    with pytest.raises(MirrorError):
        select(machine(host, mirror), tmp_path)


def test_S_16_debians_own_keys_are_asked_for_unless_something_else_is_said(
    host: MakeHost, mirror: Path, tmp_path: Path
) -> None:
    with pytest.raises(Untrusted, match="not signed by a key that is good for it"):
        archive.select("bookworm", [], architecture="amd64", host=machine(host, mirror), cache=str(tmp_path / "cache"))


def test_S_17_a_mirror_that_stands_still_is_refused(host: MakeHost, mirror: Path, tmp_path: Path) -> None:
    publish(mirror, SIGNER, "bookworm", MAIN, valid_until=date(FUTURE))
    select(machine(host, mirror), tmp_path)
    publish(mirror, SIGNER, "bookworm", MAIN, valid_until=date(PAST))
    with pytest.raises(Untrusted, match="it was good until"):
        select(machine(host, mirror), tmp_path)


def test_S_18_a_mirror_that_goes_back_in_time_is_refused(host: MakeHost, mirror: Path, tmp_path: Path) -> None:
    where = machine(host, mirror)
    publish(mirror, SIGNER, "bookworm", (*MAIN, paragraph("tool", "2.0")), date=date(PAST + 60))
    select(where, tmp_path)
    publish(mirror, SIGNER, "bookworm", MAIN, date=date(PAST))
    with pytest.raises(Untrusted, match="older than the one"):
        select(where, tmp_path)


def test_S_19_one_suite_under_the_name_of_another_is_refused(host: MakeHost, mirror: Path, tmp_path: Path) -> None:
    security = mirror.parent / "debian-security" / "dists" / "bookworm-security" / "InRelease"
    (mirror / "dists" / "bookworm" / "InRelease").write_bytes(security.read_bytes())
    with pytest.raises(Untrusted, match="it is the file of bookworm-security, not of bookworm"):
        select(machine(host, mirror), tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: bytes(len(data))])
def test_S_20_an_index_that_is_not_the_one_listed_is_refused(
    host: MakeHost, mirror: Path, tmp_path: Path, damage: object
) -> None:
    for path in mirror.glob("dists/bookworm/main/binary-amd64/by-hash/SHA256/*"):
        path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(Untrusted):
        select(machine(host, mirror), tmp_path)
    assert not (tmp_path / "cache" / "releases" / "bookworm.json").exists()


def test_an_index_that_is_not_there_by_its_hash_is_fetched_by_its_name(
    host: MakeHost, mirror: Path, tmp_path: Path
) -> None:
    for path in mirror.glob("dists/bookworm/main/binary-amd64/by-hash/SHA256/*"):
        path.rename(mirror / "dists/bookworm/main/binary-amd64/Packages.xz")
    assert select(machine(host, mirror), tmp_path).packages


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: bytes(len(data))])
def test_S_01_a_package_that_is_not_the_one_listed_is_refused_and_not_kept(
    host: MakeHost, mirror: Path, tmp_path: Path, damage: object
) -> None:
    where = machine(host, mirror)
    found = select(where, tmp_path)
    (wrong,) = mirror.glob("pool/main/tool_*")
    wrong.write_bytes(damage(wrong.read_bytes()))  # type: ignore[operator]
    with pytest.raises(Untrusted, match="promise"):
        archive.fetch(found, host=where, cache=str(tmp_path / "cache"))
    (tool,) = (package for package in found.packages if package.name == "tool")
    assert not (tmp_path / "cache" / "debs" / f"{tool.sha256}.deb").exists()


def test_S_25_a_mirrors_password_is_not_written_into_the_root(host: MakeHost, mirror: Path, tmp_path: Path) -> None:
    with serving(root=mirror.parent) as server:
        url = server.url.replace("http://", "http://user:secret@")
        assert "secret" not in select(machine(host, f"{url}/debian"), tmp_path).sources


def test_a_suite_that_is_not_known_is_refused_before_anything_is_read(host: MakeHost, tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="debian:sid: not a suite"):
        select(host(), tmp_path, suite="sid")


@pytest.mark.parametrize("name", ["", "Tool", "../tool", "tool=", "tool=1/0", "-y", "a b", "tool\n", "-", "tool=1-2=3"])
def test_what_cannot_be_the_name_of_a_package_is_refused(host: MakeHost, tmp_path: Path, name: str) -> None:
    with pytest.raises(TemplateError, match="not the name of a package"):
        select(host(), tmp_path, [name])


def test_progress_counts_the_bytes_of_every_package(host: MakeHost, mirror: Path, tmp_path: Path) -> None:
    stages: list[tuple[str, int | None]] = []
    counted: list[int] = []

    class Told(Silent):
        def stage(self, name: str, *, total: int | None = None, unit: Unit = "steps") -> None:
            stages.append((unit, total))
            counted.append(0)

        def advance(self, count: int = 1) -> None:
            counted[-1] += count

    where, cache = machine(host, mirror), str(tmp_path / "cache")
    found = archive.select(
        "bookworm",
        ["tool"],
        architecture="amd64",
        host=where,
        cache=cache,
        progress=Told(),
        trust=lambda suite: SIGNER.trust,
    )
    archive.fetch(found, host=where, cache=cache, progress=Told())
    assert stages == [("files", 3), ("bytes", found.size)]
    assert counted == [3, found.size]


def test_a_cache_that_cannot_be_written_is_one_sentence(host: MakeHost, mirror: Path, tmp_path: Path) -> None:
    where = machine(host, mirror)
    found = select(where, tmp_path)
    (tmp_path / "file").touch()
    for call in (
        lambda: archive.fetch(found, host=where, cache=str(tmp_path / "file")),
        lambda: archive.select(
            "bookworm",
            [],
            architecture="amd64",
            host=where,
            cache=str(tmp_path / "file"),
            trust=lambda suite: SIGNER.trust,
        ),
    ):
        with pytest.raises(Unsupported, match="Not a directory"):
            call()
