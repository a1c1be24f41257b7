"""Sources: where a root file system comes from. One module a source; this is how one is found by its name."""

from __future__ import annotations

import hashlib
import importlib
import json
from typing import TYPE_CHECKING, Any, Protocol

from devns.errors import TemplateError
from devns.host import is_beneath

if TYPE_CHECKING:
    from devns.host import Host
    from devns.progress import Progress
    from devns.sealed import Place
    from devns.spec import Spec

Recipe = dict[str, Any]

_MODULES = {"host": "host", "debian": "debian", "dir": "directory", "tar": "tarball"}


class Source(Protocol):
    """What a source module offers."""

    def recipes(self, spec: Spec, host: Host) -> list[Recipe]:
        """What makes each layer, bottom first: JSON with a "label"; equal recipes make equal layers. Pure."""

    def directories(self, spec: Spec, host: Host) -> list[str]:
        """Directories of the host used where they stand, beneath all layers. Pure."""

    def make(self, recipe: Recipe, place: Place, host: Host, cache: str, progress: Progress) -> dict[str, Any]:
        """Fill the empty directory `place.root` with what `recipe` says; what else is worth recording is returned.

        A recipe with a "parent" stands on the layer of that key: the layers beneath are `place.lower`.
        """


def key(recipe: Recipe) -> str:
    """A layer's name in the store: its label, and the hash of all that makes it."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return f"{recipe['label']}-{digest[:32]}"


def place(spec: Spec, host: Host) -> str:
    """Where the PATH of a "dir:PATH" or "tar:PATH" really lies: see `lent`."""
    return lent(spec.root.source.partition(":")[2], "root.from", spec, host)


def lent(path: str, key: str, spec: Spec, host: Host) -> str:
    """Where `path`, which the template says at `key`, really lies, with no symbolic link left in it.

    Raises TemplateError for what is lent to no environment, and for a link that leads a project's path out of it.
    """
    real = host.realpath(path)
    error = f"{spec.template}: {key}: {path}"
    if spec.project and is_beneath(path, spec.project) and not is_beneath(real, host.realpath(spec.project)):
        raise TemplateError(f"{error}: leads out of the project, to {real}")
    templates = host.realpath(f"{host.config}/templates")
    refused = None if is_beneath(real, templates) and real != templates else host.private(path, real)
    if refused:
        raise TemplateError(f"{error}: {refused}")
    return real


def find(source: str) -> Source:
    """The module for `source`, a value of [root] from: "host", "debian:SUITE", "dir:PATH", "tar:PATH"."""
    scheme = source.partition(":")[0]
    if scheme not in _MODULES:
        raise TemplateError(f"root.from: no such source: {scheme}", hint=f"one of: {', '.join(sorted(_MODULES))}")
    return importlib.import_module(f"devns.sources.{_MODULES[scheme]}")
