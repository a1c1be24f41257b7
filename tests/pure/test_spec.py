"""spec: what a document becomes, and one sentence for everything that cannot be meant."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devns.errors import TemplateError
from devns.host import Host
from devns.spec import Build, Env, Namespaces, Repository, Root, Said, Shell, Spec, Time, User, Uts, make_spec
from devns.template import Document, SourceFile, load, parse

HOME = "/home/dev"
FILE = "/home/dev/p/.devns.toml"


@dataclass(frozen=True)
class Limits:
    memory: int | None = field(default=None, metadata={"unit": "size"})
    enforce: Literal["warn", "fail"] = "warn"


CLAIMS: Mapping[str, type] = {"limits": Limits}


def document(text: str, *, origin: Mapping[str, str] | None = None) -> Document:
    """What `load` makes of a project file with this text."""
    data = parse(text.encode(), FILE)
    files = (SourceFile(FILE, text.encode(), "project"),)
    return Document("p-12345678", FILE, "/home/dev/p", data, origin or {}, files, data, HOME)


def spec(text: str) -> Spec:
    return make_spec(document(text), CLAIMS)


def test_a_full_template_becomes_its_spec() -> None:
    made = spec(
        """
        description = "everything"

        [root]
        from = "debian:bookworm"
        packages = ["g++", "libc6:i386", "python3.11=3.11.2-6+deb12u1", "libstdc++-12-dev"]
        writable = "discard"

        [build]
        run = ["make deps"]
        inputs = ["requirements.txt", "sub/dir/x"]

        [user]
        as = "root"
        uid_map = [[0, 1000, 1], [1, 100000, 65535]]
        gid_map = [[0, 1000, 1]]
        nested = true

        [namespaces]
        ipc = false
        uts = { hostname = "box.example" }
        time = { boottime = "+30d", monotonic = -1 }

        [env]
        set = { APP_ENV = "dev", _X1 = "" }
        pass = ["LANG"]

        [shell]
        program = "/bin/zsh"

        [limits]
        memory = "4G"
        """
    )
    assert made == Spec(
        name="p-12345678",
        template=FILE,
        project="/home/dev/p",
        description="everything",
        root=Root(
            "debian:bookworm", ("g++", "libc6:i386", "python3.11=3.11.2-6+deb12u1", "libstdc++-12-dev"), (), "discard"
        ),
        build=Build(("make deps",), ("requirements.txt", "sub/dir/x")),
        user=User("auto", "root", ((0, 1000, 1), (1, 100000, 65535)), ((0, 1000, 1),), nested=True),
        namespaces=Namespaces(ipc=False, uts=Uts("box.example"), time=Time(30 * 86400, -1)),
        env=Env({"APP_ENV": "dev", "_X1": ""}, ("LANG",)),
        shell=Shell("/bin/zsh"),
        tables={Limits: Limits(4 << 30)},
        said=Said((), (), (2,), {"APP_ENV": "dev", "_X1": ""}),
    )


def test_an_empty_template_is_all_defaults() -> None:
    assert spec("") == Spec(name="p-12345678", template=FILE, project="/home/dev/p")
    assert spec("").table(Limits) == Limits()


def test_a_namespace_is_switched_with_true_and_false() -> None:
    assert spec("namespaces = { uts = false, time = true }").namespaces == Namespaces(uts=False, time=Time())
    assert spec("namespaces.uts = true").namespaces == Namespaces()


@pytest.mark.parametrize(
    ("said", "by", "wanted"),
    [
        ("host", FILE, "host"),
        ("debian:trixie", FILE, "debian:trixie"),
        ("tar:./root.tar.xz", FILE, "tar:/home/dev/p/root.tar.xz"),
        ("dir:../rootfs", FILE, "dir:/home/dev/rootfs"),
        ("dir:rootfs", "/etc/templates/base.toml", "dir:/etc/templates/rootfs"),
        ("dir:~/rootfs", "/etc/templates/base.toml", "dir:/home/dev/rootfs"),
        ("dir:~", FILE, "dir:/home/dev"),
        ("tar:/srv//x.tar", FILE, "tar:/srv/x.tar"),
        ("dir:a:b", FILE, "dir:/home/dev/p/a:b"),
    ],
)
def test_a_path_of_the_root_is_meant_from_the_file_that_says_it(said: str, by: str, wanted: str) -> None:
    made = make_spec(document(f"root.from = '{said}'", origin={"root": FILE, "root.from": by}), {})
    assert made.root.source == wanted


REPOSITORY = f"""
[root]
from = "debian:bookworm"
[[root.repository]]
uri = "https://apt.test/x/"
suite = "stable"
key = "./x.asc"
fingerprint = "{"ABCD EF01 " * 5}"
"""


def test_a_repository_is_written_in_one_way_and_its_key_meant_from_the_file_that_says_it() -> None:
    by = {"root.repository[0]": "/etc/templates/base.toml"}
    wanted = Repository("https://apt.test/x", "stable", "/etc/templates/x.asc", "abcdef01" * 5)
    assert make_spec(document(REPOSITORY, origin=by), {}).root.repositories == (wanted,)
    armor = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nAAAA\n-----END PGP PUBLIC KEY BLOCK-----\n"
    inline = spec(REPOSITORY.replace('"./x.asc"', f"'''\n{armor}'''")).root.repositories
    assert inline == (replace(wanted, key=armor),)


@pytest.mark.parametrize(
    ("said", "instead", "message"),
    [
        ('uri = "https://apt.test/x/"\n', "", "root.repository[0].uri: is required"),
        ('suite = "stable"\n', "", "root.repository[0].suite: is required"),
        ('key = "./x.asc"\n', "", "root.repository[0].key: is required"),
        ("fingerprint", "# ", "root.repository[0].fingerprint: is required"),
        ("ABCD EF01 ABCD", "ABCD", 'root.repository[0].fingerprint: no fingerprint: "ABCD EF01 ABCD EF01 '),
        ("ABCD EF01 ABCD", "GBCD EF01 ABCD", "root.repository[0].fingerprint: no fingerprint: "),
        ("https://", "file://", 'root.repository[0].uri: no URL of a repository: "file://apt.test/x/"'),
        ("https://", "ftp://", "root.repository[0].uri: no URL of a repository: "),
        ("apt.test", "user:secret@apt.test", "root.repository[0].uri: has a user in it"),
        ("/x/", "/../x", "root.repository[0].uri: no URL of a repository: "),
        ("/x/", "/x?y", "root.repository[0].uri: no URL of a repository: "),
        ("/x/", "/x\\nSigned-By: /y", "root.repository[0].uri: no URL of a repository: "),
        ('"stable"', '"./"', "root.repository[0].suite: a flat repository, which has no suites: "),
        ('"stable"', '"a/../../b"', "root.repository[0].suite: no name of a suite: "),
        ('"stable"', '"a b"', "root.repository[0].suite: no name of a suite: "),
        ("suite", "components = []\nsuite", "root.repository[0].components: is empty"),
        ("suite", 'components = ["../x"]\nsuite', 'root.repository[0].components: no name of a component: "../x"'),
        ('"./x.asc"', '"a\\nb"', "root.repository[0].key: must be a path, or begin with "),
        ('"debian:bookworm"', '"host"', 'root.repository[0]: is for a debian: root, not "host"'),
        ("uri", "trusted = true\nuri", "root.repository[0].trusted: no such key"),
    ],
)
def test_C_01_a_repository_that_cannot_be_meant_is_one_sentence(said: str, instead: str, message: str) -> None:
    with pytest.raises(TemplateError) as caught:
        spec(REPOSITORY.replace(said, instead))
    assert caught.value.message.startswith(f"{FILE}: {message}")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["[debian]\nmirror = 'http://evil.test'", "[root]\nmirror = 'http://evil.test'"])
def test_S_24_no_template_names_a_mirror_of_debians(text: str) -> None:
    with pytest.raises(TemplateError, match="no such"):
        spec(text)


def test_a_core_table_cannot_be_claimed_away() -> None:
    assert make_spec(document("root.from = 'host'"), {"root": Limits}).root == Root("host")


@pytest.mark.parametrize(
    "text",
    [
        *(f"env.set.{name} = 'x'" for name in ("A", "_", "a1_", "LD_PRELOAD", "BASH_ENV")),
        *(f"root.packages = ['{name}']" for name in ("gcc", "0ad", "gcc:any", "gcc=1:2~b+c.d-1", "python3.11-dev")),
        *(f"namespaces.uts.hostname = '{name}'" for name in ("a", "a-b", "a.b", "x" * 63, "0")),
        "user = { uid_map = [[0, 4294967294, 1]], gid_map = [[4294967294, 0, 1]] }",
        "user = { uid_map = [[0, 10, 5], [5, 15, 5]], gid_map = [[5, 10, 5], [0, 15, 5]] }",
        "env.set.A = '" + "x" * ((128 << 10) - 4) + "'",
    ],
)
def test_values_at_the_edge_of_their_grammar_are_taken(text: str) -> None:
    assert isinstance(spec(text), Spec)


# --- one sentence each ----------------------------------------------------------------------------------------------

NO_SOURCE = "one of host, debian:SUITE, tar:PATH, dir:PATH"
HOSTNAME = "letters, digits and hyphens, in parts joined by dots"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("rot = {}", "rot: no such table", "did you mean root?"),
        ("limit.memory = '1G'", "limit: no such table", "did you mean limits?"),
        ("packages = ['git']", "packages: no such key", "packages belongs in [root]"),
        ("zzz = 1", "zzz: no such key", "there is: build, env, limits, namespaces, root, shell, user"),
        ("root.pakages = ['git']", "root.pakages: no such key", "did you mean packages?"),
        ("root = 'host'", 'root: must be a table, not "host"', None),
        ("description = 1", "description: must be a string, not 1", None),
        ("description = 2024-01-01", "description: must be a string, not a date", None),
        ("user.nested = 1", "user.nested: must be true or false, not 1", None),
        ("user.uid_map = [[0, true, 1]]", "user.uid_map[0][1]: must be a whole number, not true", None),
        ("user.map = 'rnage'", 'user.map: must be "auto", "single" or "range", not "rnage"', "did you mean range?"),
        ("limits.memory = '4X'", 'limits.memory: must be a size such as "512M" or "4G", not "4X"', None),
        ("root.from = 'oci:x/y'", "root.from: oci: is not there yet", NO_SOURCE),
        ("root.from = 'ubuntu'", 'root.from: no such source: "ubuntu"', NO_SOURCE),
        ("root.from = 'debian'", 'root.from: no such source: "debian"', NO_SOURCE),
        ("root.from = 'host:'", 'root.from: no such source: "host:"', NO_SOURCE),
        ("root.from = ''", 'root.from: no such source: ""', NO_SOURCE),
        ("root.from = 'debian:../x'", 'root.from: no name of a suite: "../x"', '"debian:bookworm"'),
        ("root.from = 'debian:'", 'root.from: no name of a suite: ""', '"debian:bookworm"'),
        ("root.from = 'dir:'", 'root.from: no path: ""', '"dir:./path", "dir:~/path" or "dir:/path"'),
        ("root.from = 'tar:~root/x'", 'root.from: no path: "~root/x"', '"tar:./path", "tar:~/path" or "tar:/path"'),
        ('root.from = "dir:a\\u0000"', "root.from: contains a NUL character", None),
        ("root.packages = ['git', '-y']", 'root.packages[1]: no name of a package: "-y"', None),
        ("root.packages = ['Git']", 'root.packages[0]: no name of a package: "Git"', None),
        ("root.packages = ['./x.deb']", 'root.packages[0]: no name of a package: "./x.deb"', None),
        ('root.packages = ["git\\n"]', r'root.packages[0]: no name of a package: "git\n"', None),
        ("root.packages = ['a b']", 'root.packages[0]: no name of a package: "a b"', None),
        ("build.inputs = ['../x']", 'build.inputs[0]: must be a path beneath the project, not "../x"', None),
        ("build.inputs = ['/x']", 'build.inputs[0]: must be a path beneath the project, not "/x"', None),
        ("build.run = [' ']", "build.run[0]: is empty", None),
        ("user.uid_map = [[0, 1, 1]]", "user.gid_map: is required where there is a uid_map", None),
        ("user.gid_map = [[0, 1, 1]]", "user.uid_map: is required where there is a gid_map", None),
        ("user.uid_map = [[0, 1]]", "user.uid_map[0]: must be a list of 3, not a list", None),
        ("env.set.A = 1", "env.set.A: must be a string, not 1", None),
        ("env.set.'A-B' = 'x'", 'env.set.A-B: no name of a variable: "A-B"', None),
        ("env.set.'' = 'x'", 'env.set."": no name of a variable: ""', None),
        ("env.set.1A = 'x'", 'env.set.1A: no name of a variable: "1A"', None),
        ("env.set.'A=B' = 'x'", 'env.set."A=B": no name of a variable: "A=B"', None),
        ('env.set."A\\n" = "x"', r'env.set."A\n": no name of a variable: "A\n"', None),
        ('env.set.A = "\\u0000"', "env.set.A: contains a NUL character", None),
        ("env.pass = ['A', 'LC_*']", 'env.pass[1]: no name of a variable: "LC_*"', None),
        ("shell.program = ''", 'shell.program: must be "auto", a name or an absolute path, not ""', None),
        ("shell.program = './x'", 'shell.program: must be "auto", a name or an absolute path, not "./x"', None),
    ],
)
def test_C_01_what_cannot_be_meant_is_one_sentence(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(TemplateError) as caught:
        spec(text)
    assert (caught.value.message, caught.value.hint) == (f"{FILE}: {message}", hint)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "-a", "a-", "a_b", "a..b", "a.", ".a", "a b", "a\n", "a\n127.0.0.1 evil", "é", "x" * 64),
        *("a." * 32 + "a", "a;b", "$(id)", "a/b", "a\\", "[::1]", "\x1b[31m", "\u202e", "\uff41", "a:b", "a@b", "%h"),
        *("a,b", "*", "~", "a'b", 'a"b'),
    ],
)
def test_C_19_a_hostname_outside_rfc_1123_is_refused(name: str) -> None:
    data = {"namespaces": {"uts": {"hostname": name}}}
    with pytest.raises(TemplateError) as caught:
        make_spec(Document("p", FILE, None, data, {}, document("").files, data, HOME), {})
    assert caught.value.message.startswith(f"{FILE}: namespaces.uts.hostname: no host name: ")
    assert (caught.value.hint, caught.value.message.isprintable()) == (HOSTNAME, True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[[-1, 0, 1]]", "[0]: no range of ids: [-1, 0, 1]"),
        ("[[0, -1, 1]]", "[0]: no range of ids: [0, -1, 1]"),
        ("[[0, 0, 0]]", "[0]: no range of ids: [0, 0, 0]"),
        ("[[0, 4294967295, 1]]", "[0]: no range of ids: [0, 4294967295, 1]"),
        ("[[4294967295, 0, 1]]", "[0]: no range of ids: [4294967295, 0, 1]"),
        ("[[0, 1, 4294967295]]", "[0]: no range of ids: [0, 1, 4294967295]"),
        ("[[0, 0, 10], [9, 100, 1]]", ": rows 0 and 1 overlap inside, at id 9"),
        ("[[5, 100, 5], [0, 104, 5]]", ": rows 0 and 1 overlap outside, at id 104"),
        ("[[0, 0, 1], [1, 1, 1], [0, 2, 1]]", ": rows 0 and 2 overlap inside, at id 0"),
        (str([[i, i, 1] for i in range(341)]), ": more than 340 rows"),
    ],
)
@pytest.mark.parametrize("kind", ["uid_map", "gid_map"])
def test_a_map_has_ids_that_exist_and_rows_apart(kind: str, rows: str, message: str) -> None:
    good = "[[0, 0, 1]]"
    maps = {"uid_map": good, "gid_map": good, kind: rows}
    with pytest.raises(TemplateError) as caught:
        spec("".join(f"user.{name} = {value}\n" for name, value in maps.items()))
    assert caught.value.message == f"{FILE}: user.{kind}{message}"


@pytest.mark.parametrize("said", ["self", "postgres", "Debian-exim", "_apt", "102", "102:104", "www-data:adm", "0:a.b"])
def test_somebody_can_be_named_or_numbered(said: str) -> None:
    assert spec(f'user.as = "{said}"').user == User(identity=said)


@pytest.mark.parametrize(
    "said", ["", ":", "a:", ":1", "1:2:3", "a b", "-x", "a/b", "a\u00e9", "4294967295", "1" * 11, "x" * 33]
)
def test_what_can_be_nobody_is_refused(said: str) -> None:
    with pytest.raises(TemplateError) as caught:
        spec(f'user.as = "{said}"')
    assert caught.value.message == f'{FILE}: user.as: no user: "{said}"'


def test_a_variable_longer_than_the_kernel_takes_is_refused() -> None:
    with pytest.raises(TemplateError) as caught:
        spec("env.set.A = '" + "x" * ((128 << 10) - 2) + "'")
    assert caught.value.message == f"{FILE}: env.set.A: longer than 128 KiB, which no program can be given"


@pytest.mark.parametrize("key", ["settings.trust", "trust", "yes", "ci", "plugins", "trusted_paths", "hooks"])
def test_C_06_no_key_of_a_project_file_gives_trust_or_names_a_plugin(key: str) -> None:
    with pytest.raises(TemplateError, match=r": no such (key|table)$"):
        spec(f"{key} = true")


# --- from files to a Spec -------------------------------------------------------------------------------------------


def machine(root: Path, files: Mapping[str, str | Callable[[Path], Any]]) -> Host:
    for path, content in {FILE: "", **files}.items():
        place = root / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            place.write_text(content)
            place.chmod(0o644)
        else:
            content(place)
    for directory, _, _ in os.walk(root):
        os.chmod(directory, 0o755)
    return Host.make(
        root=str(root),
        uid=os.getuid(),
        gid=os.getgid(),
        environ={"HOME": HOME},
        cwd="/home/dev/p",
        machine="x86_64",
        release="6.1.0",
    )


MINE = "/home/dev/.config/devns/templates/mine.toml"
BASE = "/home/dev/p/base.toml"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({FILE: "a ="}, f"{FILE}:1: not valid TOML: invalid value"),
        ({FILE: "[root]\n[root]"}, f"{FILE}:2: not valid TOML: cannot declare ('root',) twice"),
        ({FILE: "root.pakages = []"}, f"{FILE}: root.pakages: no such key"),
        ({FILE: "root.writable = 'yes'"}, f'{FILE}: root.writable: must be "keep", "discard" or "no", not "yes"'),
        ({FILE: "limits.enforce = true"}, f'{FILE}: limits.enforce: must be "warn" or "fail", not true'),
        ({FILE: "extends = 'mine'"}, f"{FILE}: extends: no such template: mine"),
        ({FILE: "extends = '../x'"}, f'{FILE}: extends: not possible: "../x"'),
        ({FILE: "extends = './base.toml'"}, f"{BASE}: cannot be read: no such file or directory"),
        (
            {FILE: "extends = './base.toml'", BASE: "extends = './.devns.toml'"},
            f"{BASE}: extends: goes in a circle: {FILE} -> ./base.toml -> ./.devns.toml",
        ),
        (
            {FILE: "extends = 'mine'", MINE: "user.map = 1"},
            f'{MINE}: user.map: must be "auto", "single" or "range", not 1',
        ),
        (
            {FILE: "extends = 'mine'\nroot.packages = ['b']", MINE: "root.packages = ['A']"},
            f'{MINE}: root.packages[0]: no name of a package: "A"',
        ),
        (
            {FILE: "extends = 'mine'\nroot.packages = ['B']", MINE: "root.packages = ['aa']"},
            f'{FILE}: root.packages[1]: no name of a package: "B"',
        ),
        ({FILE: "user.uid_map = [[0, 1, 1]]"}, f"{FILE}: user.gid_map: is required where there is a uid_map"),
        ({FILE: "namespaces.uts.hostname = 'a_b'"}, f'{FILE}: namespaces.uts.hostname: no host name: "a_b"'),
        ({FILE: "\n" * 20_000}, f"{FILE}: more than 10000 lines"),
        ({FILE: "#" * (300 << 10)}, f"{FILE}: larger than 256 KiB"),
        ({FILE: lambda path: os.mkfifo(path, 0o644)}, f"{FILE}: must be a regular file, not a FIFO"),
        ({FILE: lambda path: path.mkdir()}, f"{FILE}: must be a regular file, not a directory"),
        ({FILE: lambda path: path.symlink_to("/etc/hostname")}, f"{FILE}: is a symbolic link: not followed"),
        ({FILE: lambda path: path.write_bytes(b"\xff")}, f"{FILE}:1: is not UTF-8"),
        ({FILE: "'\\x' = 1"}, rf'{FILE}: "\\x": no such key'),
        ({FILE: '"\\u001b" = 1'}, rf'{FILE}: "\u001b": no such key'),
    ],
)
def test_a_bad_template_is_one_sentence_with_file_and_key(
    tmp_path: Path, files: dict[str, str | Callable[[Path], Any]], message: str
) -> None:
    if FILE in files and callable(files[FILE]):
        (tmp_path / "home/dev/p").mkdir(parents=True)
    umask = os.umask(0o022)
    try:
        host = machine(tmp_path, files)
    finally:
        os.umask(umask)
    with pytest.raises(TemplateError) as caught:
        make_spec(load(None, host, claims=CLAIMS), CLAIMS)
    assert (caught.value.message, caught.value.exit_code) == (message, 78)


@pytest.mark.parametrize(
    ("name", "source", "packages"),
    [
        ("host", "host", ()),
        ("debian12", "debian:bookworm", ("ca-certificates",)),
        ("debian13", "debian:trixie", ("ca-certificates",)),
        (
            "py311",
            "debian:bookworm",
            ("ca-certificates", "python3", "python3-pip", "python3-venv", "python-is-python3", "git"),
        ),
        (
            "py313",
            "debian:trixie",
            ("ca-certificates", "python3", "python3-pip", "python3-venv", "python-is-python3", "git"),
        ),
    ],
)
def test_every_bundled_template_is_a_spec(tmp_path: Path, name: str, source: str, packages: tuple[str, ...]) -> None:
    made = make_spec(load(name, machine(tmp_path, {})), {})
    pip = {"PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_ROOT_USER_ACTION": "ignore"} if name.startswith("py") else {}
    assert made == Spec(
        name=name, template=name, description=made.description, root=Root(source, packages), env=Env(set=pip)
    )


_KEYS = "root from packages user uid_map gid_map env set pass namespaces uts hostname".split()
_VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates() | st.sampled_from(["host", "dir:x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None)  # a busy machine is no failure
@given(st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=4))
def test_C_26_any_data_gives_a_spec_or_a_template_error(data: dict[str, Any]) -> None:
    try:
        made: Spec | str = make_spec(Document("p", FILE, None, data, {}, document("").files, data, HOME), CLAIMS)
    except TemplateError as problem:
        made = f"{problem.message} {problem.hint}"
    assert isinstance(made, Spec) or made.isprintable()


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=100) | st.sampled_from(_KEYS).map(lambda key: f"{key} = ".encode()))
def test_C_26_any_bytes_give_a_document_or_a_template_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    root = tmp_path_factory.getbasetemp() / "any-bytes"
    host = machine(root, {})
    (root / FILE[1:]).write_bytes(data)
    try:
        read: bytes | str = load(None, host).files[0].data
    except TemplateError as problem:
        read = problem.message
    assert read == data or (isinstance(read, str) and read.isprintable())
