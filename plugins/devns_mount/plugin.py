"""[mount]: the project, the home directory, and whatever else of the host is seen inside."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from devns.api import Host, Problem, Spec, Step, TemplateError, bind, cwd, hookimpl, mask, overlay, setenv, tmpfs

Writable = Literal["keep", "discard"]

_KERNEL = ("/proc", "/sys", "/dev")  # the kernel's own trees: never lent, never covered
_TMPFS = re.compile(r"(?P<dst>.+?)(?::(?P<options>(?:size|mode)=[^:,=]*(?:,(?:size|mode)=[^:,=]*)*))?", re.DOTALL)
_SIZE = re.compile(r"([1-9]\d{0,11})([KMGT]?)", re.ASCII)
_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_OVERLAY_SINCE = (5, 11)  # overlayfs in a user namespace


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bind:
    """`src` of the host, seen as `dst`. `src` is absolute, begins with "~", or is relative to the project."""

    src: str
    dst: str
    mode: Literal["ro", "rw"] = "ro"
    optional: bool = False  # nothing happens where `src` does not exist

    def __post_init__(self) -> None:
        _check_source(self.src)
        _check_destination(self.dst)


@dataclass(frozen=True)
class Overlay:
    """The directory `lower` of the host, seen as `dst` and writable there: the host's own stays as it is.

    What is written is kept with the environment, or discarded when it ends.
    """

    lower: str
    dst: str
    writable: Writable = "keep"

    def __post_init__(self) -> None:
        _check_source(self.lower)
        _check_destination(self.dst)


@dataclass(frozen=True)
class MountTable:
    """[mount]. `tmpfs` are lines like "/scratch", "/scratch:size=2G" or "/scratch:size=2G,mode=1777"."""

    project: Literal["rw", "ro", "overlay", "none"] = "rw"
    home: Literal["private", "host", "none"] = "private"
    bind: tuple[Bind, ...] = field(default=(), metadata={"merge": "add"})
    overlay: tuple[Overlay, ...] = field(default=(), metadata={"merge": "add"})
    tmpfs: tuple[str, ...] = field(default=(), metadata={"merge": "add"})

    def __post_init__(self) -> None:
        for line in self.tmpfs:
            _check_destination(_parse_tmpfs(line)[0])


# --- the hooks --------------------------------------------------------------------------------------------------------


@hookimpl
def devns_table() -> tuple[str, type]:
    return "mount", MountTable


@hookimpl
def devns_check(spec: Spec, host: Host) -> Iterable[Problem]:
    table = spec.table(MountTable)
    if host.kernel < _OVERLAY_SINCE and (table.overlay or (spec.project and table.project == "overlay")):
        yield Problem(
            "overlay",
            f"[mount] asks for an overlay, and Linux {host.release} lets only root mount one: 5.11 is the first",
            'set project = "ro" or "rw" in [mount], and leave out its overlays',
        )


@hookimpl
def devns_plan(spec: Spec, host: Host) -> Iterable[Step]:
    table = spec.table(MountTable)
    yield from _home(table, spec, host)
    yield from _project(table, spec, host)
    for number, row in enumerate(table.bind):
        src = _source(row.src, f"bind[{number}].src", spec, host, optional=row.optional)
        dst = _destination(row.dst, f"bind[{number}].dst", spec, host)
        yield bind(src, dst, readonly=row.mode == "ro", optional=row.optional, canonical=True)
    for number, layer in enumerate(table.overlay):
        lower = _source(layer.lower, f"overlay[{number}].lower", spec, host)
        if host.kind(lower) != "directory":
            raise _error(spec, f"overlay[{number}].lower", f"{layer.lower}: not a directory")
        dst = _destination(layer.dst, f"overlay[{number}].dst", spec, host)
        # What was written above one directory means nothing above another: the pair names the place.
        pair = hashlib.sha256(f"{lower}\0{dst}".encode("utf-8", "surrogateescape")).hexdigest()
        yield _overlay(dst, lower, f"overlay-{pair[:16]}" if layer.writable == "keep" else None, spec, host)
    for number, line in enumerate(table.tmpfs):
        path, size, mode = _parse_tmpfs(line)
        yield tmpfs(_destination(path, f"tmpfs[{number}]", spec, host), size=size, mode=mode)


# --- home and project -------------------------------------------------------------------------------------------------


def _home(table: MountTable, spec: Spec, host: Host) -> Iterator[Step]:
    if table.home == "none":
        return
    if _is_forbidden(host.home):
        raise _error(spec, "home", f"{host.home} cannot be a home directory inside", 'set home = "none" in [mount]')
    if table.home == "private":
        yield bind(f"{_place(spec, host)}/home", host.home, readonly=False, own=True)
    else:
        yield bind(host.realpath(host.home), host.home, readonly=False, canonical=True)
        yield from _hide_own(host.realpath(host.home), host.home, host)
    if spec.user.identity == "self":  # root's home is /root
        yield setenv("HOME", host.home, default=True)


def _project(table: MountTable, spec: Spec, host: Host) -> Iterator[Step]:
    project = spec.project
    here = host.realpath(host.cwd)
    seen = project is not None and table.project != "none"
    yield cwd(here if seen and _is_beneath(here, project or "/") else _home_inside(table, spec, host))
    if project is None or not seen:
        return
    if _is_forbidden(project) or project == host.home:
        raise _error(spec, "project", f"{project} cannot be mounted as a project", 'set project = "none" in [mount]')
    if table.project != "overlay":
        yield bind(project, project, readonly=table.project == "ro", canonical=True)
    elif _is_beneath(host.realpath(host.store), project):
        raise _error(spec, "project", f"an overlay of {project} cannot keep what is written inside it, in {host.store}")
    else:
        yield _overlay(project, project, "project", spec, host)
    yield from _hide_own(project, project, host)


def _home_inside(table: MountTable, spec: Spec, host: Host) -> str:
    if spec.user.identity == "root":
        return "/root"
    return "/" if table.home == "none" or spec.user.identity != "self" else host.home


def _hide_own(src: str, dst: str, host: Host) -> Iterator[Step]:
    """What devns keeps beneath a directory that is lent as a whole (a store in the project, say) is not lent with it:
    it holds the other environments, and what the user trusts."""
    for own in host.own:
        if _is_beneath(own, src) and own != src:
            yield mask(dst + own[len(src) :])


def _overlay(dst: str, lower: str, place: str | None, spec: Spec, host: Host) -> Step:
    keep = f"{_place(spec, host)}/{place}" if place else None
    upper, work = (f"{keep}-upper", f"{keep}-work") if keep else (None, None)
    return overlay(dst, lower=[lower], upper=upper, work=work, canonical=True)


def _place(spec: Spec, host: Host) -> str:
    """Where the store keeps what belongs to this environment."""
    return f"{host.store}/environments/{spec.name}"


# --- sources: paths of the host ---------------------------------------------------------------------------------------


def _check_source(path: str) -> None:
    _check_text(path)
    if path.startswith("~") and path.partition("/")[0] != "~":
        raise ValueError(f'{path}: only "~" itself is known, not another user\'s')


def _source(path: str, key: str, spec: Spec, host: Host, *, optional: bool = False) -> str:
    """Where `path` really lies, with no symbolic link left in it. Raises TemplateError for what is not lent to anyone.

    The answer is what the Plan says and what launch opens. A link that is changed afterwards leads nowhere new.
    """
    if path.startswith("/"):
        real = host.realpath(path)
    elif path.startswith("~"):
        real = host.realpath(host.home + path[1:])
    elif spec.project is None:
        raise _error(spec, key, f"{path}: relative to the project, and there is none", 'write it absolute, or with "~"')
    else:
        real = host.realpath(f"{spec.project}/{path}")
        # A repository must not reach the rest of the host by a link, or a "..", that looks like a path of its own.
        if not _is_beneath(real, host.realpath(spec.project)):
            raise _error(spec, key, f"{path}: leads out of the project, to {real}")
    refused = host.private(path, real)
    if refused:
        raise _error(spec, key, f"{path}: {refused}")
    kind = host.kind(real)
    if kind is None and not optional:
        raise _error(spec, key, f"{path}: no such file or directory", "set optional = true, or make it")
    if kind == "other":
        raise _error(spec, key, f"{path}: neither a file nor a directory: devices and sockets are not lent")
    return real


# --- destinations: paths inside ---------------------------------------------------------------------------------------


def _check_destination(path: str) -> None:
    _check_text(path)
    if not path.startswith("/") and path.partition("/")[0] != "~":
        raise ValueError(f'{path}: a path inside is absolute, or begins with "~/"')
    if ".." in path.split("/"):
        raise ValueError(f'{path}: a path inside has no ".." in it')
    if path.startswith("/") and _is_forbidden(_normal(path)):
        raise ValueError(f"{path}: nothing can be mounted on / or in /proc, /sys and /dev")


def _destination(path: str, key: str, spec: Spec, host: Host) -> str:
    home = "/root" if spec.user.identity == "root" else host.home
    dst = _normal(home + path[1:] if path.startswith("~") else path)
    if _is_forbidden(dst):
        raise _error(spec, key, f"{path}: nothing can be mounted on {dst}")
    return dst


def _is_forbidden(path: str) -> bool:
    return path == "/" or any(_is_beneath(path, tree) for tree in _KERNEL)


def _parse_tmpfs(line: str) -> tuple[str, int | None, int]:
    """ "/scratch:size=2G,mode=1777" -> ("/scratch", 2147483648, 0o1777)"""
    match = _TMPFS.fullmatch(line)
    if match is None:
        raise ValueError(f'{line!r}: expected a path, as in "/scratch:size=2G"')
    options = dict(part.split("=") for part in (match["options"] or "").split(",") if part)
    size, mode = options.get("size"), options.get("mode", "755")
    number = _SIZE.fullmatch(size) if size is not None else None
    if size is not None and number is None:
        raise ValueError(f'{line}: the size is a number with K, M, G or T, not "{size}"')
    if not re.fullmatch(r"[01]?[0-7]{3}", mode, re.ASCII):
        raise ValueError(f'{line}: the mode is three or four octal digits, not "{mode}"')
    return match["dst"], int(number[1]) * _FACTORS[number[2]] if number else None, int(mode, 8)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _check_text(path: str) -> None:
    if not path:
        raise ValueError("a path is not empty")
    if not path.isprintable():
        raise ValueError(f"{path!r}: a path has no control or invisible characters in it")


def _is_beneath(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")


def _normal(path: str) -> str:
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _error(spec: Spec, key: str, why: str, hint: str | None = None) -> TemplateError:
    return TemplateError(f"{spec.template}: mount.{key}: {why}", hint=hint)
