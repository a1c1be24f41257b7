"""`tar:PATH`: a root file system from a tarball, unpacked once into a layer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from devns import sealed, sources, unpack
from devns.errors import DevnsError, TemplateError
from devns.ops import bind, tmpfs

if TYPE_CHECKING:
    from devns.host import Host
    from devns.progress import Progress
    from devns.sealed import Place
    from devns.spec import Spec

RECIPE = 1  # raised when the same tarball would give another tree


def recipes(spec: Spec, host: Host) -> list[dict[str, Any]]:
    """The file is known by its place, size and times: it is not read to find that it did not change."""
    path = sources.place(spec, host)
    if spec.root.packages:
        raise TemplateError(
            f"{spec.template}: root.packages: a tar: root is used as it stands, nothing is installed in it"
        )
    status = host.stat(path)
    if status is None or host.kind(path) != "file":
        raise TemplateError(f"{spec.template}: root.from: {path}: no such file")
    return [
        {
            "label": "tar",
            "recipe": RECIPE,
            "path": path,
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "map": "range" if spec.user.map == "range" else "single",
        }
    ]


def directories(spec: Spec, host: Host) -> list[str]:
    return []


def make(recipe: dict[str, Any], place: Place, host: Host, cache: str, progress: Progress) -> dict[str, Any]:
    progress.stage(f"unpack {os.path.basename(recipe['path'])}", total=recipe["size"], unit="bytes")
    archive = os.open(recipe["path"], os.O_RDONLY | os.O_CLOEXEC)
    try:
        plan = sealed.sealed_plan(
            host, map=recipe["map"], inside=[tmpfs("/"), bind(place.root, "/root", readonly=False)]
        )

        def call() -> str:
            root_fd = os.open("/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                unpack.unpack_tar(archive, root_fd, keep_special=True, owners=recipe["map"] == "range")
            except DevnsError as error:
                raise type(error)(f"{recipe['path']}: {error.message}", hint=error.hint) from None
            return ""

        sealed.run_sealed(plan, host, call=call, keep=[archive])
    finally:
        os.close(archive)
    return {}
