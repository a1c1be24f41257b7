"""Host: what is read of a machine, what is made of it, and that reading is all it does."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from devns.errors import Unsupported
from devns.host import Host, _is_safe, refuse_setuid

if TYPE_CHECKING:
    from tests.conftest import MakeHost

NoEffects = Callable[[], contextlib.AbstractContextManager[None]]
ACCOUNTS = "root:x:0:0:root:/root:/bin/bash\nme:x:1000:1000:Me:/srv/me:/bin/sh\nyou:x:1001:1001::/home/you:/bin/sh\n"

# --- the value --------------------------------------------------------------------------------------------------------


def test_a_host_is_these_facts_and_no_others(host: MakeHost, tmp_path: Path) -> None:
    environ = {"HOME": "/home/me", "A": "b"}
    made = host({"/etc/passwd": ACCOUNTS}, groups=(27, 4, 27), environ=environ, cwd="/srv", release="6.1.0-21-amd64")
    assert made == Host(
        root=str(tmp_path),
        uid=1000,
        gid=1000,
        user="me",
        groups=(4, 27),
        home="/home/me",
        cwd="/srv",
        environ=MappingProxyType(environ),
        machine="x86_64",
        release="6.1.0",
    )


def test_a_host_cannot_be_changed(host: MakeHost) -> None:
    made = host()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.uid = 0  # type: ignore[misc]
    with pytest.raises(TypeError):
        made.environ["PATH"] = "."  # type: ignore[index]


def test_a_repr_shows_no_environment(host: MakeHost) -> None:
    assert "token" not in repr(host(environ={"SECRET": "token"}))


def test_probe_tells_of_this_process() -> None:
    here = Host.probe()
    said = (here.root, here.uid, here.gid, here.cwd, here.environ, here.machine)
    assert said == ("/", os.getuid(), os.getgid(), os.getcwd(), dict(os.environ), os.uname().machine)
    assert os.uname().release.startswith(here.release)


def test_probe_takes_another_working_directory() -> None:
    assert Host.probe(cwd="/srv/project") == dataclasses.replace(Host.probe(), cwd="/srv/project")


def test_a_working_directory_that_was_removed_is_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert Host.probe().cwd == "/"


@pytest.mark.parametrize(
    ("release", "short", "kernel"),
    [
        ("6.18.44", "6.18.44", (6, 18)),
        ("6.1.0-21-amd64", "6.1.0", (6, 1)),
        ("5.15.167.4-microsoft-standard-WSL2", "5.15.167.4", (5, 15)),
        ("7.0-rc1", "7.0", (7, 0)),
        ("6.12.0+", "6.12.0", (6, 12)),
        ("odd", "", (0, 0)),
    ],
)
def test_a_release_is_its_numbers(host: MakeHost, release: str, short: str, kernel: tuple[int, int]) -> None:
    made = host(release=release)
    assert (made.release, made.kernel) == (short, kernel)


# --- who and where ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uid", "environ", "user"),
    [
        (1000, {"USER": "other"}, "me"),  # passwd knows better
        (4242, {"USER": "ldap"}, "ldap"),
        (4242, {"LOGNAME": "ldap"}, "ldap"),
        (4242, {"USER": "root"}, "user"),  # left behind by setpriv
        (4242, {"USER": "root", "LOGNAME": "ldap"}, "ldap"),
        (4242, {}, "user"),
        (4242, {"USER": ""}, "user"),
        (4242, {"USER": "a/b"}, "user"),
        (4242, {"USER": "a:b"}, "user"),
        (4242, {"USER": "a\nb"}, "user"),
        (4242, {"USER": "-a"}, "user"),
        (4242, {"USER": ".."}, "user"),
        (4242, {"USER": "x" * 200}, "x" * 200),
        (2**31, {"USER": "big"}, "big"),
        (2**32 - 2, {}, "user"),
        (65534, {}, "user"),
        (0, {"USER": "me"}, "root"),
    ],
)
def test_H_17_every_uid_has_a_name(host: MakeHost, uid: int, environ: dict[str, str], user: str) -> None:
    assert host({"/etc/passwd": ACCOUNTS}, uid=uid, environ=environ).user == user


@pytest.mark.parametrize("rows", ["", "me", "me:x:abc:1::/:", ":x:1000:1000::/x:", "#me:x:1000:1000::/x:", "\udcff:"])
def test_a_broken_passwd_does_not_know_you(host: MakeHost, rows: str) -> None:
    made = host({"/etc/passwd": rows}, environ={})
    assert (made.user, made.home) == ("user", "/")


@pytest.mark.parametrize(
    ("uid", "environ", "home"),
    [
        (1000, {"HOME": "/home/x"}, "/home/x"),
        (1000, {"HOME": "/nonexistent"}, "/nonexistent"),  # said on purpose, to keep programs from writing there
        (1000, {"HOME": "//home//x/../y/"}, "/home/y"),
        (1000, {"HOME": "relative"}, "/srv/me"),
        (1000, {"HOME": ""}, "/srv/me"),
        (1000, {}, "/srv/me"),
        (4242, {}, "/"),
        (1000, {"HOME": "/h/a b,c:d\n\udcff"}, "/h/a b,c:d\n\udcff"),
    ],
)
def test_X_16_every_user_has_a_home(host: MakeHost, uid: int, environ: dict[str, str], home: str) -> None:
    assert host({"/etc/passwd": ACCOUNTS}, uid=uid, environ=environ).home == home


@pytest.mark.parametrize(
    ("environ", "store", "config", "state", "runtime"),
    [
        ({}, "/h/.local/share/devns", "/h/.config/devns", "/h/.local/state/devns", None),
        (
            {"XDG_DATA_HOME": "/d/", "XDG_CONFIG_HOME": "/c", "XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/run/user/7"},
            "/d/devns", "/c/devns", "/s/devns", "/run/user/7/devns",
        ),
        (
            {"XDG_DATA_HOME": "d", "XDG_CONFIG_HOME": "", "XDG_STATE_HOME": "./s", "XDG_RUNTIME_DIR": "run"},
            "/h/.local/share/devns", "/h/.config/devns", "/h/.local/state/devns", None,
        ),
        ({"DEVNS_STORE": "/big", "XDG_DATA_HOME": "/d"}, "/big", "/h/.config/devns", "/h/.local/state/devns", None),
        ({"DEVNS_STORE": "../store"}, "/work/store", "/h/.config/devns", "/h/.local/state/devns", None),
        ({"DEVNS_STORE": ""}, "/h/.local/share/devns", "/h/.config/devns", "/h/.local/state/devns", None),
    ],
)  # fmt: skip
def test_X_16_relative_and_empty_xdg_variables_are_ignored(
    host: MakeHost, environ: dict[str, str], store: str, config: str, state: str, runtime: str | None
) -> None:
    made = host(environ={"HOME": "/h", **environ}, cwd="/work/project")
    assert (made.store, made.config, made.state, made.runtime) == (store, config, state, runtime)


@pytest.mark.parametrize(
    ("subuid", "expected"),
    [
        ("me:100000:65536\n", (100000, 65536)),
        ("1000:100000:65536\n", (100000, 65536)),
        ("you:100000:65536\n1001:1:1\n", None),
        ("me:100000:10\nme:300000:65536\nyou:400000:99999\n", (300000, 65536)),
        ("", None),
        ("# me:100000:65536\nme:100000\nme:a:b\nme:-5:10\n", None),
        ("me:0:65536\n", None),
        ("me:100000:0\n", None),
        ("me:500:65536\n", None),  # holds the user's own id, which cannot be mapped twice
        ("me:4294900000:65536\n", (4294900000, 65536)),
        ("me:4294901760:65536\n", None),  # reaches 2**32 - 1, which is no id
        (" me:100000:65536 \r\n", (100000, 65536)),
    ],
)
def test_H_04_subordinate_ids_are_the_longest_row_that_can_be_mapped(
    host: MakeHost, subuid: str, expected: tuple[int, int] | None
) -> None:
    made = host({"/etc/passwd": ACCOUNTS, "/etc/subuid": subuid, "/etc/subgid": "me:7000:9"})
    assert (made.subordinate("uid"), made.subordinate("gid")) == (expected, (7000, 9))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_links_lead_nowhere_but_into_the_root(host: MakeHost, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_text("secret")
    up = "../" * 40
    made = host(
        {"/etc/passwd": "inside", "/data": None},
        links={
            "/absolute": str(secret),
            "/climbing": f"{up}{secret}",
            "/inside": "/etc/passwd",
            "/data/up": f"{up}etc/passwd",
            "/dir": "data/../etc",
            "/self": "self",
            "/dangling": "nothing",
        },
    )
    paths = ("/absolute", "/climbing", "/inside", "/data/up", "/dir/passwd", "/self", "/dangling", f"/{up}{secret}")
    assert [made.read(path) for path in paths] == [None, None, "inside", "inside", "inside", None, None, None]
    assert [made.kind(path) for path in ("/dir", "/inside", "/self", "/dangling")] == ["directory", "file", None, None]
    assert [made.readlink(path) for path in ("/dir", "/etc", "/data/up")] == ["data/../etc", None, f"{up}etc/passwd"]
    assert [made.realpath(path) for path in ("/dir/passwd", "/dir/new/x", "/self/../y", "/dangling", "/")] == [
        "/etc/passwd",
        "/etc/new/x",
        "/y",
        "/nothing",
        "/",
    ]


def test_a_file_is_read_through_no_link_where_none_may_be_followed(host: MakeHost) -> None:
    links = {"/link": "/dir", "/dir/self": "file"}
    made = host({"/dir/file": "inside", "/dir/fifo": None}, links=links)
    paths = ("/dir/file", "/dir/../dir/file", "/link/file", "/dir/self", "/dir", "/", "/nothing", "/dir/\0")
    answers = ["inside", None, None, None, None, None, None, None]
    assert [made.read(path, symlinks=False) for path in paths] == answers
    assert [made.read(path) for path in ("/link/file", "/dir/self")] == ["inside", "inside"]


def test_only_regular_files_of_a_sensible_length_are_read(
    host: MakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = host({"/long": "12345", "/latin": b"caf\xe9", "/directory": None, "/empty": ""})
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    signal.alarm(20)  # a FIFO that is opened blocks: then this ends the run
    try:
        assert [made.read(path) for path in ("/fifo", "/socket", "/directory", "/nothing")] == [None] * 4
    finally:
        signal.alarm(0)
    assert (made.read("/long", limit=5), made.read("/long", limit=4), made.read("/empty")) == ("12345", None, "")
    assert made.read("/latin") == "caf\udce9"
    kinds = [made.kind(path) for path in ("/fifo", "/socket", "/directory", "/long")]
    assert kinds == ["other", "other", "directory", "file"]


def test_a_listing_is_sorted_and_empty_where_there_is_nothing(host: MakeHost) -> None:
    made = host({"/d/b": "", "/d/a": None, "/d/C": ""}, links={"/link": "d"})
    assert [made.listdir(path) for path in ("/link", "/d/b", "/none")] == [("C", "a", "b"), (), ()]


@pytest.mark.parametrize("path", ["/a\0b", "/\ud800", "/" + "x" * 300, "/x/" * 5000])
def test_a_path_that_cannot_be_is_not_there(host: MakeHost, path: str) -> None:
    made = host()
    said = (made.read(path), made.kind(path), made.listdir(path), made.readlink(path), made.stat(path))
    assert said == (None, None, (), None, None)


@pytest.mark.parametrize("path", ["", "etc/passwd", "./x", "~/x"])
def test_a_relative_path_is_a_mistake_of_the_caller(host: MakeHost, path: str) -> None:
    with pytest.raises(ValueError, match="not an absolute path"):
        host().read(path)


def test_access_goes_by_the_permission_bits(host: MakeHost) -> None:
    files = {"/open": "", "/closed": "", "/usr/bin/tool": ""}
    made = host(files, modes={"/open": 0o666, "/closed": 0o600})
    both = os.R_OK | os.W_OK
    assert [path for path in (*files, "/none") if made.access(path, both)] == ["/open"]
    assert (made.access("/usr/bin/tool", os.X_OK), made.access("/closed", os.F_OK)) == (True, True)
    root = dataclasses.replace(made, uid=0)
    assert (root.access("/closed", both), root.access("/closed", os.X_OK)) == (True, False)


# --- which ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/usr/bin:/opt/bin", "/usr/bin/tool"),
        ("/opt/bin:/usr/bin", "/opt/bin/tool"),
        ("/opt/bin/", "/opt/bin/tool"),
        (".:bin::../bin:/opt/bin", "/opt/bin/tool"),
        (".", None),
        ("usr/bin:opt/bin", None),
        ("", None),
        ("/none:/usr/bin/tool:/srv", None),  # a file, and a directory of that name
        ("/etc:/usr/bin", "/usr/bin/tool"),  # not executable in /etc
        ("/", None),
    ],
)
def test_P_03_only_absolute_entries_of_path_are_searched(host: MakeHost, path: str, found: str | None) -> None:
    files = {"/usr/bin/tool": "", "/opt/bin/tool": "", "/work/tool": "", "/work/bin/tool": "", "/etc/tool": ""}
    made = host({**files, "/srv/tool": None}, modes={"/work/tool": 0o755}, environ={"PATH": path}, cwd="/work")
    assert made.which("tool") == found


@pytest.mark.parametrize("name", ["", "/usr/bin/tool", "../bin/tool", "bin/tool", "to\0ol"])
def test_P_03_a_program_is_named_without_a_directory(host: MakeHost, name: str) -> None:
    assert host({"/usr/bin/tool": ""}).which(name) is None


def test_an_unset_path_is_the_usual_one(host: MakeHost) -> None:
    assert host({"/usr/bin/tool": ""}, environ={}).which("tool") == "/usr/bin/tool"


@pytest.mark.parametrize(
    ("modes", "found"),
    [
        ({}, "/opt/x/bin/tool"),
        ({"/opt/x/bin": 0o777}, "/usr/bin/tool"),
        ({"/opt/x/bin": 0o1777}, "/usr/bin/tool"),  # whoever comes first may put a program there
        ({"/opt/x": 0o777}, "/usr/bin/tool"),
        ({"/opt/x": 0o1777}, "/opt/x/bin/tool"),  # nobody else can take the directory away
        ({"/opt/x/bin/tool": 0o757}, "/usr/bin/tool"),
        ({"/opt/x/bin/tool": 0o644}, "/usr/bin/tool"),
        ({"/opt": 0o777, "/usr": 0o777}, None),
    ],
)
def test_P_03_a_program_that_others_can_replace_is_passed_over(
    host: MakeHost, modes: dict[str, int], found: str | None
) -> None:
    made = host({"/opt/x/bin/tool": "", "/usr/bin/tool": ""}, modes=modes, environ={"PATH": "/opt/x/bin:/usr/bin"})
    assert made.which("tool") == found


@pytest.mark.parametrize(
    ("link", "modes", "found"),
    [
        ("/etc/alternatives/tool", {}, "/usr/bin/tool"),
        ("/etc/alternatives/tool", {"/etc/alternatives": 0o777}, None),
        ("/etc/alternatives/tool", {"/opt/sbin": 0o777}, None),
        ("/etc/alternatives/tool", {"/opt": 0o777}, None),
        ("/etc/alternatives/none", {}, None),
    ],
)
def test_P_03_every_step_of_a_link_must_be_safe(
    host: MakeHost, link: str, modes: dict[str, int], found: str | None
) -> None:
    links = {"/usr/bin/tool": link, "/etc/alternatives/tool": "/opt/sbin/tool"}
    assert host({"/opt/sbin/tool": ""}, links=links, modes=modes).which("tool") == found


def test_a_merged_usr_is_searched_through_its_links(host: MakeHost) -> None:
    made = host({"/usr/bin/tool": ""}, links={"/bin": "usr/bin"}, environ={"PATH": "/bin"})
    assert made.which("tool") == "/bin/tool"


@pytest.mark.parametrize(
    ("mode", "owner", "group", "safe"),
    [
        (0o040755, 0, 0, True),
        (0o040755, 1000, 1000, True),
        (0o040755, 1001, 1001, False),
        (0o100755, 1001, 0, False),
        (0o120777, 1001, 1001, False),
        (0o120777, 0, 0, True),
        (0o042775, 0, 50, True),  # Debian's /usr/local: root let the group in
        (0o040775, 1000, 1000, True),
        (0o040775, 1000, 100, False),
        (0o041777, 0, 0, True),
        (0o040777, 0, 0, False),
    ],
)
def test_P_03_what_strangers_own_or_can_write_is_not_safe(mode: int, owner: int, group: int, safe: bool) -> None:
    status = os.stat_result((mode, 0, 0, 1, owner, group, 0, 0, 0, 0))
    assert _is_safe(status, {0, 1000}, 1000, sticky=True) is safe


# --- set-user-ID ------------------------------------------------------------------------------------------------------


def test_H_17_a_setuid_run_is_refused() -> None:
    refuse_setuid()
    refuse_setuid((1000, 1000, 1000), (100, 100, 100))
    for uids, gids, kind, ids in (
        ((1000, 0, 0), (100, 100, 100), "user", "1000, 0, 0"),
        ((1000, 1000, 0), (100, 100, 100), "user", "1000, 1000, 0"),
        ((1000, 1000, 1000), (100, 4, 4), "group", "100, 4, 4"),
    ):
        with pytest.raises(Unsupported) as refused:
            refuse_setuid(uids, gids)
        assert (refused.value.message, refused.value.hint) == (
            f"refusing to run set-{kind}-id: the real, effective and saved {kind} ids differ: {ids}",
            "start devns as yourself; it needs no rights of anyone else",
        )


# --- that reading is all ----------------------------------------------------------------------------------------------


def test_a_host_only_reads(host: MakeHost, no_effects: NoEffects) -> None:
    made = host({"/etc/passwd": ACCOUNTS, "/usr/bin/tool": "", "/etc/subuid": "me:1:2"}, links={"/link": "/etc"})
    with no_effects():
        Host.make(root=made.root, uid=1, gid=1, environ={}, machine="m", release="1")
        Host.probe()
        for path in ("/etc/passwd", "/link", "/none", "/usr/bin"):
            made.read(path), made.stat(path), made.kind(path), made.listdir(path), made.readlink(path)
            made.realpath(path), made.access(path, os.R_OK), made.xattr(path, "user.x")
        made.which("tool"), made.subordinate("uid"), made.store, made.config, made.state, made.runtime, made.kernel


def test_importing_it_loads_nothing_slow() -> None:
    slow = {"pwd", "grp", "subprocess", "pathlib", "socket", "shutil", "tempfile", "ctypes", "typer", "json", "tomli"}
    program = "import sys; sys.path.insert(0, sys.argv[1]); import devns.host; print(*sys.modules)"
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program, root], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & slow == set()


# --- the fixture that proves it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act",
    [
        lambda path: (path / "x").write_text(""),
        lambda path: (path / "here").open("r+"),
        lambda path: os.open(path / "x", os.O_CREAT),
        lambda path: os.mkdir(path / "x"),
        lambda path: os.rename(path / "here", path / "x"),
        lambda path: os.unlink(path / "here"),
        lambda path: os.symlink("a", path / "x"),
        lambda path: os.chmod(path, 0o700),
        lambda path: os.utime(path),
        lambda path: os.fork(),
        lambda path: os.posix_spawn("/bin/true", ["true"], {}),
        lambda path: os.execv("/bin/true", ["true"]),
        lambda path: subprocess.run(["true"]),
        lambda path: socket.socket(),
        lambda path: os.chdir(path),
        lambda path: os.environ.update(X="y"),
        lambda path: os.kill(os.getpid(), 0),
    ],
)
def test_no_effects_stops_and_reports_what_is_done_even_where_it_is_swallowed(
    tmp_path: Path, no_effects: NoEffects, act: Callable[[Path], object]
) -> None:
    (tmp_path / "here").write_text("kept")

    def swallowing() -> None:
        with contextlib.suppress(Exception):
            act(tmp_path)

    for code in (functools.partial(act, tmp_path), swallowing):
        with pytest.raises(AssertionError, match=r"^(open|os|subprocess|socket)"), no_effects():
            code()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("here", "kept")]


def test_no_effects_lets_reading_and_importing_be(tmp_path: Path, no_effects: NoEffects) -> None:
    (tmp_path / "fresh.py").write_text("x = 1")
    with no_effects(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path), *sys.path])
        import fresh  # type: ignore[import-not-found]  # written above

        assert (fresh.x, os.listdir(tmp_path), Path("/dev/null").read_text()) == (1, ["fresh.py"], "")


# --- digest -----------------------------------------------------------------------------------------------------------

TREE: dict[str, str | None] = {"/t/a": "1", "/t/d/b": "2", "/t/empty": None}


def test_a_digest_says_whether_two_trees_are_the_same(host: MakeHost) -> None:
    one, two = host(TREE), host(TREE)
    os.utime(f"{two.root}/t/a", (0, 0))
    assert one.digest("/t") == two.digest("/t") != one.digest("/t/d")


@pytest.mark.parametrize(
    ("files", "links", "modes"),
    [
        ({**TREE, "/t/a": "x"}, {}, {}),
        ({**TREE, "/t/d/b": "2\n"}, {}, {}),
        ({**TREE, "/t/new": ""}, {}, {}),
        ({"/t/a": "1", "/t/d/b": "2"}, {}, {}),
        ({"/t/a": "1", "/t/d/b": "2", "/t/other": None}, {}, {}),
        ({"/t/a": "1", "/t/d/b": "2", "/t/empty": ""}, {}, {}),
        ({"/t/a": "1", "/t/d/b": "2"}, {"/t/empty": "d"}, {}),
        (TREE, {"/t/l": "a"}, {}),
        (TREE, {}, {"/t/a": 0o755}),
        (TREE, {}, {"/t/d": 0o700}),
    ],
)
def test_a_digest_is_another_for_whatever_else_a_tree_holds(host: MakeHost, files: Any, links: Any, modes: Any) -> None:
    assert host(files, links=links, modes=modes).digest("/t") not in (None, host(TREE).digest("/t"))


def test_a_digest_follows_no_symbolic_link(host: MakeHost) -> None:
    before, after = (host({**TREE, "/x": said}, links={"/t/l": "/x", "/u": "t"}) for said in ("1", "2"))
    assert before.digest("/t") == after.digest("/t")
    assert [before.digest(path) for path in ("/u", "/u/a", "/t/l")] == [None, None, None]


def test_a_digest_of_too_much_and_of_nothing_is_none(host: MakeHost, tmp_path: Path) -> None:
    made = host(TREE)
    assert made.digest("/t", size=2) is not None
    assert made.digest("/t", files=5) is not None
    assert [made.digest("/t", size=1), made.digest("/t", files=4), made.digest("/no")] == [None, None, None]
    os.makedirs(tmp_path / "/".join(["deep"] * 120))
    assert made.digest("/deep") is None


def test_a_digest_opens_nothing_that_can_block(host: MakeHost, tmp_path: Path) -> None:
    made = host(TREE)
    plain = made.digest("/t")
    os.mkfifo(tmp_path / "t" / "fifo")
    assert made.digest("/t") not in (None, plain)
