"""Who signed this? One way, used everywhere: Sequoia, asked for nothing but the keys pinned for one suite.

Keys are shipped with devns, never fetched, and pinned by the fingerprint of their primary key, so that a key that is
good for one suite says nothing about another. docs/decisions/0003-openpgp.md tells why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from devns.debian.errors import Untrusted
from devns.errors import Unsupported


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
class Signed:
    """What was signed, byte for byte as the verifier gave it out, and the primary fingerprints of who did."""

    text: bytes
    signers: tuple[str, ...]


def keys(pins: Sequence[Key]) -> tuple[bytes, ...]:
    """The shipped certificates of `pins`."""
    place = Path(__file__).parent / "keys"
    return tuple((place / pin.file).read_bytes() for pin in pins)


def verify(data: bytes, *, certificates: Sequence[bytes], fingerprints: Sequence[str], name: str) -> Signed:
    """The text that a cleartext-signed file carries. Untrusted unless one of `fingerprints` validly signed all of it.

    Only the bytes that come out here may be parsed: what stands before, after or between never reaches the caller.
    `certificates` are OpenPGP certificates, armored or not; one that isn't among the primary `fingerprints` is dropped.
    Expired and revoked keys, SHA-1 and MD5, short RSA keys and future signatures are refused by Sequoia's policy.
    """
    refuse_odd_shape(data, name)
    sequoia = _sequoia()
    wanted = {fingerprint.lower() for fingerprint in fingerprints}
    pinned = [cert for cert in map(sequoia.Cert.from_bytes, certificates) if cert.fingerprint.lower() in wanted]
    if not pinned:
        raise Untrusted(f"{name}: no key is known that could have signed it")
    try:
        result = sequoia.verify(bytes=data, store=lambda ids: pinned)
    except Exception as error:  # PyO3 turns every error of Sequoia's into RuntimeError, some into OSError
        raise Untrusted(
            f"{name}: not signed by a key that is good for it: {_first_line(error)}",
            hint="a mirror of something else, a damaged download, or a wrong clock on this machine",
        ) from error
    signers = tuple(str(signature.certificate).lower() for signature in result.valid_sigs)
    if not wanted.intersection(signers) or result.bytes is None:
        raise Untrusted(f"{name}: not signed by a key that is good for it")
    return Signed(bytes(result.bytes), signers)


def refuse_odd_shape(data: bytes, name: str) -> None:
    """Refuse all but the plain shape: one signed text, one signature block, nothing around them.

    The verifier copes with odder ones; a file that needs that isn't Debian's.
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
    raise Untrusted(f"{name}: not a file that Debian signs: {odd}", hint="what answers there is no Debian mirror")


def _sequoia():  # type: ignore[no-untyped-def]  # the module itself, imported where a build needs it
    try:
        import pysequoia
    except ImportError as error:
        raise Unsupported(
            f"Debian's signatures can't be checked here: {error}", hint="pip install pysequoia"
        ) from error
    return pysequoia


def _first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
