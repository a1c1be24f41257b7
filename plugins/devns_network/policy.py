"""Where the environment may go: the verdict on an address and a port, asked before each connection, flow and echo.

Closed whatever the template says: the host's loopback and its own addresses on any interface, link-local and multicast
addresses, and where clouds keep their metadata. The gateway's own address, 10.0.2.2, leads to the host's loopback, for
the ports that the template opens. What is left is open, unless `allow` says what is, or `deny` what is not.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable

from devns_network.gate import DNS, DNS6, GATEWAY, GATEWAY6
from devns_network.netlink import UNICAST

Rule = tuple[str, str, int]  # "net" or "name", the network or the name, the port or 0 for every one
Target = tuple[int, str, int]  # family, address, port: where the engine connects

_LOOPBACK = "127.0.0.1"
_KEPT = 1.0  # seconds that a verdict is believed: the host may get another address
_KEPT_MAX = 1 << 14
_NAME_FLOOR = 60.0  # seconds for which a name's addresses are open at least: who looks it up needs a moment to connect
_LEARNED_MAX = 1 << 15
_FORGET_EVERY = 5.0  # seconds: looking through all of them takes milliseconds
_DENIED_MAX = 200  # different attempts that are remembered

_CLOSED = (
    *("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4"),
    *("::/96", "::ffff:0:0/96", "fe80::/10", "fec0::/10", "ff00::/8"),  # with ::, ::1 and IPv4 written as IPv6
    *("64:ff9b:1::/48", "100.100.100.200/32", "168.63.129.16/32", "fd00:ec2::254/128"),  # metadata of three clouds
)
_EMBEDDING = (("64:ff9b::/96", 12), ("2002::/16", 2))  # an IPv4 address is in these, at that byte: RFC 6052, RFC 3056


class Networks:
    """A set of networks with ports: looking up costs as many steps as there are different prefix lengths."""

    def __init__(self, rows: Iterable[tuple[str, int]]) -> None:
        self._prefixes: dict[tuple[int, int], dict[int, set[int]]] = {}
        for text, port in rows:
            address, _, length = text.partition("/")
            raw = _packed(address)
            bits = int(length or 8 * len(raw))
            prefix = int.from_bytes(raw, "big") >> (8 * len(raw) - bits)
            self._prefixes.setdefault((len(raw), bits), {}).setdefault(prefix, set()).add(port)

    def has(self, address: bytes, port: int) -> bool:
        number, width = int.from_bytes(address, "big"), len(address)
        for (size, bits), prefixes in self._prefixes.items():
            ports = prefixes.get(number >> (8 * width - bits)) if size == width else None
            if ports is not None and (0 in ports or port in ports):
                return True
        return False


class Names:
    """A set of names with ports: "example.org" is itself, "*.example.org" is all beneath it."""

    def __init__(self, rows: Iterable[tuple[str, int]]) -> None:
        self._ports: dict[str, set[int]] = {}
        for name, port in rows:
            self._ports.setdefault(name.lower(), set()).add(port)

    def __bool__(self) -> bool:
        return bool(self._ports)

    def ports(self, name: str) -> set[int]:
        """The ports that are said for a name: none where it is not in the set, 0 for every one."""
        labels = name.lower().split(".")
        above = [f"*.{'.'.join(labels[start:])}" for start in range(1, len(labels))]
        return set().union(*(self._ports.get(said, ()) for said in (name.lower(), *above)))


class Policy:
    """The verdicts of one environment. `route_kind` is what the host's kernel says of an address."""

    def __init__(
        self,
        route_kind: Callable[[bytes], int | None],
        *,
        allow: Iterable[Rule] | None,
        deny: Iterable[Rule],
        host_loopback: Iterable[int],
    ) -> None:
        allowed, denied = list(allow or ()), list(deny)
        self._route_kind = route_kind
        self._limited = allow is not None
        self._allow = Networks((what, port) for kind, what, port in allowed if kind == "net")
        self._deny = Networks((what, port) for kind, what, port in denied if kind == "net")
        self._closed = Networks((what, 0) for what in _CLOSED)
        self._embedding = [(Networks([(network, 0)]), start) for network, start in _EMBEDDING]
        self.allow_names = Names((what, port) for kind, what, port in allowed if kind == "name")
        self.deny_names = Names((what, port) for kind, what, port in denied if kind == "name")
        self._opened = frozenset(host_loopback)
        self._gateways = {_packed(address): address for address in (GATEWAY, GATEWAY6)}
        self.dns = frozenset(_packed(address) for address in (DNS, DNS6))
        self._verdicts: dict[tuple[bytes, int], tuple[float, Target | None]] = {}
        self._learned: dict[bytes, dict[int, float]] = {}
        self._forget_at = 0.0
        self.denied: dict[str, int] = {}  # what was refused, and how often

    def target(self, protocol: str, address: bytes, port: int, now: float) -> Target | None:
        """Where a packet to this address leads; None where it is not to go, which is remembered."""
        known = self._verdicts.get((address, port))
        if known is None or known[0] < now:
            if len(self._verdicts) >= _KEPT_MAX:
                self._verdicts.clear()
            known = self._verdicts[address, port] = (now + _KEPT, self._judge(address, port, now))
        if known[1] is None and not self._is_for_many(address):
            self.remember(f"{protocol} {_shown(address, port)}")
        return known[1]

    def _judge(self, address: bytes, port: int, now: float) -> Target | None:
        if address in self._gateways:
            return (socket.AF_INET, _LOOPBACK, port) if port in self._opened else None
        if not self._is_open(address, port, now):
            return None
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        return family, socket.inet_ntop(family, address), port

    def is_gateway(self, address: bytes) -> bool:
        return address in self._gateways or address in self.dns

    def remember(self, attempt: str) -> None:
        if attempt in self.denied or len(self.denied) < _DENIED_MAX:
            self.denied[attempt] = self.denied.get(attempt, 0) + 1

    def remember_name(self, name: str) -> None:
        """A name that was refused; the same with a search domain behind it is no other attempt. resolv.conf(5)"""
        labels = name.split(".")
        if not any(f"name {'.'.join(labels[:count])}" in self.denied for count in range(1, len(labels))):
            self.remember(f"name {name}")

    def _is_open(self, address: bytes, port: int, now: float) -> bool:
        if self._closed.has(address, 0) or address in self.dns or self._hides_a_closed_one(address, port):
            return False
        if self._deny.has(address, port):
            return False
        if self._limited and not self._allow.has(address, port) and not self._is_learned(address, port, now):
            return False
        return not self._is_own(address)

    def _hides_a_closed_one(self, address: bytes, port: int) -> bool:
        return any(
            network.has(address, 0)
            and (self._closed.has(inner, 0) or self._deny.has(inner, port) or self._is_own(inner))
            for network, start in self._embedding
            for inner in [address[start : start + 4]]
        )

    def _is_own(self, address: bytes) -> bool:
        """Whether the host would keep the packet for itself, or give it to all: it knows its addresses best."""
        kind = self._route_kind(address)
        return kind is not None and kind != UNICAST  # without a way there connecting fails by itself, with the reason

    @staticmethod
    def _is_for_many(address: bytes) -> bool:
        """Multicast and broadcast: programs that look around for others, which is nothing to report."""
        return address[0] == 0xFF or (len(address) == 4 and address[0] >= 0xE0)

    # --- names --------------------------------------------------------------------------------------------------------

    def ports_of(self, name: str) -> set[int]:
        """For which ports the addresses of a name are open, 0 for all; none where the name is not to be resolved."""
        if self.deny_names.ports(name):
            return set()
        return self.allow_names.ports(name) if self._limited else {0}

    def learn(self, ports: set[int], address: bytes, ttl: int, now: float) -> None:
        """A name that is allowed has this address: open for as long as the answer holds."""
        if not self._limited:
            return
        if len(self._learned) >= _LEARNED_MAX and address not in self._learned:
            if now < self._forget_at:
                return
            self._learned = {key: rows for key, rows in self._learned.items() if max(rows.values()) > now}
            self._forget_at = now + _FORGET_EVERY
            if len(self._learned) >= _LEARNED_MAX:
                return
        self._verdicts.clear()
        rows = self._learned.setdefault(address, {})
        for port in ports:
            rows[port] = max(rows.get(port, 0.0), now + max(float(ttl), _NAME_FLOOR))

    def _is_learned(self, address: bytes, port: int, now: float) -> bool:
        rows = self._learned.get(address, {})
        return rows.get(0, 0.0) > now or rows.get(port, 0.0) > now


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def _shown(address: bytes, port: int) -> str:
    if len(address) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, address)}:{port}"
    return f"[{socket.inet_ntop(socket.AF_INET6, address)}]:{port}"
