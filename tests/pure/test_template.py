"""template: which file is found, what is refused unread, and how files merge."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devns import template
from devns.errors import TemplateError
from devns.host import Host
from devns.template import Document, Listed, SourceFile, find_project, list_templates, load, parse

HOME = "/home/dev"
PROJECT = f"{HOME}/p"
USERS = f"{HOME}/.config/devns/templates"
BUNDLED = Path(__file__).parents[2] / "templates"


@dataclass(frozen=True)
class Mount:
    project: str = "rw"
    bind: tuple[Mapping[str, str], ...] = field(default=(), metadata={"merge": "add"})


def machine(root: Path, files: Mapping[str, str | bytes] | None = None, *, cwd: str = PROJECT) -> Host:
    """A host of these files, all of them the caller's own."""
    for path, text in {f"{PROJECT}/keep": "", **(files or {})}.items():
        place = root / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text if isinstance(text, bytes) else text.encode())
        place.chmod(0o644)
    for directory, _, _ in os.walk(root):
        os.chmod(directory, 0o755)
    return Host.make(
        root=str(root),
        uid=os.getuid(),
        gid=os.getgid(),
        environ={"HOME": HOME},
        cwd=cwd,
        machine="x86_64",
        release="6.1.0",
    )


def strangers(host: Host, *paths: str) -> Host:
    """The same machine, on which `paths` belong to another user."""
    if os.getuid() == 0:
        for path in paths:
            os.chown(host.root + path, 4711, 4711)
    return replace(host, uid=os.getuid() + 1)


def refusal(name: str | None, host: Host) -> TemplateError:
    with pytest.raises(TemplateError) as caught:
        load(name, host)
    return caught.value


# --- finding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "cwd", "found"),
    [
        ({f"{PROJECT}/.devns.toml": ""}, PROJECT, PROJECT),
        ({f"{PROJECT}/.devns.toml": "", f"{PROJECT}/a/b/c": ""}, f"{PROJECT}/a/b", PROJECT),
        ({f"{PROJECT}/.devns.toml": "", f"{PROJECT}/a/.devns.toml": ""}, f"{PROJECT}/a", f"{PROJECT}/a"),
        ({f"{PROJECT}/.devns.toml": "", f"{PROJECT}/.git/HEAD": ""}, PROJECT, PROJECT),
        ({f"{PROJECT}/.devns.toml": "", f"{PROJECT}/a/.git/HEAD": ""}, f"{PROJECT}/a", None),
        ({f"{PROJECT}/.devns.toml": "", f"{PROJECT}/a/.git": "gitdir: x"}, f"{PROJECT}/a", None),
        ({f"{HOME}/.devns.toml": ""}, PROJECT, None),
        ({f"{HOME}/.devns.toml": ""}, HOME, HOME),
        ({"/home/.devns.toml": ""}, HOME, None),
        ({"/home/.devns.toml": ""}, PROJECT, None),
        ({"/.devns.toml": "", "/srv/a": ""}, "/srv", None),
        ({"/srv/.devns.toml": "", "/srv/a/b": ""}, "/srv/a", "/srv"),
        ({}, PROJECT, None),
        ({}, "/nowhere/at/all", None),
    ],
)
def test_C_04_the_way_up_ends_at_the_repository_the_home_and_the_root(
    tmp_path: Path, files: dict[str, str], cwd: str, found: str | None
) -> None:
    assert find_project(machine(tmp_path, files, cwd=cwd)) == found


def test_C_04_the_way_up_ends_at_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = machine(tmp_path, {f"{PROJECT}/.devns.toml": "", f"{PROJECT}/mnt/a": ""}, cwd=f"{PROJECT}/mnt")

    def lstat(host: Host, path: str) -> os.stat_result | None:
        status = real(host, path)
        device = 99 if path == f"{PROJECT}/mnt" else 1
        return status and os.stat_result((*status[:2], device, *status[3:]))

    assert find_project(host) == PROJECT
    real = template._lstat
    monkeypatch.setattr(template, "_lstat", lstat)
    assert find_project(host) is None


def test_a_project_reached_through_a_link_is_the_same_project(tmp_path: Path) -> None:
    host = machine(tmp_path, {f"{PROJECT}/.devns.toml": ""})
    (tmp_path / "home/dev/link").symlink_to("p")
    assert load(None, replace(host, cwd=f"{HOME}/link")) == load(None, host)


def test_without_a_project_the_error_says_where_it_looked(tmp_path: Path) -> None:
    problem = refusal(None, machine(tmp_path))
    assert problem.message == f"{PROJECT}: no .devns.toml here or above, up to the repository's root"
    assert problem.hint == "devns init writes one; devns template list shows what can be named instead"
    assert problem.exit_code == 78


@pytest.mark.parametrize(
    ("project", "name"),
    [
        ("/srv/My Project_1.0", "my-project-1-0"),
        ("/srv/---", "project"),
        ("/srv/ü", "project"),
        ("/srv/" + "a" * 99, "a" * 40),
    ],
)
def test_the_environment_of_a_project_has_its_name_and_a_hash_of_its_place(
    tmp_path: Path, project: str, name: str
) -> None:
    host = machine(tmp_path, {f"{project}/.devns.toml": ""}, cwd=project)
    assert load(None, host).name == f"{name}-{hashlib.sha256(project.encode()).hexdigest()[:8]}"


# --- refusing -----------------------------------------------------------------------------------------------------


def test_C_03_a_link_to_a_secret_is_refused_and_nothing_of_it_is_said(tmp_path: Path) -> None:
    host = machine(tmp_path, {f"{HOME}/.ssh/id": "SECRET = [not toml"})
    (tmp_path / f"{PROJECT[1:]}/.devns.toml").symlink_to("../.ssh/id")
    problem = refusal(None, host)
    assert problem.message == f"{PROJECT}/.devns.toml: is a symbolic link: not followed"


def _fifo(path: Path) -> None:
    os.mkfifo(path, 0o644)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # an address is 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _sparse(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 10 << 30)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_fifo, "must be a regular file, not a FIFO"),
        (lambda path: path.mkdir(), "must be a regular file, not a directory"),
        (_socket, "cannot be read: no such device or address"),
        (_sparse, "larger than 256 KiB"),
        (lambda path: path.symlink_to("nowhere"), "is a symbolic link: not followed"),
        (lambda path: path.symlink_to(path.name), "is a symbolic link: not followed"),
        (lambda path: path.write_bytes(b"#" * (256 << 10)), None),
        (lambda path: path.write_bytes(b"#" * (256 << 10) + b"#"), "larger than 256 KiB"),
    ],
)
def test_C_03_only_a_regular_file_of_bounded_size_is_read(
    tmp_path: Path, make: Callable[[Path], Any], message: str | None
) -> None:
    host = machine(tmp_path)
    umask = os.umask(0o022)
    try:
        make(tmp_path / f"{PROJECT[1:]}/.devns.toml")
    finally:
        os.umask(umask)
    if message is None:
        assert load(None, host).data == {}
    else:
        assert refusal(None, host).message == f"{PROJECT}/.devns.toml: {message}"


def test_C_03_the_bytes_that_are_kept_are_those_that_were_parsed(tmp_path: Path) -> None:
    host = machine(tmp_path, {f"{PROJECT}/.devns.toml": 'description = "a"'})
    document = load(None, host)
    (tmp_path / f"{PROJECT[1:]}/.devns.toml").write_text("broken")
    assert [parse(file.data, file.path) for file in document.files] == [document.data]


@pytest.mark.parametrize("path", [f"{PROJECT}/.devns.toml", PROJECT])
def test_C_04_what_belongs_to_another_user_is_not_read(tmp_path: Path, path: str) -> None:
    host = strangers(machine(tmp_path, {f"{PROJECT}/.devns.toml": "broken"}), path)
    problem = refusal(None, host)
    assert problem.message.endswith("not read")
    assert "belongs to another user (uid " in problem.message
    assert problem.message.startswith(PROJECT)


@pytest.mark.parametrize(
    ("path", "mode", "group", "refused"),
    [
        (f"{PROJECT}/.devns.toml", 0o646, "own", True),
        (f"{PROJECT}/.devns.toml", 0o664, "own", False),
        (f"{PROJECT}/.devns.toml", 0o664, "other", True),
        (PROJECT, 0o757, "own", True),
        (PROJECT, 0o1777, "own", True),
        (PROJECT, 0o775, "own", False),
        (PROJECT, 0o775, "other", True),
        (PROJECT, 0o755, "other", False),
    ],
)
def test_C_04_what_others_can_change_is_not_read(
    tmp_path: Path, path: str, mode: int, group: str, refused: bool
) -> None:
    host = machine(tmp_path, {f"{PROJECT}/.devns.toml": ""})
    os.chmod(host.root + path, mode)
    # As root every file is root's, whose groups are its own business: the machine is one of another user then.
    if os.getuid() == 0:
        for owned in (PROJECT, f"{PROJECT}/.devns.toml"):
            os.chown(host.root + owned, 4711, 4711)
        host = replace(host, uid=4711, gid=4711)
    if group == "other":
        host = replace(host, gid=host.gid + 1)
    if refused:
        problem = refusal(None, host)
        assert (problem.message, problem.hint) == (
            f"{path}: can be changed by other users: not read",
            f"chmod go-w {path}",
        )
    else:
        assert load(None, host).data == {}


@pytest.mark.parametrize("path", [f"{USERS}/mine.toml", USERS, f"{HOME}/.config/devns"])
def test_C_21_a_template_of_the_user_that_others_can_change_is_refused(tmp_path: Path, path: str) -> None:
    host = machine(tmp_path, {f"{USERS}/mine.toml": "# mine"})
    assert load("mine", host).data == {}
    os.chmod(host.root + path, 0o777)
    assert refusal("mine", host).message == f"{path}: can be changed by other users: not read"


def test_a_template_of_the_user_may_be_a_link_to_another_directory_of_theirs(tmp_path: Path) -> None:
    host = machine(tmp_path, {f"{HOME}/dotfiles/x.toml": 'description = "x"', f"{USERS}/keep": ""})
    (tmp_path / f"{USERS[1:]}/mine.toml").symlink_to("../../../dotfiles/x.toml")
    assert load("mine", host).data == {"description": "x"}


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "/etc/passwd", "-x", ".x", "CON", "A", "\uff41", "é", "a/b", "a\\b", "a b", "a\0b"),
        *("a\n", "x" * 64, "x" * 300, "$(id)", "debian12.toml/..", "\x1b[31m", "\udcff"),
    ],
)
def test_C_17_a_name_outside_the_grammar_is_no_template(tmp_path: Path, name: str) -> None:
    host = machine(tmp_path, {f"{USERS}/debian12.toml/x": ""})
    problem = refusal(name, host)
    assert problem.message.endswith(": no such template")
    assert problem.message.isprintable()


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(max_size=70))
def test_C_17_any_name_is_a_template_of_the_grammar_or_an_error(name: str) -> None:
    host = Host.make(root="/", uid=1, gid=1, environ={"HOME": "/nowhere"}, machine="x86_64", release="6.1")
    try:
        load(name, host)
    except TemplateError:
        return
    assert (BUNDLED / f"{name}.toml").is_file()


_NEST = 17
_BOMBS = {
    "dots": ("a." * _NEST + "a = 1", "a key with more than 16 dots"),
    "40 KiB of dots": ("a." * 20_000 + "a = 1", "a key with more than 16 dots"),
    "quoted dots": ('"a".' * _NEST + "a = 1", "a key with more than 16 dots"),
    "a header of dots": ("[" + "a." * _NEST + "a]", "a key with more than 16 dots"),
    "dots in an inline table": ("a = { " + "a." * _NEST + "a = 1 }", "a key with more than 16 dots"),
    "brackets": ("a = " + "[" * _NEST + "]" * _NEST, "brackets more than 16 deep"),
    "5000 brackets": ("[" * 5000, "brackets more than 16 deep"),
    "braces": ("a = " + "{a=" * _NEST + "1" + "}" * _NEST, "brackets more than 16 deep"),
    "brackets after a string of quotes": ('a = ["""x"""", ' + "[" * _NEST + ', "y"]', "brackets more than 16 deep"),
    "brackets after a literal string": ("a = ['''x'''', " + "[" * _NEST + ", 'y']", "brackets more than 16 deep"),
    "brackets after an escaped quote": (r'a = ["\"", ' + "[" * _NEST, "brackets more than 16 deep"),
    "lines": ("\n" * 10_001, "more than 10000 lines"),
    "digits": ("a = " + "9" * 5000, "a number or bare key of more than 256 characters"),
    "hexadecimal digits": ("a = 0x" + "f" * 5000, "a number or bare key of more than 256 characters"),
    "a bare key": ("a" * 257 + " = 1", "a number or bare key of more than 256 characters"),
    "a quoted key": ('"' + " " * 257 + '" = 1', "a key of more than 256 characters"),
    "tables in tables": ("a = " + "{a.a.a.a=" * 10 + "1" + "}" * 10, "tables more than 16 deep"),
    "lists in lists": ("[a.a.a.a]\na = " + "[" * 16 + "]" * 16, "tables more than 16 deep"),
    "keys on one line": ("a = {" + ",".join(f"{i:x}=1" for i in range(25_000)) + "}", "more than 20000 values"),
    "values on one line": ("a = [" + "1," * 60_000 + "]", "more than 20000 values"),
}


@pytest.mark.parametrize("bomb", _BOMBS)
def test_C_02_what_would_take_a_parser_long_is_refused(tmp_path: Path, bomb: str) -> None:
    text, message = _BOMBS[bomb]
    host = machine(tmp_path, {f"{PROJECT}/.devns.toml": text})
    assert refusal(None, host).message == f"{PROJECT}/.devns.toml: {message}"


@pytest.mark.parametrize(
    "text",
    [
        "a." * 14 + "a = 1",
        'a = "' + "[" * 500 + "." * 500 + '"',
        "a = '''\n" + "[.\n" * 500 + "'''",
        'a = """\n' + '[.\\"\n' * 500 + '"""',
        "# " + "[." * 500,
        "a = [" + "[1.5], " * 500 + "]",
        'a = """"x"""""\nb = "["',
    ],
)
def test_C_02_what_stands_in_strings_and_comments_does_not_count(text: str) -> None:
    assert isinstance(parse(text.encode(), "t"), dict)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a = 1\nb = ", "t:2: not valid TOML: invalid value"),
        (b"[a]\n[b]\n[a]\n", "t:3: not valid TOML: cannot declare ('a',) twice"),
        (b"a = 1\na = 2\n", "t:2: not valid TOML: cannot overwrite a value"),
        (b"a = 1\n\n\xff", "t:3: is not UTF-8"),
        (b"a = 2024-13-01", "t:1: not valid TOML: expected newline or end of document after a statement"),
        (b"\x1b]52;c;eA==\x07", "t:1: not valid TOML: invalid statement"),
        (b'a = "\x1b"', r"t:1: not valid TOML: illegal character '\x1b'"),
        (b"['\xe2\x80\xae']\n['\xe2\x80\xae']", r"t:2: not valid TOML: cannot declare ('\u202e',) twice"),
        (b"\xef\xbb\xbfa = 1", "t:1: not valid TOML: invalid statement"),
    ],
)
def test_C_01_broken_toml_is_one_sentence_with_its_line(data: bytes, message: str) -> None:
    with pytest.raises(TemplateError) as caught:
        parse(data, "t")
    assert caught.value.message == message


# --- merging ------------------------------------------------------------------------------------------------------


def test_a_document_says_what_was_merged_and_who_said_it(tmp_path: Path) -> None:
    project = 'extends = "./tools/base.toml"\n[root]\npackages = ["b", "a"]\n[env]\nset.B = "project"\n'
    base = 'extends = "mine"\ndescription = "base"\n[root]\nfrom = "debian:sid"\npackages = ["b", "c", "c"]\n'
    mine = '[env]\nset = { A = "mine", B = "mine" }\n[mount]\nproject = "ro"\nbind = [{ src = "/x" }]\n'
    host = machine(
        tmp_path,
        {f"{PROJECT}/.devns.toml": project, f"{PROJECT}/tools/base.toml": base, f"{USERS}/mine.toml": mine},
    )
    top, middle, bottom = f"{PROJECT}/.devns.toml", f"{PROJECT}/tools/base.toml", f"{USERS}/mine.toml"
    assert load(None, host, claims={"mount": Mount}) == Document(
        name=f"p-{hashlib.sha256(PROJECT.encode()).hexdigest()[:8]}",
        template=top,
        project=PROJECT,
        data={
            "env": {"set": {"A": "mine", "B": "project"}},
            "mount": {"project": "ro", "bind": [{"src": "/x"}]},
            "description": "base",
            "root": {"from": "debian:sid", "packages": ["b", "c", "a"]},
        },
        origin={
            "env": top,
            "env.set": top,
            "env.set.A": bottom,
            "env.set.B": top,
            "mount": bottom,
            "mount.project": bottom,
            "mount.bind": bottom,
            "mount.bind[0]": bottom,
            "description": middle,
            "root": top,
            "root.from": middle,
            "root.packages": top,
            "root.packages[0]": middle,
            "root.packages[1]": middle,
            "root.packages[2]": top,
        },
        files=(
            SourceFile(top, project.encode(), "project"),
            SourceFile(middle, base.encode(), "project"),
            SourceFile(bottom, mine.encode(), "user"),
        ),
        own={
            "description": "base",
            "root": {"from": "debian:sid", "packages": ["b", "c", "a"]},
            "env": {"set": {"B": "project"}},
        },
        home=HOME,
    )


@pytest.mark.parametrize(
    ("old", "new", "merged"),
    [
        ('root.writable = "keep"', 'root.writable = "no"', {"root": {"writable": "no"}}),
        ('build.run = ["a"]', 'build.run = ["b", "a"]', {"build": {"run": ["a", "b"]}}),
        ("user.uid_map = [[0, 1, 1]]", "user.uid_map = [[1, 2, 3]]", {"user": {"uid_map": [[1, 2, 3]]}}),
        ("namespaces.uts.hostname = 'a'", "namespaces.uts = false", {"namespaces": {"uts": False}}),
        ("namespaces.uts = false", "namespaces.uts.hostname = 'a'", {"namespaces": {"uts": {"hostname": "a"}}}),
        (
            "mount.bind = [{ src = '/a', dst = '/b' }]",
            "mount.bind = [{ dst = '/b', src = '/a' }, { src = '/a' }]",
            {"mount": {"bind": [{"src": "/a", "dst": "/b"}, {"src": "/a"}]}},
        ),
        ("other.list = [1]", "other.list = [2]", {"other": {"list": [2]}}),
        ("root.packages = 1", "root.packages = ['a']", {"root": {"packages": ["a"]}}),
        ("root.packages = ['a']", "root = 1", {"root": 1}),
    ],
)
def test_later_wins_tables_merge_and_lists_add_where_their_table_says_so(
    tmp_path: Path, old: str, new: str, merged: dict[str, Any]
) -> None:
    host = machine(tmp_path, {f"{PROJECT}/.devns.toml": f"extends = 'old'\n{new}", f"{USERS}/old.toml": old})
    assert load(None, host, claims={"mount": Mount}).data == merged


def test_a_users_template_hides_the_bundled_one_and_may_extend_it(tmp_path: Path) -> None:
    host = machine(tmp_path, {f"{USERS}/debian12.toml": 'extends = "debian12"\n[env]\nset.A = "1"'})
    document = load("debian12", host)
    assert [file.kind for file in document.files] == ["user", "bundled"]
    assert document.data["root"]["from"] == "debian:bookworm"
    assert document.data["env"] == {"set": {"A": "1"}}


def test_a_named_template_has_no_project_and_nothing_of_its_own(tmp_path: Path) -> None:
    document = load("host", machine(tmp_path, {f"{PROJECT}/.devns.toml": "description = 'p'"}))
    assert (document.name, document.template, document.project, document.own) == ("host", "host", None, {})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {
                f"{PROJECT}/.devns.toml": 'extends = "a"',
                f"{USERS}/a.toml": "extends = 'b'",
                f"{USERS}/b.toml": "extends = 'a'",
            },
            f"{USERS}/b.toml: extends: goes in a circle: {PROJECT}/.devns.toml -> a -> b -> a",
        ),
        (
            {f"{PROJECT}/.devns.toml": 'extends = "./.devns.toml"'},
            f"{PROJECT}/.devns.toml: extends: goes in a circle: {PROJECT}/.devns.toml -> ./.devns.toml",
        ),
        (
            {f"{PROJECT}/.devns.toml": "extends = './1.toml'"}
            | {f"{PROJECT}/{i}.toml": f"extends = './{i + 1}.toml'" for i in range(1, 1000)},
            f"{PROJECT}/8.toml: extends: more than 8 templates deep: {PROJECT}/.devns.toml -> "
            + " -> ".join(f"./{i}.toml" for i in range(1, 10)),
        ),
    ],
    ids=["circle", "itself", "1000 deep"],
)
def test_C_18_a_circle_and_an_endless_chain_are_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    assert refusal(None, machine(tmp_path, files)).message == message


def test_C_18_eight_deep_is_not_too_deep(tmp_path: Path) -> None:
    files = {f"{PROJECT}/{i}.toml": f"extends = './{i + 1}.toml'" for i in range(1, 8)}
    files |= {f"{PROJECT}/.devns.toml": "extends = './1.toml'", f"{PROJECT}/8.toml": "description = '8'"}
    assert load(None, machine(tmp_path, files)).data == {"description": "8"}


@pytest.mark.parametrize(
    ("extends", "why"),
    [
        ("'../x.toml'", 'not possible: "../x.toml"'),
        ("'./../x.toml'", 'not possible: "./../x.toml"'),
        ("'./a/../../x.toml'", 'not possible: "./a/../../x.toml"'),
        ("'/etc/x.toml'", 'not possible: "/etc/x.toml"'),
        ("'/etc/shadow'", 'not possible: "/etc/shadow"'),
        ("'./secret'", 'not possible: "./secret"'),
        ("'https://example.org/x.toml'", 'not possible: "https://example.org/x.toml"'),
        ("'~/x.toml'", 'not possible: "~/x.toml"'),
        ('"./a\\u0000.toml"', r'not possible: "./a\u0000.toml"'),
        ('"./a\\u001b.toml"', r'not possible: "./a\u001b.toml"'),
        ("'debain12'", "no such template: debain12"),
        ("''", "no such template: "),
        ("1", "must be a string"),
        ("['debian12']", "must be a string"),
        ("true", "must be a string"),
    ],
)
def test_C_18_extends_names_a_template_or_a_file_beneath(tmp_path: Path, extends: str, why: str) -> None:
    host = machine(
        tmp_path, {f"{PROJECT}/.devns.toml": f"extends = {extends}", "/etc/x.toml": "", "/home/dev/x.toml": ""}
    )
    assert refusal(None, host).message == f"{PROJECT}/.devns.toml: extends: {why}"


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("x.toml", "/etc/secret.toml", f"{PROJECT}/x.toml: is a symbolic link: not followed"),
        (
            "dir",
            "../../../etc",
            f"{PROJECT}/dir/secret.toml: is not beneath plain directories: symbolic links on the way are not followed",
        ),
    ],
)
def test_C_18_an_included_file_is_never_reached_through_a_link(
    tmp_path: Path, link: str, target: str, message: str
) -> None:
    said = "./x.toml" if link == "x.toml" else "./dir/secret.toml"
    host = machine(tmp_path, {f"{PROJECT}/.devns.toml": f"extends = '{said}'", "/etc/secret.toml": "SECRET"})
    (tmp_path / f"{PROJECT[1:]}/{link}").symlink_to(target)
    assert refusal(None, host).message == message


def test_a_missing_include_is_an_error_that_names_it(tmp_path: Path) -> None:
    host = machine(tmp_path, {f"{PROJECT}/.devns.toml": "extends = './x.toml'"})
    assert refusal(None, host).message == f"{PROJECT}/x.toml: cannot be read: no such file or directory"


def test_a_name_that_is_nearly_right_is_suggested(tmp_path: Path) -> None:
    host = machine(tmp_path, {f"{USERS}/mine.toml": ""})
    assert refusal("debian-12", host).hint == "did you mean debian12?"
    assert refusal("zzz", host).hint == "there is: debian12, debian13, host, mine, py311, py313"


# --- the templates there are ----------------------------------------------------------------------------------------


def test_templates_are_listed_with_their_first_comment_or_description(tmp_path: Path) -> None:
    host = machine(
        tmp_path,
        {
            f"{USERS}/commented.toml": "# A \x1b[31m comment\ndescription = 'x'\n".replace("\x1b", "\u202e"),
            f"{USERS}/described.toml": "description = 'what it says'",
            f"{USERS}/silent.toml": "[root]",
            f"{USERS}/broken.toml": "x",
            f"{USERS}/host.toml": "# my own",
            f"{USERS}/UPPER.toml": "",
            f"{USERS}/note.txt": "",
        },
    )
    os.mkfifo(tmp_path / f"{USERS[1:]}/fifo.toml", 0o644)
    listed = {entry.name: entry for entry in list_templates(host)}
    users = {entry.name: (entry.description, entry.path) for entry in listed.values() if entry.where == "user"}
    assert users == {
        "commented": (r"A \u202e[31m comment", f"{USERS}/commented.toml"),
        "described": ("what it says", f"{USERS}/described.toml"),
        "silent": ("", f"{USERS}/silent.toml"),
        "broken": (
            f"{USERS}/broken.toml:1: not valid TOML: expected '=' after a key in a key/value pair",
            f"{USERS}/broken.toml",
        ),
        "fifo": (f"{USERS}/fifo.toml: must be a regular file, not a FIFO", f"{USERS}/fifo.toml"),
        "host": ("my own", f"{USERS}/host.toml"),
    }
    assert list(listed) == sorted(listed)
    assert listed["py311"] == Listed(
        "py311", "CPython 3.11 with pip, venv and git on Debian 12", "bundled", str(BUNDLED / "py311.toml")
    )


def test_bundled_templates_open_with_a_comment_and_name_no_machine_path() -> None:
    texts = {path.name: path.read_text() for path in BUNDLED.glob("*.toml")}
    assert sorted(texts) == ["debian12.toml", "debian13.toml", "host.toml", "py311.toml", "py313.toml"]
    assert [name for name, text in texts.items() if not text.startswith("# ") or "/home" in text] == []


@pytest.mark.parametrize("place", ["checkout", "wheel"])
def test_bundled_templates_are_found_in_a_checkout_and_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    directory = tmp_path / ("templates" if place == "checkout" else "devns/templates")
    directory.mkdir(parents=True)
    (directory / "only.toml").write_text("# here")
    monkeypatch.setattr(template, "__file__", str(tmp_path / "devns/template.py"))
    assert [entry.name for entry in list_templates(machine(tmp_path / "root"))] == ["only"]


# --- anything -------------------------------------------------------------------------------------------------------

_WORDS = (
    *("[", "]", "{", "}", "[[", "]]", "=", ".", ",", "\n", '"', '"""', "'", "'''", "\\", "#", "a", "b", "root", "1"),
    *("extends", "0x", "1e9", "inf", "true", "2024-01-01", "12:00:00", "+", "-", "_", " ", "\u202e", "\x00", "\r"),
)
_TOML = st.lists(st.sampled_from(_WORDS)).map("".join)


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=200) | st.text().map(str.encode) | _TOML.map(str.encode))
def test_C_26_any_bytes_parse_or_are_a_template_error(data: bytes) -> None:
    try:
        parsed: dict[str, Any] | str = parse(data, "t")
    except TemplateError as problem:
        parsed = problem.message
    assert isinstance(parsed, dict) or parsed.isprintable()
