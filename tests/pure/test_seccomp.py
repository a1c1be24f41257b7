"""The seccomp programs, judged by an interpreter and a policy of the tests' own, and by the kernel itself (F9)."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import random
import struct
from errno import EAFNOSUPPORT, ENOSYS, EPERM

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devns import seccomp
from devns.errors import Unsupported

# All names of asm/unistd_64.h and asm-generic/unistd.h up to Linux 6.18, in the order of their numbers: written down
# apart from the table in seccomp.py, so that a wrong number there shows.
X86_64 = """
    read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
    rt_sigreturn ioctl pread64 pwrite64 readv writev access pipe select sched_yield mremap msync mincore madvise
    shmget shmat shmctl dup dup2 pause nanosleep getitimer alarm setitimer getpid sendfile socket connect accept
    sendto recvfrom sendmsg recvmsg shutdown bind listen getsockname getpeername socketpair setsockopt getsockopt
    clone fork vfork execve exit wait4 kill uname semget semop semctl shmdt msgget msgsnd msgrcv msgctl fcntl flock
    fsync fdatasync truncate ftruncate getdents getcwd chdir fchdir rename mkdir rmdir creat link unlink symlink
    readlink chmod fchmod chown fchown lchown umask gettimeofday getrlimit getrusage sysinfo times ptrace getuid
    syslog getgid setuid setgid geteuid getegid setpgid getppid getpgrp setsid setreuid setregid getgroups setgroups
    setresuid getresuid setresgid getresgid getpgid setfsuid setfsgid getsid capget capset rt_sigpending
    rt_sigtimedwait rt_sigqueueinfo rt_sigsuspend sigaltstack utime mknod uselib personality ustat statfs fstatfs
    sysfs getpriority setpriority sched_setparam sched_getparam sched_setscheduler sched_getscheduler
    sched_get_priority_max sched_get_priority_min sched_rr_get_interval mlock munlock mlockall munlockall vhangup
    modify_ldt pivot_root _sysctl prctl arch_prctl adjtimex setrlimit chroot sync acct settimeofday mount umount2
    swapon swapoff reboot sethostname setdomainname iopl ioperm create_module init_module delete_module
    get_kernel_syms query_module quotactl nfsservctl getpmsg putpmsg afs_syscall tuxcall security gettid readahead
    setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr
    lremovexattr fremovexattr tkill time futex sched_setaffinity sched_getaffinity set_thread_area io_setup
    io_destroy io_getevents io_submit io_cancel get_thread_area lookup_dcookie epoll_create epoll_ctl_old
    epoll_wait_old remap_file_pages getdents64 set_tid_address restart_syscall semtimedop fadvise64 timer_create
    timer_settime timer_gettime timer_getoverrun timer_delete clock_settime clock_gettime clock_getres
    clock_nanosleep exit_group epoll_wait epoll_ctl tgkill utimes vserver mbind set_mempolicy get_mempolicy mq_open
    mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr kexec_load waitid add_key request_key keyctl
    ioprio_set ioprio_get inotify_init inotify_add_watch inotify_rm_watch migrate_pages openat mkdirat mknodat
    fchownat futimesat newfstatat unlinkat renameat linkat symlinkat readlinkat fchmodat faccessat pselect6 ppoll
    unshare set_robust_list get_robust_list splice tee sync_file_range vmsplice move_pages utimensat epoll_pwait
    signalfd timerfd_create eventfd fallocate timerfd_settime timerfd_gettime accept4 signalfd4 eventfd2
    epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open recvmmsg fanotify_init
    fanotify_mark prlimit64 name_to_handle_at open_by_handle_at clock_adjtime syncfs sendmmsg setns getcpu
    process_vm_readv process_vm_writev kcmp finit_module sched_setattr sched_getattr renameat2 seccomp getrandom
    memfd_create kexec_file_load bpf execveat userfaultfd membarrier mlock2 copy_file_range preadv2 pwritev2
    pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq uretprobe uprobe
"""
AARCH64 = """
    io_setup io_destroy io_submit io_cancel io_getevents setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr
    listxattr llistxattr flistxattr removexattr lremovexattr fremovexattr getcwd lookup_dcookie eventfd2
    epoll_create1 epoll_ctl epoll_pwait dup dup3 fcntl inotify_init1 inotify_add_watch inotify_rm_watch ioctl
    ioprio_set ioprio_get flock mknodat mkdirat unlinkat symlinkat linkat renameat umount2 mount pivot_root
    nfsservctl statfs fstatfs truncate ftruncate fallocate faccessat chdir fchdir chroot fchmod fchmodat fchownat
    fchown openat close vhangup pipe2 quotactl getdents64 lseek read write readv writev pread64 pwrite64 preadv
    pwritev sendfile pselect6 ppoll signalfd4 vmsplice splice tee readlinkat newfstatat fstat sync fsync fdatasync
    sync_file_range timerfd_create timerfd_settime timerfd_gettime utimensat acct capget capset personality exit
    exit_group waitid set_tid_address unshare futex set_robust_list get_robust_list nanosleep getitimer setitimer
    kexec_load init_module delete_module timer_create timer_gettime timer_getoverrun timer_settime timer_delete
    clock_settime clock_gettime clock_getres clock_nanosleep syslog ptrace sched_setparam sched_setscheduler
    sched_getscheduler sched_getparam sched_setaffinity sched_getaffinity sched_yield sched_get_priority_max
    sched_get_priority_min sched_rr_get_interval restart_syscall kill tkill tgkill sigaltstack rt_sigsuspend
    rt_sigaction rt_sigprocmask rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigreturn setpriority getpriority
    reboot setregid setgid setreuid setuid setresuid getresuid setresgid getresgid setfsuid setfsgid times setpgid
    getpgid getsid setsid getgroups setgroups uname sethostname setdomainname getrlimit setrlimit getrusage umask
    prctl getcpu gettimeofday settimeofday adjtimex getpid getppid getuid geteuid getgid getegid gettid sysinfo
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr msgget msgctl msgrcv msgsnd semget semctl
    semtimedop semop shmget shmctl shmat shmdt socket socketpair bind listen accept connect getsockname getpeername
    sendto recvfrom setsockopt getsockopt shutdown sendmsg recvmsg readahead brk munmap mremap add_key request_key
    keyctl clone execve mmap fadvise64 swapon swapoff mprotect msync mlock munlock mlockall munlockall mincore
    madvise remap_file_pages mbind get_mempolicy set_mempolicy migrate_pages move_pages rt_tgsigqueueinfo
    perf_event_open accept4 recvmmsg - - - - - - - - - - - - - - - - wait4 prlimit64 fanotify_init fanotify_mark
    name_to_handle_at open_by_handle_at clock_adjtime syncfs setns sendmmsg process_vm_readv process_vm_writev kcmp
    finit_module sched_setattr sched_getattr renameat2 seccomp getrandom memfd_create bpf execveat userfaultfd
    membarrier mlock2 copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq
    kexec_file_load
"""
FROM_424 = """
    pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount fsopen fsconfig fsmount
    fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2 process_madvise epoll_pwait2 mount_setattr
    quotactl_fd landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret process_mrelease
    futex_waitv set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake futex_wait futex_requeue
    statmount listmount lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat listxattrat
    removexattrat open_tree_attr file_getattr file_setattr
"""


def words(text: str) -> set[str]:
    return set(text.split())


NAMES = {
    machine: {
        **{number: name for number, name in enumerate(text.split()) if name != "-"},
        **dict(enumerate(FROM_424.split(), 424)),
    }
    for machine, text in (("x86_64", X86_64), ("aarch64", AARCH64))
}
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386, ARM = 0x40000003, 0x40000028
MACHINES = sorted(ARCH)
HIGH = 0xFFFF_FFFF_0000_0000
Arguments = tuple[int, int, int, int, int, int]


# The interpreter ------------------------------------------------------------------------------------------------------


def decode(program: bytes) -> list[tuple[int, int, int, int]]:
    return list(struct.iter_unpack("<HBBI", program))


def run(code: list[tuple[int, int, int, int]], arch: int, nr: int, arguments: Arguments) -> int:
    """What the kernel would get from the program, linux/filter.h: only the instructions it lets seccomp have."""
    data = struct.pack("<iIQ6Q", nr - (1 << 32) if nr >> 31 else nr, arch, 0x7F0000000000, *arguments)
    a, pc = 0, 0
    while True:
        op, jt, jf, k = code[pc]
        pc += 1
        if op == 0x20:  # ld [k]
            assert k in range(0, 64, 4)
            (a,) = struct.unpack_from("<I", data, k)
        elif op == 0x54:  # and #k
            a &= k
        elif op == 0x15:  # jeq #k
            pc += jt if a == k else jf
        elif op == 0x45:  # jset #k
            pc += jt if a & k else jf
        elif op == 0x06:  # ret #k
            return k
        else:
            raise AssertionError(f"{op:#x} is no instruction that this interpreter knows")


def verdict(action: int) -> int | None:
    """None for allowed, else the errno, 0 for a success that was made up."""
    if action == 0x7FFF0000:
        return None
    assert action & 0xFFFF0000 == 0x00050000, hex(action)
    return action & 0xFFFF


def answer(programs: list[bytes], arch: int, nr: int, arguments: Arguments) -> int | None:
    """All filters run; ERRNO beats ALLOW, of two ERRNOs that of the filter installed last counts. seccomp(2)"""
    said = [verdict(run(decode(program), arch, nr, arguments)) for program in programs]
    return next((errno for errno in reversed(said) if errno is not None), None)


# The policy -----------------------------------------------------------------------------------------------------------

ALWAYS_EPERM = words(
    """add_key keyctl request_key io_uring_setup io_uring_enter io_uring_register userfaultfd bpf perf_event_open
    kexec_load kexec_file_load init_module finit_module delete_module create_module query_module get_kernel_syms
    open_by_handle_at acct quotactl quotactl_fd swapon swapoff reboot settimeofday clock_settime syslog lookup_dcookie
    uselib nfsservctl modify_ldt iopl ioperm move_pages migrate_pages"""
)
UNNESTED_EPERM = words("mount umount2 pivot_root setns")
UNNESTED_ENOSYS = words("clone3 open_tree open_tree_attr move_mount mount_setattr fsopen fsconfig fsmount fspick")
EMULATED = words(
    """chown fchown lchown fchownat setuid setgid setgroups setreuid setregid setresuid setresgid setfsuid setfsgid
    capset"""
)
# where the mode is, and where the flags are that make it count
MODE = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "creat": 1, "mknod": 1, "mknodat": 2}
OPEN_MODE = {"open": (2, 1), "openat": (3, 2)}
NEW_NAMESPACES = [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]


def denied(name: str | None, arguments: Arguments, *, nested: bool, setuid_bits: bool) -> int | None:
    """The policy of security.md D4 in plain Python, for a native syscall."""
    low = [argument & 0xFFFFFFFF for argument in arguments]
    if name in ALWAYS_EPERM:
        return EPERM
    if name == "ioctl" and low[1] in (0x5412, 0x541C):
        return EPERM
    if name in ("socket", "socketpair"):
        family, kind, protocol = low[0], low[1] & 15, low[2]
        good = family in (1, 10) or (family == 2 and kind != 10) or (family == 16 and protocol == 0)
        return None if good else EAFNOSUPPORT
    if not nested:
        if name in UNNESTED_EPERM:
            return EPERM
        if name in UNNESTED_ENOSYS:
            return ENOSYS
        if name == "clone" and any(low[0] & flag for flag in NEW_NAMESPACES):
            return EPERM
        if name == "unshare" and any(low[0] & flag for flag in [0x80, *NEW_NAMESPACES]):
            return EPERM
    if not setuid_bits:
        if name == "openat2":
            return ENOSYS
        if name in MODE and low[MODE[name]] & 0o6000:
            return EPERM
        if name in OPEN_MODE:
            mode, flags = OPEN_MODE[name]
            if low[mode] & 0o6000 and low[flags] & (0o100 | 0o20000000):
                return EPERM
    return None


def deny_policy(machine: str, arch: int, nr: int, arguments: Arguments, nested: bool, setuid_bits: bool) -> int | None:
    if arch != ARCH[machine]:
        return EPERM
    if machine == "x86_64" and nr & 0x40000000:
        return ENOSYS
    return denied(NAMES[machine].get(nr), arguments, nested=nested, setuid_bits=setuid_bits)


def emulate_root_policy(machine: str, arch: int, nr: int, arguments: Arguments) -> int | None:
    name = NAMES[machine].get(nr) if arch == ARCH[machine] else None
    if name in ("mknod", "mknodat"):
        mode = arguments[1 if name == "mknod" else 2]
        return 0 if mode & 0o170000 in (0o020000, 0o060000) else None
    return 0 if name in EMULATED else None


def ignore_sync_policy(machine: str, arch: int, nr: int, arguments: Arguments) -> int | None:
    name = NAMES[machine].get(nr) if arch == ARCH[machine] else None
    return 0 if name in ("fsync", "fdatasync", "sync", "syncfs", "sync_file_range") else None


# Against the policy ---------------------------------------------------------------------------------------------------

NOTHING: Arguments = (0, 0, 0, 0, 0, 0)
EVERYTHING: Arguments = (0xFFFF_FFFF_FFFF_FFFF,) * 6
EVERY_NUMBER = [*range(600), *(0x40000000 | nr for nr in range(600)), 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
bools = pytest.mark.parametrize("nested", [False, True]), pytest.mark.parametrize("setuid_bits", [False, True])
machines = pytest.mark.parametrize("machine", MACHINES)

# Numbers that are judged by an argument come up more often than the 500 others, and values that matter more than noise.
judged = ["ioctl", "socket", "socketpair", "clone", "unshare", "open", "openat", "openat2", *MODE]
interesting = st.sampled_from(
    [
        *(0x5412, 0x541C, 0, 1, 2, 10, 16, 17, 38, 40, 0o100, 0o20000000, 0o20200000, 0o644, 0o4755, 0o2755, 0o1777),
        *(0o104755, 0o020644, 0o060644, 0o010644, 0o140777, 0x80, 17, 0x3D0F00, *NEW_NAMESPACES),
    ]
)
argument = st.builds(
    lambda low, high: low | high << 32, interesting | st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)
)
arguments = st.tuples(*[argument] * 6)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, int, int, Arguments]:
    machine = draw(st.sampled_from(MACHINES))
    numbers = [nr for nr, name in NAMES[machine].items() if name in judged]
    nr = draw(st.sampled_from(numbers) | st.sampled_from(sorted(NAMES[machine])) | st.integers(0, 2**32 - 1))
    arch = draw(st.sampled_from([ARCH[machine]] * 6 + [I386, ARM, *ARCH.values()]) | st.integers(0, 2**32 - 1))
    return machine, arch, nr, draw(arguments)


@bools[0]
@bools[1]
@machines
def test_every_number_gets_the_answer_of_the_policy(machine: str, nested: bool, setuid_bits: bool) -> None:
    code = decode(seccomp.deny(machine, nested=nested, setuid_bits=setuid_bits))
    for nr in EVERY_NUMBER:
        for given_arguments in (NOTHING, EVERYTHING):
            got = verdict(run(code, ARCH[machine], nr, given_arguments))
            wanted = deny_policy(machine, ARCH[machine], nr, given_arguments, nested, setuid_bits)
            assert got == wanted, (nr, NAMES[machine].get(nr), given_arguments)


@given(calls(), st.booleans(), st.booleans())
@settings(deadline=None, database=None, max_examples=500)
def test_any_call_with_any_arguments_gets_the_answer_of_the_policy(
    call: tuple[str, int, int, Arguments], nested: bool, setuid_bits: bool
) -> None:
    machine, arch, nr, given_arguments = call
    code = decode(seccomp.deny(machine, nested=nested, setuid_bits=setuid_bits))
    assert verdict(run(code, arch, nr, given_arguments)) == deny_policy(*call, nested, setuid_bits)


@given(calls())
@settings(deadline=None, database=None, max_examples=500)
def test_root_emulation_and_ignored_syncs_answer_only_what_they_are_for(call: tuple[str, int, int, Arguments]) -> None:
    machine, arch, nr, given_arguments = call
    emulate, ignore = seccomp.emulate_root(machine), seccomp.ignore_sync(machine)
    assert verdict(run(decode(emulate), arch, nr, given_arguments)) == emulate_root_policy(*call)
    assert verdict(run(decode(ignore), arch, nr, given_arguments)) == ignore_sync_policy(*call)


@machines
def test_every_emulated_name_is_answered_with_success(machine: str) -> None:
    emulate, ignore = decode(seccomp.emulate_root(machine)), decode(seccomp.ignore_sync(machine))
    for nr in NAMES[machine]:
        call = (machine, ARCH[machine], nr, NOTHING)
        assert verdict(run(emulate, *call[1:])) == emulate_root_policy(*call)
        assert verdict(run(ignore, *call[1:])) == ignore_sync_policy(*call)


@machines
def test_no_jump_leaves_its_program_and_every_path_ends_in_a_return(machine: str) -> None:
    programs = [seccomp.emulate_root(machine), seccomp.ignore_sync(machine)]
    programs += [seccomp.deny(machine, nested=n, setuid_bits=s) for n in (False, True) for s in (False, True)]
    for program in programs:
        code = decode(program)
        assert len(code) < 4096  # BPF_MAXINSNS
        assert code[-1][0] == 0x06
        for here, (op, jt, jf, k) in enumerate(code):
            assert op in (0x20, 0x54, 0x15, 0x45, 0x06)
            assert op == 0x06 or here + 1 + max(jt, jf) < len(code)
            assert 0 <= k < 2**32


# Cases of the catalogue -----------------------------------------------------------------------------------------------


def six(given_arguments: tuple[int, ...]) -> Arguments:
    a, b, c, d, e, f = (*given_arguments, 0, 0, 0, 0, 0, 0)[:6]
    return a, b, c, d, e, f


def strict(name: str, *given_arguments: int, machine: str = "x86_64", nested: bool = False) -> int | None:
    """The answer to a native call under the default denylist."""
    nr = next(nr for nr, known in NAMES[machine].items() if known == name)
    program = seccomp.deny(machine, nested=nested, setuid_bits=False)
    return answer([program], ARCH[machine], nr, six(given_arguments))


@machines
def test_E_12_no_namespace_is_made_by_unshare_clone_clone3_or_setns(machine: str) -> None:
    for flag in NEW_NAMESPACES:
        assert strict("clone", flag | 17, machine=machine) == EPERM  # 17 is SIGCHLD
        assert strict("unshare", HIGH | flag, machine=machine) == EPERM
    assert strict("unshare", 0x80, machine=machine) == EPERM  # CLONE_NEWTIME
    assert strict("clone3", machine=machine) == ENOSYS
    assert strict("setns", 3, 0, machine=machine) == EPERM
    for name, flags in (("unshare", 0x10020000), ("clone", 0x10000011), ("clone3", 0), ("setns", 3)):
        assert strict(name, flags, machine=machine, nested=True) is None


@machines
def test_forks_threads_and_unsharing_of_files_stay_allowed(machine: str) -> None:
    fork, thread, vfork = 0x01200011, 0x003D0F00, 0x00004111
    assert [strict("clone", flags, machine=machine) for flags in (fork, thread, vfork)] == [None] * 3
    assert strict("unshare", 0x200 | 0x400, machine=machine) is None  # CLONE_FS | CLONE_FILES


@machines
def test_E_13_TIOCSTI_is_refused_whatever_the_high_half_of_its_number(machine: str) -> None:
    for high in (0, 0x1_0000_0000, HIGH):
        assert strict("ioctl", 0, high | 0x5412, machine=machine) == EPERM
    assert strict("ioctl", 0, 0x5413, machine=machine) is None  # TIOCGWINSZ


@machines
def test_E_14_TIOCLINUX_is_refused(machine: str) -> None:
    assert strict("ioctl", 0, HIGH | 0x541C, machine=machine) == EPERM


@machines
@pytest.mark.parametrize("call", ["socket", "socketpair"])
def test_E_30_only_local_internet_and_routing_sockets_exist(machine: str, call: str) -> None:
    allowed = {family for family in range(64) if strict(call, HIGH | family, 1, 0, machine=machine) is None}
    assert allowed == {1, 2, 10, 16}
    assert strict(call, 2, 10 | 0o2000000, 3, machine=machine) == EAFNOSUPPORT  # SOCK_PACKET | SOCK_CLOEXEC
    assert strict(call, 2, 10 | 0x10, 3, machine=machine) == EAFNOSUPPORT
    assert strict(call, 16, 3, 12, machine=machine) == EAFNOSUPPORT  # NETLINK_NETFILTER


@machines
@pytest.mark.parametrize("name", ["io_uring_setup", "userfaultfd", "bpf", "perf_event_open", "keyctl"])
def test_E_30_calls_with_a_history_of_holes_are_refused(machine: str, name: str) -> None:
    assert strict(name, machine=machine) == EPERM
    assert strict(name, machine=machine, nested=True) == EPERM


ALLOWED = [name for name in sorted(seccomp.NUMBERS) if name not in ("clone3", "unshare", "bpf")]


def allowed(name: str | None, arguments: Arguments) -> bool:
    """The policy of `allow_only` in plain Python, for a native syscall."""
    low = [argument & 0xFFFFFFFF for argument in arguments]
    if name == "openat":
        return not low[2] & (3 | 0o100 | 0o1000 | 0o20000000)
    if name == "socket":
        return low[0] in (2, 10) and low[1] & 15 not in (3, 10)
    if name == "ioctl":
        return low[1] == 0x5421
    return name in ALLOWED


@machines
def test_an_allowlist_allows_what_it_names_and_nothing_else(machine: str) -> None:
    code = decode(seccomp.allow_only(ALLOWED, machine))
    for nr in EVERY_NUMBER:
        for given_arguments in (NOTHING, EVERYTHING):
            native = nr if nr < 600 else -1
            wanted = None if allowed(NAMES[machine].get(native), given_arguments) else EPERM
            assert verdict(run(code, ARCH[machine], nr, given_arguments)) == wanted, (nr, given_arguments)


@given(calls())
@settings(deadline=None, database=None, max_examples=500)
def test_an_allowlist_judges_files_sockets_and_ioctls_by_their_arguments(call: tuple[str, int, int, Arguments]) -> None:
    machine, arch, nr, given_arguments = call
    native = NAMES[machine].get(nr) if arch == ARCH[machine] else None
    wanted = None if allowed(native, given_arguments) else EPERM
    assert verdict(run(decode(seccomp.allow_only(ALLOWED, machine)), arch, nr, given_arguments)) == wanted


@machines
def test_E_31_a_foreign_architecture_gets_EPERM_whatever_the_number(machine: str) -> None:
    code = decode(seccomp.deny(machine, nested=True, setuid_bits=True))
    for arch in {I386, ARM, 0, *ARCH.values()} - {ARCH[machine]}:
        assert {verdict(run(code, arch, nr, NOTHING)) for nr in EVERY_NUMBER} == {EPERM}


def test_E_31_x32_is_refused_as_if_it_were_not_compiled_in() -> None:
    code = decode(seccomp.deny("x86_64", nested=True, setuid_bits=True))
    assert {verdict(run(code, ARCH["x86_64"], nr | 0x40000000, NOTHING)) for nr in range(600)} == {ENOSYS}


@machines
def test_E_36_no_call_makes_a_setuid_or_setgid_file(machine: str) -> None:
    known = set(NAMES[machine].values())
    for bit in (0o4000, 0o2000):
        for name, place in MODE.items():
            if name in known:
                mode = [0] * place + [0o100755 | bit]
                assert strict(name, *mode, machine=machine) == EPERM
                assert strict(name, *[0] * place, HIGH | 0o100755, machine=machine) is None
        for creating in (0o100, 0o20200000):  # O_CREAT, O_TMPFILE
            assert strict("openat", 0, 0, creating | 2, 0o755 | bit, machine=machine) == EPERM
        assert strict("openat", 0, 0, 2, 0o755 | bit, machine=machine) is None  # opens what is there: mode is noise
    assert strict("openat2", machine=machine) == ENOSYS


# What a Plan names ----------------------------------------------------------------------------------------------------


@machines
def test_a_plan_names_programs_and_gets_them_in_its_order(machine: str) -> None:
    assert seccomp.program(["deny", "emulate-root", "ignore-sync"], machine, setuid_bits=True) == [
        seccomp.deny(machine, nested=False, setuid_bits=True),
        seccomp.emulate_root(machine),
        seccomp.ignore_sync(machine),
    ]
    assert seccomp.program(["deny"], machine) == [seccomp.deny(machine, nested=False, setuid_bits=False)]
    assert seccomp.program([], machine) == []


def test_a_name_that_is_no_program_is_an_error() -> None:
    with pytest.raises(ValueError, match="emulate-toor"):
        seccomp.program(["deny", "emulate-toor"], "x86_64")


def test_H_20_a_machine_without_a_table_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="riscv64"):
        seccomp.program(["deny"], "riscv64")


@machines
def test_a_build_may_chmod_setuid_and_thinks_that_it_owns_and_makes_devices(machine: str) -> None:
    numbers = {name: nr for nr, name in NAMES[machine].items()}
    build = seccomp.program(["deny", "emulate-root", "ignore-sync"], machine, setuid_bits=True)

    def said(name: str, *given_arguments: int) -> int | None:
        return answer(build, ARCH[machine], numbers[name], six(given_arguments))

    assert said("fchmodat", 0, 0, 0o104755) is None
    assert said("fchownat", 0, 0, 0, 42) == 0
    assert [said("mknodat", 0, 0, kind | 0o666, 0x103) for kind in (0o020000, 0o060000)] == [0, 0]
    assert said("mknodat", 0, 0, 0o010600) is None  # a FIFO
    assert said("setgroups", 1) == 0
    assert said("fsync", 3) == 0
    assert said("bpf") == EPERM  # what emulation allows, deny still refuses


# Against the kernel ---------------------------------------------------------------------------------------------------

# What the sampling child itself needs to live. All of it is allowed by the policy, none of it is sampled.
CHILD_NEEDS = words(
    """read write close mmap munmap mremap mprotect madvise brk futex rt_sigaction rt_sigprocmask rt_sigreturn exit
    exit_group prctl seccomp sched_yield getrandom rseq set_robust_list clock_gettime gettid getpid restart_syscall"""
)
UNFILTERED = {"uretprobe", "uprobe"}  # newer kernels pass them by all filters, and kill who was not sent there by them
UNTOUCHED = 77  # what the first filter says of every call that the program under test lets pass


def stub(machine: str) -> bytes:
    """A filter that keeps every sampled call from happening, so that all numbers can be tried with any arguments.
    Its answer is the older ERRNO, which loses to one by the filter under test and beats its ALLOW."""
    code = [(0x20, 0, 0, 0)]
    for nr, name in NAMES[machine].items():
        if name in CHILD_NEEDS:
            code += [(0x15, 0, 1, nr), (0x06, 0, 0, 0x7FFF0000)]
    code.append((0x06, 0, 0, 0x00050000 | UNTOUCHED))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


class SockFprog(ctypes.Structure):
    """linux/filter.h"""

    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


def install(program: bytes) -> None:
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    holder = SockFprog(len(program) // 8, program)
    assert libc.prctl(22, 2, ctypes.addressof(holder), 0, 0) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP


def syscall(nr: int, given_arguments: Arguments) -> int | None:
    """None if it came through to the stub, else the errno, 0 for a success."""
    ctypes.set_errno(0)
    signed = ctypes.c_long(nr - (1 << 32) if nr >> 31 else nr)
    result = libc.syscall(signed, *(ctypes.c_ulong(argument) for argument in given_arguments))
    errno = ctypes.get_errno() if result == -1 else 0
    return None if errno == UNTOUCHED else errno


def in_a_child(programs: list[bytes], sample: list[tuple[int, Arguments]]) -> list[int | None]:
    """What the kernel answers to `sample` in a forked child under `programs`."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            install(stub(platform.machine()))
            for program in programs:
                install(program)
            said = json.dumps([syscall(*call) for call in sample]).encode()
            while said:
                said = said[os.write(writer, said) :]
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        got = answers.read()
    assert os.waitpid(pid, 0)[1] == 0
    result: list[int | None] = json.loads(got)
    return result


def sample_calls() -> list[tuple[int, Arguments]]:
    """Every number with nothing and with everything, the judged ones with a few hundred arguments more."""
    machine = platform.machine()
    choose = random.Random(7)
    tricky = [0x5412, 0x541C, 0, 1, 2, 10, 16, 38, 0o100, 0o20000000, 0o4755, 0o2755, 0o755, 0o020644, *NEW_NAMESPACES]

    def value() -> int:
        return choose.choice([choose.choice(tricky), choose.getrandbits(32)]) | choose.choice([0, HIGH, 1 << 32])

    calls = [(nr, given_arguments) for nr in EVERY_NUMBER for given_arguments in (NOTHING, EVERYTHING)]
    for nr, name in NAMES[machine].items():
        if name in judged:
            calls += [(nr, six(tuple(value() for _ in range(6)))) for _ in range(200)]
    return [call for call in calls if NAMES[machine].get(call[0]) not in CHILD_NEEDS | UNFILTERED]


def differences(programs: list[bytes]) -> list[tuple[int, Arguments, int | None, int | None]]:
    machine, sample = platform.machine(), sample_calls()
    wanted = [answer(programs, ARCH[machine], *call) for call in sample]
    got = in_a_child(programs, sample)
    return [(*call, want, have) for call, want, have in zip(sample, wanted, got, strict=True) if want != have]


@pytest.mark.parametrize("options", [{}, {"nested": True}, {"setuid_bits": True}])
def test_the_running_kernel_answers_as_the_interpreter_does(options: dict[str, bool]) -> None:
    assert differences(seccomp.program(["deny"], platform.machine(), **options)) == []


def test_the_running_kernel_combines_all_three_as_the_interpreter_does() -> None:
    names = ["deny", "emulate-root", "ignore-sync"]
    assert differences(seccomp.program(names, platform.machine(), setuid_bits=True)) == []


def test_E_31_the_running_kernel_refuses_int_0x80() -> None:
    """On a machine without i386 there is nothing to refuse; on one without its emulation the kernel kills."""
    if platform.machine() != "x86_64":
        return
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
            code.write(bytes.fromhex("53 b8 14000000 cd80 5b c3"))  # push rbx; mov eax, 20 (getpid); int 0x80; pop; ret
            function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
            install(seccomp.deny("x86_64", nested=True, setuid_bits=True))
            os.write(writer, str(function()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        got = answers.read()
    status = os.waitpid(pid, 0)[1]
    assert got == str(-EPERM) or os.WIFSIGNALED(status)
