"""[network] mode = "user": what stays closed, and what the engine may. Ids are those of the catalogue of cases."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from devns import linux
from devns_network import carrier, packets
from tests.kernel import lab as labs
from tests.kernel.lab import Lab

CANARY = 7001


@pytest.fixture(scope="module", autouse=True)
def canaries(lab: Lab) -> None:
    lab.start("host", labs.serve_canaries, CANARY)


def reach(address: str, port: int) -> str:
    """What is heard from there by TCP and by UDP: nothing but errors, it is hoped."""
    heard = []
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as client:
            client.settimeout(1)
            try:
                client.connect((address, port))
                client.send(b"x")
                heard.append(client.recv(64).decode())
            except TimeoutError:
                heard.append("timeout")
            except OSError as error:
                heard.append(errno.errorcode[error.errno or 0])
    return " ".join(heard)


def reach_all(targets: list[tuple[str, int]]) -> list[str]:
    return [reach(*target) for target in targets]


# Each of these leads to the canaries when it is tried on the host itself.
OWN = ["127.0.0.1", "127.0.0.2", "::1", labs.HOST, labs.HOST6]


def test_the_canaries_are_heard_on_the_host_itself(lab: Lab) -> None:
    assert lab.on("user", reach_all, [(address, CANARY) for address in OWN]) == ["canary canary"] * len(OWN)


@pytest.mark.parametrize(
    "address", [*OWN, "10.0.2.2", "fd00:d::2", "10.0.2.3", "169.254.1.1", "169.254.1.2", "0.0.0.0"]
)
def test_N_01_the_hosts_loopback_and_own_addresses_are_closed(lab: Lab, address: str) -> None:
    assert "canary" not in lab.inside(reach, address, CANARY)


def test_N_01_a_port_of_the_hosts_loopback_that_is_opened_is_reached_and_no_other(lab: Lab) -> None:
    lab.start("host", labs.serve_canaries, 7003)
    targets = [
        ("10.0.2.2", CANARY),
        ("127.0.0.1", CANARY),
        ("10.0.2.2", 7003),
        ("127.0.0.1", 7003),
        (labs.HOST, CANARY),
    ]
    first, second, *rest = lab.inside(reach_all, targets, host_loopback=[CANARY])
    assert (first, second.split()[0]) == ("canary canary", "canary")
    assert not any("canary" in heard for heard in rest)


# What an address family or a notation might hide: with a packet of one's own making every one of them can be tried.
CRAFTED = [
    *("127.0.0.1", "127.0.0.53", "0.0.0.0", "255.255.255.255", labs.HOST, labs.METADATA, "10.0.2.2", "169.254.0.1"),
    *("::", "::1", "::ffff:127.0.0.1", f"::ffff:{labs.HOST}", "::127.0.0.1", labs.HOST6, "fe80::1", "fd00:d::2"),
    *("64:ff9b::7f00:1", f"64:ff9b::{labs.METADATA}", "2002:7f00:1::1", "ff02::1", "fd00:ec2::254"),
]


def craft(address: str, port: int) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    source = socket.inet_pton(family, "fd00:d::100" if family == socket.AF_INET6 else "10.0.2.100")
    body = struct.pack(">HHIIBBHHH", random.randrange(30000, 60000), port, 1, 0, 0x50, 2, 64000, 0, 0)
    packet = packets.wrap(source, socket.inet_pton(family, address), packets.TCP, body)
    return packet if family == socket.AF_INET6 else packet[:2] + struct.pack(">H", len(packet)) + packet[4:]


def throw(batch: list[bytes]) -> list[str]:
    """Put packets on the wire to the gateway, from inside, and say what TCP answers came."""
    with contextlib.suppress(OSError):
        socket.create_connection((labs.REMOTE, labs.ECHO), 5).close()  # so that the gateway's link address is known
    lines = [line.split() for line in Path("/proc/self/net/arp").read_text().splitlines()]
    link = bytes.fromhex(next(words[3] for words in lines if words[0] == "10.0.2.2").replace(":", ""))
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as wire:
        wire.bind(("eth0", 3))  # ETH_P_ALL
        wire.settimeout(0.5)
        for packet in batch:
            with contextlib.suppress(OSError):
                wire.sendto(packet, ("eth0", 0x86DD if packet[:1] >= b"\x60" else 0x0800, 0, 0, link))
        answers = []
        until = time.monotonic() + 2
        while time.monotonic() < until:
            try:
                data, sender = wire.recvfrom(2048)
            except TimeoutError:
                break
            seen = packets.parse(data)
            if seen is None or sender[2] == 4 or seen.protocol != packets.TCP:  # PACKET_OUTGOING
                continue
            if seen.body[13] & 0x12 == 0x12 and int.from_bytes(seen.ports[:2], "big") == CANARY:  # SYN, ACK
                family = socket.AF_INET6 if len(seen.source) == 16 else socket.AF_INET
                answers.append(socket.inet_ntop(family, seen.source))
        return answers


def test_N_01_no_way_of_writing_an_address_leads_to_what_is_closed(lab: Lab) -> None:
    assert lab.wired(throw, [craft(address, CANARY) for address in CRAFTED]) == []


def test_a_crafted_packet_to_what_is_open_is_answered(lab: Lab) -> None:
    """Without this the test before it would show nothing."""
    lab.start("remote", labs.serve_canaries, CANARY)
    answers = lab.wired(throw, [craft(labs.REMOTE, CANARY), craft(labs.REMOTE6, CANARY)])
    assert sorted(answers) == [labs.REMOTE6, labs.REMOTE]


def test_N_02_the_hosts_resolver_is_no_side_door(lab: Lab) -> None:
    targets = [("127.0.0.53", 53), ("10.0.2.3", CANARY), ("10.0.2.2", 53), ("10.0.2.3", 22)]
    heard = lab.inside(reach_all, targets)
    assert [words.split()[0] for words in heard] == ["ECONNREFUSED", "ECONNREFUSED", "EHOSTUNREACH", "ECONNREFUSED"]


def ask_for_zone() -> int:
    question = b"\x12\x34\1\0\0\1" + bytes(6) + labs.encode("good.example") + b"\0\xfc\0\1"  # AXFR
    with socket.create_connection(("10.0.2.3", 53), 5) as client:
        client.sendall(len(question).to_bytes(2, "big") + question)
        return client.recv(64)[5] & 15


def test_N_02_the_forwarder_asks_for_no_zone(lab: Lab) -> None:
    assert lab.inside(ask_for_zone) == 5  # REFUSED


def test_N_03_a_clouds_metadata_and_link_local_addresses_are_closed(lab: Lab) -> None:
    lab.start("remote", labs.serve_canaries, 7004)
    assert lab.on("user", reach, labs.METADATA, 7004) == "canary canary"  # the host itself reaches it
    assert lab.inside(reach, labs.METADATA, 7004) == "EHOSTUNREACH EHOSTUNREACH"


def abstract(name: str) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(f"\0{name}")
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "connected"


def serve_abstract(ready: Callable[[], None], name: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        ready()
        signal.pause()


def test_E_17_the_hosts_abstract_sockets_are_another_networks(lab: Lab) -> None:
    lab.start("host", serve_abstract, "devns-lab")
    assert lab.on("host", abstract, "devns-lab") == "connected"
    assert lab.inside(abstract, "devns-lab") == "ECONNREFUSED"


def make_raw() -> list[str]:
    found = []
    for family, kind in ((socket.AF_INET, socket.SOCK_RAW), (socket.AF_PACKET, socket.SOCK_RAW)):
        try:
            socket.socket(family, kind, socket.IPPROTO_ICMP if family == socket.AF_INET else 0).close()
            found.append("made")
        except OSError as error:
            found.append(errno.errorcode[error.errno or 0])
    return found


def test_N_09_no_raw_socket_is_made_inside(lab: Lab) -> None:
    assert lab.inside(make_raw) == ["EPERM", "EAFNOSUPPORT"]


def advertise() -> list[str]:
    """Before and after a router's advertisement from inside to the gateway, and a redirect: what is reached."""
    before = reach(labs.REMOTE6, labs.ECHO)
    prefix = struct.pack(">BBBBIII", 3, 4, 64, 0xC0, 3600, 3600, 0) + socket.inet_pton(socket.AF_INET6, "2001:db8:99::")
    said = struct.pack(">BBHBBHII", 134, 0, 0, 255, 0, 1800, 0, 0) + prefix
    ends = [socket.inet_pton(socket.AF_INET6, address) for address in ("fe80::100", "fe80::2")]
    packet = bytearray(packets.wrap(ends[0], ends[1], packets.ICMPV6, said))
    packet[7] = 255  # hops, as neighbour discovery wants them
    packet[42:44] = packets._summed(ends[0], ends[1], packets.ICMPV6, said, 2)[2:4]
    throw([bytes(packet)])
    return [before, reach(labs.REMOTE6, labs.ECHO)]


def test_N_09_an_advertisement_from_inside_changes_nothing(lab: Lab) -> None:
    assert lab.wired(advertise) == ["x x", "x x"]


def hostile(count: int) -> list[bytes]:
    """Packets that are nearly right: pieces, lies about lengths, options, floods of openings."""
    chance = random.Random(7)
    made = []
    for number in range(count):
        packet = bytearray(
            craft(f"198.51.{number % 200}.{number % 250}" if number % 2 else f"2001:db8:99::{number % 9999:x}", 80)
        )
        for _ in range(chance.randrange(4)):
            packet[chance.randrange(len(packet))] = chance.randrange(256)
        packet = packet[: chance.randrange(1, len(packet) + 1)] if number % 5 == 0 else packet
        made.append(bytes(packet) + (os.urandom(chance.randrange(200)) if number % 7 == 0 else b""))
    return made


def throw_hostile(many: int) -> str:
    for _ in range(many // 2000):
        throw(hostile(2000))
    return reach(labs.REMOTE, labs.ECHO)


def test_N_10_hostile_packets_do_not_stop_the_engine(lab: Lab) -> None:
    assert lab.wired(throw_hostile, 20_000) == "x x"


# --- N-11: what a taken-over engine could do --------------------------------------------------------------------------


def locked(attempts: list[Callable[[], object]]) -> list[str]:
    """What comes of each attempt in a process that is locked in as the engine is."""
    ear, mouth = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            carrier.lock_in()
            found = []
            for attempt in attempts:
                try:
                    attempt()
                    found.append("done")
                except OSError as error:
                    found.append(errno.errorcode[error.errno or 0])
            os.write(mouth, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(mouth)
    with os.fdopen(ear) as file:
        words = file.read()
    os.waitpid(pid, 0)
    return list(json.loads(words))


def test_N_11_a_locked_in_engine_can_do_its_work_and_nothing_else(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("x")
    above = os.getpid()
    refused: dict[str, Callable[[], object]] = {
        "write a file": lambda: os.open(victim, os.O_WRONLY),
        "make a file": lambda: os.open(tmp_path / "new", os.O_RDONLY | os.O_CREAT),
        "remove a file": lambda: os.unlink(victim),
        "run a program": lambda: os.execv("/bin/true", ["true"]),
        "fork": os.fork,
        "send a signal": lambda: os.kill(os.getppid(), 0),
        "a raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        "a local socket": lambda: socket.socket(socket.AF_UNIX),
        "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "another namespace": lambda: linux.unshare(linux.CLONE_NEWUSER),
        "look into another process": lambda: os.open(f"/proc/{above}/mem", os.O_RDONLY),
    }
    assert dict(zip(refused, locked(list(refused.values())), strict=True)) == {
        name: "EACCES" if name == "look into another process" else "EPERM" for name in refused
    }
    allowed: list[Callable[[], object]] = [
        lambda: os.close(os.open("/etc/resolv.conf", os.O_RDONLY)),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close(),
        lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close(),
    ]
    assert locked(allowed) == ["done"] * 3
    if linux.landlock_abi():
        assert locked([lambda: os.open(victim, os.O_RDONLY)]) == ["EACCES"]


def status_of(engine: int, ear: int) -> dict[str, str]:
    os.read(ear, 1)
    found = {}
    for pid in (engine, labs.children(engine)[0]):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        rows = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        found[f"{rows['CapEff']} {rows['NoNewPrivs']} {rows['Seccomp']}"] = "gate" if pid != engine else "engine"
    return found


def stay_a_moment(mouth: int) -> None:
    os.write(mouth, b"x")
    time.sleep(0.5)


def test_N_11_the_engine_has_no_capability_and_the_gate_one(lab: Lab) -> None:
    net_raw = f"{1 << linux.CAPABILITIES.index('net_raw'):016x}"
    _none, found = lab.inside(stay_a_moment, drive=status_of)
    assert found == {f"{0:016x} 1 2": "engine", f"{net_raw} 1 2": "gate"}


# --- what is left behind ----------------------------------------------------------------------------------------------


def listening() -> list[str]:
    lines = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
    return sorted(line.split()[1] for line in lines if line.split()[3] == "0A")


def test_nothing_listens_and_nothing_runs_afterwards(lab: Lab) -> None:
    before = lab.on("host", listening)
    assert lab.inside(reach, labs.REMOTE, labs.ECHO, publish=["8123:80"], host_loopback=[CANARY]) == "x x"
    assert lab.on("host", listening) == before
