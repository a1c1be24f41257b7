"""diagnose, the half that reads: every cause is told from what a machine shows, never as a bare "permission denied"."""

from __future__ import annotations

import contextlib
import errno as E
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from devns import ops
from devns.diagnose import (
    ANSWERS,
    CAUSES,
    Fact,
    Mount,
    apparmor_profile,
    explain,
    install,
    limits_fact,
    mount_of,
    mounts,
    problem,
    range_problem,
    tun_problem,
)
from devns.plan import Problem

if TYPE_CHECKING:
    from tests.conftest import MakeHost

NoEffects = Callable[[], contextlib.AbstractContextManager[None]]


def mountinfo(*rows: str) -> dict[str, str]:
    """`point type options features` as /proc/self/mountinfo tells them."""
    lines = []
    for row in rows:
        point, kind, options, features = [*row.split(" "), "rw", "rw"][:4]
        lines.append(f"22 27 0:21 / {point} {options} shared:1 - {kind} none {features}\n")
    return {"/proc/self/mountinfo": "".join(lines)}


def status(**fields: int) -> dict[str, str]:
    return {"/proc/self/status": "Name:\tpython3\n" + "".join(f"{key}:\t{value}\n" for key, value in fields.items())}


FIRST = {"/proc/self/uid_map": "         0          0 4294967295\n"}
NESTED = {"/proc/self/uid_map": "      1000       1000          1\n"}
NO_USERS = {"/proc/sys/user/max_user_namespaces": "0\n"}
UBUNTU = {"/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n"}
UNCONFINED = {"/proc/self/attr/apparmor/current": "unconfined\n"}
FILTERED = status(Seccomp=2, Threads=1)
NS = {f"/proc/self/ns/{name}": "" for name in ("user", "pid", "ipc", "uts", "net", "cgroup", "time", "mnt")}
PROC = "/proc proc"
MASKED = ("/ overlay", PROC, "/proc/kcore tmpfs", "/proc/acpi tmpfs", "/proc/sys/fs/binfmt_misc autofs")

RESTRICTS = "AppArmor takes the rights away (kernel.apparmor_restrict_unprivileged_userns is 1)"
PROFILE = """\
sudo tee /etc/apparmor.d/devns <<'EOF'
abi <abi/4.0>,
include <tunables/global>
profile devns "/usr/bin/devns" flags=(unconfined) {
  userns,
}
EOF
sudo apparmor_parser -r /etc/apparmor.d/devns"""
LOCAL = "export DEVNS_STORE=DIRECTORY, one of yours on a local ext4, xfs or btrfs"
ALLOW = "run devns outside of it, or allow it there (systemd: RestrictNamespaces=no; devns: [user] nested = true)"
FILTER = "a seccomp filter of the container or service around this process forbids it"
NEWER = "boot a kernel that is built with them, Linux 5.6 or newer"
UNMASK = (
    "start it with --security-opt systempaths=unconfined (Docker), --security-opt unmask=ALL (Podman) "
    "or procMount: Unmasked (Kubernetes)"
)
STORE = "/home/user/.local/share/devns"
NO_OVERLAY = "no overlay file system in user namespaces"


class Case(NamedTuple):
    """`capability`, tried with `errno` on a machine of `files`, is `message` and `remedy`; `sure`: also untried."""

    capability: str
    errno: int
    files: Mapping[str, str]
    message: str
    remedy: str | None
    sure: bool = False
    host: Mapping[str, Any] = {}


CASES = {
    "H-01 no user namespaces": Case(
        "userns", E.ENOSPC, {**NO_USERS, **FIRST},
        "no user namespaces: user.max_user_namespaces is 0", "sudo sysctl -w user.max_user_namespaces=15000", True,
    ),
    "H-01 inside of a container": Case(
        "userns", E.ENOSPC, {**NO_USERS, **NESTED},
        "no user namespaces: user.max_user_namespaces is 0 in the container or environment around this process",
        "as its root: sysctl -w user.max_user_namespaces=15000; in its devns template: [user] nested = true", True,
    ),
    "H-02 Debian's switch": Case(
        "userns", E.EPERM, {"/proc/sys/kernel/unprivileged_userns_clone": "0\n", **FILTERED},
        "no user namespaces: kernel.unprivileged_userns_clone is 0",
        "sudo sysctl -w kernel.unprivileged_userns_clone=1", True,
    ),
    "H-03 AppArmor forbids": Case(
        "userns", E.EACCES, {**UBUNTU, **UNCONFINED, "/usr/bin/devns": ""},
        f"no user namespaces: {RESTRICTS}", PROFILE, True,
    ),
    "H-03 AppArmor takes the capabilities": Case(
        "mount", E.EACCES,
        {**UBUNTU, "/proc/self/attr/current": "unprivileged_userns (enforce)\n", "/usr/bin/devns": ""},
        f"no mounts in user namespaces: {RESTRICTS}", PROFILE, True,
    ),
    "a profile of one's own": Case(
        "mount", E.EACCES, {**UBUNTU, "/proc/self/attr/apparmor/current": "snap.code.code (enforce)\n"},
        "no mounts in user namespaces: the AppArmor profile of this process forbids it: snap.code.code (enforce)",
        "add to that profile: userns, capability, mount, umount, pivot_root,",
    ),
    "H-19 SELinux": Case(
        "userns", E.EACCES, {"/sys/fs/selinux/enforce": "1", "/proc/self/attr/current": "user_u:user_r:user_t:s0\0"},
        "no user namespaces: SELinux forbids it",
        "sudo ausearch -m avc -ts recent | audit2allow -M devns && sudo semodule -i devns.pp",
    ),
    "a chroot": Case(
        "userns", E.EPERM, {**mountinfo(PROC, "/dev/shm tmpfs"), **FILTERED},
        "no user namespaces: this process runs in a chroot, where the kernel allows none",
        "run devns outside of it, or enter it by pivot_root instead (bwrap, systemd-nspawn)", True,
    ),
    "H-07 a filter": Case(
        "userns", E.EPERM, {**FILTERED, **mountinfo("/ ext4")}, f"no user namespaces: {FILTER}", ALLOW,
    ),
    "H-07 in Docker": Case(
        "userns", E.EPERM, {**FILTERED, "/.dockerenv": ""}, f"no user namespaces: {FILTER}",
        "docker run --security-opt seccomp=unconfined --security-opt systempaths=unconfined",
    ),
    "H-07 in Podman": Case(
        "userns", E.EPERM, {**FILTERED, "/run/.containerenv": ""}, f"no user namespaces: {FILTER}",
        "podman run --security-opt seccomp=unconfined --security-opt unmask=ALL",
    ),
    "H-07 in Kubernetes": Case(
        "userns", E.EPERM, FILTERED, f"no user namespaces: {FILTER}",
        "in the pod's securityContext: seccompProfile.type: Unconfined and procMount: Unmasked",
        host={"environ": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}},
    ),
    "H-07 a filter at a mount": Case("mount", E.EPERM, FILTERED, f"no mounts in user namespaces: {FILTER}", ALLOW),
    "a uid without a mapping": Case(
        "userns", E.EPERM, {"/proc/self/uid_map": "0 100000 1000\n5000 5000 1\n"},
        "no user namespaces: the uid 1000 has no mapping in the user namespace that this process runs in",
        "start devns as a user whom that container maps", True,
    ),
    "an outer limit": Case(
        "userns", E.ENOSPC, {**NESTED, "/proc/sys/user/max_user_namespaces": "96365\n"},
        "no user namespaces: the container or environment around this process allows no more of them",
        "run devns outside of it",
    ),
    "the limit is reached": Case(
        "userns", E.ENOSPC, {**FIRST, "/proc/sys/user/max_user_namespaces": "96365\n"},
        "no user namespaces: the limit of namespaces is reached, or they are nested 32 deep", "lsns -t user",
    ),
    "H-22 threads": Case(
        "userns", E.EINVAL, {**NS, **status(Threads=3, Seccomp=0)},
        "no user namespaces: this process has 3 threads, and only one without threads can enter a user namespace",
        "start the devns command as a process of its own",
    ),
    "a kernel without them": Case(
        "userns", E.EINVAL, {path: "" for path in NS if not path.endswith("user")},
        "no user namespaces: this kernel has no user namespaces", NEWER, True,
    ),
    "H-21 WSL 1": Case(
        "userns", E.EINVAL, {"/proc/sys/kernel/osrelease": "4.4.0-19041-Microsoft\n"},
        "no user namespaces: this is WSL 1, which is no Linux kernel", "wsl.exe --set-version DISTRIBUTION 2", True,
    ),
    "no /proc to read": Case(
        "userns", E.EPERM, {},
        "no user namespaces: the kernel refuses it (EPERM), and nothing that can be read says why", "devns check",
    ),
    "nested": Case(
        "nested", E.ENOSPC, NO_USERS, "no user namespaces inside of user namespaces: user.max_user_namespaces is 0",
        "sudo sysctl -w user.max_user_namespaces=15000", True,
    ),
    **{
        f"no {name} namespaces": Case(
            name, E.ENOSPC, {f"/proc/sys/user/max_{name}_namespaces": "0\n", **NO_USERS},
            f"no {name} namespaces: user.max_{name}_namespaces is 0",
            f"sudo sysctl -w user.max_{name}_namespaces=15000", True,
        )
        for name in ("pid", "ipc", "uts", "net", "cgroup", "time")
    },
    "a kernel without time namespaces": Case(
        "time", E.EINVAL, {path: "" for path in NS if not path.endswith("time")},
        "no time namespaces: this kernel has no time namespaces", NEWER, True,
    ),
    "H-06 a masked proc": Case(
        "proc", E.EPERM, {**mountinfo(*MASKED), **FILTERED},
        "no fresh /proc: /proc/acpi, /proc/kcore is masked by the container around this process, "
        "and the kernel allows no view that shows more", UNMASK,
    ),
    "H-06 no proc": Case(
        "proc", E.EPERM, mountinfo("/ ext4"), "no fresh /proc: this process sees no /proc at all",
        "mount -t proc proc /proc as root of this machine or container",
    ),
    "H-08 an old kernel": Case(
        "overlay", E.EPERM, mountinfo("/ ext4"),
        f"{NO_OVERLAY}: Linux 5.10.0 has none in user namespaces", "boot Linux 5.11 or newer",
        host={"release": "5.10.0-28-amd64"},
    ),
    **{
        f"X-18 a store on {kind}": Case(
            "overlay", E.EINVAL, mountinfo("/ ext4", f"/home {kind}", "/home/other ext4"),
            f"{NO_OVERLAY}: the store {STORE} lies on {kind} (/home), which cannot hold what is written", LOCAL,
        )
        for kind in ("nfs4", "overlay", "ecryptfs", "9p", "fuse.sshfs", "vfat")
    },
    "a read-only store": Case(
        "overlay", E.EROFS, mountinfo("/ ext4", "/home ext4 ro,relatime"),
        f"{NO_OVERLAY}: the store {STORE} is read-only (/home)", LOCAL,
    ),
    "no overlay module": Case(
        "overlay", E.ENODEV, {"/proc/filesystems": "nodev\tproc\n\text4\n"},
        f"{NO_OVERLAY}: its kernel module is not loaded", "sudo modprobe overlay",
    ),
    "the overlay is in use": Case(
        "overlay", E.EBUSY, {"/proc/filesystems": "nodev\tproc\nnodev\toverlay\n"},
        f"{NO_OVERLAY}: its upper directory is in use by another environment", "devns list",
    ),
    "no seccomp": Case(
        "seccomp", E.EINVAL, {}, "no seccomp filters: this kernel is built without seccomp filters",
        "boot one with CONFIG_SECCOMP_FILTER=y",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_cause_is_named_with_what_mends_it(host: MakeHost, no_effects: NoEffects, case: Case) -> None:
    machine = host(case.files, **case.host)
    with no_effects():
        tried, asked = problem(case.capability, machine, case.errno), problem(case.capability, machine, None)
    expected = Problem(case.capability, case.message, case.remedy)
    assert (tried, asked) == (expected, expected if case.sure else None)


def test_a_machine_that_shows_nothing_in_the_way_has_no_problem(host: MakeHost) -> None:
    files = {
        **FIRST, **NS, **mountinfo("/ ext4", PROC), **status(Threads=4, Seccomp=0, NoNewPrivs=0),
        "/proc/sys/user/max_user_namespaces": "96365\n", "/proc/sys/user/max_pid_namespaces": "96365\n",
        "/proc/sys/kernel/unprivileged_userns_clone": "1\n", "/proc/sys/kernel/osrelease": "6.12.0\n",
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "0\n",
    }  # fmt: skip
    assert [problem(name, host(files), None) for name in ("userns", "pid", "overlay", "proc", "time")] == [None] * 5
    assert problem("userns", host(), None) is None


def test_a_devns_with_an_apparmor_profile_and_root_are_not_restricted(host: MakeHost) -> None:
    profile = {"/proc/self/attr/apparmor/current": "devns (unconfined)\n"}
    assert problem("userns", host({**UBUNTU, **profile}), None) is None
    assert problem("userns", host({**UBUNTU, "/proc/sys/kernel/unprivileged_userns_clone": "0\n"}, uid=0), None) is None


def test_a_filter_goes_before_apparmor_at_unshare_and_after_it_later(host: MakeHost) -> None:
    machine = host({**FILTERED, **UBUNTU, **UNCONFINED})
    said = [explain(op, E.EPERM, None, machine)[0].partition(": ")[2] for op in ("unshare", "uid_map", "tmpfs")]
    assert said == [FILTER, RESTRICTS, RESTRICTS]


@pytest.mark.parametrize("program", [None, '/home/a"b/devns', "/home/*/devns", "/home/a\nb/devns", "/home/@{x}/devns"])
def test_a_path_that_apparmor_would_misread_is_not_put_in_a_profile(program: str | None) -> None:
    assert apparmor_profile(program) == apparmor_profile("/usr/local/bin/devns")


# --- newuidmap --------------------------------------------------------------------------------------------------------

HELPERS = {"/usr/bin/newuidmap": "", "/usr/bin/newgidmap": ""}
SETUID = {"/usr/bin/newuidmap": 0o4755, "/usr/bin/newgidmap": 0o4755}
ROWS = {"/etc/subuid": "user:100000:65536\n", "/etc/subgid": "user:100000:65536\n"}
ADD = "echo user:100000:65536 | sudo tee -a /etc/subuid /etc/subgid"


@pytest.mark.parametrize(
    ("files", "modes", "clause", "remedy"),
    [
        (ROWS, {}, "newuidmap is in no directory of PATH that only root can change",
         "install the package uidmap, as Debian calls it"),
        ({**ROWS, "/etc/os-release": 'ID=ubuntu\nID_LIKE="debian"\n'}, {},
         "newuidmap is in no directory of PATH that only root can change", "sudo apt-get install uidmap"),
        ({**ROWS, **HELPERS}, {"/usr/bin/newuidmap": 0o4755, "/usr/bin": 0o777},
         "newuidmap is in no directory of PATH that only root can change",
         "install the package uidmap, as Debian calls it"),
        ({**ROWS, "/usr/bin/newuidmap": ""}, {"/usr/bin/newuidmap": 0o4755},
         "newgidmap is in no directory of PATH that only root can change",
         "install the package uidmap, as Debian calls it"),
        ({**ROWS, **HELPERS}, {"/usr/bin/newuidmap": 0o4755},
         "/usr/bin/newgidmap is neither set-user-ID root nor has it capabilities", "sudo chmod u+s /usr/bin/newgidmap"),
        ({**ROWS, **HELPERS, **mountinfo("/ ext4", "/usr ext4 rw,nosuid")}, SETUID,
         "/usr/bin/newuidmap lies on a nosuid mount (/usr)", "sudo mount -o remount,suid /usr"),
        ({**ROWS, **HELPERS, **status(NoNewPrivs=1)}, SETUID,
         "no_new_privs is set on this process, so newuidmap gains no rights",
         "run devns outside of the sandbox or service around it"),
        ({**ROWS, **HELPERS, "/proc/self/uid_map": "1000 1000 1\n"}, SETUID,
         "the user namespace around this process has no root, so newuidmap gains no rights",
         "run devns outside of the sandbox around it"),
        (HELPERS, SETUID, "/etc/subuid gives you no uids, and 65536 are needed", ADD),
        ({**HELPERS, **ROWS, "/etc/subgid": ""}, SETUID, "/etc/subgid gives you no gids, and 65536 are needed",
         "echo user:165536:65536 | sudo tee -a /etc/subuid /etc/subgid"),
        ({**HELPERS, "/etc/subuid": "user:100000:1000\nother:200000:70000\n"}, SETUID,
         "/etc/subuid gives you only 1000 uids, and 65536 are needed",
         "echo user:270000:65536 | sudo tee -a /etc/subuid /etc/subgid"),
        ({**HELPERS, **ROWS, "/etc/subgid": "other:165535:1\nuser:100000:65536\n"}, SETUID,
         "/etc/subgid gives some of your gids to other too",
         "sudoedit /etc/subgid, and make your row there user:165536:65536"),
    ],
)  # fmt: skip
def test_H_04_why_there_is_no_range(
    host: MakeHost, files: dict[str, str], modes: dict[str, int], clause: str, remedy: str
) -> None:
    machine = host(files, modes=modes)
    assert range_problem(machine) == Problem("range", f"no range of user ids: {clause}", remedy, fatal=False)
    for op, what in (("newuidmap", "user"), ("newgidmap", "group")):
        assert explain(op, E.EPERM, None, machine) == (f"cannot map a range of {what} ids: {clause}", remedy)


def test_H_04_nothing_stands_in_the_way_of_a_range(host: MakeHost) -> None:
    neighbours = {"/etc/subuid": "other:165536:65536\nuser:100000:65536\n1000:300000:65536\n"}
    assert range_problem(host({**HELPERS, **ROWS, **neighbours, **mountinfo("/ ext4")}, modes=SETUID)) is None
    assert range_problem(host({"/etc/subuid": "0:100000:65536\n", "/etc/subgid": "0:100000:65536\n"}, uid=0)) is None


def test_a_user_name_is_quoted_in_what_one_can_type(host: MakeHost) -> None:
    found = range_problem(host(HELPERS, modes=SETUID, environ={"USER": "$(reboot)", "PATH": "/usr/bin"}))
    assert found
    assert found.remedy == ADD.replace("user:100000:65536", "'$(reboot):100000:65536'")


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ("ID=debian", "sudo apt-get install uidmap"),
        ('ID="linuxmint"\nID_LIKE="ubuntu debian"', "sudo apt-get install uidmap"),
        ("ID=fedora", "sudo dnf install shadow-utils"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"', "sudo dnf install shadow-utils"),
        ("ID=arch", "sudo pacman -S uidmap"),
        ('ID="opensuse-leap"\nID_LIKE="suse opensuse"', "sudo zypper install uidmap"),
        ("ID=alpine", "sudo apk add shadow-uidmap"),
        ("ID=nixos", "install the package uidmap, as Debian calls it"),
        ("", "install the package uidmap, as Debian calls it"),
    ],
)
def test_a_package_is_installed_as_this_distribution_does(host: MakeHost, release: str, command: str) -> None:
    machine = host({"/usr/lib/os-release": release}, links={"/etc/os-release": "../usr/lib/os-release"})
    assert install(machine, "uidmap", fedora="shadow-utils", alpine="shadow-uidmap") == command


# --- /dev/net/tun, cgroups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "message", "remedy"),
    [
        (None, "no tap devices: /dev/net/tun does not exist", "sudo modprobe tun"),
        (0o600, "no tap devices: /dev/net/tun is 0600 and not yours", "sudo chmod 0666 /dev/net/tun"),
        (0o666, None, None),
    ],
)
def test_H_10_why_there_is_no_tap_device(
    host: MakeHost, mode: int | None, message: str | None, remedy: str | None
) -> None:
    machine = host({"/dev/net/tun": ""}, modes={"/dev/net/tun": mode}) if mode else host()
    assert tun_problem(machine) == (Problem("tun", message, remedy, fatal=False) if message else None)


SESSION = "/sys/fs/cgroup/user.slice"
V2 = {
    **mountinfo("/ ext4", "/sys/fs/cgroup cgroup2"), "/proc/self/cgroup": "0::/user.slice\n",
    "/sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n", f"{SESSION}/cgroup.controllers": "memory pids\n",
    f"{SESSION}/cgroup.procs": "", f"{SESSION}/cgroup.subtree_control": "",
}  # fmt: skip
V1 = {
    **mountinfo(
        "/sys/fs/cgroup/memory cgroup rw rw,memory", "/sys/fs/cgroup/cpu cgroup rw rw,cpu,cpuacct",
        "/sys/fs/cgroup/systemd cgroup rw rw,name=systemd", "/sys/fs/cgroup/unified cgroup2",
    ),
    "/proc/self/cgroup": "4:memory:/job\n3:name=systemd:/\n2:cpu,cpuacct:/\n0::/\n",
    "/sys/fs/cgroup/memory/job/cgroup.procs": "", "/sys/fs/cgroup/cpu/cgroup.procs": "",
    "/sys/fs/cgroup/systemd/cgroup.procs": "", "/sys/fs/cgroup/unified/cgroup.procs": "",
}  # fmt: skip
ROOTS = "every cgroup of this process is root's"
DELEGATE = "systemd-run --user --scope -p Delegate=yes $SHELL"


@pytest.mark.parametrize(
    ("files", "owned", "expected"),
    [
        ({}, "", Fact("limits", False, "no cgroups are mounted")),
        (V2, "", Fact("limits", False, ROOTS, DELEGATE)),
        (V2, f"{SESSION} {SESSION}/cgroup.procs", Fact("limits", False, ROOTS, DELEGATE)),
        (V2, f"{SESSION} {SESSION}/cgroup.procs {SESSION}/cgroup.subtree_control",
         Fact("limits", True, "your own cgroup: memory, pids")),
        (V1, "", Fact("limits", False, ROOTS)),
        (V1, "/sys/fs/cgroup/systemd /sys/fs/cgroup/systemd/cgroup.procs", Fact("limits", False, ROOTS)),
        (V1, "/sys/fs/cgroup/memory/job /sys/fs/cgroup/memory/job/cgroup.procs",
         Fact("limits", True, "your own cgroup: memory")),
    ],
)  # fmt: skip
def test_H_11_which_cgroups_are_the_users_own(
    host: MakeHost, files: dict[str, str], owned: str, expected: Fact
) -> None:
    assert limits_fact(host(files, modes=dict.fromkeys(owned.split(), 0o777))) == expected


# --- mounts -----------------------------------------------------------------------------------------------------------


def test_mountinfo_is_read_with_its_optional_fields_and_escapes(host: MakeHost) -> None:
    text = (
        "1 0 8:1 / / rw,relatime - ext4 /dev/sda1 rw,discard\n"
        "2 1 0:5 / /a\\040b\\134040 ro,nosuid shared:1 master:2 propagate_from:3 - tmpfs - rw\n"
        "broken\n"
    )
    assert mounts(host({"/proc/self/mountinfo": text})) == (
        Mount("/", "ext4", frozenset({"rw", "relatime"}), frozenset({"rw", "discard"})),
        Mount("/a b\\040", "tmpfs", frozenset({"ro", "nosuid"}), frozenset({"rw"})),
    )


@pytest.mark.parametrize(
    ("path", "point", "kind"),
    [
        ("/", "/", "ext4"),
        ("/homes/x", "/", "ext4"),
        ("/home", "/home", "xfs"),  # mounted later, over the other
        ("/home/a/new/dir", "/home", "xfs"),
        ("/home/nfs/a", "/home/nfs", "nfs"),
        ("/link/a", "/home/nfs", "nfs"),
    ],
)
def test_a_path_lies_on_the_deepest_and_latest_mount(host: MakeHost, path: str, point: str, kind: str) -> None:
    rows = mountinfo("/ ext4", "/home nfs4", "/home xfs", "/home/nfs nfs")
    found = mount_of(host({**rows, "/home/nfs": None}, links={"/link": "/home/nfs"}), path)
    assert found
    assert (found.point, found.type) == (point, kind)


# --- explain ----------------------------------------------------------------------------------------------------------

EXPLAINED: list[tuple[str, int, str | None, Mapping[str, str | None], str, str | None]] = [
    ("unshare", E.ENOSPC, None, NO_USERS, "cannot make the namespaces: user.max_user_namespaces is 0",
     "sudo sysctl -w user.max_user_namespaces=15000"),
    ("unshare", E.ENOSPC, None, {"/proc/sys/user/max_net_namespaces": "0\n"},
     "cannot make the namespaces: user.max_net_namespaces is 0", "sudo sysctl -w user.max_net_namespaces=15000"),
    ("uid_map", E.EPERM, "/proc/7/uid_map", {**UBUNTU, "/usr/bin/devns": ""}, f"cannot map the ids: {RESTRICTS}",
     PROFILE),
    ("uid_map", E.EPERM, None, {}, "cannot map the ids: without newuidmap only your own uid can be mapped",
     '[user] map = "single"'),
    ("bind", E.ENOENT, "/data/x", {}, "cannot bind /data/x: it does not exist on this machine",
     "create it, or say optional = true in the template"),
    ("bind", E.EACCES, "/data/x", {}, "cannot bind /data/x: you may not enter a directory above it",
     "namei -l /data/x"),
    ("bind", E.EINVAL, "/data", {"/data": None}, "cannot bind /data: what is mounted beneath it must come along",
     "bind it with what is beneath it"),
    ("bind", E.EROFS, "/usr/new", {},
     "cannot bind /usr/new: its mount point is missing, and devns creates nothing on the host", "create it yourself"),
    ("tmpfs", E.ELOOP, "/var/x", {},
     "cannot mount a tmpfs on /var/x: a symbolic link is in the way, and it is not followed here",
     "name what it leads to"),
    ("proc", E.EPERM, "/proc", mountinfo("/ ext4", PROC, "/proc/keys tmpfs"),
     "cannot mount a fresh /proc: /proc/keys is masked by the container around this process, "
     "and the kernel allows no view that shows more", UNMASK),
    ("overlay", E.ESTALE, "/", {}, "cannot mount an overlay on /: its layers are not those that it was made on",
     "devns remove it, then start anew"),
    ("pivot_root", E.EINVAL, None, mountinfo("/ rootfs"),
     "cannot change the root: / is the initial ramfs, which cannot be left", "boot with a root file system of its own"),
    ("seccomp", E.EINVAL, None, {}, "cannot install the seccomp filter: this kernel is built without seccomp filters",
     "boot one with CONFIG_SECCOMP_FILTER=y"),
    ("exec", E.ENOENT, "rg", {}, "cannot run rg: there is no such command in this environment",
     "add the package that has it to [root] packages"),
    ("exec", E.ENOENT, "/opt/tool", {},
     "cannot run /opt/tool: there is no such file in this environment, or its interpreter is missing", None),
    ("exec", E.EACCES, "./a b", {}, "cannot run ./a b: it is not an executable file, or lies on a noexec mount",
     "chmod +x './a b'"),
    ("exec", E.ENOEXEC, "./x", {},
     "cannot run ./x: it is neither a program for this machine (x86_64) nor a script with a #! line", None),
    ("cwd", E.ENOENT, "/work", {}, "cannot start in /work: there is no such directory inside",
     "start devns elsewhere, or mount it"),
    ("clock", E.ERANGE, None, {}, "cannot shift the clocks: a clock would be negative, or too far in the future",
     "choose a smaller offset"),
    ("fork", E.EAGAIN, None, {}, "cannot start a process: too many processes are running as you", "ulimit -u"),
    ("hostname", E.EPERM, None, FILTERED, f"cannot set the host name: {FILTER}", ALLOW),
    ("directory", E.ENOSPC, "/x", {},
     "cannot make the directory /x: no space is left, or there are more mounts than fs.mount-max", f"df -h {STORE}"),
    ("devns_cgroup.limits:hold", E.EACCES, "/sys/fs/cgroup/x", {},
     "cannot devns_cgroup.limits:hold /sys/fs/cgroup/x: "
     "the kernel refuses it (EACCES), and nothing that can be read says why", "devns check"),
    ("bind", E.ENOTCONN, "/mnt/gone", {"/mnt/gone": None},
     "cannot bind /mnt/gone: transport endpoint is not connected (ENOTCONN)", None),
    ("exec", E.ENOENT, "\x1b[2J\udcff", {},
     "cannot run \\x1b[2J\\udcff: there is no such command in this environment",
     "add the package that has it to [root] packages"),
    ("mask", E.EMFILE, None, {}, "cannot mask: too many files are open in this process", "ulimit -n 1024"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "errno", "path", "files", "sentence", "hint"), EXPLAINED)
def test_a_failed_step_is_a_sentence_and_a_hint(
    host: MakeHost,
    no_effects: NoEffects,
    op: str,
    errno: int,
    path: str | None,
    files: Mapping[str, str | None],
    sentence: str,
    hint: str | None,
) -> None:
    machine = host(files)
    with no_effects():
        assert explain(op, errno, path, machine) == (sentence, hint)


@pytest.mark.parametrize("op", sorted({*ops.APPLIES, *ops.FOLDED, "unshare", "uid_map", "pivot_root", "exec", "other"}))
@pytest.mark.parametrize("errno", [E.EPERM, E.EACCES])
def test_nobody_sees_a_bare_permission_denied(host: MakeHost, op: str, errno: int) -> None:
    sentence, hint = explain(op, errno, "/x", host())
    assert os.strerror(errno).lower() not in sentence
    assert hint


def test_every_answer_can_be_put_into_words(host: MakeHost) -> None:
    machine = host({"/x": None})
    said = [(*key, *explain(key[0] or "other", key[1], "/x", machine)) for key in ANSWERS]
    assert [row for row in said if re.search(r"[{}\[]", row[2]) or "{" in (row[3] or "")] == []


def test_every_cause_has_a_case_above() -> None:
    said = [case.message for case in CASES.values()] + [sentence for _, _, _, _, sentence, _ in EXPLAINED]
    clauses = {cause.clause for cause in CAUSES if "newuidmap" not in cause.ops}
    patterns = {re.sub(r"\\{\w+\\}", ".+", re.escape(clause)) for clause in clauses}
    assert [pattern for pattern in patterns if not any(re.search(f": {pattern}$", text) for text in said)] == []
