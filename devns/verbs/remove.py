"""remove: an environment, with all that was written in it."""

from __future__ import annotations

import os

from devns import sealed, store
from devns.ops import bind, tmpfs
from devns.store import ForeignFiles, Store
from devns.workflow import Bench


def remove(name: str, bench: Bench) -> None:
    """Remove the environment `name` from the store; its layers stay for others. Raises DevnsError while it runs."""
    opened = Store.open(bench.host.store, create=False)
    try:
        opened.remove(name)
    except ForeignFiles as left:
        # What belongs to subordinate ids only their own root may delete: it is one in a namespace where they are.
        trash, entry = os.path.split(left.path)
        plan = sealed.sealed_plan(bench.host, map="range", inside=[tmpfs("/"), bind(trash, "/trash", readonly=False)])

        def call() -> str:
            store.delete_tree(f"/trash/{entry}")
            return ""

        sealed.run_sealed(plan, call=call)
