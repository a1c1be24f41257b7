"""remove: an environment, with all that was written in it."""

from __future__ import annotations

from devns import trees
from devns.store import Store
from devns.workflow import Bench


def remove(name: str, bench: Bench) -> None:
    """Remove the environment `name` from the store; its layers stay for others. Raises DevnsError while it runs."""
    with trees.finishing(bench.host):
        Store.open(bench.host.store, create=False).remove(name)
