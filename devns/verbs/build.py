"""build: make what an environment needs, without entering it."""

from __future__ import annotations

from devns import workflow
from devns.errors import TemplateError
from devns.lock import FILE
from devns.store import Environment
from devns.workflow import Bench, Options


def build(
    name: str | None,
    bench: Bench,
    options: Options = Options(),
    *,
    locked: bool = False,
    shell_on_failure: bool = False,
) -> Environment:
    """Build the layers of `name` where they are missing, and return the environment that stands on them.

    With `locked` there must be a lock file that says which packages; one that is there counts in any case.
    """
    spec = workflow.understand(name, bench, options)
    if locked and spec.lock is None:
        raise TemplateError(f"{spec.template}: no {FILE} beside it", hint="devns lock")
    return workflow.prepare(spec, bench, shell_on_failure=shell_on_failure)
