"""Each of the eight namespaces is proved twice: by its number in /proc/self/ns, and by what it does."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import time
from dataclasses import replace
from typing import Any

import pytest

import devns
from devns.ops import loopback, namespace
from devns.spec import Namespaces, Time, User, Uts

NAMES = ("user", "mnt", "pid", "uts", "ipc", "net", "cgroup", "time")
IPC_CREAT = 0o1000
_libc = ctypes.CDLL(None, use_errno=True)


def numbers() -> dict[str, str]:
    return {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMES}


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


def inside_of(path: str) -> list[list[int]]:
    return [[int(word) for word in line.split()] for line in read(path).splitlines()]


def test_every_namespace_that_is_asked_for_is_another_one(inside: Any) -> None:
    outside = numbers()
    found = inside(namespace("net"), namespaces=Namespaces(time=Time(boottime=1)))(numbers)
    assert {name for name in NAMES if found[name] == outside[name]} == set()


@pytest.mark.parametrize("name", ["pid", "ipc", "cgroup", "uts"])
def test_a_namespace_that_is_switched_off_is_the_callers(inside: Any, name: str) -> None:
    outside = numbers()
    without: Any = replace(Namespaces(), **{name: False})  # type: ignore[arg-type]  # of all but uts and time it is a bool
    found = inside(namespaces=without)(numbers)
    assert found[name] == outside[name]
    assert found["mnt"] != outside["mnt"]


def test_net_and_time_are_the_callers_unless_asked(inside: Any) -> None:
    outside = numbers()
    found = inside()(numbers)
    assert (found["net"], found["time"]) == (outside["net"], outside["time"])


def test_user_namespace_self_maps_the_caller_to_itself_and_nobody_else(inside: Any) -> None:
    uid, gid = os.getuid(), os.getgid()
    found = inside()(
        lambda: (os.getuid(), os.getgid(), inside_of("/proc/self/uid_map"), inside_of("/proc/self/gid_map"))
    )
    assert found == (uid, gid, [[uid, uid, 1]], [[gid, gid, 1]])


def test_user_namespace_root_maps_the_caller_to_zero(inside: Any, as_root: Any) -> None:
    found = inside(**as_root)(lambda: (os.getuid(), inside_of("/proc/self/uid_map"), read("/proc/self/setgroups")))
    assert found == (0, [[0, os.getuid(), 1]], "deny\n")


def test_user_namespace_explicit_rows_are_the_map(inside: Any) -> None:
    uid, gid = os.getuid(), os.getgid()
    user = User(uid_map=((4321, uid, 1),), gid_map=((1234, gid, 1),))
    assert inside(user=user)(lambda: (os.getuid(), os.getgid())) == (4321, 1234)


@pytest.mark.parametrize("identity", ["self", "root"])
def test_user_namespace_range_maps_subordinate_ids_around_the_own_one(
    inside: Any, machine: Any, require: Any, identity: Any
) -> None:
    require("range")
    start, _count = machine.subordinate("uid")
    uid = os.getuid()
    found, rows = inside(user=User(map="range", identity=identity))(
        lambda: (os.getuid(), inside_of("/proc/self/uid_map"))
    )
    assert found == (uid if identity == "self" else 0)
    assert rows[0] == [0, start, uid]
    assert [uid, uid, 1] in rows
    assert sum(row[2] for row in rows) == 65536


def test_pid_namespace_shows_init_and_the_payload_alone(inside: Any) -> None:
    pids = inside()(lambda: sorted(int(name) for name in os.listdir("/proc") if name.isdigit()))
    assert pids == [1, 2]


def test_uts_namespace_has_the_hostname_asked_for_and_leaves_the_callers(inside: Any) -> None:
    before = socket.gethostname()
    assert inside(namespaces=Namespaces(uts=Uts(hostname="elsewhere")))(socket.gethostname) == "elsewhere"
    assert socket.gethostname() == before


def test_ipc_namespace_hides_system_v_queues(inside: Any) -> None:
    key = 0x5EED + os.getpid()
    queue = _libc.msgget(key, IPC_CREAT | 0o600)
    assert queue >= 0
    try:
        assert _libc.msgget(key, 0) == queue
        assert inside()(lambda: _libc.msgget(key, 0)) == -1
        assert inside(namespaces=Namespaces(ipc=False))(lambda: _libc.msgget(key, 0)) == queue
    finally:
        _libc.msgctl(queue, 0, None)


def test_network_namespace_has_nothing_but_its_own_loopback(inside: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def attempt() -> tuple[list[str], int]:
            names = [name for _number, name in socket.if_nameindex()]
            with socket.socket() as client:
                return names, client.connect_ex(("127.0.0.1", port))

        assert inside(namespace("net"), loopback())(attempt) == (["lo"], errno.ECONNREFUSED)
        assert inside()(attempt)[1] == 0


def test_cgroup_namespace_makes_the_own_group_the_root(inside: Any) -> None:
    groups = inside()(lambda: [line.split(":", 2)[2] for line in read("/proc/self/cgroup").splitlines()])
    assert set(groups) <= {"/"}


def test_time_namespace_shifts_the_boot_clock_and_no_other(inside: Any) -> None:
    month = 30 * 86400
    clocks = (time.CLOCK_BOOTTIME, time.CLOCK_MONOTONIC, time.CLOCK_REALTIME)
    before = [time.clock_gettime(clock) for clock in clocks]
    found = inside(namespaces=Namespaces(time=Time(boottime=month)))(
        lambda: [time.clock_gettime(clock) for clock in clocks]
    )
    shifts = [round((now - then) / 86400) for now, then in zip(found, before, strict=True)]
    assert shifts == [30, 0, 0]


def test_a_program_calls_a_function_in_namespaces_and_gets_its_value() -> None:
    box = devns.namespaces(pid=True, hostname="box")
    assert box.call(lambda: (os.getpid(), socket.gethostname())) == (2, "box")


def test_a_function_called_in_namespaces_raises_here_what_it_raised_there() -> None:
    with pytest.raises(ZeroDivisionError, match="division"):
        devns.namespaces().call(lambda: 1 // 0)


def test_a_function_called_as_root_has_power_over_its_own_namespaces_only() -> None:
    def rename() -> str:
        socket.sethostname("renamed")
        return socket.gethostname()

    before = socket.gethostname()
    assert devns.namespaces(uts=True, root=True).call(rename) == "renamed"
    assert socket.gethostname() == before


def test_only_plain_values_come_back() -> None:
    with pytest.raises(TypeError, match="object is not a literal"):
        devns.namespaces().call(object)
