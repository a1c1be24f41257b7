"""Linux: all of ctypes. Syscalls that Python does not have, by their man-page names, and paths reached by descriptor.

Every call raises a plain OSError and explains nothing: who called it knows what it was for.
Numbers and structures are from the kernel's uapi headers, named beside each.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_char_p, c_int, c_long, c_size_t, c_uint, c_uint16, c_uint32, c_uint64, c_ulong, c_void_p
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_AMD64 = os.uname().machine == "x86_64"


def _raise_errno(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _function(name: str, *argtypes: Any) -> Callable[..., int]:
    function = _libc[name]
    function.argtypes, function.errcheck = argtypes, _raise_errno  # type: ignore[assignment]  # ctypes' own stub
    return function


def _syscall(number: int, *argtypes: Any) -> Callable[..., int]:
    function = _libc["syscall"]  # indexing gives a function object of its own each time, with its own argtypes
    function.argtypes, function.errcheck = (c_long, *argtypes), _raise_errno  # type: ignore[assignment]
    function.restype = c_long
    return lambda *arguments: int(function(number, *arguments))


# --- namespaces: <linux/sched.h>, unshare(2), setns(2) ----------------------------------------------------------------

CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

unshare = _function("unshare", c_int)
setns = _function("setns", c_int, c_int)
_sethostname = _function("sethostname", c_char_p, c_size_t)


def sethostname(name: str) -> None:
    raw = name.encode()
    _sethostname(raw, len(raw))


# --- mounts: <linux/mount.h>, mount(2), open_tree(2), fsopen(2), move_mount(2), mount_setattr(2) ---------------------

MS_REC = 0x4000
MS_SLAVE = 0x80000
MNT_DETACH = 2
MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6

_mount = _function("mount", c_char_p, c_char_p, c_char_p, c_ulong, c_char_p)
_umount2 = _function("umount2", c_char_p, c_int)
_pivot_root = _syscall(155 if _AMD64 else 41, c_char_p, c_char_p)
_open_tree = _syscall(428, c_int, c_char_p, c_uint)
_move_mount = _syscall(429, c_int, c_char_p, c_int, c_char_p, c_uint)
_fsopen = _syscall(430, c_char_p, c_uint)
_fsconfig = _syscall(431, c_int, c_uint, c_char_p, c_char_p, c_int)
_fsmount = _syscall(432, c_int, c_uint, c_uint)
_mount_setattr = _syscall(442, c_int, c_char_p, c_uint, c_void_p, c_size_t)


class _MountAttr(ctypes.Structure):
    _fields_ = [("set", c_uint64), ("clear", c_uint64), ("propagation", c_uint64), ("userns_fd", c_uint64)]


def _encode(path: str | bytes | None) -> bytes | None:
    return None if path is None else os.fsencode(path)


def mount(source: str | None, target: str, fstype: str | None = None, flags: int = 0, data: str | None = None) -> None:
    _mount(_encode(source), _encode(target), _encode(fstype), flags, _encode(data))


def umount2(target: str, flags: int = 0) -> None:
    _umount2(_encode(target), flags)


def pivot_root(new_root: str, put_old: str) -> None:
    _pivot_root(_encode(new_root), _encode(put_old))


def fsmount(
    fstype: str, options: Mapping[str, str | None] | Sequence[tuple[str, str | None]] = (), attr: int = 0
) -> int:
    """A new file system as a detached mount: its descriptor. An option whose value is None is a flag."""
    context = _fsopen(fstype.encode(), 1)  # FSOPEN_CLOEXEC
    try:
        for key, value in options.items() if isinstance(options, Mapping) else options:
            if value is None:
                _fsconfig(context, _FSCONFIG_SET_FLAG, key.encode(), None, 0)
            else:
                _fsconfig(context, _FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)
        _fsconfig(context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _fsmount(context, 1, attr)  # FSMOUNT_CLOEXEC
    finally:
        os.close(context)


def clone_tree(path: str | bytes, *, directory: int = AT_FDCWD, recursive: bool = True) -> int:
    """What is mounted at `path` (and, `recursive`, beneath it) as a detached copy: its descriptor.

    In a new user namespace the copy of a tree with mounts below it must be recursive, or it would uncover what
    those mounts hide: the kernel answers EINVAL.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (AT_RECURSIVE if recursive else 0) | (0 if path else AT_EMPTY_PATH)
    return _open_tree(directory, _encode(path), flags)


def mount_setattr(mount_fd: int, attr: int, *, recursive: bool = True) -> None:
    """Add attributes to the mount behind `mount_fd`; none is ever taken away."""
    request = _MountAttr(set=attr)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _mount_setattr(mount_fd, b"", flags, ctypes.byref(request), ctypes.sizeof(request))


def move_mount(mount_fd: int, target_fd: int) -> None:
    """Attach a detached mount on what `target_fd` stands on. Nothing is looked up by name."""
    _move_mount(mount_fd, b"", target_fd, b"", _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)


class _Statx(ctypes.Structure):  # <linux/stat.h>; stx_mnt_id stands at 0x90
    _fields_ = [("before", ctypes.c_char * 0x90), ("mnt_id", c_uint64), ("after", ctypes.c_char * 0x68)]


_statx = _syscall(332 if _AMD64 else 291, c_int, c_char_p, c_int, c_uint, c_void_p)


def mount_id(fd: int) -> int:
    """Which mount a descriptor stands on: what /proc/self/mountinfo calls the mount ID. STATX_MNT_ID, Linux 5.8."""
    answer = _Statx()
    _statx(fd, b"", AT_EMPTY_PATH, 0x1000, ctypes.byref(answer))
    return int(answer.mnt_id)


# --- paths inside a root: <linux/openat2.h>, openat2(2) ---------------------------------------------------------------

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_IN_ROOT = 0x10
_SYMLINKS_MAX = 40  # MAXSYMLINKS, path_resolution(7)


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", c_uint64), ("mode", c_uint64), ("resolve", c_uint64)]


_openat2 = _syscall(437, c_int, c_char_p, c_void_p, c_size_t)


def openat2(directory: int, path: str | bytes, flags: int, resolve: int, mode: int = 0) -> int:
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    while True:
        try:
            return _openat2(directory, os.fsencode(path) or b".", ctypes.byref(how), ctypes.sizeof(how))
        except OSError as error:
            if error.errno != errno.EAGAIN:  # a rename raced with "..": openat2(2) says to ask again
                raise


def resolve_in(root_fd: int, path: str | bytes, flags: int = os.O_PATH, *, symlinks: bool = True) -> int:
    """Open `path` as a process whose root is `root_fd` would: no symlink and no ".." leads out of it.

    With `symlinks=False` a symlink anywhere on the way is ELOOP. Magic links of procfs are never followed.
    """
    resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | (0 if symlinks else RESOLVE_NO_SYMLINKS)
    try:
        return openat2(root_fd, path, flags, resolve)
    except OSError as error:
        # ENOSYS before Linux 5.6 and under some seccomp policies; others answer EPERM, which open(2) without
        # O_NOATIME never does.
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
    return walk_in(root_fd, path, flags, symlinks=symlinks)


def walk_in(root_fd: int, path: str | bytes, flags: int = os.O_PATH, *, symlinks: bool = True) -> int:
    """What `resolve_in` means, one component at a time: the fallback for kernels without openat2(2).

    The descriptors of all parents are held, so ".." is a step back in that stack and a rename cannot turn it outwards.
    """
    todo = [part for part in reversed(os.fsencode(path).split(b"/")) if part not in (b"", b".")]
    parents = [os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)]
    followed = 0
    try:
        while todo:
            name = todo.pop()
            if name == b"..":
                if len(parents) > 1:
                    os.close(parents.pop())
                continue
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parents[-1])
            try:
                link = os.readlink(b"", dir_fd=fd)
            except OSError:
                parents.append(fd)  # not a symlink; a file in the middle fails with ENOTDIR at the next name
                continue
            os.close(fd)
            followed += 1
            if not symlinks or followed > _SYMLINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if link.startswith(b"/"):
                while len(parents) > 1:
                    os.close(parents.pop())
            todo.extend(part for part in reversed(link.split(b"/")) if part not in (b"", b"."))
        if flags == os.O_PATH:
            return parents.pop()
        return os.open(f"/proc/self/fd/{parents[-1]}", flags | os.O_CLOEXEC)
    finally:
        for fd in parents:
            os.close(fd)


# --- files: rename(2), syncfs(2), statfs(2) ---------------------------------------------------------------------------

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
_renameat2 = _syscall(316 if _AMD64 else 276, c_int, c_char_p, c_int, c_char_p, c_uint)
syncfs = _function("syncfs", c_int)


def renameat2(old_dir: int, old: str | bytes, new_dir: int, new: str | bytes, flags: int = 0) -> None:
    _renameat2(old_dir, _encode(old), new_dir, _encode(new), flags)


# --- processes: <linux/prctl.h>, prctl(2), capabilities(7) ------------------------------------------------------------

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

_prctl = _function("prctl", c_int, c_ulong, c_ulong, c_ulong, c_ulong)


def prctl(option: int, argument: int = 0) -> int:
    return _prctl(option, argument, 0, 0, 0)


CAPABILITIES = tuple(  # <linux/capability.h>, in the order of their numbers
    """
    chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable net_bind_service
    net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin
    sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write audit_control setfcap mac_override
    mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore
    """.split()
)


class _CapHeader(ctypes.Structure):
    _fields_ = [("version", c_uint32), ("pid", c_int)]


_capset = _syscall(126 if _AMD64 else 91, c_void_p, c_void_p)


def drop_bounding(keep: Sequence[str]) -> None:
    """Take every capability that is not in `keep` out of the bounding set."""
    number = 0
    while True:
        try:
            held = prctl(PR_CAPBSET_READ, number)
        except OSError:  # EINVAL: past the last capability of this kernel
            return
        if held and (number >= len(CAPABILITIES) or CAPABILITIES[number] not in keep):
            prctl(PR_CAPBSET_DROP, number)
        number += 1


def set_capabilities(keep: Sequence[str]) -> None:
    """Permitted and effective become `keep`; inheritable and ambient become empty."""
    bits = sum(1 << CAPABILITIES.index(name) for name in keep)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    header = _CapHeader(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    data = (c_uint32 * 6)(low, low, 0, high, high, 0)  # effective, permitted, inheritable; twice
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _capset(ctypes.byref(header), ctypes.byref(data))


# --- BPF: <linux/seccomp.h>, <linux/filter.h>, seccomp(2), socket(7) --------------------------------------------------

SECCOMP_SET_MODE_FILTER = 1
_SOL_SOCKET, _SO_ATTACH_FILTER = 1, 26  # <asm-generic/socket.h>
_seccomp = _syscall(317 if _AMD64 else 277, c_uint, c_uint, c_void_p)
_setsockopt = _function("setsockopt", c_int, c_int, c_int, c_void_p, c_uint)


class _SockFprog(ctypes.Structure):
    _fields_ = [("len", c_uint16), ("filter", c_void_p)]


def _fprog(program: bytes) -> _SockFprog:
    buffer = ctypes.create_string_buffer(program, len(program))
    return _SockFprog(len(program) // 8, ctypes.cast(buffer, c_void_p))  # a cast keeps what it points to


def seccomp_set_filter(program: bytes) -> None:
    """Install a BPF program (8 bytes an instruction) on this process and all it starts. Needs no_new_privs."""
    _seccomp(SECCOMP_SET_MODE_FILTER, 0, ctypes.byref(_fprog(program)))


def attach_filter(fd: int, program: bytes) -> None:
    """From now on a socket takes only the packets that a BPF program accepts."""
    fprog = _fprog(program)
    _setsockopt(fd, _SOL_SOCKET, _SO_ATTACH_FILTER, ctypes.byref(fprog), ctypes.sizeof(fprog))


# --- Landlock: <linux/landlock.h>, landlock(7) ------------------------------------------------------------------------

LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET = 1
LANDLOCK_SCOPE_SIGNAL = 2
_LANDLOCK_READ_FILE = 4
_LANDLOCK_RULE_PATH_BENEATH = 1
_landlock_create_ruleset = _syscall(444, c_void_p, c_size_t, c_uint)
_landlock_add_rule = _syscall(445, c_int, c_uint, c_void_p, c_uint)
_landlock_restrict_self = _syscall(446, c_int, c_uint)


class _LandlockRuleset(ctypes.Structure):
    _fields_ = [("handled_access_fs", c_uint64), ("handled_access_net", c_uint64), ("scoped", c_uint64)]


class _LandlockPathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed_access", c_uint64), ("parent_fd", c_int)]


def landlock_abi() -> int:
    """The version of Landlock this kernel speaks, 0 where it has none. Scopes need 6 (Linux 6.12)."""
    try:
        return _landlock_create_ruleset(None, 0, 1)  # LANDLOCK_CREATE_RULESET_VERSION
    except OSError:
        return 0


def landlock_scope(scopes: int) -> None:
    """Cut this process and all it starts off from abstract sockets, or signals, outside of themselves."""
    request = _LandlockRuleset(0, 0, scopes)
    ruleset = _landlock_create_ruleset(ctypes.byref(request), ctypes.sizeof(request), 0)
    try:
        _landlock_restrict_self(ruleset, 0)
    finally:
        os.close(ruleset)


def landlock_files(readable: Sequence[str], scopes: int = 0) -> None:
    """Of all files this process, and all it starts, may only read those beneath the directories `readable`.

    What this kernel's Landlock does not know yet is left out, `scopes` too. Where there is no Landlock: OSError.
    """
    abi = landlock_abi()
    # LANDLOCK_ACCESS_FS_*: 13 rights at first, then REFER (2), TRUNCATE (3), IOCTL_DEV (5)
    rights = (1 << 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)) - 1
    request = _LandlockRuleset(rights, 0, scopes if abi >= 6 else 0)
    ruleset = _landlock_create_ruleset(ctypes.byref(request), ctypes.sizeof(request) if abi >= 6 else 8, 0)
    try:
        for path in readable:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                rule = _LandlockPathBeneath(_LANDLOCK_READ_FILE, fd)
                _landlock_add_rule(ruleset, _LANDLOCK_RULE_PATH_BENEATH, ctypes.byref(rule), 0)
            finally:
                os.close(fd)
        _landlock_restrict_self(ruleset, 0)
    finally:
        os.close(ruleset)


_close_range = _syscall(436, c_uint, c_uint, c_uint)


def close_all_but(keep: Sequence[int]) -> None:
    """Close every descriptor that is not in `keep`, whatever the limit of descriptors is. close_range(2), Linux 5.9"""
    low = 0
    try:
        for fd in sorted(set(keep)):
            if fd > low:
                _close_range(low, fd - 1, 0)
            low = fd + 1
        _close_range(low, 0xFFFFFFFF, 0)
    except OSError:
        for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
            if fd not in keep:
                try:
                    os.close(fd)
                except OSError:
                    continue  # the descriptor of the listing itself is gone already


def close_on_exec_from(first: int) -> None:
    """Mark every descriptor from `first` on close-on-exec. close_range(2), Linux 5.11 for the flag."""
    try:
        _close_range(first, 0xFFFFFFFF, 4)  # CLOSE_RANGE_CLOEXEC
    except OSError:
        for name in os.listdir("/proc/self/fd"):
            if int(name) >= first:
                try:
                    os.set_inheritable(int(name), False)
                except OSError:
                    continue  # the descriptor of the listing itself is gone already
