"""netlink: the few messages by which the engine makes links, addresses and routes, and asks for them. rtnetlink(7)

Numbers are from linux/netlink.h, linux/rtnetlink.h, linux/if_link.h and linux/if_addr.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence

ROUTE, NETFILTER = 0, 12  # NETLINK_ROUTE, NETLINK_NETFILTER
UNICAST, LOCAL = 1, 2  # RTN_*: what kind of route it is

_REQUEST, _ACK, _CREATE = 0x1, 0x4, 0x400 | 0x200  # NLM_F_*; _CREATE is CREATE | EXCL
_ERROR, _DONE = 2, 3  # NLMSG_*
_NEWLINK, _GETLINK, _NEWADDR, _NEWROUTE, _GETROUTE = 16, 18, 20, 24, 26  # RTM_*
_NESTED = 0x8000  # NLA_F_NESTED
_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_UP = 6  # IF_OPER_UP


def attribute(kind: int, value: bytes | str | int | Sequence[bytes]) -> bytes:
    """One struct nlattr, padded: bytes as they are, a string with its NUL, an int as u32, a sequence nested."""
    if isinstance(value, str):
        value = value.encode() + b"\0"
    elif isinstance(value, int):
        value = struct.pack("=I", value)
    elif not isinstance(value, bytes):
        kind, value = kind | _NESTED, b"".join(value)
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    while start + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, start)
        if length < 4:
            return
        yield kind & 0x3FFF, data[start + 4 : start + length]
        start += (length + 3) & ~3


class Netlink:
    """A netlink socket of the network namespace that the process is in when it is made. Refusals are OSErrors."""

    def __init__(self, protocol: int = ROUTE) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self.socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self.socket.close()

    def message(self, kind: int, flags: int, body: bytes) -> bytes:
        self._sequence += 1
        return _HEADER.pack(16 + len(body), kind, flags, self._sequence, 0) + body

    def change(self, *requests: tuple[int, int, bytes], silent: int = 0) -> None:
        """Send requests `(type, flags, body)` in one go, and wait until all but `silent` of them are acknowledged."""
        batch = [self.message(kind, _REQUEST | flags, body) for kind, flags, body in requests]
        self.socket.send(b"".join(batch))
        missing = len(requests) - silent
        while missing:
            for kind, _body, data in self._receive():
                if kind == _ERROR:
                    _raise_if_error(data)
                    missing -= 1

    def ask(self, kind: int, body: bytes) -> bytes:
        """The answer to one question."""
        self.socket.send(self.message(kind, _REQUEST, body))
        for answer, content, data in self._receive():
            if answer == _ERROR:
                _raise_if_error(data)
            elif answer != _DONE:
                return content
        return b""

    def _receive(self) -> Iterator[tuple[int, bytes, bytes]]:
        data, start = self.socket.recv(1 << 16), 0
        while start + 16 <= len(data):
            length, kind = struct.unpack_from("=IH", data, start)
            yield kind, data[start + 16 : start + length], data[start : start + length]
            start += (length + 3) & ~3


def _raise_if_error(data: bytes) -> None:
    number = -struct.unpack_from("=i", data, 16)[0]
    if number:
        raise OSError(number, os.strerror(number))


# --- links ------------------------------------------------------------------------------------------------------------


def add_veth(netlink: Netlink, name: str, peer: str, peer_namespace: int, mtu: int) -> None:
    """A pair of virtual Ethernet devices, one end here, the other in the namespace of that descriptor. veth(4)"""
    none = _LINK.pack(0, 0, 0, 0, 0)
    other = none + attribute(3, peer) + attribute(4, mtu) + attribute(28, peer_namespace)  # IFNAME, MTU, NET_NS_FD
    kind = [attribute(1, "veth"), attribute(2, [attribute(1, other)])]  # INFO_KIND, INFO_DATA, VETH_INFO_PEER
    netlink.change((_NEWLINK, _ACK | _CREATE, none + attribute(3, name) + attribute(4, mtu) + attribute(18, kind)))


def bring_up(netlink: Netlink, link: int) -> None:
    netlink.change((_NEWLINK, _ACK, _LINK.pack(0, 0, link, 1, 1)))  # IFF_UP


def make_no_address(netlink: Netlink, link: int) -> None:
    """No link-local IPv6 address by itself: it would be looked for elsewhere for a second before it works."""
    mode = attribute(socket.AF_INET6, [attribute(8, b"\1")])  # IFLA_INET6_ADDR_GEN_MODE, NONE
    netlink.change((_NEWLINK, _ACK, _LINK.pack(0, 0, link, 0, 0) + attribute(26, [mode])))  # IFLA_AF_SPEC


def is_up(netlink: Netlink, link: int) -> bool:
    """Does it carry packets? The end of a pair that was opened first gets its queue a moment after the other."""
    answer = netlink.ask(_GETLINK, _LINK.pack(0, 0, link, 0, 0))
    return any(kind == 16 and value[0] == _UP for kind, value in attributes(answer, 16))  # IFLA_OPERSTATE


# --- addresses and routes ---------------------------------------------------------------------------------------------


def add_address(netlink: Netlink, link: int, address: str, prefix: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    raw = socket.inet_pton(family, address)
    nodad = 0x2  # IFA_F_NODAD: nobody else is on this wire
    body = struct.pack("=BBBBI", family, prefix, nodad, 0, link)
    body += attribute(2, raw) + attribute(1, raw) + attribute(8, nodad)  # LOCAL, ADDRESS, FLAGS
    netlink.change((_NEWADDR, _ACK | _CREATE, body))


def add_default_route(netlink: Netlink, family: int, link: int, gateway: str | None) -> None:
    """All that has no better route goes to `gateway`; without one all is local, as ip-route(8) calls it: AnyIP."""
    scope, kind = (0, UNICAST) if gateway else (254, LOCAL)  # RT_SCOPE_UNIVERSE, RT_SCOPE_HOST
    body = _ROUTE.pack(family, 0, 0, 0, 254, 4, scope, kind, 0) + attribute(
        4, link
    )  # RT_TABLE_MAIN, RTPROT_STATIC; OIF
    if gateway:
        body += attribute(5, socket.inet_pton(family, gateway))  # RTA_GATEWAY
    netlink.change((_NEWROUTE, _ACK | _CREATE, body))


def route_kind(netlink: Netlink, address: bytes) -> int | None:
    """What the kernel would do with a packet to `address`: UNICAST, LOCAL, ... or None where there is no way."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    body = _ROUTE.pack(family, 8 * len(address), 0, 0, 0, 0, 0, 0, 0) + attribute(1, address)  # RTA_DST
    try:
        return netlink.ask(_GETROUTE, body)[7]
    except OSError:
        return None
