"""[mount]: which steps a table becomes, and which sources and destinations are refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from devns.api import Host, Problem, Spec, Step, TemplateError, bind, cwd, mask, overlay, setenv, tmpfs
from devns.decode import At, decode
from devns.spec import User
from devns_mount.plugin import MountTable, devns_check, devns_plan, devns_table

HOME = "/home/dev"
PROJECT = f"{HOME}/work/app"
STORE = f"{HOME}/.local/share/devns"
PLACE = f"{STORE}/environments/app"
FILES = {f"{PROJECT}/src/main.py": "", f"{HOME}/.cache/pip/x": "", "/srv/data/x": "", f"{STORE}/environments/app/x": ""}
NONE = {"project": "none", "home": "none"}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return machine(tmp_path, FILES)


def machine(root: Path, files: Mapping[str, str], *, at: str = PROJECT, release: str = "6.1.0", **env: str) -> Host:
    for path, text in files.items():
        place = root / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    environ = {"HOME": HOME, **env}
    return Host.make(root=str(root), uid=1000, gid=1000, environ=environ, cwd=at, machine="x86_64", release=release)


def table(data: Mapping[str, Any]) -> MountTable:
    return decode(MountTable, dict(data), At("t.toml", "mount"))


def spec(data: Mapping[str, Any], *, project: str | None = PROJECT, user: User | None = None) -> Spec:
    return Spec(name="app", template="t.toml", project=project, tables={MountTable: table(data)}, user=user or User())


def steps(data: Mapping[str, Any], host: Host, **options: Any) -> list[Step]:
    return list(devns_plan(spec(data, **options), host))


def refusal(data: Mapping[str, Any], host: Host, **options: Any) -> str:
    with pytest.raises(TemplateError) as caught:
        steps({**NONE, **data}, host, **options)
    return caught.value.message


def source(src: str, **more: Any) -> Mapping[str, Any]:
    return {"bind": [{"src": src, "dst": "/mnt/x", **more}]}


# --- home and project -------------------------------------------------------------------------------------------------


def test_the_table_is_called_mount() -> None:
    assert devns_table() == ("mount", MountTable)


def test_without_a_word_a_project_is_writable_where_it_lies_and_the_home_is_the_environments_own(host: Host) -> None:
    assert steps({}, host) == [
        bind(f"{PLACE}/home", HOME, readonly=False, own=True),
        setenv("HOME", HOME, default=True),
        cwd(PROJECT),
        bind(PROJECT, PROJECT, readonly=False, canonical=True),
    ]


def test_a_named_template_has_no_project_to_mount_and_starts_at_home(host: Host) -> None:
    assert steps({}, host, project=None) == [
        bind(f"{PLACE}/home", HOME, readonly=False, own=True),
        setenv("HOME", HOME, default=True),
        cwd(HOME),
    ]


def test_a_project_can_be_read_only(host: Host) -> None:
    assert steps({"project": "ro", "home": "none"}, host) == [cwd(PROJECT), bind(PROJECT, PROJECT, canonical=True)]


def test_an_overlay_of_the_project_keeps_what_is_written_with_the_environment(host: Host) -> None:
    upper, work = f"{PLACE}/project-upper", f"{PLACE}/project-work"
    assert steps({"project": "overlay", "home": "none"}, host) == [
        cwd(PROJECT),
        overlay(PROJECT, lower=[PROJECT], upper=upper, work=work, canonical=True),
    ]


def test_without_project_and_home_nothing_of_the_host_is_seen(host: Host) -> None:
    assert steps(NONE, host) == [cwd("/")]


def test_the_hosts_home_is_bound_writable_with_what_devns_keeps_there_hidden(host: Host) -> None:
    assert steps({"project": "none", "home": "host"}, host) == [
        bind(HOME, HOME, readonly=False, canonical=True),
        mask(f"{HOME}/.config/devns"),
        mask(STORE),
        mask(f"{HOME}/.local/state/devns"),
        setenv("HOME", HOME, default=True),
        cwd(HOME),
    ]


def test_root_inside_has_its_home_in_root_and_finds_the_callers_beside_it(host: Host) -> None:
    assert steps({}, host, project=None, user=User(identity="root")) == [
        bind(f"{PLACE}/home", HOME, readonly=False, own=True),
        cwd("/root"),
    ]


def test_the_working_directory_inside_is_the_callers_where_that_lies_in_the_project(tmp_path: Path) -> None:
    below = machine(tmp_path, FILES, at=f"{PROJECT}/src")
    beside = machine(tmp_path, FILES, at=f"{HOME}/work")
    assert steps({"home": "none"}, below)[0] == cwd(f"{PROJECT}/src")
    assert steps({"home": "none"}, beside)[0] == cwd("/")


def test_a_sibling_whose_name_begins_like_the_project_is_not_in_it(tmp_path: Path) -> None:
    assert steps({"home": "none"}, machine(tmp_path, FILES, at=f"{PROJECT}-old"))[0] == cwd("/")


def test_a_store_that_lies_in_the_project_is_hidden_inside(tmp_path: Path) -> None:
    inner = machine(tmp_path, FILES, DEVNS_STORE=f"{PROJECT}/.store")
    assert steps({"home": "none"}, inner)[-1] == mask(f"{PROJECT}/.store")


def test_an_overlay_of_a_project_that_holds_the_store_is_refused(tmp_path: Path) -> None:
    inner = machine(tmp_path, FILES, DEVNS_STORE=f"{PROJECT}/.store")
    assert f"an overlay of {PROJECT} cannot keep" in refusal({"project": "overlay"}, inner)


@pytest.mark.parametrize("project", ["/", "/proc/1/root", "/dev/shm/p", HOME])
def test_a_project_that_would_cover_the_system_is_refused(host: Host, project: str) -> None:
    assert refusal({"project": "rw"}, host, project=project) == (
        f"t.toml: mount.project: {project} cannot be mounted as a project"
    )


def test_a_home_that_is_the_root_directory_is_refused(tmp_path: Path) -> None:
    homeless = machine(tmp_path, {"/srv/x": ""}, HOME="/")
    assert refusal({"home": "private"}, homeless) == "t.toml: mount.home: / cannot be a home directory inside"


# --- bind, overlay, tmpfs ---------------------------------------------------------------------------------------------


def test_a_bind_is_read_only_unless_it_says_otherwise(host: Host) -> None:
    data = {"bind": [{"src": "/srv/data", "dst": "/data"}, {"src": "/srv/data", "dst": "/data-rw", "mode": "rw"}]}
    assert steps(data | NONE, host)[1:] == [
        bind("/srv/data", "/data", canonical=True),
        bind("/srv/data", "/data-rw", readonly=False, canonical=True),
    ]


def test_a_tilde_is_the_hosts_home_on_the_left_and_the_home_inside_on_the_right(host: Host) -> None:
    data = {"bind": [{"src": "~/.cache/pip", "dst": "~/.cache/pip"}], **NONE}
    assert steps(data, host)[1:] == [bind(f"{HOME}/.cache/pip", f"{HOME}/.cache/pip", canonical=True)]
    assert steps(data, host, user=User(identity="root"))[1:] == [
        bind(f"{HOME}/.cache/pip", "/root/.cache/pip", canonical=True)
    ]


def test_a_relative_source_lies_in_the_project(host: Host) -> None:
    assert steps({**NONE, **source("./src")}, host)[1:] == [bind(f"{PROJECT}/src", "/mnt/x", canonical=True)]


def test_a_destination_is_normalised(host: Host) -> None:
    data = {"bind": [{"src": "/srv/data", "dst": "//data/./deep/"}], **NONE}
    assert steps(data, host)[1:] == [bind("/srv/data", "/data/deep", canonical=True)]


def test_a_source_is_named_by_where_it_really_lies(host: Host, tmp_path: Path) -> None:
    (tmp_path / "srv/link").symlink_to("data")
    assert steps({**NONE, **source("/srv/link")}, host)[1:] == [bind("/srv/data", "/mnt/x", canonical=True)]


def test_an_optional_source_may_be_missing(host: Host) -> None:
    assert steps({**NONE, **source("/srv/none", optional=True)}, host)[1:] == [
        bind("/srv/none", "/mnt/x", optional=True, canonical=True)
    ]


def test_an_overlays_writes_are_kept_in_a_place_of_its_own_or_discarded(host: Host) -> None:
    kept = {"lower": "/srv/data", "dst": "/data"}
    lost = {"lower": "/srv/data", "dst": "/lost", "writable": "discard"}
    place = f"{PLACE}/overlay-7694e713c17ed663"
    assert steps({"overlay": [kept, lost], **NONE}, host)[1:] == [
        overlay("/data", lower=["/srv/data"], upper=f"{place}-upper", work=f"{place}-work", canonical=True),
        overlay("/lost", lower=["/srv/data"], upper=None, work=None, canonical=True),
    ]


def test_another_directory_below_an_overlay_has_another_place_for_its_writes(host: Host, tmp_path: Path) -> None:
    (tmp_path / "srv/other").mkdir()
    places = {
        steps({"overlay": [{"lower": lower, "dst": "/data"}], **NONE}, host)[1]["upper"]
        for lower in ("/srv/data", "/srv/other")
    }
    assert len(places) == 2


def test_an_overlay_of_a_file_is_refused(host: Host) -> None:
    data = {"overlay": [{"lower": "/srv/data/x", "dst": "/data"}]}
    assert refusal(data, host) == "t.toml: mount.overlay[0].lower: /srv/data/x: not a directory"


def test_a_tmpfs_has_a_size_and_a_mode_where_they_are_said(host: Host) -> None:
    lines = ["/scratch", "/scratch/a:size=2G", "/b:mode=1777,size=512K", "~/c:size=4096", "/odd:name"]
    assert steps({"tmpfs": lines, **NONE}, host)[1:] == [
        tmpfs("/scratch"),
        tmpfs("/scratch/a", size=2 << 30),
        tmpfs("/b", size=512 << 10, mode=0o1777),
        tmpfs(f"{HOME}/c", size=4096),
        tmpfs("/odd:name"),
    ]


@pytest.mark.parametrize("line", ["", "scratch", "/a:size=2X", "/a:size=0", "/a:size=", "/a:mode=9", "/a:mode=4755"])
def test_a_tmpfs_that_makes_no_sense_is_refused(line: str) -> None:
    with pytest.raises(TemplateError, match=r"^t.toml: mount: "):
        table({"tmpfs": [line]})


def test_an_old_kernel_is_a_problem_only_where_an_overlay_is_asked_for(tmp_path: Path) -> None:
    old = machine(tmp_path, FILES, release="5.10.0")
    message = "[mount] asks for an overlay, and Linux 5.10.0 lets only root mount one: 5.11 is the first"
    remedy = 'set project = "ro" or "rw" in [mount], and leave out its overlays'
    assert list(devns_check(spec({"project": "overlay"}), old)) == [Problem("overlay", message, remedy)]
    assert list(devns_check(spec({}), old)) == []


# --- C-11: sources ----------------------------------------------------------------------------------------------------

KERNEL = "of the host is not lent: the environment has its own"
SESSION = "the sockets of your session lie there"
OWN = "devns keeps its environments, or what you trust, there"


@pytest.mark.parametrize(
    ("src", "why"),
    [
        ("/", "the whole host is not lent"),
        ("/..", "the whole host is not lent"),
        ("~/../..", "the whole host is not lent"),
        ("/proc", f"/proc {KERNEL}"),
        ("/proc/self/root", f"/proc {KERNEL}"),
        ("/proc/1/fd", f"/proc {KERNEL}"),
        ("/srv/../proc", f"/proc {KERNEL}"),
        ("/sys/fs/cgroup", f"/sys {KERNEL}"),
        ("/dev/sda", f"/dev {KERNEL}"),
        ("/run/user/1000/bus", SESSION),
        ("/run/user", SESSION),
        ("/run", SESSION),
        ("/tmp/runtime", SESSION),
        ("~", 'your home directory lies there: home = "host" in [mount] says so plainly'),
        ("/home", 'your home directory lies there: home = "host" in [mount] says so plainly'),
        ("~/.local/share/devns", OWN),
        ("~/.local", OWN),
        (f"{STORE}/environments/other/home", OWN),
        ("~/.local/state/devns/trust", OWN),
        ("/srv/to-store", OWN),
        ("/srv/to-proc", f"/proc {KERNEL}"),
        ("/srv/none", "no such file or directory"),
        ("/srv/pipe", "neither a file nor a directory: devices and sockets are not lent"),
    ],
)
def test_C_11_a_source_on_the_deny_list_is_refused_however_it_is_written(tmp_path: Path, src: str, why: str) -> None:
    host = machine(tmp_path, {**FILES, "/proc/1/x": ""}, XDG_RUNTIME_DIR="/tmp/runtime")
    (tmp_path / "srv/to-store").symlink_to(STORE)
    (tmp_path / "srv/to-proc").symlink_to("/proc/1")
    os.mkfifo(tmp_path / "srv/pipe")
    assert refusal(source(src), host) == f"t.toml: mount.bind[0].src: {src}: {why}"


@pytest.mark.parametrize(
    ("target", "real"),
    [
        (f"{HOME}/.ssh", f"{HOME}/.ssh"),
        ("../../.ssh", f"{HOME}/.ssh"),
        ("..", f"{HOME}/work"),
        ("/", "/"),
        ("/srv/data", "/srv/data"),
        ("/nowhere", "/nowhere"),
    ],
)
def test_C_11_a_link_in_the_project_leads_nowhere_else(tmp_path: Path, target: str, real: str) -> None:
    host = machine(tmp_path, {**FILES, f"{HOME}/.ssh/id": ""})
    (tmp_path / PROJECT[1:] / "link").symlink_to(target)
    assert refusal(source("link"), host) == f"t.toml: mount.bind[0].src: link: leads out of the project, to {real}"
    assert "leads out of the project" in refusal(source("link/deeper", optional=True), host)


def test_C_11_a_link_in_the_project_that_stays_there_is_followed(host: Host, tmp_path: Path) -> None:
    (tmp_path / PROJECT[1:] / "link").symlink_to(f"{PROJECT}/src")
    assert steps({**NONE, **source("link")}, host)[1:] == [bind(f"{PROJECT}/src", "/mnt/x", canonical=True)]


def test_C_11_dots_do_not_lead_out_of_the_project(host: Host) -> None:
    assert "leads out of the project" in refusal(source("../../.ssh"), host)
    assert "leads out of the project" in refusal({"overlay": [{"lower": "..", "dst": "/mnt/x"}]}, host)


def test_a_relative_source_without_a_project_is_refused(host: Host) -> None:
    assert "relative to the project, and there is none" in refusal(source("src"), host, project=None)


@pytest.mark.parametrize("src", ["", "~root", "~root/.ssh", "/srv/a\nb", "/srv/\u202ex"])
def test_a_source_that_cannot_be_read_plainly_is_refused(src: str) -> None:
    with pytest.raises(TemplateError, match=r"^t.toml: mount.bind\[0\]: "):
        table(source(src))


# --- C-12: destinations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dst",
    [
        *("", "/", "//", "/.", ".", "x", "../x", "/..", "/mnt/../etc", "~/../x", "~root/x"),
        *("/proc", "/proc/self", "//proc", "/./sys", "/sys/fs/cgroup", "/dev", "/dev/null", "/dev/shm", "/mnt\nx"),
    ],
)
def test_C_12_a_destination_that_would_cover_the_system_or_climb_is_refused(dst: str) -> None:
    for data in ({"bind": [{"src": "/srv", "dst": dst}]}, {"overlay": [{"lower": "/srv", "dst": dst}]}):
        with pytest.raises(TemplateError, match=r"^t.toml: mount\."):
            table(data)
    with pytest.raises(TemplateError, match=r"^t.toml: mount: "):
        table({"tmpfs": [dst]})


def test_C_12_a_name_that_only_begins_like_the_kernels_is_no_problem() -> None:
    assert table({"tmpfs": ["/process", "/system", "/devel"]}).tmpfs == ("/process", "/system", "/devel")


def test_C_12_a_tilde_does_not_help_where_the_home_is_the_root_directory(tmp_path: Path) -> None:
    homeless = machine(tmp_path, {"/srv/data/x": ""}, HOME="/")
    data = {"bind": [{"src": "/srv/data", "dst": "~/proc"}]}
    assert refusal(data, homeless) == "t.toml: mount.bind[0].dst: ~/proc: nothing can be mounted on /proc"
