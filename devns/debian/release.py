"""Release files: what a suite holds, believed only once its signature, name, age and order have been checked."""

from __future__ import annotations

import calendar
import email.utils
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from devns.debian import openpgp
from devns.debian.errors import Untrusted
from devns.debian.mirrors import Ages

LIMIT = 4 << 20  # bytes of an InRelease file; Debian's largest has 150 KB

_ENTRY = re.compile(r" ([0-9a-f]{64}) +([0-9]{1,13}) ([A-Za-z0-9][A-Za-z0-9._+~:/-]*)")
_FIELD = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*):[ \t]*(.*)")


@dataclass(frozen=True)
class Entry:
    """A file that the Release vouches for."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Release:
    """A suite at one moment. `files` by their path beneath `dists/SUITE/`; times are seconds since the epoch.

    `name` is what errors and records call it; `priority` is what apt gives its versions when nobody pins any.
    """

    name: str
    date: int
    valid_until: int | None
    by_hash: bool
    files: Mapping[str, Entry]
    signers: tuple[str, ...]
    priority: int = 500


def read(
    data: bytes,
    *,
    suite: str,
    architecture: str,
    trust: openpgp.Trust,
    now: float,
    ages: Ages = Ages(),
    repository: str | None = None,
) -> Release:
    """The InRelease file `data` of `suite`. Untrusted unless it is signed, of this suite and not past its time.

    It is Debian's, or of the `repository` of this name. `now` is in seconds since the epoch.
    """
    name = f"{repository or suite}/InRelease"
    signed = openpgp.verify(data, trust, name=name, now=now)
    release = parse(signed.text, suite=suite, architecture=architecture, signers=signed.signers, repository=repository)
    # The signer's clock and ours: a Release of tomorrow would be kept as the newest, and lock out all until then.
    if ages.check_date and release.date > now + ages.future:
        raise Untrusted(
            f"{name}: it is of {utc(release.date)}, and now it is {utc(now)}",
            hint="this machine's clock is wrong? apt's Acquire::Check-Date \"false\" is heeded",
        )
    until = _until(release, ages)
    if ages.check_date and ages.check_until and until is not None and until < now:
        raise Untrusted(
            f"{name}: it was good until {utc(until)}, and now it is {utc(now)}",
            hint="the mirror has stood still, or this machine's clock is wrong; "
            'apt\'s Acquire::Check-Valid-Until "false" is heeded',
        )
    return release


def _until(release: Release, ages: Ages) -> int | None:
    """When it ends: as it says itself, within apt's Min-ValidTime and Max-ValidTime. apt.conf(5)"""
    until = release.valid_until
    if until is not None and ages.shortest:
        until = max(until, release.date + ages.shortest)
    if ages.longest:
        longest = release.date + ages.longest
        until = longest if until is None else min(until, longest)
    return until


def parse(
    text: bytes, *, suite: str, architecture: str, signers: tuple[str, ...] = (), repository: str | None = None
) -> Release:
    """A Release that is known to be signed. Untrusted unless it is the one of `suite` and has this architecture."""
    name = f"{repository or suite}/InRelease"
    fields, files = _fields(text, name)
    if repository is None:
        _refuse_all_but_debians(fields, suite, name)
    elif suite not in (fields.get("codename"), fields.get("suite")):
        said = " or ".join(filter(None, (fields.get("suite"), fields.get("codename")))) or "no suite"
        raise Untrusted(f"{name}: it is the file of {said}, not of {suite}", hint=f'suite = "{said.split()[-1]}"')
    has = fields.get("architectures", "").split()
    if architecture not in has and (repository is None or "all" not in has):
        raise Untrusted(f"{name}: {suite} has no {architecture}", hint=f"it has {fields.get('architectures')}")
    if not files:
        raise Untrusted(f"{name}: it has no SHA256 list; weaker ones are not read")
    date = _time(fields.get("date"))
    if date is None:
        raise Untrusted(f"{name}: its Date is missing or no date: {fields.get('date')!r}")
    until = _time(fields.get("valid-until"))
    if until is None and "valid-until" in fields:
        raise Untrusted(f"{name}: its Valid-Until is no date: {fields['valid-until']!r}")
    priority = 500
    if fields.get("notautomatic") == "yes":
        priority = 100 if fields.get("butautomaticupgrades") == "yes" else 1
    by_hash = fields.get("acquire-by-hash") == "yes"
    return Release(repository or suite, date, until, by_hash, files, signers, priority)


def _refuse_all_but_debians(fields: Mapping[str, str], suite: str, name: str) -> None:
    # A validly signed file of another suite is the classic substitution. The codename never changes; Suite does,
    # from stable to oldstable, but what hangs behind it doesn't.
    said = fields.get("codename", "")
    if said != suite:
        raise Untrusted(f"{name}: it is the file of {said or 'no suite'}, not of {suite}")
    if suite.partition("-")[2] != fields.get("suite", "").partition("-")[2]:
        raise Untrusted(f"{name}: it calls itself {fields.get('suite')!r}, which is no name of {suite}")
    if fields.get("origin") != "Debian" or fields.get("label") not in ("Debian", "Debian-Security"):
        raise Untrusted(f"{name}: it is not Debian's: origin {fields.get('origin')!r}, label {fields.get('label')!r}")
    if not {"main", "updates/main"} & set(fields.get("components", "").split()):  # security's name for it
        raise Untrusted(f"{name}: {suite} has no component main")


@dataclass(frozen=True)
class Listed:
    """A Packages file: as it must be in the end, and what can be fetched for it, (packing, entry), best first."""

    component: str
    architecture: str
    whole: Entry
    packed: tuple[tuple[str, Entry], ...]


def index(release: Release, architecture: str, component: str = "main") -> Listed:
    """The Packages file of `component`. One that the Release doesn't list by name, size and SHA256 is not there."""
    path = f"{component}/binary-{architecture}/Packages"
    if path not in release.files:
        raise Untrusted(f"{release.name}/InRelease: it does not list {path}")
    packed = [(kind, release.files.get(path + kind)) for kind in (".xz", ".gz", "")]
    found = tuple((kind, entry) for kind, entry in packed if entry is not None)
    return Listed(component, architecture, release.files[path], found)


def indexes(release: Release, architecture: str, components: Sequence[str]) -> tuple[Listed, ...]:
    """The Packages files of a repository. Where it lists one for "all", what is in there need not be in the others."""
    found = []
    for component in components:
        has = [name for name in (architecture, "all") if f"{component}/binary-{name}/Packages" in release.files]
        found += [index(release, name, component) for name in has or [architecture]]
    return tuple(found)


# --- rollback -------------------------------------------------------------------------------------------------------


def refuse_older(release: Release, directory: str) -> None:
    """Untrusted where a newer Release of this suite was verified before: old data, well signed, is an attack."""
    path = _record(directory, release.name)
    try:
        with open(path, encoding="utf-8") as file:
            seen = json.load(file)["date"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or one that a crash cut short
        return
    if isinstance(seen, int) and release.date < seen:
        raise Untrusted(
            f"{release.name}/InRelease: it is of {utc(release.date)}, older than the one of {utc(seen)} seen before",
            hint=f"try again later; to accept the older one: rm {path}",
        )


def remember(release: Release, directory: str) -> None:
    """Keep the date of a verified Release for `refuse_older`."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    path = _record(directory, release.name)
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"date": release.date, "signers": release.signers}, file)
    os.replace(temporary, path)


def utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


# --- helpers --------------------------------------------------------------------------------------------------------


def _record(directory: str, name: str) -> str:
    """Of a suite of Debian's by its name, of a repository's by the hash of where it is."""
    if "/" in name:
        name = f"repository-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    return f"{directory}/{name}.json"


def _fields(text: bytes, name: str) -> tuple[dict[str, str], dict[str, Entry]]:
    """The fields of the one stanza by lower-case name, and its SHA256 list."""
    try:
        lines = text.decode("utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise Untrusted(f"{name}: it is no UTF-8: {error}") from error
    fields: dict[str, str] = {}
    files: dict[str, Entry] = {}
    field = ""
    for line in lines:
        if line.startswith(" "):
            if field == "sha256":
                _add(files, line, name)
            continue
        match = _FIELD.fullmatch(line)
        if match is None:  # an empty line would begin a second stanza
            raise Untrusted(f"{name}: not a Release file: {line[:80]!r}")
        field = match[1].lower()
        if field in fields:
            raise Untrusted(f"{name}: it says {match[1]} twice")
        fields[field] = match[2].strip()
    return fields, files


def _add(files: dict[str, Entry], line: str, name: str) -> None:
    match = _ENTRY.fullmatch(line)
    if match is None or ".." in match[3].split("/"):
        raise Untrusted(f"{name}: not a line of a SHA256 list: {line[:120]!r}")
    entry = Entry(match[3], match[1], int(match[2]))
    if files.setdefault(entry.path, entry) != entry:
        raise Untrusted(f"{name}: it lists {entry.path} twice, differently")


def _time(text: str | None) -> int | None:
    """A date as Release files write it: "Sat, 11 Jul 2026 10:16:37 UTC"."""
    parsed = email.utils.parsedate_tz(text) if text else None
    if parsed is None or not re.search(r"(?:UTC|GMT|\+0000)$", text or ""):
        return None
    try:
        return calendar.timegm((*parsed[:6], 0, 0, 0))
    except (ValueError, OverflowError):
        return None
