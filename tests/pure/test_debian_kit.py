"""What the tests of devns.debian are made with: throw-away keys, paragraphs, signed files, servers on the loopback."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import lzma
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import format_datetime
from pathlib import Path

import pysequoia

from devns.debian import openpgp

NOW = 1_800_000_000.0  # a fixed day, for what is compared with dates in files


@dataclass(frozen=True)
class Signer:
    """A key made for one test run."""

    secret: pysequoia.Tsk = field(default_factory=lambda: pysequoia.Tsk.generate("test <test@test.invalid>"))

    @property
    def certificate(self) -> bytes:
        return bytes(self.secret.extract_certificate())

    @property
    def fingerprint(self) -> str:
        return self.secret.extract_certificate().fingerprint

    @property
    def trust(self) -> openpgp.Trust:
        return openpgp.Trust((self.certificate,), frozenset({self.fingerprint}))

    def sign(self, text: bytes) -> bytes:
        return pysequoia.sign(self.secret.signer(), text, mode=pysequoia.SignatureMode.CLEAR)


def date(seconds: float) -> str:
    """As Release files write it."""
    return format_datetime(datetime.fromtimestamp(seconds, timezone.utc)).replace("+0000", "UTC")


def release_text(
    files: Mapping[str, bytes] = {}, *, suite: str = "bookworm", drop: Sequence[str] = (), **fields: str
) -> bytes:
    """A Release file of `suite`; `fields` replace what it says by default ("valid_until" is Valid-Until)."""
    _, _, pocket = suite.partition("-")
    said = {
        "Origin": "Debian",
        "Label": "Debian-Security" if pocket == "security" else "Debian",
        "Suite": f"stable-{pocket}".rstrip("-"),
        "Codename": suite,
        "Date": date(NOW - 3600),
        "Acquire-By-Hash": "yes",
        "Architectures": "all amd64 arm64",
        "Components": "updates/main" if pocket == "security" else "main contrib",
    }
    said |= {key.replace("_", "-").title(): value for key, value in fields.items()}
    lines = [f"{key}: {value}" for key, value in said.items() if key not in drop]
    if "SHA256" not in drop:
        lines += ["SHA256:", *(f" {hashlib.sha256(data).hexdigest()} {len(data):8} {p}" for p, data in files.items())]
    return ("\n".join(lines) + "\n").encode()


def deb(name: str) -> bytes:
    """Bytes that stand for the package `name`."""
    return hashlib.sha256(name.encode()).hexdigest().encode() * (len(name) + 1)


def paragraph(name: str, version: str = "1", **fields: str) -> bytes:
    """One package of a Packages file, ending in the empty line; fields as in `release_text`."""
    body = deb(name)
    said = {
        "Package": name,
        "Version": version,
        "Architecture": "amd64",
        "Priority": "optional",
        "Filename": f"pool/main/{name}_{version.replace(':', '%3a')}_amd64.deb",
        "Size": str(len(body)),
        "SHA256": hashlib.sha256(body).hexdigest(),
    }
    said |= {("SHA256" if key == "sha256" else key.replace("_", "-").title()): value for key, value in fields.items()}
    return ("\n".join(f"{key}: {value}" for key, value in said.items() if value) + "\n\n").encode()


BASE = (paragraph("base-files", essential="yes", priority="required"), paragraph("apt", priority="important"))


def publish(root: Path, signer: Signer, suite: str, paragraphs: Sequence[bytes] = (), **fields: str) -> Path:
    """One suite of a mirror below `root`, with every .deb; the path of its InRelease."""
    packages = b"".join(paragraphs)
    packed = lzma.compress(packages)
    directory = root / "dists" / suite / "main" / "binary-amd64"
    (directory / "by-hash" / "SHA256").mkdir(parents=True, exist_ok=True)
    (directory / "by-hash" / "SHA256" / hashlib.sha256(packed).hexdigest()).write_bytes(packed)
    files = {"main/binary-amd64/Packages": packages, "main/binary-amd64/Packages.xz": packed}
    signed = root / "dists" / suite / "InRelease"
    fields = {"date": date(time.time() - 3600), **fields}
    signed.write_bytes(signer.sign(release_text(files, suite=suite, **fields)))
    for line in packages.decode().split("\n"):
        if line.startswith("Filename: pool/"):
            path = root / line.removeprefix("Filename: ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(deb(path.name.split("_")[0]))
    return signed


Reply = Callable[[http.server.BaseHTTPRequestHandler], None]


@dataclass
class Server:
    """A web server on the loopback that answers as the test says, and writes down what it was asked."""

    url: str
    replies: dict[str, Reply]
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)


@contextlib.contextmanager
def serving(
    replies: Mapping[str, Reply] | None = None, *, root: Path | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[Server]:
    """`replies` by path, and beneath `root` files; anything else is a 404. With `tls` it is https://localhost."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.asked.append((self.path, dict(self.headers)))
            file = root / self.path.lstrip("/") if root else None
            if self.path in server.replies:
                with contextlib.suppress(ConnectionError):
                    server.replies[self.path](self)
            elif file and file.is_file():
                send(file.read_bytes())(self)
            else:
                send(b"no such file", status=404)(self)

        def log_message(self, *_: object) -> None: ...

    class Listener(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None: ...

    with Listener(("127.0.0.1", 0), Handler) as listener:
        place = f"http://127.0.0.1:{listener.server_address[1]}"
        if tls:
            # The handshake in the thread of the request: a client that ends it must not end the server.
            listener.socket = tls.wrap_socket(listener.socket, server_side=True, do_handshake_on_connect=False)
            place = place.replace("http://127.0.0.1", "https://localhost")
        server = Server(place, dict(replies or {}))
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()


def send(body: bytes, *, status: int = 200, length: int | None = None, **headers: str) -> Reply:
    """Answer with `body`; `length` is what Content-Length says where that isn't the truth."""

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
        if length is not None and length > len(body):
            handler.close_connection = True

    return reply


def test_what_the_kit_signs_is_believed_when_its_key_is_trusted() -> None:
    signer = Signer()
    text = release_text({"a": b"b"})
    assert openpgp.verify(signer.sign(text), signer.trust, name="x", now=NOW).text.rstrip(b"\n") == text.rstrip(b"\n")
