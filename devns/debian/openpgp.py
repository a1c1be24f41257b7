"""Who signed this? One way, used everywhere: Sequoia, asked for nothing but the keys pinned for one suite.

Debian's keys are shipped with devns, never fetched, and pinned by the fingerprint of their primary key, so that a key
that is good for one suite says nothing about another. docs/decisions/0003-openpgp.md tells why.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from devns.debian.errors import Untrusted
from devns.errors import TemplateError, Unsupported


@dataclass(frozen=True)
class Key:
    """One of Debian's keys: the file in `keys/`, and its primary fingerprint."""

    file: str
    fingerprint: str


_BOOKWORM = Key("bookworm-automatic.asc", "b8b80b5b623eab6ad8775c45b7c5d7d6350947f8")
_BOOKWORM_STABLE = Key("bookworm-stable.asc", "4d64fec119c2029067d6e791f8d2585b8783d481")
_BOOKWORM_SECURITY = Key("bookworm-security-automatic.asc", "05ab90340c0c5e797f44a8c8254cf3b5aec0a8f0")
_TRIXIE = Key("trixie-automatic.asc", "04b54c3cdca79751b16bc6b5225629df75b188bd")
_TRIXIE_STABLE = Key("trixie-stable.asc", "41587f7db8c774bccf131416762f67a0b2c39de4")
_TRIXIE_SECURITY = Key("trixie-security-automatic.asc", "5e04a1e3223a19a20706e20f9904613d4cce68c6")

# Debian signs a suite with the keys of the neighbouring releases too; a suite's own are enough.
PINS: dict[str, tuple[Key, ...]] = {
    "bookworm": (_BOOKWORM, _BOOKWORM_STABLE),
    "bookworm-updates": (_BOOKWORM,),
    "bookworm-security": (_BOOKWORM_SECURITY,),
    "trixie": (_TRIXIE, _TRIXIE_STABLE),
    "trixie-updates": (_TRIXIE,),
    "trixie-security": (_TRIXIE_SECURITY,),
}

_BEGIN = b"-----BEGIN PGP SIGNED MESSAGE-----\n"
_MIDDLE = b"\n-----BEGIN PGP SIGNATURE-----\n"
_END = b"\n-----END PGP SIGNATURE-----"
_HEADERS = re.compile(rb"(?:Hash: [A-Z0-9, -]{1,64}\n){0,8}\n")
_LINE_MAX = 1 << 16


@dataclass(frozen=True)
class Trust:
    """Who may sign one suite: OpenPGP certificates, armored or not, and the primary fingerprints that count."""

    certificates: tuple[bytes, ...]
    fingerprints: frozenset[str]


@dataclass(frozen=True)
class Signed:
    """What was signed, byte for byte as the verifier gave it out, and the primary fingerprints of who did."""

    text: bytes
    signers: tuple[str, ...]


def pinned(suite: str) -> Trust:
    """Debian's own keys for `suite`."""
    place, pins = Path(__file__).parent / "keys", PINS[suite]
    return Trust(tuple((place / pin.file).read_bytes() for pin in pins), frozenset(pin.fingerprint for pin in pins))


def verify(data: bytes, trust: Trust, *, name: str, now: float) -> Signed:
    """The text that a cleartext-signed file carries. Untrusted unless somebody of `trust` validly signed all of it.

    Only the bytes that come out here may be parsed: what stands before, after or between never reaches the caller.
    Revoked keys, SHA-1 and MD5, short RSA keys and signatures from the future are refused by Sequoia's policy; a key
    that has expired by `now` (seconds since the epoch) is refused here.
    """
    refuse_odd_shape(data, name)
    sequoia = _sequoia()
    refused = f"{name}: not signed by a key that is good for it"
    hint = "a mirror of something else, a damaged download, or a wrong clock on this machine"
    try:
        certificates = [sequoia.Cert.from_bytes(certificate) for certificate in trust.certificates]
        known = {c.fingerprint.lower(): c for c in certificates if c.fingerprint.lower() in trust.fingerprints}
        result = sequoia.verify(bytes=data, store=lambda ids: list(known.values()))
    except Exception as error:  # PyO3 makes every error of Sequoia's a RuntimeError, some an OSError or ValueError
        raise Untrusted(f"{refused}: {_first_line(error)}", hint=hint) from error
    signers = {s.certificate.lower(): s.signing_key for s in result.valid_sigs if s.certificate.lower() in known}
    # Sequoia asks whether a key was good when it says that it signed; whoever has an expired key can say anything.
    good = tuple(signer for signer, key in signers.items() if _expiry(known[signer], key) > now)
    if not good or result.bytes is None:
        raise Untrusted(f"{refused}: {'its key has expired' if signers else 'nobody known signed it'}", hint=hint)
    return Signed(bytes(result.bytes), good)


def pick(key: str, fingerprint: str, *, name: str) -> str:
    """The certificate in `key` that has this primary fingerprint, armored. TemplateError where there is none.

    `key` is a file as `Host.read` gives it: armored or not, one certificate or several.
    """
    try:
        certificates = _sequoia().Cert.split_bytes(key.encode("utf-8", "surrogateescape"))
    except (RuntimeError, ValueError, OSError) as error:  # whatever Sequoia's own error became
        raise TemplateError(f"{name}: no OpenPGP certificate: {_first_line(error)}") from error
    found = {certificate.fingerprint.lower(): certificate for certificate in certificates}
    if fingerprint not in found:
        others = ", ".join(sorted(found)[:4]) or "none"
        raise TemplateError(f"{name}: it has no key with the fingerprint {fingerprint}", hint=f"it has {others}")
    return str(found[fingerprint])


def refuse_odd_shape(data: bytes, name: str) -> None:
    """Refuse all but the plain shape: one signed text, one signature block, nothing around them.

    The verifier copes with odder ones; a file that needs that is no archive's.
    """
    body = data[len(_BEGIN) :]
    headers = _HEADERS.match(body)
    text, middle, rest = body.partition(_MIDDLE)
    armor, end, tail = rest.partition(_END)
    if not data.startswith(_BEGIN):
        odd = "it doesn't begin with a signed message" if data.strip() else "it is empty"
    elif headers is None:
        odd = "its header has lines other than Hash"
    elif not middle or not end:
        odd = "its signature is cut off"
    elif tail not in (b"", b"\n"):
        odd = "something stands behind its signature"
    elif b"\r" in data or b"\0" in data:
        odd = "it has carriage returns or NULs"
    elif b"\n-" in text[headers.end() - 1 :] or b"\n-" in armor:
        odd = "it has a line that begins with a dash"
    elif max(map(len, data.split(b"\n"))) > _LINE_MAX:
        odd = f"it has a line of more than {_LINE_MAX} bytes"
    else:
        return
    raise Untrusted(f"{name}: not a signed Release file: {odd}", hint="what answers there is no mirror of packages")


def _sequoia() -> ModuleType:
    """The library, imported only where something is verified: 9 MB."""
    try:
        import pysequoia
    except ImportError as error:
        raise Unsupported(f"Debian's signatures can't be checked: {error}", hint="pip install pysequoia") from error
    return pysequoia


def _expiry(certificate: Any, signing_key: str) -> float:
    """When the certificate or its subkey `signing_key` expires, in seconds since the epoch.

    The packets are read without checking them again, which can only shorten a key's life: they are from a pinned
    certificate, and Sequoia has verified those that it relied on.
    """
    from pysequoia.packet import PacketPile, Tag

    expires = certificate.expiration.timestamp() if certificate.expiration else math.inf
    bindings: dict[float, float] = {}  # when it was made, until when the subkey is good; the newest counts
    key: Any = None
    bound = False
    for packet in PacketPile.from_bytes(bytes(certificate)):
        if packet.tag in (Tag.PublicKey, Tag.PublicSubkey):
            key = packet
            bound = key.tag == Tag.PublicSubkey and key.fingerprint == signing_key
        elif packet.tag == Tag.Signature and bound and key.key_created and packet.key_validity_period:
            made = packet.signature_created.timestamp() if packet.signature_created else 0.0
            bindings[made] = (key.key_created + packet.key_validity_period).timestamp()
    return float(min(expires, bindings[max(bindings)] if bindings else math.inf))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
