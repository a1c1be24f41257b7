"""[network] mode = "user", the built-in engine: what goes through it arrives, and what fails, fails as on the host."""

from __future__ import annotations

import errno
import hashlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import lab as labs
from tests.kernel.lab import Lab

# --- TCP --------------------------------------------------------------------------------------------------------------


def attempt(address: str, port: int, seconds: float = 5.0) -> str:
    """How connecting ends: "connected", "timeout", or the name of the error."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(seconds)
        try:
            client.connect((address, port))
        except TimeoutError:
            return "timeout"
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "connected"


def attempts(targets: list[tuple[str, int]]) -> list[str]:
    return [attempt(*target) for target in targets]


def exchange(address: str, port: int, data: bytes = b"") -> bytes:
    with socket.create_connection((address, port), 20) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return labs.read_all(client)


OUTCOMES = {
    "refused": (labs.REMOTE, labs.CLOSED, "ECONNREFUSED"),
    "refused, IPv6": (labs.REMOTE6, labs.CLOSED, "ECONNREFUSED"),
    "no such host on the wire": (labs.DEAD, 80, "EHOSTUNREACH"),
    "unreachable": (labs.UNREACHABLE, 80, "EHOSTUNREACH"),
    "prohibited": (labs.PROHIBITED, 80, "EHOSTUNREACH"),
    "no answer": (labs.BLACK_HOLE, 80, "timeout"),
}


def test_a_connection_that_fails_fails_as_on_the_host(lab: Lab) -> None:
    found = lab.inside(attempts, [(address, port) for address, port, _end in OUTCOMES.values()])
    assert dict(zip(OUTCOMES, found, strict=True)) == {case: end for case, (_a, _p, end) in OUTCOMES.items()}


@pytest.mark.parametrize("address", [labs.REMOTE, labs.REMOTE6])
def test_what_follows_the_end_of_one_half_arrives(lab: Lab, address: str) -> None:
    assert lab.inside(exchange, address, labs.HALF, b"x" * 300_001) == b"got 300001"


def hear_reset() -> tuple[bytes, str]:
    with socket.create_connection((labs.REMOTE, labs.RESET), 10) as client:
        client.sendall(b"x")
        data = client.recv(6, socket.MSG_WAITALL)
        try:
            return data, repr(client.recv(1))
        except OSError as error:
            return data, errno.errorcode[error.errno or 0]


def test_a_reset_by_the_server_is_a_reset_and_comes_after_its_data(lab: Lab) -> None:
    assert lab.inside(hear_reset) == (b"before", "ECONNRESET")


def end_by(how: str) -> bytes:
    """End one connection so; how the server saw it, it tells to the next."""
    client = socket.create_connection((labs.REMOTE, labs.SILENT), 10)
    client.recv(100)
    client.sendall(b"x")
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    time.sleep(0.5)
    with socket.create_connection((labs.REMOTE, labs.SILENT), 10) as other:
        return other.recv(100)


def test_the_server_sees_a_reset_as_a_reset_and_an_end_as_an_end(lab: Lab) -> None:
    assert lab.inside(end_by, "end") == b"end\n"
    assert lab.inside(end_by, "reset") == b"Connection reset by peer\n"


def swap(count: int) -> bool:
    """As much as that both ways at once, and what comes back is what went."""
    sent, received, block = hashlib.sha256(), hashlib.sha256(), os.urandom(1 << 16)
    client = socket.create_connection((labs.REMOTE, labs.ECHO), 10)
    client.setblocking(False)
    left, missing, waiting = count, count, memoryview(b"")
    poll = select.poll()
    poll.register(client, select.POLLIN | select.POLLOUT)
    while missing:
        ((_fd, events),) = poll.poll()
        if events & select.POLLOUT and (left or waiting):
            if not waiting:
                piece = left.to_bytes(8, "big") + block
                waiting = memoryview(piece)[: min(left, len(piece))]
                sent.update(waiting)
                left -= len(waiting)
            waiting = waiting[client.send(waiting) :]
            if not waiting and not left:
                poll.modify(client, select.POLLIN)
        if events & select.POLLIN:
            data = client.recv(1 << 16)
            assert data
            received.update(data)
            missing -= len(data)
    return sent.digest() == received.digest()


def test_a_hundred_megabytes_both_ways_at_once_arrive_unchanged(lab: Lab) -> None:
    assert lab.inside(swap, 100 << 20) is True


def crowd(many: int, size: int) -> int:
    """That many connections at once, each with its own bytes there and back; how many were right."""
    poll, right = select.epoll(), 0
    state: dict[int, list[Any]] = {}
    for _ in range(many):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex((labs.REMOTE, labs.ECHO))
        state[client.fileno()] = [client, os.urandom(size), 0, b""]
        poll.register(client, select.EPOLLIN | select.EPOLLOUT)
    until = time.monotonic() + 40
    while state and time.monotonic() < until:
        for fd, events in poll.poll(1):
            row = state[fd]
            if events & select.EPOLLOUT and row[2] < size:
                row[2] += row[0].send(row[1][row[2] :])
                if row[2] == size:
                    poll.modify(fd, select.EPOLLIN)
            if events & (select.EPOLLIN | select.EPOLLERR | select.EPOLLHUP):
                data = row[0].recv(1 << 16)
                row[3] += data
                if not data or len(row[3]) == size:
                    right += row[3] == row[1]
                    poll.unregister(fd)
                    del state[fd]
    return right


def test_a_thousand_connections_at_once_keep_their_bytes_apart(lab: Lab) -> None:
    assert lab.inside(crowd, 1000, 65536) == 1000


def reuse(times: int) -> int:
    """Connect again and again from one port, each connection ended by a reset; how often it worked."""
    worked = 0
    for _ in range(times):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.settimeout(5)
            client.bind(("", 40000))
            client.connect((labs.REMOTE, labs.ECHO))
            client.sendall(b"x")
            worked += client.recv(1) == b"x"
    return worked


def test_a_port_that_is_used_again_at_once_makes_a_new_connection(lab: Lab) -> None:
    assert lab.inside(reuse, 100) == 100


# --- bounds -----------------------------------------------------------------------------------------------------------


def resident(pid: int) -> int:
    """KiB of its own memory: what it shares with the parent it was forked from is not counted."""
    text = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(text[1]) - int(text[2])) * 4


def hold_open(mouth: int, many: int) -> int:
    clients = []
    for _ in range(many):
        client = socket.create_connection((labs.REMOTE, labs.ECHO), 20)
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        clients.append(client)
    os.write(mouth, b"x")
    time.sleep(1)
    clients[0].sendall(b"y")
    clients[-1].sendall(b"y")
    return sum(client.recv(1) == b"y" for client in (clients[0], clients[-1]))


def measure(engine: int, ear: int) -> int:
    before = resident(engine)
    os.read(ear, 1)
    return resident(engine) - before


def test_two_thousand_idle_connections_stay_open_and_cost_little(lab: Lab) -> None:
    open_, cost = lab.inside(hold_open, 2000, drive=measure)
    assert (open_, cost < 16 << 10) == (2, True)


def never_read(mouth: int) -> int:
    """Ask for a lot, and take none of it for a while; then all of it."""
    count = 30 << 20
    with socket.create_connection((labs.REMOTE, labs.LARGE), 10) as client:
        client.sendall(count.to_bytes(8, "big"))
        time.sleep(1)
        os.write(mouth, b"x")
        time.sleep(0.2)
        return sum(iter(lambda: len(client.recv(1 << 16)), 0))


def test_who_reads_late_gets_all_and_the_engine_keeps_little_meanwhile(lab: Lab) -> None:
    got, cost = lab.inside(never_read, drive=measure)
    assert (got, cost < 4 << 10) == (30 << 20, True)


def come_and_go(mouth: int, many: int) -> int:
    worked = 0
    for number in range(many):
        worked += exchange(labs.REMOTE, labs.HALF, b"x") == b"got 1"
        if number in (many // 10, many - 1):
            time.sleep(0.2)
            os.write(mouth, b"x")
    time.sleep(1)
    return worked


def compare(engine: int, ear: int) -> int:
    os.read(ear, 1)
    before = resident(engine)
    os.read(ear, 1)
    return resident(engine) - before


def test_a_thousand_connections_one_after_the_other_leave_nothing(lab: Lab) -> None:
    worked, grown = lab.inside(come_and_go, 1000, drive=compare)
    assert (worked, grown < 1 << 10) == (1000, True)


# --- UDP --------------------------------------------------------------------------------------------------------------


def datagram(address: str, data: bytes, port: int = labs.ECHO) -> bytes | str:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(3)
        client.connect((address, port))
        client.send(data)
        try:
            return client.recv(1 << 16)
        except TimeoutError:
            return "timeout"
        except OSError as error:
            return errno.errorcode[error.errno or 0]


@pytest.mark.parametrize("address", [labs.REMOTE, labs.REMOTE6])
@pytest.mark.parametrize("size", [0, 1, 1400, 9000, 65487])
def test_a_datagram_of_any_size_comes_back(lab: Lab, address: str, size: int) -> None:
    assert lab.inside(datagram, address, b"x" * size) == b"x" * size


@pytest.mark.parametrize("address", [labs.REMOTE, labs.REMOTE6])
def test_a_closed_udp_port_says_so(lab: Lab, address: str) -> None:
    assert lab.inside(datagram, address, b"x", 9999) == "ECONNREFUSED"


def flows(many: int) -> int:
    clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(many)]
    for number, client in enumerate(clients):
        client.settimeout(3)
        client.sendto(b"%d" % number, (labs.REMOTE, labs.ECHO))
    return sum(client.recvfrom(64) == (b"%d" % number, (labs.REMOTE, 7)) for number, client in enumerate(clients))


def test_two_hundred_flows_of_datagrams_at_once_are_kept_apart(lab: Lab) -> None:
    assert lab.inside(flows, 200) == 200


def test_more_flows_than_are_kept_go_through_all_the_same(lab: Lab) -> None:
    assert lab.inside(flows_one_by_one, 1500) == 1500


def flows_one_by_one(many: int) -> int:
    return sum(datagram(labs.REMOTE, b"x") == b"x" for _ in range(many))


# --- echo requests ----------------------------------------------------------------------------------------------------


def ping(address: str, ttl: int = 64) -> str:
    """What comes of one echo request: "reply", "timeout", or the type and code of the error and who sent it."""
    v6 = ":" in address
    family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if v6 else (socket.AF_INET, socket.IPPROTO_ICMP)
    with socket.socket(family, socket.SOCK_DGRAM, protocol) as client:
        level, receive_errors, hops = (41, 25, socket.IPV6_UNICAST_HOPS) if v6 else (0, 11, socket.IP_TTL)
        client.setsockopt(level, receive_errors, 1)
        client.setsockopt(level, hops, ttl)
        client.sendto((b"\x80" if v6 else b"\x08") + bytes(5) + b"\0\1" + b"payload", (address, 0))
        poll = select.poll()
        poll.register(client, select.POLLIN)
        for _fd, events in poll.poll(1500):
            if events & select.POLLERR:
                _data, ancillary, _flags, _peer = client.recvmsg(512, 512, socket.MSG_ERRQUEUE)
                value = next(value for _level, kind, value in ancillary if kind == receive_errors)
                by = socket.inet_ntop(family, value[24:40] if v6 else value[20:24])
                return f"{value[5]}/{value[6]} by {by}"
            return "reply" if client.recv(512)[8:] == b"payload" else "wrong"
    return "timeout"


def pings(targets: list[tuple[str, int]]) -> list[str]:
    return [ping(*target) for target in targets]


def test_an_echo_request_is_answered_when_the_hosts_own_is(lab: Lab) -> None:
    alive = [(labs.REMOTE, 64), (labs.REMOTE6, 64), ("10.0.2.2", 64), ("10.0.2.3", 64)]
    assert lab.inside(pings, alive) == ["reply"] * 4


def test_an_echo_request_to_nobody_is_not_answered(lab: Lab) -> None:
    dead = [(labs.BLACK_HOLE, 64), (labs.UNREACHABLE, 64), (labs.PROHIBITED, 64)]
    assert lab.inside(pings, dead) == ["timeout", "3/1 by 10.0.2.2", "3/13 by 10.0.2.2"]


def test_the_gateway_is_a_hop_on_the_way(lab: Lab) -> None:
    assert lab.inside(pings, [(labs.REMOTE, 1), (labs.REMOTE6, 1)]) == ["11/0 by 10.0.2.2", "3/0 by fd00:d::2"]


# --- names ------------------------------------------------------------------------------------------------------------


def look_up(name: str) -> list[str]:
    try:
        rows = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror as error:
        return [str(error.strerror)]
    return sorted({str(row[4][0]) for row in rows})


def query(name: str, kind: int = 1) -> bytes:
    return b"\x12\x34\1\0\0\1" + bytes(6) + labs.encode(name) + kind.to_bytes(2, "big") + b"\0\1"


def ask_by_tcp(*names: str) -> list[int]:
    """The result codes that one connection to the forwarder gives for several questions at once."""
    with socket.create_connection(("10.0.2.3", 53), 10) as client:
        client.sendall(b"".join(len(query(name)).to_bytes(2, "big") + query(name) for name in names))
        codes = []
        for _ in names:
            length = int.from_bytes(client.recv(2, socket.MSG_WAITALL), "big")
            codes.append(client.recv(length, socket.MSG_WAITALL)[3] & 15)
        return sorted(codes)


def test_names_resolve_as_on_the_host(lab: Lab) -> None:
    assert lab.inside(look_up, "good.example") == [labs.REMOTE]
    assert lab.inside(look_up, "alias.example") == [labs.REMOTE]
    assert lab.inside(look_up, "nowhere.example") == ["Name or service not known"]


def test_names_resolve_over_tcp_too_several_at_once(lab: Lab) -> None:
    assert lab.inside(ask_by_tcp, "good.example", "nowhere.example", "end.example") == [0, 0, 3]


def look_up_twice(mouth: int) -> list[list[str]]:
    before = look_up("good.example")
    os.write(mouth, b"x")
    time.sleep(0.5)
    return [before, look_up("good.example")]


def test_a_resolver_that_changes_while_the_environment_runs_is_asked_from_then_on(lab: Lab) -> None:
    text = lab.resolv_conf.read_text()
    lab.start("host", labs.serve_names, "127.0.0.54", [("good.example", 1, 60, "192.0.2.99")])

    def move(engine: int, ear: int) -> None:
        os.read(ear, 1)
        lab.resolv_conf.write_text("nameserver 127.0.0.54\n")

    try:
        assert lab.inside(look_up_twice, drive=move) == ([[labs.REMOTE], ["192.0.2.99"]], None)
    finally:
        lab.resolv_conf.write_text(text)


def test_a_resolver_that_is_gone_is_passed_over_for_the_next(lab: Lab) -> None:
    text = lab.resolv_conf.read_text()
    try:
        lab.resolv_conf.write_text("nameserver 127.0.0.99\nnameserver 127.0.0.53\n")
        assert lab.inside(look_up, "good.example") == [labs.REMOTE]
        lab.resolv_conf.write_text("nameserver 127.0.0.99\n")
        assert lab.inside(look_up, "good.example") == ["Temporary failure in name resolution"]
    finally:
        lab.resolv_conf.write_text(text)


def send_to_forwarder(messages: list[bytes]) -> list[str]:
    """Send these as datagrams, and then an ordinary question."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(2)
        client.connect(("10.0.2.3", 53))
        for message in messages:
            client.send(message)
        return look_up("good.example")


def test_what_is_no_question_does_not_stop_the_forwarder(lab: Lab) -> None:
    loop = query("good.example")[:12] + b"\xc0\x0c\0\1\0\1"
    beyond = query("good.example")[:12] + b"\x3f" + b"x" * 20
    junk = [b"", b"\0", bytes(12), bytes(17), loop, beyond, os.urandom(512), query("x" * 63 + "." + "y" * 63, 252)]
    assert lab.inside(send_to_forwarder, junk) == [labs.REMOTE]


# --- the end ----------------------------------------------------------------------------------------------------------


def lose_the_engine(mouth: int) -> list[str]:
    with socket.create_connection((labs.REMOTE, labs.ECHO), 10) as client:
        client.sendall(b"x")
        client.recv(1)
        os.write(mouth, b"x")
        try:
            ended = repr(client.recv(1))
        except OSError as error:
            ended = errno.errorcode[error.errno or 0]
    until = time.monotonic() + 20
    while (now := attempt(labs.REMOTE, labs.ECHO, 1)) != "ENETUNREACH" and time.monotonic() < until:
        time.sleep(0.1)
    return [ended, now]


def kill(engine: int, ear: int) -> None:
    os.read(ear, 1)
    os.kill(engine, signal.SIGKILL)


def test_N_12_when_the_engine_is_killed_connections_are_reset_and_there_is_no_network_and_that_is_said(
    lab: Lab,
) -> None:
    notes: list[str] = []
    assert lab.inside(lose_the_engine, drive=kill, notes=notes) == (["ECONNRESET", "ENETUNREACH"], None)
    said = "network: the engine has ended (it was killed): from now on the environment has no network"
    assert notes == [said]


def kill_gate(engine: int, ear: int) -> None:
    os.read(ear, 1)
    os.kill(labs.children(engine)[0], signal.SIGKILL)


def test_N_12_when_the_gate_is_killed_so_is_the_network(lab: Lab) -> None:
    notes: list[str] = []
    assert lab.inside(lose_the_engine, drive=kill_gate, notes=notes) == (["ECONNRESET", "ENETUNREACH"], None)
    assert len(notes) == 1
    assert "the engine has ended (GateClosed: the gateway's process was killed)" in notes[0]


def stay(mouth: int) -> None:
    os.write(mouth, b"x")
    time.sleep(60)


def launch(ready: Callable[[], None], directory: str, told: str) -> None:
    """A launch that goes on until its process is killed; `told` is the file for the pids of engine and gate."""

    def tell(engine: int, ear: int) -> None:
        os.read(ear, 1)
        Path(told).write_text(f"{engine} {labs.children(engine)[0]}")
        ready()

    labs.enter(directory, {"mode": "user", "publish": ["8130:80"]}, stay, (), tell)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_when_the_parent_is_killed_engine_and_gate_end_and_nothing_listens(lab: Lab, tmp_path: Path) -> None:
    told = tmp_path / "told"
    parent = lab.start("user", launch, str(tmp_path), str(told))
    pids = [int(word) for word in told.read_text().split()]
    assert [is_running(pid) for pid in pids] == [True, True]
    assert lab.on("user", attempt, "127.0.0.1", 8130) == "connected"
    os.kill(parent, signal.SIGKILL)
    until = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    assert [is_running(pid) for pid in pids] == [False, False]
    assert lab.on("user", attempt, "127.0.0.1", 8130) == "ECONNREFUSED"
