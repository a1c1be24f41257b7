"""list: the environments in the store."""

from __future__ import annotations

from typing import Any

from devns.store import Store
from devns.workflow import Bench


def listing(bench: Bench) -> list[dict[str, Any]]:
    """One `{"name", "template", "project", "layers", "state"}` for each environment, by name.

    `state` is "running", "ready", or "broken: why" where its record cannot be read.
    """
    store = Store.open(bench.host.store, create=False)
    rows = []
    for environment in store.environments() if store else ():
        record = environment.record
        rows.append(
            {
                "name": environment.name,
                "template": record.get("template"),
                "project": record.get("project"),
                "layers": environment.layers,
                "state": environment.state(),
            }
        )
    return rows
