"""`dir:PATH`: a root file system that stands in a directory already, used beneath the environment's own writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devns import sources
from devns.errors import TemplateError

if TYPE_CHECKING:
    from devns.host import Host
    from devns.progress import Progress
    from devns.sealed import Place
    from devns.spec import Spec


def recipes(spec: Spec, host: Host) -> list[dict[str, Any]]:
    if spec.root.packages:
        raise TemplateError(
            f"{spec.template}: root.packages: a dir: root is used as it stands, nothing is installed in it",
            hint='devns run --root -- apt-get install ..., or from = "debian:bookworm"',
        )
    return []


def directories(spec: Spec, host: Host) -> list[str]:
    path = sources.place(spec, host)
    if host.kind(path) != "directory":
        raise TemplateError(f"{spec.template}: root.from: {path}: no such directory")
    return [path]


def make(recipe: dict[str, Any], place: Place, host: Host, cache: str, progress: Progress) -> dict[str, Any]:
    raise AssertionError("a directory is used where it stands")
