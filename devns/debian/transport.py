"""One GET at a time over a connection kept open: proxies, redirects, and an end to everything that has none.

http.client is enough: bodies are read in large blocks, and the time goes to the network, SHA-256 and the disk.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import os
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from devns.debian.errors import MirrorError, Untrusted
from devns.debian.mirrors import VARIABLE, Route, hide, split
from devns.errors import DevnsError, Unsupported

IDLE = 30.0  # seconds without a byte
GRACE = 60.0  # seconds for an answer, and for its body as long as its size takes at
SLOWEST = 8 << 10  # bytes a second
HOPS = 5
TRIES = 3
_BLOCK = 1 << 16

_Result = TypeVar("_Result")


class Passing(OSError):
    """The server is busy or confused now and may not be in a moment."""


class NoSuchPart(Exception):
    """The server has other bytes than the rest that was asked for: the file must be fetched from its start."""


@dataclass(frozen=True)
class Answer:
    """A body: `start` is the byte of the file it begins with, `length` what the server says it has, if it does.

    `tag` names this very version of the file, strongly, for a later request for its rest.
    """

    start: int
    length: int | None
    tag: str | None
    blocks: Iterator[bytes]


class Session:
    """The connections of one thread. Another may `stop` it. A context manager."""

    def __init__(self, route: Route, *, idle: float = IDLE, grace: float = GRACE) -> None:
        self.route = route
        self.idle = idle
        self.grace = grace
        self._kept: dict[tuple[str, str, int | None], http.client.HTTPConnection] = {}
        self._active: socket.socket | None = None
        self._stopped = False
        self._tls: ssl.SSLContext | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._kept.values():
            connection.close()
        self._kept.clear()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def stop(self) -> None:
        """From another thread: whatever is being read ends at once, in an error, and nothing new begins."""
        self._stopped = True
        if sock := self._active:
            _cut(sock)

    def read(self, url: str, *, limit: int) -> bytes:
        """A small file. MirrorError where it can't be had, Untrusted where it is longer than `limit` bytes."""

        def once() -> bytes:
            body = bytearray()
            with self.open(url, size=limit) as answer:
                for block in answer.blocks:
                    body += block
                    if len(body) > limit:
                        raise Untrusted(f"{hide(url)}: more than {limit} bytes")
            return bytes(body)

        return self.retry(url, once)

    def retry(self, url: str, action: Callable[[], _Result]) -> _Result:
        """`action()`, up to three times while what goes wrong may pass; a MirrorError says what did in the end."""
        for number in range(TRIES):
            try:
                return action()
            except DevnsError:
                raise
            except (OSError, http.client.HTTPException) as error:
                if number == TRIES - 1 or self._stopped or not _may_pass(error):
                    raise explain(error, url) from error
            time.sleep(0.2 * number)  # a server that closed an idle connection is asked again at once
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def open(self, url: str, *, size: int, start: int = 0, tag: str | None = None) -> Iterator[Answer]:
        """The file at `url`, of about `size` bytes, from `start` on where the server can do that.

        Raises MirrorError, NoSuchPart (only with `start`), OSError or HTTPException; `retry` makes the last two into
        the first.
        """
        if url.startswith("file:"):
            with _open_file(url) as answer:
                yield answer
            return
        origin = parts = urlsplit(url)
        headers = {"Accept-Encoding": "identity", "User-Agent": "devns"}
        if start:
            headers["Range"] = f"bytes={start}-"
            headers |= {"If-Range": tag} if tag else {}
        for _ in range(HOPS + 1):
            connection = self._connection(parts, origin)
            sock = self._active = connection.sock
            keep = False
            try:
                self._refuse_stopped(parts)  # once more: `stop` sees what is active, or this sees `stop`
                with _deadline(sock, self.grace + size / SLOWEST, url):
                    response = self._ask(connection, parts, headers, origin)
                    if response.status not in (301, 302, 303, 307, 308):
                        yield _answer(response, parts.geturl(), start)
                        keep = response.isclosed() and not response.will_close
                        return
                    location = response.getheader("Location", "")
                    response.read(_BLOCK)
                    keep = response.isclosed() and not response.will_close
            finally:
                self._active = None
                if not keep:
                    self._kept.pop(_place(parts), None)
                    connection.close()
            target = _target(parts, location)
            refuse_hop(parts, target)
            parts = target
        raise MirrorError(f"{hide(url)}: more than {HOPS} redirects")

    def _ask(
        self, connection: http.client.HTTPConnection, parts: SplitResult, headers: dict[str, str], origin: SplitResult
    ) -> http.client.HTTPResponse:
        netloc = parts.netloc.rpartition("@")[2]
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        said = {**headers, "Host": netloc}
        if parts.username and _place(parts) == _place(origin):  # a password is for the host it was given for
            said["Authorization"] = _basic(parts)
        proxy = self.route.proxy(parts.scheme, parts.hostname or "")
        if proxy and parts.scheme == "http":
            path = f"http://{netloc}{path}"
            if urlsplit(proxy).username:
                said["Proxy-Authorization"] = _basic(urlsplit(proxy))
        connection.request("GET", path.replace(" ", "%20"), headers=said)
        return connection.getresponse()

    def _refuse_stopped(self, parts: SplitResult) -> None:
        if self._stopped:
            raise MirrorError(f"{hide(parts.geturl())}: stopped")

    def _connection(self, parts: SplitResult, origin: SplitResult) -> http.client.HTTPConnection:
        self._refuse_stopped(parts)
        place = _place(parts)
        if place not in self._kept:
            connection = self._new(parts)
            connection.connect()
            if place != _place(origin) and not self.route.proxy(parts.scheme, parts.hostname or ""):
                refuse_peer(connection.sock, origin)
            self._kept[place] = connection
        return self._kept[place]

    def _new(self, parts: SplitResult) -> http.client.HTTPConnection:
        host, proxy = parts.hostname or "", self.route.proxy(parts.scheme, parts.hostname or "")
        if proxy is None:
            if parts.scheme == "https":
                return http.client.HTTPSConnection(host, parts.port, timeout=self.idle, context=self._context())
            return http.client.HTTPConnection(host, parts.port, timeout=self.idle)
        way = split(proxy)
        if way is None or way.scheme != "http" or not way.hostname:
            raise Unsupported(
                f"{_shown(proxy)}: devns can't use this kind of proxy",
                hint="name an http:// one: Acquire::http::Proxy, http_proxy",
            )
        if parts.scheme == "http":
            return http.client.HTTPConnection(way.hostname, way.port or 80, timeout=self.idle)
        tunnel = http.client.HTTPSConnection(way.hostname, way.port or 80, timeout=self.idle, context=self._context())
        tunnel.set_tunnel(host, parts.port or 443, {"Proxy-Authorization": _basic(way)} if way.username else None)
        return tunnel

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            try:
                self._tls = ssl.create_default_context(cafile=self.route.cafile, capath=self.route.cadir)
            except (OSError, ssl.SSLError) as error:
                raise Unsupported(
                    f"{self.route.cafile or self.route.cadir}: no CA certificates can be read: {error}",
                    hint="SSL_CERT_FILE, or apt's Acquire::https::CaInfo, names the file that has them",
                ) from error
            if self.route.certificate:
                try:
                    self._tls.load_cert_chain(self.route.certificate, self.route.key)
                except (OSError, ssl.SSLError) as error:
                    self._tls = None
                    raise Unsupported(
                        f"{self.route.certificate}: no certificate and key can be read: {error}",
                        hint="apt's Acquire::https::SslCert and Acquire::https::SslKey name them",
                    ) from error
        return self._tls


# --- what is refused ------------------------------------------------------------------------------------------------


def refuse_hop(here: SplitResult, there: SplitResult) -> None:
    """MirrorError for a redirect that leads from a safe way to an unsafe one, or from outside to this machine."""
    if there.scheme not in ("http", "https") or not there.hostname:
        why = "only http and https are followed"
    elif here.scheme == "https" and there.scheme == "http":
        why = "it leads from https to http"
    elif is_local(there.hostname) and not is_local(here.hostname or ""):
        why = "it leads to this machine or its link"
    elif there.hostname.startswith(("169.254.", "fe80:")) and there.hostname != here.hostname:
        why = "it leads to a link-local address"  # where clouds keep their metadata service
    else:
        return
    raise MirrorError(f"{hide(here.geturl())}: redirected to {hide(there.geturl())}: {why}")


def refuse_peer(sock: socket.socket, origin: SplitResult) -> None:
    """The same for a name that resolves to such an address."""
    address = str(sock.getpeername()[0])
    if is_local(address) and not is_local(origin.hostname or ""):
        sock.close()
        raise MirrorError(f"{hide(origin.geturl())}: redirected to {address}: it is this machine or its link")


def is_local(host: str) -> bool:
    """Whether `host` is an address of this machine or of the link, or a name that always is one."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.lower().rstrip(".").endswith("localhost")
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_link_local or mapped.is_unspecified)


def _answer(response: http.client.HTTPResponse, url: str, start: int) -> Answer:
    status = response.status
    if status in (408, 425, 429) or status >= 500:
        raise Passing(f"it answers {status} {response.reason}")
    if status == 416 and start:
        raise NoSuchPart
    if status not in (200, 206) or (status == 206 and not start):
        hint = f"{VARIABLE} is the URL above dists/" if status == 404 else None
        if status == 407:
            hint = "the proxy wants a password: http://USER:PASSWORD@PROXY:PORT"
        raise MirrorError(f"{hide(url)}: the server says {status} {response.reason}", hint=hint)
    coding = response.getheader("Content-Encoding", "identity").lower()
    if coding not in ("identity", ""):  # a length that was promised says nothing about what this unpacks to
        raise MirrorError(f"{hide(url)}: the server sends it as {coding}, which nobody asked for")
    begin = 0
    if status == 206:
        match = re.fullmatch(r"bytes ([0-9]{1,15})-[0-9]+/.*", response.getheader("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise NoSuchPart
        begin = start
    tag = response.getheader("ETag", "")
    return Answer(begin, response.length, tag if tag.startswith('"') else None, _blocks(response))


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while block := response.read(_BLOCK):
        yield block
    if response.length:  # read() ends quietly where the connection did
        raise http.client.IncompleteRead(b"", response.length)


# --- what went wrong ------------------------------------------------------------------------------------------------


def explain(error: Exception, url: str) -> MirrorError:
    """What a failed request means to the one who reads it."""
    host = urlsplit(url).hostname or url
    where = hide(url)
    if isinstance(error, socket.gaierror):
        return MirrorError(f"{host}: no address for this name: {error.strerror}", hint="is the network up?")
    if isinstance(error, ssl.SSLCertVerificationError):
        return MirrorError(
            f"{host}: its certificate is not good: {error.verify_message}",
            hint="behind a proxy that opens TLS, name the CA bundle that has its certificate: SSL_CERT_FILE, or apt's "
            "Acquire::https::CaInfo",
        )
    if isinstance(error, ssl.SSLError):
        return MirrorError(f"{host}: TLS failed: {error.reason or error}", hint="does it speak TLS at all?")
    if isinstance(error, ConnectionRefusedError):
        return MirrorError(f"{where}: connection refused", hint="a mirror or a proxy that is down, or another port")
    if isinstance(error, TimeoutError):
        return MirrorError(f"{where}: no answer in time", hint="try again; what has arrived is kept")
    if isinstance(error, http.client.IncompleteRead):
        return MirrorError(f"{where}: the connection broke off, {error.expected} bytes short", hint="try again")
    if isinstance(error, OSError) and "Tunnel connection failed" in str(error):
        return MirrorError(f"{where}: the proxy refuses: {str(error).rpartition('failed: ')[2]}")
    if isinstance(error, OSError):
        return MirrorError(f"{where}: {error.strerror or error}")
    return MirrorError(f"{where}: no sensible answer: {type(error).__name__}: {str(error)[:200]}")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, http.client.HTTPException):
        return isinstance(error, (http.client.IncompleteRead, http.client.BadStatusLine))
    return isinstance(error, (Passing, ConnectionError, TimeoutError, ssl.SSLEOFError))


@contextlib.contextmanager
def _deadline(sock: socket.socket, seconds: float, url: str) -> Iterator[None]:
    """Cut the connection after `seconds`, whatever it does: one byte at a time never runs into an idle timeout."""
    late: list[bool] = []

    def cut() -> None:
        late.append(True)
        _cut(sock)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        if late:
            raise MirrorError(f"{hide(url)}: too slow: not done in {seconds:.0f} seconds") from error
        raise
    finally:
        timer.cancel()


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Not SSLSocket's own shutdown(), which drops the TLS state that another thread is reading with.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


# --- helpers --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_file(url: str) -> Iterator[Answer]:
    """A file of a mirror on this machine, whole."""
    path = unquote(urlsplit(url).path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise MirrorError(f"{path}: {error.strerror}") from error
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise MirrorError(f"{path}: not a file")
        yield Answer(0, status.st_size, None, iter(lambda: file.read(_BLOCK), b""))


def _target(here: SplitResult, location: str) -> SplitResult:
    try:
        target = split(urljoin(here.geturl(), location))
    except ValueError:
        target = None
    if target is None:
        raise MirrorError(f"{hide(here.geturl())}: redirected to what is no URL: {location[:120]!r}")
    return target


def _shown(proxy: str) -> str:
    return proxy.rpartition("@")[2]  # without the password that may stand in it


def _place(parts: SplitResult) -> tuple[str, str, int | None]:
    return parts.scheme, (parts.hostname or "").lower(), parts.port


def _basic(parts: SplitResult) -> str:
    user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(user.encode()).decode()
