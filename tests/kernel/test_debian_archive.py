"""Debian's real archive, through this machine's own mirror: believed, and resolved as apt resolves it."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from devns.debian import archive, index, mirrors, release, resolve, version
from devns.debian.errors import MirrorError
from devns.errors import TemplateError, Unsupported
from devns.host import Host
from devns.sources.debian import ARCHITECTURES

SEED = int(os.environ.get("DEVNS_TEST_SEED", "20250809"))
# For each suite. apt takes a second for each, which no cache of its own shortens: 200 were tried by hand, and other
# seeds. More of them: DEVNS_TEST_REQUESTS=500 DEVNS_TEST_SEED=7 pytest -k apt_would
REQUESTS = int(os.environ.get("DEVNS_TEST_REQUESTS", "100"))


@dataclass(frozen=True)
class Real:
    """One suite as the mirror has it now."""

    host: Host
    cache: str
    selection: archive.Selection
    index: index.Index

    def names(self) -> list[str]:
        return sorted(self.index.files[0].offsets)


@pytest.fixture(scope="module", params=archive.SUITES)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    host, cache = Host.probe(), tmp_path_factory.mktemp("cache")
    try:
        architecture = ARCHITECTURES[host.machine]
        selection = archive.select(request.param, [], architecture=architecture, host=host, cache=str(cache))
    except MirrorError as error:
        pytest.skip(f"needs a Debian mirror that can be reached: {error}")
    except Unsupported as error:
        pytest.skip(f"needs a Debian mirror: {error}")
    files = []
    for name in (request.param, f"{request.param}-updates", f"{request.param}-security"):
        (path,) = (cache / "indexes").glob(f"{name}-{architecture}-*")
        files.append(index.scan(path.read_bytes(), suite=name, archive="security" if "sec" in name else "main"))
    return Real(host, str(cache), selection, index.Index(files, architecture))


def test_the_archive_is_debians_and_has_a_base_system(real: Real) -> None:
    names = {package.name for package in real.selection.packages}
    assert {"apt", "base-files", "libc6", "dpkg", "debian-archive-keyring"} <= names
    assert "usrmerge" not in names
    assert set(real.selection.released) == {
        f"{real.selection.suite}{pocket}" for pocket in ("", "-updates", "-security")
    }


def test_every_paragraph_of_the_archive_can_be_read(real: Real) -> None:
    assert all(real.index.candidate(name) is not None for name in real.names()[::7])


def test_packages_are_fetched_and_are_packages(real: Real) -> None:
    few = replace(real.selection, packages=tuple(sorted(real.selection.packages, key=lambda p: p.size)[:12]))
    for path in archive.fetch(few, host=real.host, cache=real.cache).values():
        assert Path(path).read_bytes().startswith(b"!<arch>\ndebian-binary ")


def test_versions_compare_as_dpkg_compares_them(real: Real) -> None:
    dpkg = shutil.which("dpkg")
    if dpkg is None:
        pytest.skip("needs dpkg, which no one has installed here")
    data = real.index.files[0].data
    found = {
        text.decode() for text in re.findall(rb"\nVersion: (.*)|\([<>=]+ ([^)\s]*)\)", data) for text in text if text
    }
    known, dice = sorted(found), random.Random(SEED)
    pairs = [(at, at + dice.randint(-3, 3)) for at in dice.sample(range(3, len(known) - 3), 300)]
    pairs += [(dice.randrange(len(known)), dice.randrange(len(known))) for _ in range(100)]
    wrong = [
        (a, b)
        for a, b in ((known[left], known[right]) for left, right in pairs)
        if (version.compare(a, b) < 0) != _says(dpkg, a, "lt", b)
        or (version.compare(a, b) > 0) != _says(dpkg, a, "gt", b)
    ]
    assert wrong == []


def _says(dpkg: str, a: str, relation: str, b: str) -> bool:
    # dpkg warns of versions that don't begin with a digit, and compares them.
    command = [dpkg, "--compare-versions", a, relation, b]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


# --- the same question to apt ---------------------------------------------------------------------------------------


class Apt:
    """An apt of our own, with the same archive and an empty system, that needs no root and changes nothing."""

    def __init__(self, real: Real, root: Path, more: str = "") -> None:
        if shutil.which("apt-get") is None:
            pytest.skip("needs apt-get, to be asked the same questions; it is not installed")
        for name in ("lists/partial", "cache/archives/partial", "etc"):
            (root / name).mkdir(parents=True)
        (root / "status").touch()
        # That it is Debian's was checked already, with keys that this machine may not have where apt looks for them.
        sources = re.sub(r"(?m)^Signed-By: .*$", "Trusted: yes", real.selection.sources)
        (root / "debian.sources").write_text(f"{sources}\n{more}")
        route = mirrors.find(real.host).route
        settings = {
            "Dir::Etc": f"{root}/etc",
            "Dir::Etc::SourceList": f"{root}/debian.sources",
            **dict.fromkeys(("Dir::Etc::SourceParts", "Dir::Etc::Parts", "Dir::Etc::PreferencesParts"), "/dev/null"),
            "Dir::State": str(root),
            "Dir::State::Lists": f"{root}/lists",
            "Dir::State::status": f"{root}/status",
            "Dir::Cache": f"{root}/cache",
            "APT::Architecture": real.selection.architecture,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::Check-Valid-Until": "false",
            "Acquire::Check-Date": "false",
            # apt's own way to say "for this host only": Acquire::http::Proxy::HOST
            **{"Acquire::" + re.sub("^https?", r"\g<0>::Proxy", key): value for key, value in route.proxies.items()},
        }
        lines = [f'{key} "{value}";' for key, value in settings.items()]
        (root / "apt.conf").write_text(
            "\n".join([*lines, f'APT::Architectures {{ "{real.selection.architecture}"; }};\n'])
        )
        self.environ = {**os.environ, "APT_CONFIG": f"{root}/apt.conf", "LC_ALL": "C"}
        done = self._run("update")
        if done.returncode:
            pytest.skip(f"needs an apt that can read the mirror: {done.stderr.strip()}")

    def answer(self, packages: Sequence[str]) -> set[str] | None:
        """name=version of all that would be installed, or None where apt refuses.

        --print-uris stops when the decision is made: --simulate would go on to put it in order, for ten times as long.
        """
        done = self._run("install", "-qq", "--print-uris", *packages)
        if done.returncode:
            return None
        names = re.findall(r"(?m)^'[^']+' (\S+)_(\S+)_[^_]+\.deb ", done.stdout)
        return {f"{name}={said.replace('%3a', ':')}" for name, said in names}

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["apt-get", *arguments], check=False, capture_output=True, text=True, env=self.environ)


@pytest.fixture(scope="module")
def apt(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Apt:
    return Apt(real, tmp_path_factory.mktemp("apt"))


class Requests:
    """What people write into `packages`, made up from the names that the archive has."""

    def __init__(self, real: Real, seed: int) -> None:
        self.index = real.index
        self.dice = random.Random(seed)
        self.names = real.names()
        offsets = [packages.offsets for packages in self.index.files]
        self.aged = [name for name in self.names if sum(name in known for known in offsets) > 1]
        self.virtual = sorted(
            name for name in self.index.virtual() if index.is_name(name) and self.index.candidate(name) is None
        )

    def make(self) -> list[str]:
        kinds = (
            self.plain,
            self.plain,
            self.plain,
            self.decorated,
            self.provided,
            self.old,
            self.at_odds,
            self.left_out,
        )
        return self.dice.choice(kinds)()

    def plain(self) -> list[str]:
        return self.dice.sample(self.names, self.dice.choice((1, 1, 2, 3, 5, 8)))

    def decorated(self) -> list[str]:
        marks = ("", ":any", ":native", ":all", f":{self.index.architecture}")
        return [name + self.dice.choice(marks) for name in self.plain()]

    def provided(self) -> list[str]:
        """Virtual packages: most have several providers, which is refused."""
        single = [name for name in self.dice.sample(self.virtual, 60) if len(self.index.providers(name)) == 1]
        return [*single[:2], *self.dice.sample(self.virtual, self.dice.choice((0, 0, 1))), *self.plain()]

    def old(self) -> list[str]:
        """A version that isn't the newest, which what stands beside it may not go with."""
        names = self.dice.sample(self.aged, self.dice.choice((1, 1, 2)))
        return [*(f"{name}={self.dice.choice(self.index.versions(name))}" for name in names), *self.plain()]

    def at_odds(self) -> list[str]:
        """Two of which one says that it doesn't go with the other, in some version."""
        while True:
            one = self.dice.choice(self.names)
            others = [relation.name for relation in self.found(one).conflicts if self.index.candidate(relation.name)]
            if others:
                pair = [one, self.dice.choice(others)]
                return [*self.dice.sample(pair, 2), *self.dice.choice(([], self.plain()))]

    def left_out(self) -> list[str]:
        """One of those that would come is not to come: its alternative does, or nothing fits."""
        while True:
            names = self.plain()
            wanted = [r.name for name in names for group in self.found(name).depends for r in group]
            known = sorted(
                {name for name in wanted if self.index.candidate(name)} - {*names, *resolve.base(self.index)}
            )
            if known:
                return [*names, f"{self.dice.choice(known)}-"]

    def found(self, name: str) -> index.Paragraph:
        paragraph = self.index.candidate(name)
        assert paragraph is not None
        return paragraph


def test_what_is_installed_is_what_apt_would_install(real: Real, apt: Apt) -> None:
    base, requests = resolve.base(real.index), Requests(real, SEED)
    asked = [requests.make() for _ in range(REQUESTS)]
    differing = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        answers = pool.map(lambda request: apt.answer([*base, *request]), asked)
        for request, theirs in zip(asked, answers, strict=True):
            ours = answer(real.index, request)
            if ours != theirs:
                differing[" ".join(request)] = (ours or set()) ^ (theirs or set())
    assert differing == {}


MARKS = {"v1": "", "v2": "NotAutomatic: yes\n", "v3": "NotAutomatic: yes\nButAutomaticUpgrades: yes\n"}


def test_repositories_beside_debians_are_merged_as_apt_merges_them(real: Real, tmp_path: Path) -> None:
    requests = Requests(real, SEED)
    names = requests.dice.sample(real.names(), 24)
    files, sources = list(real.index.files), ""
    for number, suite in enumerate(MARKS):
        paragraphs = [
            written(f"tool-{suite}", f"lib-{suite}, {names[number]}"),
            written(f"lib-{suite}", provides="awk"),
        ]
        for at, name in enumerate(names[number::3]):  # every second one newer than Debian's
            newer = f"{requests.found(name).package.version}+v1"
            paragraphs.append(written(name, f"lib-{suite}" if at % 3 else "", version="0~v1" if at % 2 else newer))
        files.append(published(tmp_path, suite, "\n".join(paragraphs).encode(), real.index.architecture))
        sources += f"Types: deb\nURIs: file:{tmp_path}\nSuites: {suite}\nComponents: main\nTrusted: yes\n\n"
    merged = index.Index(files, real.index.architecture)
    asked = [names[at : at + 6] for at in range(0, 24, 6)]
    asked += [[f"tool-{suite}" for suite in MARKS], [f"{name}={merged.versions(name)[-1]}" for name in names[:6]]]
    theirs, base = Apt(real, tmp_path / "apt", sources), resolve.base(merged)
    assert [answer(merged, request) for request in asked] == [theirs.answer([*base, *request]) for request in asked]


def written(name: str, depends: str = "", *, version: str = "1", provides: str = "") -> str:
    """A paragraph of a repository that is not Debian's."""
    fields = {"Version": version, "Architecture": "all", "Depends": depends, "Provides": provides, "Description": "x"}
    fields |= {"Filename": f"pool/{name}_{version.replace(':', '.')}.deb", "Size": "1", "SHA256": "0" * 64}
    return f"Package: {name}\n" + "".join(f"{key}: {value}\n" for key, value in fields.items() if value)


def published(place: Path, suite: str, data: bytes, architecture: str) -> index.Packages:
    """One suite of it on disk, for apt, and as it is read here."""
    path = f"main/binary-{architecture}/Packages"
    (place / "dists" / suite / path).parent.mkdir(parents=True)
    (place / "dists" / suite / path).write_bytes(data)
    text = (
        f"Codename: {suite}\nSuite: {suite}\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nArchitectures: {architecture}\n"
        f"Components: main\n{MARKS[suite]}SHA256:\n {hashlib.sha256(data).hexdigest()} {len(data)} {path}\n"
    )
    (place / "dists" / suite / "Release").write_text(text)
    verified = release.parse(text.encode(), suite=suite, architecture=architecture, repository=suite)
    return index.scan(data, suite=suite, archive=f"file:{place}", priority=verified.priority)


def answer(found: index.Index, request: Sequence[str]) -> set[str] | None:
    """What ours says, as `Apt.answer`."""
    try:
        return {f"{package.name}={package.version}" for package in resolve.resolve(found, request)}
    except TemplateError:
        return None
