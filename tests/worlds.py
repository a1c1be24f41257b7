"""worlds: a home, a store and the smallest root that a real build makes layers of, in a directory of the test's own."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from devns import build, linux, plugins, workflow
from devns.host import Host
from devns.launch import started
from devns.progress import Silent
from devns.sealed import delete
from devns.store import Environment, Store
from devns.verbs.build import build as build_verb
from devns.verbs.gc import gc
from devns.verbs.listing import listing
from devns.verbs.verify import verify
from devns.workflow import Bench
from tests.store_checks import assert_store_sound

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STEP = "echo two > /etc/name; rm /etc/old; mkdir /srv/made; ln -s made /srv/link"
CHECK = "read x < /etc/name; test $x = two; test -d /srv/link; test ! -e /etc/old"
TOOLS = ("sh", "ln", "mkdir", "rm")


@functools.cache
def root(tools: tuple[str, ...] = TOOLS) -> bytes:
    """A tarball with a shell and some tools, their libraries and two files."""
    found = {f"bin/{tool}": path for tool in tools if (path := shutil.which(tool))}
    said = subprocess.run(["ldd", *found.values()], capture_output=True, text=True, check=True).stdout
    found |= {path.lstrip("/"): path for path in re.findall(r"(/\S+) \(0x", said)}
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", dereference=True) as tar:
        for name in ("bin", "etc", "tmp", "proc", "dev", "sys", "run", "srv", "home"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name in ("etc/name", "etc/old"):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = 4, 0o644
            tar.addfile(entry, io.BytesIO(b"one\n"))
        for name, path in found.items():
            tar.add(path, name, filter=_as_root)
    return data.getvalue()


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    return entry


class World:
    """`home` with the template `tiny`, a root of a tarball and one command over it; `store` is not there yet."""

    def __init__(self, place: str, *, store: str | None = None, tools: tuple[str, ...] = TOOLS) -> None:
        self.place = place
        self.home = f"{place}/home"
        self.store = store or f"{place}/store"
        self.templates = f"{self.home}/.config/devns/templates"
        os.makedirs(self.templates)
        os.makedirs(os.path.dirname(self.store), exist_ok=True)
        with open(f"{place}/root.tar", "wb") as file:
            file.write(root(tools))
        self.template("tiny", STEP)

    def template(self, name: str, *steps: str, more: str = "") -> str:
        """A template over the tarball, each step a layer. Returns its name."""
        quoted = ", ".join(f"'''{step}'''" for step in steps)
        with open(f"{self.templates}/{name}.toml", "w") as file:
            file.write(f"[root]\nfrom = 'tar:{self.place}/root.tar'\n[network]\nmode = 'none'\n{more}\n")
            file.write(f"[build]\nrun = [{quoted}]\n")
        return name

    @property
    def environ(self) -> dict[str, str]:
        """The whole environment of a devns here."""
        return {
            "HOME": self.home,
            "PATH": os.environ["PATH"],
            "DEVNS_STORE": self.store,
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/plugins",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def argv(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "devns", *arguments]

    def devns(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        environ = self.environ | options.pop("env", {})
        given: dict[str, Any] = {"cwd": self.home, "stdin": subprocess.DEVNULL, "capture_output": True} | options
        return subprocess.run(self.argv(*arguments), env=environ, text=True, check=False, **given)

    def bench(self) -> Bench:
        """What a verb is given here, to be called without a process of its own."""
        host = replace(Host.probe(), environ=self.environ, cwd=self.home, home=self.home)
        return Bench(host, plugins.load(host), Silent())

    def build(self, name: str = "tiny") -> Environment:
        return build_verb(name, self.bench())

    def enter(self, name: str, script: str) -> int:
        """The status of a shell script inside; what it says is not heard."""
        bench = self.bench()
        spec = workflow.understand(name, bench)
        environment = workflow.prepare(spec, bench)
        plan = workflow.plan(spec, bench, ["/bin/sh", "-euc", script])
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            options = workflow.run_options(bench)
            with workflow.entered(environment, plan, bench), started(plan, stdio=[null] * 3, **options) as running:
                return running.wait(forward=False)
        finally:
            os.close(null)

    def layers(self, name: str = "tiny") -> list[str]:
        bench = self.bench()
        return build.layers(workflow.understand(name, bench), bench.host)

    def manifests(self) -> dict[str, str]:
        """What each layer holds, as a hash."""
        store = Store(self.store)
        found = {}
        for key in store.layers():
            layer = store.layer(key)
            found[key] = layer.record["manifest"]["sha256"] if layer else ""
        store.close()
        return found

    def problems(self) -> list[Any]:
        found: list[Any] = verify(None, self.bench())["problems"]
        return found

    def clear(self) -> None:
        if os.path.lexists(self.store):
            delete(self.store, self.bench().host)


def apart(prepare: Callable[[], object], function: Callable[[], Any]) -> Any:
    """What `function()` returns, a JSON value, in a process with a mount namespace of its own, in which `prepare()` may
    mount; what it starts sees these mounts, too. The user is the same, and no other id is mapped."""
    answer, told = os.pipe()
    uid, gid = os.getuid(), os.getgid()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(answer)
            linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNS)
            for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            prepare()
            found = {"value": function()}
        except BaseException:
            found = {"failed": traceback.format_exc()}
        with open(told, "w") as file:
            json.dump(found, file)
        os._exit(0)
    os.close(told)
    with open(answer) as file:
        found = json.load(file)
    os.waitpid(pid, 0)
    assert "failed" not in found, found["failed"]
    return found["value"]


def tree(path: str) -> list[str]:
    """All there is beneath a directory: kind, mode and size of each, but the names of locks, and what overlayfs keeps
    for itself in a work directory."""
    return sorted(_rows(path, ""))


def _rows(top: str, path: str) -> Iterator[str]:
    for name in os.listdir(f"{top}{path}"):
        place = f"{path}/{name}"
        status = os.lstat(f"{top}{place}")
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        yield f"{place} {status.st_mode:o} {size}"
        if stat.S_ISDIR(status.st_mode) and name != "work" and place != "/locks":
            yield from _rows(top, place)


def assert_world_sound(world: World, *, again: Any = None, wanted: list[str] | None = None) -> None:
    """I1 to I6 of a store with real layers; `wanted` is its `tree` after a gc, when nothing had happened."""
    assert world.problems() == [], "I1"
    assert_store_sound(world.store, again=again)
    assert isinstance(listing(world.bench()), list), "I3"
    gc(world.bench(), cache=True)
    if wanted is not None:
        assert tree(world.store) == wanted, "I6"
