"""diff: what an environment has that its layers have not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from devns import changes, sources, trees, workflow
from devns.debian import version
from devns.errors import DevnsError
from devns.store import Store
from devns.workflow import Bench


def diff(name: str | None, bench: Bench) -> dict[str, Any]:
    """`{"name", "files": [{"change", "path"}], "packages": [{"change", "name", "from", "to"}]}`.

    Files are "added", "modified" or "deleted", packages "added", "removed", "upgraded" or "downgraded". The home, and
    what devns itself puts there to enter, are left out.
    """
    spec = workflow.understand(name, bench)
    store = Store.open(bench.host.store, create=False)
    environment = store.environment(spec.name)
    if environment is None:
        raise DevnsError(f"{spec.name}: no such environment", hint="devns list")
    lower = [f"{store.path}/layers/{key}/root" for key in reversed(environment.layers)]
    lower += sources.find(spec.root.source).directories(spec, bench.host)
    plan = workflow.plan(spec, bench, ())
    made = {step["dst"] for step in plan["inside"] if "dst" in step}
    accounts = {"/etc/passwd": bench.host.uid, "/etc/group": bench.host.gid}
    places = [f"/lower/{number}" for number in range(len(lower))]

    def compare() -> list[Any]:
        found = changes.files("/upper", places, made=made, accounts=accounts)
        return [found, changes.packages("/upper", places)]

    with environment.lease():
        read = {"/upper": environment.upper, **dict(zip(places, lower, strict=True))}
        files, packages = trees.run(bench.host, compare, read=read)
    return {
        "name": spec.name,
        "files": [{"change": change, "path": path} for change, path in files],
        "packages": package_rows(packages),
    }


def package_rows(packages: Iterable[tuple[str, str | None, str | None]]) -> list[dict[str, Any]]:
    """`{"change", "name", "from", "to"}` for each (name, version before, version now)."""
    return [{"change": _change(old, new), "name": name, "from": old, "to": new} for name, old, new in packages]


def _change(old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return "added" if old is None else "removed"
    return "upgraded" if version.compare(new, old) > 0 else "downgraded"
