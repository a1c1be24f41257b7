"""reset: an environment as it was made, without what was written in it since."""

from __future__ import annotations

import os

from devns import trees
from devns.store import Environment, Store
from devns.workflow import Bench


def reset(name: str, bench: Bench, *, home: bool = False) -> None:
    """Empty what was written over the layers of `name`, and with `home` its home. Raises DevnsError while it runs."""
    store = Store.open(bench.host.store, create=False)
    if home:
        _take_back(store.environment(name), bench)
    with trees.finishing(bench.host):
        store.reset(name, home=home)


def _take_back(environment: Environment | None, bench: Bench) -> None:
    """Root inside, with ids of its own, may have given the home to one of them: only its owner can move it away."""
    if environment is None or environment.broken or environment.in_use:
        return
    if os.stat(environment.home).st_uid != bench.host.uid:
        uid, gid = bench.host.uid, bench.host.gid  # which stay themselves inside
        trees.run(bench.host, lambda: os.chown("/home", uid, gid), write={"/home": environment.home}, map="range")
