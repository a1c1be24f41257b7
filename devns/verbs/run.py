"""run: one command inside; its exit status is yours."""

from __future__ import annotations

from collections.abc import Sequence

from devns import launch, workflow
from devns.workflow import Bench, Options


def run(name: str | None, argv: Sequence[str], bench: Bench, options: Options = Options()) -> int:
    """Run `argv` in the environment of `name`, built where it is missing; returns its exit status."""
    spec = workflow.understand(name, bench, options)
    environment = workflow.prepare(spec, bench)
    plan = workflow.plan(spec, bench, argv, options)
    with workflow.entered(environment, plan, bench):
        return launch.launch(plan, **workflow.run_options(bench))
