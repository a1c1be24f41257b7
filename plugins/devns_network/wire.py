"""The engine's side of the wire: packets that a kernel's socket would not send, into the gateway's namespace."""

from __future__ import annotations

import socket

from devns_network import packets
from devns_network.gate import GATEWAY, GATEWAY6
from devns_network.packets import Packet

Error = tuple[tuple[int, int], tuple[int, int]]  # type and code, of ICMP and of ICMPv6


class Wire:
    """`again` and `back` are raw sockets by IP version: what `again` sends is let through to the listening sockets."""

    def __init__(self, sockets: dict[str, socket.socket]) -> None:
        self._again = {width: sockets[f"again{version}"] for version, width in _WIDTHS if f"again{version}" in sockets}
        self._back = {width: sockets[f"back{version}"] for version, width in _WIDTHS if f"back{version}" in sockets}
        self._gateway = {
            4: socket.inet_pton(socket.AF_INET, GATEWAY),
            16: socket.inet_pton(socket.AF_INET6, GATEWAY6),
        }

    def send_again(self, syn: Packet) -> None:
        self._send(self._again, packets.fresh_syn(syn), syn.destination)

    def send_back(self, packet: bytes, to: bytes) -> None:
        self._send(self._back, packet, to)

    def report(self, about: Packet, error: Error | None, reporter: bytes | None = None, rest: int = 0) -> None:
        """An ICMP error about a packet from inside, by the gateway where nobody else is known to have said it."""
        if error is not None:
            kind, code = error[len(about.source) == 16]
            said_by = reporter or self._gateway[len(about.source)]
            self.send_back(packets.icmp_error(said_by, about, kind, code, rest), about.source)

    @staticmethod
    def _send(sockets: dict[int, socket.socket], packet: bytes, to: bytes) -> None:
        family = socket.AF_INET if len(to) == 4 else socket.AF_INET6
        try:
            sockets[len(to)].sendto(packet, (socket.inet_ntop(family, to), 0))
        except OSError:
            pass  # lost, as any packet may be: who waits for it asks again


_WIDTHS = ((4, 4), (6, 16))
