"""info: one environment, as its template has it and as it stands in the store."""

from __future__ import annotations

from typing import Any

from devns import build, workflow
from devns.store import Store
from devns.verbs.listing import state
from devns.workflow import Bench


def info(name: str | None, bench: Bench) -> dict[str, Any]:
    """What `name` is made of and where it lies; "built" says whether every layer is there. Makes nothing."""
    spec = workflow.understand(name, bench)
    store = Store.open(bench.host.store, create=False)
    layers = build.layers(spec, bench.host)
    environment = store.environment(spec.name)
    return {
        "name": spec.name,
        "template": spec.template,
        "project": spec.project,
        "description": spec.description,
        "root": spec.root.source,
        "packages": list(spec.root.packages),
        "layers": layers,
        "built": all(store.layer(layer) is not None for layer in layers),
        "home": environment.home if environment else None,
        "state": state(environment) if environment else "not made yet",
        "problems": [problem.message for problem in bench.hooks.problems(spec, bench.host)],
    }
