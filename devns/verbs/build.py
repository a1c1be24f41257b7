"""build: make what an environment needs, without entering it."""

from __future__ import annotations

from devns import workflow
from devns.store import Environment
from devns.workflow import Bench, Options


def build(
    name: str | None, bench: Bench, options: Options = Options(), *, shell_on_failure: bool = False
) -> Environment:
    """Build the layers of `name` where they are missing, and return the environment that stands on them."""
    spec = workflow.understand(name, bench, options)
    return workflow.prepare(spec, bench, shell_on_failure=shell_on_failure)
