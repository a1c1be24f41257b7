"""https to a mirror: who answers must be who was asked for, whatever apt here lets pass."""

from __future__ import annotations

import contextlib
import ssl
import warnings
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from devns.debian import mirrors
from devns.debian.errors import MirrorError
from devns.debian.transport import Session
from devns.errors import Unsupported
from tests.pure.test_debian_kit import Server, send, serving

if TYPE_CHECKING:
    from tests.conftest import MakeHost

DAY = timedelta(days=1)
NOW = datetime.now(timezone.utc)
OURS, THEIRS = trustme.CA(), trustme.CA()


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    """The file of the one CA that is believed."""
    path = tmp_path / "ca.pem"
    OURS.cert_pem.write_to_path(str(path))
    return str(path)


@contextlib.contextmanager
def mirror(ca: trustme.CA = OURS, name: str = "localhost", **said: Any) -> Iterator[Server]:
    """A mirror by https with a certificate of this name from this CA."""
    context = said.pop("context", None) or ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name, **said).configure_cert(context)
    with serving(
        {"/a": send(b"a"), "/down": send(b"", status=302, Location="http://localhost/a")}, tls=context
    ) as server:
        yield server


def read(url: str, route: mirrors.Route) -> bytes:
    with Session(route) as session:
        return session.read(url, limit=100)


def route(host: MakeHost, conf: str = "", environ: Mapping[str, str] = {}) -> mirrors.Route:
    machine = host({"/etc/apt/apt.conf": conf}, environ={"HOME": "/home/user", **environ})
    return mirrors.route(machine, mirrors.read_apt_conf(machine))


def test_a_certificate_of_the_bundle_is_believed(host: MakeHost, bundle: str) -> None:
    with mirror() as server:
        assert read(f"{server.url}/a", route(host, environ={"SSL_CERT_FILE": bundle})) == b"a"
        assert read(f"{server.url}/a", route(host, f'Acquire::https::CaInfo "{bundle}";')) == b"a"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"ca": THEIRS}, "unable to get local issuer certificate|self.signed"),
        ({"name": "other.test"}, "Hostname mismatch"),
        ({"name": "127.0.0.1"}, "Hostname mismatch"),
        ({"not_before": NOW - 2 * DAY, "not_after": NOW - DAY}, "expired"),
        ({"not_before": NOW + DAY, "not_after": NOW + 2 * DAY}, "not yet valid"),
    ],
)
@pytest.mark.parametrize("conf", ["", 'Acquire::https { Verify-Peer "false"; Verify-Host "false"; };'])
def test_S_11_a_certificate_that_is_not_good_is_refused_whatever_apt_is_told(
    host: MakeHost, bundle: str, said: dict[str, Any], why: str, conf: str
) -> None:
    with mirror(**said) as server:
        with pytest.raises(MirrorError, match=f"localhost: its certificate is not good: .*({why})") as caught:
            read(f"{server.url}/a", route(host, conf, {"SSL_CERT_FILE": bundle}))
        assert server.asked == []
    assert "SSL_CERT_FILE, or apt's Acquire::https::CaInfo" in (caught.value.hint or "")


def test_S_11_an_old_protocol_is_refused(host: MakeHost, bundle: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with mirror(context=context) as server:
        with pytest.raises(MirrorError, match="localhost: TLS failed"):
            read(f"{server.url}/a", route(host, environ={"SSL_CERT_FILE": bundle}))
        assert server.asked == []


def test_S_11_what_speaks_no_tls_is_no_mirror_by_https(host: MakeHost, bundle: str) -> None:
    with serving({"/a": send(b"a")}) as server:
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        with pytest.raises(MirrorError, match="TLS failed"):
            read(f"{url}/a", route(host, environ={"SSL_CERT_FILE": bundle}))


def test_S_10_a_redirect_from_https_to_http_is_not_followed(host: MakeHost, bundle: str) -> None:
    with mirror() as server, pytest.raises(MirrorError, match="it leads from https to http"):
        read(f"{server.url}/down", route(host, environ={"SSL_CERT_FILE": bundle}))


def test_the_certificate_that_apt_shows_is_shown(host: MakeHost, bundle: str, tmp_path: Path) -> None:
    mine = OURS.issue_cert("user@test.invalid")
    mine.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    mine.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    mine.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(bundle)
    environ = {"SSL_CERT_FILE": bundle}
    with mirror(context=context) as server:
        both = f'Acquire::https::SslCert "{tmp_path}/both.pem";'
        apart = f'Acquire::https {{ SslCert "{tmp_path}/cert.pem"; SslKey "{tmp_path}/key.pem"; }};'
        assert [read(f"{server.url}/a", route(host, conf, environ)) for conf in (both, apart)] == [b"a", b"a"]
        with pytest.raises(MirrorError):
            read(f"{server.url}/a", route(host, environ=environ))
    with pytest.raises(Unsupported, match="no certificate and key can be read") as caught:
        read("https://localhost/a", route(host, 'Acquire::https::SslCert "/nowhere.pem";', environ))
    assert "Acquire::https::SslCert" in (caught.value.hint or "")


def test_a_bundle_that_cannot_be_read_is_named(host: MakeHost) -> None:
    with pytest.raises(Unsupported, match=r"/nowhere\.pem: no CA certificates can be read"):
        read("https://localhost/a", route(host, environ={"SSL_CERT_FILE": "/nowhere.pem"}))
