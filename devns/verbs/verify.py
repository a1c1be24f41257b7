"""verify: whether the store still holds what was put into it."""

from __future__ import annotations

from typing import Any

from devns import build, manifest, trees
from devns.errors import DevnsError
from devns.store import Environment, Store
from devns.workflow import Bench


def verify(name: str | None, bench: Bench) -> dict[str, Any]:
    """`{"environments": [names], "layers": [keys], "problems": [{"kind", "name", "path", "problem"}]}`.

    Every layer's files are read and compared with what was recorded when it was finished; with a `name` only those of
    this environment. `kind` is "environment" or "layer", `path` None where the whole of it is meant.
    """
    store = Store.open(bench.host.store, create=False)
    environments = list(store.environments()) if name is None else [_named(name, store)]
    keys = store.layers() if name is None else environments[0].layers
    problems = []
    for environment in environments:
        problems += [_problem("environment", environment.name, None, text) for text in _record(environment, store)]
    for key in keys:
        bench.progress.stage(f"verify {key}")
        problems += [_problem("layer", key, path, text) for path, text in _layer(key, store, bench)]
    bench.progress.end()
    return {"environments": [found.name for found in environments], "layers": list(keys), "problems": problems}


def _named(name: str, store: Store) -> Environment:
    environment = store.environment(name)
    if environment is None:
        raise DevnsError(f"{name}: no such environment", hint="devns list")
    return environment


def _problem(kind: str, name: str, path: str | None, text: str) -> dict[str, Any]:
    return {"kind": kind, "name": name, "path": path, "problem": text}


def _record(environment: Environment, store: Store) -> list[str]:
    if environment.broken:
        return [environment.broken]
    return [f"its layer {key} is not there" for key in environment.layers if store.layer(key) is None]


def _layer(key: str, store: Store, bench: Bench) -> list[tuple[str | None, str]]:
    layer = store.layer(key)
    if layer is None:
        return [(None, "its record or its tree cannot be read")]
    recipe, recorded = layer.record.get("recipe"), layer.record.get("manifest")
    if not isinstance(recipe, dict) or not isinstance(recipe.get("label"), str) or build.key(recipe) != key:
        return [(None, "its record is not the one that its name stands for")]
    if not isinstance(recorded, dict):
        return [(None, "no manifest was recorded for it")]

    def compare() -> list[Any]:
        if manifest.digest(f"/layer/{manifest.FILE}") != recorded.get("sha256"):
            return [(None, "its manifest is not the one that was recorded")]
        return manifest.compare("/layer/root", f"/layer/{manifest.FILE}")

    map = "range" if recipe.get("map") == "range" else "single"  # ids were recorded as they are inside
    return [(path, text) for path, text in trees.run(bench.host, compare, read={"/layer": layer.path}, map=map)]
