"""`host`: the host's own programs, read-only. Nothing to fetch and nothing to make; the steps are in base.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devns.errors import TemplateError

if TYPE_CHECKING:
    from devns.host import Host
    from devns.progress import Progress
    from devns.sealed import Place
    from devns.spec import Spec


def recipes(spec: Spec, host: Host) -> list[dict[str, Any]]:
    if spec.root.packages:
        raise TemplateError(
            f"{spec.template}: root.packages: the host's own root is read-only, nothing is installed in it",
            hint='from = "debian:bookworm" in [root], or extends = "debian12"',
        )
    if spec.build.run:
        raise TemplateError(
            f"{spec.template}: build.run: the host's own root is read-only, no command can change it",
            hint='from = "debian:bookworm" in [root], or extends = "debian12"',
        )
    return []


def directories(spec: Spec, host: Host) -> list[str]:
    return []


def make(recipe: dict[str, Any], place: Place, host: Host, cache: str, progress: Progress) -> dict[str, Any]:
    raise AssertionError("the host's root is never made")
