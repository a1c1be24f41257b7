"""list: the environments in the store."""

from __future__ import annotations

from typing import Any

from devns.store import Environment, Store
from devns.workflow import Bench


def listing(bench: Bench) -> list[dict[str, Any]]:
    """One `{"name", "template", "project", "layers", "state"}` for each environment, by name.

    `state` is "running", "ready", or "broken: why" where its record cannot be read.
    """
    store = Store.open(bench.host.store, create=False)
    return [
        {
            "name": environment.name,
            "template": environment.record.get("template"),
            "project": environment.record.get("project"),
            "layers": list(environment.layers),
            "state": state(environment),
        }
        for environment in store.environments()
    ]


def state(environment: Environment) -> str:
    """ "running", "ready", or "broken: why"."""
    if environment.broken:
        return f"broken: {environment.broken}"
    return "running" if environment.in_use else "ready"
