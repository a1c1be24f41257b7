"""trust: what a project file may do unasked, what it takes to ask again, and records that nobody can forge or break."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devns.errors import TemplateError, Unsupported
from devns.host import Host
from devns.template import Document, load
from devns.trust import Changes, Grant, changes, digest, grants, is_trusted, require, trust, untrust

HOME = "/home/dev"
PROJECT = f"{HOME}/p"
FILE = f"{PROJECT}/.devns.toml"
MINE = f"{HOME}/.config/devns/templates/mine.toml"
RECORDS = f"{HOME}/.local/state/devns/trust"
ASKS = '[network]\nmode = "host"\n[[mount.bind]]\nsrc = "~/.ssh"\n'


def write(host: Host, path: str, text: str) -> None:
    place = Path(host.root + path)
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    place.write_text(text)
    place.chmod(0o644)
    for directory in place.relative_to(host.root).parents:
        (Path(host.root) / directory).chmod(0o755)


def machine(
    root: Path, files: Mapping[str, str], *, cwd: str = PROJECT, environ: Mapping[str, str] | None = None
) -> Host:
    """A host of these files, all of them the caller's own."""
    root.mkdir(exist_ok=True)
    host = Host.make(
        root=str(root),
        uid=os.getuid(),
        gid=os.getgid(),
        environ={"HOME": HOME, **(environ or {})},
        cwd=cwd,
        machine="x86_64",
        release="6.1.0",
    )
    for path, text in files.items():
        write(host, path, text)
    return host


def asked(root: Path, text: str) -> list[tuple[str, str]]:
    return [(grant.key, grant.value) for grant in grants(load(None, machine(root, {FILE: text, MINE: ASKS})))]


def refusal(document: Document, host: Host) -> TemplateError:
    with pytest.raises(TemplateError) as caught:
        require(document, host)
    return caught.value


# --- what needs trust ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "description = 'x'",
        "extends = 'py311'",
        "extends = 'mine'",
        "[root]\npackages = ['git']",
        "[env]\nset = { A = 'x', DATABASE_URL = 'y', DEBUG = '1', NODE = 'a', PS5 = 'b', APP_PATH = 'c' }",
        "[root]\n[env]\n[env.set]",
        "extends = './base.toml'",
    ],
)
def test_a_template_that_is_there_packages_and_literal_variables_need_no_trust(tmp_path: Path, text: str) -> None:
    host = machine(tmp_path, {FILE: text, MINE: ASKS, f"{PROJECT}/base.toml": "extends = 'mine'"})
    document = load(None, host)
    assert grants(document) == ()
    require(document, host)
    assert not (tmp_path / RECORDS[1:]).exists()


HOOKS = """
    LD_PRELOAD LD_LIBRARY_PATH GCONV_PATH LOCPATH TERMINFO TERMINFO_DIRS PATH HOME SHELL ENV BASH_ENV BASHOPTS
    PROMPT_COMMAND SHELLOPTS PS0 PS1 PS4 IFS PYTHONPATH PYTHONSTARTUP PERL5LIB RUBYOPT NODE_OPTIONS JAVA_TOOL_OPTIONS
    _JAVA_OPTIONS EDITOR VISUAL PAGER MANPAGER LESSOPEN GIT_SSH_COMMAND SSH_ASKPASS http_proxy HTTPS_PROXY no_proxy
    SSL_CERT_FILE CURL_CA_BUNDLE CURL_HOME REQUESTS_CA_BUNDLE PIP_INDEX_URL UV_INDEX_URL npm_config_registry GOFLAGS
    CARGO_HOME RUSTC_WRAPPER MAKEFLAGS CFLAGS XDG_CONFIG_HOME ZDOTDIR INPUTRC
""".split()


@pytest.mark.parametrize("name", HOOKS)
def test_C_16_a_variable_that_tells_programs_what_to_run_load_or_talk_to_waits_for_trust(
    tmp_path: Path, name: str
) -> None:
    assert asked(tmp_path, f"[env.set]\nA = '1'\n{name} = 'x'") == [(f"env.set.{name}", '"x"')]


def test_a_named_template_needs_no_trust_and_cannot_be_given_it(tmp_path: Path) -> None:
    host = machine(tmp_path, {MINE: ASKS, f"{PROJECT}/x": ""})
    document = load("mine", host)
    assert grants(document) == ()
    require(document, host)
    with pytest.raises(TemplateError, match=r"^mine: a named template needs no trust$"):
        trust(document, host)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("root.from = 'dir:/'", [("root.from", '"dir:/"')]),
        ("root.writable = 'no'", [("root.writable", '"no"')]),
        ("build.run = ['a', 'b']", [("build.run", '"a"'), ("build.run", '"b"')]),
        ("env.pass = ['AWS_SECRET']", [("env.pass", '"AWS_SECRET"')]),
        ("user.nested = true", [("user.nested", "true")]),
        ("mount.bind = []", [("mount.bind", "[]")]),
        ("[mount]", [("mount", "{}")]),
        ("[namespaces.uts]", [("namespaces.uts", "{}")]),
        ('"root.packages" = 1', [('"root.packages"', "1")]),
        ("roots.packages = ['x']", [("roots.packages", '"x"')]),
        ("env = { sets = { A = 'x' } }", [("env.sets.A", '"x"')]),
        ("root = ['x']", [("root", '"x"')]),
    ],
)
def test_anything_else_is_a_grant(tmp_path: Path, text: str, wanted: list[tuple[str, str]]) -> None:
    assert asked(tmp_path, text) == wanted


def test_S_24_a_repository_is_asked_for_before_all_else_and_told_by_its_fingerprint(tmp_path: Path) -> None:
    armor = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n" + "A" * 3000
    text = (
        ASKS
        + "[unheard.of]\nx = 1\n"
        + "".join(
            f"[[root.repository]]\nuri = 'https://apt.test/'\nkey = {key}\nfingerprint = 'F'\n"
            for key in ("'./x.asc'", f"'''{armor}'''")
        )
    )
    found = asked(tmp_path, text)
    assert [key for key, _ in found] == ["root.repository"] * 2 + ["unheard.of.x", "mount.bind", "network.mode"]
    row = '{ uri = "https://apt.test/", key = "%s", fingerprint = "F" }'
    assert [value for _, value in found[:2]] == [
        row % "./x.asc",
        row % "-----BEGIN PGP PUBLIC KEY BLOCK-----",
    ]


def test_what_an_included_file_of_the_project_asks_for_counts(tmp_path: Path) -> None:
    host = machine(tmp_path, {FILE: "extends = './a/base.toml'", f"{PROJECT}/a/base.toml": ASKS})
    assert [grant.key for grant in grants(load(None, host))] == ["mount.bind", "network.mode"]


def test_C_10_the_most_dangerous_grants_come_first(tmp_path: Path) -> None:
    text = """
        cgroup.pids = 1
        env.pass = ["A"]
        user.nested = true
        network.publish = ["80:80"]
        mount.bind = [{ src = "~" }]
        build.run = ["x"]
        unheard.of = 1
    """
    said = [key for key, _ in asked(tmp_path, text)]
    assert said == [
        "unheard.of",
        "mount.bind",
        "network.publish",
        "build.run",
        "user.nested",
        "env.pass",
        "cgroup.pids",
    ]


@pytest.mark.parametrize("char", ["\\u001b", "\\u009b", "\\r", "\\n", "\\u202e", "\\u2066", "\\u200b", "\\u007f"])
def test_C_10_a_grant_cannot_disguise_itself(tmp_path: Path, char: str) -> None:
    text = f'mount.bind = [{{ src = "a{char}b", "c{char}d" = "x" }}]\n"m{char}" = 1\n'
    host = machine(tmp_path, {FILE: text})
    document = load(None, host)
    assert [text for grant in grants(document) for text in (grant.key, grant.value) if not text.isprintable()] == []
    assert refusal(document, host).message.isprintable()


def test_C_10_hundreds_of_harmless_lines_do_not_hide_a_dangerous_one(tmp_path: Path) -> None:
    text = "env.pass = [" + ", ".join(f'"A{i}"' for i in range(500)) + "]\nmount.home = 'host'"
    host = machine(tmp_path, {FILE: text})
    problem = refusal(load(None, host), host)
    assert problem.message == f'{FILE}: is not trusted, and asks for mount.home = "host", env.pass = "A0" and 499 more'


# --- asking -------------------------------------------------------------------------------------------------------


def test_without_trust_there_is_one_sentence_and_nothing_is_written(tmp_path: Path) -> None:
    host = machine(tmp_path, {FILE: ASKS})
    problem = refusal(load(None, host), host)
    assert (problem.message, problem.hint, problem.exit_code) == (
        f'{FILE}: is not trusted, and asks for mount.bind = {{ src = "~/.ssh" }}, network.mode = "host"',
        "devns trust",
        78,
    )
    assert not (tmp_path / RECORDS[1:]).exists()


def test_trust_is_a_record_of_its_own_that_only_the_user_can_read(tmp_path: Path) -> None:
    host = machine(tmp_path, {FILE: ASKS})
    document = load(None, host)
    name = trust(document, host)
    require(document, host)
    directory = tmp_path / RECORDS[1:]
    assert [path.name for path in directory.iterdir()] == [f"{name}.json"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / f"{name}.json").stat().st_mode) == 0o600
    record = json.loads((directory / f"{name}.json").read_text())
    assert {**record, "when": 0} == {
        "schema": 1,
        "sha256": name,
        "path": FILE,
        "when": 0,
        "grants": [["mount.bind", '{ src = "~/.ssh" }'], ["network.mode", '"host"']],
    }


def _edit(path: str, text: str) -> Callable[[Host], None]:
    return lambda host: write(host, path, text)


BASE = f"{PROJECT}/base.toml"
INCLUDES = "extends = './base.toml'\n"


@pytest.mark.parametrize(
    ("change", "still"),
    [
        (_edit(FILE, INCLUDES + ASKS), True),
        (_edit(FILE, INCLUDES + ASKS + " "), False),
        (_edit(FILE, INCLUDES + ASKS + "# a comment"), False),
        (_edit(BASE, "extends = 'mine' "), False),
        (_edit(BASE, ""), False),
        (_edit(MINE, "description = 'b'"), False),
        (_edit(f"{PROJECT}/other.toml", "x"), True),
    ],
)
def test_C_05_another_byte_in_any_file_asks_again(tmp_path: Path, change: Callable[[Host], None], still: bool) -> None:
    host = machine(tmp_path, {FILE: INCLUDES + ASKS, BASE: "extends = 'mine'", MINE: "description = 'a'"})
    trust(load(None, host), host)
    change(host)
    document = load(None, host)
    assert is_trusted(document, host) is still
    if not still:
        assert "has changed since it was trusted, and asks for" in refusal(document, host).message


def test_C_05_going_back_to_what_was_trusted_does_not_ask(tmp_path: Path) -> None:
    host = machine(tmp_path, {FILE: ASKS})
    trust(load(None, host), host)
    write(host, FILE, ASKS + "#")
    assert not is_trusted(load(None, host), host)
    write(host, FILE, ASKS)
    assert is_trusted(load(None, host), host)


def test_C_09_the_place_is_a_part_of_the_digest() -> None:
    one = Document("n", FILE, PROJECT, {}, {}, (), {}, HOME)
    assert digest(one) != digest(replace(one, project=f"{PROJECT}x"))


def test_C_25_what_is_trusted_is_what_was_read_not_what_lies_there_now(tmp_path: Path) -> None:
    host = machine(tmp_path, {FILE: ASKS})
    document = load(None, host)
    write(host, FILE, "env.pass = ['EVIL']")
    trust(document, host)
    assert is_trusted(document, host)
    assert not is_trusted(load(None, host), host)


@pytest.mark.parametrize("name", ["CI", "DEVNS_YES", "GITHUB_ACTIONS", "DEVNS_TRUST", "DEVNS_TRUST_ALL"])
def test_C_07_no_variable_of_the_environment_gives_trust(tmp_path: Path, name: str) -> None:
    host = machine(tmp_path, {FILE: ASKS}, environ={name: "1"})
    assert refusal(load(None, host), host).hint == "devns trust"


def test_C_07_a_script_gives_trust_by_the_digest_it_expects(tmp_path: Path) -> None:
    host = machine(tmp_path, {FILE: ASKS})
    document = load(None, host)
    with pytest.raises(TemplateError) as caught:
        trust(document, host, expect="0" * 64)
    assert caught.value.message == f"{FILE}: its sha256 is {digest(document)}, not {'0' * 64}"
    for close in (digest(document)[:16], "", digest(document) + "0"):
        with pytest.raises(TemplateError):
            trust(document, host, expect=close)
    assert not is_trusted(document, host)
    assert trust(document, host, expect=digest(document).upper()) == digest(document)
    assert is_trusted(document, host)


@pytest.mark.parametrize(
    "other",
    [f"{PROJECT}-evil", f"{PROJECT}/sub", f"{HOME}/q", f"{PROJECT}evil", f"{HOME}/P", f"{HOME}/pp", "/srv/p", "/p"],
)
def test_C_08_trust_in_one_place_is_none_in_another(tmp_path: Path, other: str) -> None:
    host = machine(tmp_path, {FILE: ASKS, f"{other}/.devns.toml": ASKS})
    trust(load(None, host), host)
    assert is_trusted(load(None, host), host)
    assert not is_trusted(load(None, replace(host, cwd=other)), host)


def test_C_09_a_project_that_moved_asks_again(tmp_path: Path) -> None:
    host = machine(tmp_path, {FILE: ASKS})
    trust(load(None, host), host)
    shutil.move(tmp_path / PROJECT[1:], tmp_path / "home/dev/moved")
    assert not is_trusted(load(None, replace(host, cwd=f"{HOME}/moved")), host)


def test_C_09_a_project_reached_through_a_link_is_the_one_that_was_trusted(tmp_path: Path) -> None:
    host = machine(tmp_path, {FILE: ASKS})
    trust(load(None, host), host)
    (tmp_path / "home/dev/link").symlink_to("p")
    assert is_trusted(load(None, replace(host, cwd=f"{HOME}/link")), host)


@pytest.mark.parametrize("said", [PROJECT, FILE, f"{PROJECT}/", f"{PROJECT}/../p", f"{HOME}/link"])
def test_untrust_forgets_every_state_of_one_project(tmp_path: Path, said: str) -> None:
    other = f"{HOME}/q"
    host = machine(tmp_path, {FILE: ASKS, f"{other}/.devns.toml": ASKS})
    (tmp_path / "home/dev/link").symlink_to("p")
    elsewhere = load(None, replace(host, cwd=other))
    trust(elsewhere, host)
    first = load(None, host)
    trust(first, host)
    write(host, FILE, ASKS + "#")
    second = load(None, host)
    trust(second, host)
    assert untrust(said, host) is True
    assert [is_trusted(document, host) for document in (first, second, elsewhere)] == [False, False, True]
    assert untrust(said, host) is False


def test_untrust_works_where_the_file_is_gone_or_has_become_a_link(tmp_path: Path) -> None:
    host = machine(tmp_path, {FILE: ASKS})
    said = []
    for become in (None, "elsewhere"):
        write(host, FILE, ASKS)
        trust(load(None, host), host)
        (tmp_path / FILE[1:]).unlink()
        if become:
            (tmp_path / FILE[1:]).symlink_to(become)
        said.append(untrust(FILE, host))
    assert said == [True, True]


# --- what changed -------------------------------------------------------------------------------------------------


def test_changes_are_shown_as_grants_against_the_last_state_that_was_trusted(tmp_path: Path) -> None:
    host = machine(tmp_path, {FILE: "env.pass = ['A', 'B']"})
    first = load(None, host)
    assert changes(first, host) == Changes((Grant("env.pass", '"A"'), Grant("env.pass", '"B"')), ())
    trust(first, host)
    assert changes(first, host) == Changes((), ())
    write(host, FILE, "env.pass = ['B', 'C']")
    second = load(None, host)
    assert changes(second, host) == Changes((Grant("env.pass", '"C"'),), (Grant("env.pass", '"A"'),))
    trust(second, host)
    write(host, FILE, "env.pass = ['B', 'C']\n# words")
    assert changes(load(None, host), host) == Changes((), ())
    write(host, FILE, "")
    assert changes(load(None, host), host) == Changes((), (Grant("env.pass", '"B"'), Grant("env.pass", '"C"')))


# --- records nobody can forge or break ------------------------------------------------------------------------------


def _text(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def act(record: Path) -> None:
        data = json.loads(record.read_text())
        changed = change(data)
        record.write_text(json.dumps(data if changed is None else changed))

    return act


def _replaced(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def act(record: Path) -> None:
        record.rename(record.with_name("kept"))
        make(record)

    return act


_FAULTS: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda record: os.truncate(record, 40),
    "empty": lambda record: os.truncate(record, 0),
    "huge": lambda record: os.truncate(record, 1 << 30),
    "no JSON": lambda record: record.write_bytes(b"\xff\x00{"),
    "nested": lambda record: record.write_text("[" * 100_000),
    "a number of many digits": lambda record: record.write_text("9" * 10_000),
    "another type": _text(lambda data: [data]),
    "null": lambda record: record.write_text("null"),
    "of the future": _text(lambda data: data.update(schema=999)),
    "a schema that is no number": _text(lambda data: data.update(schema=True)),
    "without a key": _text(lambda data: data.pop("when") and None),
    "with a key too many": _text(lambda data: data.update(x=1)),
    "of another file": _text(lambda data: data.update(path=FILE + "x")),
    "of another digest": _text(lambda data: data.update(sha256="0" * 64)),
    "grants of another shape": _text(lambda data: data.update(grants=[["a"]])),
    "grants that are no text": _text(lambda data: data.update(grants=[["a", 1]])),
    "a link": _replaced(lambda record: record.symlink_to("kept")),
    "a link to nothing": _replaced(lambda record: record.symlink_to("nowhere")),
    "a link to itself": _replaced(lambda record: record.symlink_to(record.name)),
    "a directory": _replaced(lambda record: record.mkdir()),
    "a FIFO": _replaced(lambda record: os.mkfifo(record)),
    "writable by the group": lambda record: record.chmod(0o620),
    "writable by all": lambda record: record.chmod(0o602),
    "in a directory that others write to": lambda record: record.parent.chmod(0o777),
    "in a directory that is a link": lambda record: _replaced(lambda path: path.symlink_to("kept"))(record.parent),
    "in a file": lambda record: _replaced(lambda path: path.write_text(""))(record.parent),
    "gone": lambda record: record.unlink(),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_C_22_a_record_that_is_odd_is_no_record_and_no_crash(tmp_path: Path, fault: str) -> None:
    host = machine(tmp_path, {FILE: ASKS})
    document = load(None, host)
    record = tmp_path / RECORDS[1:] / f"{trust(document, host)}.json"
    assert is_trusted(document, host)
    _FAULTS[fault](record)
    assert not is_trusted(document, host)
    assert refusal(document, host).hint == "devns trust"
    assert changes(document, host).added == grants(document) or fault == "of another digest"
    untrust(PROJECT, host)


def test_C_22_a_record_of_another_user_is_no_record(tmp_path: Path) -> None:
    host = machine(tmp_path, {FILE: ASKS})
    document = load(None, host)
    record = tmp_path / RECORDS[1:] / f"{trust(document, host)}.json"
    assert not is_trusted(document, replace(host, uid=host.uid + 1))
    if os.getuid() == 0:
        os.chown(record, 4711, 4711)
        assert not is_trusted(document, host)


@pytest.mark.parametrize("fault", ["a link", "a link to nothing", "truncated", "a FIFO", "writable by all"])
def test_C_22_trusting_again_replaces_an_odd_record(tmp_path: Path, fault: str) -> None:
    host = machine(tmp_path, {FILE: ASKS})
    document = load(None, host)
    record = tmp_path / RECORDS[1:] / f"{trust(document, host)}.json"
    _FAULTS[fault](record)
    trust(document, host)
    assert is_trusted(document, host)
    assert not record.is_symlink()


@pytest.mark.parametrize(
    "fault", ["a directory", "in a file", "in a directory that is a link", "in a directory that others write to"]
)
def test_C_22_where_no_record_can_be_kept_safely_trust_says_so(tmp_path: Path, fault: str) -> None:
    host = machine(tmp_path, {FILE: ASKS})
    document = load(None, host)
    record = tmp_path / RECORDS[1:] / f"{trust(document, host)}.json"
    _FAULTS[fault](record)
    with pytest.raises(Unsupported, match=f"^{RECORDS}: "):
        trust(document, host)
    assert not is_trusted(document, host)
    assert [path.name for path in tmp_path.rglob(".*.json*")] == []


def test_a_crash_before_the_rename_leaves_no_record_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    host = machine(tmp_path, {FILE: ASKS})
    document = load(None, host)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        trust(document, host)
    assert list((tmp_path / RECORDS[1:]).iterdir()) == []
    assert not is_trusted(document, host)


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=80))
def test_C_22_any_bytes_in_a_record_are_no_record(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    host = machine(tmp_path_factory.getbasetemp() / "any-record", {FILE: ASKS})
    document = load(None, host)
    record = Path(host.root + RECORDS) / f"{trust(document, host)}.json"
    record.write_bytes(data)
    assert not is_trusted(document, host)
