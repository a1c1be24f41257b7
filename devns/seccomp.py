"""seccomp: which syscalls a payload may not make, as BPF programs: pure functions from a machine to bytes.

Three programs, named in a Plan and installed in that order just before exec: `deny` is the security boundary's, the
other two make a build with one mapped uid possible and fast. All installed filters see every syscall and the most
restrictive answer wins; of two ERRNOs the one installed last wins, seccomp(2). So `emulate-root` comes after `deny`.

A filter sees the registers and never what a pointer points to. Whatever hides its arguments in a struct (clone3,
openat2) can therefore only be refused whole, with ENOSYS, so that the C library falls back to the call we can read.
"""

from __future__ import annotations

import struct
from errno import EAFNOSUPPORT, ENOSYS, EPERM

from devns.errors import Unsupported

TYPE_CHECKING = False  # importing typing for its own constant would cost more than all the rest of this file
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Instruction = tuple[int, int, int, int]  # struct sock_filter: code, jt, jf, k
    Rule = tuple[str, list[Instruction]]  # a syscall's name and what decides about it


# An assembler, linux/filter.h and linux/bpf_common.h ------------------------------------------------------------------
#
# A conditional jump reaches 255 instructions and a filter of a hundred syscalls is longer. Here no jump can be too
# long: `when` skips its own body and nothing else, a body ends in a return, and what stands after it finds the
# accumulator untouched.


def _load(offset: int) -> Instruction:
    return 0x20, 0, 0, offset  # BPF_LD | BPF_W | BPF_ABS, an offset into struct seccomp_data


def _and(mask: int) -> Instruction:
    return 0x54, 0, 0, mask  # BPF_ALU | BPF_AND | BPF_K


def _return(action: int) -> Instruction:
    return 0x06, 0, 0, action  # BPF_RET | BPF_K


def _when(value: int, body: list[Instruction]) -> list[Instruction]:
    """If the accumulator is `value`: `body`."""
    return [(0x15, 0, len(body), value), *body]  # BPF_JMP | BPF_JEQ | BPF_K


def _when_any(bits: int, body: list[Instruction]) -> list[Instruction]:
    """If the accumulator has any of `bits`: `body`."""
    return [(0x45, 0, len(body), bits), *body]  # BPF_JMP | BPF_JSET | BPF_K


def _errno(number: int) -> Instruction:
    return _return(0x0005_0000 | number)  # SECCOMP_RET_ERRNO; with 0 the syscall is skipped and says it succeeded


ALLOW = _return(0x7FFF_0000)
SUCCEED = _errno(0)

# struct seccomp_data, linux/seccomp.h: int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6]
NR, ARCH = _load(0), _load(4)


def _argument(index: int) -> Instruction:
    """The low half of an argument, on a little-endian machine. All that is judged here is an int to the kernel, which
    drops the high half or refuses it; comparing 64 bits would let ioctl(fd, 0x1_0000_5412) by (CVE-2019-10063)."""
    return _load(16 + 8 * index)


# Syscall numbers: asm/unistd_64.h and asm-generic/unistd.h ------------------------------------------------------------

AUDIT_ARCH = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}  # linux/audit.h
COLUMN = {"x86_64": 0, "aarch64": 1}
X32_BIT = 0x4000_0000  # asm/unistd.h: the x32 ABI is x86_64's with this bit set in the number

# fmt: off
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "accept4": (288, 242), "acct": (163, 89), "add_key": (248, 217), "bind": (49, 200), "bpf": (321, 280),
    "brk": (12, 214), "capset": (126, 91), "chmod": (90, None), "chown": (92, None), "chroot": (161, 51),
    "clock_gettime": (228, 113), "clock_settime": (227, 112), "clone": (56, 220), "clone3": (435, 435),
    "close": (3, 57), "connect": (42, 203), "creat": (85, None), "create_module": (174, None),
    "delete_module": (176, 106), "epoll_ctl": (233, 21), "epoll_pwait": (281, 22), "epoll_wait": (232, None),
    "exit_group": (231, 94), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "fchown": (93, 55),
    "fchownat": (260, 54), "fcntl": (72, 25), "fdatasync": (75, 83), "finit_module": (313, 273), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fsopen": (430, 430), "fspick": (433, 433), "fstat": (5, 80), "fsync": (74, 82),
    "futex": (202, 98), "get_kernel_syms": (177, None), "getpeername": (52, 205), "getpid": (39, 172),
    "getrandom": (318, 278), "getsockname": (51, 204), "getsockopt": (55, 209), "init_module": (175, 105),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "io_uring_setup": (425, 425), "ioctl": (16, 29),
    "ioperm": (173, None), "iopl": (172, None), "kexec_file_load": (320, 294), "kexec_load": (246, 104),
    "keyctl": (250, 219), "lchown": (94, None), "listen": (50, 201), "lookup_dcookie": (212, 18), "lseek": (8, 62),
    "madvise": (28, 233), "migrate_pages": (256, 238), "mknod": (133, None), "mknodat": (259, 33), "mmap": (9, 222),
    "modify_ldt": (154, None), "mount": (165, 40), "mount_setattr": (442, 442), "move_mount": (429, 429),
    "move_pages": (279, 239), "mremap": (25, 216), "munmap": (11, 215), "newfstatat": (262, 79),
    "nfsservctl": (180, 42), "open": (2, None), "open_by_handle_at": (304, 265), "open_tree": (428, 428),
    "open_tree_attr": (467, 467), "openat": (257, 56), "openat2": (437, 437), "perf_event_open": (298, 241),
    "pipe2": (293, 59), "pivot_root": (155, 41), "query_module": (178, None), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "read": (0, 63), "reboot": (169, 142), "recvfrom": (45, 207), "recvmmsg": (299, 243),
    "recvmsg": (47, 212), "request_key": (249, 218), "restart_syscall": (219, 128), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sendmmsg": (307, 269), "sendmsg": (46, 211),
    "sendto": (44, 206), "setfsgid": (123, 152), "setfsuid": (122, 151), "setgid": (106, 144), "setgroups": (116, 159),
    "setns": (308, 268), "setregid": (114, 143), "setresgid": (119, 149), "setresuid": (117, 147),
    "setreuid": (113, 145), "setsockopt": (54, 208), "settimeofday": (164, 170), "setuid": (105, 146),
    "shutdown": (48, 210), "socket": (41, 198), "socketpair": (53, 199), "splice": (275, 76), "swapoff": (168, 225),
    "swapon": (167, 224), "sync": (162, 81), "sync_file_range": (277, 84), "syncfs": (306, 267), "syslog": (103, 116),
    "umount2": (166, 39), "unshare": (272, 97), "uselib": (134, None), "userfaultfd": (323, 282), "write": (1, 64),
}
# fmt: on


def _filter(
    machine: str, rules: Iterable[Rule], *, foreign: Instruction, x32: Instruction, rest: Instruction = ALLOW
) -> bytes:
    """The program that decides by `rules`, the first that names the syscall, and by `rest` about all others.

    Numbers mean nothing without their ABI: a call by another one (i386 by int 0x80, 32-bit Arm) gets `foreign`.
    The kernel asks a filter once which numbers it allows by number alone and never runs it for those (Linux 5.11),
    so length costs little; what is judged by argument should stand first all the same.
    """
    if machine not in AUDIT_ARCH:
        raise Unsupported(f"no table of syscalls for {machine}, only for {' and '.join(sorted(AUDIT_ARCH))}")
    code = [ARCH, (0x15, 1, 0, AUDIT_ARCH[machine]), foreign, NR]  # BPF_JMP | BPF_JEQ | BPF_K
    if machine == "x86_64":
        code += _when_any(X32_BIT, [x32])
    for name, body in rules:
        number = NUMBERS[name][COLUMN[machine]]
        if number is not None:
            code += _when(number, body)
    code.append(rest)
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


# deny -----------------------------------------------------------------------------------------------------------------

TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # asm-generic/ioctls.h: type into, and paste into, a terminal
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16  # linux/socket.h
SOCK_RAW, SOCK_PACKET, SOCK_TYPE_MASK, NETLINK_ROUTE = 3, 10, 0xF, 0
# linux/sched.h: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
CLONE_NEW = 0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000
CLONE_NEWTIME = 0x80  # to unshare only: in clone's flags this bit belongs to the exit signal
S_ISUID_OR_S_ISGID = 0o6000
O_CREAT_OR_TMPFILE = 0o100 | 0o20000000  # open's mode counts only with one of these

# Never, nested or not. Other kernels' calls that exist no more (create_module, uselib) are here for kernels as old.
# adjtimex and clock_adjtime are not: the mode is in a struct, ntp tools read with them, and setting needs a
# capability in the initial user namespace, which nothing inside has.
NEVER = (
    *("add_key", "keyctl", "request_key"),  # keyrings belong to a uid, not to a namespace
    *("io_uring_setup", "io_uring_enter", "io_uring_register"),  # does by a ring what a filter refuses by number
    *("bpf", "perf_event_open", "userfaultfd", "lookup_dcookie", "syslog"),
    *("init_module", "finit_module", "delete_module", "create_module", "query_module", "get_kernel_syms"),
    *("kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff", "acct", "quotactl", "quotactl_fd"),
    *("settimeofday", "clock_settime", "open_by_handle_at", "nfsservctl", "uselib"),
    *("modify_ldt", "iopl", "ioperm", "move_pages", "migrate_pages"),
)
# Not chroot: it takes a capability that only root inside has, whose / is a mount namespace's, with nothing above it.
MOUNTS = ("mount", "umount2", "pivot_root", "setns")
# The new mount API is refused as if the kernel were older: callers then try mount(2) and report that.
NEW_MOUNTS = (
    *("open_tree", "open_tree_attr", "move_mount", "mount_setattr"),
    *("fsopen", "fsconfig", "fsmount", "fspick"),
)


def deny(machine: str, *, nested: bool, setuid_bits: bool) -> bytes:
    """The denylist every payload runs under: what it refuses, it refuses with an errno, everything else is allowed.

    `nested`: mounts and namespaces are allowed, for containers inside. `setuid_bits`: files may be made setuid and
    setgid, which package managers need. Elsewhere such a file, made in a project that others can reach, would lend
    the caller's own uid to other users of the host; the price is that directories can't be made setgid either, nor
    keep the bit through a chmod, which in a tree shared by a group is noticed.
    """
    rules = [] if setuid_bits else _setuid_rules()
    rules += [
        ("ioctl", [_argument(1), *_when(TIOCSTI, [_errno(EPERM)]), *_when(TIOCLINUX, [_errno(EPERM)]), ALLOW]),
        ("socket", _families()),
        ("socketpair", _families()),  # has families of its own: AF_TIPC has pairs
    ]
    if not nested:
        rules += [
            ("clone", [_argument(0), *_when_any(CLONE_NEW, [_errno(EPERM)]), ALLOW]),
            ("unshare", [_argument(0), *_when_any(CLONE_NEW | CLONE_NEWTIME, [_errno(EPERM)]), ALLOW]),
            ("clone3", [_errno(ENOSYS)]),
            *((name, [_errno(EPERM)]) for name in MOUNTS),
            *((name, [_errno(ENOSYS)]) for name in NEW_MOUNTS),
        ]
    rules += [(name, [_errno(EPERM)]) for name in NEVER]
    # x32 isn't compiled into most kernels, which then say the same. So do all for number -1, which debuggers use.
    return _filter(machine, rules, foreign=_errno(EPERM), x32=_errno(ENOSYS))


def _setuid_rules() -> list[Rule]:
    """EPERM for a mode with S_ISUID or S_ISGID. mkdir(2) isn't here, the kernel ignores both bits in its mode."""

    def refuse(mode: int) -> list[Instruction]:
        return [_argument(mode), *_when_any(S_ISUID_OR_S_ISGID, [_errno(EPERM)]), ALLOW]

    def refuse_created(flags: int, mode: int) -> list[Instruction]:
        return [_argument(flags), *_when_any(O_CREAT_OR_TMPFILE, refuse(mode)), ALLOW]

    return [
        ("openat", refuse_created(2, 3)),
        ("open", refuse_created(1, 2)),
        ("openat2", [_errno(ENOSYS)]),
        *((name, refuse(1)) for name in ("chmod", "fchmod", "creat", "mknod")),
        *((name, refuse(2)) for name in ("fchmodat", "fchmodat2", "mknodat")),
    ]


def _families() -> list[Instruction]:
    """EAFNOSUPPORT for all but local, internet and routing sockets: rare families are where the kernel's holes are
    (AF_ALG, AF_VSOCK, AF_PACKET, AF_TIPC, netfilter by AF_NETLINK), and programs take this errno for "not there"."""
    refuse = _errno(EAFNOSUPPORT)
    return [
        _argument(0),
        *_when(AF_UNIX, [ALLOW]),
        # socket(AF_INET, SOCK_PACKET) is an old spelling of AF_PACKET, packet(7)
        *_when(AF_INET, [_argument(1), _and(SOCK_TYPE_MASK), *_when(SOCK_PACKET, [refuse]), ALLOW]),
        *_when(AF_INET6, [ALLOW]),
        *_when(AF_NETLINK, [_argument(2), *_when(NETLINK_ROUTE, [ALLOW]), refuse]),
        refuse,
    ]


# allow-only -----------------------------------------------------------------------------------------------------------

FIONBIO = 0x5421  # asm-generic/ioctls.h
O_WRITING = 0o3 | 0o100 | 0o1000 | 0o20000000  # O_ACCMODE, O_CREAT, O_TRUNC, O_TMPFILE


def allow_only(names: Iterable[str], machine: str) -> bytes:
    """An allowlist, for a process of our own that talks to strangers: these calls, and EPERM for all others.

    Of `openat` only to read, of `socket` only the internet's families and none that is raw, of `ioctl` only the one
    that makes a descriptor non-blocking.
    """
    refuse = _errno(EPERM)
    raw = [_argument(1), _and(SOCK_TYPE_MASK), *_when(SOCK_RAW, [refuse]), *_when(SOCK_PACKET, [refuse]), ALLOW]
    judged = {
        "openat": [_argument(2), *_when_any(O_WRITING, [refuse]), ALLOW],
        "socket": [_argument(0), *_when(AF_INET, raw), *_when(AF_INET6, raw), refuse],
        "ioctl": [_argument(1), *_when(FIONBIO, [ALLOW]), refuse],
    }
    rules = [(name, judged.get(name, [ALLOW])) for name in names]
    return _filter(machine, rules, foreign=refuse, x32=refuse, rest=refuse)


# emulate-root, ignore-sync --------------------------------------------------------------------------------------------

S_IFMT, S_IFCHR, S_IFBLK = 0o170000, 0o020000, 0o060000
OWNERS = ("chown", "fchown", "lchown", "fchownat")
IDENTITIES = (
    *("setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setfsuid", "setfsgid"),
    *("setgroups", "capset"),
)
SYNCS = ("fsync", "fdatasync", "sync", "syncfs", "sync_file_range")


def emulate_root(machine: str) -> bytes:
    """Says yes, and does nothing, where root with one mapped uid would fail: owners, identities, device nodes.

    With it dpkg, apt and maintainer scripts run to their end where there is no newuidmap. Every file stays the
    caller's, and a program that drops its privileges believes it has. FIFOs and sockets are made as asked.
    """
    device = [_and(S_IFMT), *_when(S_IFCHR, [SUCCEED]), *_when(S_IFBLK, [SUCCEED]), ALLOW]
    rules = [
        ("mknod", [_argument(1), *device]),
        ("mknodat", [_argument(2), *device]),
        *((name, [SUCCEED]) for name in (*OWNERS, *IDENTITIES)),
    ]
    return _filter(machine, rules, foreign=ALLOW, x32=ALLOW)  # those are for `deny` to refuse


def ignore_sync(machine: str) -> bytes:
    """Answers the fsync family with success, at once: for a build, which syncs once when it is done, or starts anew."""
    return _filter(machine, ((name, [SUCCEED]) for name in SYNCS), foreign=ALLOW, x32=ALLOW)


def program(names: Sequence[str], machine: str, *, nested: bool = False, setuid_bits: bool = False) -> list[bytes]:
    """The programs a Plan names ("deny", "emulate-root", "ignore-sync"), to be installed in this order.

    Without no_new_privs or CAP_SYS_ADMIN the kernel takes none. Raises `Unsupported` for a machine that has no table
    here, and ValueError for a name that is none: a missing filter is never skipped.
    """
    makers: dict[str, Callable[[], bytes]] = {
        "deny": lambda: deny(machine, nested=nested, setuid_bits=setuid_bits),
        "emulate-root": lambda: emulate_root(machine),
        "ignore-sync": lambda: ignore_sync(machine),
    }
    unknown = [name for name in names if name not in makers]
    if unknown:
        raise ValueError(f"no such seccomp program: {', '.join(unknown)}")
    return [makers[name]() for name in names]
