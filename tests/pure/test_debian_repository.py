"""Repositories beside Debian's, against servers on the loopback, signed with throw-away keys."""

from __future__ import annotations

import hashlib
import lzma
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from devns.debian import archive, release, repository
from devns.debian.errors import MirrorError, Untrusted
from devns.debian.repository import Repository
from devns.errors import TemplateError
from tests.pure.test_debian_kit import BASE, Server, Signer, date, paragraph, publish, release_text, send, serving

if TYPE_CHECKING:
    from tests.conftest import MakeHost

DEBIAN, VENDOR, STRANGER = Signer(), Signer(), Signer()
PACKAGES = (paragraph("gadget", "5.0", depends="lib (>= 3)"), paragraph("lib", "3.0"), paragraph("tool", "0.9"))
INDEX = "main/binary-amd64/Packages"


@dataclass
class Vendor:
    """A Debian with tool 1.0 and lib 2.0, a vendor's repository, and the machine that reads both."""

    server: Server
    host: Any
    cache: str

    @property
    def repository(self) -> Repository:
        return Repository(
            f"{self.server.url}/apt", "stable", ("main",), str(VENDOR.secret.extract_certificate()), VENDOR.fingerprint
        )

    def publish(
        self,
        paragraphs: Sequence[bytes] = PACKAGES,
        *,
        signer: Signer = VENDOR,
        files: Mapping[str, bytes] | None = None,
        **fields: Any,
    ) -> None:
        data = b"".join(paragraphs)
        files = {INDEX: data, f"{INDEX}.xz": lzma.compress(data)} if files is None else files
        said = {"suite": "v1", "origin": "Vendor", "label": "Vendor", "date": date(time.time() - 60), **fields}
        text = release_text(files, **said)  # Codename: v1, Suite: stable
        self.server.replies["/apt/dists/stable/InRelease"] = send(signer.sign(text))
        for path, data in files.items():
            self.server.replies[f"/apt/dists/stable/{path}"] = send(data)
            place = f"{path.rpartition('/')[0]}/by-hash/SHA256/{hashlib.sha256(data).hexdigest()}"
            self.server.replies[f"/apt/dists/stable/{place}"] = send(data)

    def select(self, *packages: str, **changes: Any) -> archive.Selection:
        return archive.select(
            "bookworm",
            packages or ("gadget",),
            architecture="amd64",
            host=self.host,
            cache=self.cache,
            trust=lambda suite: DEBIAN.trust,
            repositories=[replace(self.repository, **changes)],
        )


@pytest.fixture
def vendor(host: MakeHost, tmp_path: Path) -> Iterator[Vendor]:
    root = tmp_path / "mirror" / "debian"
    publish(root, DEBIAN, "bookworm", (*BASE, paragraph("tool", "1.0", depends="lib"), paragraph("lib", "2.0")))
    publish(root, DEBIAN, "bookworm-updates")
    publish(root.parent / "debian-security", DEBIAN, "bookworm-security")
    machine = host(environ={"HOME": "/home/user", "DEVNS_DEBIAN_MIRROR": f"file://{root}"})
    with serving() as server:
        vendor = Vendor(server, machine, str(tmp_path / "cache"))
        vendor.publish()
        yield vendor


def versions(found: archive.Selection) -> dict[str, str]:
    return {p.name: p.version for p in found.packages if p.name not in ("apt", "base-files")}


def test_of_all_archives_the_newest_version_comes(vendor: Vendor) -> None:
    assert versions(vendor.select("gadget", "tool")) == {"gadget": "5.0", "lib": "3.0", "tool": "1.0"}
    assert versions(vendor.select("tool=0.9")) == {"tool": "0.9"}


def test_packages_are_fetched_from_the_archive_that_has_them(vendor: Vendor) -> None:
    found = vendor.select("gadget", "tool")
    assert {p.name: p.archive for p in found.packages if p.name in ("gadget", "tool")} == {
        "gadget": vendor.repository.uri,
        "tool": "main",
    }
    vendor.server.replies |= {
        f"/apt/{p.filename}": send(hashlib.sha256(p.name.encode()).hexdigest().encode() * (len(p.name) + 1))
        for p in found.packages
    }
    paths = archive.fetch(found, host=vendor.host, cache=vendor.cache)
    assert set(paths) == {p.name for p in found.packages}
    assert [path for path, _ in vendor.server.asked if path.endswith(".deb")] != []


def test_the_apt_inside_is_told_of_each_with_the_one_key_that_counts(vendor: Vendor) -> None:
    both = str(STRANGER.secret.extract_certificate()) + str(VENDOR.secret.extract_certificate())
    files = vendor.select(key=both).files
    assert files == {
        "/etc/apt/keyrings/devns-1.asc": str(VENDOR.secret.extract_certificate()),
        "/etc/apt/sources.list.d/devns.sources": (
            f"Types: deb\nURIs: {vendor.repository.uri}\nSuites: stable\nComponents: main\n"
            "Signed-By: /etc/apt/keyrings/devns-1.asc\n"
        ),
    }
    assert repository.files([]) == {}


def test_the_apt_inside_finds_the_lists_that_were_verified_here(vendor: Vendor) -> None:
    lists = vendor.select().lists
    stem = f"{vendor.server.url.partition('://')[2]}_apt_dists_stable_"
    assert Path(lists[f"{stem}main_binary-amd64_Packages"]).read_bytes() == b"".join(PACKAGES)
    assert Path(lists[f"{stem}InRelease"]).read_bytes().startswith(b"-----BEGIN PGP SIGNED MESSAGE-----")


def test_an_index_is_fetched_once(vendor: Vendor) -> None:
    first = vendor.select()
    assert vendor.select() == first
    assert sum("by-hash" in path for path, _ in vendor.server.asked) == 1


def test_what_is_for_every_architecture_may_stand_in_an_index_of_its_own(vendor: Vendor) -> None:
    everybodys = paragraph("docs", architecture="all")
    for files in (
        {INDEX: b"".join(PACKAGES), "main/binary-all/Packages": everybodys},
        {"main/binary-all/Packages": everybodys},
    ):
        vendor.publish(files=files, architectures="all" if len(files) == 1 else "amd64 all")
        assert versions(vendor.select("docs")) == {"docs": "1"}


@pytest.mark.parametrize("upgrades", ["no", "yes"])
def test_versions_of_an_archive_that_is_not_automatic_come_only_when_they_are_asked_for(
    vendor: Vendor, upgrades: str
) -> None:
    vendor.publish(notautomatic="yes", butautomaticupgrades=upgrades)
    assert versions(vendor.select("lib")) == {"lib": "2.0"}
    assert versions(vendor.select("lib=3.0")) == {"lib": "3.0"}
    with pytest.raises(TemplateError, match=r"gadget needs lib \(>= 3\); lib is 2\.0"):
        vendor.select("gadget")


def test_nobody_but_debian_says_what_every_system_has(vendor: Vendor) -> None:
    vendor.publish((paragraph("mine", essential="yes"), paragraph("other")))
    assert versions(vendor.select("other")) == {"other": "1"}


# --- what is refused ------------------------------------------------------------------------------------------------


def test_S_15_a_key_that_is_not_the_one_named_is_refused_before_anything_is_read(vendor: Vendor) -> None:
    key = str(STRANGER.secret.extract_certificate())
    with pytest.raises(TemplateError, match=f"no key with the fingerprint {VENDOR.fingerprint}") as caught:
        vendor.select(key=key)
    assert caught.value.hint == f"it has {STRANGER.fingerprint}"
    for key in ("", "nonsense", "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nAAAA\n-----END PGP PUBLIC KEY BLOCK-----\n"):
        with pytest.raises(TemplateError, match=r"no OpenPGP certificate|no key with the fingerprint"):
            vendor.select(key=key)
    assert vendor.server.asked == []


def test_S_16_a_key_that_is_not_pinned_for_it_signs_nothing(vendor: Vendor) -> None:
    for stranger in (STRANGER, DEBIAN):
        vendor.publish(signer=stranger)
        both = str(stranger.secret.extract_certificate()) + str(VENDOR.secret.extract_certificate())
        with pytest.raises(Untrusted, match="stable/InRelease: not signed by a key that is good for it"):
            vendor.select(key=both)


def test_S_16_a_repositorys_key_signs_nothing_of_debians(vendor: Vendor, tmp_path: Path) -> None:
    publish(tmp_path / "mirror" / "debian", VENDOR, "bookworm", BASE)
    with pytest.raises(Untrusted, match="bookworm/InRelease: not signed by a key that is good for it"):
        vendor.select()


def test_S_13_a_repository_without_a_signature_is_refused(vendor: Vendor) -> None:
    vendor.server.replies["/apt/dists/stable/InRelease"] = send(release_text({INDEX: b""}))
    with pytest.raises(Untrusted, match="not a signed Release file"):
        vendor.select()


def test_S_14_a_release_that_was_touched_is_refused(vendor: Vendor) -> None:
    text = VENDOR.sign(release_text({INDEX: b""}, origin="Vendor", codename="stable"))
    vendor.server.replies["/apt/dists/stable/InRelease"] = send(text.replace(b"Origin: Vendor", b"Origin: Vend0r"))
    with pytest.raises(Untrusted, match="not signed by a key that is good for it"):
        vendor.select()


def test_S_17_a_repository_that_was_good_until_yesterday_is_refused(vendor: Vendor) -> None:
    vendor.publish(date=date(time.time() - 90000), valid_until=date(time.time() - 86400))
    with pytest.raises(Untrusted, match="it was good until") as caught:
        vendor.select()
    assert "Acquire::Check-Valid-Until" in (caught.value.hint or "")


def test_S_18_a_repository_that_goes_back_in_time_is_refused(vendor: Vendor) -> None:
    vendor.select()
    vendor.publish(date=date(time.time() - 3600))
    with pytest.raises(Untrusted, match="older than the one of") as caught:
        vendor.select()
    path = Path(str(caught.value.hint).partition("rm ")[2])
    path.unlink()
    assert versions(vendor.select())["gadget"] == "5.0"


def test_S_19_one_suite_under_the_name_of_another_is_refused(vendor: Vendor) -> None:
    assert versions(vendor.select(suite="stable"))["gadget"] == "5.0"
    vendor.publish(suite="v0-old")
    with pytest.raises(Untrusted, match="it is the file of stable-old or v0-old, not of stable"):
        vendor.select()


@pytest.mark.parametrize("drop", [["SHA256"], ["Date"], ["Architectures"]])
def test_S_20_a_release_that_lacks_what_is_needed_is_refused(vendor: Vendor, drop: list[str]) -> None:
    vendor.publish(drop=drop)
    with pytest.raises(Untrusted):
        vendor.select()


def test_S_20_an_index_that_is_not_listed_is_not_there(vendor: Vendor) -> None:
    vendor.publish()
    with pytest.raises(Untrusted, match="does not list contrib/binary-amd64/Packages"):
        vendor.select(components=("main", "contrib"))
    vendor.publish(files={"other/binary-amd64/Packages": b"".join(PACKAGES)})
    vendor.server.replies[f"/apt/dists/stable/{INDEX}"] = send(b"".join(PACKAGES))
    with pytest.raises(Untrusted, match=f"does not list {INDEX}"):
        vendor.select()


def test_S_20_an_index_that_is_not_the_one_listed_is_refused(vendor: Vendor) -> None:
    for path in list(vendor.server.replies):
        if "Packages" in path or "by-hash" in path:
            vendor.server.replies[path] = send(lzma.compress(b"".join(PACKAGES).replace(b"5.0", b"6.0")))
    with pytest.raises(Untrusted, match="promise"):
        vendor.select()


def test_S_21_the_same_version_with_other_contents_than_debians_is_refused(vendor: Vendor) -> None:
    vendor.publish((paragraph("tool", "1.0", sha256="0" * 64),))
    with pytest.raises(Untrusted, match=r"bookworm and .*/apt/dists/stable: tool 1\.0 is there twice"):
        vendor.select("tool")


@pytest.mark.parametrize("filename", ["http://evil.test/x.deb", "/x.deb", "../x.deb", "pool/../../x.deb"])
def test_S_21_a_package_lies_beneath_its_repository(vendor: Vendor, filename: str) -> None:
    vendor.publish((paragraph("gadget", filename=filename),))
    with pytest.raises(Untrusted, match="Filename"):
        vendor.select()


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://169.254.169.254/x"])
def test_S_10_a_redirect_to_where_no_repository_is_is_refused(vendor: Vendor, location: str) -> None:
    vendor.server.replies["/apt/dists/stable/InRelease"] = send(b"", status=302, Location=location)
    with pytest.raises(MirrorError, match=r"root\.repository: .*redirected to"):
        vendor.select()


def test_a_repository_that_is_not_there_is_said_with_the_key_to_mend(vendor: Vendor) -> None:
    with pytest.raises(MirrorError, match=r"root\.repository: .*404") as caught:
        vendor.select(uri=f"{vendor.server.url}/nowhere")
    assert caught.value.hint == "uri is what stands above dists/"


def test_records_of_repositories_do_not_meet(tmp_path: Path) -> None:
    text, name = release_text({INDEX: b""}), "a.test/dists/x"
    found = release.parse(text, suite="bookworm", architecture="amd64", repository=name)
    release.remember(found, str(tmp_path))
    release.refuse_older(replace(found, date=1, name="b.test/dists/x"), str(tmp_path))
    release.refuse_older(replace(found, date=1, name="bookworm"), str(tmp_path))
    with pytest.raises(Untrusted):
        release.refuse_older(replace(found, date=1), str(tmp_path))


def test_a_repository_is_read_from_a_recipe() -> None:
    row = {"uri": "https://a.test", "suite": "x", "components": ["main"], "key": "k", "fingerprint": "f"}
    assert repository.read([row]) == (Repository("https://a.test", "x", ("main",), "k", "f"),)
