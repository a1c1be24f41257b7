"""The rules of the gateway's namespace: which packets go to the engine's sockets. nf_tables by own netlink messages.

As nft(8) would print them:

    table inet devns {
      chain steer {
        type filter hook prerouting priority mangle; policy drop;
        iifname "lo" meta mark 2 tcp flags & (fin | syn | rst | ack) == syn tproxy to :1 accept
        iifname != "gw0" accept
        tcp flags & (fin | syn | rst | ack) == syn drop
        meta l4proto tcp accept
        ip daddr 10.0.2.3 meta l4proto udp accept
        ip6 daddr fd00:d::3 meta l4proto udp accept
        meta l4proto udp tproxy to :1 accept
        icmp type destination-unreachable accept
        icmpv6 type { destination-unreachable, nd-neighbor-solicit, nd-neighbor-advert } accept
      }
    }

A connection's first packet is dropped: a packet socket has seen it, and the engine sends the very same packet again, to
`lo` and with a mark, when its own connection is there. What follows finds the established socket by the ordinary way.
What has no rule is dropped: an echo request above all, which the kernel would answer for the whole world's addresses.
"""

from __future__ import annotations

import socket
import struct

from devns_network.netlink import NETFILTER, Netlink, attribute

MARK = 2  # on what the engine sends again
PORT = 1  # of the sockets that take what is steered

_DROP, _ACCEPT = 0, 1  # NF_DROP, NF_ACCEPT
_TCP, _UDP, _ICMP, _ICMPV6 = 6, 17, 1, 58
_CREATE, _APPEND, _ACK = 0x400, 0x800, 0x4  # NLM_F_*
_UNREACHABLE, _UNREACHABLE_V6, _SOLICIT, _ADVERT = 3, 1, 135, 136

Expression = bytes
Rule = list[Expression]


def load(link: str, dns: dict[int, str]) -> None:
    """Load the rules into the network namespace of this process; `dns` is the forwarder's address in each family.

    Raises OSError: ENOENT or EOPNOTSUPP where the kernel has no nf_tables or no tproxy.
    """
    family = _general(1)  # NFPROTO_INET
    hook = [attribute(1, _be(0)), attribute(2, struct.pack(">i", -150))]  # NF_INET_PRE_ROUTING, mangle
    chain = attribute(1, "devns") + attribute(3, "steer") + attribute(4, hook) + attribute(5, _be(_DROP))
    place = attribute(1, "devns") + attribute(2, "steer")
    netlink = Netlink(NETFILTER)
    try:
        netlink.change(
            (0x10, 0, _general(0, 10)),  # NFNL_MSG_BATCH_BEGIN
            (0xA00, _ACK | _CREATE, family + attribute(1, "devns")),  # NFT_MSG_NEWTABLE
            (0xA03, _ACK | _CREATE, family + chain + attribute(7, "filter")),  # NFT_MSG_NEWCHAIN
            *((0xA06, _ACK | _CREATE | _APPEND, family + place + attribute(4, rule)) for rule in rules(link, dns)),
            (0x11, 0, _general(0, 10)),  # NFNL_MSG_BATCH_END
            silent=2,
        )
    finally:
        netlink.close()


def rules(link: str, dns: dict[int, str]) -> list[Rule]:
    syn = [*_protocol(_TCP), *_bits(13, 0x17, 0x02)]
    forwarder = [[*_to(family, address), *_protocol(_UDP), _verdict(_ACCEPT)] for family, address in dns.items()]
    kinds = ((_ICMP, _UNREACHABLE), (_ICMPV6, _UNREACHABLE_V6), (_ICMPV6, _SOLICIT), (_ICMPV6, _ADVERT))
    return [
        [*_from("lo"), _meta(3), _compare(struct.pack("=I", MARK)), *syn, *_tproxy()],
        [*_from(link, unless=True), _verdict(_ACCEPT)],
        [*syn, _verdict(_DROP)],
        [*_protocol(_TCP), _verdict(_ACCEPT)],
        *forwarder,  # ahead of tproxy, which passes over sockets that are merely bound
        [*_protocol(_UDP), *_tproxy()],
        *([*_protocol(protocol), *_bits(0, 0xFF, kind), _verdict(_ACCEPT)] for protocol, kind in kinds),
    ]


def _general(family: int, resource: int = 0) -> bytes:
    return struct.pack(">BBH", family, 0, resource)  # struct nfgenmsg


def _be(number: int) -> bytes:
    return struct.pack(">I", number)


# --- expressions: linux/netfilter/nf_tables.h -------------------------------------------------------------------------


def _expression(name: str, *parts: bytes) -> Expression:
    return attribute(1, [attribute(1, name), attribute(2, list(parts))])


def _meta(key: int) -> Expression:
    """Into register 1: NFT_META_MARK (3), IIFNAME (6), NFPROTO (15), L4PROTO (16)."""
    return _expression("meta", attribute(2, _be(key)), attribute(1, _be(1)))


def _payload(base: int, offset: int, length: int) -> Expression:
    """Bytes of the network (1) or the transport (2) header into register 1."""
    return _expression(
        "payload", attribute(1, _be(1)), attribute(2, _be(base)), attribute(3, _be(offset)), attribute(4, _be(length))
    )


def _compare(data: bytes, *, unless: bool = False) -> Expression:
    return _expression("cmp", attribute(1, _be(1)), attribute(2, _be(int(unless))), attribute(3, [attribute(1, data)]))


def _bits(offset: int, mask: int, value: int) -> list[Expression]:
    """A byte of the transport header, masked, is this."""
    keep, flip = [attribute(1, bytes([mask]))], [attribute(1, b"\0")]
    masked = _expression(
        "bitwise",
        *(attribute(1, _be(1)), attribute(2, _be(1)), attribute(3, _be(1))),
        *(attribute(4, keep), attribute(5, flip)),
    )
    return [_payload(2, offset, 1), masked, _compare(bytes([value]))]


def _verdict(number: int) -> Expression:
    return _expression("immediate", attribute(1, _be(0)), attribute(2, [attribute(2, [attribute(1, _be(number))])]))


def _tproxy() -> list[Expression]:
    """To the socket that is connected so, else to the one on PORT; of the packet's own family."""
    port = _expression("immediate", attribute(1, _be(1)), attribute(2, [attribute(1, struct.pack(">H", PORT))]))
    return [port, _expression("tproxy", attribute(1, _be(0)), attribute(3, _be(1))), _verdict(_ACCEPT)]


def _protocol(number: int) -> list[Expression]:
    return [_meta(16), _compare(bytes([number]))]


def _from(link: str, *, unless: bool = False) -> list[Expression]:
    return [_meta(6), _compare(link.encode().ljust(16, b"\0"), unless=unless)]


def _to(family: int, address: str) -> list[Expression]:
    raw = socket.inet_pton(family, address)
    protocol, offset = (2, 16) if family == socket.AF_INET else (10, 24)  # NFPROTO_IPV4, NFPROTO_IPV6
    return [_meta(15), _compare(bytes([protocol])), _payload(1, offset, len(raw)), _compare(raw)]
