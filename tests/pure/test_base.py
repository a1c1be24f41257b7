"""base: the host's own root lends nothing that is the user's alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from devns.base import Base
from devns.ops import bind, mask, tmpfs
from devns.plan import Step, make_plan
from devns.spec import Spec
from devns_mount import plugin as mount

if TYPE_CHECKING:
    from tests.conftest import MakeHost


def beneath_opt(host: MakeHost, files: Mapping[str, Any], **options: Any) -> list[Step]:
    made = host({"/opt/tool": "", **files}, uid=os.getuid(), gid=os.getgid(), **options)
    steps = Base().devns_plan(Spec("box", "box"), made)
    return [step for step in steps if step.get("dst", "").startswith("/opt")]


def test_a_store_beneath_a_directory_of_the_host_is_hidden(host: MakeHost) -> None:
    environ = {"HOME": "/home/user", "DEVNS_STORE": "/opt/store", "XDG_STATE_HOME": "/opt/state"}
    assert beneath_opt(host, {"/opt/store/x": "", "/opt/state/devns/x": ""}, environ=environ) == [
        mask("/opt/state/devns", default=True),
        mask("/opt/store", default=True),
        bind("/opt", "/opt", default=True),
    ]


def test_a_store_is_hidden_where_a_link_leads_to_it(host: MakeHost) -> None:
    made = host({"/data/opt/store/x": ""}, links={"/opt": "/data/opt"}, environ={"DEVNS_STORE": "/opt/store"})
    assert mask("/opt/store", default=True) in list(Base().devns_plan(Spec("box", "box"), made))


def test_a_home_beneath_a_directory_of_the_host_is_hidden(host: MakeHost) -> None:
    steps = beneath_opt(host, {"/opt/home/user/.ssh/id": ""}, environ={"HOME": "/opt/home/user"})
    assert tmpfs("/opt/home/user", default=True) in steps
    assert not any(step["op"] == "bind" and step["dst"] != "/opt" for step in steps)


def test_a_home_that_is_the_systems_stays_as_it_is(host: MakeHost) -> None:
    made = host({"/usr/sbin/x": ""}, uid=os.getuid() + 1, environ={"HOME": "/usr/sbin"})
    assert tmpfs("/usr/sbin", default=True) not in list(Base().devns_plan(Spec("box", "box"), made))


def test_a_home_that_is_asked_for_is_there_all_the_same(host: MakeHost) -> None:
    files = {"/opt/home/user/x": "", "/opt/tool": ""}
    made = host(files, uid=os.getuid(), gid=os.getgid(), environ={"HOME": "/opt/home/user"})
    spec = Spec("box", "box")
    plan = make_plan(spec, made, [*Base().devns_plan(spec, made), *mount.devns_plan(spec, made)])
    (home,) = (step for step in plan["inside"] if step.get("dst") == "/opt/home/user")
    assert home == bind(f"{made.store}/environments/box/home", "/opt/home/user", readonly=False, own=True)
