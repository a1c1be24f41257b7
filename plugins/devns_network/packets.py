"""Packets as bytes: what comes off the wire unread, what is sent back by hand, and the filter that picks the former.

IPv4 without options (RFC 791), IPv6 (RFC 8200), TCP (RFC 9293), ICMP (RFC 792, RFC 4443). Addresses are bytes, 4 or 16.
"""

from __future__ import annotations

import struct

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
_QUOTED = 128  # bytes of a packet that an error about it repeats

Instruction = tuple[int, int, int, int]


class Packet:
    """A packet whose headers are where they are expected; `parse` makes one."""

    __slots__ = ("data", "destination", "protocol", "source", "start", "ttl")

    def __init__(self, data: bytes, source: bytes, destination: bytes, protocol: int, start: int, ttl: int) -> None:
        self.data = data
        self.source = source
        self.destination = destination
        self.protocol = protocol
        self.start = start  # of the transport header
        self.ttl = ttl

    @property
    def ports(self) -> bytes:
        """Source and destination port, as they stand in the packet."""
        return self.data[self.start : self.start + 4]

    @property
    def port(self) -> int:
        return int.from_bytes(self.data[self.start + 2 : self.start + 4], "big")

    @property
    def body(self) -> bytes:
        """The transport header and what it carries."""
        return self.data[self.start :]


def parse(data: bytes) -> Packet | None:
    """None for what is too short to be what it says."""
    if data[:1] == b"\x45":
        length = int.from_bytes(data[2:4], "big")
        if length < 28 or len(data) < length:
            return None
        packet = Packet(data[:length], data[12:16], data[16:20], data[9], 20, data[8])
    elif len(data) >= 48 and data[0] >> 4 == 6:
        length = 40 + int.from_bytes(data[4:6], "big")
        if length < 48 or len(data) < length:
            return None
        packet = Packet(data[:length], data[8:24], data[24:40], data[6], 40, data[7])
    else:
        return None
    return None if packet.protocol == TCP and len(packet.body) < 20 else packet


def wrap(source: bytes, destination: bytes, protocol: int, body: bytes) -> bytes:
    """An IP packet. Of IPv4's header the kernel fills in length, identification and checksum. raw(7)"""
    if len(source) == 4:
        return struct.pack(">BBHHHBBH", 0x45, 0, 0, 0, 0, 64, protocol, 0) + source + destination + body
    return struct.pack(">IHBB", 6 << 28, len(body), protocol, 64) + source + destination + body


def checksum(data: bytes) -> int:
    """RFC 1071. A number with 16 bits to a digit is, modulo 0xffff, the sum of its digits."""
    return 0xFFFF - (int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF)


def _summed(source: bytes, destination: bytes, protocol: int, body: bytes, offset: int) -> bytes:
    """`body` with its checksum, which covers the addresses too, at `offset`."""
    width = ">HH" if len(source) == 4 else ">II"
    pseudo = source + destination + struct.pack(width, *_pseudo(len(source), protocol, len(body)))
    return body[:offset] + struct.pack(">H", checksum(pseudo + body) or 0xFFFF) + body[offset + 2 :]


def _pseudo(width: int, protocol: int, length: int) -> tuple[int, int]:
    return (protocol, length) if width == 4 else (length, protocol)


# --- TCP --------------------------------------------------------------------------------------------------------------


def fresh_syn(syn: Packet) -> bytes:
    """The SYN once more, to be sent from here: its checksum was left to a network card that there is none of.

    What it carries beyond its options is left out (TCP fast open): the sender sends that again.
    """
    header = syn.body[: max(20, syn.body[12] >> 4 << 2)]
    blank = header[:16] + b"\0\0" + header[18:]
    body = _summed(syn.source, syn.destination, TCP, blank, 16)
    if len(syn.source) == 4:
        return syn.data[:2] + b"\0\0" + syn.data[4:10] + b"\0\0" + syn.data[12:20] + body
    return syn.data[:4] + struct.pack(">H", len(body)) + syn.data[6:40] + body


def reset(syn: Packet) -> bytes:
    """The answer to a SYN that says "refused". Without an ACK the sender would not believe it. RFC 9293, 3.10.7.3"""
    acknowledged = (int.from_bytes(syn.body[4:8], "big") + 1) & 0xFFFFFFFF
    ports = syn.body[2:4] + syn.body[:2]
    body = ports + struct.pack(">IIBBHHH", 0, acknowledged, 0x50, 0x14, 0, 0, 0)  # RST | ACK
    return wrap(syn.destination, syn.source, TCP, _summed(syn.destination, syn.source, TCP, body, 16))


# --- ICMP -------------------------------------------------------------------------------------------------------------


def icmp_error(reporter: bytes, about: Packet, kind: int, code: int, rest: int = 0) -> bytes:
    """An error about a packet, to its sender: type and code, and with "too big" the size that fits."""
    message = struct.pack(">BBHI", kind, code, 0, rest) + about.data[:_QUOTED]
    return _icmp(reporter, about.source, message)


def echo_reply(request: Packet, data: bytes) -> bytes:
    """The reply to an echo request, carrying `data` behind its identifier and sequence number."""
    kind = 0 if request.protocol == ICMP else 129
    message = struct.pack(">BBH", kind, 0, 0) + request.body[4:6] + data
    return _icmp(request.destination, request.source, message)


def _icmp(source: bytes, destination: bytes, message: bytes) -> bytes:
    if len(source) == 4:
        message = message[:2] + struct.pack(">H", checksum(message)) + message[4:]
        return wrap(source, destination, ICMP, message)
    return wrap(source, destination, ICMPV6, _summed(source, destination, ICMPV6, message, 2))


def datagram(source: bytes, destination: bytes, ports: bytes, length: int, ttl: int = 64) -> Packet:
    """The head of a UDP packet that was read by a socket, for an error about it."""
    body = ports + struct.pack(">HH", 8 + length, 0)
    data = wrap(source, destination, UDP, body)
    if len(source) == 4:
        data = data[:2] + struct.pack(">H", len(data) + length) + data[4:]
    return Packet(data, source, destination, UDP, len(data) - len(body), ttl)


# --- the filter of a packet socket: linux/filter.h, bpf_common.h ------------------------------------------------------

_LOAD_BYTE, _LOAD_HALF, _AND, _EQUAL, _ANY, _RETURN = 0x30, 0x28, 0x54, 0x15, 0x45, 0x06
_ALL = 0x40000  # bytes of the packet that are taken


def first_packets(version: int) -> bytes:
    """A classic BPF program on an IP packet: takes a TCP packet that opens a connection, and an echo request."""
    if version == 4:
        head = [(_LOAD_HALF, 0, 0, 6), (_ANY, 99, 0, 0x3FFF), (_LOAD_BYTE, 0, 0, 0), (_EQUAL, 0, 99, 0x45)]
        start, protocol, icmp, echo = 20, 9, ICMP, 8  # no fragments, no options
    else:
        head, start, protocol, icmp, echo = [], 40, 6, ICMPV6, 128
    code: list[Instruction] = [
        *head,
        (_LOAD_BYTE, 0, 0, protocol),
        (_EQUAL, 0, 4, TCP),
        *((_LOAD_BYTE, 0, 0, start + 13), (_AND, 0, 0, 0x17), (_EQUAL, 98, 99, 0x02)),  # FIN, SYN, RST, ACK
        (_RETURN, 0, 0, 0),
        (_EQUAL, 0, 99, icmp),
        *((_LOAD_BYTE, 0, 0, start), (_EQUAL, 98, 99, echo)),
        (_RETURN, 0, 0, _ALL),
        (_RETURN, 0, 0, 0),
    ]
    take, drop = len(code) - 2, len(code) - 1
    away = {98: take, 99: drop}  # where a jump leads that is not to one of the next instructions

    def resolved(place: int, jump: int) -> int:
        return away[jump] - place - 1 if jump in away else jump

    return b"".join(
        struct.pack("=HBBI", code_, resolved(place, true), resolved(place, false), k)
        for place, (code_, true, false, k) in enumerate(code)
    )
