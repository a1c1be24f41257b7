"""commit: what was written in an environment becomes a layer, and a template that stands on it."""

from __future__ import annotations

import json
from typing import Any

from devns import build, changes, copying, template, trees, workflow
from devns.errors import DevnsError
from devns.spec import Spec
from devns.store import Environment, Store
from devns.workflow import Bench

COMMIT = 1  # the recipe of such a layer: raised when the same files would make another tree


def commit(name: str, original: str | None, bench: Bench) -> dict[str, Any]:
    """Make the template `name` of `original`, or of the project: `{"template": path, "layer": key, "entries": number}`.

    The environment stays as it is. The template extends the named one beneath it, and names all layers it stands on, so
    it holds whatever becomes of that. Raises DevnsError while the environment runs.
    """
    if not template.is_name(name):
        raise DevnsError(f"{name!a}: not fit for a template's name", hint="lower-case letters, digits and . _ -")
    if template.is_known(name, bench.host):
        raise DevnsError(f"{name}: there is a template of this name", hint="devns template list")
    spec = workflow.understand(original, bench)
    store = Store.open(bench.host.store, create=False)
    environment = _checked(spec, store, bench)
    lower = build.lower_directories(spec, bench.host)
    places = [f"/lower/{number}" for number in range(len(lower))]

    def copy() -> list[Any]:
        copying.copy_tree("/old", "/new")
        return changes.packages("/old", places)

    with environment.lease(exclusive=True), store.staging() as staging:
        bench.progress.stage(f"copy what was written in {spec.name}")
        read = {"/old": environment.upper, **dict(zip(places, lower, strict=True))}
        packages = trees.run(bench.host, copy, read=read, write={"/new": staging.root})
        bench.progress.stage("write to disk")
        made = trees.record(bench.host, staging.path, build.id_map(spec))
        recipe = {
            "label": "commit",
            "recipe": COMMIT,
            "parent": environment.layers[-1] if environment.layers else lower,
            "content": made["manifest"]["sha256"],
            "map": build.id_map(spec),
        }
        key = build.key(recipe)
        store.commit(staging, key, {"recipe": recipe, **made, "packages": _packages(store, environment, packages)})
        beneath = template.base(workflow.document(original, bench))
        path = template.add(name, _text(spec, beneath, [*environment.layers, key]), bench.host)
    bench.progress.end()
    return {"template": path, "layer": key, "entries": made["manifest"]["entries"]}


def _checked(spec: Spec, store: Store, bench: Bench) -> Environment:
    environment = store.environment(spec.name)
    if environment is None:
        raise DevnsError(f"{spec.name}: no such environment", hint="devns list")
    if environment.broken:
        raise DevnsError(f"{spec.name}: {environment.broken}", hint=f"devns remove {spec.name}")
    if spec.root.source == "host":
        raise DevnsError(f"{spec.name}: its root is the host's, with no layers that another could lie on")
    if list(environment.layers) != build.layers(spec, bench.host):
        raise DevnsError(f"{spec.name}: its template asks for other layers by now", hint="devns build")
    return environment


def _packages(store: Store, environment: Environment, changed: list[Any]) -> dict[str, str]:
    """Of the whole root, name -> version, as far as the layers beneath recorded theirs."""
    found: dict[str, str] = {}
    for key in environment.layers:
        layer = store.layer(key)
        found |= layer.record.get("packages", {}) if layer else {}
    for name, _, now in changed:
        if now is None:
            found.pop(name, None)
        else:
            found[name] = now
    return found


def _text(spec: Spec, beneath: str | None, layers: list[str]) -> str:
    """What a project's own file asks for beyond its root stays with the project."""
    lines = [
        f"# {spec.name}, with what was written in it",
        *([f"extends = {json.dumps(beneath)}"] if beneath else []),
        "",
        "[root]",
        f"from = {json.dumps(spec.root.source)}",
        "layers = [",
        *(f"    {json.dumps(key)}," for key in layers),
        "]",
    ]
    if build.id_map(spec) == "range":
        lines += ["", "[user]", 'map = "range"']
    return "\n".join(lines) + "\n"
