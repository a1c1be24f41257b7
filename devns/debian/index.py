"""Packages files: which package is where, kept as bytes; a paragraph is read when somebody asks for it.

A suite's main has 50 MB and 63,000 paragraphs, and an environment touches a few hundred of them.
"""

from __future__ import annotations

import copy
import difflib
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from devns.debian import version
from devns.debian.errors import Untrusted

PARAGRAPH_MAX = 1 << 20
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]{0,127}")
_FILENAME = re.compile(r"(?:\./)?(?!(?:.*/)?\.\.?/)[A-Za-z0-9][A-Za-z0-9._+~:@%=,-]*(?:/[A-Za-z0-9._+~:@%=,-]+)*\.deb")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RELATION = re.compile(r"([a-z0-9][a-z0-9+.-]*)(?::([a-z0-9-]+))?(?:\s*\(\s*(<<|<=|=|>=|>>|<|>)\s*([^\s()]+)\s*\))?")
_FIELD = re.compile(r"([A-Za-z][A-Za-z0-9-]*):[ \t]*(.*)")
_PRIORITIES = {"required": 1, "important": 2, "standard": 3, "optional": 4, "extra": 5}

# The order in which apt meets the names of a paragraph, see `Index.mentioned`.
_MENTIONS = tuple("Pre-Depends Depends Conflicts Breaks Recommends Suggests Replaces Enhances Provides".split())


@dataclass(frozen=True)
class Package:
    """One .deb of an archive: all that is needed to fetch it, to trust it and to record it."""

    name: str
    version: str
    architecture: str  # the machine's, or "all"
    filename: str  # beneath the archive's root
    size: int  # bytes
    sha256: str
    essential: bool
    multi_arch: str  # "no", "same", "foreign" or "allowed"
    priority: str
    archive: str = "main"  # Debian's "main" or "security", or the URL of another


@dataclass(frozen=True)
class Relation:
    """One alternative of a dependency: "python3:any (>= 3.11)"."""

    name: str
    architecture: str | None = None
    relation: str | None = None
    version: str | None = None

    @property
    def full_name(self) -> str:
        return f"{self.name}:{self.architecture}" if self.architecture else self.name

    def __str__(self) -> str:
        return self.full_name + (f" ({self.relation} {self.version})" if self.relation else "")


Group = tuple[Relation, ...]  # alternatives, the preferred one first


@dataclass(frozen=True)
class Paragraph:
    """What the resolver knows of one version of a package."""

    package: Package
    important: bool  # Important: yes or Protected: yes
    depends: tuple[Group, ...]  # Pre-Depends and Depends, as apt orders them
    conflicts: tuple[Relation, ...]  # Conflicts and Breaks
    provides: tuple[Relation, ...]
    rank: int = field(compare=False, default=0)  # of the priority, 1 is highest


@dataclass(frozen=True)
class Packages:
    """One Packages file and where in it each name stands."""

    suite: str
    archive: str
    data: bytes
    offsets: Mapping[str, Sequence[int]]
    priority: int = 500  # of its versions; apt_preferences(5)

    @property
    def is_debians(self) -> bool:
        return self.archive in ("main", "security")


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def refused(name: str, said: str, filename: str, sha256: str) -> str | None:
    """What is wrong with a package that no index has named: the grammar of an index holds for it, too."""
    grammars = {"name": (name, _NAME), "filename": (filename, _FILENAME), "sha256": (sha256, _SHA256)}
    wrong = [key for key, (text, grammar) in grammars.items() if len(text) > 1024 or not grammar.fullmatch(text)]
    if not version.is_version(said):
        wrong.append("version")
    return f"{', '.join(wrong)}: cannot be" if wrong else None


def decompress(data: bytes, packing: str, size: int) -> bytes:
    """At most `size` bytes from `data` ("" plain, ".gz", ".xz"). Untrusted unless it is exactly that much."""
    try:
        if packing == ".xz":
            unpacked = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=128 << 20).decompress(data, size + 1)
        elif packing == ".gz":
            unpacked = zlib.decompressobj(31).decompress(data, size + 1)
        else:
            unpacked = data
    except (lzma.LZMAError, zlib.error) as error:
        raise Untrusted(f"Packages{packing}: damaged: {error}") from error
    if len(unpacked) != size:
        order = "more" if len(unpacked) > size else "less"
        raise Untrusted(f"Packages{packing}: {order} than the {size} bytes promised")
    return unpacked


def scan(data: bytes, *, suite: str, archive: str, priority: int = 500) -> Packages:
    """Where every paragraph begins. The name is mostly each one's first field; Untrusted where there is none."""
    offsets: dict[str, list[int]] = {}
    start, count = 0, 0
    while start < len(data):
        if data[start] == 10:  # one empty line more than there need be
            start += 1
            continue
        stop = data.find(b"\n\n", start)
        stop = len(data) if stop < 0 else stop
        name = _name(data, start, stop)
        if not name:
            raise Untrusted(f"{suite}: Packages: a paragraph without a name at byte {start}")
        offsets.setdefault(name, []).append(start)
        count += 1
        start = stop + 2
    if data.count(b"\nPackage:") + data.startswith(b"Package:") != count:
        raise Untrusted(f"{suite}: Packages: a paragraph with two names")
    return Packages(suite, archive, data, offsets, priority)


class Index:
    """Several Packages files as one: of each package the newest version, which is apt's candidate.

    A file of lower priority counts where no other has the package.
    """

    def __init__(self, files: Sequence[Packages], architecture: str) -> None:
        self.files = tuple(files)
        self.architecture = architecture
        self._candidates: dict[str, Paragraph | None] = {}
        self._places: dict[str, tuple[Packages, int]] = {}  # of the candidates
        self._providers = _names_provided(self.files)
        self._mentioned: dict[str, tuple[int, ...]] = {}

    def candidate(self, name: str) -> Paragraph | None:
        """The version of `name` that would be installed, or None where no package has that name."""
        try:
            return self._candidates[name]
        except KeyError:
            found = self._candidates[name] = self._newest(name)
            return found

    def choose(self, versions: Mapping[str, str]) -> Index:
        """The same archive, but of these packages with the version that is said as candidate, as
        `apt-get install NAME=VERSION` makes it. KeyError with the name where there is no such version of it."""
        if not versions:
            return self
        chosen = copy.copy(self)
        chosen._candidates, chosen._places = dict(self._candidates), dict(self._places)
        for name, wanted in versions.items():
            found = [row for row in self._versions(name) if row[0].package.version == wanted]
            if not found:
                raise KeyError(name)
            chosen._candidates[name], chosen._places[name] = found[0]
        return chosen

    def versions(self, name: str) -> tuple[str, ...]:
        """Every version of `name` that is there, apt's favourite first."""
        return tuple(paragraph.package.version for paragraph, _ in self._versions(name))

    def providers(self, name: str) -> list[tuple[Paragraph, str | None]]:
        """Who provides the virtual `name` ("awk", "python3-foo:any"), and in which version if the provider says one."""
        found = []
        for provider in self._providers.get(name, ()):
            paragraph = self.candidate(provider)  # an older version may have provided it and the candidate does not
            if paragraph is not None:
                found += [(paragraph, said.version) for said in paragraph.provides if said.full_name == name]
        return found

    def virtual(self) -> Iterable[str]:
        """The names that some version of some package provides."""
        return self._providers.keys()

    def wishes(self, name: str) -> tuple[Group, ...]:
        """What the candidate of `name` recommends and suggests."""
        if self.candidate(name) is None:
            return ()
        packages, start = self._places[name]
        where = f"{packages.suite}: {name}"
        fields = _fields(_paragraph(packages, start), where)
        return tuple(group for key in ("Recommends", "Suggests") for group in relations(fields.get(key, ""), where))

    def essential(self) -> tuple[str, ...]:
        """The names of all packages that Debian calls Essential, in the order of the files."""
        names = [
            name
            for packages in self.files
            if packages.is_debians
            for at in _everywhere(packages.data, b"\nEssential: yes\n")
            for name in [_name_at(packages.data, at)]
        ]
        return tuple(name for name in dict.fromkeys(names) if (p := self.candidate(name)) and p.package.essential)

    def near(self, name: str) -> list[str]:
        """Up to three names like `name`, for the one who misspelt it."""
        known = sorted({known for packages in self.files for known in packages.offsets if known[:1] == name[:1]})
        return difflib.get_close_matches(name, known, n=3, cutoff=0.7)

    def mentioned(self, name: str) -> tuple[int, ...]:
        """Where `name` is first mentioned as a package: a value to be compared.

        When nothing else tells two providers apart, apt takes the one whose name entered its cache last; names enter
        it when they are first mentioned, be it in another package's Suggests.
        """
        if name not in self._mentioned:
            self._mentioned[name] = next(
                (
                    (number, start, *within)
                    for number, packages in enumerate(self.files)
                    for start, within in _mentions(packages, name)
                ),
                (len(self.files),),
            )
        return self._mentioned[name]

    def _newest(self, name: str) -> Paragraph | None:
        for found, place in self._versions(name)[:1]:
            self._places[name] = place
            return found
        return None

    def _versions(self, name: str) -> list[tuple[Paragraph, tuple[Packages, int]]]:
        """Every version of `name` and where it is, apt's favourite first; of one in two files the first."""
        found: dict[str, tuple[Paragraph, tuple[Packages, int]]] = {}
        priorities: dict[str, int] = {}
        for packages in self.files:
            for start in packages.offsets.get(name, ()):
                paragraph = parse(packages, start, self.architecture)
                package = paragraph.package
                before, (other, _) = found.setdefault(package.version, (paragraph, (packages, start)))
                priorities[package.version] = max(packages.priority, priorities.get(package.version, 0))
                if not _same(package, before.package):
                    where = packages.suite if packages is other else f"{other.suite} and {packages.suite}"
                    raise Untrusted(
                        f"{where}: {name} {package.version} is there twice, with different contents",
                        hint="the mirror is broken, or of two different times",
                    )
        order = {said: (priorities[said], version.key(said)) for said in found}
        return [found[said] for said in sorted(found, key=order.__getitem__, reverse=True)]


def parse(packages: Packages, start: int, architecture: str) -> Paragraph:
    """The paragraph that begins at `start`. Untrusted where it says something that can't be."""
    fields = _fields(_paragraph(packages, start), f"{packages.suite}: Packages")
    name = fields["Package"]
    where = f"{packages.suite}: {name}"

    def need(key: str, grammar: str | re.Pattern[str]) -> str:
        value = fields.get(key, "")
        if len(value) > 1024 or re.fullmatch(grammar, value) is None:
            raise Untrusted(f"{where}: {key}: {value[:120]!r} is none")
        return value

    need("Package", _NAME)
    if not version.is_version(fields.get("Version", "")):
        raise Untrusted(f"{where}: Version: {fields.get('Version', '')[:120]!r} is none")
    if fields.get("Architecture") not in (architecture, "all"):
        raise Untrusted(f"{where}: it is for {fields.get('Architecture')!r}, in the index of {architecture}")
    priority = fields.get("Priority", "")
    package = Package(
        name=name,
        version=fields["Version"],
        architecture=fields["Architecture"],
        filename=need("Filename", _FILENAME).removeprefix("./"),
        size=int(need("Size", r"[0-9]{1,13}")),
        sha256=need("SHA256", _SHA256),
        essential=fields.get("Essential") == "yes",
        multi_arch=fields.get("Multi-Arch", "no"),
        priority=priority,
        archive=packages.archive,
    )
    depends = [*relations(fields.get("Pre-Depends", ""), where), *relations(fields.get("Depends", ""), where)]
    conflicts = [*relations(fields.get("Conflicts", ""), where), *relations(fields.get("Breaks", ""), where)]
    return Paragraph(
        package,
        important="yes" in (fields.get("Important"), fields.get("Protected")),
        depends=tuple(depends),
        conflicts=tuple(relation for group in conflicts for relation in group),
        provides=tuple(relation for group in relations(fields.get("Provides", ""), where) for relation in group),
        rank=_PRIORITIES.get(priority, 5 if priority else 0),
    )


def relations(text: str, where: str) -> tuple[Group, ...]:
    """A relationship field: groups separated by commas, alternatives by bars. deb-control(5)"""
    groups = (part.strip() for part in text.split(","))
    return tuple(tuple(_relation(part.strip(), where) for part in group.split("|")) for group in groups if group)


# --- helpers --------------------------------------------------------------------------------------------------------


def _relation(text: str, where: str) -> Relation:
    match = _RELATION.fullmatch(text)
    if match is None or (match[4] and not version.is_version(match[4])):
        raise Untrusted(f"{where}: not a relation to a package: {text[:120]!r}")
    return Relation(*match.groups())


def _paragraph(packages: Packages, start: int) -> bytes:
    stop = packages.data.find(b"\n\n", start, start + PARAGRAPH_MAX)
    if stop < 0 and len(packages.data) - start > PARAGRAPH_MAX:
        raise Untrusted(f"{packages.suite}: Packages: a paragraph of more than {PARAGRAPH_MAX} bytes at byte {start}")
    return packages.data[start : stop if stop >= 0 else len(packages.data)]


def _fields(raw: bytes, where: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    key = ""
    for line in raw.decode("utf-8", "replace").rstrip("\n").split("\n"):
        if line[:1] in (" ", "\t") and key:
            fields[key] += " " + line.strip()
            continue
        match = _FIELD.fullmatch(line)
        if match is None or match[1] in fields:
            raise Untrusted(f"{where}: not a field, or one said twice: {line[:120]!r}")
        key = match[1]
        fields[key] = match[2].strip()
    return fields


def _same(a: Package, b: Package) -> bool:
    return (a.sha256, a.size, a.architecture) == (b.sha256, b.size, b.architecture)


def _everywhere(data: bytes, what: bytes) -> Iterator[int]:
    at = data.find(what)
    while at >= 0:
        yield at
        at = data.find(what, at + 1)


def _start(data: bytes, at: int) -> int:
    """Where the paragraph begins that holds byte `at`."""
    return data.rfind(b"\n\n", 0, at) + 2 if data.rfind(b"\n\n", 0, at) >= 0 else 0


def _name(data: bytes, start: int, stop: int) -> str:
    """Whose paragraph begins at `start`; "" where it doesn't say so."""
    at = start
    if not data.startswith(b"Package: ", start):
        at = data.find(b"\nPackage: ", start, stop) + 1 or stop
    end = data.find(b"\n", at, stop)
    return data[at + 9 : end if end >= 0 else stop].decode("ascii", "replace").strip()


def _name_at(data: bytes, at: int) -> str:
    stop = data.find(b"\n\n", at)
    return _name(data, _start(data, at), stop if stop >= 0 else len(data))


def _names_provided(files: Sequence[Packages]) -> dict[str, list[str]]:
    """Virtual name -> the names of packages with some version that provides it, in the order of the files."""
    provided: dict[str, dict[str, None]] = {}
    for packages in files:
        data = packages.data
        for at in _everywhere(data, b"\nProvides: "):
            line = data[at + 11 : data.find(b"\n", at + 1)].decode("ascii", "replace")
            provider = _name_at(data, at)
            for part in line.split(","):
                provided.setdefault(part.split("(")[0].strip(), {})[provider] = None
    return {name: list(providers) for name, providers in provided.items()}


def _mentions(packages: Packages, name: str) -> Iterator[tuple[int, tuple[int, int]]]:
    """(start of the paragraph, (field, place in it)) of the first paragraph that mentions `name`, if there is one."""
    data = packages.data
    own = min(packages.offsets.get(name, [len(data)]))  # its own paragraph does, so nothing behind it is the first
    at = data.find(name.encode(), 0, own)
    while at >= 0:
        line = data.rfind(b"\n", 0, at) + 1
        if data[line:at].split(b":")[0].decode("ascii", "replace") in _MENTIONS:
            start = _start(data, at)
            stop = data.find(b"\n\n", at)
            text = data[start : stop if stop >= 0 else len(data)].decode("ascii", "replace")
            if places := _places(text, name):
                yield start, min(places)
                return
        at = data.find(name.encode(), at + 1, own)
    if own < len(data):
        yield own, (-1, 0)


def _places(text: str, name: str) -> list[tuple[int, int]]:
    """Where a paragraph names `name` in a relationship: (field, place in it), as `_MENTIONS` counts them."""
    places = []
    for number, key in enumerate(_MENTIONS):
        if match := re.search(rf"(?m)^{key}: (.*)$", text):
            names = re.sub(r"\([^)]*\)", "", match[1])
            # "name:any" is another name in apt's cache.
            if word := re.search(rf"(?<![A-Za-z0-9+.:-]){re.escape(name)}(?![A-Za-z0-9+.:-])", names):
                places.append((number, word.start()))
    return places
