"""Sources: where a root file system comes from. One module a source; this is how one is found by its name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

from devns.errors import TemplateError

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


def find(source: str) -> Source:
    """The module for `source`, a value of [root] from: "host", "debian:SUITE", "dir:PATH", "tar:PATH"."""
    scheme = source.partition(":")[0]
    if scheme not in _MODULES:
        raise TemplateError(f"root.from: no such source: {scheme}", hint=f"one of: {', '.join(sorted(_MODULES))}")
    return importlib.import_module(f"devns.sources.{_MODULES[scheme]}")
