"""[network] publish: ports of the host that lead inside, as the built-in engine opens them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from devns.errors import Unsupported
from devns.launch import Child
from devns_network import engine
from tests.kernel import lab as labs
from tests.kernel.lab import Lab


def serve(mouth: int, address: str = "") -> list[str]:
    """One client: who it is, seen from inside, and how much it sent, which it is told."""
    family = socket.AF_INET6 if ":" in address or not address else socket.AF_INET
    with socket.create_server((address, 8000), family=family, dualstack_ipv6=not address) as listener:
        listener.settimeout(4)
        os.write(mouth, b"x")
        try:
            client, peer = listener.accept()
        except TimeoutError:
            return ["nobody"]
        with client:
            data = labs.read_all(client)
            client.sendall(b"%d" % len(data))
            return [peer[0].removeprefix("::ffff:"), str(len(data))]


def call(address: str, port: int) -> str:
    try:
        with socket.create_connection((address, port), 5) as client:
            client.sendall(b"x" * 300_001)
            client.shutdown(socket.SHUT_WR)
            return labs.read_all(client).decode()
    except OSError as error:
        return os.strerror(error.errno or 0)


def call_here(engine: int, ear: int) -> str:
    os.read(ear, 1)
    return call("127.0.0.1", 8123)


def call_here_by_v6(engine: int, ear: int) -> str:
    os.read(ear, 1)
    return call("::1", 8123)


def test_N_06_a_client_on_the_host_reaches_inside_and_is_no_loopback_there(lab: Lab) -> None:
    assert lab.inside(serve, drive=call_here, publish=["8123:8000"]) == (["10.0.2.2", "300001"], "300001")


def test_N_06_so_is_one_that_comes_by_ipv6(lab: Lab) -> None:
    assert lab.inside(serve, drive=call_here_by_v6, publish=["[::1]:8123:8000"]) == (["fd00:d::2", "300001"], "300001")


def call_until_heard(ready: Callable[[], None], address: str, port: int) -> None:
    ready()
    for _ in range(200):
        if call(address, port) == "300001":
            return
        time.sleep(0.05)


def wait_for_word(engine: int, ear: int) -> None:
    os.read(ear, 1)


@pytest.mark.parametrize(
    ("published", "address", "peer"),
    [("0.0.0.0:8124:8000", labs.HOST, "198.18.0.2"), ("[::]:8124:8000", labs.HOST6, "2001:db8:18::2")],
)
def test_N_06_a_client_from_elsewhere_is_seen_as_itself(lab: Lab, published: str, address: str, peer: str) -> None:
    lab.start("remote", call_until_heard, address, 8124)
    notes: list[str] = []
    got, _none = lab.inside(serve, drive=wait_for_word, publish=[published], notes=notes)
    assert got == [peer, "300001"]
    assert "is open to the network" in notes[0]


def listening(engine: int, ear: int) -> list[str]:
    os.read(ear, 1)
    found = []
    for name in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]]
        found += [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{8123:04X}")]
    call("127.0.0.1", 8123)
    return found


def test_N_04_a_published_port_is_open_on_the_hosts_loopback_alone(lab: Lab) -> None:
    _got, found = lab.inside(serve, drive=listening, publish=["8123:8000"])
    assert found == ["0100007F:1FBB"]


def test_N_05_a_service_on_the_environments_own_loopback_is_not_published(lab: Lab) -> None:
    got, heard = lab.inside(serve, "127.0.0.1", drive=call_here, publish=["8123:8000"])
    assert (got, heard) == (["nobody"], "Connection reset by peer")


def take(port: int) -> list[str]:
    """What starting says where the port is taken, and what is left of it."""
    with socket.create_server(("127.0.0.1", port)):
        before = labs.children(os.getpid())
        try:
            with engine.hold({"op": "", "publish": [["127.0.0.1", port, 80]]}, Child(os.getpid(), print)):
                return ["started"]
        except Unsupported as error:
            return [error.message, *map(str, set(labs.children(os.getpid())) - set(before))]


def test_N_07_a_taken_port_is_an_error_and_nothing_starts(lab: Lab) -> None:
    assert lab.on("user", take, 8125) == ["network: port 8125 of 127.0.0.1 cannot be opened: address already in use"]
