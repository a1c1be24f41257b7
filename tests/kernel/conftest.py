"""What kernel tests share: a real environment around a Python function, and canaries around every test."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from devns import spaces, workflow
from devns.base import Base
from devns.host import Host
from devns.launch import Plan
from devns.plan import Step, make_plan
from devns.spec import Root, Spec, User
from tests.conftest import facts, must_work
from tests.kernel.lab import Lab, opened


@pytest.fixture
def machine(tmp_path: Any) -> Host:
    """This machine as it is, with a store of the test's own."""
    host = Host.probe()
    return replace(host, environ={**host.environ, "DEVNS_STORE": str(tmp_path / "store")})


Inside = Callable[..., Any]


@pytest.fixture
def planned(machine: Host) -> Callable[..., Plan]:
    """A Plan of the host's own root, thrown away at the end, with these steps besides."""

    def plan(*steps: Step, argv: tuple[str, ...] = (), **changes: Any) -> Plan:
        spec = replace(Spec("box", "box", root=Root(writable="discard")), **changes)
        return make_plan(spec, machine, [*Base().devns_plan(spec, machine), *steps], argv)

    return plan


@pytest.fixture
def inside(planned: Callable[..., Plan], machine: Host) -> Inside:
    """`inside(*steps, user=User(...))(function, *args)`: the function's value, run in a real environment.

    What the function needs must be imported by its module: nothing can be imported inside.
    """

    def enter(*steps: Step, **changes: Any) -> Callable[..., Any]:
        plan = planned(*steps, **changes)
        return lambda function, *args: spaces.run_call(plan, function, args, {}, machine)

    return enter


@pytest.fixture
def as_root() -> dict[str, Any]:
    return {"user": User(identity="root")}


class Canary:
    """Tokens where an environment must not reach: a file in the home and in /tmp, a variable, an open descriptor, an
    abstract socket."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self.files = [os.path.join(place, f".devns-canary-{self.token}") for place in (os.path.expanduser("~"), "/tmp")]
        for path in self.files:
            with open(path, "w") as file:
                file.write(self.token)
        os.environ["DEVNS_CANARY_TOKEN"] = self.token
        self.fd = os.open(self.files[0], os.O_RDONLY)
        os.set_inheritable(self.fd, True)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(f"\0devns-canary-{self.token}")
        self.before = [os.stat(path) for path in self.files]

    def check(self) -> None:
        """Nothing of it changed outside."""
        for path, before in zip(self.files, self.before, strict=True):
            now = os.stat(path)
            assert (now.st_ino, now.st_mtime_ns, now.st_ctime_ns, now.st_size) == (
                before.st_ino,
                before.st_mtime_ns,
                before.st_ctime_ns,
                before.st_size,
            )

    def close(self) -> None:
        os.close(self.fd)
        self.socket.close()
        os.environ.pop("DEVNS_CANARY_TOKEN", None)
        for path in self.files:
            os.unlink(path)


@pytest.fixture(autouse=True)
def canary() -> Iterator[Canary]:
    """Around every kernel test: tokens before, unchanged after, and this process' own mounts as they were."""
    bird = Canary()
    with open("/proc/self/mountinfo") as listing:
        mounts = listing.read()
    try:
        yield bird
        bird.check()
        with open("/proc/self/mountinfo") as listing:
            assert listing.read() == mounts
    finally:
        bird.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two hosts and a wire between them, for the tests of a module."""
    needed = [facts()[name] for name in ("userns", "net", "engine")]
    lacking = [fact for fact in needed if not fact.works]
    if lacking and lacking[0].id in must_work():
        pytest.fail(f"{lacking[0].id} must work here: {lacking[0].detail}", pytrace=False)
    if lacking:
        pytest.skip(f"needs {lacking[0].id}: {lacking[0].detail}")
    if shutil.which("ip") is None:
        pytest.skip("needs ip: the package iproute2 is not installed")
    with opened(tmp_path_factory.mktemp("lab")) as made:
        yield made


@pytest.fixture
def explain(machine: Host) -> Any:
    return workflow.explain(machine)
