"""plan: what would be done, before anything is."""

from __future__ import annotations

from collections.abc import Sequence

from devns import workflow
from devns.plan import Plan
from devns.workflow import Bench, Options


def plan(name: str | None, argv: Sequence[str], bench: Bench, options: Options = Options()) -> Plan:
    """The document that `run` would launch for `argv`, or `shell` where it is empty. Builds and writes nothing."""
    spec = workflow.understand(name, bench, options)
    return workflow.plan(spec, bench, argv or workflow.shell_command(spec, bench.host), options)
