"""shell: a shell inside."""

from __future__ import annotations

from devns import launch, workflow
from devns.workflow import Bench, Options


def shell(name: str | None, bench: Bench, options: Options = Options()) -> int:
    """A shell in the environment of `name`; returns the shell's exit status."""
    spec = workflow.understand(name, bench, options)
    environment = workflow.prepare(spec, bench)
    plan = workflow.plan(spec, bench, workflow.shell_command(spec, bench.host), options)
    with workflow.entered(environment, plan, bench):
        return launch.launch(plan, **workflow.run_options(bench))
