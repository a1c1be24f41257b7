"""names: questions, answers and resolv.conf as bytes and text that strangers write."""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devns_network.names import Malformed, Resolvers, addresses, failure, question

A, CNAME, TXT, AAAA = 1, 5, 16, 28


def name(text: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".")) + b"\0"


def query(text: str, kind: int = A) -> bytes:
    return b"\x12\x34\1\0\0\1" + bytes(6) + name(text) + struct.pack(">HH", kind, 1)


def answer(text: str, *records: tuple[bytes, int, int, bytes]) -> bytes:
    body = b"".join(owner + struct.pack(">HHIH", kind, 1, ttl, len(data)) + data for owner, kind, ttl, data in records)
    return b"\x12\x34\x81\x80\0\1" + struct.pack(">HHH", len(records), 0, 0) + query(text)[12:] + body


V4, V6 = socket.inet_aton("203.0.113.9"), socket.inet_pton(socket.AF_INET6, "2001:db8::9")
SAME = b"\xc0\x0c"  # the name of the question


def test_a_question_is_read() -> None:
    assert question(query("Www.Example.ORG", AAAA)) == ("www.example.org", AAAA, 12 + 17 + 4)


def test_an_answer_opens_the_addresses_at_the_end_of_its_aliases_for_the_shortest_time() -> None:
    message = answer(
        "a.org",
        (SAME, CNAME, 50, name("b.org")),
        (name("c.org"), A, 300, V4),
        (name("b.org"), CNAME, 100, name("c.org")),
        (name("c.org"), AAAA, 20, V6),
    )
    assert addresses(message) == (["a.org", "b.org", "c.org"], [(V4, 50), (V6, 20)])


def test_what_an_answer_says_of_other_names_counts_for_nothing() -> None:
    message = answer("a.org", (name("evil.org"), A, 300, V4), (SAME, TXT, 300, b"\1x"), (SAME, A, 300, V6))
    assert addresses(message) == (["a.org"], [])


def test_aliases_in_a_circle_come_to_an_end() -> None:
    message = answer("a.org", (SAME, CNAME, 1, name("b.org")), (name("b.org"), CNAME, 1, name("a.org")))
    assert addresses(message)[1] == []


@pytest.mark.parametrize(
    "message",
    [
        *(b"", b"\x12\x34", bytes(17), query("a.org")[:-1], b"\x12\x34\x81" + query("a.org")[3:]),
        query("a.org")[:2] + b"\x29" + query("a.org")[3:],  # an update
        query("a.org")[:5] + b"\2" + query("a.org")[6:],  # two questions
        query("a.org")[:12] + b"\xc0\x0c\0\1\0\1",  # a name that points at itself
        query("a.org")[:12] + b"\xc0\x20\0\1\0\1" + bytes(40),  # and one that points forwards
        query("a.org")[:12] + b"\x40" + bytes(70),  # a label of a kind that there is none of
        query("a.org")[:12] + b"\1a" * 200 + b"\0\0\1\0\1",
    ],
)
def test_what_is_no_question_is_said_to_be_none(message: bytes) -> None:
    with pytest.raises(Malformed):
        question(message)


@given(
    st.binary(max_size=120)
    | st.builds(lambda rest: answer("a.org")[:7] + b"\5" + answer("a.org")[8:] + rest, st.binary(max_size=80))
)
@settings(max_examples=500)
def test_any_bytes_are_a_message_or_are_malformed(message: bytes) -> None:
    with contextlib.suppress(Malformed):
        question(message)
    with contextlib.suppress(Malformed):
        names, found = addresses(message)
        assert names
        assert all(len(address) in (4, 16) for address, _ttl in found)
    assert failure(message + bytes(12), 3)[2] & 0x80


def test_a_failure_repeats_the_question_and_says_why() -> None:
    asked = query("a.org")
    assert failure(asked, 3) == b"\x12\x34\x81\x83\0\1" + bytes(6) + asked[12:]


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("nameserver 192.0.2.1\nnameserver 2001:db8::1\n", ["192.0.2.1", "2001:db8::1"]),
        ("# nameserver 192.0.2.1\nsearch example.org\noptions ndots:1\n", ["127.0.0.1"]),
        ("nameserver\nnameserver nowhere\nnameserver 192.0.2.300\n", ["127.0.0.1"]),
        ("nameserver fe80::1%eth0\n", ["fe80::1%eth0"]),
        ("".join(f"nameserver 192.0.2.{number}\n" for number in range(9)), ["192.0.2.0", "192.0.2.1", "192.0.2.2"]),
    ],
)
def test_the_servers_of_resolv_conf_are_asked(tmp_path: Path, text: str, servers: list[str]) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(text)
    assert [address[0] for _family, address in Resolvers(str(path)).now()] == servers


def test_a_resolv_conf_that_changes_or_goes_is_noticed(tmp_path: Path) -> None:
    path, new = tmp_path / "resolv.conf", tmp_path / "new"
    path.write_text("nameserver 192.0.2.1\n")
    resolvers = Resolvers(str(path))
    found = [resolvers.now()[0][1][0]]
    new.write_text("nameserver 192.0.2.2\n")
    new.rename(path)
    found.append(resolvers.now()[0][1][0])
    path.unlink()
    found.append(resolvers.now()[0][1][0])
    assert found == ["192.0.2.1", "192.0.2.2", "127.0.0.1"]
