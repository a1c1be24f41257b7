"""build: which layers an environment stands on, which of them are missing, and the Plans that make each."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from devns import sources
from devns.store import upper_name

if TYPE_CHECKING:
    from devns.host import Host
    from devns.progress import Progress
    from devns.spec import Spec
    from devns.store import Store

Recipe = dict[str, Any]


def recipes(spec: Spec, host: Host) -> list[Recipe]:
    """What makes each layer of this environment, bottom first: JSON, equal for equal layers. Pure.

    A source that is used where it stands (`host`, `dir:`) has none.
    """
    return sources.find(spec.root.source).recipes(spec, host)


def key(recipe: Recipe) -> str:
    """A layer's name in the store: its label, and the hash of all that makes it."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return f"{recipe['label']}-{digest[:32]}"


def layers(spec: Spec, host: Host) -> list[str]:
    return [key(recipe) for recipe in recipes(spec, host)]


def lower_directories(spec: Spec, host: Host) -> list[str]:
    """The directories beneath the environment's upper one, topmost first."""
    finished = [f"{host.store}/layers/{name}/root" for name in reversed(layers(spec, host))]
    return finished + sources.find(spec.root.source).directories(spec, host)


def upper_directories(spec: Spec, host: Host) -> tuple[str, str]:
    """Where this environment keeps what is written: the upper directory, and overlayfs' work directory."""
    place = f"{host.store}/environments/{spec.name}/{upper_name(layers(spec, host))}"
    return f"{place}/root", f"{place}/work"


def ensure(spec: Spec, host: Host, store: Store, progress: Progress) -> None:
    """Make each layer that is missing. Of two builds of one layer the second waits, and finds it there."""
    source = sources.find(spec.root.source)
    for recipe in recipes(spec, host):
        name = key(recipe)
        if store.layer(name) is not None:
            continue
        with store.lock(name):
            if store.layer(name) is not None:
                continue
            store.collect()
            with store.staging() as staging:
                made = source.make(recipe, staging.root, host, store.cache, progress)
                progress.stage("write to disk")
                store.commit(staging, name, {"recipe": recipe, **made})
    progress.end()
