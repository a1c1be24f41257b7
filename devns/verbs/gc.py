"""gc: what nothing names any more goes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from devns import durable, sealed, template, trees
from devns.errors import DevnsError
from devns.store import InUse, Store
from devns.workflow import Bench

_DIGEST = re.compile(r"[0-9a-f]{64}")
# `releases` is no copy of anything: it is how an archive that was rolled back is noticed.
_FETCHED = ("debs", "indexes")


def gc(bench: Bench, *, cache: bool = False, dry_run: bool = False) -> list[dict[str, Any]]:
    """Remove layers that no environment or template names and nothing uses, and what interrupted commands left over.

    With `cache` also downloads that no layer's record names by their hash. Returns what went, or with `dry_run` what
    would: `{"kind": "layer" | "leftover" | "cache", "name", "files", "bytes"}`. What is in use meanwhile stays.
    """
    store = Store.open(bench.host.store, create=False)
    unused, leftovers = store.unused_layers(), store.leftovers()
    named = template.named_layers(bench.host)  # after: what is committed meanwhile is held until its template is there
    layers = tuple(key for key in unused if key not in named)
    paths = {f"layers/{key}": key for key in layers} | {path: path for path in leftovers}
    sizes = trees.sizes(bench.host, store.path, paths)
    rows = []
    for path, name in paths.items():
        if dry_run or _removed(store, path, name, bench):
            kind = "layer" if path.startswith("layers/") else "leftover"
            rows.append({"kind": kind, "name": name, "files": None, "bytes": sizes[path]})
    if not dry_run:
        for path in store.collect():
            sealed.delete(path, bench.host)
    return rows + (_clean(store, layers, dry_run) if cache and os.path.isdir(store.cache) else [])


def _removed(store: Store, path: str, name: str, bench: Bench) -> bool:
    if path != f"layers/{name}":
        return True  # by collect(), all of them at once
    try:
        with trees.finishing(bench.host):
            store.remove_layer(name)
    except InUse:  # somebody came to want it
        return False
    except DevnsError:
        if not os.path.lexists(f"{store.path}/{path}"):  # another gc was faster
            return False
        raise
    return True


def _clean(store: Store, gone: tuple[str, ...], dry_run: bool) -> list[dict[str, Any]]:
    """Delete downloads that no layer names. While a layer is being made nothing goes: it may be made of them."""
    kept = [store.layer(key) for key in store.layers() if key not in gone]
    named = {digest for layer in kept if layer for digest in _digests(layer.record)}
    rows = []
    with store.clearing(), durable.telling(store.cache):
        for part in _FETCHED:
            files = size = 0
            for path in _files(f"{store.cache}/{part}"):
                if not named.isdisjoint(_DIGEST.findall(os.path.basename(path))):
                    continue
                with suppress(FileNotFoundError):
                    size += os.lstat(path).st_blocks * trees.BLOCK
                    files += 1
                    if not dry_run:
                        os.unlink(path)
            if files:
                rows.append({"kind": "cache", "name": part, "files": files, "bytes": size})
    return rows


def _files(directory: str) -> list[str]:
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        return sorted(entry.path for entry in entries if not entry.is_dir(follow_symlinks=False))
    return []


def _digests(value: Any) -> Iterator[str]:
    """Every SHA-256 that a record names, wherever it stands in it."""
    if isinstance(value, str):
        yield from _DIGEST.findall(value)
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _digests(part)
