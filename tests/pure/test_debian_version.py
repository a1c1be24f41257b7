"""Debian version numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devns.debian.version import compare, is_version, satisfies

versions = st.text("0129abz.+~-:", min_size=1, max_size=12).filter(is_version)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("1.0~rc1", "1.0"),
        ("1.0~~", "1.0~"),
        ("1.0", "1.0a"),
        ("1.0a", "1.0+"),
        ("1.0", "1.0-1"),
        ("1.0-1", "1.0-1.1"),
        ("1.0-1", "1.0-1+b1"),
        ("1.0-1~bpo12+1", "1.0-1"),
        ("9", "10"),
        ("1.9.9", "1:0.1"),
        ("2.36-9+deb12u9", "2.36-9+deb12u10"),
        ("1.0-1-1", "1.0-2-1"),
        ("1.2.3", "1.2.3.4"),
        ("99999999999999999999998", "99999999999999999999999"),
        ("1.0~beta1~svn1245", "1.0~beta1"),
        ("6.0-4.6.0", "6.0-10"),
    ],
)
def test_the_left_is_older(older: str, newer: str) -> None:
    assert (compare(older, newer), compare(newer, older)) == (-1, 1)


@pytest.mark.parametrize(("a", "b"), [("1.0", "0:1.0"), ("1.0", "1.00"), ("1.", "1.0"), ("1.0", "1.0-0"), ("01", "1")])
def test_these_are_the_same_version(a: str, b: str) -> None:
    assert compare(a, b) == 0


@settings(database=None)  # the checkout may be somebody else's
@given(versions, versions, versions)
def test_the_order_is_total(a: str, b: str, c: str) -> None:
    assert compare(a, b) == -compare(b, a)
    if compare(a, b) <= 0 and compare(b, c) <= 0:
        assert compare(a, c) <= 0


@pytest.mark.parametrize(
    ("relation", "kept"),
    [("<<", "a"), ("<=", "ab"), ("=", "b"), (">=", "bc"), (">>", "c"), ("<", "ab"), (">", "bc")],
)
def test_a_relation_keeps_what_it_says(relation: str, kept: str) -> None:
    found = {
        name for name, version in {"a": "1.0", "b": "1.1", "c": "1.2"}.items() if satisfies(version, relation, "1.1")
    }
    assert found == set(kept)


@pytest.mark.parametrize("text", ["", "1 2", "1_0", "1.0\n", "a:1", "1/2", "1" * 300, "\u0661"])
def test_what_cannot_be_a_version_is_none(text: str) -> None:
    assert not is_version(text)
