"""Release files: believed only if they are what was asked for, and of today."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from devns.debian import release
from devns.debian.errors import Untrusted
from devns.debian.mirrors import Ages
from tests.pure.test_debian_kit import NOW, Signer, date, release_text

SIGNER = Signer()
FILES = {"main/binary-amd64/Packages": b"x" * 10, "main/binary-amd64/Packages.xz": b"y" * 5}


def read(text: bytes, suite: str = "bookworm", *, ages: Ages = Ages(), now: float = NOW) -> release.Release:
    signed = SIGNER.sign(text)
    return release.read(signed, suite=suite, architecture="amd64", trust=SIGNER.trust, now=now, ages=ages)


def test_a_release_says_when_it_is_of_and_which_files_it_vouches_for() -> None:
    found = read(release_text(FILES, valid_until=date(NOW + 1)))
    entry = found.files["main/binary-amd64/Packages.xz"]
    assert (found.date, found.valid_until, found.by_hash) == (NOW - 3600, NOW + 1, True)
    assert (entry.size, len(found.files), found.signers) == (5, 2, (SIGNER.fingerprint,))


def test_S_13_a_release_without_a_signature_is_refused() -> None:
    with pytest.raises(Untrusted, match="bookworm/InRelease"):
        release.read(release_text(FILES), suite="bookworm", architecture="amd64", trust=SIGNER.trust, now=NOW)


def test_S_17_a_release_that_was_good_until_yesterday_is_refused() -> None:
    stale = release_text(FILES, date=date(NOW - 90000), valid_until=date(NOW - 86400))
    with pytest.raises(Untrusted, match="it was good until 2027-01-14"):
        read(stale)
    assert read(stale, now=NOW - 86401).name == "bookworm"


def test_S_17_where_apt_does_not_look_at_the_time_neither_do_we() -> None:
    assert read(release_text(FILES, valid_until=date(NOW - 86400)), ages=Ages(check_until=False)).name == "bookworm"


def test_S_17_apts_longest_and_shortest_time_bound_what_the_release_says() -> None:
    day, month = 86400, 30 * 86400
    for fields, ages, ends in (
        ({}, Ages(), None),
        ({}, Ages(longest=day), day),
        ({}, Ages(shortest=day), None),
        ({"valid_until": date(NOW + 7 * day)}, Ages(longest=day), day),
        ({"valid_until": date(NOW + 7 * day)}, Ages(longest=month), 7 * day),
        ({"valid_until": date(NOW + day)}, Ages(shortest=7 * day), 7 * day),
        ({"valid_until": date(NOW + day)}, Ages(shortest=7 * day, longest=2 * day), 2 * day),
    ):
        text = release_text(FILES, date=date(NOW), **fields)
        assert read(text, ages=ages, now=NOW + (ends or 100 * month) - 1).date == NOW
        if ends is not None:
            with pytest.raises(Untrusted, match="it was good until"):
                read(text, ages=ages, now=NOW + ends + 1)


def test_S_17_a_release_of_tomorrow_is_refused() -> None:
    text = release_text(FILES, date=date(NOW + 60))
    with pytest.raises(Untrusted, match=r"it is of 2027-01-15 08:01 UTC, and now it is 2027-01-15 08:00") as caught:
        read(text)
    assert 'Acquire::Check-Date "false"' in (caught.value.hint or "")
    assert read(text, ages=Ages(future=60)).date == NOW + 60
    assert read(text, ages=Ages(check_date=False)).date == NOW + 60
    assert read(text, now=NOW + 50).date == NOW + 60


def test_S_17_where_the_clock_counts_for_nothing_no_time_does() -> None:
    stale = release_text(FILES, valid_until=date(NOW - 86400))
    assert read(stale, ages=Ages(check_date=False)).name == "bookworm"


@pytest.mark.parametrize("text", ["tomorrow", "Sat, 11 Jul 2026 10:16:37 CEST", "99 Xxx 2026"])
def test_S_17_a_time_that_is_none_is_refused(text: str) -> None:
    for fields in ({"valid_until": text}, {"date": text}):
        with pytest.raises(Untrusted, match="no date"):
            read(release_text(FILES, **fields))


def test_S_17_a_release_without_a_date_is_refused() -> None:
    with pytest.raises(Untrusted, match="its Date is missing"):
        read(release_text(FILES, drop=["Date"]))


def test_S_18_an_older_release_than_the_one_seen_before_is_refused(tmp_path: Path) -> None:
    newer, older = (read(release_text(FILES, date=date(NOW - age))) for age in (10, 20))
    directory = str(tmp_path / "releases")
    release.refuse_older(older, directory)
    release.remember(newer, directory)
    release.refuse_older(newer, directory)
    with pytest.raises(Untrusted, match="older than the one of") as caught:
        release.refuse_older(older, directory)
    hint = str(caught.value.hint)
    os.unlink(hint.partition("rm ")[2])  # the hint is a command that works
    release.refuse_older(older, directory)


def test_S_18_suites_do_not_age_each_other(tmp_path: Path) -> None:
    release.remember(read(release_text(FILES)), str(tmp_path))
    updates = read(release_text(FILES, suite="bookworm-updates", date=date(NOW - 86400)), "bookworm-updates")
    release.refuse_older(updates, str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"date": "x"}', b'{"date": null}', b"\xff"])
def test_a_damaged_record_of_the_last_release_is_no_obstacle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bookworm.json").write_bytes(content)
    release.refuse_older(read(release_text(FILES)), str(tmp_path))


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ("bookworm", "bullseye"),
        ("bookworm", "trixie"),
        ("bookworm", "bookworm-security"),
        ("bookworm", "bookworm-updates"),
        ("bookworm-security", "bookworm"),
        ("bookworm-security", "trixie-security"),
        ("bookworm-updates", "bookworm-backports"),
    ],
)
def test_S_19_a_well_signed_release_of_another_suite_is_refused(asked: str, served: str) -> None:
    with pytest.raises(Untrusted, match=f"it is the file of {served}, not of {asked}"):
        read(release_text(FILES, suite=served), asked)


@pytest.mark.parametrize(
    "fields",
    [
        {"suite": "bookworm", "origin": "Evil"},
        {"suite": "bookworm", "label": "Debian Backports"},
        {"suite": "bookworm", "architectures": "all arm64 i386"},
        {"suite": "bookworm", "components": "contrib non-free mainly"},
    ],
)
def test_S_19_a_release_that_is_not_debians_main_for_this_machine_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(Untrusted):
        read(release_text(FILES, **fields))


def test_S_19_a_suite_that_changes_its_pocket_is_refused() -> None:
    text = release_text(FILES).replace(b"Suite: stable\n", b"Suite: stable-updates\n")
    with pytest.raises(Untrusted, match="no name of bookworm"):
        read(text)
    assert read(release_text(FILES).replace(b"Suite: stable\n", b"Suite: oldoldstable\n")).name == "bookworm"


def test_S_20_a_release_with_only_weak_hashes_is_refused() -> None:
    weak = release_text(drop=["SHA256"]) + b"MD5Sum:\n d41d8cd98f00b204e9800998ecf8427e 0 main/binary-amd64/Packages\n"
    with pytest.raises(Untrusted, match="no SHA256 list"):
        read(weak)


def test_S_20_a_hash_under_another_heading_is_not_read() -> None:
    line = f" {'a' * 64} 7 main/binary-amd64/Packages.gz\n".encode()
    found = read(release_text(FILES) + b"SHA512:\n" + line)
    assert "main/binary-amd64/Packages.gz" not in found.files


def test_S_20_an_index_that_the_release_does_not_list_is_not_there() -> None:
    found = read(release_text({"contrib/binary-amd64/Packages": b""}))
    with pytest.raises(Untrusted, match="does not list main/binary-amd64/Packages"):
        release.index(found, "amd64")


def test_the_best_packing_that_is_listed_comes_first() -> None:
    listed = release.index(read(release_text({**FILES, "main/binary-amd64/Packages.gz": b"z"})), "amd64")
    assert listed.whole.size == 10
    assert [kind for kind, _ in listed.packed] == [".xz", ".gz", ""]


@pytest.mark.parametrize(
    "line",
    [
        f" {'A' * 64} 1 main/x",
        f" {'a' * 63} 1 main/x",
        f" {'a' * 64} -1 main/x",
        f" {'a' * 64} 1 /etc/passwd",
        f" {'a' * 64} 1 main/../../x",
        f" {'a' * 64} 1",
        f" {'a' * 64} {'9' * 30} main/x",
        " md5:abc 1 main/x",
    ],
)
def test_S_20_a_line_of_the_list_that_is_none_is_refused(line: str) -> None:
    with pytest.raises(Untrusted, match="not a line of a SHA256 list"):
        read(release_text(FILES) + line.encode() + b"\n")


def test_S_20_a_file_listed_twice_with_different_hashes_is_refused() -> None:
    with pytest.raises(Untrusted, match="twice, differently"):
        read(release_text(FILES) + f" {'a' * 64} 10 main/binary-amd64/Packages\n".encode())


@pytest.mark.parametrize("more", [b"Codename: bookworm\n", b"\nCodename: trixie\n", b"nonsense\n", b"X: \xff\n"])
def test_a_release_that_can_be_read_in_two_ways_is_refused(more: bytes) -> None:
    with pytest.raises(Untrusted):
        release.parse(release_text(FILES) + more, suite="bookworm", architecture="amd64")
