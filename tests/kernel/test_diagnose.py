"""diagnose, the half that tries: what it says agrees with this kernel, also where that is made to lack something."""

from __future__ import annotations

import errno as E
import json
import os
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from devns import linux
from devns.diagnose import Fact, _in_child, _unconfined, probe
from devns.host import Host

Require = Callable[..., None]

ON_AMD64 = os.uname().machine == "x86_64"
UNSHARE, MOUNT = (272, 165) if ON_AMD64 else (97, 40)  # <asm/unistd.h>
FILTER = "a seccomp filter of the container or service around this process forbids it"
ALLOW = _unconfined(Host.probe())  # depends on the container that the tests run in, if they do
NEED_USERNS = ("pid", "ipc", "uts", "net", "cgroup", "time", "mount", "proc", "overlay", "nested", "range")

LOADED = (shutil, tempfile)  # probe imports them when it is called, which after a chroot is too late


# --- hosts that lack something ----------------------------------------------------------------------------------------


def apart(function: Callable[[], Any]) -> Any:
    """The value of `function`, which may do to its process what it likes: it runs in a forked child."""
    ear, mouth = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = ""
        try:
            said = json.dumps({"value": function()})
        except BaseException:
            said = json.dumps({"bug": traceback.format_exc()})
        finally:
            os.write(mouth, said.encode())
            os._exit(0)
    os.close(mouth)
    with open(ear) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    outcome = json.loads(text)
    assert "bug" not in outcome, outcome["bug"]
    return outcome["value"]


def probed(scratch: object, *changes: Callable[[], object]) -> dict[str, Fact]:
    """What probe says in a process that was changed so."""

    def change_and_probe() -> list[Sequence[Any]]:
        for change in changes:
            change()
        return [(fact.id, fact.works, fact.detail, fact.remedy) for fact in probe(Host.probe(), str(scratch)).values()]

    return {row[0]: Fact(*row) for row in apart(change_and_probe)}


def write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def in_a_container() -> None:
    """Root of a user and mount namespace, as in a container."""
    uid, gid = os.getuid(), os.getgid()
    linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNS)
    for name, text in {"setgroups": "deny", "uid_map": f"0 {uid} 1", "gid_map": f"0 {gid} 1"}.items():
        write(f"/proc/self/{name}", text)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)


def limited(name: str) -> Callable[[], object]:
    return lambda: write(f"/proc/sys/user/max_{name}_namespaces", "0")


def filtered(number: int, answer: int) -> Callable[[], object]:
    """A seccomp filter that answers `answer` to the system call `number`: HP7 of the catalogue."""

    def install() -> None:
        rows = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, answer), (0x06, 0, 0, 0x7FFF0000)]
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        linux.seccomp_set_filter(b"".join(struct.pack("=HBBI", *row) for row in rows))

    return install


def refused(errno: int) -> int:
    return 0x00050000 | errno  # SECCOMP_RET_ERRNO


def test_what_is_told_agrees_with_a_plain_attempt(tmp_path: Path) -> None:
    facts, namespaces = probed(tmp_path), ("userns", "pid", "ipc", "uts", "net", "cgroup", "time", "mount")
    flags = {name: linux.CLONE_NEWUSER | getattr(linux, f"CLONE_NEW{name.upper()}", 0) for name in namespaces}
    flags["mount"] |= linux.CLONE_NEWNS

    def plain(flag: int) -> bool:
        try:
            linux.unshare(flag)
        except OSError:
            return False
        return True

    works = {name: apart(lambda: plain(flag)) for name, flag in flags.items()}  # noqa: B023  called in this round
    assert {name: facts[name].works for name in flags} == works
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
        tun = True
    except OSError:
        tun = False
    assert (facts["tun"].works, facts["space"].works) == (tun, os.statvfs(tmp_path).f_bavail * 4096 > 1 << 30)


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    def seen() -> tuple[str, list[str], list[str]]:
        return Path("/proc/self/mountinfo").read_text(), os.listdir("/proc/self/fd"), os.listdir(tmp_path)

    before = seen()
    probe(Host.probe(), str(tmp_path))
    assert seen() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize(
    "change",
    [
        lambda: os.umask(0),
        lambda: os.umask(0o077),
        lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
        lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)),
        lambda: os.closerange(0, 3),
        lambda: os.chdir("/"),
    ],
    ids=["umask 000", "umask 077", "SIGCHLD ignored", "32 descriptors", "no 0 1 2", "another directory"],
)
def test_L_05_X_14_X_24_an_odd_parent_changes_nothing(tmp_path: Path, change: Callable[[], object]) -> None:
    plain, odd = probed(tmp_path), probed(tmp_path, change)
    assert {name: fact.works for name, fact in odd.items()} == {name: fact.works for name, fact in plain.items()}


# --- the causes, on a kernel that has them ----------------------------------------------------------------------------


def test_H_01_user_namespaces_that_are_switched_off_are_named_everywhere(tmp_path: Path, require: Require) -> None:
    require("userns")
    facts = probed(tmp_path, in_a_container, limited("user"))
    cause = (
        "no user namespaces: user.max_user_namespaces is 0 in the container or environment around this process",
        "as its root: sysctl -w user.max_user_namespaces=15000; in its devns template: [user] nested = true",
    )
    assert {name: facts[name] for name in ("userns", *NEED_USERNS)} == {
        name: Fact(name, False, *cause) for name in ("userns", *NEED_USERNS)
    }
    assert (facts["seccomp"].works, facts["space"].works) == (True, True)


@pytest.mark.parametrize("name", ["pid", "ipc", "uts", "net", "cgroup", "time"])
def test_a_kind_of_namespace_that_is_switched_off_is_named_alone(name: str, tmp_path: Path, require: Require) -> None:
    require("userns", name)
    facts = probed(tmp_path, in_a_container, limited(name))
    clause, remedy = f"user.max_{name}_namespaces is 0", f"sudo sysctl -w user.max_{name}_namespaces=15000"
    assert facts[name] == Fact(name, False, f"no {name} namespaces: {clause}", remedy)
    if name == "pid":
        assert facts.pop("proc") == Fact("proc", False, f"no fresh /proc: {clause}", remedy)
    others = {"userns", "pid", "ipc", "uts", "net", "cgroup", "time", "mount"} - {name}
    assert {other for other in others if not facts[other].works} == set()


def test_H_06_a_masked_proc_is_named(tmp_path: Path, require: Require) -> None:
    require("userns", "mount", "proc")
    facts = probed(tmp_path, in_a_container, lambda: linux.mount("/dev/null", "/proc/cpuinfo", None, 0x1000))
    assert (facts["userns"].works, facts["mount"].works) == (True, True)
    assert facts["proc"] == Fact(
        "proc",
        False,
        "no fresh /proc: /proc/cpuinfo is masked by the container around this process, "
        "and the kernel allows no view that shows more",
        "start it with --security-opt systempaths=unconfined (Docker), --security-opt unmask=ALL (Podman) "
        "or procMount: Unmasked (Kubernetes)",
    )


@pytest.mark.parametrize("answer", [refused(E.EPERM), refused(E.ENOSYS), 0x80000000], ids=["EPERM", "ENOSYS", "killed"])
def test_H_07_a_filter_around_unshare_is_named(tmp_path: Path, answer: int) -> None:
    fact = probed(tmp_path, filtered(UNSHARE, answer))["userns"]
    assert fact == Fact("userns", False, f"no user namespaces: {FILTER}", ALLOW)


def test_H_07_a_filter_around_mount_is_named_and_the_namespaces_still_work(tmp_path: Path, require: Require) -> None:
    require("userns", "pid", "net")
    facts = probed(tmp_path, filtered(MOUNT, refused(E.EPERM)))
    assert [name for name in ("userns", "pid", "net", "nested") if not facts[name].works] == []
    assert facts["mount"] == Fact("mount", False, f"no mounts in user namespaces: {FILTER}", ALLOW)
    assert facts["overlay"].detail == f"no overlay file system in user namespaces: {FILTER}"


def test_H_03_mounts_that_are_refused_for_no_visible_reason_are_not_called_permission_denied(tmp_path: Path) -> None:
    fact = probed(tmp_path, filtered(MOUNT, refused(E.EACCES)))["mount"]
    reason = "the kernel refuses it (EACCES), and nothing that can be read says why"
    assert fact == Fact("mount", False, f"no mounts in user namespaces: {reason}", "devns check")


def test_H_08_an_overlay_that_the_kernel_refuses_is_a_fact(tmp_path: Path, require: Require) -> None:
    require("userns", "mount")
    mount = linux.mount

    def mount_as_before_5_11(source: Any, target: Any, fstype: Any = None, flags: int = 0, data: Any = None) -> None:
        if fstype == "overlay":
            raise OSError(E.EPERM, "")
        mount(source, target, fstype, flags, data)

    facts = probed(tmp_path, lambda: setattr(linux, "mount", mount_as_before_5_11))
    assert (facts["mount"].works, facts["overlay"].works) == (True, False)


def test_X_16_a_store_that_cannot_be_written_is_a_fact_and_the_rest_is_tried(tmp_path: Path, require: Require) -> None:
    require("userns")
    facts = probed(tmp_path / "none")
    why = f"nothing can be written to {tmp_path}/none: there is no such file or directory"
    remedy = "export DEVNS_STORE=DIRECTORY, one of yours on a local ext4, xfs or btrfs"
    assert [facts[name] for name in ("space", "overlay")] == [Fact(n, False, why, remedy) for n in ("space", "overlay")]
    assert facts["userns"].works


def test_a_chroot_is_named(tmp_path: Path, require: Require) -> None:
    require("userns", "mount")

    def chroot() -> None:
        for name in ("proc", "tmp"):
            (tmp_path / name).mkdir()
        linux.mount("/proc", str(tmp_path / "proc"), None, 0x1000 | linux.MS_REC)  # MS_BIND
        os.chroot(tmp_path)
        os.chdir("/")

    assert probed("/tmp", in_a_container, chroot)["userns"] == Fact(
        "userns",
        False,
        "no user namespaces: this process runs in a chroot, where the kernel allows none",
        "run devns outside of it, or enter it by pivot_root instead (bwrap, systemd-nspawn)",
    )


def test_H_04_no_new_privs_takes_the_range_away_and_says_so(tmp_path: Path, require: Require) -> None:
    require("range")
    assert probed(tmp_path, lambda: linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1))["range"] == Fact(
        "range",
        False,
        "no range of user ids: no_new_privs is set on this process, so newuidmap gains no rights",
        "run devns outside of the sandbox or service around it",
    )


def test_H_04_without_newuidmap_only_the_range_is_lost(tmp_path: Path, require: Require) -> None:
    require("userns", "overlay", "range")
    facts = probe(replace(Host.probe(), environ={"PATH": "/nowhere"}), str(tmp_path))
    needed = os.getuid() != 0  # root writes the map itself
    assert (facts["userns"].works, facts["overlay"].works, facts["range"].works) == (True, True, not needed)
    assert facts["range"].detail.endswith("newuidmap is in no directory of PATH that only root can change") == needed


# --- the child that is thrown away ------------------------------------------------------------------------------------


def test_a_try_that_hangs_is_ended(tmp_path: Path) -> None:
    def hang() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(600)

    assert _in_child(hang, seconds=1) == (None, E.ETIMEDOUT)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_bug_in_a_try_is_no_fact() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        _in_child(lambda: 1 // 0)


# --- Host, as others than the one who runs the tests ------------------------------------------------------------------


def as_another(function: Callable[[], Any]) -> Any:
    """The value of `function`, run as root of a user namespace with a range of ids: HP2 of the catalogue."""
    host = Host.probe()

    def mapped() -> Any:
        entered, enter = os.pipe()
        wait, go = os.pipe()
        parent = os.getpid()
        if os.fork() == 0:  # newuidmap must be asked from outside of the new namespace
            os.read(entered, 1)
            for kind, own in (("uid", host.uid), ("gid", host.gid)):
                first, count = host.subordinate(kind) or (0, 0)  # type: ignore[arg-type]  # one of the two
                tool = host.which(f"new{kind}map") or ""
                os.spawnv(os.P_WAIT, tool, [tool, str(parent), *f"0 {own} 1 1 {first} {count}".split()])
            os.write(go, b"!")
            os._exit(0)
        linux.unshare(linux.CLONE_NEWUSER)
        os.write(enter, b"!")
        os.read(wait, 1)
        return function()

    return apart(mapped)


def test_H_17_a_uid_that_nobody_knows_has_a_host(require: Require) -> None:
    require("range")

    def seen() -> list[Any]:
        os.setgroups([])
        os.setresgid(4242, 4242, 4242)
        os.setresuid(4242, 4242, 4242)
        os.environ.clear()
        os.environ["USER"] = "root"
        here = Host.probe()
        return [here.uid, here.gid, here.groups, here.user, here.home, here.store, here.runtime]

    assert as_another(seen) == [4242, 4242, [], "user", "/", "/.local/share/devns", None]


@pytest.mark.parametrize("taken", ["program", "directory", "link"])
def test_P_03_what_a_stranger_could_change_is_not_found(taken: str, tmp_path: Path, require: Require) -> None:
    require("range")
    paths = {"directory": tmp_path / "real", "program": tmp_path / "real/tool", "link": tmp_path / "bin"}
    paths["directory"].mkdir(mode=0o755)
    paths["program"].write_text("#!/bin/sh\n")
    paths["program"].chmod(0o755)
    paths["link"].symlink_to("real")
    host = replace(Host.probe(), environ={"PATH": str(paths["link"])})
    mine = host.which("tool")
    as_another(lambda: os.lchown(paths[taken], 5, 5))
    theirs = host.which("tool")
    as_another(lambda: os.lchown(paths[taken], 0, 0))  # so that it can be removed
    assert (mine, theirs, host.which("tool")) == (f"{paths['link']}/tool", None, f"{paths['link']}/tool")
