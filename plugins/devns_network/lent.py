"""What an environment borrows from the host to reach the same places: certificates, proxies, package registries, names.

Pure: everything is read from `host`. Nothing with a password in it is lent unless the template asks for all.
"""

from __future__ import annotations

import configparser
import ipaddress
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from devns.api import Host, Problem, Step, bind, setenv

CA_BUNDLE = "/run/devns/ca-certificates.crt"  # where the host's bundle is seen inside

_CA_VARIABLES = (
    "SSL_CERT_FILE",  # OpenSSL, and what uses it: Python's ssl, Ruby, ...
    "REQUESTS_CA_BUNDLE",  # Python's requests
    "PIP_CERT",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
)
_CA_PLACES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Arch, Gentoo
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # Fedora, RHEL 7 and later
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL, Amazon Linux
    "/etc/ssl/ca-bundle.pem",  # openSUSE
    "/etc/ssl/cert.pem",  # Alpine
)
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_PIP = {"index-url": "PIP_INDEX_URL", "extra-index-url": "PIP_EXTRA_INDEX_URL", "trusted-host": "PIP_TRUSTED_HOST"}


# --- certificates -----------------------------------------------------------------------------------------------------


def certificates(host: Host) -> Iterator[Step]:
    """The host's CA bundle, read-only, and the variables by which programs find it: companies add a CA there."""
    bundle = find_bundle(host)
    if bundle is None:
        return
    yield bind(bundle, CA_BUNDLE)
    for name in _CA_VARIABLES:
        yield setenv(name, CA_BUNDLE, default=True)


def find_bundle(host: Host) -> str | None:
    """$SSL_CERT_FILE where it names a file, else the first well-known place that is one."""
    said = host.environ.get("SSL_CERT_FILE", "")
    places = (said, *_CA_PLACES) if said.startswith("/") else _CA_PLACES
    return next((host.realpath(path) for path in places if host.kind(path) == "file"), None)


# --- proxies ----------------------------------------------------------------------------------------------------------


def proxies(host: Host, *, all_of_them: bool, own_network: bool) -> Iterator[Step]:
    """The proxy variables in both spellings. Unless all are asked for, none that holds a password is lent."""
    for name, value in _proxy_variables(host):
        if all_of_them or _why_not(name, value, own_network=own_network) is None:
            yield setenv(name, value, default=True)


def proxy_problems(host: Host, *, own_network: bool) -> Iterator[Problem]:
    for name, value in _proxy_variables(host):
        reason = _why_not(name, value, own_network=own_network)
        if reason:
            yield Problem("proxy", f"{name} is not passed in: {reason}", 'set proxy = "host" in [network]', fatal=False)


def _proxy_variables(host: Host) -> Iterator[tuple[str, str]]:
    for name in (*_PROXIES, *(name.upper() for name in _PROXIES)):
        value = host.environ.get(name, "")
        if value and value.isprintable():
            yield name, value


def _why_not(name: str, value: str, *, own_network: bool) -> str | None:
    if name.lower() == "no_proxy":
        return None  # a list of names
    if "@" in value:
        return "it may hold a password"
    if own_network and _is_loopback(value):
        return "it is on the host's own loopback, which is closed to the environment"
    return None


# --- registries -------------------------------------------------------------------------------------------------------


def registries(host: Host, *, own_network: bool) -> Iterator[Step]:
    """Where pip and npm get their packages on the host, so that a mirror is used inside too."""
    for name, value in sorted(_registries(host).items()):
        words = value.split()
        if name != "PIP_TRUSTED_HOST":
            words = [word for word in words if _is_public(word) and not (own_network and _is_loopback(word))]
        if words:
            yield setenv(name, " ".join(words), default=True)


def _registries(host: Host) -> dict[str, str]:
    found = {_PIP[option]: value for option, value in _pip_options(host).items()}
    npm = re.findall(r"^[ \t]*registry[ \t]*=[ \t]*(\S+)[ \t]*$", host.read(f"{host.home}/.npmrc") or "", re.MULTILINE)
    if npm:
        found["NPM_CONFIG_REGISTRY"] = npm[-1]
    for name in (*_PIP.values(), "NPM_CONFIG_REGISTRY"):
        spellings = (name, name.lower()) if name.startswith("NPM_") else (name,)
        said = next((host.environ[spelling] for spelling in spellings if host.environ.get(spelling)), None)
        if said:
            found[name] = said
    return {name: value for name, value in found.items() if value.replace("\n", " ").isprintable()}


def _pip_options(host: Host) -> dict[str, str]:
    """pip's own order: machine, then user, then $PIP_CONFIG_FILE; what [install] says beats [global]."""
    environ = host.environ
    places = [f"{base}/pip/pip.conf" for base in reversed(environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":"))]
    config = environ.get("XDG_CONFIG_HOME", "")
    config = config if config.startswith("/") else f"{host.home}/.config"
    places += ["/etc/pip.conf", f"{host.home}/.pip/pip.conf", f"{config}/pip/pip.conf"]
    said = environ.get("PIP_CONFIG_FILE")
    if said == "/dev/null":  # "no configuration files at all"
        return {}
    options: dict[str, dict[str, str]] = {"global": {}, "install": {}}
    for path in [*places, *([said] if said else [])]:
        text = host.read(path) if path.startswith("/") else None
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read_string(text or "")
        except configparser.Error:
            continue  # pip itself will say so
        for section, found in options.items():
            if parser.has_section(section):
                found.update((key, value) for key, value in parser.items(section) if key in _PIP)
    return {**options["global"], **options["install"]}


def _is_public(url: str) -> bool:
    """An address that means the same inside and holds no secret: http(s), and neither a password nor a variable."""
    return url.startswith(("https://", "http://")) and "@" not in url and "$" not in url


def _is_loopback(url: str) -> bool:
    try:
        name = urlsplit(url if "//" in url else f"//{url}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


# --- names: resolv.conf(5), hosts(5) ----------------------------------------------------------------------------------


def hosts_text(host: Host | None, hostname: str | None) -> str:
    """/etc/hosts: the host's own (or, without a host, the loopback alone), and the environment's name."""
    text = (host and read_text(host, "/etc/hosts")) or "127.0.0.1 localhost\n::1 localhost ip6-localhost\n"
    text = text if text.endswith("\n") else f"{text}\n"
    return text + (f"127.0.1.1 {hostname}\n" if hostname else "")


def resolv_text(host: Host, nameserver: str) -> str:
    """/etc/resolv.conf with a nameserver of the environment's own; what the host searches is searched inside too."""
    lines = (read_text(host, "/etc/resolv.conf") or "").splitlines()
    kept = [line for line in lines if line.split(maxsplit=1)[:1] in (["search"], ["domain"], ["options"])]
    return "".join(f"{line}\n" for line in (f"nameserver {nameserver}", *kept))


def read_text(host: Host, path: str) -> str | None:
    """A file of the host as text that can be written again: bytes that are no UTF-8 (in a comment) are replaced."""
    text = host.read(path)
    return None if text is None else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
