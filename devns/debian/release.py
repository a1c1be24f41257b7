"""Release files: what a suite holds, believed only once its signature, name, age and order have been checked."""

from __future__ import annotations

import calendar
import email.utils
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from devns.debian import openpgp
from devns.debian.errors import Untrusted

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
    """A suite at one moment. `files` by their path beneath `dists/SUITE/`; times are seconds since the epoch."""

    suite: str
    date: int
    valid_until: int | None
    by_hash: bool
    files: Mapping[str, Entry]
    signers: tuple[str, ...]


def read(
    data: bytes,
    *,
    suite: str,
    architecture: str,
    trust: openpgp.Trust,
    now: float,
    fresh: bool = True,
) -> Release:
    """The InRelease file `data` of `suite`. Untrusted unless it is signed, of this suite and not past its time.

    `now` is in seconds since the epoch; `fresh=False` leaves Valid-Until unread, as apt's Acquire::Check-Valid-Until.
    """
    name = f"{suite}/InRelease"
    signed = openpgp.verify(data, trust, name=name, now=now)
    release = parse(signed.text, suite=suite, architecture=architecture, signers=signed.signers)
    if fresh and release.valid_until is not None and release.valid_until < now:
        raise Untrusted(
            f"{name}: it was good until {utc(release.valid_until)}, and now it is {utc(now)}",
            hint="the mirror has stood still, or this machine's clock is wrong",
        )
    return release


def parse(text: bytes, *, suite: str, architecture: str, signers: tuple[str, ...] = ()) -> Release:
    """A Release that is known to be signed. Untrusted unless it is the one of `suite` and has this architecture."""
    name = f"{suite}/InRelease"
    fields, files = _fields(text, name)

    # A validly signed file of another suite is the classic substitution. The codename never changes; Suite does,
    # from stable to oldstable, but what hangs behind it doesn't.
    said = fields.get("codename", "")
    if said != suite:
        raise Untrusted(f"{name}: it is the file of {said or 'no suite'}, not of {suite}")
    if suite.partition("-")[2] != fields.get("suite", "").partition("-")[2]:
        raise Untrusted(f"{name}: it calls itself {fields.get('suite')!r}, which is no name of {suite}")
    if fields.get("origin") != "Debian" or fields.get("label") not in ("Debian", "Debian-Security"):
        raise Untrusted(f"{name}: it is not Debian's: origin {fields.get('origin')!r}, label {fields.get('label')!r}")
    if architecture not in fields.get("architectures", "").split():
        raise Untrusted(f"{name}: {suite} has no {architecture}", hint=f"it has {fields.get('architectures')}")
    if not {"main", "updates/main"} & set(fields.get("components", "").split()):  # security's name for it
        raise Untrusted(f"{name}: {suite} has no component main")
    if not files:
        raise Untrusted(f"{name}: it has no SHA256 list; weaker ones are not read")
    date = _time(fields.get("date"))
    if date is None:
        raise Untrusted(f"{name}: its Date is missing or no date: {fields.get('date')!r}")
    until = _time(fields.get("valid-until"))
    if until is None and "valid-until" in fields:
        raise Untrusted(f"{name}: its Valid-Until is no date: {fields['valid-until']!r}")
    return Release(suite, date, until, fields.get("acquire-by-hash") == "yes", files, signers)


def index(release: Release, architecture: str) -> tuple[Entry, tuple[tuple[str, Entry], ...]]:
    """The Packages file of main as it must be in the end, and what can be fetched for it, (packing, entry), best first.

    An index that the Release doesn't list by name, size and SHA256 is not there.
    """
    path = f"main/binary-{architecture}/Packages"
    if path not in release.files:
        raise Untrusted(f"{release.suite}/InRelease: it does not list {path}")
    packed = [(kind, release.files.get(path + kind)) for kind in (".xz", ".gz", "")]
    return release.files[path], tuple((kind, entry) for kind, entry in packed if entry is not None)


# --- rollback -------------------------------------------------------------------------------------------------------


def refuse_older(release: Release, directory: str) -> None:
    """Untrusted where a newer Release of this suite was verified before: old data, well signed, is an attack."""
    path = _record(directory, release.suite)
    try:
        with open(path, encoding="utf-8") as file:
            seen = json.load(file)["date"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or one that a crash cut short
        return
    if isinstance(seen, int) and release.date < seen:
        raise Untrusted(
            f"{release.suite}/InRelease: it is of {utc(release.date)}, older than the one of {utc(seen)} seen before",
            hint=f"try again later; to accept the older one: rm {path}",
        )


def remember(release: Release, directory: str) -> None:
    """Keep the date of a verified Release for `refuse_older`."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    path = _record(directory, release.suite)
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"date": release.date, "signers": release.signers}, file)
    os.replace(temporary, path)


def utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


# --- helpers --------------------------------------------------------------------------------------------------------


def _record(directory: str, suite: str) -> str:
    return f"{directory}/{suite}.json"


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
