"""packets, netlink and relayed bytes: what is read off the wire, what is sent back, and the filter in between."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devns.linux import attach_filter
from devns_network import netlink, packets

V4 = (bytes([10, 0, 2, 100]), bytes([203, 0, 113, 10]))
V6 = (socket.inet_pton(socket.AF_INET6, "fd00:d::100"), socket.inet_pton(socket.AF_INET6, "2001:db8::1"))
BOTH = pytest.mark.parametrize("ends", [V4, V6], ids=["IPv4", "IPv6"])


def folded(data: bytes) -> int:
    """The one's complement sum as RFC 1071 writes it down: 16 bits at a time, carries added at the end."""
    total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def tcp(ends: tuple[bytes, bytes], flags: int = 2, options: bytes = b"", data: bytes = b"") -> bytes:
    head = struct.pack(">HHIIBBHHH", 40000, 443, 0xFFFFFFFF, 0, (20 + len(options)) << 2, flags, 64000, 0xBAD, 0)
    return whole(packets.wrap(*ends, packets.TCP, head + options + data))


def whole(packet: bytes) -> bytes:
    """With the length that the kernel fills in."""
    return packet if packet[0] >> 4 == 6 else packet[:2] + struct.pack(">H", len(packet)) + packet[4:]


def parsed(data: bytes) -> packets.Packet:
    packet = packets.parse(data)
    assert packet is not None
    return packet


def is_summed(packet: packets.Packet) -> bool:
    """Does the checksum of the transport header hold?"""
    if packet.protocol == packets.ICMP:
        return folded(packet.body) == 0xFFFF
    pseudo = packet.source + packet.destination + struct.pack(">II", len(packet.body), packet.protocol)
    return folded(pseudo + packet.body) == 0xFFFF


@given(st.binary(max_size=200))
def test_a_checksum_is_that_of_the_rfc(data: bytes) -> None:
    assert packets.checksum(data) in (0xFFFF - folded(data), *([0xFFFF] if folded(data) in (0, 0xFFFF) else []))


@given(st.binary(max_size=120) | st.builds(lambda rest: b"\x45\0\0\x28" + rest, st.binary(max_size=80)))
@settings(max_examples=500)
def test_whatever_comes_off_the_wire_is_a_packet_or_is_none(data: bytes) -> None:
    packet = packets.parse(data)
    if packet is not None:
        assert len(packet.data) <= len(data)
        assert packet.start + 8 <= len(packet.data)
        assert len(packet.ports) == 4


@BOTH
def test_an_opening_is_repeated_with_its_checksum_and_without_what_it_carried(ends: tuple[bytes, bytes]) -> None:
    options = b"\x02\x04\xff\xc8\x01\x01\x01\x00"
    syn = parsed(tcp(ends, options=options, data=b"early"))
    again = parsed(whole(packets.fresh_syn(syn)))
    assert (again.source, again.destination, again.ports, again.body[20:]) == (*ends, syn.ports, options)
    assert is_summed(again)


@BOTH
def test_a_refusal_acknowledges_the_opening(ends: tuple[bytes, bytes]) -> None:
    answer = parsed(whole(packets.reset(parsed(tcp(ends)))))
    assert (answer.source, answer.destination, answer.ports) == (ends[1], ends[0], struct.pack(">HH", 443, 40000))
    assert (answer.body[8:12], answer.body[13]) == (bytes(4), 0x14)  # 0xffffffff and one; RST and ACK
    assert is_summed(answer)


@BOTH
def test_an_error_quotes_what_it_is_about(ends: tuple[bytes, bytes]) -> None:
    about = parsed(tcp(ends))
    said = parsed(whole(packets.icmp_error(ends[1], about, 3, 4, 1400)))
    assert (said.source, said.destination, said.body[:2]) == (ends[1], ends[0], b"\3\4")
    assert said.body[4:] == struct.pack(">I", 1400) + about.data
    assert is_summed(said)


@BOTH
def test_a_reply_carries_the_number_of_its_request(ends: tuple[bytes, bytes]) -> None:
    protocol, kinds = (packets.ICMP, (8, 0)) if len(ends[0]) == 4 else (packets.ICMPV6, (128, 129))
    request = parsed(whole(packets.wrap(*ends, protocol, bytes([kinds[0], 0, 0, 0]) + b"\x12\x34\0\7abc")))
    reply = parsed(whole(packets.echo_reply(request, request.body[6:])))
    assert (reply.source, reply.destination) == (ends[1], ends[0])
    assert (reply.body[0], reply.body[4:]) == (kinds[1], b"\x12\x34\0\7abc")
    assert is_summed(reply)


# --- the filter, as the running kernel judges it ----------------------------------------------------------------------


@pytest.fixture(params=[4, 6])
def wire(request: pytest.FixtureRequest) -> Iterator[tuple[int, socket.socket, socket.socket]]:
    """A pair of sockets, of which the second takes what the filter lets through."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        attach_filter(far.fileno(), packets.first_packets(request.param))
        far.setblocking(False)
        yield request.param, near, far


def test_the_filter_takes_openings_and_echo_requests_and_nothing_else(
    wire: tuple[int, socket.socket, socket.socket],
) -> None:
    version, near, far = wire
    ends = V4 if version == 4 else V6
    icmp, echo, other = (packets.ICMP, 8, 13) if version == 4 else (packets.ICMPV6, 128, 134)
    syn = tcp(ends)
    cases = {
        "an opening": (syn, True),
        "one with congestion flags": (tcp(ends, 0xC2), True),
        "one that pushes": (tcp(ends, 0x0A), True),
        "an acknowledgement": (tcp(ends, 0x10), False),
        "the second step": (tcp(ends, 0x12), False),
        "an end": (tcp(ends, 0x03), False),
        "a reset": (tcp(ends, 0x06), False),
        "an echo request": (whole(packets.wrap(*ends, icmp, bytes([echo]) + bytes(7))), True),
        "another message": (whole(packets.wrap(*ends, icmp, bytes([other]) + bytes(7))), False),
        "a datagram": (whole(packets.wrap(*ends, packets.UDP, bytes(8))), False),
        "too short": (syn[:9], False),
    }
    if version == 4:
        cases |= {
            "a piece": (syn[:6] + b"\x20\0" + syn[8:], False),
            "a later piece": (syn[:6] + b"\0\1" + syn[8:], False),
            "one with options": (b"\x46" + syn[1:], False),
        }
    found = {}
    for case, (packet, _wanted) in cases.items():
        try:
            near.send(packet)  # what the filter drops is refused at once, or just gone
            found[case] = far.recv(2048) == packet
        except OSError:
            found[case] = False
    assert found == {case: wanted for case, (_packet, wanted) in cases.items()}


# --- netlink ----------------------------------------------------------------------------------------------------------


def test_attributes_are_read_as_they_were_written() -> None:
    data = netlink.attribute(1, "eth0") + netlink.attribute(2, 7) + netlink.attribute(3, [netlink.attribute(1, b"x")])
    found = dict(netlink.attributes(b"head" + data, 4))
    assert found == {1: b"eth0\0", 2: struct.pack("=I", 7), 3: b"\5\0\1\0x\0\0\0"}


@given(st.binary(max_size=64))
def test_attributes_of_anything_come_to_an_end(data: bytes) -> None:
    assert len(list(netlink.attributes(data, 0))) <= 16
