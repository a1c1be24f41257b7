"""build: which layers an environment stands on, which of them are missing, and the Plans that make each.

A layer is named by the hash of its recipe, and that of a command by what it could see: its text, the bytes of its
inputs, its variables, and its parent's name. So whatever changes, the first layer that it touches and all above it get
other names, and are missing.
"""

from __future__ import annotations

import posixpath
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from devns import durable, sealed, sources, trees
from devns.errors import DevnsError, StepError, TemplateError
from devns.lock import FILE as LOCK_FILE
from devns.ops import bind, tmpfs
from devns.sealed import Place
from devns.sources import key as key
from devns.spec import Build, Env, User
from devns.store import upper_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devns.host import Host
    from devns.launch import Plan
    from devns.plugins import Hooks
    from devns.progress import Progress
    from devns.spec import Spec
    from devns.store import Store

Recipe = dict[str, Any]
Step = dict[str, Any]

COMMAND = 1  # the recipe of a command's layer: raised when the same command would give another tree
LAYERS_MAX = 12  # the kernel takes 255 characters for all layers of an overlay: fsconfig(2)
_LENT_OPS = ("bind", "file")
_LENT_PLACES = ("/etc/", "/run/")
_SHELL = ("/bin/sh", "-c", "command -v bash >/dev/null && exec bash; exec sh")
_SHOWN_MAX = 100  # characters of a command that a heading repeats


def recipes(spec: Spec, host: Host) -> list[Recipe]:
    """What makes each layer of this environment above those that are named, bottom first: JSON, equal for equal layers.
    Pure.

    A source that is used where it stands (`host`, `dir:`) has none of its own; the commands of [build] have one each.
    """
    source = sources.find(spec.root.source)
    found, given = source.recipes(spec, host), spec.root.layers
    if given:
        if spec.lock:
            raise TemplateError(f"{spec.template}: root.layers: cannot be locked", hint=f"remove {LOCK_FILE}")
        found = [recipe | {"parent": given[-1]} for recipe in found[1:]]
    if not spec.build.run:
        return found
    place = source.directories(spec, host)
    if len(given) + len(found) + len(place) + len(spec.build.run) > LAYERS_MAX:
        raise TemplateError(
            f"{spec.template}: build.run: {len(spec.build.run)} commands: each becomes a layer, and no more than "
            f"{LAYERS_MAX} layers can lie on each other",
            hint="join some of the commands with &&",
        )
    digests = _digests(spec, host)
    for number, command in enumerate(spec.build.run):
        seen = dict(digests[: spec.said.inputs[number]] if spec.said.inputs else digests)
        found.append(
            {
                "label": "run",
                "recipe": COMMAND,
                "parent": key(found[-1]) if found else given[-1] if given else place,
                "run": command,
                "inputs": seen,
                "project": spec.project if seen else None,
                "env": dict(spec.said.env),
                "network": spec.build.network,
                "map": id_map(spec),
            }
        )
    return found


def layers(spec: Spec, host: Host) -> list[str]:
    return [*spec.root.layers, *(key(recipe) for recipe in recipes(spec, host))]


def id_map(spec: Spec) -> str:
    """The map that the layers of this environment are made for."""
    return "range" if spec.user.map == "range" else "single"


def lower_directories(spec: Spec, host: Host) -> list[str]:
    """The directories beneath the environment's upper one, topmost first."""
    return _lower(layers(spec, host), spec, host)


def upper_directories(spec: Spec, host: Host) -> tuple[str, str]:
    """Where this environment keeps what is written: the upper directory, and overlayfs' work directory."""
    place = f"{host.store}/environments/{spec.name}/{upper_name(layers(spec, host))}"
    return f"{place}/root", f"{place}/work"


def ensure(
    spec: Spec,
    host: Host,
    store: Store,
    progress: Progress,
    hooks: Hooks,
    *,
    shell_on_failure: bool = False,
) -> None:
    """Make each layer that is missing. Of two builds of one layer the second waits, and finds it there.

    With `shell_on_failure` a command that fails is followed by a shell where it failed, on the caller's own streams.
    """
    source = sources.find(spec.root.source)
    wanted = recipes(spec, host)
    names = layers(spec, host)
    _require(spec, store)
    for number, (recipe, name) in enumerate(zip(wanted, names[len(spec.root.layers) :], strict=True)):
        if store.layer(name) is not None:
            continue
        with store.lock(name):
            if store.layer(name) is not None:
                continue
            for left in store.collect():
                with suppress(DevnsError, OSError):  # as with all that is left over: the next build tries again
                    sealed.delete(left, host)
            with store.staging() as staging, store.staging() as scratch, durable.telling(staging.path):
                under = names[: len(spec.root.layers) + number]
                beneath = store.layer(under[-1]) if under else None
                lent, variables = _lent(spec, host, hooks) if recipe.get("network") else ([], {})
                place = Place(
                    root=staging.root,
                    lower=_lower(under, spec, host),
                    record=beneath.record if beneath else {},
                    scratch=scratch.path,
                    lent=lent,
                    variables=variables,
                )
                if "run" in recipe:
                    command = _Command(number + 1 - len(wanted) + len(spec.build.run), recipe, place, spec, host)
                    made = command.run(progress, shell_on_failure=shell_on_failure)
                else:
                    with _said_by(spec):
                        made = source.make(recipe, place, host, store.cache, progress)
                progress.stage("write to disk")
                made |= trees.record(host, staging.path, recipe["map"], built=made.get("built"))
                store.commit(staging, name, {"recipe": recipe, **made})
    progress.end()


@contextmanager
def _said_by(spec: Spec) -> Iterator[None]:
    """Who resolves packages knows what was asked for, and not which file asked."""
    try:
        yield
    except TemplateError as error:
        if not error.message.startswith("packages: "):
            raise
        raise TemplateError(f"{spec.template}: root.{error.message}", hint=error.hint) from None


def _require(spec: Spec, store: Store) -> None:
    """What a template names must be there: nobody knows how to make it."""
    for name in spec.root.layers:
        layer = store.layer(name)
        if layer is None:
            raise TemplateError(
                f"{spec.template}: root.layers: {name}: not in this store",
                hint="devns commit makes such a template where the environment is",
            )
        made = layer.record.get("recipe", {}).get("map")
        if made != id_map(spec):
            raise TemplateError(f"{spec.template}: root.layers: {name}: made for the map {made!r}", hint="[user] map")


def _lower(names: list[str], spec: Spec, host: Host) -> list[str]:
    finished = [f"{host.store}/layers/{name}/root" for name in reversed(names)]
    return finished + sources.find(spec.root.source).directories(spec, host)


# --- the commands of [build] ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Command:
    """The `number`th command of [build], counted from 1, and where its layer is made."""

    number: int
    recipe: Recipe
    place: Place
    spec: Spec
    host: Host

    def run(self, progress: Progress, *, shell_on_failure: bool) -> dict[str, Any]:
        """Run it; each line it says is a note. What it wrote is the layer, as overlayfs left it: what it deleted is
        there as a whiteout, a directory that it made anew in the place of another is opaque."""
        text = " ".join(self.recipe["run"].split())
        shown = text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."
        what = f"build step {self.number} of {len(self.spec.build.run)} ({shown})"
        progress.stage(what)
        try:
            with self._planned(["/bin/sh", "-euc", self.recipe["run"]]) as plan:
                sealed.run_sealed(plan, self.host, line=progress.note, what=what)
        except sealed.Ended as error:
            if not shell_on_failure:
                name = "" if self.spec.project else f" {self.spec.name}"
                raise sealed.Ended(error.message, hint=f"devns build{name} --shell-on-failure") from None
            progress.end()
            progress.note(f"{what} failed: here is a shell where it did; what is written in it is thrown away")
            with self._planned(_SHELL) as plan:
                terminal = {"TERM": self.host.environ.get("TERM", "dumb")}
                sealed.enter(plan | {"env": plan["env"] | terminal}, self.host)
            raise
        except StepError as error:
            raise DevnsError(f"{what}: {error.message}", hint=error.hint) from None
        for path, digest in self.recipe["inputs"].items():
            if self.host.digest(self.host.realpath(f"{self.spec.project}/{path}")) != digest:
                raise DevnsError(f"{what}: its input {path} changed while it ran", hint="devns build")
        return {}

    @contextmanager
    def _planned(self, argv: Sequence[str]) -> Iterator[Plan]:
        recipe = self.recipe
        with sealed.stacked(self.place, self.host, list(_inputs(recipe, self.host))) as inside:
            yield sealed.sealed_plan(
                self.host,
                map=recipe["map"],
                inside=inside,
                argv=argv,
                env={**self.place.variables, **sealed.ENV, **recipe["env"]},
                cwd=recipe["project"] or "/",
                network=recipe["network"],
            )


def _digests(spec: Spec, host: Host) -> list[tuple[str, str]]:
    """Each input's path beneath the project, and the hash of what it holds."""
    found = []
    for said in spec.build.inputs:
        path = posixpath.normpath(said)
        problem, hint = None, None
        real = host.realpath(f"{spec.project}/{path}")
        if spec.project is None:
            problem, hint = "a file of the project, and there is none", "a project's .devns.toml extends this template"
        elif not _is_beneath(real, spec.project):
            problem = f"leads out of the project, to {real}"
        elif any(_is_beneath(host.realpath(own), real) for own in (host.store, host.state, host.config)):
            problem = "devns keeps its environments, or what you trust, there"
        elif host.kind(real) not in ("file", "directory"):
            problem = "neither a file nor a directory" if host.kind(real) else "no such file or directory"
        digest = None if problem else host.digest(real)
        if digest is None:
            why = problem or "cannot be read, or is larger than 64 MiB or 20000 files"
            raise TemplateError(f"{spec.template}: build.inputs: {said}: {why}", hint=hint)
        found.append((path, digest))
    return found


def _inputs(recipe: Recipe, host: Host) -> Iterator[Step]:
    """The project as a command sees it: its inputs, read-only, in an empty directory at the project's own path."""
    project = recipe["project"]
    if project is None:
        return
    if "." not in recipe["inputs"]:
        yield tmpfs(project)
    for path in sorted(recipe["inputs"], key=lambda path: path.split("/")):
        yield bind(host.realpath(f"{project}/{path}"), posixpath.normpath(f"{project}/{path}"), canonical=True)


def _lent(spec: Spec, host: Host, hooks: Hooks) -> tuple[list[Step], dict[str, str]]:
    """What plugins lend to who uses the host's network: resolver, names, certificates, proxies, registries.

    They are asked as for an environment of which nothing is said but [network]; and where that is a network of its own,
    which a build has not, as for one of which nothing is said at all. Of their answers counts what can only be read.
    """
    said = {
        kind: spec.tables[kind] for name, kind in hooks.claims().items() if name == "network" and kind in spec.tables
    }
    for tables in (said, {}):
        bare = replace(spec, project=None, build=Build(), env=Env(), user=User(identity="root"), tables=tables)
        steps = hooks.steps(bare, host)
        if not any(step["op"] == "namespace" and step["name"] == "net" for step in steps):
            break
    lent = [
        step
        for step in steps
        if step["op"] in _LENT_OPS and step.get("readonly", True) and step["dst"].startswith(_LENT_PLACES)
    ]
    return lent, {step["name"]: step["value"] for step in steps if step["op"] == "setenv"}


def _is_beneath(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")
