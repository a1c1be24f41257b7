"""trust, untrust: whether the project's file may act."""

from __future__ import annotations

from typing import Any

from devns import template
from devns import trust as records
from devns.errors import TemplateError
from devns.spec import make_spec
from devns.workflow import Bench


def trust(bench: Bench, *, expect: str | None = None, record: bool = True) -> dict[str, Any]:
    """`{"path", "sha256", "trusted", "grants": [{"change", "key", "value"}]}`; with `record` the file is trusted now.

    `change` is "+" for what was not asked for when it was last trusted, "-" for what is no longer, "=" for the rest.
    """
    claims = bench.hooks.claims()
    document = template.load(None, bench.host, claims=claims)
    make_spec(document, claims)  # what is no template is not trusted either
    changed = records.changes(document, bench.host)
    rows = [("+" if grant in changed.added else "=", grant) for grant in records.grants(document)]
    rows += [("-", grant) for grant in changed.removed]
    digest = records.trust(document, bench.host, expect=expect) if record else records.digest(document)
    return {
        "path": document.template,
        "sha256": digest,
        "trusted": records.is_trusted(document, bench.host),
        "grants": [{"change": mark, "key": grant.key, "value": grant.value} for mark, grant in rows],
    }


def untrust(bench: Bench) -> str:
    """Forget every record of the project's file; returns its path."""
    project = template.find_project(bench.host)
    if project is None:
        raise TemplateError(f"{bench.host.cwd}: no {template.FILE} here or above, up to the repository's root")
    path = f"{project}/{template.FILE}"
    records.untrust(path, bench.host)
    return path
