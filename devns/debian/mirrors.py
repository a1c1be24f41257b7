"""Where Debian's packages come from on this machine, and the way out to them: mirror, proxy, CA bundle.

The first that says something wins: $DEVNS_DEBIAN_MIRROR, `[debian] mirror` in config.toml, the host's own apt sources.
A mirror is the root of an archive: the URL above `dists/`. What it sends is verified, so it can be anyone's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from devns.errors import TemplateError, Unsupported

if TYPE_CHECKING:
    from typing import Literal

    from devns.host import Host

    Archive = Literal["main", "security"]  # of Debian's two

VARIABLE = "DEVNS_DEBIAN_MIRROR"
SECURITY_VARIABLE = "DEVNS_DEBIAN_SECURITY_MIRROR"

_SUITE = re.compile(
    r"(?:buster|bullseye|bookworm|trixie|forky|duke|sid|(?:old){0,2}stable|testing|unstable|experimental)"
    r"(?:-updates|-proposed-updates|-backports|-backports-sloppy|(-security)|(/updates))?"
)
# Debian's own names for the two archives, alone or with a snapshot's time behind them.
_ARCHIVE = re.compile(r"(?:.*/)?debian(?:-security)?(?:/[0-9]{8}T[0-9]{6}Z)?/?")
# Where OpenSSL was built for another distribution (a Python that brings its own), it looks in none of these.
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
_TRUE = ("yes", "true", "on", "1", "enable", "with")


@dataclass(frozen=True)
class Route:
    """The way out. `proxies` has apt's keys: "http", "https", and "http::HOST" for one host; "DIRECT" means none."""

    proxies: Mapping[str, str]
    exempt: tuple[str, ...] = ()  # $no_proxy
    cafile: str | None = None
    cadir: str | None = None
    certificate: str | None = None  # of the client, for a server that asks for one
    key: str | None = None  # where it isn't in the same file

    def proxy(self, scheme: str, host: str) -> str | None:
        """The proxy's URL for `scheme` and `host`, or None."""
        found = self.proxies.get(f"{scheme}::{host}") or self.proxies.get(scheme) or "DIRECT"
        names = (name.lstrip(".").lower() for name in self.exempt)
        if found.upper() == "DIRECT" or any(name in ("*", host) or host.endswith(f".{name}") for name in names):
            return None
        return found if "://" in found else f"http://{found}"


@dataclass(frozen=True)
class Ages:
    """How old and how new a Release may be, as apt here is told; in seconds. apt.conf(5), "Acquire"."""

    check_until: bool = True  # Check-Valid-Until
    check_date: bool = True  # Check-Date; where it is off the clock counts for nothing
    future: int = 10  # Max-FutureTime
    shortest: int = 0  # Min-ValidTime
    longest: int = 0  # Max-ValidTime; 0 is forever


@dataclass(frozen=True)
class Mirrors:
    """Both archives of Debian. `origin` says who named them; `ages` has a row for each, and "" for other archives."""

    main: str
    security: str
    origin: str
    ages: Mapping[str, Ages]
    route: Route

    def url(self, archive: str) -> str:
        """The root of "main" or "security"; any other archive is called by its URL."""
        return {"main": self.main, "security": self.security}.get(archive, archive)


def find(host: Host) -> Mirrors:
    """What this machine says. Unsupported, naming the variable to set, where it says nothing."""
    conf = read_apt_conf(host)
    main, security, origin = _said(host)
    entries = () if main and security else tuple(_sources(host))
    if main is None:
        main = next((uri for uri, archive, _ in entries if archive == "main"), None)
        origin = "the host's apt sources"
    if main is None:
        raise Unsupported(
            "this machine names no Debian mirror: no apt sources of Debian's here",
            hint=f"set {VARIABLE} to the URL above dists/ of a Debian mirror",
        )
    # A mirror's two archives stand side by side: the layout of Debian's own.
    beside = f"{main}-security" if main.endswith("/debian") else None
    if security is None and origin != "the host's apt sources":
        security = beside
    if security is None:
        security = next((uri for uri, archive, _ in entries if archive == "security"), beside)
    if security is None:
        raise Unsupported(
            "this machine names no mirror of Debian's security archive",
            hint=f"set {SECURITY_VARIABLE} to the URL above dists/ of one",
        )
    ages = {"": _ages(conf, "", {})}
    for archive, url, label in (("main", main, "debian"), ("security", security, "debian-security")):
        options = next((options for uri, _, options in entries if uri == url), {})
        ages[archive] = _ages(conf, label, options)
    return Mirrors(main, security, origin, ages, route(host, conf))


def route(host: Host, conf: Mapping[str, str]) -> Route:
    """The proxies of apt's configuration, which as in apt come first, then those of the environment; certificates.

    What apt can be told not to verify is verified here all the same: Acquire::https::Verify-Peer, Verify-Host.
    """
    proxies = {}
    for scheme in ("http", "https"):
        said = host.environ.get(f"{scheme}_proxy") or host.environ.get("all_proxy")
        if scheme == "https":  # HTTP_PROXY is what a CGI script gets from a stranger's `Proxy:` header
            said = said or host.environ.get("HTTPS_PROXY")
        if said:
            proxies[scheme] = said
    for key, value in conf.items():
        if match := re.fullmatch(r"acquire::(https?)::proxy(::.+)?", key):
            proxies[match[1] + (match[2] or "")] = value
    # https goes the way of http where nobody said otherwise: apt does so too.
    if "https" not in proxies and "acquire::http::proxy" in conf:
        proxies["https"] = proxies["http"]
    no_proxy = host.environ.get("no_proxy") or host.environ.get("NO_PROXY") or ""
    return Route(
        {key: value for key, value in proxies.items() if value},
        tuple(name for name in re.split(r"[,\s]+", no_proxy) if name),
        host.environ.get("SSL_CERT_FILE") or conf.get("acquire::https::cainfo") or _bundle(host),
        host.environ.get("SSL_CERT_DIR") or None,
        conf.get("acquire::https::sslcert") or None,
        conf.get("acquire::https::sslkey") or None,
    )


def split(url: str) -> SplitResult | None:
    """The parts of `url`, or None where its host or port is none."""
    try:
        parts = urlsplit(url)
        return parts if parts.port is None or parts.port else None
    except ValueError:  # [::1 without its end, a port beyond 65535
        return None


def hide(url: str) -> str:
    """`url` without the user and password in it: for messages, and for files that others read."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


# --- what the user said ---------------------------------------------------------------------------------------------


def _said(host: Host) -> tuple[str | None, str | None, str]:
    """The two mirrors that the environment or the configuration name, and which of them it was."""
    main, security = (host.environ.get(name) or None for name in (VARIABLE, SECURITY_VARIABLE))
    path = f"{host.config}/config.toml"
    table = _config(host, path)
    origin = f"${VARIABLE}" if main else path
    main = check(main, f"${VARIABLE}") if main else check(table.get("mirror"), f"{path}: debian.mirror")
    if security:
        security = check(security, f"${SECURITY_VARIABLE}")
    elif not origin.startswith("$"):  # a variable that names another mirror leaves the file's pair behind
        security = check(table.get("security"), f"{path}: debian.security")
    return main, security, origin


def _config(host: Host, path: str) -> Mapping[str, object]:
    text = host.read(path)
    if text is None or "debian" not in text:
        return {}
    import tomli  # most machines have no such table

    try:
        table = tomli.loads(text).get("debian", {})
    except tomli.TOMLDecodeError as error:
        raise TemplateError(f"{path}: not TOML: {error}") from error
    if not isinstance(table, dict):
        raise TemplateError(f"{path}: debian: not a table", hint='[debian]\nmirror = "https://.../debian"')
    if unknown := sorted(set(table) - {"mirror", "security"}):
        raise TemplateError(f"{path}: debian.{unknown[0]}: no such key", hint="the keys are mirror and security")
    return table


def check(url: object, origin: str) -> str | None:
    """`url` without its last slash. TemplateError, naming `origin`, unless it is an archive's: http, https or file."""
    if url is None:
        return None
    parts = split(url) if isinstance(url, str) and url.isprintable() and " " not in url else None
    if parts is None or parts.scheme not in ("http", "https", "file") or parts.query or parts.fragment:
        raise TemplateError(f"{origin}: not a mirror's URL: {url!r}", hint="http://, https:// or file:// and a path")
    if parts.scheme == "file" and (parts.netloc not in ("", "localhost") or not parts.path.startswith("/")):
        raise TemplateError(f"{origin}: not a file on this machine: {url!r}", hint="file:///path/to/mirror")
    if parts.scheme != "file" and not parts.hostname:
        raise TemplateError(f"{origin}: no host in {url!r}", hint="https://HOST/debian")
    return str(url).rstrip("/")


# --- the host's apt sources -----------------------------------------------------------------------------------------


def _sources(host: Host) -> Iterator[tuple[str, Archive, Mapping[str, str]]]:
    """(URI, archive, options) of every enabled entry that looks like Debian's own, likeliest first."""
    found = []
    for path in _source_files(host):
        text = host.read(path)
        if text is None:
            continue
        parse = parse_deb822 if path.endswith(".sources") else parse_list
        for entry in parse(text):
            for uri in _expand(host, entry.uri):
                if archive := _archive(uri, entry):
                    found.append((not entry.signed_by_debian, uri.rstrip("/"), archive, entry.options))
    # A vendor may call its archive "debian" too; an entry that names Debian's own keys is surely Debian's.
    for _, uri, archive, options in sorted(found, key=lambda row: row[0]):
        yield uri, archive, options


def _source_files(host: Host) -> Iterator[str]:
    yield "/etc/apt/sources.list"
    for name in host.listdir("/etc/apt/sources.list.d"):
        # apt's rule for names in its directories: letters, digits and "_-." only, and the right end.
        if re.fullmatch(r"[A-Za-z0-9_.-]+\.(list|sources)", name):
            yield f"/etc/apt/sources.list.d/{name}"


@dataclass(frozen=True)
class Entry:
    """One line of sources.list, or one URI and suite of a deb822 stanza."""

    uri: str
    suite: str
    components: tuple[str, ...]
    options: Mapping[str, str]

    @property
    def signed_by_debian(self) -> bool:
        return "debian-archive" in self.options.get("signed-by", "")


def parse_list(text: str) -> Iterator[Entry]:
    """The binary entries of a one-line-style file. sources.list(5)"""
    for line in text.split("\n"):
        line = line.partition("#")[0].strip()
        match = re.fullmatch(r"deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)((?:\s+\S+)*)", line)
        if match is None:
            continue
        pairs = (word.partition("=") for word in (match[1] or "").split())
        options = {key.rstrip("+-").lower(): value for key, equals, value in pairs if equals}
        yield Entry(match[2], match[3], tuple(match[4].split()), options)


def parse_deb822(text: str) -> Iterator[Entry]:
    """The enabled binary entries of a deb822-style file. sources.list(5)"""
    lines = "\n".join(line for line in text.split("\n") if not line.startswith("#"))
    for stanza in re.split(r"\n[ \t]*\n", lines):
        # Continuation lines begin with a space: an embedded key, or a long list.
        fields = re.findall(r"(?m)^([A-Za-z0-9-]+)[ \t]*:((?:.*)(?:\n[ \t].*)*)", stanza)
        options = {key.lower(): value.strip() for key, value in fields}
        if options.get("enabled", "yes").lower() not in _TRUE or "deb" not in options.get("types", "").split():
            continue
        for uri in options.get("uris", "").split():
            for suite in options.get("suites", "").split():
                yield Entry(uri, suite, tuple(options.get("components", "").split()), options)


def _expand(host: Host, uri: str) -> Iterator[str]:
    """`uri` itself, or what is in the list on this machine that it names. apt-transport-mirror(1)"""
    if uri.startswith("mirror+file:"):
        path = "/" + unquote(uri.removeprefix("mirror+file:")).lstrip("/")
        lines = (line.strip() for line in (host.read(path) or "").split("\n"))
        yield from (line.split()[0] for line in lines if line and not line.startswith("#"))
    else:
        yield uri


def _archive(uri: str, entry: Entry) -> Archive | None:
    """Which of Debian's archives this entry is, judged by its suite, component and path; None for anything else."""
    suite = _SUITE.fullmatch(entry.suite)
    try:
        check(uri, "apt")  # cdrom:, copy:, tor+http: and the like are of no use here
    except TemplateError:
        return None
    named = entry.signed_by_debian or _ARCHIVE.fullmatch(urlsplit(uri).path)
    if suite is None or not named or "main" not in entry.components:
        return None
    return "security" if suite[1] or suite[2] else "main"


def _ages(conf: Mapping[str, str], label: str, options: Mapping[str, str]) -> Ages:
    """What apt's configuration says, for an archive of this label, and the options of its entry, which win."""

    def yes(key: str) -> bool:
        return (options.get(key) or conf.get(f"acquire::{key}", "true")).lower() in _TRUE

    def seconds(key: str, option: str, default: int = 0) -> int:
        said = options.get(option) or conf.get(f"acquire::{key}::{label}") or conf.get(f"acquire::{key}", "")
        return int(said) if re.fullmatch(r"[0-9]{1,10}", said) else default

    return Ages(
        yes("check-valid-until"),
        yes("check-date"),
        seconds("max-futuretime", "date-max-future", 10),
        seconds("min-validtime", "valid-until-min"),
        seconds("max-validtime", "valid-until-max"),
    )


# --- apt.conf -------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r'"((?:[^"\\\n]|\\.)*)"|([{};])|(?://|#(?!clear|include))[^\n]*|/\*(?s:.*?)\*/|([^\s{};"]+)')


def read_apt_conf(host: Host) -> Mapping[str, str]:
    """apt's configuration: lower-case keys with "::" between the parts. apt.conf(5)"""
    names = [
        f"/etc/apt/apt.conf.d/{name}"
        for name in host.listdir("/etc/apt/apt.conf.d")
        if re.fullmatch(r"[A-Za-z0-9_-]+(\.conf)?", name)
    ]
    conf: dict[str, str] = {}
    said = host.environ.get("APT_CONFIG", "")
    for path in [*([said] if said.startswith("/") else []), *names, "/etc/apt/apt.conf"]:
        conf.update(parse_apt_conf(host.read(path) or ""))
    return conf


def parse_apt_conf(text: str) -> Mapping[str, str]:
    """The values of one file, lists (`key:: "value"`) left out. A broken file gives what can be read of it."""
    conf: dict[str, str] = {}
    scope: list[str] = []
    words: list[str] = []
    value: str | None = None
    for match in _TOKEN.finditer(text):
        quoted, mark, word = match.groups()
        if word:
            words.append(word)
        elif quoted is not None:
            value = quoted
        elif mark == "{":
            scope.append("::".join(words))
            words, value = [], None
        elif mark:
            key = "::".join([*(part for part in scope if part), *words[:1]]).lower()
            said = value if value is not None else words[1] if len(words) > 1 else None
            if words and said is not None and not words[0].startswith("#") and not key.endswith("::"):
                conf[key] = said
            words, value = [], None
            if mark == "}" and scope:
                scope.pop()
    return conf


def _bundle(host: Host) -> str | None:
    """The machine's CA bundle, where this Python's own OpenSSL doesn't find one."""
    import ssl

    defaults = ssl.get_default_verify_paths()
    if defaults.cafile or (defaults.capath and host.listdir(defaults.capath)):
        return None
    return next((path for path in _BUNDLES if host.kind(path) == "file"), None)
