"""du: who takes how much room in the store."""

from __future__ import annotations

import os
from typing import Any

from devns import template, trees
from devns.store import Store
from devns.workflow import Bench


def du(bench: Bench) -> dict[str, Any]:
    """Bytes of disk, a file of several names counted once:

    `{"environments": [{"name", "own", "root", "home", "shared", "layers"}], "layers": [{"key", "bytes", "users"}],
    "cache", "leftovers", "total"}`. `root` is what was written over the layers, over those before too; `own` is that
    and the home; `shared` is what the layers take, which others may use as well. `users` are environments, and
    templates by which a layer stays.
    """
    store = Store.open(bench.host.store, create=False)
    environments = list(store.environments())
    layers = store.layers()
    cache, leftovers = ["cache"] if os.path.isdir(store.cache) else [], store.leftovers()
    roots = {environment.name: _uppers(environment.path) for environment in environments}
    homes = [f"environments/{environment.name}/home" for environment in environments]
    paths = [f"layers/{key}" for key in layers]
    paths += [path for uppers in roots.values() for path in uppers]
    size = trees.sizes(bench.host, store.path, [*paths, *homes, *cache, *leftovers])
    named = template.named_layers(bench.host)
    rows: list[dict[str, Any]] = []
    for environment in environments:
        root = sum(size[path] for path in roots[environment.name])
        home = size[f"environments/{environment.name}/home"]
        shared = sum(size.get(f"layers/{key}", 0) for key in environment.layers)
        row = {"name": environment.name, "own": root + home, "root": root, "home": home, "shared": shared}
        rows.append({**row, "layers": list(environment.layers)})
    return {
        "environments": rows,
        "layers": [{"key": key, "bytes": size[f"layers/{key}"], "users": _users(key, rows, named)} for key in layers],
        "cache": sum(size.get(path, 0) for path in cache),
        "leftovers": sum(size.get(path, 0) for path in leftovers),
        "total": sum(size.values()),
    }


def _users(key: str, rows: list[dict[str, Any]], named: dict[str, str]) -> list[str]:
    users = [str(row["name"]) for row in rows if key in row["layers"]]
    return [*users, f"template {named[key]}"] if key in named else users


def _uppers(environment: str) -> list[str]:
    """Paths relative to the store's."""
    name = os.path.basename(environment)
    return [f"environments/{name}/{entry}" for entry in sorted(os.listdir(environment)) if entry.startswith("upper-")]
