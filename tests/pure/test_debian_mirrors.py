"""Where packages come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest

from devns.debian import mirrors
from devns.debian.mirrors import Ages
from devns.errors import TemplateError, Unsupported

if TYPE_CHECKING:
    from tests.conftest import MakeHost

SOURCES = "/etc/apt/sources.list.d/debian.sources"
DEB822 = """\
Types: deb deb-src
URIs: http://mirror.test/debian/
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 -----END PGP PUBLIC KEY BLOCK-----

# the second
Types: deb
URIs: http://mirror.test/debian-security
Suites: bookworm-security
Components: main
Check-Valid-Until: no
"""


def found(host: object) -> tuple[str, str]:
    mirror = mirrors.find(host)  # type: ignore[arg-type]  # the fixture's real Host
    return mirror.main, mirror.security


def environ(**said: str) -> Mapping[str, str]:
    return {"HOME": "/home/user", **said}


def test_the_hosts_deb822_sources_name_both_archives(host: MakeHost) -> None:
    mirror = mirrors.find(host({SOURCES: DEB822}))
    assert (mirror.main, mirror.security) == ("http://mirror.test/debian", "http://mirror.test/debian-security")
    assert [mirror.ages[name].check_until for name in ("main", "security", "")] == [True, False, True]


@pytest.mark.parametrize(
    "line",
    [
        "deb http://m.test/debian trixie main",
        "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://m.test/debian trixie main #",
        "deb\thttp://m.test/debian/   stable  contrib main",
        "deb [ trusted=yes ] http://m.test/debian bookworm-backports main",
    ],
)
def test_a_one_line_source_is_understood(host: MakeHost, line: str) -> None:
    assert found(host({"/etc/apt/sources.list": f"# first\n{line}\n"})) == (
        "http://m.test/debian",
        "http://m.test/debian-security",
    )


@pytest.mark.parametrize(
    "line",
    [
        "# deb http://m.test/debian trixie main",
        "deb-src http://m.test/debian trixie main",
        "deb http://m.test/ubuntu noble main",
        "deb http://m.test/debian noble main",
        "deb http://m.test/php bookworm main",
        "deb http://m.test/debian/12/prod bookworm main",
        "deb http://m.test/linux/debian bookworm stable",
        "deb cdrom:[Debian]/debian bookworm main",
        "deb http://m.test/debian",
        "deb ftp://m.test/debian bookworm main",
    ],
)
def test_an_entry_that_is_not_debians_or_of_no_use_is_passed_over(host: MakeHost, line: str) -> None:
    with pytest.raises(Unsupported, match="names no Debian mirror") as caught:
        mirrors.find(host({"/etc/apt/sources.list": line}))
    assert mirrors.VARIABLE in str(caught.value.hint)


def test_a_disabled_entry_is_passed_over(host: MakeHost) -> None:
    text = f"Enabled: no\n{DEB822.split('#')[0]}"
    with pytest.raises(Unsupported):
        mirrors.find(host({SOURCES: text, f"{SOURCES}.disabled": DEB822}))


def test_an_entry_that_names_debians_keys_comes_before_one_that_is_only_called_debian(host: MakeHost) -> None:
    text = (
        "deb https://vendor.test/debian bookworm main\n"
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] https://cache.test/remote bookworm main\n"
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] https://cache.test/sec bookworm-security main\n"
    )
    assert found(host({"/etc/apt/sources.list": text})) == ("https://cache.test/remote", "https://cache.test/sec")


def test_a_snapshots_url_is_an_archive(host: MakeHost) -> None:
    url = "http://snapshot.test/archive/debian/20250520T000000Z"
    security = "http://snapshot.test/archive/debian-security/20250520T000000Z"
    text = f"deb {url}/ bookworm main\ndeb {security}/ bookworm-security main\n"
    assert found(host({"/etc/apt/sources.list": text})) == (url, security)


def test_a_list_of_mirrors_on_this_machine_is_read(host: MakeHost) -> None:
    files = {
        "/etc/apt/sources.list": "deb mirror+file:/etc/apt/mirrors/debian.list trixie main\n",
        "/etc/apt/mirrors/debian.list": "# the near one\nhttps://near.test/debian\tpriority:1\nhttps://far.test/debian\n",
    }
    assert found(host(files))[0] == "https://near.test/debian"


def test_a_variable_beats_the_configuration_and_that_the_sources(host: MakeHost) -> None:
    config = '[debian]\nmirror = "https://config.test/debian"\nsecurity = "https://config.test/sec"\n'
    files = {SOURCES: DEB822, "/home/user/.config/devns/config.toml": config}
    assert found(host(files, environ=environ())) == ("https://config.test/debian", "https://config.test/sec")
    said = environ(DEVNS_DEBIAN_MIRROR="file:///srv/debian/")
    assert found(host(files, environ=said)) == ("file:///srv/debian", "file:///srv/debian-security")
    said = environ(DEVNS_DEBIAN_MIRROR="http://a.test/x", DEVNS_DEBIAN_SECURITY_MIRROR="http://b.test/y")
    assert found(host(files, environ=said)) == ("http://a.test/x", "http://b.test/y")


def test_a_mirror_whose_security_archive_cannot_be_guessed_asks_for_it(host: MakeHost) -> None:
    with pytest.raises(Unsupported) as caught:
        mirrors.find(host(environ=environ(DEVNS_DEBIAN_MIRROR="http://a.test/x")))
    assert mirrors.SECURITY_VARIABLE in str(caught.value.hint)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a.test/debian",
        "a.test/debian",
        "file://other/debian",
        "http://",
        "http://a.test/x?y",
        "http://a b/",
        "http://a:99999/",
        "http://[::1/",
        "x\n",
    ],
)
def test_a_url_that_is_no_mirrors_is_refused_by_its_variable(host: MakeHost, url: str) -> None:
    with pytest.raises(TemplateError, match=r"^\$DEVNS_DEBIAN_MIRROR: "):
        mirrors.find(host(environ=environ(DEVNS_DEBIAN_MIRROR=url)))


@pytest.mark.parametrize("text", ['debian = "x"', '[debian]\nmirrors = "x"', "[debian", "[debian]\nmirror = 3"])
def test_a_broken_configuration_is_refused_by_its_file(host: MakeHost, text: str) -> None:
    with pytest.raises(TemplateError, match=r"config\.toml: "):
        mirrors.find(host({"/home/user/.config/devns/config.toml": text}, environ=environ()))


APT_CONF = """\
// a comment; Acquire::http::Proxy "http://commented.test";
# another
#clear Acquire::x;
Acquire::http::Proxy "http://proxy.test:3142"; /* and
 a third */ Acquire { Check-Valid-Until "false"; http { Proxy::direct.test "DIRECT"; }; Languages { "none"; }; };
APT::NeverAutoRemove:: "^firmware.*";
"""


def test_apts_configuration_is_read_nested_or_not() -> None:
    assert mirrors.parse_apt_conf(APT_CONF) == {
        "acquire::http::proxy": "http://proxy.test:3142",
        "acquire::check-valid-until": "false",
        "acquire::http::proxy::direct.test": "DIRECT",
    }


def test_apts_proxy_comes_before_the_environments(host: MakeHost) -> None:
    machine = host(
        {
            SOURCES: DEB822.split("#")[0],
            "/etc/apt/apt.conf.d/10proxy": APT_CONF,
            "/etc/apt/apt.conf.d/x.bak": "nonsense",
        },
        environ=environ(http_proxy="http://env.test", https_proxy="http://tls.test", no_proxy="corp.test, .other.test"),
    )
    mirror = mirrors.find(machine)
    asked = [("http", "mirror.test"), ("http", "direct.test"), ("https", "mirror.test"), ("http", "a.corp.test")]
    assert [mirror.route.proxy(*place) for place in asked] == ["http://proxy.test:3142", None, "http://tls.test", None]
    assert [mirror.ages[name].check_until for name in ("main", "security", "")] == [False, False, False]


def test_apts_settings_for_the_age_of_a_release_are_heeded_those_of_the_entry_first(host: MakeHost) -> None:
    conf = """
        Acquire::Max-ValidTime "86400"; Acquire::Max-ValidTime::Debian-Security "3600";
        Acquire::Min-ValidTime "x"; Acquire::Max-FutureTime "5"; Acquire::Check-Date "false";
    """
    sources = DEB822.replace("Check-Valid-Until: no", "Valid-Until-Min: 60\nDate-Max-Future: 7\nCheck-Date: yes")
    ages = mirrors.find(host({SOURCES: sources, "/etc/apt/apt.conf": conf})).ages
    assert ages == {
        "": Ages(check_date=False, future=5, longest=86400),
        "main": Ages(check_date=False, future=5, longest=86400),
        "security": Ages(future=7, shortest=60, longest=3600),
    }


def test_the_file_that_apt_is_told_of_is_read_first(host: MakeHost) -> None:
    files = {"/a.conf": 'a "1"; b "1";', "/etc/apt/apt.conf.d/x": 'b "2"; c "2";', "/etc/apt/apt.conf": 'c "3";'}
    for said, first in (("/a.conf", {"a": "1"}), ("a.conf", {}), ("", {})):
        machine = host(files, environ=environ(APT_CONFIG=said))
        assert mirrors.read_apt_conf(machine) == {**first, "b": "2", "c": "3"}


def test_the_environments_proxy_is_used_where_apt_says_nothing(host: MakeHost) -> None:
    route = mirrors.route(host(environ=environ(http_proxy="proxy.test:8080", HTTP_PROXY="http://evil.test")), {})
    assert route.proxy("http", "mirror.test") == "http://proxy.test:8080"
    assert route.proxy("https", "mirror.test") is None


def test_the_ca_bundle_is_the_environments(host: MakeHost) -> None:
    route = mirrors.route(host(environ=environ(SSL_CERT_FILE="/ca.pem", SSL_CERT_DIR="/certs")), {})
    assert (route.cafile, route.cadir) == ("/ca.pem", "/certs")


def test_a_password_in_a_url_is_hidden() -> None:
    assert mirrors.hide("https://user:secret@mirror.test:8080/debian") == "https://mirror.test:8080/debian"
