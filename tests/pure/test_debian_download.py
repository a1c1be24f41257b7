"""Downloads, from a server that lies, breaks off, dawdles and leads astray."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import pytest

from devns.debian import download, transport
from devns.debian.download import Wanted
from devns.debian.errors import MirrorError, Untrusted
from devns.debian.mirrors import Route
from devns.errors import DevnsError
from tests.pure.test_debian_kit import Reply, send, serving

DIRECT = Route({})
BODY = bytes(range(256)) * 1024  # four blocks


def wanted(url: str, tmp_path: Path, body: bytes = BODY, name: str = "file") -> Wanted:
    return Wanted(url, str(tmp_path / "cache" / name), len(body), hashlib.sha256(body).hexdigest())


def fetch(file: Wanted, *, route: Route = DIRECT, idle: float = 5.0, grace: float = 10.0) -> int:
    """How many bytes were reported on the way."""
    told: list[int] = []
    with transport.Session(route, idle=idle, grace=grace) as session:
        download.fetch(file, session, advance=told.append)
    return sum(told)


def read(url: str, *, limit: int = 1 << 20, route: Route = DIRECT, idle: float = 5.0, grace: float = 10.0) -> bytes:
    with transport.Session(route, idle=idle, grace=grace) as session:
        return session.read(url, limit=limit)


def fetch_all(files: Sequence[Wanted], route: Route, **options: Any) -> None:
    with download.Downloads(files, route, **options) as downloads:
        downloads.wait()


def content(file: Wanted) -> bytes | None:
    return Path(file.path).read_bytes() if os.path.exists(file.path) else None


def ranged(body: bytes = BODY, *, tag: str = '"one"') -> Reply:
    """A server that can do parts, if the part is of the version that is asked for."""

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        said, only = handler.headers.get("Range", ""), handler.headers.get("If-Range", tag)
        if not said or only != tag:
            send(body, ETag=tag)(handler)
            return
        start = int(re.fullmatch(r"bytes=([0-9]+)-", said)[1])  # type: ignore[index]  # nothing else is sent
        part = f"bytes {start}-{len(body) - 1}/{len(body)}"
        send(body[start:], status=206, ETag=tag, Content_Range=part)(handler)

    return reply


def once(first: Reply, then: Reply) -> Reply:
    """`first` for the first request, `then` for all others."""
    left = [first]
    return lambda handler: (left.pop() if left else then)(handler)


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_a_file_arrives_whole_private_and_is_not_asked_for_again(tmp_path: Path) -> None:
    with serving({"/f": send(BODY)}) as server:
        file = wanted(f"{server.url}/f", tmp_path)
        assert (fetch(file), content(file)) == (len(BODY), BODY)
        assert (fetch(file), len(server.asked)) == (len(BODY), 1)
    assert stat.S_IMODE(os.stat(os.path.dirname(file.path)).st_mode) == 0o700
    assert os.listdir(os.path.dirname(file.path)) == ["file"]


@pytest.mark.parametrize("at", [0, 65535, len(BODY) - 1])
def test_S_01_one_wrong_bit_is_an_error_with_both_hashes_and_nothing_is_kept(tmp_path: Path, at: int) -> None:
    wrong = bytes([*BODY[:at], BODY[at] ^ 1, *BODY[at + 1 :]])
    with serving({"/f": send(wrong)}) as server, pytest.raises(Untrusted) as caught:
        fetch(file := wanted(f"{server.url}/f", tmp_path))
    assert hashlib.sha256(wrong).hexdigest() in caught.value.message
    assert file.sha256 in caught.value.message
    assert content(file) is None


@pytest.mark.parametrize("body", [BODY + b"x", BODY[:-1], b"", BODY * 2])
def test_S_02_another_length_is_refused_before_the_body_is_read(tmp_path: Path, body: bytes) -> None:
    with serving({"/f": send(body)}) as server, pytest.raises(Untrusted, match=f"has {len(body)} bytes of it"):
        fetch(file := wanted(f"{server.url}/f", tmp_path))
    assert content(file) is None


def chunked(body: bytes) -> Reply:
    """A body whose length nobody says."""

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))

    return reply


@pytest.mark.parametrize("body", [BODY + b"x", BODY[:-1]])
def test_S_02_another_length_is_refused_where_the_server_says_none(tmp_path: Path, body: bytes) -> None:
    with serving({"/f": chunked(body)}) as server, pytest.raises(Untrusted):
        fetch(file := wanted(f"{server.url}/f", tmp_path))
    assert content(file) is None


def test_a_body_without_a_length_is_fine(tmp_path: Path) -> None:
    with serving({"/f": chunked(BODY)}) as server:
        fetch(file := wanted(f"{server.url}/f", tmp_path))
    assert content(file) == BODY


# --- what breaks off ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 65536, 65537, 131072, 196608, len(BODY) - 1])
def test_S_03_a_download_that_breaks_off_goes_on_where_it_was(tmp_path: Path, cut: int) -> None:
    with serving({"/f": once(send(BODY[:cut], length=len(BODY), ETag='"one"'), ranged())}) as server:
        fetch(file := wanted(f"{server.url}/f", tmp_path))
        second = server.asked[1][1]
    kept = cut // 65536 * 65536 if cut % 65536 else cut
    assert content(file) == BODY
    assert second.get("Range") in (None, f"bytes={cut}-", f"bytes={kept}-")
    assert second.get("If-Range") == ('"one"' if "Range" in second else None)


@pytest.mark.parametrize(
    "then",
    [
        ranged(tag='"two"'),  # another version: If-Range fails, 200
        send(BODY),  # knows no Range
        send(b"", status=416),
        once(send(BODY[9:], status=206, Content_Range=f"bytes 9-{len(BODY) - 1}/{len(BODY)}"), send(BODY)),
        once(send(BODY[65536:], status=206), send(BODY)),
    ],
)
def test_S_03_a_server_that_cannot_go_on_begins_again(tmp_path: Path, then: Reply) -> None:
    begin = send(BODY[:65536], length=len(BODY), ETag='"one"')
    with serving({"/f": once(begin, once(then, send(BODY)))}) as server:
        fetch(file := wanted(f"{server.url}/f", tmp_path))
    assert content(file) == BODY


def test_S_03_two_versions_are_never_spliced(tmp_path: Path) -> None:
    begin = send(bytes(65536), length=len(BODY))  # of an older file of the same size, and no tag
    with serving({"/f": once(begin, ranged())}) as server:
        fetch(file := wanted(f"{server.url}/f", tmp_path))
        assert [("Range" in headers) for _, headers in server.asked] == [False, True, False]
    assert content(file) == BODY


def test_what_an_interrupted_process_left_is_used(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file.part").write_bytes(BODY[:70000])
    with serving({"/f": ranged()}) as server:
        fetch(file := wanted(f"{server.url}/f", tmp_path))
        assert server.asked[0][1]["Range"] == "bytes=70000-"
    assert content(file) == BODY


@pytest.mark.parametrize("left", [b"garbage", BODY + b"more", bytes(len(BODY))])
def test_what_an_interrupted_process_left_is_not_believed(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file.part").write_bytes(left)
    with serving({"/f": ranged()}) as server:
        fetch(file := wanted(f"{server.url}/f", tmp_path))
    assert content(file) == BODY


def test_a_server_that_is_busy_is_asked_again(tmp_path: Path) -> None:
    with serving({"/f": once(send(b"", status=503), send(BODY))}) as server:
        fetch(file := wanted(f"{server.url}/f", tmp_path))
    assert content(file) == BODY


def test_a_server_that_always_breaks_off_is_given_up(tmp_path: Path) -> None:
    with serving({"/f": send(BODY[:10], length=len(BODY))}) as server:
        with pytest.raises(MirrorError, match="broke off"):
            fetch(wanted(f"{server.url}/f", tmp_path))
        assert len(server.asked) == transport.TRIES


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [b"", BODY[:-1], bytes(len(BODY)), BODY + b"x"])
def test_S_22_a_poisoned_cache_file_is_replaced(tmp_path: Path, poison: bytes) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file").write_bytes(poison)
    with serving({"/f": send(BODY)}) as server:
        fetch(file := wanted(f"{server.url}/f", tmp_path))
    assert content(file) == BODY


def test_S_22_a_symbolic_link_in_the_cache_is_neither_read_nor_written_through(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "precious").write_bytes(BODY)
    (tmp_path / "cache" / "file").symlink_to(tmp_path / "precious")
    with serving({"/f": send(BODY)}) as server:
        fetch(file := wanted(f"{server.url}/f", tmp_path))
        assert len(server.asked) == 1
    assert not os.path.islink(file.path)
    (tmp_path / "cache" / "other.part").symlink_to(tmp_path / "precious")
    with serving({"/f": send(BODY)}) as server, pytest.raises(OSError, match="symbolic links"):
        fetch(wanted(f"{server.url}/f", tmp_path, name="other"))
    assert (tmp_path / "precious").read_bytes() == BODY


def test_two_that_want_the_same_file_fetch_it_once(tmp_path: Path) -> None:
    arrived, go = threading.Event(), threading.Event()

    def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
        arrived.set()
        go.wait(10)
        send(BODY)(handler)

    with serving({"/f": slow}) as server:
        file = wanted(f"{server.url}/f", tmp_path)
        threads = [threading.Thread(target=fetch, args=(file,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        arrived.wait(10)
        go.set()
        for thread in threads:
            thread.join()
        assert len(server.asked) == 1
    assert content(file) == BODY
    assert os.listdir(tmp_path / "cache") == ["file"]


# --- where it leads -------------------------------------------------------------------------------------------------


def moved(location: str, status: int = 302) -> Reply:
    return send(b"over there", status=status, Location=location)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_on_the_same_connection(status: int) -> None:
    with serving({"/a": moved("/b", status), "/b": send(b"here")}) as server:
        assert read(f"{server.url}/a") == b"here"


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "gopher://127.0.0.1/x",
        "http://169.254.169.254/latest/meta-data",
        "http://[fe80::1]/x",
        "data:,x",
        "http://127.0.0.1:99999/",
        "http://[::1/",
        "https://",
    ],
)
def test_S_10_a_redirect_to_where_no_mirror_is_is_refused(location: str) -> None:
    with serving({"/a": moved(location)}) as server, pytest.raises(MirrorError, match="redirected to"):
        read(f"{server.url}/a")


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("https://m.test/a", "http://m.test/a"),
        ("http://m.test/a", "http://127.0.0.1/a"),
        ("http://m.test/a", "http://localhost./a"),
        ("http://m.test/a", "http://x.localhost/a"),
        ("http://m.test/a", "http://[::1]/a"),
        ("http://m.test/a", "http://[::ffff:127.0.0.1]/a"),
        ("http://m.test/a", "http://0.0.0.0/a"),
        ("http://m.test/a", "http://169.254.169.254/a"),
        ("http://127.0.0.1/a", "http://169.254.169.254/a"),
    ],
)
def test_S_10_a_hop_from_safe_to_unsafe_or_from_outside_to_here_is_refused(here: str, there: str) -> None:
    with pytest.raises(MirrorError):
        transport.refuse_hop(urlsplit(here), urlsplit(there))


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("http://m.test/a", "https://m.test/a"),
        ("https://m.test/a", "https://cdn.test/b"),
        ("http://127.0.0.1/a", "http://[::1]/"),
    ],
)
def test_S_10_an_honest_hop_is_followed(here: str, there: str) -> None:
    transport.refuse_hop(urlsplit(here), urlsplit(there))


def test_S_10_a_name_that_turns_out_to_be_this_machine_is_refused() -> None:
    with (
        serving({}) as server,
        socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0)) as sock,
        pytest.raises(MirrorError, match=r"redirected to 127\.0\.0\.1"),
    ):
        transport.refuse_peer(sock, urlsplit("http://m.test/debian"))


def test_S_10_a_hundred_hops_are_too_many() -> None:
    with serving({f"/{n}": moved(f"/{n + 1}") for n in range(100)}) as server:
        with pytest.raises(MirrorError, match="more than 5 redirects"):
            read(f"{server.url}/0")
        assert len(server.asked) == 6


def test_S_10_a_password_stays_with_the_host_it_is_for() -> None:
    with serving({"/b": send(b"b")}) as other, serving({"/a": moved(f"{other.url}/b"), "/c": moved("/d")}) as server:
        server.replies["/d"] = send(b"d")
        url = server.url.replace("http://", "http://user:secret@")
        assert (read(f"{url}/a"), read(f"{url}/c")) == (b"b", b"d")
        assert [headers.get("Authorization") for _, headers in server.asked] == ["Basic dXNlcjpzZWNyZXQ="] * 3
        assert "Authorization" not in other.asked[0][1]


def test_a_password_is_in_no_message(tmp_path: Path) -> None:
    with serving({}) as server, pytest.raises(MirrorError) as caught:
        read(f"{server.url.replace('http://', 'http://user:secret@')}/a")
    assert "secret" not in f"{caught.value.message}{caught.value.hint}"


# --- what never ends ------------------------------------------------------------------------------------------------


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(1 << 16))


def silent(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.connection.recv(1)  # until the client goes away


def dripping(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        handler.wfile.write(b"x")
        time.sleep(0.02)


def headers_only(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for n in range(100_000):
        handler.wfile.write(b"X-%d: y\r\n" % n)


def one_long_header(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(1000):
        handler.wfile.write(b"y" * 1000)


def test_S_12_an_endless_body_is_cut_at_its_limit(tmp_path: Path) -> None:
    with serving({"/f": endless}) as server:
        with pytest.raises(Untrusted, match="more than 100000 bytes"):
            read(f"{server.url}/f", limit=100_000)
        with pytest.raises(Untrusted, match=f"more than the {len(BODY)} bytes promised"):
            fetch(wanted(f"{server.url}/f", tmp_path))


def test_S_12_a_server_that_says_nothing_is_left() -> None:
    with serving({"/f": silent}) as server, pytest.raises(MirrorError, match="no answer in time"):
        read(f"{server.url}/f", idle=0.1)


def test_S_12_a_server_that_says_one_byte_at_a_time_is_left() -> None:
    with serving({"/f": dripping}) as server, pytest.raises(MirrorError, match="too slow"):
        read(f"{server.url}/f", limit=1000, grace=0.2)


@pytest.mark.parametrize("flood", [headers_only, one_long_header])
def test_S_12_headers_without_end_are_refused(flood: Reply) -> None:
    with serving({"/f": flood}) as server, pytest.raises(MirrorError, match="no sensible answer"):
        read(f"{server.url}/f")


@pytest.mark.parametrize("coding", ["gzip", "br", "GZIP, gzip"])
def test_S_12_a_body_that_was_packed_on_the_way_is_refused(coding: str) -> None:
    with serving({"/f": send(b"x", Content_Encoding=coding)}) as server:
        with pytest.raises(MirrorError, match="which nobody asked for"):
            read(f"{server.url}/f")
        assert server.asked[0][1]["Accept-Encoding"] == "identity"


# --- what can't be had ----------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_says_so_at_once() -> None:
    with serving({}) as server:
        with pytest.raises(MirrorError, match="the server says 404"):
            read(f"{server.url}/f")
        assert len(server.asked) == 1


def test_a_refused_connection_is_one_sentence() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(MirrorError, match="connection refused"):
            read(f"{url}/f")


def test_a_name_without_an_address_is_one_sentence() -> None:
    error = transport.explain(socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "http://nosuch.test/x")
    assert error.message == "nosuch.test: no address for this name: Name or service not known"


def test_what_speaks_no_tls_is_one_sentence() -> None:
    with serving({}) as server, pytest.raises(MirrorError, match="TLS failed"):
        read(server.url.replace("http://", "https://") + "/f")


def test_what_speaks_no_http_is_one_sentence() -> None:
    def nonsense(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"220 smtp ready\r\n")
        handler.close_connection = True

    with serving({"/f": nonsense}) as server, pytest.raises(MirrorError, match="no sensible answer"):
        read(f"{server.url}/f")


# --- proxies --------------------------------------------------------------------------------------------------------


def test_a_proxy_is_asked_for_the_whole_url_with_its_own_password() -> None:
    with serving({"http://mirror.test/debian/f": send(b"from the proxy")}) as proxy:
        route = Route({"http": proxy.url.replace("http://", "http://me:pw@")})
        assert read("http://mirror.test/debian/f", route=route) == b"from the proxy"
        assert proxy.asked[0][1]["Proxy-Authorization"] == "Basic bWU6cHc="
        assert proxy.asked[0][1]["Host"] == "mirror.test"


def test_a_proxy_that_refuses_a_tunnel_is_one_sentence() -> None:
    with serving({}) as proxy, pytest.raises(MirrorError, match="mirror.test/f: the proxy refuses: 501"):  # noqa: RUF043
        read("https://mirror.test/f", route=Route({"https": proxy.url}))


@pytest.mark.parametrize("proxy", ["socks5://me:pw@127.0.0.1:1080", "http://me:pw@127.0.0.1:99999", "http://"])
def test_a_kind_of_proxy_we_do_not_speak_is_said_without_its_password(proxy: str) -> None:
    with pytest.raises(DevnsError, match="can't use this kind of proxy") as caught:
        read("http://mirror.test/f", route=Route({"http": proxy}))
    assert "pw" not in caught.value.message


# --- many -----------------------------------------------------------------------------------------------------------


def test_many_files_come_over_few_connections_the_largest_first(tmp_path: Path) -> None:
    bodies = {f"/{n}": bytes([n]) * (n * 1000 + 1) for n in range(30)}
    with serving({path: send(body) for path, body in bodies.items()}) as server:
        files = [wanted(server.url + path, tmp_path, body, path[1:]) for path, body in bodies.items()]
        told: list[int] = []
        ready: list[str] = []
        fetch_all(files, DIRECT, advance=told.append, ready=lambda file: ready.append(file.url), connections=3)
        asked = [path for path, _ in server.asked]
        assert (len(asked), asked.index("/29") < asked.index("/0")) == (30, True)
    assert sum(told) == sum(map(len, bodies.values()))
    assert sorted(ready) == sorted(file.url for file in files)
    assert all(content(file) == bodies["/" + os.path.basename(file.path)] for file in files)


def test_the_first_error_ends_all_and_what_is_complete_stays(tmp_path: Path) -> None:
    with serving({"/good": send(BODY), "/slow": silent}) as server:
        files = [wanted(f"{server.url}/{name}", tmp_path, name=name) for name in ("good", "slow", "missing")]
        with pytest.raises(MirrorError, match="404"):
            fetch_all(files, DIRECT)
        assert content(files[2]) is None
        assert fetch(files[0]) == len(BODY)


def test_a_callers_interrupt_ends_the_downloads(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with serving({"/f": send(BODY), "/slow": silent}) as server:
        files = [wanted(f"{server.url}/{name}", tmp_path, name=name) for name in ("f", "slow")]
        with pytest.raises(KeyboardInterrupt):
            fetch_all(files, DIRECT, advance=interrupt)
    assert not [thread for thread in threading.enumerate() if "work" in thread.name]


def test_a_stop_between_connecting_and_asking_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then `stop` finds no connection to cut."""
    with serving({"/slow": silent}) as server, transport.Session(DIRECT, idle=5.0) as session:
        connect = session._connection

        def stopped_meanwhile(*parts: SplitResult) -> http.client.HTTPConnection:
            connection = connect(*parts)
            session.stop()
            return connection

        monkeypatch.setattr(session, "_connection", stopped_meanwhile)
        with pytest.raises(MirrorError, match="stopped"):
            session.read(f"{server.url}/slow", limit=1)
        assert server.asked == []


def test_nothing_wanted_is_nothing_done() -> None:
    fetch_all([], DIRECT)


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_mirror_may_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a b").write_bytes(BODY)
    file = wanted(f"file://{tmp_path}/a%20b", tmp_path)
    fetch(file)
    assert content(file) == BODY
    with pytest.raises(MirrorError, match="No such file"):
        read(f"file://{tmp_path}/none")


def test_a_fifo_in_a_mirror_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(MirrorError, match="not a file"):
        read(f"file://{tmp_path}/fifo")
