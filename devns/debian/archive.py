"""Debian as a source: what a list of packages comes to (`select`), and the files of it (`fetch`).

The cache holds, beneath one directory of the user's: `releases/` when each suite was last seen, `indexes/` Packages
files, `debs/` packages. Everything in it is hashed before it is used, and all of it may be deleted at any time.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from devns.debian import download, index, mirrors, openpgp, release, repository, resolve
from devns.debian.download import Downloads, Wanted
from devns.debian.errors import MirrorError, Untrusted
from devns.debian.index import Package
from devns.debian.transport import Session
from devns.errors import TemplateError, Unsupported
from devns.lock import FILE as LOCK_FILE
from devns.lock import Pinned
from devns.progress import Progress, Silent

if TYPE_CHECKING:
    from devns.debian.index import Packages
    from devns.debian.mirrors import Mirrors
    from devns.debian.openpgp import Trust
    from devns.debian.release import Listed, Release
    from devns.debian.repository import Repository
    from devns.host import Host

SUITES = ("bookworm", "trixie")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"  # of the package debian-archive-keyring, which apt needs
_ARCHITECTURES = ("amd64", "arm64")


@dataclass(frozen=True)
class Selection:
    """What an environment is made of. `packages` by name; `released` says of when each suite was, in seconds since the
    epoch; `sources` is the text of a deb822 .sources file for the apt inside, `files` what it is told of other
    repositories, and `lists` what it would have read by them."""

    suite: str
    architecture: str
    packages: tuple[Package, ...]
    sources: str
    released: Mapping[str, int]
    lists: Mapping[str, str]  # what apt would have in /var/lib/apt/lists after an update: name -> path in the cache
    files: Mapping[str, str] = field(default_factory=dict)  # path in the root -> text

    @property
    def size(self) -> int:
        """Bytes to download if nothing is in the cache."""
        return sum(package.size for package in self.packages)


def select(
    suite: str,
    packages: Sequence[str],
    *,
    architecture: str,
    host: Host,
    cache: str,
    progress: Progress | None = None,
    trust: Callable[[str], Trust] = openpgp.pinned,
    repositories: Sequence[Repository] = (),
) -> Selection:
    """What `packages` of `suite` come to today: the newest of main, updates, security and `repositories`, with all that
    they need.

    Reads the archive over the network. TemplateError for a suite or package that isn't there or can't be had,
    Unsupported (MirrorError among it) where the archive can't be reached or the cache not written, Untrusted where it
    isn't Debian's. `trust` says for each suite whose signature counts.
    """
    progress = progress or Silent()
    if suite not in SUITES:
        raise TemplateError(
            f"root.from: debian:{suite}: not a suite that devns knows", hint=f"try {' or '.join(SUITES)}"
        )
    if architecture not in _ARCHITECTURES:
        raise Unsupported(f"debian: {architecture}: devns builds {' and '.join(_ARCHITECTURES)} only")
    for text in packages:
        resolve.read_request(text, architecture)  # before anything is read for it
    sources = mirrors.find(host)
    suites = [*_debians(suite, sources, trust), *map(_others, repositories)]
    told = repository.files(repositories)  # an unfit key is said before anything is read
    progress.stage("read the archive's index", total=len(suites), unit="files")
    try:
        found = _Reader(architecture, sources, cache).read_all(suites, progress.advance)
    except OSError as error:
        raise download.on_disk(error, cache) from error
    whole = index.Index([listed for read in found for listed in read.packages], architecture)
    return Selection(
        suite=suite,
        architecture=architecture,
        packages=resolve.resolve(whole, packages),
        sources=_sources_file(suite, sources),
        released={read.release.name: read.release.date for read in found},
        lists={name: path for read in found for name, path in read.lists.items()},
        files=told,
    )


def locked(
    suite: str,
    pinned: Sequence[Pinned],
    *,
    built: int,
    architecture: str,
    host: Host,
    repositories: Sequence[Repository] = (),
) -> Selection:
    """What a lock file says, without a look at the archive. TemplateError where it says what can't be."""
    for one in pinned:
        if wrong := index.refused(one.name, one.version, one.filename, one.sha256):
            raise TemplateError(f"{LOCK_FILE}: {one.name[:60]!a}: {wrong}", hint="devns lock --update")
    return Selection(
        suite=suite,
        architecture=architecture,
        packages=tuple(Package(**asdict(one), essential=False, multi_arch="no", priority="") for one in pinned),
        sources=_sources_file(suite, mirrors.find(host)),
        released={suite: built},
        lists={},
        files=repository.files(repositories),
    )


def pin(package: Package) -> Pinned:
    """As a lock file has it."""
    return Pinned(
        package.name,
        package.version,
        package.architecture,
        package.size,
        package.sha256,
        package.filename,
        package.archive,
    )


def fetching(
    selection: Selection,
    *,
    host: Host,
    cache: str,
    progress: Progress | None = None,
    ready: Callable[[Package], None] = lambda package: None,
) -> Downloads:
    """Every .deb of `selection` on its way into the cache, at `path_of`; what is there already isn't asked for again.

    `ready` is called for each that is complete and verified, by `Downloads.take`, so that unpacking may begin.
    """
    progress = progress or Silent()
    sources = mirrors.find(host)
    packages = {path_of(package, cache): package for package in selection.packages}
    progress.stage("download", total=selection.size, unit="bytes")
    return Downloads(
        [
            Wanted(f"{sources.url(package.archive)}/{package.filename}", path, package.size, package.sha256)
            for path, package in packages.items()
        ],
        sources.route,
        advance=progress.advance,
        ready=lambda file: ready(packages[file.path]),
    )


def fetch(selection: Selection, *, host: Host, cache: str, progress: Progress | None = None) -> dict[str, str]:
    """Every .deb of `selection` in the cache, verified: name -> path."""
    with fetching(selection, host=host, cache=cache, progress=progress) as downloads:
        downloads.wait()
    return {package.name: path_of(package, cache) for package in selection.packages}


def path_of(package: Package, cache: str) -> str:
    """Where in the cache its .deb is, once it is."""
    return f"{cache}/debs/{package.sha256}.deb"


# --- the index ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Suite:
    """One that is read: of Debian's, or of another repository, whose name in the cache is a hash."""

    suite: str
    archive: str  # "main", "security", or its URL
    url: str  # above dists/
    trust: Trust
    stem: str
    components: tuple[str, ...] = ("main",)
    repository: str | None = None  # its name, where it isn't Debian's


@dataclass(frozen=True)
class _Read:
    """What one is today. `lists` are its part of `Selection.lists`."""

    release: Release
    packages: tuple[Packages, ...]
    lists: Mapping[str, str]


def _debians(suite: str, sources: Mirrors, trust: Callable[[str], Trust]) -> tuple[_Suite, ...]:
    """What makes up a release, in the order in which `sources` names it to apt."""
    places = (suite, "main"), (f"{suite}-updates", "main"), (f"{suite}-security", "security")
    return tuple(_Suite(name, archive, sources.url(archive), trust(name), name) for name, archive in places)


def _others(said: Repository) -> _Suite:
    stem = f"repository-{hashlib.sha256(said.name.encode()).hexdigest()[:32]}"
    return _Suite(said.suite, said.uri, said.uri, said.trust, stem, said.components, said.name)


@dataclass(frozen=True)
class _Reader:
    """Reads one architecture's indexes from the mirrors, through the cache."""

    architecture: str
    sources: Mirrors
    cache: str

    def read_all(self, suites: Sequence[_Suite], advance: Callable[[], None]) -> list[_Read]:
        """All suites at once: decompressing and hashing leave the interpreter's lock alone."""
        sessions = [Session(self.sources.route) for _ in suites]
        pool = concurrent.futures.ThreadPoolExecutor(len(suites))
        try:
            jobs = [pool.submit(self.read, suite, session) for suite, session in zip(suites, sessions, strict=True)]
            for job in concurrent.futures.as_completed(jobs):
                job.result()  # the first error ends the others
                advance()
            return [job.result() for job in jobs]
        finally:
            for session in sessions:
                session.stop()
            pool.shutdown(wait=True, cancel_futures=True)

    def read(self, suite: _Suite, session: Session) -> _Read:
        try:
            with session:
                return self._read(suite, session)
        except MirrorError as error:
            if suite.repository is None:
                raise
            raise MirrorError(f"root.repository: {error.message}", hint="uri is what stands above dists/") from error

    def _read(self, suite: _Suite, session: Session) -> _Read:
        base = f"{suite.url}/dists/{suite.suite}"
        data = session.read(f"{base}/InRelease", limit=release.LIMIT)
        verified = release.read(
            data,
            suite=suite.suite,
            architecture=self.architecture,
            trust=suite.trust,
            now=time.time(),
            ages=self.sources.ages[suite.archive if suite.repository is None else ""],
            repository=suite.repository,
        )
        release.refuse_older(verified, f"{self.cache}/releases")
        if suite.repository is None:
            wanted: tuple[Listed, ...] = (release.index(verified, self.architecture),)
        else:
            wanted = release.indexes(verified, self.architecture, suite.components)
        packages, lists = [], {}
        names = _apt_name(base)
        for listed in wanted:
            path, text = self._packages(verified, listed, suite, base, session)
            where = suite.repository or suite.suite
            packages.append(index.scan(text, suite=where, archive=suite.archive, priority=verified.priority))
            lists[f"{names}_{listed.component.replace('/', '_')}_binary-{listed.architecture}_Packages"] = path
        # Only now: a Release whose index never came would lock out the older one that is whole.
        release.remember(verified, f"{self.cache}/releases")
        kept = lists[f"{names}_InRelease"] = f"{self.cache}/indexes/{suite.stem}.InRelease"
        _keep(kept, data)
        return _Read(verified, tuple(packages), lists)

    def _packages(
        self, verified: Release, listed: Listed, suite: _Suite, base: str, session: Session
    ) -> tuple[str, bytes]:
        """The Packages file that `verified` promises, from the cache or from the net, and its path in the cache."""
        entry, directory = listed.whole, f"{self.cache}/indexes"
        component = f"-{listed.component.replace('/', '_')}" if suite.repository else ""
        prefix = f"{suite.stem}{component}-{listed.architecture}-"
        path = f"{directory}/{prefix}{entry.sha256}"
        with contextlib.suppress(OSError), open(path, "rb") as file:
            data = file.read(entry.size + 1)
            if len(data) == entry.size and hashlib.sha256(data).hexdigest() == entry.sha256:
                return path, data
        packing, source = listed.packed[0]
        wanted = Wanted(f"{base}/{source.path}", f"{path}{packing}.packed", source.size, source.sha256)
        self._fetch(wanted, session, by_hash=verified.by_hash)
        with open(wanted.path, "rb") as file:
            data = index.decompress(file.read(source.size + 1), packing, entry.size)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise Untrusted(f"{verified.name}: {source.path} does not unpack to what the Release promises")
        _keep(path, data)
        for name in os.listdir(directory):  # what it replaces, and what it was made from
            if name.startswith(prefix) and name != os.path.basename(path):
                with contextlib.suppress(OSError):
                    os.unlink(f"{directory}/{name}")
        return path, data

    def _fetch(self, wanted: Wanted, session: Session, *, by_hash: bool) -> None:
        """By its hash where the archive has that: it is there even while the mirror is being updated."""
        if by_hash:
            place = wanted.url.rpartition("/")[0]
            with contextlib.suppress(MirrorError):  # an incomplete copy may lack it
                download.fetch(replace(wanted, url=f"{place}/by-hash/SHA256/{wanted.sha256}"), session)
                return
        download.fetch(wanted, session)


def _keep(path: str, data: bytes) -> None:
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)


def _sources_file(suite: str, sources: Mirrors) -> str:
    """The .sources file of the root: the same mirrors, without the password that may stand in their URLs."""
    stanzas = [
        f"Types: deb\nURIs: {mirrors.hide(url)}\nSuites: {suites}\nComponents: main\nSigned-By: {KEYRING}\n"
        for url, suites in ((sources.main, f"{suite} {suite}-updates"), (sources.security, f"{suite}-security"))
    ]
    return "\n".join(stanzas)


def _apt_name(url: str) -> str:
    """What apt's files of `url` begin with in /var/lib/apt/lists: its URItoFileName()."""
    place = mirrors.hide(url).partition("://")[2]
    quoted = "".join(f"%{ord(char):02x}" if char in '\\|{}[]<>"^~_=!@#$%&*' else char for char in place)
    return quoted.replace("/", "_")
