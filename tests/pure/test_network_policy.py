"""policy: which addresses are open, by what a template says, what the host's kernel says, and what names have said."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from devns_network.policy import Names, Networks, Policy

OWN = "192.0.2.1"
UNICAST, LOCAL, BROADCAST = 1, 2, 3


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def route_kind(address: bytes) -> int | None:
    """A host with one address, one broadcast address, and no way to 198.51.100.0/24."""
    kinds = {packed(OWN): LOCAL, packed("2001:db8::1"): LOCAL, packed("192.0.2.255"): BROADCAST}
    return None if address[:3] == packed("198.51.100.0")[:3] else kinds.get(address, UNICAST)


def policy(**said: Any) -> Policy:
    return Policy(route_kind, **{"allow": None, "deny": [], "host_loopback": [], **said})


def target(rules: Policy, address: str, port: int = 80, now: float = 0.0) -> tuple[int, str, int] | None:
    return rules.target("tcp", packed(address), port, now)


@pytest.mark.parametrize(
    "address", ["203.0.113.9", "10.1.2.3", "192.168.0.1", "198.51.100.7", "2001:db8::2", "fd12::1"]
)
def test_what_is_out_there_is_open(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    assert target(policy(), address) == (family, address, 80)


CLOSED = [
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "0.1.2.3", "224.0.0.251", "239.1.1.1", "255.255.255.255", "240.0.0.1"),
    *("169.254.169.254", "169.254.0.1", "100.100.100.200", "168.63.129.16", "fd00:ec2::254", OWN, "192.0.2.255"),
    *(
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:203.0.113.9",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "2001:db8::1",
    ),
    *("64:ff9b::127.0.0.1", f"64:ff9b::{OWN}", "64:ff9b::169.254.169.254", "2002:7f00:1::1", "2002:a9fe:a9fe::1"),
    *("64:ff9b:1::1", "10.0.2.2", "10.0.2.3", "fd00:d::2", "fd00:d::3"),
]


@pytest.mark.parametrize("address", CLOSED)
def test_N_01_N_03_what_is_closed_stays_closed_whatever_is_allowed(address: str) -> None:
    rules = [("net", "0.0.0.0/0", 0), ("net", "::/0", 0)]
    assert target(policy(), address) is None
    assert target(policy(allow=rules), address) is None


def test_an_address_that_holds_an_open_one_is_open() -> None:
    assert target(policy(), "64:ff9b::cb00:7109") == (socket.AF_INET6, "64:ff9b::cb00:7109", 80)


def test_a_denied_address_is_denied_in_every_notation() -> None:
    rules = policy(deny=[("net", "203.0.113.9/32", 0)])
    assert [target(rules, address) for address in ("203.0.113.9", "64:ff9b::cb00:7109", "2002:cb00:7109::1")] == [
        None
    ] * 3


def test_the_gateway_is_the_hosts_loopback_for_the_ports_that_are_opened() -> None:
    rules = policy(host_loopback=[5432])
    assert [target(rules, address, 5432) for address in ("10.0.2.2", "fd00:d::2")] == [
        (socket.AF_INET, "127.0.0.1", 5432)
    ] * 2
    assert [target(rules, "10.0.2.2", 5433), target(rules, "127.0.0.1", 5432)] == [None, None]


def test_with_a_list_nothing_else_is_open() -> None:
    rules = policy(allow=[("net", "203.0.113.0/24", 443), ("net", "2001:db8:1::/48", 0)])
    assert target(rules, "203.0.113.9", 443) is not None
    assert target(rules, "2001:db8:1::5", 1) is not None
    assert [target(rules, *pair) for pair in (("203.0.113.9", 80), ("10.0.0.1", 443), ("2001:db8:2::5", 443))] == [
        None
    ] * 3


def test_the_address_of_a_name_is_open_while_the_answer_holds_and_a_minute_at_least() -> None:
    rules, address = policy(allow=[("name", "a.org", 443)]), "203.0.113.9"
    rules.learn(rules.ports_of("a.org"), packed(address), 300, 0.0)
    rules.learn(rules.ports_of("a.org"), packed("203.0.113.10"), 0, 0.0)
    assert [target(rules, address, 443, now) is not None for now in (0.0, 299.0, 301.0)] == [True, True, False]
    assert [target(rules, "203.0.113.10", 443, now) is not None for now in (59.0, 61.0)] == [True, False]
    assert target(rules, address, 80, 1.0) is None


def test_a_name_that_points_at_what_is_closed_opens_nothing() -> None:
    rules = policy(allow=[("name", "a.org", 0)])
    for address in CLOSED:
        rules.learn({0}, packed(address), 300, 0.0)
    assert [target(rules, address) for address in CLOSED] == [None] * len(CLOSED)


def test_what_was_learned_is_bounded() -> None:
    rules = policy(allow=[("name", "a.org", 0)])
    for number in range(40_000):
        rules.learn({0}, number.to_bytes(4, "big"), 300, 0.0)
    assert len(rules._learned) == 1 << 15
    rules.learn({0}, packed("203.0.113.9"), 300, 1000.0)  # all others are over by now
    assert len(rules._learned) == 1


def test_what_was_refused_is_counted_and_bounded() -> None:
    rules = policy(allow=[])
    for _ in range(3):
        target(rules, "203.0.113.9", 25)
    target(rules, "2001:db8::9", 53)
    target(rules, "224.0.0.251", 5353)
    rules.remember_name("a.org")
    rules.remember_name("a.org.corp.example")
    expected = {"tcp 203.0.113.9:25": 3, "tcp [2001:db8::9]:53": 1, "name a.org": 1}
    assert rules.denied == expected
    for number in range(1000):
        target(rules, "203.0.113.9", 1000 + number)
    assert len(rules.denied) == 200


def test_a_wildcard_is_what_is_beneath() -> None:
    names = Names([("*.example.org", 443), ("a.org", 0), ("Sub.Example.org", 80)])
    asked = ["x.example.org", "a.b.example.org", "example.org", "A.ORG", "b.a.org", "sub.example.org", "notexample.org"]
    assert [names.ports(name) for name in asked] == [{443}, {443}, set(), {0}, set(), {80, 443}, set()]


def test_a_denied_name_does_not_resolve_whatever_allows_it() -> None:
    rules = policy(allow=[("name", "*.org", 0)], deny=[("name", "bad.org", 0), ("name", "*.bad.org", 0)])
    assert [rules.ports_of(name) for name in ("good.org", "bad.org", "x.bad.org", "org")] == [{0}, set(), set(), set()]
    assert policy().ports_of("anything") == {0}


def test_a_set_of_networks_knows_each_prefix_length() -> None:
    networks = Networks([("0.0.0.0/0", 80), ("10.0.0.0/8", 0), ("10.1.2.3/32", 22), ("2001:db8::/33", 0)])
    asked = [
        ("8.8.8.8", 80),
        ("8.8.8.8", 81),
        ("10.9.9.9", 81),
        ("10.1.2.3", 22),
        ("2001:db8::1", 1),
        ("2001:db8:8000::1", 1),
    ]
    assert [networks.has(packed(address), port) for address, port in asked] == [True, False, True, True, True, False]
