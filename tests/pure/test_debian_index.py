"""Packages files."""

from __future__ import annotations

import gzip
import lzma

import pytest

from devns.debian import index
from devns.debian.errors import Untrusted
from tests.pure.test_debian_kit import paragraph


def scanned(*paragraphs: bytes, suite: str = "bookworm") -> index.Packages:
    return index.scan(b"".join(paragraphs), suite=suite, archive="security" if "security" in suite else "main")


def indexed(*paragraphs: bytes) -> index.Index:
    return index.Index([scanned(*paragraphs)], "amd64")


def newest(*files: index.Packages, name: str = "a") -> index.Package:
    found = index.Index(files, "amd64").candidate(name)
    assert found is not None
    return found.package


def test_a_paragraph_becomes_a_package() -> None:
    found = indexed(
        paragraph("other"),
        paragraph(
            "a",
            "1:2.0-1",
            essential="yes",
            multi_arch="same",
            priority="required",
            pre_depends="libc6 (>= 2.36)",
            depends="b | c:any (<< 3), d",
            breaks="e",
            conflicts="f (<= 1)",
            provides="g (= 2), h",
            description="short\n long\n .\n lines",
        ),
    ).candidate("a")
    assert found is not None
    package = found.package
    assert (package.name, package.version, package.multi_arch, package.essential) == ("a", "1:2.0-1", "same", True)
    assert [" | ".join(map(str, group)) for group in found.depends] == ["libc6 (>= 2.36)", "b | c:any (<< 3)", "d"]
    assert [str(relation) for relation in found.conflicts] == ["f (<= 1)", "e"]
    assert [str(relation) for relation in found.provides] == ["g (= 2)", "h"]


def test_the_newest_version_of_all_suites_is_the_candidate() -> None:
    main = scanned(paragraph("a", "1.0-1"), paragraph("a", "0.9"))
    security = scanned(paragraph("a", "1.0-1+deb12u1"), suite="bookworm-security")
    package = newest(main, security)
    assert (package.version, package.archive) == ("1.0-1+deb12u1", "security")
    assert newest(security, main) == package


def test_S_21_the_same_version_with_different_contents_is_refused() -> None:
    twice = (paragraph("a", "1"), paragraph("a", "1", sha256="b" * 64))
    with pytest.raises(Untrusted, match="there twice, with different contents"):
        newest(scanned(*twice))
    with pytest.raises(Untrusted, match="there twice, with different contents"):
        newest(scanned(twice[0]), scanned(twice[1], suite="bookworm-security"))


def test_S_21_the_same_package_in_two_suites_is_one() -> None:
    assert newest(scanned(paragraph("a")), scanned(paragraph("a"), suite="bookworm-updates")).archive == "main"


@pytest.mark.parametrize(
    "filename",
    [
        "/pool/a.deb",
        "../a.deb",
        "pool/../../a.deb",
        "pool/./a.deb",
        "pool/..",
        "http://evil.test/a.deb",
        "//evil.test/a.deb",
        "pool/a.deb?x",
        "pool//a.deb",
        "pool/a b.deb",
        "pool/a.rpm",
        "pool/a.deb\x00",
        "",
        "pool/" + "a" * 2000 + ".deb",
    ],
)
def test_S_21_a_filename_that_leads_elsewhere_is_refused(filename: str) -> None:
    with pytest.raises(Untrusted, match="Filename: "):
        newest(scanned(paragraph("a", filename=filename)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sha256", "a" * 63),
        ("sha256", "A" * 64),
        ("sha256", ""),
        ("size", "-1"),
        ("size", "1e9"),
        ("size", "9" * 40),
        ("size", ""),
        ("version", "1 2"),
        ("architecture", "arm64"),
        ("architecture", ""),
        ("depends", "a (>= )"),
        ("depends", "a || b"),
        ("depends", "a; rm -rf"),
        ("provides", "A"),
    ],
)
def test_S_21_a_field_that_says_what_cannot_be_is_refused(key: str, value: str) -> None:
    with pytest.raises(Untrusted):
        newest(scanned(paragraph("a", **{key: value})))


@pytest.mark.parametrize(
    "digest", ["../" * 21 + "x", "A" * 64, "a" * 63, "a" * 65, "md5:" + "a" * 60, "sha256:" + "a" * 64, "a" * 32, ""]
)
def test_S_04_what_is_no_sha256_is_never_used_as_one(digest: str) -> None:
    with pytest.raises(Untrusted, match="SHA256"):
        indexed(paragraph("a", sha256=digest)).candidate("a")


def test_S_21_a_field_said_twice_is_refused() -> None:
    with pytest.raises(Untrusted, match="said twice"):
        newest(scanned(paragraph("a").replace(b"Size", b"SHA256: " + b"b" * 64 + b"\nSize")))


def test_S_21_a_paragraph_of_megabytes_is_refused() -> None:
    folded = paragraph("a", description="x" + "\n y" * (1 << 20))
    with pytest.raises(Untrusted, match="more than 1048576 bytes"):
        newest(scanned(folded))
    with pytest.raises(Untrusted, match="more than 1048576 bytes"):
        newest(scanned(folded[:-2]))


@pytest.mark.parametrize(
    "data",
    [
        b"Version: 1\n\n",
        b"Version: 1\n\nPackage: a\nVersion: 1\n\n",
        b"Version: 1\n Package: a\n\n",
        paragraph("a").replace(b"Version", b"Package: b\nVersion"),
        paragraph("a") + b"Package:b\n\n",
        b"<html>",
    ],
)
def test_a_file_whose_paragraphs_cannot_be_told_apart_is_refused(data: bytes) -> None:
    with pytest.raises(Untrusted):
        scanned(data)


def test_a_paragraph_may_begin_with_another_field_and_end_in_several_empty_lines() -> None:
    data = paragraph("a") + b"\n\nArchitecture: amd64\nPackage: b\nProvides: v\n\n\n"
    found = scanned(data)
    assert {name: data[places[0] :].split(b":")[0] for name, places in found.offsets.items()} == {
        "a": b"Package",
        "b": b"Architecture",
    }
    assert list(index.Index([found], "amd64").virtual()) == ["v"]


def test_a_file_without_packages_is_fine() -> None:
    assert scanned(b"").offsets == {}


def test_the_last_paragraph_needs_no_empty_line() -> None:
    assert newest(scanned(paragraph("b"), paragraph("a").rstrip(b"\n") + b"\n")).name == "a"


def test_an_older_version_does_not_provide_what_the_newest_no_longer_does() -> None:
    found = index.Index(
        [scanned(paragraph("a", "1", provides="v")), scanned(paragraph("a", "2"), suite="bookworm-security")], "amd64"
    )
    assert found.providers("v") == []


def test_who_provides_a_name_is_known_with_the_version_it_says() -> None:
    found = indexed(
        paragraph("a", provides="v (= 3), w"), paragraph("b", provides="w, v"), paragraph("c", provides="vv")
    )
    assert [(p.package.name, said) for p, said in found.providers("v")] == [("a", "3"), ("b", None)]


def test_the_essential_packages_are_found_in_their_order() -> None:
    assert indexed(
        paragraph("z", essential="yes"), paragraph("m", essential="no"), paragraph("a", essential="yes")
    ).essential() == ("z", "a")


def test_a_misspelt_name_finds_its_neighbours() -> None:
    assert indexed(paragraph("python3"), paragraph("perl")).near("pyhton3") == ["python3"]


def test_a_name_is_as_old_as_its_first_mention_anywhere() -> None:
    found = indexed(
        paragraph("a", suggests="late (>= 1), soon:any", description="early is a word here"),
        paragraph("b", provides="soon"),
        paragraph("early"),
        paragraph("late"),
        paragraph("soon"),
    )
    assert sorted(["early", "late", "soon", "a"], key=found.mentioned) == ["a", "late", "soon", "early"]


DATA = paragraph("a") * 20


@pytest.mark.parametrize(("packing", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_every_packing_gives_the_same_bytes(packing: str, pack: object) -> None:
    assert index.decompress(pack(DATA), packing, len(DATA)) == DATA  # type: ignore[operator]


@pytest.mark.parametrize(("packing", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("off", [-1, 1])
def test_S_02_an_index_of_another_size_than_promised_is_refused(packing: str, pack: object, off: int) -> None:
    with pytest.raises(Untrusted, match="than the"):
        index.decompress(pack(DATA), packing, len(DATA) + off)  # type: ignore[operator]


def test_S_12_a_bomb_is_stopped_at_the_promised_size() -> None:
    bomb = lzma.compress(bytes(1 << 24))
    with pytest.raises(Untrusted, match="more than the 1000 bytes"):
        index.decompress(bomb, ".xz", 1000)
    with pytest.raises(Untrusted, match="more than the 1000 bytes"):
        index.decompress(gzip.compress(bytes(1 << 24)), ".gz", 1000)


def test_damaged_data_is_refused() -> None:
    with pytest.raises(Untrusted, match="damaged"):
        index.decompress(b"\xfd7zXZ\x00 and then nonsense", ".xz", 10)
