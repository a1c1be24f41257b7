"""Being another user inside: who that is by the kernel's account, what it owns, and what it has no power over."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from devns.ops import bind, loopback, namespace
from devns.spec import User

STRANGER = "33:34"


def status(key: str) -> str:
    with open("/proc/self/status") as file:
        return next(line.split(":")[1].strip() for line in file if line.startswith(f"{key}:"))


def owner(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_uid, found.st_gid


def refused(call: Any, *arguments: Any) -> int:
    """The errno, 0 where it worked."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or -1
    return 0


def test_with_one_mapped_id_every_file_is_that_users(inside: Any) -> None:
    found = inside(user=User(identity=STRANGER))(
        lambda: (
            os.getresuid(),
            os.getresgid(),
            owner("/"),
            owner("/run"),
            owner("/dev/shm"),
            os.access("/run", os.W_OK),
        )
    )
    assert found == ((33,) * 3, (34,) * 3, (33, 34), (33, 34), (33, 34), True)


def test_what_another_user_writes_is_yours_outside(inside: Any, machine: Any, tmp_path: Any) -> None:
    place = tmp_path / "lent"
    place.mkdir()
    inside(bind(str(place), "/mnt", readonly=False), user=User(identity=STRANGER))(os.mkdir, "/mnt/made")
    assert owner(str(place / "made")) == (machine.uid, machine.gid)


def test_in_a_range_the_files_stay_roots_and_the_groups_are_the_users_own(inside: Any, require: Any) -> None:
    require("range")
    found = inside(user=User(identity=STRANGER, map="range"))(
        lambda: (os.getresuid(), os.getresgid(), os.getgroups(), owner("/run"), os.access("/run", os.W_OK))
    )
    assert found == ((33,) * 3, (34,) * 3, [34], (0, 0), False)


@pytest.mark.parametrize("map", ["single", "range"])
def test_E_25_another_user_has_no_capability_and_cannot_become_root(inside: Any, require: Any, map: Any) -> None:
    require(*(["range"] if map == "range" else []))
    sets = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    found = inside(user=User(identity=STRANGER, map=map))(
        lambda: (
            [int(status(name), 16) for name in sets],
            status("NoNewPrivs"),
            bool(refused(os.setuid, 0)),
            bool(refused(os.setgid, 0)),
            bool(refused(os.chroot, "/")),
        )
    )
    assert found == ([0] * 5, "1", True, True, True)


def test_uid_0_by_its_number_is_root(inside: Any, as_root: Any) -> None:
    def powers() -> tuple[int, str, str]:
        return os.getuid(), status("CapEff"), status("Seccomp_filters")

    assert inside(user=User(identity="0"))(powers) == inside(**as_root)(powers)


@pytest.mark.parametrize("identity", ["self", STRANGER, "root"])
def test_in_a_network_of_its_own_everybody_listens_on_every_port(inside: Any, require: Any, identity: str) -> None:
    require("net")

    def listen() -> int:
        with socket.create_server(("127.0.0.1", 53)) as server:
            return int(server.getsockname()[1])

    assert inside(namespace("net"), loopback(), user=User(identity=identity))(listen) == 53


def test_a_chroot_of_roots_leads_nowhere_but_to_the_environments_own_root(inside: Any, as_root: Any) -> None:
    def escape() -> tuple[list[str], list[str]]:
        before = sorted(os.listdir("/"))
        out = os.open("/", os.O_RDONLY)
        os.chroot("/tmp")
        os.fchdir(out)
        for _ in range(40):
            os.chdir("..")
        os.chroot(".")
        return before, sorted(os.listdir("/"))

    before, after = inside(**as_root)(escape)
    assert after == before
    assert "dev" in before
