"""What a request comes to."""

from __future__ import annotations

import pytest

from devns.debian import index, resolve
from devns.errors import TemplateError
from tests.pure.test_debian_kit import paragraph

A = paragraph


def archive(*paragraphs: bytes) -> index.Index:
    """An archive of these, apt and one Essential package."""
    data = b"".join([A("base-files", essential="yes"), A("apt", depends="apt-lib"), A("apt-lib"), *paragraphs])
    return index.Index([index.scan(data, suite="bookworm", archive="main")], "amd64")


def closure(*paragraphs: bytes, request: str = "a") -> set[str]:
    """The names that `request` brings, without those that every system has."""
    found = resolve.resolve(archive(*paragraphs), request.split())
    return {package.name for package in found} - {"base-files", "apt", "apt-lib"}


def refusal(*paragraphs: bytes, request: str = "a") -> TemplateError:
    with pytest.raises(TemplateError) as caught:
        closure(*paragraphs, request=request)
    return caught.value


def test_every_system_has_apt_and_the_essential_packages() -> None:
    assert [package.name for package in resolve.resolve(archive(), [])] == ["apt", "apt-lib", "base-files"]


def test_what_is_needed_comes_too_and_what_is_recommended_does_not() -> None:
    assert closure(
        A("a", pre_depends="b", depends="c", recommends="r", suggests="r"), A("b"), A("c", depends="d"), A("d"), A("r")
    ) == {"a", "b", "c", "d"}


def test_packages_may_need_each_other() -> None:
    assert closure(A("a", depends="b"), A("b", depends="c"), A("c", depends="a")) == {"a", "b", "c"}


def test_a_chain_deeper_than_the_stack_is_followed() -> None:
    links = [A(f"p{n}", depends=f"p{n + 1}") for n in range(3000)]
    assert len(closure(*links, A("p3000"), request="p0")) == 3001


def test_the_first_alternative_is_taken() -> None:
    assert closure(A("a", depends="b | c"), A("b"), A("c")) == {"a", "b"}


def test_an_alternative_that_is_there_anyway_is_enough() -> None:
    assert closure(A("a", depends="b | c"), A("b"), A("c"), request="a c") == {"a", "c"}
    assert closure(A("a", depends="b | base-files"), A("b")) == {"a"}


def test_an_alternative_that_cannot_be_had_is_passed_over() -> None:
    packages = [A("a", depends="nowhere | b | c"), A("b", depends="d (>= 2)"), A("c"), A("d", "1")]
    assert closure(*packages) == {"a", "c"}


@pytest.mark.parametrize(
    ("relation", "brings"),
    [(">= 2.0~rc1", "b"), ("<< 2.0", "b"), ("= 2.0~rc1-1", "b"), (">= 2.0", "c"), ("<< 1:1", "b")],
)
def test_a_version_that_does_not_fit_is_as_good_as_none(relation: str, brings: str) -> None:
    assert closure(A("a", depends=f"b ({relation}) | c"), A("b", "2.0~rc1-1"), A("c")) == {"a", brings}


def test_a_virtual_package_brings_the_provider_of_the_highest_priority() -> None:
    packages = [A("a", depends="v"), A("w", provides="v"), A("x", provides="v", priority="required")]
    assert closure(*packages) == {"a", "x"}


def test_a_virtual_package_that_is_provided_anyway_brings_nobody() -> None:
    assert closure(
        A("a", depends="v"), A("w", provides="v", priority="required"), A("x", provides="v"), request="a x"
    ) == {
        "a",
        "x",
    }


def test_the_package_of_that_name_comes_before_its_providers() -> None:
    assert closure(A("a", depends="v"), A("w", provides="v", priority="required"), A("v")) == {"a", "v"}


def test_among_equal_providers_the_one_mentioned_last_comes() -> None:
    assert closure(A("a", depends="v"), A("x", provides="v"), A("w", provides="v")) == {"a", "w"}
    assert closure(A("a", depends="v", suggests="w"), A("x", provides="v"), A("w", provides="v")) == {"a", "x"}


def test_only_a_versioned_provides_satisfies_a_version() -> None:
    need = A("a", depends="v (>= 2)")
    assert closure(need, A("w", "5", provides="v"), A("x", provides="v (= 2)")) == {"a", "x"}
    assert "v (>= 2)" in refusal(need, A("w", "5", provides="v"), A("x", provides="v (= 1)")).message


def test_any_architecture_is_only_of_packages_that_allow_it() -> None:
    need = A("a", depends="b:any | c")
    assert closure(need, A("b", multi_arch="allowed"), A("c")) == {"a", "b"}
    assert closure(need, A("b", multi_arch="foreign"), A("c")) == {"a", "c"}
    assert closure(need, A("b"), A("p", provides="b", multi_arch="allowed"), A("c")) == {"a", "p"}


def test_our_own_architecture_by_name_is_ours_and_another_is_nobodys() -> None:
    assert closure(A("a", depends="b:i386 | b:amd64"), A("b")) == {"a", "b"}
    assert "needs b:i386" in refusal(A("a", depends="b:i386"), A("b")).message


def test_architecture_all_is_everybodys() -> None:
    assert closure(A("a", depends="b"), A("b", architecture="all")) == {"a", "b"}


def test_a_package_in_conflict_is_passed_over_for_the_next_alternative() -> None:
    packages = [A("a", depends="b | c"), A("b", conflicts="k"), A("c"), A("k")]
    assert closure(*packages, request="a k") == {"a", "c", "k"}
    packages = [A("a", depends="b | c"), A("b"), A("c"), A("k", breaks="b (<< 2)")]
    assert closure(*packages, request="a k") == {"a", "c", "k"}


def test_breaks_of_an_older_version_hurt_nobody() -> None:
    assert closure(A("a", breaks="b (<< 1)", depends="b"), A("b", "1")) == {"a", "b"}


def test_a_package_may_conflict_with_what_it_provides() -> None:
    assert closure(A("a", provides="v", conflicts="v, a")) == {"a"}


def test_two_that_conflict_cannot_both_be_asked_for() -> None:
    error = refusal(A("a", conflicts="v"), A("b", provides="v"), request="a b")
    assert error.message == "packages: a can't be installed: a conflicts with b"
    assert error.hint is not None


def test_what_is_missing_is_said_with_the_chain_that_leads_to_it() -> None:
    error = refusal(A("a", depends="b"), A("b", depends="c | c2"), A("c", depends="d (>= 2)"), A("d", "1.5"))
    assert error.message == ("packages: a can't be installed: a needs b; b needs c | c2; c needs d (>= 2); d is 1.5")
    assert refusal(A("a", depends="nowhere")).message.endswith("a needs nowhere; there is no nowhere")


def test_a_chain_that_ends_in_a_conflict_says_with_whom() -> None:
    error = refusal(A("a", depends="b"), A("b", conflicts="k"), A("k"), request="a k")
    assert error.message.startswith("packages: a can't be installed: a needs b; b conflicts with k")


def test_an_unknown_package_is_said_with_its_neighbours() -> None:
    error = refusal(A("ripgrep"), request="rigprep")
    assert (error.message, error.hint) == ("packages: rigprep: no such package", "did you mean ripgrep?")


def test_a_virtual_name_is_its_only_provider_or_a_question() -> None:
    assert closure(A("w", provides="v"), request="v") == {"w"}
    error = refusal(A("w", provides="v"), A("x", provides="v"), request="v")
    assert (error.message, error.hint) == ("packages: v is provided by several", "say which: w, x")


def versions(*paragraphs: bytes, request: str) -> set[str]:
    """As `closure`, with the versions."""
    found = resolve.resolve(archive(*paragraphs), request.split())
    return {f"{p.name}={p.version}" for p in found} - {"base-files=1", "apt=1", "apt-lib=1"}


OLD_AND_NEW = (
    A("b", "1", depends="old-lib"),
    A("b", "2", depends="lib", provides="v"),
    A("lib"),
    A("old-lib"),
    A("a", depends="b (>= 2) | c"),
    A("c"),
)


def test_of_two_versions_the_newer_comes_unless_the_older_is_asked_for() -> None:
    assert versions(*OLD_AND_NEW, request="b") == {"b=2", "lib=1"}
    assert versions(*OLD_AND_NEW, request="b=2") == {"b=2", "lib=1"}
    assert versions(*OLD_AND_NEW, request="b=1") == {"b=1", "old-lib=1"}


def test_a_version_that_is_asked_for_is_the_one_that_others_get() -> None:
    assert versions(*OLD_AND_NEW, request="a b") == {"a=1", "b=2", "lib=1"}
    assert versions(*OLD_AND_NEW, request="a b=1") == {"a=1", "b=1", "old-lib=1", "c=1"}
    assert "needs v; there is no v" in refusal(*OLD_AND_NEW, A("d", depends="v"), request="d b=1").message


def test_a_version_that_is_not_there_is_said_with_those_that_are() -> None:
    error = refusal(*OLD_AND_NEW, request="b=3")
    assert (error.message, error.hint) == ("packages: b=3: no such version", "there is 2, 1")
    assert refusal(*OLD_AND_NEW, request="b=1 b=2").message == "packages: b: 1 and 2 are asked for"
    assert refusal(*OLD_AND_NEW, request="v=2").message == "packages: v=2: no such version"


@pytest.mark.parametrize("mark", ["", ":any", ":native", ":all", ":amd64"])
def test_every_way_to_name_this_machines_architecture_is_the_same_package(mark: str) -> None:
    assert closure(A("a"), request=f"a{mark}") == {"a"}
    assert versions(*OLD_AND_NEW, request=f"b{mark}=1") == {"b=1", "old-lib=1"}


def test_another_architecture_is_not_to_be_had() -> None:
    error = refusal(A("a"), request="a:i386")
    assert error.message == "packages: a:i386: a root has packages of amd64 alone"


def test_what_is_left_out_gives_way_to_an_alternative_or_is_in_the_way() -> None:
    packages = [A("a", depends="b | c"), A("b"), A("c"), A("d", depends="b")]
    assert closure(*packages, request="a b-") == {"a", "c"}
    assert closure(*packages, request="b:amd64- a") == {"a", "c"}
    error = refusal(*packages, request="d b-")
    assert error.message == "packages: d can't be installed: d needs b; b is left out"


def test_what_is_asked_for_or_in_every_system_cannot_be_left_out() -> None:
    assert refusal(A("a"), request="a a-").message == "packages: a-: it can't be left out: it is asked for, too"
    assert refusal(request="base-files-").message == "packages: base-files-: it can't be left out: every system has it"
    assert refusal(A("ripgrep"), request="rigprep-").hint == "did you mean ripgrep?"


def test_a_root_is_merged_without_usrmerge() -> None:
    both = [A("usrmerge", depends="perl", provides="usr-is-merged"), A("usr-is-merged"), A("perl")]
    helpers = A("helpers", essential="yes", depends="usrmerge | usr-is-merged")
    assert closure(helpers, *both, request="") == {"helpers", "usr-is-merged"}
    assert closure(A("helpers", essential="yes"), *both, request="") == {"helpers"}


def test_the_same_request_in_another_order_is_the_same_set() -> None:
    packages = [A("a", depends="v | c"), A("b", depends="c"), A("c"), A("w", provides="v")]
    assert closure(*packages, request="a b c") == closure(*packages, request="c b a") == {"a", "b", "c"}


def test_what_came_for_a_package_that_then_could_not_be_had_goes_again() -> None:
    packages = [A("a", depends="b | c"), A("b", depends="b1, b2"), A("b1"), A("b2", depends="b3"), A("c")]
    assert closure(*packages) == {"a", "c"}
    assert closure(*packages, A("k", suggests="b1"), request="a k") == {"a", "b1", "c", "k"}
