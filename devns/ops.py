"""The inside ops: for each a maker, which says what it does, and next to it its `apply`, which does it.

A maker returns a step, one line of a Plan. init applies the inside steps in the Plan's order, in the new mount
namespace, before it pivots. An apply that needs something of the host has an `open` as a third neighbour: all of those
run first, while the host's tree is still there to be seen, so that what is opened cannot be covered by what is mounted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from devns import linux

Step = dict[str, Any]
Opened = list[int]

_PLAIN = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV
_STRICT = _PLAIN | linux.MOUNT_ATTR_NOEXEC


def _step(op: str, *, default: bool = False, **fields: Any) -> Step:
    return {"op": op, **fields, **({"default": True} if default else {})}


class NewRoot:
    """The root that init is building: its descriptor, and which mounts in it are ours to create mount points in.

    A mount point is made only in a mount that a step made for this environment (an overlay with an upper directory, a
    tmpfs): never in a bind of the host, where it would stay behind.
    """

    def __init__(self, scratch: str) -> None:
        self.scratch = scratch  # an empty tmpfs of ours, gone after the pivot
        self.fd = -1
        self.ours: set[int] = set()
        self.readonly: list[int] = []  # mounts that become read-only when every mount point exists
        self._files = 0

    def adopt(self, mount_fd: int) -> None:
        self.ours.add(linux.mount_id(mount_fd))

    def attach(self, mount_fd: int, dst: str, *, directory: bool = True, symlinks: bool = True) -> None:
        """Mount what `mount_fd` holds on `dst` of the new root; on "/" it becomes the new root."""
        if dst != "/":
            target = self.target(dst, directory=directory, symlinks=symlinks)
            linux.move_mount(mount_fd, target)
            os.close(target)
            return
        base = os.open(self.scratch_directory("root"), os.O_PATH | os.O_CLOEXEC)
        linux.move_mount(mount_fd, base)
        os.close(base)
        self.fd = mount_fd

    def scratch_directory(self, name: str) -> str:
        path = f"{self.scratch}/{name}"
        os.mkdir(path, 0o755)
        return path

    def scratch_file(self, text: str, mode: int) -> str:
        self._files += 1
        path = f"{self.scratch}/file{self._files}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(fd, "wb") as file:
            file.write(text.encode())
        return path

    def target(self, path: str, *, directory: bool, symlinks: bool = True, depth: int = 0) -> int:
        """An O_PATH descriptor of `path` in the new root, created where it is missing and the mount is ours."""
        try:
            return linux.resolve_in(self.fd, path, symlinks=symlinks)
        except FileNotFoundError:
            if depth > 40 or path in ("", "/"):
                raise
        above, _, name = path.rstrip("/").rpartition("/")
        parent = self.target(above or "/", directory=True, symlinks=symlinks, depth=depth + 1)
        try:
            link = _link(name, parent)
            if link is not None and symlinks:  # it dangles: what it names is created, still inside the root
                path = link if link.startswith("/") else f"{above}/{link}"
                return self.target(path, directory=directory, depth=depth + 1)
            if linux.mount_id(parent) not in self.ours:
                raise OSError(errno.EROFS, "would have to be created on the host", path)
            if directory:
                os.mkdir(name, 0o755, dir_fd=parent)
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                os.close(os.open(name, flags, 0o644, dir_fd=parent))
            return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        finally:
            os.close(parent)


def _link(name: str, parent: int) -> str | None:
    """Where the symbolic link `name` leads to, None where it is none."""
    try:
        return os.readlink(name, dir_fd=parent)
    except OSError:
        return None


# --- what a Plan folds into its own fields; nothing is applied -------------------------------------------------------


def namespace(name: str) -> Step:
    """An own namespace of this kind: pid, ipc, uts, cgroup, net or time. user and mount are always there."""
    return _step("namespace", name=name)


def setenv(name: str, value: str, *, default: bool = False) -> Step:
    """A variable in the environment of what runs inside."""
    return _step("setenv", name=name, value=value, default=default)


def rlimit(name: str, soft: int, hard: int, *, default: bool = False) -> Step:
    """A resource limit, named as in getrlimit(2) in lower case: "nproc", "nofile". Never raised above the caller's."""
    return _step("rlimit", name=name, soft=soft, hard=hard, default=default)


def cwd(path: str, *, default: bool = False) -> Step:
    """Where what runs inside starts."""
    return _step("cwd", path=path, default=default)


def note(text: str) -> Step:
    """One line said to the user at the start."""
    return _step("note", text=text)


def outside(effect: str, **arguments: Any) -> Step:
    """A plugin's own effect, `module:function`: a context manager that the parent holds while the payload runs."""
    return _step(effect, **arguments)


# --- bind: mount(2), open_tree(2) -------------------------------------------------------------------------------------


def bind(
    src: str,
    dst: str,
    *,
    readonly: bool = True,
    recursive: bool = True,
    optional: bool = False,
    own: bool = False,
    canonical: bool = False,
    default: bool = False,
) -> Step:
    """The host's file or directory `src` at `dst`; with `dst="/"` it is the root itself.

    `optional`: nothing happens where `src` does not exist. `own`: it belongs to this environment alone (its home, its
    root), so mount points may be made in it. `canonical`: `src` has no symbolic link in it, and where one is found it
    was put there since the Plan was made, which is refused. Set-user-ID bits and device files mean nothing beneath it.
    """
    extra = {key: True for key, said in (("optional", optional), ("own", own), ("canonical", canonical)) if said}
    return _step("bind", dst=dst, src=src, readonly=readonly, recursive=recursive, default=default, **extra)


def open_bind(step: Step) -> Opened:
    try:
        if not step.get("canonical"):
            return [linux.clone_tree(step["src"], recursive=step["recursive"])]
        source = _open_canonical(step["src"])
    except FileNotFoundError:
        if step.get("optional"):
            return []
        raise
    try:
        return [linux.clone_tree("", directory=source, recursive=step["recursive"])]
    finally:
        os.close(source)


def apply_bind(step: Step, root: NewRoot, opened: Opened) -> None:
    if not opened:
        return
    (mount_fd,) = opened
    linux.mount_setattr(mount_fd, _PLAIN | (linux.MOUNT_ATTR_RDONLY if step["readonly"] else 0))
    root.attach(mount_fd, step["dst"], directory=stat.S_ISDIR(os.fstat(mount_fd).st_mode))
    if step.get("own"):
        root.adopt(mount_fd)


# --- overlay: overlayfs, Documentation/filesystems/overlayfs.rst ------------------------------------------------------


def overlay(
    dst: str,
    *,
    lower: Sequence[str],
    upper: str | None,
    work: str | None,
    readonly: bool = False,
    volatile: bool = False,
    canonical: bool = False,
    default: bool = False,
) -> Step:
    """The directories `lower` (topmost first) merged at `dst`; writes go to `upper`, or with None to a tmpfs that ends
    with the environment. `work` is an empty directory on the file system of `upper`; both are made where they are
    missing. `volatile` syncs nothing. `canonical`: as with bind, for `lower`."""
    flags = {"readonly": readonly, "volatile": volatile, "canonical": canonical}
    extra = {key: True for key, said in flags.items() if said}
    return _step("overlay", dst=dst, lower=list(lower), upper=upper, work=work, default=default, **extra)


def open_overlay(step: Step) -> Opened:
    for path in (step["upper"], step["work"]) if step["upper"] else ():
        with suppress(FileExistsError):
            os.mkdir(path, 0o755)
    own = [step["upper"], step["work"]] if step["upper"] else []
    return [
        *(_open_canonical(path) if step.get("canonical") else _open_directory(path) for path in step["lower"]),
        *map(_open_directory, own),
    ]


def _open_directory(path: str) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _open_canonical(path: str) -> int:
    root_fd = _open_directory("/")
    try:
        return linux.resolve_in(root_fd, path, symlinks=False)
    finally:
        os.close(root_fd)


def apply_overlay(step: Step, root: NewRoot, opened: Opened) -> None:
    # Layers are named through their descriptors: no path of the user's, with its commas and colons, ever becomes part
    # of an option, and what was opened is what is mounted.
    names = [f"/proc/self/fd/{fd}" for fd in opened]
    if step["upper"]:
        *lower, upper, work = names
        _own(opened[-2])
    else:
        discard = root.scratch_directory(f"discard{len(root.ours)}")
        lower, upper, work = names, f"{discard}/upper", f"{discard}/work"
        os.mkdir(upper, stat.S_IMODE(os.fstat(opened[0]).st_mode))
        os.mkdir(work, 0o700)
    options = [("lowerdir", ":".join(lower)), ("upperdir", upper), ("workdir", work), ("userxattr", None)]
    mount_fd = linux.fsmount("overlay", options + [("volatile", None)] * bool(step.get("volatile")), _PLAIN)
    root.adopt(mount_fd)
    root.attach(mount_fd, step["dst"])
    if step.get("readonly"):
        root.readonly.append(mount_fd)


def _own(fd: int) -> None:
    """The upper directory lends the merged root its owner: that of the root inside, where there is one to be."""
    if os.geteuid() == 0 and os.fstat(fd).st_uid != 0:
        os.chown(f"/proc/self/fd/{fd}", 0, 0)


# --- tmpfs, directory, symlink, file ----------------------------------------------------------------------------------


def tmpfs(dst: str, *, size: int | None = None, mode: int = 0o755, default: bool = False) -> Step:
    """An empty file system in memory; `size` in bytes, half of the machine's memory unless said. tmpfs(5)"""
    return _step("tmpfs", dst=dst, size=size, mode=mode, default=default)


def apply_tmpfs(step: Step, root: NewRoot, opened: Opened) -> None:
    options = {"mode": f"{step['mode']:o}"} | ({"size": str(step["size"])} if step["size"] else {})
    mount_fd = linux.fsmount("tmpfs", options, _PLAIN)
    root.adopt(mount_fd)
    root.attach(mount_fd, step["dst"])


def directory(dst: str, *, mode: int = 0o755, default: bool = False) -> Step:
    """A directory that is there, made where it is missing."""
    return _step("directory", dst=dst, mode=mode, default=default)


def apply_directory(step: Step, root: NewRoot, opened: Opened) -> None:
    os.close(root.target(step["dst"], directory=True))


def symlink(dst: str, target: str, *, default: bool = False) -> Step:
    """A symbolic link that is there, made where nothing is."""
    return _step("symlink", dst=dst, target=target, default=default)


def apply_symlink(step: Step, root: NewRoot, opened: Opened) -> None:
    above, _, name = step["dst"].rpartition("/")
    parent = root.target(above or "/", directory=True)
    try:
        if linux.mount_id(parent) in root.ours:
            os.symlink(step["target"], name, dir_fd=parent)
    except FileExistsError:
        pass
    finally:
        os.close(parent)


def file(dst: str, text: str, *, mode: int = 0o644, optional: bool = False, default: bool = False) -> Step:
    """A read-only file with this content mounted over `dst`. `optional`: only where it need not be made on the host."""
    return _step("file", dst=dst, text=text, mode=mode, default=default, **({"optional": True} if optional else {}))


def apply_file(step: Step, root: NewRoot, opened: Opened) -> None:
    mount_fd = linux.clone_tree(root.scratch_file(step["text"], step["mode"]))
    linux.mount_setattr(mount_fd, _PLAIN | linux.MOUNT_ATTR_RDONLY)
    try:
        root.attach(mount_fd, step["dst"], directory=False)
    except OSError as error:
        if not (step.get("optional") and error.errno == errno.EROFS):
            raise
    finally:
        os.close(mount_fd)


# --- proc, sys, dev ---------------------------------------------------------------------------------------------------
# Their mount points are reached without following symlinks: a root in which /proc leads somewhere else is refused.

_PROC_READONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")
_PROC_MASKED = ("acpi", "asound", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "scsi")


def proc(dst: str = "/proc", *, masked: bool = True) -> Step:
    """A fresh procfs of the own PID namespace; what would show or change the machine is masked or read-only. proc(5)

    A program that makes user namespaces of its own needs `masked=False`: the kernel allows a fresh procfs only where
    the one it can see hides nothing.
    """
    return _step("proc", dst=dst, masked=masked)


def apply_proc(step: Step, root: NewRoot, opened: Opened) -> None:
    mount_fd = linux.fsmount("proc", {}, _STRICT)
    root.attach(mount_fd, step["dst"], symlinks=False)
    for name in _PROC_READONLY if step["masked"] else ():
        try:
            part = linux.clone_tree(name, directory=mount_fd)
        except FileNotFoundError:
            continue
        linux.mount_setattr(part, linux.MOUNT_ATTR_RDONLY)
        _move_onto(part, name, mount_fd)
    for name in _PROC_MASKED if step["masked"] else ():
        _mask(root, mount_fd, name)
    os.close(mount_fd)


def mask(dst: str, *, default: bool = False) -> Step:
    """Nothing to be seen at `dst`: an empty directory, or an empty file, that cannot be written. Absent is fine."""
    return _step("mask", dst=dst, default=default)


def apply_mask(step: Step, root: NewRoot, opened: Opened) -> None:
    _mask(root, root.fd, step["dst"])


def _mask(root: NewRoot, directory_fd: int, path: str) -> None:
    try:
        target = linux.resolve_in(directory_fd, path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return
        raise
    if stat.S_ISDIR(os.fstat(target).st_mode):
        empty = linux.fsmount("tmpfs", {"mode": "555", "size": "4k"}, _STRICT)
    else:
        empty = linux.clone_tree(root.scratch_file("", 0o444))
    linux.mount_setattr(empty, _STRICT | linux.MOUNT_ATTR_RDONLY)
    linux.move_mount(empty, target)
    os.close(empty)
    os.close(target)


def _move_onto(mount_fd: int, name: str, directory_fd: int) -> None:
    target = linux.resolve_in(directory_fd, name, symlinks=False)
    linux.move_mount(mount_fd, target)
    os.close(target)
    os.close(mount_fd)


def sysfs(dst: str = "/sys") -> Step:
    """A read-only sysfs of the own network namespace. Possible only where the network namespace is our own. sysfs(5)"""
    return _step("sysfs", dst=dst)


def apply_sysfs(step: Step, root: NewRoot, opened: Opened) -> None:
    mount_fd = linux.fsmount("sysfs", {}, _STRICT | linux.MOUNT_ATTR_RDONLY)
    root.attach(mount_fd, step["dst"], symlinks=False)
    for name in ("firmware", "dev/block", "fs/selinux"):
        _mask(root, mount_fd, name)
    os.close(mount_fd)


_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_DEV_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}


def dev(dst: str = "/dev") -> Step:
    """A fresh /dev: null zero full random urandom tty from the host, an own pts instance, shm, and the usual links."""
    return _step("dev", dst=dst)


def open_dev(step: Step) -> Opened:
    nodes = []
    for name, number in _DEVICES.items():
        fd = linux.clone_tree(f"/dev/{name}", recursive=False)
        status = os.fstat(fd)
        if not stat.S_ISCHR(status.st_mode) or (os.major(status.st_rdev), os.minor(status.st_rdev)) != number:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), f"/dev/{name}")
        nodes.append(fd)
    return nodes


def apply_dev(step: Step, root: NewRoot, opened: Opened) -> None:
    mount_fd = linux.fsmount("tmpfs", {"mode": "755", "size": "1m"}, _STRICT & ~linux.MOUNT_ATTR_NODEV)
    root.attach(mount_fd, step["dst"], symlinks=False)
    for name, node in zip(_DEVICES, opened, strict=True):
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=mount_fd))
        linux.mount_setattr(node, linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NOEXEC)
        _move_onto(node, name, mount_fd)
    for name, target in _DEV_LINKS.items():
        os.symlink(target, name, dir_fd=mount_fd)
    for name in ("shm", "pts", "mqueue"):
        os.mkdir(name, 0o755, dir_fd=mount_fd)
    _move_onto(linux.fsmount("tmpfs", {"mode": "1777"}, _STRICT), "shm", mount_fd)
    pts = [("newinstance", None), ("ptmxmode", "0666"), ("mode", "0620")]
    _move_onto(linux.fsmount("devpts", pts, _STRICT & ~linux.MOUNT_ATTR_NODEV), "pts", mount_fd)
    os.close(mount_fd)


def mqueue(dst: str = "/dev/mqueue") -> Step:
    """The POSIX message queues of the own IPC namespace. mq_overview(7)"""
    return _step("mqueue", dst=dst)


def apply_mqueue(step: Step, root: NewRoot, opened: Opened) -> None:
    mount_fd = linux.fsmount("mqueue", {}, _STRICT)
    root.attach(mount_fd, step["dst"])
    os.close(mount_fd)


# --- hostname, clock, loopback, userns limit --------------------------------------------------------------------------


def hostname(name: str) -> Step:
    """The name that uname(2) tells, in the own UTS namespace."""
    return _step("hostname", name=name)


def apply_hostname(step: Step, root: NewRoot, opened: Opened) -> None:
    linux.sethostname(step["name"])


def clock(*, boottime: int = 0, monotonic: int = 0) -> Step:
    """Offsets in seconds added to the clocks of the own time namespace. time_namespaces(7)"""
    return _step("clock", boottime=boottime, monotonic=monotonic)


def loopback() -> Step:
    """Bring `lo` up in the own network namespace, and let every user inside listen on every port there."""
    return _step("loopback")


def apply_loopback(step: Step, root: NewRoot, opened: Opened) -> None:
    # SIOCSIFFLAGS, netdevice(7): struct ifreq is a name of 16 bytes and, here, 16 bits of flags.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14x", b"lo", 0x1 | 0x40)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(control, 0x8914, request)
    # Ports below 1024 are kept for root where they stand for the machine: here they stand for nobody. ip-sysctl.rst
    _set_own("net/ipv4/ip_unprivileged_port_start", "0")


def no_user_namespaces() -> Step:
    """Programs inside can make no user namespaces of their own. user_namespaces(7)"""
    return _step("no-user-namespaces")


def apply_no_user_namespaces(step: Step, root: NewRoot, opened: Opened) -> None:
    # In a container where this cannot be written the system call filter alone says no.
    _set_own("user/max_user_namespaces", "0")


def _set_own(name: str, value: str) -> None:
    """Write a sysctl that belongs to an own namespace, for which init still has the capability. In a container
    /proc/sys may be read-only: then it stays as it is."""
    try:
        with open(f"/proc/sys/{name}", "w") as sysctl:
            sysctl.write(value)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.ENOENT):
            raise


# --- account: passwd(5), group(5) -------------------------------------------------------------------------------------


def account(user: str, uid: int, gid: int, home: str, shell: str) -> Step:
    """/etc/passwd and /etc/group of the root know the caller: a line is added where no line has the number."""
    return _step("account", user=user, uid=uid, gid=gid, home=home, shell=shell)


def apply_account(step: Step, root: NewRoot, opened: Opened) -> None:
    user, uid, gid = step["user"], step["uid"], step["gid"]
    _add_line(root, "/etc/passwd", user, uid, f"{user}:*:{uid}:{gid}::{step['home']}:{step['shell']}\n")
    _add_line(root, "/etc/group", user, gid, f"{user}:x:{gid}:\n")


def _add_line(root: NewRoot, path: str, name: str, number: int, line: str) -> None:
    target = root.target(path, directory=False)
    try:
        # What an image put there may be a FIFO, or endless; it is opened through the descriptor that was looked at.
        status = os.fstat(target)
        if not stat.S_ISREG(status.st_mode) or status.st_size > 1 << 20:
            raise OSError(errno.EINVAL, "not an ordinary file of at most 1 MiB", path)
        if linux.mount_id(target) not in root.ours:
            return
        data = _read(target)
        rows = [row.split(b":") for row in data.split(b"\n") if row.count(b":") >= 2]
        if any(row[2] == b"%d" % number for row in rows):
            return  # nothing is to be written: it may be read-only, or its disk full
        fd = os.open(f"/proc/self/fd/{target}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    finally:
        os.close(target)
    while any(row[0] == name.encode() for row in rows):
        name += "_"
    prefix = b"\n" if data and not data.endswith(b"\n") else b""
    with open(fd, "wb", buffering=0) as database:
        database.write(prefix + name.encode() + b":" + line.encode().split(b":", 1)[1])


def _read(target: int) -> bytes:
    with open(os.open(f"/proc/self/fd/{target}", os.O_RDONLY | os.O_CLOEXEC), "rb", buffering=0) as file:
        return file.read(1 << 20) or b""


# --- the table of all this --------------------------------------------------------------------------------------------

Open = Callable[[Step], Opened]
Apply = Callable[[Step, NewRoot, Opened], None]

FOLDED = ("namespace", "setenv", "rlimit", "cwd", "note", "clock")
OPENS: dict[str, Open] = {"bind": open_bind, "overlay": open_overlay, "dev": open_dev}
APPLIES: dict[str, Apply] = {
    "bind": apply_bind,
    "overlay": apply_overlay,
    "tmpfs": apply_tmpfs,
    "directory": apply_directory,
    "symlink": apply_symlink,
    "file": apply_file,
    "proc": apply_proc,
    "mask": apply_mask,
    "sysfs": apply_sysfs,
    "dev": apply_dev,
    "mqueue": apply_mqueue,
    "hostname": apply_hostname,
    "loopback": apply_loopback,
    "no-user-namespaces": apply_no_user_namespaces,
    "account": apply_account,
}


def apply_rlimits(limits: dict[str, list[int]]) -> None:
    """`{"nproc": [soft, hard]}`; a limit never rises above what the caller has."""
    for name, (soft, hard) in limits.items():
        which = getattr(resource, f"RLIMIT_{name.upper()}")
        ceiling = resource.getrlimit(which)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(which, (soft, hard))
