"""[network] mode = "user" with programs that people use, against servers in the laboratory and package registries."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devns import spaces
from devns.host import Host
from devns.launch import Plan
from devns.spec import Spec
from devns_network.plugin import NetworkTable, devns_plan
from tests.kernel import lab as labs
from tests.kernel.lab import Lab

_MEGABYTES = 128


def run(*argv: str) -> tuple[int, str]:
    """The status of a command and what it said."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False)
    return done.returncode, done.stdout.decode(errors="replace")


@pytest.fixture
def program(request: pytest.FixtureRequest) -> str:
    """A program of this machine that the test is about."""
    name = str(request.param)
    if shutil.which(name) is None:
        pytest.skip(f"needs {name}: it is not installed")
    return name


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("program", [name], indirect=True)


class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


def serve_files(ready: Callable[[], None], directory: str, port: int) -> None:
    server = http.server.ThreadingHTTPServer(("", port), functools.partial(Quiet, directory=directory))
    ready()
    server.serve_forever()


def fetch(url: str) -> tuple[int, str]:
    with subprocess.Popen(["curl", "-sS", "-m", "50", url], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        digest = hashlib.sha256()
        while data := client.stdout.read(1 << 20):
            digest.update(data)
        return client.wait(), digest.hexdigest()


@needs("curl")
def test_curl_gets_a_hundred_megabytes_by_name_unchanged(lab: Lab, program: str, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * _MEGABYTES
    (tmp_path / "large").write_bytes(data)
    lab.start("remote", serve_files, str(tmp_path), 8080)
    assert lab.inside(fetch, "http://good.example:8080/large") == (0, hashlib.sha256(data).hexdigest())


def clone(url: str) -> tuple[int, str]:
    status, said = run("git", "clone", "-q", url, "/tmp/clone")
    return (status, said) if status else run("git", "-C", "/tmp/clone", "log", "--format=%s")


@needs("git")
def test_git_clones_over_http(lab: Lab, program: str, tmp_path: Path) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q", "."], check=True)
    (tmp_path / "file").write_text("x\n" * 10_000)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, *who, "commit", "-q", "-m", "the first"], check=True)
    subprocess.run([*git, "update-server-info"], check=True)
    lab.start("remote", serve_files, str(tmp_path), 8081)
    assert lab.inside(clone, f"http://{labs.REMOTE}:8081/.git") == (0, "the first\n")


@needs("dig")
@pytest.mark.parametrize("way", ["+notcp", "+tcp"])
def test_dig_asks_by_udp_and_by_tcp(lab: Lab, program: str, way: str) -> None:
    words = ("dig", "+short", "+time=3", "+tries=1", way)
    assert lab.inside(run, *words, "alias.example") == (0, f"step.example.\nend.example.\n{labs.REMOTE}\n")
    assert lab.inside(run, *words, "-6", "@fd00:d::3", "good.example", "AAAA") == (0, f"{labs.REMOTE6}\n")


@needs("ping")
def test_ping_tells_the_living_from_the_dead(lab: Lab, program: str) -> None:
    for address in (labs.REMOTE, labs.REMOTE6):
        status, said = lab.inside(run, "ping", "-n", "-c", "2", "-i", "0.2", "-W", "3", address)
        assert (status, "2 received" in said) == (0, True), said
    status, said = lab.inside(run, "ping", "-n", "-c", "1", "-W", "1", labs.BLACK_HOLE)
    assert (status, "0 received" in said) == (1, True), said


# --- package registries, reached as this machine is configured to -----------------------------------------------------

Outside = Callable[..., tuple[int, str]]


@pytest.fixture
def outside(planned: Callable[..., Plan], machine: Host) -> Outside:
    """Run a command in an environment with a network of its own, on this machine itself."""

    def start(*argv: str) -> tuple[int, str]:
        tables: dict[type, Any] = {NetworkTable: NetworkTable(mode="user")}
        plan = planned(*devns_plan(Spec("box", "box", tables=tables), machine))
        return spaces.run_call(plan, run, argv, {}, machine)

    return start


@pytest.mark.network
@needs("apt-get")
def test_apt_updates_its_lists(outside: Outside, program: str) -> None:
    places = [word for kind in ("State", "Cache") for word in ("-o", f"Dir::{kind}=/tmp/apt-{kind}")]
    script = f"mkdir -p /tmp/apt-State/lists/partial /tmp/apt-Cache && apt-get {' '.join(places)} -q update"
    status, said = outside("sh", "-c", script)
    assert (status, "Reading package lists" in said, "Err:" in said) == (0, True, False), said


@pytest.mark.network
def test_pip_downloads_a_package(outside: Outside) -> None:
    script = "python3 -m venv /tmp/v && /tmp/v/bin/pip -q download --no-deps -d /tmp/got pluggy && ls /tmp/got"
    status, said = outside("sh", "-c", script)
    assert (status, "pluggy-" in said) == (0, True), said
