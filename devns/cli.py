"""cli: the typer app. Arguments, printing, the one `except DevnsError`, exit codes. It decides nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NoReturn

import typer

from devns import __version__, console, plugins
from devns.errors import DevnsError
from devns.host import Host, refuse_setuid
from devns.spec import is_identity, is_variable
from devns.workflow import Bench, Options

app = typer.Typer(
    help="Rootless development environments from nothing but Python and a kernel.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
templates = typer.Typer(help="The templates there are.", no_args_is_help=True)
plugin_app = typer.Typer(help="The plugins there are, and which of them may act.", no_args_is_help=True)
app.add_typer(templates, name="template")
app.add_typer(plugin_app, name="plugin")

Env = Annotated[str | None, typer.Argument(metavar="[ENV]", help="A template's name; else the project's .devns.toml.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Root = Annotated[bool, typer.Option("--root", help="Be root inside, to install packages.")]
User = Annotated[str | None, typer.Option("--user", metavar="NAME|UID[:GID]", help="Be this user inside.")]
Map = Annotated[Literal["auto", "single", "range"] | None, typer.Option("--map", help="How ids are mapped.")]
Set = Annotated[list[str] | None, typer.Option("-e", "--env", metavar="NAME[=VALUE]", help="Set or pass a variable.")]
Cwd = Annotated[str | None, typer.Option("-w", "--workdir", metavar="PATH", help="Where to start, inside.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Print each step as it runs.")]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line. What stands after the first `--` is a command for inside and is not looked at here."""
    console.open_streams()
    head = sys.argv[1:] if arguments is None else arguments
    command: list[str] = []
    if "--" in head:
        at = head.index("--")
        head, command = head[:at], head[at + 1 :]
    try:
        sys.exit(_run(head, command))
    except BrokenPipeError:  # `devns list | head`: nobody reads on, which is no error
        console.give_up(1, 2)
        sys.exit(141)


def _run(head: list[str], command: list[str]) -> int:
    try:
        app(head, prog_name="devns", obj=command)
    except DevnsError as error:
        console.show_error(error)
        return error.exit_code
    except SystemExit as end:
        # typer ends by itself what it knows how to show: usage errors, help, an Exit. Of these two it makes a 1.
        if _is_because_of(end, KeyboardInterrupt):
            return 130
        if _is_because_of(end, BrokenPipeError):
            raise BrokenPipeError from None
        raise
    return 0


def _is_because_of(end: BaseException, kind: type[BaseException]) -> bool:
    reason: BaseException | None = end
    while reason is not None and not isinstance(reason, kind):
        reason = reason.__context__
    return reason is not None


@contextmanager
def _bench(*, verbose: bool = False, as_json: bool = False, enters: bool = False) -> Iterator[Bench]:
    host = Host.probe()
    refuse_setuid()
    if host.uid == 0 and enters:
        console.tell("you are root: devns needs no root, and what runs inside gains nothing by it")
    with console.progress(as_json=as_json) as progress:
        yield Bench(host, plugins.load(host), progress, console.tell, console.tell if verbose else None)


def _options(root: bool, user: str | None, map: Any, env: list[str] | None, cwd: str | None) -> Options:
    if root and user is not None:
        raise DevnsError("--root is --user root: both cannot be said")
    if user is not None and not is_identity(user):
        raise DevnsError(f"--user {user}: no user", hint="a name that is known inside, or numbers: 102, 102:104")
    pairs = {}
    for item in env or ():
        name, equals, value = item.partition("=")
        if not is_variable(name):
            raise DevnsError(f"-e {item}: no name of a variable", hint="-e NAME, or -e NAME=VALUE")
        if equals or name in os.environ:
            pairs[name] = value if equals else os.environ[name]
    return Options("root" if root else user, map, pairs, cwd)


# --- environments -----------------------------------------------------------------------------------------------------


@app.command()
def shell(
    env: Env = None,
    root: Root = False,
    user: User = None,
    map: Map = None,
    set: Set = None,
    workdir: Cwd = None,
    verbose: Verbose = False,
) -> None:
    """Open a shell in an environment, built the first time."""
    from devns.verbs.shell import shell

    with _bench(verbose=verbose, enters=True) as bench:
        status = shell(env, bench, _options(root, user, map, set, workdir))
    raise typer.Exit(status)


@app.command()
def run(
    context: typer.Context,
    env: Env = None,
    root: Root = False,
    user: User = None,
    map: Map = None,
    set: Set = None,
    workdir: Cwd = None,
    verbose: Verbose = False,
) -> None:
    """Run one command in an environment: devns run [ENV] -- CMD. Its exit status is yours."""
    from devns.verbs.run import run

    if not context.obj:
        raise DevnsError("run: no command", hint="devns run [ENV] -- CMD: the command stands after two dashes")
    with _bench(verbose=verbose, enters=True) as bench:
        status = run(env, context.obj, bench, _options(root, user, map, set, workdir))
    raise typer.Exit(status)


@app.command()
def build(
    env: Env = None,
    map: Map = None,
    locked: Annotated[bool, typer.Option("--locked", help="Only as .devns.lock says.")] = False,
    shell_on_failure: Annotated[
        bool, typer.Option("--shell-on-failure", help="Open a shell where a command of [build] failed.")
    ] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Build what an environment needs, without entering it."""
    from devns.verbs.build import build

    with _bench(verbose=verbose, as_json=json) as bench:
        environment = build(env, bench, Options(map=map), locked=locked, shell_on_failure=shell_on_failure)
    if json:
        console.show_json({"name": environment.name, "layers": environment.layers})


@app.command()
def plan(
    context: typer.Context,
    env: Env = None,
    root: Root = False,
    user: User = None,
    map: Map = None,
    set: Set = None,
    workdir: Cwd = None,
    json: Json = False,
) -> None:
    """Show what would be done: devns plan [ENV] [-- CMD]. With --json exactly the document that is launched."""
    from devns.plan import describe
    from devns.verbs.plan import plan

    with _bench() as bench:
        document = plan(env, context.obj, bench, _options(root, user, map, set, workdir))
    if json:
        console.show_json(document)
    else:
        console.show_table(("what", "how"), describe(document))


@app.command()
def check(json: Json = False) -> None:
    """Try what this machine can do, and say what mends the rest."""
    from devns.verbs.check import check

    with _bench() as bench:
        facts = check(bench)
    if json:
        console.show_json([{"id": f.id, "works": f.works, "detail": f.detail, "remedy": f.remedy} for f in facts])
    else:
        rows = [(fact.id, "works" if fact.works else "missing", fact.detail) for fact in facts]
        console.show_table(("what", "state", "detail"), rows)
        for fact in facts:
            if fact.remedy and not fact.works:
                console.say(f"\n{fact.id}: {fact.detail}\n  {fact.remedy}")
    raise typer.Exit(125 if any(fact.id in ("userns", "mount") and not fact.works for fact in facts) else 0)


@app.command("list")
def list_(json: Json = False) -> None:
    """List the environments there are."""
    from devns.verbs.listing import listing

    with _bench() as bench:
        found = listing(bench)
    if json:
        console.show_json(found)
    else:
        rows = [(row["name"], row["template"], row["state"], row["project"] or "") for row in found]
        console.show_table(("name", "template", "state", "project"), rows)


@app.command()
def info(env: Env = None, json: Json = False) -> None:
    """Show one environment: its template, layers, places and state."""
    from devns.verbs.info import info

    with _bench() as bench:
        found = info(env, bench)
    if json:
        console.show_json(found)
    else:
        console.show_table(("what", "value"), [(key, _plain(value)) for key, value in found.items()])


@app.command()
def remove(names: Annotated[list[str], typer.Argument(metavar="NAME...")]) -> None:
    """Remove environments, with all that was written in them."""
    from devns.verbs.remove import remove

    with _bench() as bench:
        for name in names:
            remove(name, bench)


@app.command()
def reset(
    names: Annotated[list[str], typer.Argument(metavar="NAME...")],
    home: Annotated[bool, typer.Option("--home", help="Empty the private home too.")] = False,
) -> None:
    """Empty environments of what was written over their layers: files, and packages added by hand."""
    from devns.verbs.reset import reset

    with _bench() as bench:
        for name in names:
            reset(name, bench, home=home)


@app.command()
def diff(env: Env = None, json: Json = False) -> None:
    """Show what changed in an environment against its layers: files, and packages of its own."""
    from devns.verbs.diff import diff

    with _bench() as bench:
        found = diff(env, bench)
    if json:
        console.show_json(found)
        return
    rows = [(row["change"], "file", row["path"]) for row in found["files"]]
    for row in found["packages"]:
        versions = " -> ".join(filter(None, (row["from"], row["to"])))
        rows.append((row["change"], "package", f"{row['name']} {versions}"))
    if rows:
        console.show_table(("change", "of", "what"), rows)


@app.command()
def clone(
    original: Annotated[str, typer.Argument(metavar="NAME")], name: Annotated[str, typer.Argument(metavar="NEW")]
) -> None:
    """Copy an environment with all that was written in it: devns shell NEW enters the copy."""
    from devns.verbs.clone import clone

    with _bench() as bench:
        clone(original, name, bench)


@app.command()
def commit(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new template's name.")],
    env: Env = None,
    json: Json = False,
) -> None:
    """Make a template of an environment: what was written in it becomes a layer that others can stand on."""
    from devns.verbs.commit import commit

    with _bench(as_json=json) as bench:
        found = commit(name, env, bench)
    if json:
        console.show_json(found)
    else:
        console.say(f"{found['template']}: stands on {found['layer']}")


# --- the store --------------------------------------------------------------------------------------------------------


@app.command()
def gc(
    cache: Annotated[bool, typer.Option("--cache", help="Downloads that no layer names go too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    json: Json = False,
) -> None:
    """Remove what no environment names any more, and what interrupted commands left over."""
    from devns.verbs.gc import gc

    with _bench() as bench:
        rows = gc(bench, cache=cache, dry_run=dry_run)
    if json:
        console.show_json(rows)
    elif rows:
        rows.append({"kind": "total", "name": "", "bytes": sum(row["bytes"] for row in rows)})
        table = [(row["kind"], row["name"], console.size(row["bytes"])) for row in rows]
        console.show_table(("what", "name", "size"), table)


@app.command()
def du(json: Json = False) -> None:
    """Show who takes how much room in the store."""
    from devns.verbs.du import du

    with _bench() as bench:
        found = du(bench)
    if json:
        console.show_json(found)
        return
    rows = [
        ("environment", row["name"], console.size(row["own"]), f"and {console.size(row['shared'])} of layers")
        for row in found["environments"]
    ]
    for row in found["layers"]:
        rows.append(("layer", row["key"], console.size(row["bytes"]), ", ".join(row["users"]) or "nobody: devns gc"))
    rows += [(what, "", console.size(found[what]), "") for what in ("cache", "leftovers", "total")]
    console.show_table(("what", "name", "size", "with or for"), rows)


@app.command()
def verify(name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None, json: Json = False) -> None:
    """Read every layer and compare it with what was recorded when it was finished; 125 where something is wrong."""
    from devns.verbs.verify import verify

    with _bench(as_json=json) as bench:
        found = verify(name, bench)
    if json:
        console.show_json(found)
    elif found["problems"]:
        rows = [(row["kind"], row["name"], row["path"] or "", row["problem"]) for row in found["problems"]]
        console.show_table(("what", "name", "path", "problem"), rows)
    else:
        console.say(f"{len(found['layers'])} layers, {len(found['environments'])} environments: all is well")
    raise typer.Exit(125 if found["problems"] else 0)


# --- projects ---------------------------------------------------------------------------------------------------------


@app.command()
def init(template: Annotated[str, typer.Argument(help="The template to extend.")] = "py311") -> None:
    """Write the smallest useful .devns.toml in the working directory."""
    from devns.verbs.init import init

    with _bench() as bench:
        console.say(init(template, bench))


@app.command()
def lock(
    update: Annotated[bool, typer.Option("--update", help="Take today's versions.")] = False, json: Json = False
) -> None:
    """Write .devns.lock, the exact packages of the project's environment, and show what changed."""
    from devns.verbs.lock import lock

    with _bench(as_json=json) as bench:
        found = lock(bench, update=update)
    if json:
        console.show_json(found)
        return
    rows = [(row["change"], row["name"], row["from"] or "", row["to"] or "") for row in found["changes"]]
    if 0 < len(rows) != found["packages"]:
        console.show_table(("change", "package", "from", "to"), rows)
    console.say(f"{found['path']}: {found['packages']} packages, {len(rows)} changed")


@app.command()
def trust(
    sha256: Annotated[str | None, typer.Option("--sha256", help="Trust only if this is the digest shown.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Show what the file asks for, and trust nothing.")] = False,
    json: Json = False,
) -> None:
    """Show what the project's file asks for, and let it act. It is bound to the file's bytes."""
    from devns.verbs.trust import trust

    with _bench() as bench:
        report = trust(bench, expect=sha256, record=not show)
    if json:
        console.show_json(report)
        return
    for grant in report["grants"]:
        console.say(f"{grant['change']} {grant['key']} = {grant['value']}")
    console.say(f"{report['path']}: {'trusted' if report['trusted'] else 'not trusted'} (sha256 {report['sha256']})")


@app.command()
def untrust() -> None:
    """Take the trust in the project's file back."""
    from devns.verbs.trust import untrust

    with _bench() as bench:
        console.say(f"{untrust(bench)}: not trusted")


# --- templates and plugins --------------------------------------------------------------------------------------------


@templates.command("list")
def template_list(json: Json = False) -> None:
    """List the templates: yours before the bundled ones."""
    from devns.template import list_templates

    with _bench() as bench:
        found = list_templates(bench.host)
    if json:
        console.show_json([{"name": t.name, "description": t.description, "where": t.where} for t in found])
    else:
        console.show_table(("name", "where", "description"), [(t.name, t.where, t.description) for t in found])


@templates.command("show")
def template_show(name: str) -> None:
    """Print a template's file."""
    from devns.template import load

    with _bench() as bench:
        console.say(load(name, bench.host, claims=bench.hooks.claims()).files[0].data.decode(errors="replace").rstrip())


@plugin_app.command("list")
def plugin_list(json: Json = False) -> None:
    """List the plugins: bundled, enabled, off, refused."""
    with _bench() as bench:
        found = plugins.installed(bench.host)
    if json:
        console.show_json([{"name": p.name, "state": p.state, "module": p.module, "reason": p.reason} for p in found])
    else:
        rows = [(p.name, p.state, f"{p.dist} {p.version}", p.reason or "") for p in found]
        console.show_table(("name", "state", "from", "reason"), rows)


@plugin_app.command("enable")
def plugin_enable(name: str) -> None:
    """Let an installed plugin act, as it is now."""
    with _bench() as bench:
        enabled = plugins.enable(name, bench.host)
    console.say(f"{enabled.name}: enabled, {enabled.dist} {enabled.version}")


@plugin_app.command("disable")
def plugin_disable(name: str) -> None:
    """Take that back."""
    with _bench() as bench:
        plugins.disable(name, bench.host)


def _version(wanted: bool) -> None:
    if wanted:
        console.say(f"devns {__version__}")
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def _plain(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
