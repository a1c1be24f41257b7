"""Whose signature counts, and on what."""

from __future__ import annotations

import builtins
import textwrap
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any

import pysequoia
import pytest

from devns.debian import openpgp
from devns.debian.errors import Untrusted
from devns.errors import Unsupported
from tests.pure.test_debian_kit import NOW, Signer

SIGNER = Signer()
STRANGER = Signer()
TEXT = b"Origin: Debian\nLabel: Debian\nSuite: stable\n"
SIGNED = SIGNER.sign(TEXT)
BLOCK = b"Origin: Evil\nSuite: evil\n"
# Seconds since the epoch: within the life of the key that has expired, see below.
EARLY_2025 = datetime(2025, 2, 1, tzinfo=timezone.utc).timestamp()


def verify(data: bytes, trust: openpgp.Trust = SIGNER.trust, *, now: float = NOW) -> openpgp.Signed:
    return openpgp.verify(data, trust, name="test", now=now)


def test_the_text_comes_out_as_it_was_signed_with_who_signed_it() -> None:
    signed = verify(SIGNED)
    assert (signed.text.rstrip(b"\n"), signed.signers) == (TEXT.rstrip(b"\n"), (SIGNER.fingerprint,))


@pytest.mark.parametrize(
    ("case", "data"),
    [
        ("text before", BLOCK + SIGNED),
        ("an empty line before", b"\n" + SIGNED),
        ("text behind", SIGNED + BLOCK),
        ("an empty line and text behind", SIGNED + b"\n" + BLOCK),
        ("two blocks", SIGNED + SIGNED),
        ("a stranger's block before", STRANGER.sign(BLOCK) + SIGNED),
        ("a header that looks like a field", SIGNED.replace(b"\n\n", b"\nOrigin: Evil\n\n", 1)),
        ("a comment header", SIGNED.replace(b"\n\n", b"\nComment: x\n\n", 1)),
        ("no empty line after the header", SIGNED.replace(b"\n\n", b"\n", 1)),
        ("a dash-escaped line", SIGNED.replace(b"Origin", b"- Origin", 1)),
        ("a line that begins with a dash", SIGNED.replace(b"Origin", b"-Origin", 1)),
        ("a second beginning inside", SIGNED.replace(b"Label", b"-----BEGIN PGP SIGNED MESSAGE-----\nLabel", 1)),
        ("carriage returns", SIGNED.replace(b"\n", b"\r\n")),
        ("a carriage return inside", SIGNED.replace(b"Debian\n", b"Debian\r\n", 1)),
        ("a NUL", SIGNED.replace(b"Debian", b"Deb\0an", 1)),
        ("a line of a megabyte", SIGNED.replace(b"Origin", b"X" * (1 << 20) + b"Origin", 1)),
        ("no signature", TEXT),
        ("an inline message", pysequoia.sign(SIGNER.secret.signer(), TEXT)),
        ("the signature block alone", SIGNED[SIGNED.index(b"-----BEGIN PGP SIGNATURE") :]),
        ("the first half", SIGNED[: len(SIGNED) // 2]),
        ("all but the end", SIGNED[:-40]),
        ("nothing", b""),
        ("a web page", b"<html>log in to the hotel's network</html>"),
    ],
)
def test_S_14_a_signed_file_in_another_shape_than_debians_is_refused(case: str, data: bytes) -> None:
    with pytest.raises(Untrusted):
        verify(data)


def test_S_14_spaces_that_no_signature_covers_do_not_change_what_comes_out() -> None:
    fields = [line.strip() for line in verify(SIGNED.replace(b"Debian\n", b"Debian \t\n", 1)).text.split(b"\n")]
    assert fields == [line.strip() for line in verify(SIGNED).text.split(b"\n")]


@pytest.mark.parametrize("at", range(0, len(TEXT) - 1, 3))
def test_S_01_one_changed_bit_of_the_text_is_refused(at: int) -> None:
    place = SIGNED.index(TEXT[:20]) + at
    changed = bytes([*SIGNED[:place], SIGNED[place] ^ 1, *SIGNED[place + 1 :]])
    with pytest.raises(Untrusted):
        verify(changed)


def test_S_13_the_text_of_one_signature_under_another_is_refused() -> None:
    other = SIGNER.sign(b"Origin: Debian\nLabel: Debian\nSuite: testing\n")
    middle = b"-----BEGIN PGP SIGNATURE"
    with pytest.raises(Untrusted):
        verify(SIGNED[: SIGNED.index(middle)] + other[other.index(middle) :])


def test_S_15_a_key_that_nobody_trusts_is_refused() -> None:
    with pytest.raises(Untrusted, match="not signed by a key that is good for it"):
        verify(STRANGER.sign(TEXT))


def test_S_16_a_key_of_the_ring_whose_fingerprint_is_not_pinned_is_refused() -> None:
    ring = openpgp.Trust((SIGNER.certificate, STRANGER.certificate), frozenset({SIGNER.fingerprint}))
    verify(SIGNED, ring)
    with pytest.raises(Untrusted):
        verify(STRANGER.sign(TEXT), ring)


def test_S_16_a_pinned_fingerprint_without_its_certificate_is_no_key() -> None:
    with pytest.raises(Untrusted):
        verify(SIGNED, openpgp.Trust((STRANGER.certificate,), frozenset({SIGNER.fingerprint})))


def test_S_16_every_suite_has_its_own_keys_and_they_are_shipped() -> None:
    trusts = {suite: openpgp.pinned(suite) for suite in openpgp.PINS}
    for trust in trusts.values():
        shipped = {pysequoia.Cert.from_bytes(certificate).fingerprint for certificate in trust.certificates}
        assert shipped == trust.fingerprints
    for release in ("bookworm", "trixie"):
        assert not trusts[f"{release}-security"].fingerprints & trusts[release].fingerprints
        assert trusts[f"{release}-updates"].fingerprints < trusts[release].fingerprints
    assert not trusts["bookworm"].fingerprints & trusts["trixie"].fingerprints


def test_S_16_no_shipped_key_signs_with_an_algorithm_that_is_refused_or_is_revoked() -> None:
    for suite in openpgp.PINS:
        for certificate in openpgp.pinned(suite).certificates:
            read = pysequoia.Cert.from_bytes(certificate)
            assert not read.is_revoked
            assert read.expiration is not None


def test_S_26_without_the_verifier_nothing_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "pysequoia":
            raise ImportError("No module named 'pysequoia'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(Unsupported, match="signatures can't be checked") as caught:
        verify(SIGNED)
    assert caught.value.hint == "pip install pysequoia"


def test_several_signatures_need_one_that_counts() -> None:
    both = openpgp.Trust((SIGNER.certificate, STRANGER.certificate), frozenset({SIGNER.fingerprint}))
    assert verify(SIGNED, both).signers == (SIGNER.fingerprint,)


# --- keys that were good once ---------------------------------------------------------------------------------------
# Made with gpg --faked-system-time 20250101T000000! --allow-weak-digest-algos, each the certificate and "Origin: test"
# signed by it. The first expired on 2025-06-01; the second was revoked later.

WORN = MappingProxyType(
    {
        "expired": (
            """
            -----BEGIN PGP PUBLIC KEY BLOCK-----

            mDMEZ3SFgBYJKwYBBAHaRw8BAQdA4jxxx2G54TizL+KQJv+juKax21G8kaW+FnYK
            7SXHmg20HmV4cGlyZWQgPGV4cGlyZWRAdGVzdC5pbnZhbGlkPoiWBBMWCAA+FiEE
            pSPPDQ6q3A90TZDE9cvN3E/O3woFAmd0hYACGwMFCQDHu0AFCwkIBwIGFQoJCAsC
            BBYCAwECHgECF4AACgkQ9cvN3E/O3wqTbQD/UsFIMKmq6klSz/1HlAEUSFXIXl1X
            yg39KVpNv5IuG/4BAIwanaJwZvZEiRfZ+cgs70LZC/FVO7EP55VKZ3P2PXAP
            =Uxd7
            -----END PGP PUBLIC KEY BLOCK-----
            """,
            """
            -----BEGIN PGP SIGNED MESSAGE-----
            Hash: SHA256

            Origin: test
            -----BEGIN PGP SIGNATURE-----

            iHUEARYIAB0WIQSlI88NDqrcD3RNkMT1y83cT87fCgUCZ3SFgAAKCRD1y83cT87f
            CjM8AP9YApNnKVzudisViNZyNphQpSbMM8cRIajLLTtuf+8M8gD/Ztj3icJovdF6
            cTsqInaJbh1zGZ+BKWDQL4KjScCRLAU=
            =d/9g
            -----END PGP SIGNATURE-----
            """,
            "a523cf0d0eaadc0f744d90c4f5cbcddc4fcedf0a",
        ),
        "revoked": (
            """
            -----BEGIN PGP PUBLIC KEY BLOCK-----

            mDMEZ3SFgBYJKwYBBAHaRw8BAQdAgCMRyQvep/Qxvf6v8RUyiDvkt92O65OCM0a4
            LGC1lfeIeAQgFggAIBYhBM62CdYTiUPRIuLZx4+HF9NhwBwOBQJrBKogAh0AAAoJ
            EI+HF9NhwBwOhhYA/iXJQGdhHUcAjl/qE7dc9EnmsEZB6x7vKmWYNy7zBJMTAP4+
            4+L+Ovi+QBEAH/BWZ5cyUX1VuWHvDumhLtMSdA4vBrQecmV2b2tlZCA8cmV2b2tl
            ZEB0ZXN0LmludmFsaWQ+iJAEExYIADgWIQTOtgnWE4lD0SLi2cePhxfTYcAcDgUC
            Z3SFgAIbAwULCQgHAgYVCgkICwIEFgIDAQIeAQIXgAAKCRCPhxfTYcAcDq+qAQDi
            +WgQOat3Zwc5lfnnfgL3WbTyeuVMJ0NvYAKxl6JwsQEAsdYaGEVjRxGqSxOY9U69
            6qzvgm0IwJxAi260kw2BPAc=
            =Zry/
            -----END PGP PUBLIC KEY BLOCK-----
            """,
            """
            -----BEGIN PGP SIGNED MESSAGE-----
            Hash: SHA256

            Origin: test
            -----BEGIN PGP SIGNATURE-----

            iHUEARYIAB0WIQTOtgnWE4lD0SLi2cePhxfTYcAcDgUCZ3SFgAAKCRCPhxfTYcAc
            DtdyAQC3+BYZXBXENtK9tCzeSbVfZ25+PPasIdFDdVVxNhhzCgD9GL/oIEvTgv0g
            1e2UZNVYvnVfc0DqChOV85lmcN+/oAI=
            =Kyo3
            -----END PGP SIGNATURE-----
            """,
            "ceb609d6138943d122e2d9c78f8717d361c01c0e",
        ),
        "sha1data": (
            """
            -----BEGIN PGP PUBLIC KEY BLOCK-----

            mDMEZ3SFgBYJKwYBBAHaRw8BAQdAmYbt0rjubqpISzU6EKkwWK9cC17EzZvmB7yS
            eiceR1m0IHNoYTFkYXRhIDxzaGExZGF0YUB0ZXN0LmludmFsaWQ+iJAEExYIADgW
            IQQ+rlnoOu84722cAAsO4lsNtyH8hgUCZ3SFgAIbAwULCQgHAgYVCgkICwIEFgID
            AQIeAQIXgAAKCRAO4lsNtyH8hhH6AP9S1GEec5CYu0+JZKOhXvm2XQ6iNDcF25/L
            5do0XxvPEQEAmw1xCaFjfXuZA1IFwDZOi+AGRxsdPo1tyoqQ5638mgY=
            =tNi0
            -----END PGP PUBLIC KEY BLOCK-----
            """,
            """
            -----BEGIN PGP SIGNED MESSAGE-----
            Hash: SHA1

            Origin: test
            -----BEGIN PGP SIGNATURE-----

            iHUEARYCAB0WIQQ+rlnoOu84722cAAsO4lsNtyH8hgUCZ3SFgAAKCRAO4lsNtyH8
            hlgMAP4gawRCMB8Ttf6/JqET2sQ9a5anFgbE0C914aIfAsnEXAEA3KBoak4kubtA
            Jy5VcY1cgJV93te/6wjhYWnVu611pQs=
            =A1gU
            -----END PGP SIGNATURE-----
            """,
            "3eae59e83aef38ef6d9c000b0ee25b0db721fc86",
        ),
        "sha1bind": (
            """
            -----BEGIN PGP PUBLIC KEY BLOCK-----

            mQENBGd0hYABCAD0cSFQjzrM6jVaM5sNHIdEGIaZny1PW57WAibluGfx4XoczRTK
            paI8//5oTrxHizdp+qm1ShzJuZHI52moVSucR0YJ3gHQQQ7cAOw/QAolY4sW2U+D
            JEWVkYiDufx5HFRTk+FttbtCZbYqTty4s79e9qRFnIzopZxkeTHWh3EPdBsEhj/C
            B+72avJMEVf3pDqEwVYZiDk+bRnUwHtNBbnZTO4DrJu5nGnuCc55IIbwSTP85wiQ
            ly6ReZArjXnuzXBPgXU9ioSLy9hs/Uh43SSe3wT7TXQKPbyTg22aHnJ1GMltRIF3
            LGXMe7vKLHSSCY+6KputFbjgoqRjhrzcsjtNABEBAAG0IHNoYTFiaW5kIDxzaGEx
            YmluZEB0ZXN0LmludmFsaWQ+iQFOBBMBAgA4FiEEGvY96KmrDf8sGS53shzxw1gY
            yb4FAmd0hYACGwMFCwkIBwIGFQoJCAsCBBYCAwECHgECF4AACgkQshzxw1gYyb6a
            EggA0ag7EfpJZXzDRjVUAxAgOMAGq46sQWuj5RPXXwSNYXSA//jzet/xnVGb6hPU
            60gfb2FtajZBx33FMDXKprHAdLm/1y8CAOdaYhuktA/tUYbsz2hq23t2BOH6zmH+
            FjFfu05jR8VOQ+r0T11QDDtgy3/kJ/taj+OC2nkV0R7Y1j5f/XdDo2AFWVqQgAuH
            MHDGpNWgf4Jx80ZkaCcqguDE4H8jOKnJ3/oRh84vYOJ2Xv491EsjcL5hecOFxCEa
            vthNXcn/zSA+EVt7lc/gYRTC2rNLmV+FN1Pyk3GXTRJoqXsHZpf/7qb00y71xOfW
            HfmTympPHagsXWwaIc8QZgEXGw==
            =CLgn
            -----END PGP PUBLIC KEY BLOCK-----
            """,
            """
            -----BEGIN PGP SIGNED MESSAGE-----
            Hash: SHA256

            Origin: test
            -----BEGIN PGP SIGNATURE-----

            iQEzBAEBCAAdFiEEGvY96KmrDf8sGS53shzxw1gYyb4FAmd0hYAACgkQshzxw1gY
            yb7g4wgAjfKjZk3WMCEHesqc7wfEqtpHZ1d+fPT40tQbsljwai/jnzFMkV3cQ67x
            kKCLvS9FBGJcjzF/AeQ9vZfccwIm4TQj25ZnBo7nX/LoF8Dg7cYW73qQKQdN2qJg
            EqCnoBL7PFbzNcGBkdU8bR6inbpbZJ4q2xJj9YbmP1XjNo5qELLDyqSjxNpEDlKl
            4PZ3k/X63nF0mcfWXFWydXEm9a3IeCTPOvGuDemhlFAeQyRPN+14t6uNJ4ASWDX4
            Y7WfVkUoU46pUSSax27OpX0E3PadEnVyr1UH41TMDh2WhtflxywtAWhcLEuh3uUf
            PUq3Z0wigjV3PJ8+5H+oF0JEaHuEeA==
            =nQSs
            -----END PGP SIGNATURE-----
            """,
            "1af63de8a9ab0dff2c192e77b21cf1c35818c9be",
        ),
        "md5data": (
            """
            -----BEGIN PGP PUBLIC KEY BLOCK-----

            mQENBGd0hYABCAC4p6U0GY4CXP2+PVcRQEl8Wzb3jnyeGJu1XbWWQAZ/9GWcIRDe
            5/5ultym3IA454IxikOuopW+NYOtMl60tyArPQR1CYJbFZc44kOnwZXkF5MUw5rD
            4rhOTx0pcokGuvWaXqRuSd7M8A4Xo/4WSvUEfMPDTTalH4eZZqYvwaITIdP77tyq
            ldqOj4eVG+XbRA4y/Q+lEO5XRawewBeHU2pzRc5OXqUTR7/H39UzTKYe2qGLd6cK
            Gs6RFhBUmesHx73G/dbFxteE8O4Gs4yQGjZqM4wweK5JquESLTX94qP6ABlHym11
            owD+SZAKOa3Za2alc+utliS1oMqXMqz+Vu/JABEBAAG0Hm1kNWRhdGEgPG1kNWRh
            dGFAdGVzdC5pbnZhbGlkPokBTgQTAQgAOBYhBLeb+OVzjWbFpOeMHY0pbMdKcx8T
            BQJndIWAAhsDBQsJCAcCBhUKCQgLAgQWAgMBAh4BAheAAAoJEI0pbMdKcx8TXXQI
            AJjQDKhSbY9RTw2u7rJFVfSicbB/X0AdYOv2MX17PHXoNVIpPyhKrAHUTlOlOfZA
            IIgMl5wfhGpSiS4isLy5Vf+NS/SX3wEkqPIjyyqB0qs/IKlLaVWj2ezcihN6aRKC
            QLmsRPR1Cb2EE1/8fVKbwr8PTuPr+tBjip2shpEB6n/8HpSm9PmD6rKV5934YGeN
            4pp+5S5BjETJpEIQynEjsJJKvRhOZokOiSdYAqtOby4SRqgkl33Fz2Md112CMaRb
            IDqZzEHdFayF4JBq+nq2QuuaEmTlt+bhOfAU/4JQ0eJ+5zFAvZtPrtsj8Zrd3Gzi
            TpqnDdVlXJ8aczJ8e8BbgyY=
            =r/dl
            -----END PGP PUBLIC KEY BLOCK-----
            """,
            """
            -----BEGIN PGP SIGNED MESSAGE-----
            Hash: MD5

            Origin: test
            -----BEGIN PGP SIGNATURE-----

            iQEzBAEBAQAdFiEEt5v45XONZsWk54wdjSlsx0pzHxMFAmd0hYAACgkQjSlsx0pz
            HxMk7Qf9GdX5hW/ddpaRkTkBFixNrco59wG5S2VxJOOR/mR6etSI/Fq7mDEsjePq
            xz/bTit7yRP3VgDVxaT20sanE5JXg9eFjPln8vn0ekR6UPI1Qftp8nj/XZAMX8eM
            wwqMerTWXM7L3DSBqMDZ3J8AvfVrwVArFVg5Ps9qICsG/TCB0gjz5MqnwVaHwYC5
            kr6U8lktKX3XC8sYefGFymyQFSKFMLejo7CuLuzjxRizYAfFb6ArMuOWWG3XybqD
            yCusVHfRjJ4wFeNVI8UsoGGR85mOc4GdP0WbQauPjIxB42UTU8Gm0nG3uQ0fIygP
            e5vUk88XMxv8/vPdpgJRkUhujHLEDA==
            =vxFf
            -----END PGP SIGNATURE-----
            """,
            "b79bf8e5738d66c5a4e78c1d8d296cc74a731f13",
        ),
        "rsa1024": (
            """
            -----BEGIN PGP PUBLIC KEY BLOCK-----

            mI0EZ3SFgAEEANC5WSXURLnfxM+5DqNBEQJxEbBZUneEv727XXQZfQSdl5JmmVvt
            tx4YBH4oTCXQ6Ik3UdAZh5qQd3jPZcmk201RACjAX5TIJ19A2yw6VTZ8imt7MBc7
            FF9epuoozd3uCc7TSwJoY8vp7Kp3SBiCKz7ikUFI7Y/KO/NctIAzMoBpABEBAAG0
            HnJzYTEwMjQgPHJzYTEwMjRAdGVzdC5pbnZhbGlkPojOBBMBCAA4FiEEwzxyDhOf
            OcyjWlj/R75/szMuw90FAmd0hYACGwMFCwkIBwIGFQoJCAsCBBYCAwECHgECF4AA
            CgkQR75/szMuw90V3gQAmqzwLX1FPDSXcf+ZtsYxz0fYHD0CHKz9ZHDokv4XbOGI
            o9Yssn0O8p7u1bkm2zo641Cz2R7QHsiaH06zEH/QOsMudoNPpUSP7QdlbCtpJUXi
            Pg0GGyPSqYtta9qK7cKgXWokR7yzCfJSjyY38hkUduTExzYqpfFeh5FFgLorh4I=
            =Bp0L
            -----END PGP PUBLIC KEY BLOCK-----
            """,
            """
            -----BEGIN PGP SIGNED MESSAGE-----
            Hash: SHA256

            Origin: test
            -----BEGIN PGP SIGNATURE-----

            iLMEAQEIAB0WIQTDPHIOE585zKNaWP9Hvn+zMy7D3QUCZ3SFgAAKCRBHvn+zMy7D
            3VgVBACOZK7YDpk/xc0QWJ2Qsz+qqNhMBSoQGXcRV62ViwkJj1gg6P+whPv88ZYc
            OfiVe+QTrAE4kUzfEl9IUq5irLUdgNjbLvwAx35o/WxyqBC6uDuAJdogDZxyllQF
            2ObsYonY9b9vlcPxwCz+Fd1qbNpNOAQnyzQcXYJ/NPZ7XDnl8w==
            =v0SF
            -----END PGP SIGNATURE-----
            """,
            "c33c720e139f39cca35a58ff47be7fb3332ec3dd",
        ),
    }
)


def worn(name: str) -> tuple[bytes, openpgp.Trust]:
    certificate, signed, fingerprint = WORN[name]
    data = textwrap.dedent(signed).strip().encode() + b"\n"
    return data, openpgp.Trust((textwrap.dedent(certificate).strip().encode(),), frozenset({fingerprint}))


@pytest.mark.parametrize("name", WORN)
def test_S_15_a_key_or_signature_that_is_no_longer_good_is_refused(name: str) -> None:
    data, trust = worn(name)
    with pytest.raises(Untrusted, match="not signed by a key that is good for it"):
        verify(data, trust)


def test_S_15_an_expired_key_was_good_before() -> None:
    data, trust = worn("expired")
    assert verify(data, trust, now=EARLY_2025).text.rstrip(b"\n") == b"Origin: test"
