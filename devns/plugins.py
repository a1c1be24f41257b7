"""Which plugins there are, how they are loaded, and `Hooks`, the typed face of what they answer.

Bundled plugins are found by import. An outside plugin is any installed distribution with an entry point in the group
"devns"; it acts only after `devns plugin enable NAME`, which keeps a record of the very files that were agreed to. The
records live in the user's state directory and are written by nothing else: no template and no project file can add one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from devns import __version__
from devns.errors import DevnsError
from devns.hooks import Hookspecs
from devns.plan import Problem
from devns.spec import Spec

if TYPE_CHECKING:
    from devns.host import Host
    from devns.plan import Step

GROUP = "devns"  # the entry-point group
BUNDLED = {
    "base": "devns.base:Base",
    "mount": "devns_mount.plugin",
    "network": "devns_network.plugin",
    "cgroup": "devns_cgroup.plugin",
}

_HOOKS = tuple(name for name in dir(Hookspecs) if name.startswith("devns_"))
_CORE_KEYS = {field.name for field in dataclasses.fields(Spec)} | {"extends"}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_TABLE = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_SCHEMA = 1
_RECORD_MAX = 1 << 16  # bytes


# --- what plugins answer ----------------------------------------------------------------------------------------------


class Hooks:
    """The plugins' answers to the three questions of `devns.hooks`, checked.

    Plugins are asked one by one, in the order they were given, so that an answer never depends on the other plugins
    (pluggy would call the last one first, let wrappers see and change the others' answers, and lose all of them when
    one raises). What goes wrong is a DevnsError that names the plugin.
    """

    def __init__(self, plugins: Mapping[str, object], *, problems: Sequence[Problem] = ()) -> None:
        self.names = tuple(plugins)
        self._problems = tuple(problems)  # of plugins that are enabled and could not be loaded
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(Hookspecs)
        for name, plugin in plugins.items():
            self._register(name, plugin)

    @property
    def packages(self) -> frozenset[str]:
        """The packages whose effects may run: those of the plugins that act."""
        return frozenset(_package(self._manager.get_plugin(name)) for name in self.names) - {"devns"}

    def claims(self) -> dict[str, type]:
        """The tables that plugins own: their name in TOML, and the frozen dataclass that describes each."""
        tables: dict[str, type] = {}
        owners: dict[object, str] = {}
        for name, answer in self._ask("devns_table"):
            table, kind = _claim(name, answer)
            for claimed in (table, kind):
                if claimed in owners:
                    raise DevnsError(
                        f"the table [{table}] is claimed twice: by the plugins {owners[claimed]} and {name}",
                        hint=_disable(name) or _disable(owners[claimed]),
                    )
                owners[claimed] = name
            tables[table] = kind
        return tables

    def problems(self, spec: Spec, host: Host) -> list[Problem]:
        """Everything on this machine that stands in the way of `spec`, the core's problems first."""
        found = list(self._problems)
        for name, answer in self._ask("devns_check", spec=spec, host=host):
            for problem in answer:
                if not isinstance(problem, Problem):
                    raise _wrong(name, "devns_check", "a Problem", problem)
                found.append(problem)
        return found

    def steps(self, spec: Spec, host: Host) -> list[Step]:
        """The steps of all plugins; plan sorts and merges them."""
        steps: list[Step] = []
        for name, answer in self._ask("devns_plan", spec=spec, host=host):
            for step in answer:
                self._check_step(name, step)
                steps.append(step)
        return steps

    def _ask(self, hook: str, **arguments: object) -> Iterator[tuple[str, Any]]:
        implementations = {found.plugin_name: found for found in getattr(self._manager.hook, hook).get_hookimpls()}
        for name in self.names:
            if name not in implementations:
                continue
            implementation = implementations[name]
            with _asking(name, hook):
                answer = implementation.function(*(arguments[key] for key in implementation.argnames))
                if hook != "devns_table":
                    if isinstance(answer, (str, bytes, Mapping)) or not isinstance(answer, Iterable):
                        raise _wrong(name, hook, "an iterable", answer)
                    answer = list(answer)  # a generator runs, and fails, only now
            yield name, answer

    def _register(self, name: str, plugin: object) -> None:
        for attribute in dir(plugin):
            if attribute.startswith("devns_") and callable(getattr(plugin, attribute)):
                self._check_hook(name, plugin, attribute)
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            said = " ".join(str(error).split())
            raise DevnsError(f"plugin {name}: {said}", hint=_disable(name)) from None
        if not self._manager.get_hookcallers(plugin):
            raise DevnsError(f"plugin {name}: answers no hook", hint=_disable(name))

    def _check_hook(self, name: str, plugin: object, attribute: str) -> None:
        """pluggy passes over a function without the marker, and over a misspelt name until it is asked to look."""
        options = self._manager.parse_hookimpl_opts(plugin, attribute)
        if attribute not in _HOOKS:
            near = difflib.get_close_matches(attribute, _HOOKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the hooks are: {', '.join(_HOOKS)}"
            raise DevnsError(f"plugin {name}: {attribute}: no such hook", hint=hint)
        if options is None:
            raise DevnsError(f"plugin {name}: {attribute}: not marked as a hook", hint="put @hookimpl above it")
        if options.get("wrapper") or options.get("hookwrapper"):
            raise DevnsError(
                f"plugin {name}: {attribute}: a wrapper: a plugin answers for itself and never sees another's answer",
                hint="leave out wrapper=True",
            )

    def _check_step(self, name: str, step: object) -> None:
        if not isinstance(step, dict) or not isinstance(step.get("op"), str):
            raise _wrong(name, "devns_plan", "steps made by devns.api", step)
        try:
            json.dumps(step, allow_nan=False)
        except (TypeError, ValueError) as error:
            said = f"plugin {name}: devns_plan: {step['op']}: not JSON: {error}"
            raise DevnsError(said, hint=_disable(name)) from None
        module, colon, _function = step["op"].partition(":")
        # Otherwise a step could call anything that is installed, in the parent, with the user's rights.
        if colon and module.partition(".")[0] != _package(self._manager.get_plugin(name)):
            raise DevnsError(f"plugin {name}: devns_plan: {step['op']}: not in its own package", hint=_disable(name))


def _claim(name: str, answer: object) -> tuple[str, type]:
    if not (isinstance(answer, tuple) and len(answer) == 2):
        raise _wrong(name, "devns_table", "a table's name and its dataclass", answer)
    table, kind = answer
    if not (isinstance(table, str) and _TABLE.fullmatch(table)) or table in _CORE_KEYS:
        raise DevnsError(f"plugin {name}: devns_table: {table!r} cannot be the name of its table", hint=_disable(name))
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and _is_frozen(kind)):
        raise _wrong(name, "devns_table", "a frozen dataclass", kind)
    return table, kind


def _is_frozen(kind: type) -> bool:
    return bool(getattr(kind, "__dataclass_params__").frozen)  # noqa: B009  # dataclasses offers no other way to ask


def _package(plugin: object) -> str:
    module: str = getattr(plugin, "__name__", None) or type(plugin).__module__
    return module.partition(".")[0]


def _disable(name: str) -> str | None:
    return None if name in BUNDLED else f"devns plugin disable {name}"


def _wrong(name: str, hook: str, wanted: str, got: object) -> DevnsError:
    kind = got.__name__ if isinstance(got, type) else type(got).__name__
    return DevnsError(f"plugin {name}: {hook}: expected {wanted}, got {kind}", hint=_disable(name))


@contextlib.contextmanager
def _asking(name: str, hook: str) -> Iterator[None]:
    """A hook is a question. Whatever it raises is the plugin's error, and it must leave the process as it was."""
    before = _surroundings()
    try:
        yield
    except DevnsError:
        raise  # for the user: a plugin found a mistake in the template
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}"
        raise DevnsError(f"plugin {name}: {hook}: {said}", hint=_disable(name)) from error
    finally:
        changed = [what for what, value in _surroundings().items() if value != before[what]]
        if changed:
            os.environ.clear()
            os.environ.update(before["environment"])
            if before["working directory"] is not None:
                os.chdir(before["working directory"])
    if changed:
        raise DevnsError(f"plugin {name}: {hook}: changed the {' and '.join(changed)}", hint=_disable(name))


def _surroundings() -> dict[str, Any]:
    try:
        directory = os.getcwd()
    except OSError:
        directory = None
    return {"working directory": directory, "environment": dict(os.environ)}


# --- which plugins there are ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plugin:
    """One line of `devns plugin list`; `reason` says why it doesn't act."""

    name: str
    state: Literal["bundled", "enabled", "off", "refused"]
    module: str
    dist: str = "devns"
    version: str = ""
    reason: str | None = None


def load(host: Host) -> Hooks:
    """The bundled plugins and those that the user enabled.

    An enabled plugin that is missing, changed or broken is not loaded. It becomes a fatal Problem: what the user
    counted on is not left out silently.
    """
    plugins = {name: _import(where) for name, where in BUNDLED.items()}
    problems = []
    for name in _enabled(host):
        record, reason = _standing(name, host)
        if not reason:
            try:
                candidate = {name: _import(record["module"])}
                Hooks(plugins | candidate).claims()
                plugins |= candidate
                continue
            except (Exception, SystemExit) as error:  # also a dependency that is missing
                reason = f"{type(error).__name__}: {error}"
        remedy = f"devns plugin enable {name} (to agree to it as it is now), or devns plugin disable {name}"
        problems.append(Problem("plugin", f"the plugin {name} is enabled and cannot act: {reason}", remedy))
    return Hooks(plugins, problems=problems)


def installed(host: Host) -> list[Plugin]:
    """Every plugin there is, bundled ones first; runs no code of a plugin."""
    found = [Plugin(name, "bundled", where, "devns", __version__) for name, where in BUNDLED.items()]
    offers = _offers()
    records = _enabled(host)
    for name in sorted({*offers, *records}):
        points = offers.get(name, [])
        module = points[0].value if points else ""
        dist, version = _origin(points[0]) if points else ("", "")
        reason = _unfit(name, points)
        if reason is None and name in records:
            reason = _standing(name, host)[1]
            found.append(Plugin(name, "refused" if reason else "enabled", module, dist, version, reason))
        elif reason is None:
            found.append(Plugin(name, "off", module, dist, version, f"not enabled: devns plugin enable {name}"))
        else:
            found.append(Plugin(name, "refused", module, dist, version, reason))
    return found


def offer(table: str, host: Host) -> str | None:
    """The hint for a table that nobody owns, where an installed plugin might, were it enabled."""
    if _outsiders_off(host):
        return "DEVNS_NO_PLUGINS is set: no plugin but the bundled ones acts"
    off = [plugin.name for plugin in installed(host) if plugin.state == "off"]
    names = [name for name in off if name == table] or off
    return f"devns plugin enable {names[0]}" if len(names) == 1 else None


def enable(name: str, host: Host) -> Plugin:
    """Record the user's consent to the plugin as it is installed now. It is imported, once, to see that it is sound."""
    if name in BUNDLED:
        raise DevnsError(f"{name} is bundled with devns and always on")
    offers = _offers()
    reason = _unfit(name, offers.get(name, []))
    if reason is not None:
        near = difflib.get_close_matches(name, offers, n=1)
        hint = f"did you mean {near[0]}?" if near and near[0] != name else "devns plugin list"
        raise DevnsError(f"plugin {name}: {reason}", hint=hint)
    (point,) = offers[name]
    dist, version = _origin(point)
    files = _hash(dist, point.value)
    with _asking(name, "import"):
        plugin = _import(point.value)
    Hooks({**{other: _import(where) for other, where in BUNDLED.items()}, name: plugin}).claims()
    record = {"schema": _SCHEMA, "module": point.value, "dist": dist, "version": version, "files": files}
    _write_record(name, record, host)
    return Plugin(name, "enabled", point.value, dist, version)


def disable(name: str, host: Host) -> None:
    """Take the consent back; the plugin need not be installed any more."""
    if name in BUNDLED:
        raise DevnsError(f"{name} is bundled with devns and always on")
    try:
        os.unlink(_record_path(name, host))
    except FileNotFoundError:
        raise DevnsError(f"plugin {name}: is not enabled", hint="devns plugin list") from None


# --- helpers: importing, entry points ---------------------------------------------------------------------------------


def _import(where: str) -> object:
    """The module or object that an entry point names; of a class, an instance."""
    module, _, attribute = where.partition(":")
    found: object = importlib.import_module(module)
    for part in filter(None, attribute.split(".")):
        found = getattr(found, part)
    return found() if isinstance(found, type) else found


def _offers() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """What installed distributions offer, by name. It reads the metadata of every one, hence only on request."""
    offers: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        if _origin(point)[0] != "devns" and point not in offers.setdefault(point.name, []):
            offers[point.name].append(point)
    return {name: points for name, points in offers.items() if points}


def _origin(point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    dist = point.dist
    return (dist.metadata["Name"], dist.version) if dist is not None else ("", "")


def _unfit(name: str, points: Sequence[importlib.metadata.EntryPoint]) -> str | None:
    """Why nothing by this name can be enabled."""
    if not points:
        return "is not installed"
    if not _NAME.fullmatch(name) or name in BUNDLED:
        return "a bundled plugin has this name" if name in BUNDLED else "not a name a plugin can have"
    if len(points) > 1:
        return f"several distributions offer it: {', '.join(sorted(_origin(point)[0] for point in points))}"
    return None


# --- helpers: records -------------------------------------------------------------------------------------------------


def _outsiders_off(host: Host) -> bool:
    return host.environ.get("DEVNS_NO_PLUGINS", "") not in ("", "0")


def _enabled(host: Host) -> list[str]:
    if _outsiders_off(host):
        return []
    names = (name[: -len(".json")] for name in host.listdir(f"{host.state}/plugins") if name.endswith(".json"))
    return [name for name in names if _NAME.fullmatch(name) and name not in BUNDLED]


def _standing(name: str, host: Host) -> tuple[dict[str, str], str | None]:
    """The record of an enabled plugin, and why it doesn't count, where it doesn't."""
    record, reason = _read_record(name, host)
    if reason:
        return record, reason
    try:
        version = importlib.metadata.version(record["dist"])
    except importlib.metadata.PackageNotFoundError:
        return record, f"{record['dist']} is not installed"
    if version != record["version"]:
        return record, f"{record['dist']} {record['version']} was enabled, {version} is installed"
    if _hash(record["dist"], record["module"]) != record["files"]:
        return record, f"files of {record['dist']} changed since it was enabled"
    return record, None


def _read_record(name: str, host: Host) -> tuple[dict[str, str], str | None]:
    """Only a regular file of the user's own, that nobody else can have written, is a record."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(_record_path(name, host), flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, host.uid) or status.st_mode & 0o022:
                return {}, "its record is not a file of the user's own"
            record = json.loads(file.read(_RECORD_MAX))
    except (OSError, ValueError, RecursionError):
        return {}, "its record cannot be read"
    wanted = {"module", "dist", "version", "files"}
    if not isinstance(record, dict) or record.get("schema") != _SCHEMA or not wanted <= record.keys():
        return {}, "its record is of another version of devns"
    record = {key: record[key] for key in sorted(wanted)}
    return (record, None) if all(isinstance(value, str) for value in record.values()) else ({}, "its record is broken")


def _record_path(name: str, host: Host) -> str:
    if not _NAME.fullmatch(name):
        raise DevnsError(f"plugin {name!r}: not a name a plugin can have", hint="devns plugin list")
    return f"{host.root.rstrip('/')}{host.state}/plugins/{name}.json"


def _write_record(name: str, record: Mapping[str, object], host: Host) -> None:
    path = _record_path(name, host)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    fresh = f"{path}.{os.getpid()}.tmp"
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w") as file:
        json.dump(record, file, sort_keys=True, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _hash(dist: str, module: str) -> str:
    """One hash over every file that a plugin's code could come from: its distribution's, and its package's where that
    lies elsewhere (an editable install). Byte code and what only installers write are left out."""
    files: dict[str, str] = {}
    for entry in importlib.metadata.files(dist) or ():
        files[str(entry)] = str(entry.locate())
    for path, base in _sources(module.partition(":")[0].partition(".")[0]):
        files[os.path.relpath(path, base)] = path
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        if name.endswith(".pyc") or os.path.basename(name) in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
            continue
        try:
            with open(path, "rb") as file:
                content = hashlib.sha256(file.read()).hexdigest()
        except OSError:
            content = "absent"
        digest.update(f"{content} {name}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _sources(package: str) -> Iterator[tuple[str, str]]:
    """The files of a top-level package or module, each with the directory it is imported from; imports nothing."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return
    if spec is None:
        return
    for place in spec.submodule_search_locations or ():
        for directory, _, names in os.walk(place):
            yield from ((os.path.join(directory, name), os.path.dirname(place)) for name in names)
    if not spec.submodule_search_locations and spec.origin:
        yield spec.origin, os.path.dirname(spec.origin)
