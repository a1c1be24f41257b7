"""[network] allow and deny, by address and by name, as the built-in engine keeps to them."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest

from tests.kernel import lab as labs
from tests.kernel.lab import Lab


def go(target: str, port: int = labs.ECHO) -> str:
    """Connect, by name or address, as a program does: "connected", or what went wrong."""
    try:
        socket.create_connection((target, port), 5).close()
    except socket.gaierror as error:
        return str(error.strerror)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "timeout")
    return "connected"


def go_all(targets: list[tuple[str, int]]) -> list[str]:
    return [go(*target) for target in targets]


NO_NAME = "Name or service not known"
NO_WAY = "EHOSTUNREACH"


def test_two_allowed_names_are_all_there_is(lab: Lab) -> None:
    rules = ["good.example", "alias.example"]
    targets = [
        *((labs.REMOTE, 7), (labs.NEIGHBOUR, 7)),  # by guessing: the names have not been looked up yet
        *(("other.example", 7), ("end.example", 7), ("sub.good.example", 7), ("good.example", 7), ("alias.example", 7)),
        *((labs.REMOTE, 7), (labs.NEIGHBOUR, 7)),
    ]
    assert lab.inside(go_all, targets, allow=rules) == [
        *(NO_WAY, NO_WAY),
        *(NO_NAME, NO_NAME, NO_NAME, "connected", "connected"),
        *("connected", NO_WAY),
    ]


def go_by_family(name: str) -> list[str]:
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        address = socket.getaddrinfo(name, 7, family, socket.SOCK_STREAM)[0][4][0]
        found.append(f"{address} {go(str(address))}")
    return found


def test_an_allowed_name_opens_its_addresses_of_both_families(lab: Lab) -> None:
    expected = [f"{labs.REMOTE} connected", f"{labs.REMOTE6} connected"]
    assert lab.inside(go_by_family, "good.example", allow=["good.example"]) == expected


def test_a_wildcard_is_all_beneath_a_name_and_only_the_port_that_is_said(lab: Lab) -> None:
    targets = [("www.wild.example", 80), ("www.wild.example", 7), ("wild.example", 80), ("good.example", 80)]
    found = lab.inside(go_all, targets, allow=["*.wild.example:80"])
    assert found == ["connected", NO_WAY, NO_NAME, NO_NAME]


def test_a_name_whose_answer_holds_no_time_at_all_can_still_be_used(lab: Lab) -> None:
    assert lab.inside(go, "short.example", allow=["short.example"]) == "connected"


@pytest.mark.parametrize("name", ["loop.example", "own.example", "cloud.example"])
def test_an_allowed_name_that_points_at_what_is_closed_opens_nothing(lab: Lab, name: str) -> None:
    lab.start("host", labs.serve_canaries, {"loop.example": 7011, "own.example": 7012, "cloud.example": 7013}[name])
    port = {"loop.example": 7011, "own.example": 7012, "cloud.example": 80}[name]
    assert lab.inside(go, name, port, allow=[name]) == ("ECONNREFUSED" if name == "loop.example" else NO_WAY)


def test_networks_and_ports_are_allowed(lab: Lab) -> None:
    targets = [(labs.REMOTE, 7), (labs.REMOTE, 80), (labs.REMOTE6, 80), (labs.NEIGHBOUR, 7), ("good.example", 7)]
    found = lab.inside(go_all, targets, allow=["203.0.113.0/24:7", "[2001:db8:99::]/48"])
    assert found == ["connected", NO_WAY, "connected", NO_WAY, NO_NAME]


def test_an_empty_list_allows_nothing(lab: Lab) -> None:
    assert lab.inside(go_all, [(labs.REMOTE, 7), ("good.example", 7)], allow=[]) == [NO_WAY, NO_NAME]


def test_what_is_denied_is_denied_and_nothing_else(lab: Lab) -> None:
    targets = [(labs.NEIGHBOUR, 7), (labs.REMOTE, 80), (labs.REMOTE, 7), ("other.example", 7)]
    found = lab.inside(go_all, targets, deny=["198.18.0.0/24", "203.0.113.10:80"])
    assert found == [NO_WAY, NO_WAY, "connected", NO_WAY]


def test_what_is_denied_is_denied_although_it_is_allowed(lab: Lab) -> None:
    rules: dict[str, Any] = {"allow": ["*.example", "0.0.0.0/0"], "deny": ["203.0.113.10", "good.example"]}
    found = lab.inside(go_all, [("good.example", 7), (labs.REMOTE, 7), ("other.example", 7)], **rules)
    assert found == [NO_NAME, NO_WAY, "connected"]


def test_a_name_that_leads_to_a_denied_one_is_denied(lab: Lab) -> None:
    targets = [("tracked.example", 7), ("bad.example", 7), ("good.example", 7)]
    assert lab.inside(go_all, targets, deny=["bad.example"]) == [NO_NAME, NO_NAME, "connected"]


def ask_by_tcp(name: str) -> int:
    question = b"\x12\x34\1\0\0\1" + bytes(6) + labs.encode(name) + b"\0\1\0\1"
    with socket.create_connection(("10.0.2.3", 53), 5) as client:
        client.sendall(len(question).to_bytes(2, "big") + question)
        return client.recv(64)[5] & 15


def test_the_rules_hold_for_questions_over_tcp(lab: Lab) -> None:
    assert lab.inside(ask_by_tcp, "other.example", allow=["good.example"]) == 3  # NXDOMAIN
    assert lab.inside(ask_by_tcp, "good.example", allow=["good.example"]) == 0


def send_everywhere() -> list[str]:
    for _ in range(3):
        go(labs.NEIGHBOUR, 25)
    go("other.example")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"x", (labs.NEIGHBOUR, 123))
        client.sendto(b"x", ("224.0.0.251", 5353))  # a program that looks around: nothing to report
    go("10.0.2.2", 5432)
    return [go("good.example")]


def test_what_was_refused_is_said_at_the_end(lab: Lab) -> None:
    notes: list[str] = []
    assert lab.inside(send_everywhere, allow=["good.example"], notes=notes) == ["connected"]
    assert sorted(notes) == [
        "network: name other.example was refused, 2 times",  # A and AAAA
        "network: tcp 10.0.2.2:5432 was refused",
        "network: tcp 198.18.0.2:25 was refused, 3 times",
        "network: udp 198.18.0.2:123 was refused",
    ]
