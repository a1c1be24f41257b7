"""workflow: the stages that verbs are made of: understand a template, prepare its layers, plan, enter."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from devns import build, diagnose, template, trust
from devns.errors import TemplateError, Unsupported
from devns.launch import Explain
from devns.plan import Plan, Problem, make_plan
from devns.progress import Progress, Silent
from devns.spec import Spec, make_spec
from devns.store import Environment, InUse, Store, is_name

if TYPE_CHECKING:
    from devns.host import Host
    from devns.plugins import Hooks


@dataclass(frozen=True)
class Options:
    """What one call asks for beyond its template."""

    user: str | None = None  # what [user] as would say
    map: Literal["auto", "single", "range"] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None


@dataclass(frozen=True)
class Bench:
    """What every verb works with: this machine, its plugins, and where to say what happens."""

    host: Host
    hooks: Hooks
    progress: Progress = Silent()
    note: Callable[[str], None] = lambda text: None
    trace: Callable[[str], None] | None = None  # told of each step as it runs, where somebody wants to know


def understand(name: str | None, bench: Bench, options: Options = Options()) -> Spec:
    """The Spec of a named template, or with None of the project above the working directory.

    Raises TemplateError for a bad template, and for a project file that asks for more than it is trusted with.
    """
    claims = bench.hooks.claims()
    made = document(name, bench)
    spec = make_spec(made, claims)  # first: a mistake is told as what it is, and not as a wish for trust
    trust.require(made, bench.host)
    return adjusted(spec, options)


def document(name: str | None, bench: Bench) -> template.Document:
    """The template `name`; where there is none, that of the environment `name`, which a clone has from its original."""
    claims = bench.hooks.claims()
    if name is not None and is_name(name) and not template.is_known(name, bench.host):
        environment = Store.open(bench.host.store, create=False).environment(name)
        record = environment.record if environment else {}
        if record.get("project"):
            host = replace(bench.host, cwd=record["project"])
            if template.find_project(host) != record["project"]:
                raise TemplateError(f"{name}: {record['project']}: no {template.FILE} there any more")
            return replace(template.load(None, host, claims=claims), name=name)
        if record:
            return replace(template.load(record["template"], bench.host, claims=claims), name=name)
    return template.load(name, bench.host, claims=claims)


def adjusted(spec: Spec, options: Options) -> Spec:
    """`spec` with what this call asks for instead."""
    user = spec.user
    if options.user:
        user = replace(user, identity=options.user)
    if options.map:
        user = replace(user, map=options.map)
    env = replace(spec.env, set={**spec.env.set, **options.env})
    return replace(spec, user=user, env=env)


def plan(spec: Spec, bench: Bench, argv: Sequence[str], options: Options = Options()) -> Plan:
    """The one document that launch runs; nothing is made, fetched or started for it."""
    made = make_plan(spec, bench.host, bench.hooks.steps(spec, bench.host), argv)
    return made | ({"cwd": posixpath.join(made["cwd"], options.cwd)} if options.cwd else {})


def prepare(spec: Spec, bench: Bench, *, shell_on_failure: bool = False) -> Environment:
    """All that must be there before the environment can be entered: its layers, built where they are missing.

    With `shell_on_failure` a command of [build] that fails is followed by a shell where it failed.
    """
    refuse(bench.hooks.problems(spec, bench.host))
    store = Store.open(bench.host.store)
    build.ensure(
        spec,
        bench.host,
        store,
        bench.progress,
        bench.hooks,
        shell_on_failure=shell_on_failure,
    )
    record = {"template": spec.template, "project": spec.project, "layers": build.layers(spec, bench.host)}
    environment, fresh = store.ensure_environment(spec.name, record)
    if fresh:
        bench.note(f"{spec.name}: it stands on other layers now: what was added by hand stays with those before")
    return environment


@contextmanager
def entered(environment: Environment, plan: Plan, bench: Bench) -> Iterator[None]:
    """Hold the environment while something runs in it.

    One upper directory has one overlay at a time: with two the kernel promises nothing, and files written in one are
    stale in the other. So who comes second waits, and is told.
    """
    with ExitStack() as held:
        held.enter_context(environment.lease())
        if any(step["op"] == "overlay" and step["dst"] == "/" and step["upper"] for step in plan["inside"]):
            try:
                held.enter_context(environment.turn(blocking=False))
            except InUse:
                bench.note(f"{environment.name}: another devns writes in it: waiting for that to end")
                held.enter_context(environment.turn())
        yield


def refuse(problems: Sequence[Problem]) -> None:
    """Raise Unsupported for the first problem that stands in the way."""
    for problem in problems:
        if problem.fatal:
            raise Unsupported(problem.message, hint=problem.remedy)


def explain(host: Host) -> Explain:
    """How launch puts a failed step into words on this host."""
    return partial(diagnose.explain, host=host)


def shell_command(spec: Spec, host: Host) -> list[str]:
    """The interactive shell: what [shell] says, else the caller's own where the root has it, else bash, else sh."""
    if spec.shell.program != "auto":
        return [spec.shell.program]
    if spec.root.source == "host":
        own = host.environ.get("SHELL", "")
        return [own if own.startswith(("/usr/", "/bin/")) and host.kind(own) == "file" else "/bin/sh"]
    if spec.root.source.startswith("debian:"):
        return ["/bin/bash"]
    return ["/bin/sh", "-c", "command -v bash >/dev/null && exec bash; exec sh"]


def run_options(bench: Bench) -> dict[str, Any]:
    """What `launch.started` is told of this bench."""
    return {"note": bench.note, "explain": explain(bench.host), "trace": bench.trace, "effects": bench.hooks.packages}
