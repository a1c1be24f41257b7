"""lock: the exact packages of a project's environment, in a file beside its template."""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from typing import Any

from devns import template
from devns import trust as records
from devns.errors import DevnsError, TemplateError
from devns.lock import FILE, Lock, changes, text
from devns.sources import debian
from devns.spec import Spec, make_spec
from devns.store import Store
from devns.verbs.diff import package_rows
from devns.workflow import Bench


def lock(bench: Bench, *, update: bool = False) -> dict[str, Any]:
    """Write `.devns.lock`: `{"path", "packages": number, "changes": [{"change", "name", "from", "to"}]}`.

    One that fits what the templates ask for keeps its packages unless `update` asks for today's. Raises TemplateError
    for a project without packages of a distribution.
    """
    claims = bench.hooks.claims()
    document = template.load(None, bench.host, claims=claims, locked=False)
    spec = make_spec(document, claims)
    records.require(document, bench.host)
    if not spec.root.source.startswith("debian:"):
        raise TemplateError(f"{document.template}: root.from: {spec.root.source}: there are no packages to lock")
    if spec.root.layers:
        raise TemplateError(f"{document.template}: root.layers: finished layers are as they are: nothing to lock")
    before = _before(bench, claims)
    made = _kept(before, spec, bench) if before and not update else None
    if made is None:
        store = Store.open(bench.host.store)
        with store.staging():  # so that the cache stays meanwhile
            made = debian.lock(spec, bench.host, store.cache, bench.progress)
        bench.progress.end()
    path = f"{document.project}/{FILE}"
    _write(path, text(made))
    records.trust_lock(template.load(None, bench.host, claims=claims), bench.host)
    return {"path": path, "packages": len(made.packages), "changes": package_rows(changes(before, made))}


def _before(bench: Bench, claims: Any) -> Lock | None:
    """The lock file there is; None where there is none that can be read, or that is nobody's here."""
    try:
        document = template.load(None, bench.host, claims=claims)
        return make_spec(document, claims).lock if records.is_lock_trusted(document, bench.host) else None
    except TemplateError:
        return None


def _kept(before: Lock, spec: Spec, bench: Bench) -> Lock | None:
    """The same packages, where they are still what is asked for; made anew in today's way."""
    kept = replace(before, recipe=debian.RECIPE)
    try:
        debian.recipes(replace(spec, lock=kept), bench.host)
    except TemplateError:
        return None
    return kept


def _write(path: str, content: str) -> None:
    """Whole or not at all: made beside its place, and renamed."""
    beside = f"{path}.{secrets.token_hex(4)}"
    try:
        try:
            with open(beside, "x", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.rename(beside, path)
        except BaseException:
            if os.path.lexists(beside):
                os.unlink(beside)
            raise
    except OSError as error:
        raise DevnsError(f"{path}: cannot be written: {os.strerror(error.errno or 0).lower()}") from None
