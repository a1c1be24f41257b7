"""diagnose: why something cannot work on this machine, and what mends it: first what can be read, then what is tried.

The causes are one table, CAUSES. A failed step of a launch, a failed probe and a question in advance are all looked up
in it, so that the same fault is told in the same words everywhere. Every row is read from `Host`; only `probe` acts.
"""

from __future__ import annotations

import contextlib
import errno as E
import os
import select
import shlex
import signal
import stat
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from devns.decode import escape
from devns.host import Host
from devns.plan import Problem

# The name in a Plan, and in /proc/PID/ns and /proc/sys/user.
NAMESPACES = {**{name: name for name in ("pid", "ipc", "uts", "net", "cgroup", "time")}, "mount": "mnt"}

TUN = "/dev/net/tun"

# --- what the causes look at ------------------------------------------------------------------------------------------


class Mount(NamedTuple):
    point: str
    type: str
    options: frozenset[str]
    features: frozenset[str]  # the options of the file system itself: for a cgroup its controllers


def mounts(host: Host) -> tuple[Mount, ...]:
    """The mounts that this process sees, in the order they were made. proc_pid_mountinfo(5)"""
    found = []
    for line in (host.read("/proc/self/mountinfo", limit=1 << 24) or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if len(fields) >= 6 and len(tail) >= 3:
            sets = (frozenset(options.split(",")) for options in (fields[5], tail[2]))
            found.append(Mount(_unescaped(fields[4]), tail[0], *sets))
    return tuple(found)


def mount_of(host: Host, path: str) -> Mount | None:
    """The mount that `path` lies on, whether it exists yet or not."""
    real = host.realpath(path) + "/"
    holding = [mount for mount in mounts(host) if real.startswith(mount.point.rstrip("/") + "/")]
    # Of two on one point the later covers the earlier.
    return max(reversed(holding), key=lambda mount: len(mount.point), default=None)


def _unescaped(text: str) -> str:
    for char in " \t\n\\":
        text = text.replace(f"\\{ord(char):03o}", char)
    return text


def install(host: Host, package: str, **others: str) -> str:
    """The command that installs a package here: its Debian name, and `others` by family: fedora, arch, suse, alpine."""
    text = host.read("/etc/os-release") or host.read("/usr/lib/os-release") or ""
    said = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    system = " ".join(said.get(key, "") for key in ("ID", "ID_LIKE"))
    verbs = {"debian": "apt-get install", "fedora": "dnf install", "arch": "pacman -S", "suse": "zypper install"}
    for family, verb in {**verbs, "ubuntu": "apt-get install", "rhel": "dnf install", "alpine": "apk add"}.items():
        if family in system:
            return f"sudo {verb} {others.get({'rhel': 'fedora'}.get(family, family), package)}"
    return f"install the package {package}, as Debian calls it"


# --- the causes -------------------------------------------------------------------------------------------------------

# What shows that this is the cause here: None where it is not, else what was seen, for {found}. `path` is the step's.
Found = Callable[[Host, "str | None"], "str | None"]


class Cause(NamedTuple):
    """One reason why `ops` fail with one of `errnos`. `clause` and `remedy` are formatted, see `_words`.

    `certain`: what `found` reads is enough to know, nothing need be tried.
    """

    ops: tuple[str, ...]
    errnos: tuple[int, ...]
    found: Found
    clause: str
    remedy: str
    certain: bool = False


def _if(test: Callable[[Host], object]) -> Found:
    return lambda host, path: "" if test(host) else None


def _number(host: Host, path: str) -> int | None:
    text = (host.read(path) or "").strip()
    return int(text) if text.isdecimal() else None


def _status(host: Host, key: str) -> int:
    """A number of /proc/self/status, 0 where it has none. proc_pid_status(5)"""
    for line in (host.read("/proc/self/status") or "").splitlines():
        name, _, value = line.partition(":")
        if name == key and value.strip().isdecimal():
            return int(value)
    return 0


def _uid_map(host: Host) -> list[list[int]]:
    return [[int(word) for word in line.split()] for line in (host.read("/proc/self/uid_map") or "").splitlines()]


def _is_nested(host: Host) -> bool:
    """Are we in a user namespace that is not the machine's first?"""
    return _uid_map(host) not in ([], [[0, 0, 0xFFFFFFFF]])


def _unmapped(host: Host, path: str | None) -> str | None:
    rows = _uid_map(host)
    return str(host.uid) if rows and not any(first <= host.uid < first + count for first, _, count in rows) else None


def _users_limited(host: Host, path: str | None) -> str | None:
    return "" if path in (None, "user") and _number(host, "/proc/sys/user/max_user_namespaces") == 0 else None


def _limited(host: Host, path: str | None) -> str | None:
    names = [path] if path in NAMESPACES else [] if path == "user" else NAMESPACES
    files = [f"max_{NAMESPACES[name]}_namespaces" for name in names]
    return next((file for file in files if _number(host, f"/proc/sys/user/{file}") == 0), None)


def _lacking(host: Host, path: str | None) -> str | None:
    has = host.listdir("/proc/self/ns")
    names = [path] if path else ["user", *NAMESPACES]
    return next((name for name in names if has and NAMESPACES.get(name, name) not in has), None)


def _threads(host: Host, path: str | None) -> str | None:
    return str(count) if (count := _status(host, "Threads")) > 1 else None


def _in_chroot(host: Host) -> bool:
    # The mount that holds a chroot's directory is not beneath that directory, so no mount at "/" is listed.
    listed = mounts(host)
    return bool(listed) and all(mount.point != "/" for mount in listed)


def _label(host: Host) -> str:
    """What AppArmor calls this process: "unconfined", "name (enforce)", ... or another module's label, or nothing."""
    label = host.read("/proc/self/attr/apparmor/current") or host.read("/proc/self/attr/current") or ""
    return label.strip("\n\0 ")


def _apparmor_restricts(host: Host) -> bool:
    # A process with a profile of its own is judged by that. unprivileged_userns is the one for all that have none.
    switch = _number(host, "/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    return switch == 1 and host.uid != 0 and _label(host).split(" ")[0] in ("", "unconfined", "unprivileged_userns")


def _profile(host: Host, path: str | None) -> str | None:
    label = _label(host)  # the labels of other modules do not end in a mode
    return escape(label) if label.endswith((" (enforce)", " (kill)")) else None


def _unfit_store(host: Host, path: str | None) -> str | None:
    """File systems that cannot hold an overlay's upper directory. overlayfs.rst, "Upper and Lower"."""
    mount = mount_of(host, host.store)
    unfit = "nfs nfs4 cifs smb3 9p lustre gpfs ceph afs beegfs virtiofs overlay ecryptfs vfat exfat msdos ntfs ntfs3"
    bad = mount is not None and (mount.type in unfit.split() or mount.type.startswith("fuse"))
    return f"{mount.type} ({escape(mount.point)})" if mount and bad else None


def _readonly_store(host: Host, path: str | None) -> str | None:
    mount = mount_of(host, host.store)
    return escape(mount.point) if mount and "ro" in mount.options else None


def _covered_proc(host: Host, path: str | None) -> str | None:
    # mount_too_revealing() in the kernel's fs/namespace.c: what covers a directory that is always empty hides nothing.
    empty = ("/proc/sys/fs/binfmt_misc", "/proc/fs/nfsd")
    points = {mount.point for mount in mounts(host) if mount.point.startswith("/proc/") and mount.point not in empty}
    return ", ".join(escape(point) for point in sorted(points)[:3]) or None


def _unreachable(host: Host, path: str | None) -> str | None:
    return "" if path and path.startswith("/") and not host.access(path, os.F_OK) else None


def _no_range(host: Host, path: str | None) -> str | None:
    why = _why_no_range(host)
    return why[0] if why else None


_PERM = (E.EPERM, E.EACCES)
_FILTERED = (E.EPERM, E.ENOSYS)
_UNSHARE = ("unshare",)
_MADE = "mount overlay bind tmpfs proc sysfs dev mqueue mask file directory symlink account"
_MOUNTS = (*_MADE.split(), "scratch", "readonly", "pivot_root")
_ENTER = (*_UNSHARE, "setgroups", "uid_map", "gid_map", *_MOUNTS)
_LATER = (*_ENTER, "hostname", "clock", "loopback", "no-user-namespaces", "seccomp")
_ELSEWHERE = "export DEVNS_STORE=DIRECTORY, one of yours on a local ext4, xfs or btrfs"
_SECCOMP = "a seccomp filter of the container or service around this process forbids it"

# fmt: off
CAUSES: tuple[Cause, ...] = (
    # user_namespaces(7), namespaces(7)
    Cause(_UNSHARE, (E.EPERM,), _unmapped,
          "the uid {found} has no mapping in the user namespace that this process runs in",
          "start devns as a user whom that container maps", True),
    Cause(_UNSHARE, (E.ENOSPC,), lambda host, path: _users_limited(host, path) if _is_nested(host) else None,
          "user.max_user_namespaces is 0 in the container or environment around this process",
          "as its root: sysctl -w user.max_user_namespaces=15000; in its devns template: [user] nested = true", True),
    Cause(_UNSHARE, (E.ENOSPC,), _users_limited,
          "user.max_user_namespaces is 0", "sudo sysctl -w user.max_user_namespaces=15000", True),
    Cause(_UNSHARE, (E.ENOSPC,), _limited, "user.{found} is 0", "sudo sysctl -w user.{found}=15000", True),
    Cause(_UNSHARE, (E.EPERM,),
          _if(lambda host: host.uid and _number(host, "/proc/sys/kernel/unprivileged_userns_clone") == 0),
          "kernel.unprivileged_userns_clone is 0", "sudo sysctl -w kernel.unprivileged_userns_clone=1", True),
    Cause(_UNSHARE, (E.EINVAL,),
          _if(lambda host: (host.read("/proc/sys/kernel/osrelease") or "").rstrip().endswith("-Microsoft")),
          "this is WSL 1, which is no Linux kernel", "wsl.exe --set-version DISTRIBUTION 2", True),
    Cause(_UNSHARE, (E.EINVAL, E.ENOSYS), _lacking,
          "this kernel has no {found} namespaces", "boot a kernel that is built with them, Linux 5.6 or newer", True),
    Cause(_UNSHARE, (E.EINVAL,), _threads,
          "this process has {found} threads, and only one without threads can enter a user namespace",
          "start the devns command as a process of its own"),
    Cause(_UNSHARE, (E.EPERM,), _if(_in_chroot), "this process runs in a chroot, where the kernel allows none",
          "run devns outside of it, or enter it by pivot_root instead (bwrap, systemd-nspawn)", True),
    # What is wrong with the step itself
    Cause(("bind",), (E.ENOENT,), _unreachable,
          "it does not exist on this machine", "create it, or say optional = true in the template"),
    Cause(("bind",), (E.EACCES,), _unreachable, "you may not enter a directory above it", "namei -l {path}"),
    Cause(("overlay",), (E.EROFS,), _readonly_store, "the store {store} is read-only ({found})", _ELSEWHERE),
    Cause(("overlay",), (E.ENODEV,),
          _if(lambda host: "\toverlay\n" not in (host.read("/proc/filesystems") or "\toverlay\n")),
          "its kernel module is not loaded", "sudo modprobe overlay"),
    Cause(("overlay",), (E.EPERM, E.EINVAL), _if(lambda host: (0, 0) < host.kernel < (5, 11)),
          "Linux {release} has none in user namespaces", "boot Linux 5.11 or newer"),
    Cause(("overlay",), (E.EINVAL, E.EPERM, E.EOPNOTSUPP, E.EIO, E.EREMOTE), _unfit_store,
          "the store {store} lies on {found}, which cannot hold what is written", _ELSEWHERE),
    Cause(("proc", "sysfs"), (E.EPERM,), _covered_proc,
          "{found} is masked by the container around this process, and the kernel allows no view that shows more",
          "start it with --security-opt systempaths=unconfined (Docker), --security-opt unmask=ALL (Podman) "
          "or procMount: Unmasked (Kubernetes)"),
    Cause(("proc",), (E.EPERM,), _if(lambda host: all(mount.type != "proc" for mount in mounts(host))),
          "this process sees no /proc at all", "mount -t proc proc /proc as root of this machine or container"),
    Cause(("pivot_root",), (E.EINVAL,),
          _if(lambda host: any(mount.type == "rootfs" and mount.point == "/" for mount in mounts(host))),
          "/ is the initial ramfs, which cannot be left", "boot with a root file system of its own"),
    Cause(("newuidmap", "newgidmap"), (), _no_range, "{found}", "{range}", True),
    Cause(("exec",), (E.ENOENT,), lambda host, path: "" if path and "/" not in path else None,
          "there is no such command in this environment", "add the package that has it to [root] packages"),
    # Those who forbid what the kernel would allow. A filter answers EPERM to unshare; AppArmor answers EACCES, or lets
    # it pass and takes the capabilities away, so that the maps or the first mount fail.
    Cause(_UNSHARE, _FILTERED, _if(lambda host: _status(host, "Seccomp") == 2), _SECCOMP, "{unconfined}"),
    Cause(_ENTER, _PERM, _if(_apparmor_restricts),
          "AppArmor takes the rights away (kernel.apparmor_restrict_unprivileged_userns is 1)", "{apparmor}", True),
    Cause(_LATER, _PERM, _profile, "the AppArmor profile of this process forbids it: {found}",
          "add to that profile: userns, capability, mount, umount, pivot_root,"),
    Cause(_LATER, _FILTERED, _if(lambda host: _status(host, "Seccomp") == 2), _SECCOMP, "{unconfined}"),
    Cause(_ENTER, (E.EACCES,), _if(lambda host: _number(host, "/sys/fs/selinux/enforce") == 1), "SELinux forbids it",
          "sudo ausearch -m avc -ts recent | audit2allow -M devns && sudo semodule -i devns.pp"),
    Cause(_UNSHARE, (E.ENOSPC,), _if(_is_nested),
          "the container or environment around this process allows no more of them", "run devns outside of it"),
)

# What an errno means where none of those is seen: for one op, then for any mount, then for any op.
ANSWERS: dict[tuple[str, int], tuple[str, str | None]] = {
    ("unshare", E.ENOSPC): ("the limit of namespaces is reached, or they are nested 32 deep", "lsns -t user"),
    ("uid_map", E.EPERM): ("without newuidmap only your own uid can be mapped", '[user] map = "single"'),
    ("gid_map", E.EPERM): ("without newgidmap only your own gid can be mapped", '[user] map = "single"'),
    ("uid_map", E.EINVAL): ("its rows overlap, or are more than 340", "man 7 user_namespaces"),
    ("gid_map", E.EINVAL): ("its rows overlap, or are more than 340", "man 7 user_namespaces"),
    ("overlay", E.ENOENT): ("one of its directories is gone", "devns build"),
    ("overlay", E.EBUSY): ("its upper directory is in use by another environment", "devns list"),
    ("overlay", E.ESTALE): ("its layers are not those that it was made on", "devns remove it, then start anew"),
    ("bind", E.EINVAL): ("what is mounted beneath it must come along", "bind it with what is beneath it"),
    ("dev", E.ENODEV): ("it is not the device of that name on this machine", "ls -l {path}"),
    ("seccomp", E.EINVAL): ("this kernel is built without seccomp filters", "boot one with CONFIG_SECCOMP_FILTER=y"),
    ("clock", E.ERANGE): ("a clock would be negative, or too far in the future", "choose a smaller offset"),
    ("rlimit", E.EPERM): ("it is above the hard limit of this session", "ulimit -H -a"),
    ("exec", E.ENOENT): ("there is no such file in this environment, or its interpreter is missing", None),
    ("exec", E.EACCES): ("it is not an executable file, or lies on a noexec mount", "chmod +x {path}"),
    ("exec", E.ENOEXEC): ("it is neither a program for this machine ({machine}) nor a script with a #! line", None),
    ("exec", E.E2BIG): ("its arguments and environment are too long", "getconf ARG_MAX"),
    ("cwd", E.ENOENT): ("there is no such directory inside", "start devns elsewhere, or mount it"),
    ("cwd", E.EACCES): ("who you are inside may not go there", "devns run --workdir / ..."),
    ("newuidmap", E.EPERM): ("newuidmap refuses it, although it has its rights and /etc/subuid its row", None),
    ("fork", E.EAGAIN): ("too many processes are running as you", "ulimit -u"),
    ("account", E.EROFS): ("its root cannot be written: on a full disk overlayfs is read-only", "df -h {store}"),
    ("mount", E.EROFS): ("its mount point is missing, and devns creates nothing on the host", "create it yourself"),
    ("mount", E.ELOOP): ("a symbolic link is in the way, and it is not followed here", "name what it leads to"),
    ("mount", E.ENOTDIR): ("a file is where a directory must be, or the other way round", None),
    ("mount", E.ENOSPC): ("no space is left, or there are more mounts than fs.mount-max", "df -h {store}"),
    ("", E.ENOENT): ("there is no such file or directory", None),
    ("", E.EMFILE): ("too many files are open in this process", "ulimit -n 1024"),
    ("", E.ENFILE): ("too many files are open on this machine", "sudo sysctl -w fs.file-max=1000000"),
    ("", E.ENOMEM): ("there is not enough memory", "free -h"),
    ("", E.ENOSPC): ("no space is left", "df -h {store}"),
    ("", E.EDQUOT): ("your disk quota is used up", "quota -s"),
    ("", E.EROFS): ("the file system is read-only", None),
    ("", E.EIO): ("the file system or its disk is damaged", "sudo dmesg | tail"),
    ("", E.ENOSYS): ("this kernel has no such call", "boot Linux 5.11 or newer"),
    ("", E.EPERM): ("the kernel refuses it (EPERM), and nothing that can be read says why", "devns check"),
    ("", E.EACCES): ("the kernel refuses it (EACCES), and nothing that can be read says why", "devns check"),
}

# What a step was about; the part in brackets only where it has a path.
_DOING = {
    "launch": "start the environment", "fork": "start a process", "unshare": "make the namespaces",
    "setgroups": "give up supplementary groups", "uid_map": "map the ids", "gid_map": "map the group ids",
    "newuidmap": "map a range of user ids", "newgidmap": "map a range of group ids",
    "identity": "become who you are inside", "scratch": "find a place for the new root",
    "overlay": "mount an overlay[ on {path}]", "tmpfs": "mount a tmpfs[ on {path}]", "proc": "mount a fresh /proc",
    "sysfs": "mount a fresh /sys", "mqueue": "mount the message queues", "dev": "make a fresh /dev",
    "file": "place the file[ {path}]", "directory": "make the directory[ {path}]",
    "symlink": "make the symbolic link[ {path}]", "account": "add you to /etc/passwd",
    "readonly": "make a mount read-only", "pivot_root": "change the root", "cwd": "start in[ {path}]",
    "hostname": "set the host name", "clock": "shift the clocks", "loopback": "bring up the loopback device",
    "no-user-namespaces": "switch off user namespaces inside", "capabilities": "drop capabilities",
    "seccomp": "install the seccomp filter", "terminal": "open a terminal inside",
    "rlimit": "set the resource limit[ {path}]", "exec": "run[ {path}]",
}
# fmt: on


def _words(host: Host, found: str, path: str | None) -> dict[str, str]:
    """What clauses and remedies may name."""
    why = _why_no_range(host)
    return {
        "found": found,
        "path": shlex.quote(escape(path or "it")),
        "store": shlex.quote(escape(host.store)),
        "release": host.release,
        "machine": host.machine,
        "unconfined": _unconfined(host),
        "apparmor": apparmor_profile(host.which("devns")),
        "range": why[1] if why else "",
    }


def _unconfined(host: Host) -> str:
    if host.kind("/.dockerenv"):
        return "docker run --security-opt seccomp=unconfined --security-opt systempaths=unconfined"
    if host.kind("/run/.containerenv"):
        return "podman run --security-opt seccomp=unconfined --security-opt unmask=ALL"
    if "KUBERNETES_SERVICE_HOST" in host.environ:
        return "in the pod's securityContext: seccompProfile.type: Unconfined and procMount: Unmasked"
    return "run devns outside of it, or allow it there (systemd: RestrictNamespaces=no; devns: [user] nested = true)"


def apparmor_profile(program: str | None) -> str:
    """The commands that let `program`, and what it starts, use user namespaces under AppArmor 4."""
    if program is None or not program.isprintable() or set(program) & set('"\\*?[]{}^@,'):
        program = "/usr/local/bin/devns"
    file, head = "/etc/apparmor.d/devns", "abi <abi/4.0>,\ninclude <tunables/global>\n"
    profile = f'{head}profile devns "{program}" flags=(unconfined) {{\n  userns,\n}}\n'
    return f"sudo tee {file} <<'EOF'\n{profile}EOF\nsudo apparmor_parser -r {file}"


# --- newuidmap: subuid(5), newuidmap(1) -------------------------------------------------------------------------------

RANGE = 65536  # a Debian root's ids: nobody is 65534
_KINDS: tuple[Literal["uid", "gid"], ...] = ("uid", "gid")


def _why_no_helper(host: Host) -> tuple[str, str] | None:
    """The clause and the remedy where newuidmap cannot map anything."""
    for name in ("newuidmap", "newgidmap") if host.uid else ():  # root writes the map without their help
        path = host.which(name)
        if path is None:
            clause = f"{name} is in no directory of PATH that only root can change"
            return clause, install(host, "uidmap", fedora="shadow-utils", arch="shadow", alpine="shadow-uidmap")
        status, said = host.stat(path), shlex.quote(escape(path))
        if not (status and status.st_mode & stat.S_ISUID) and host.xattr(path, "security.capability") is None:
            return f"{said} is neither set-user-ID root nor has it capabilities", f"sudo chmod u+s {said}"
        mount = mount_of(host, path)
        if mount and "nosuid" in mount.options:
            point = shlex.quote(escape(mount.point))
            return f"{said} lies on a nosuid mount ({point})", f"sudo mount -o remount,suid {point}"
    if host.uid and _status(host, "NoNewPrivs"):
        clause = "no_new_privs is set on this process, so newuidmap gains no rights"
        return clause, "run devns outside of the sandbox or service around it"
    rows = _uid_map(host)
    if rows and all(row[0] != 0 for row in rows):
        clause = "the user namespace around this process has no root, so newuidmap gains no rights"
        return clause, "run devns outside of the sandbox around it"
    return None


def _why_no_range(host: Host) -> tuple[str, str] | None:
    """The clause and the remedy where a range of ids cannot be mapped."""
    why = _why_no_helper(host)
    if why:
        return why
    row = _free_row(host)
    for kind in _KINDS:
        own = host.subordinate(kind)
        if own is None or own[1] < RANGE:
            few = f"only {own[1]}" if own else "no"
            clause = f"/etc/sub{kind} gives you {few} {kind}s, and {RANGE} are needed"
            return clause, f"echo {shlex.quote(row)} | sudo tee -a /etc/subuid /etc/subgid"
        for other, first, count in _subordinates(host, kind):
            if other not in (host.user, str(host.uid)) and first < own[0] + own[1] and own[0] < first + count:
                clause = f"/etc/sub{kind} gives some of your {kind}s to {escape(other)} too"
                return clause, f"sudoedit /etc/sub{kind}, and make your row there {escape(row)}"
    return None


def _subordinates(host: Host, kind: str) -> list[tuple[str, int, int]]:
    rows = [line.split(":") for line in (host.read(f"/etc/sub{kind}", limit=1 << 24) or "").splitlines()]
    return [(row[0], int(row[1]), int(row[2])) for row in rows if len(row) == 3 and (row[1] + row[2]).isdecimal()]


def _free_row(host: Host) -> str:
    """A row for the user of ids that are free in both files."""
    taken = [first + count for kind in _KINDS for _, first, count in _subordinates(host, kind)]
    return f"{host.user}:{max([100000, *taken])}:{RANGE}"


# --- questions --------------------------------------------------------------------------------------------------------

_MISSING = {
    "userns": ("unshare", "no user namespaces"),
    "nested": ("unshare", "no user namespaces inside of user namespaces"),
    "mount": ("tmpfs", "no mounts in user namespaces"),
    "proc": ("proc", "no fresh /proc"),
    "overlay": ("overlay", "no overlay file system in user namespaces"),
    "range": ("newuidmap", "no range of user ids"),
    "seccomp": ("seccomp", "no seccomp filters"),
    "tun": ("tun", "no tap devices"),
}


def explain(op: str, errno: int, path: str | None, host: Host) -> tuple[str, str | None]:
    """The sentence and the hint for a step that failed: `op` as in the Plan or the call's name, `path` its operand.

    Never a bare strerror: where no cause can be seen, the sentence says so.
    """
    head, _, tail = _DOING.get(op, f"{op}[ {{path}}]").partition("[")
    doing = head + (tail.rstrip("]").format(path=escape(path)) if path is not None else "")
    clause, remedy = _cause(op, errno, path, host) or _answer(op, errno, path, host)
    return f"cannot {doing}: {clause}", remedy


def problem(capability: str, host: Host, errno: int | None, *, op: str | None = None) -> Problem | None:
    """Why there is no `capability`: "userns", "nested", "mount", "proc", "overlay", "seccomp" or a kind of namespace.

    `errno` is what trying it gave, at the step `op` if not at its own: then there always is an answer. With None
    nothing was tried, and a Problem is what reading alone makes sure; no Problem promises nothing.
    """
    usual, prefix = _MISSING.get(capability, ("unshare", f"no {capability} namespaces"))
    operand = {"userns": "user", "nested": "user"}.get(capability, capability if capability in NAMESPACES else None)
    said = _cause(op or usual, errno, operand, host)
    if said is None and errno is not None:
        said = _answer(op or usual, errno, operand, host)
    return Problem(capability, f"{prefix}: {said[0]}", said[1]) if said else None


def range_problem(host: Host) -> Problem | None:
    """Why newuidmap cannot map a range of ids; None where nothing stands in its way. The single map is left."""
    why = _why_no_range(host)
    return Problem("range", f"no range of user ids: {why[0]}", why[1], fatal=False) if why else None


def maps_subordinates(host: Host) -> bool:
    """Can all ids be mapped that this host grants the user, be they fewer than a root needs?"""
    return bool(host.subordinate("uid") and host.subordinate("gid") and not _why_no_helper(host))


def tun_problem(host: Host) -> Problem | None:
    """Why pasta and slirp4netns cannot make their network device; None where they can."""
    status = host.stat(TUN)
    if status is None:
        return Problem("tun", f"no tap devices: {TUN} does not exist", "sudo modprobe tun", fatal=False)
    if not host.access(TUN, os.R_OK | os.W_OK):
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        return Problem("tun", f"no tap devices: {TUN} is {mode} and not yours", f"sudo chmod 0666 {TUN}", fatal=False)
    return None


def _cause(op: str, errno: int | None, path: str | None, host: Host) -> tuple[str, str | None] | None:
    for cause in CAUSES:
        fits = cause.certain if errno is None else not cause.errnos or errno in cause.errnos
        found = cause.found(host, path) if fits and op in cause.ops else None
        if found is not None:
            return _said(cause.clause, cause.remedy, host, path, found)
    return None


def _answer(op: str, errno: int, path: str | None, host: Host) -> tuple[str, str | None]:
    for key in (op, "mount" if op in _MOUNTS else "", ""):
        if (key, errno) in ANSWERS:
            return _said(*ANSWERS[key, errno], host, path)
    return f"{os.strerror(errno).lower()} ({E.errorcode.get(errno, errno)})", None


def _said(clause: str, remedy: str | None, host: Host, path: str | None, found: str = "") -> tuple[str, str | None]:
    words = _words(host, found, path)
    return clause.format(**words), remedy.format(**words) if remedy else None


# --- trying -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """What trying one capability showed: `detail` says how it works or why it does not, `remedy` what mends it."""

    id: str
    works: bool
    detail: str
    remedy: str | None = None


# What is tried, in this order, and what it shows where it works.
_TRIED = {
    "userns": "your own id mapped, without a helper",
    **dict.fromkeys(("pid", "ipc", "uts", "net", "cgroup"), "an own one"),
    "time": "an own boot clock",
    "mount": "a tmpfs inside",
    "proc": "a fresh one inside",
    "overlay": "with userxattr, upper directory in the store",
    "nested": "one inside of another",
    "range": f"{RANGE} ids mapped by newuidmap",
    "seccomp": "an own filter",
    "tun": TUN,
}
_ALONE = ("seccomp", "tun")  # these need no user namespace
_READ = {"range": range_problem, "tun": tun_problem}  # what reading says is said first: it knows the reason


def probe(host: Host, scratch: str) -> dict[str, Fact]:
    """Try what devns needs or can use, each thing in a forked child of its own; what works and what does not, by id.

    `host` is this machine; `scratch` a directory in the store, left as it was found. A thing that does not work is a
    Fact, never an exception; that nothing can be written to `scratch` is one too.
    """
    import shutil  # these two here, because every command imports this module and few try anything
    import tempfile

    facts: dict[str, Fact] = {}
    try:
        work = tempfile.mkdtemp(prefix="probe-", dir=scratch)
        facts["space"] = _space_fact(host, scratch)
    except OSError as error:
        work = tempfile.mkdtemp(prefix="probe-")
        why = f"nothing can be written to {escape(scratch)}: {_answer('', error.errno or E.EIO, scratch, host)[0]}"
        facts |= {name: Fact(name, False, why, _ELSEWHERE) for name in ("space", "overlay")}
    try:
        tries = _Tries(host, work)
        for name, detail in _TRIED.items():
            facts[name] = facts[name] if name in facts else tries.fact(name, detail, facts.get("userns"))
        facts["engine"] = tries.engine_fact(facts["net"])
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.chmod(f"{work}/work/work", 0o700)  # the kernel leaves it at mode 0
        shutil.rmtree(work)
    for name, package in {"pasta": "passt", "slirp4netns": "slirp4netns"}.items():
        facts[name] = _network_fact(host, name, package, facts["tun"])
    return {**facts, "limits": limits_fact(host)}


class _Failed(Exception):
    """A call of a try that the kernel refused."""

    def __init__(self, op: str, errno: int) -> None:
        super().__init__(op, errno)
        self.op, self.errno = op, errno


@contextlib.contextmanager
def _step(op: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Failed(op, error.errno or E.EIO) from None


class _Tries:
    """What the children do, a method for each capability. `work` is an empty directory."""

    def __init__(self, host: Host, work: str) -> None:
        from devns import linux  # here, because only who tries needs ctypes

        self.host, self.work, self.linux = host, work, linux

    def fact(self, name: str, detail: str, userns: Fact | None) -> Fact:
        if userns and not userns.works and name not in _ALONE:
            return Fact(name, False, userns.detail, userns.remedy)
        why = _READ[name](self.host) if name in _READ else None
        own: Callable[[], object] = getattr(self, f"_{name}", lambda: self._enter(name))
        if why is None and (failed := _in_child(own)):
            why = problem(name, self.host, failed[1], op=failed[0])
        return Fact(name, False, why.message, why.remedy) if why else Fact(name, True, detail)

    def engine_fact(self, net: Fact) -> Fact:
        """The built-in network engine carries the network of a child for a moment, as it does in a launch."""
        if not net.works:
            return Fact("engine", False, net.detail, net.remedy)
        from importlib import import_module

        from devns.launch import Child

        engine = import_module("devns_network.engine")  # an effect, found by its name as in a launch
        (entered, enter), (ended, end) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(end)
                self._enter("net")
                os.write(enter, b"!")
                os.read(ended, 1)
            finally:
                os._exit(0)
        os.close(enter)
        try:
            os.read(entered, 1)
            with engine.hold({"publish": [], "host_loopback": [], "allow": None, "deny": []}, Child(pid, _ignore)):
                return Fact("engine", True, "an own network, without a helper")
        except engine.NotHere as error:
            return Fact("engine", False, str(error), "sudo modprobe -a veth nf_tables nft_tproxy")
        finally:
            os.close(entered)
            os.close(end)
            os.close(ended)
            with contextlib.suppress(ChildProcessError):  # the caller ignores SIGCHLD
                os.waitpid(pid, 0)

    def _enter(self, *names: str, maps: bool = True) -> None:
        """Into a new user namespace with those others; what is mounted there stays there."""
        linux = self.linux
        flags = [linux.CLONE_NEWNS if name == "mount" else getattr(linux, f"CLONE_NEW{name.upper()}") for name in names]
        with _step("unshare"):
            linux.unshare(sum(flags, linux.CLONE_NEWUSER))
        rows = {"setgroups": "deny", "uid_map": f"{self.host.uid} {self.host.uid} 1"}
        rows["gid_map"] = f"{self.host.gid} {self.host.gid} 1"  # after setgroups: user_namespaces(7)
        for file, text in rows.items() if maps else ():
            with _step(file):
                _write(f"/proc/self/{file}", text)
        if "mount" in names:
            with _step("mount"):
                linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)

    def _userns(self) -> None:
        self._enter()

    def _nested(self) -> None:
        self._enter()
        self._enter()

    def _mount(self) -> None:
        self._enter("mount")
        with _step("tmpfs"):
            self.linux.mount("tmpfs", self.work, "tmpfs")
            _write(f"{self.work}/file", "")

    def _proc(self) -> None:
        def mount() -> None:
            with _step("proc"):
                self.linux.mount("proc", self.work, "proc")

        self._enter("mount", "pid")
        _again(mount)

    def _overlay(self) -> None:
        self._enter("mount")
        with _step("overlay"):
            os.chdir(self.work)  # relative names: a comma or a colon of the path would separate options
            for name in ("lower/old/file", "upper", "work", "merged"):
                os.makedirs(name)
            options = "lowerdir=lower,upperdir=upper,workdir=work,userxattr"
            self.linux.mount("overlay", "merged", "overlay", 0, options)
            # What replaces a lower directory is marked by an extended attribute, or the old files would show through.
            os.rmdir("merged/old/file")
            os.rmdir("merged/old")
            os.mkdir("merged/old")
            if os.listdir("merged/old"):
                raise OSError(E.EOPNOTSUPP, "")

    def _time(self) -> None:
        def shifted() -> None:
            if time.clock_gettime(time.CLOCK_BOOTTIME) < boot + 86400:
                raise _Failed("clock", E.EIO)

        self._enter("time")
        boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        with _step("clock"):
            _write("/proc/self/timens_offsets", "boottime 86400 0")
        _again(shifted)

    def _seccomp(self) -> None:
        with _step("seccomp"):
            self.linux.prctl(self.linux.PR_SET_NO_NEW_PRIVS, 1)
            self.linux.seccomp_set_filter(struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000))  # return SECCOMP_RET_ALLOW

    def _tun(self) -> None:
        with _step("tun"):
            os.close(os.open(TUN, os.O_RDWR | os.O_CLOEXEC))

    def _range(self) -> None:
        """newuidmap(1) is asked by the parent of the process whose map it writes, which then becomes a mapped id."""
        (entered, enter), (mapped, map_) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(map_)
                self._enter(maps=False)
                os.write(enter, b"!")
                os.read(mapped, 1)
                os.setresgid(1, 1, 1)
                os.setresuid(1, 1, 1)
                status = 0
            finally:
                os._exit(status)
        os.close(enter)
        if not os.read(entered, 1):
            raise _Failed("unshare", E.EPERM)
        refused = 0
        for kind in _KINDS:
            own = self.host.uid if kind == "uid" else self.host.gid
            first, count = self.host.subordinate(kind) or (0, 0)
            if self.host.uid == 0:
                with _step("newuidmap"):
                    _write(f"/proc/{pid}/{kind}_map", f"0 {own} 1\n1 {first} {count}")
                continue
            argv = [self.host.which(f"new{kind}map") or "", str(pid), *f"0 {own} 1 1 {first} {count}".split()]
            quiet = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (1, 2)]
            helper = os.posix_spawn(argv[0], argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, file_actions=quiet)
            refused = refused or os.waitpid(helper, 0)[1]
        os.close(map_)
        if os.waitpid(pid, 0)[1] or refused:
            raise _Failed("newuidmap", E.EPERM)


def _ignore(text: str) -> None:
    """For who has nothing to tell the user."""


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _in_child(attempt: Callable[[], object], *, seconds: float = 10) -> tuple[str | None, int] | None:
    """Run `attempt` in a forked child: None where it went well, else the op (None: its own) and the errno."""
    heard, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        verdict = ""
        try:
            os.umask(0o077)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would leave nothing to wait for
            attempt()
            verdict = "works"
        except _Failed as failure:
            verdict = f"{failure.op} {failure.errno}"
        except BaseException as bug:
            verdict = f"bug {bug!r}"
        finally:
            os.write(said, verdict.encode())
            os._exit(0)
    os.close(said)
    ear = select.poll()
    ear.register(heard, select.POLLIN)
    ready = ear.poll(seconds * 1000)
    words = os.read(heard, 4096).decode(errors="replace") if ready else ""
    os.close(heard)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    try:
        status = os.waitpid(pid, 0)[1]
    except ChildProcessError:  # the caller ignores SIGCHLD, so the kernel has reaped it
        status = 0
    op, _, rest = words.partition(" ")
    if op == "bug":
        raise RuntimeError(f"while trying: {rest}")
    if not op:  # a filter may kill instead of refusing
        return None, E.EPERM if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS else E.ETIMEDOUT
    return None if op == "works" else (op, int(rest))


def _again(attempt: Callable[[], object]) -> None:
    """In a child of the child: only those are in its new pid or time namespace."""
    failed = _in_child(attempt)
    if failed:
        raise _Failed(failed[0] or "fork", failed[1])


def _network_fact(host: Host, name: str, package: str, tun: Fact) -> Fact:
    path = host.which(name)
    if path is None:
        return Fact(name, False, f"{name} is in no directory of PATH that only root can change", install(host, package))
    return Fact(name, tun.works, path if tun.works else tun.detail, tun.remedy)


def _space_fact(host: Host, scratch: str) -> Fact:
    disk, mount = os.statvfs(scratch), mount_of(host, scratch)
    free = disk.f_bavail * disk.f_frsize
    enough = free >= 1 << 30 and (disk.f_favail >= 50_000 or not disk.f_files)  # btrfs counts no inodes
    detail = f"{free / (1 << 30):.1f} GiB and {disk.f_favail} inodes free on {mount.type if mount else 'the store'}"
    return Fact("space", enough, detail, None if enough else _ELSEWHERE)


def limits_fact(host: Host) -> Fact:
    """Whether cgroups that this process is in are the user's own to divide, of version 2 or 1. cgroups(7)"""
    groups = [mount for mount in mounts(host) if mount.type in ("cgroup", "cgroup2")]
    own: list[str] = []
    for line in (host.read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for mount in groups:
            directory, files, offered = mount.point + path.rstrip("/"), [".", "cgroup.procs"], controllers.split(",")
            if mount.type == "cgroup2" and not controllers:
                files.append("cgroup.subtree_control")
                offered = (host.read(f"{directory}/cgroup.controllers") or "").split()
            elif mount.type == "cgroup2" or not mount.features.issuperset(offered) or controllers.startswith("name="):
                continue
            if all(host.access(f"{directory}/{file}", os.W_OK) for file in files):
                own += offered
    if own:
        return Fact("limits", True, f"your own cgroup: {', '.join(own)}")
    why = "every cgroup of this process is root's" if groups else "no cgroups are mounted"
    remedy = "systemd-run --user --scope -p Delegate=yes $SHELL"  # version 1 has nothing like it
    offers = [mount for mount in groups if (host.read(f"{mount.point}/cgroup.controllers") or "").strip()]
    return Fact("limits", False, why, remedy if offers else None)
