"""plugins: what the facade makes of good and bad answers, and which plugins act. api: the door they come in by."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import devns.api
from devns import plugins
from devns.api import Host, Problem, Spec, TemplateError, hookimpl, note, outside
from devns.errors import DevnsError
from devns.plugins import BUNDLED, Hooks, Plugin

SPEC = Spec(name="box", template="box")
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    root = tmp_path / "machine"
    root.mkdir()
    environ = {"HOME": "/home/dev"}
    return Host.make(
        root=str(root), uid=os.getuid(), gid=os.getgid(), environ=environ, machine="x86_64", release="6.1.0"
    )


def module(name: str = "sample.plugin", **hooks: Callable[..., Any]) -> ModuleType:
    """A plugin's module with these functions as its hooks."""
    made = ModuleType(name)
    for hook, function in hooks.items():
        setattr(made, hook, hookimpl(function))
    return made


def planner(answer: Any, name: str = "sample.plugin") -> ModuleType:
    return module(name, devns_plan=lambda spec, host: answer)


def claimant(answer: Any) -> ModuleType:
    return module(devns_table=lambda: answer)


@dataclass(frozen=True)
class Table:
    key: str = ""


@dataclass(frozen=True)
class Other:
    key: str = ""


@dataclass
class Loose:
    key: str = ""


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_plugins_and_not_in_pluggys(host: Host) -> None:
    hooks = Hooks({name: planner([note(name)]) for name in ("first", "second", "third")})
    assert hooks.names == ("first", "second", "third")
    assert hooks.steps(SPEC, host) == [note("first"), note("second"), note("third")]


def test_a_plugin_that_wants_to_be_first_changes_nothing(host: Host) -> None:
    eager = ModuleType("eager")
    eager.devns_plan = hookimpl(tryfirst=True)(lambda spec, host: [note("eager")])  # type: ignore[attr-defined]
    assert Hooks({"calm": planner([note("calm")]), "eager": eager}).steps(SPEC, host) == [note("calm"), note("eager")]


def test_a_hook_takes_the_arguments_it_names(host: Host) -> None:
    answers = {
        "none": module(devns_plan=lambda: [note("none")]),
        "host": module(devns_plan=lambda host: [note(host.home)]),
        "generator": module(devns_plan=lambda spec: (note(name) for name in (spec.name,))),
    }
    assert Hooks(answers).steps(SPEC, host) == [note("none"), note("/home/dev"), note("box")]


def test_problems_of_plugins_that_could_not_be_loaded_come_before_the_answers(host: Host) -> None:
    lost, found = Problem("plugin", "lost"), Problem("x", "found", fatal=False)
    hooks = Hooks({"sample": module(devns_check=lambda spec, host: [found])}, problems=[lost])
    assert hooks.problems(SPEC, host) == [lost, found]


def test_claims_are_the_tables_by_name() -> None:
    hooks = Hooks({"one": claimant(("one", Table)), "two": claimant(("two", Other)), "none": planner([])})
    assert hooks.claims() == {"one": Table, "two": Other}


def test_the_packages_are_those_whose_effects_may_run() -> None:
    hooks = Hooks({"one": planner([], "one.plugin"), "two": planner([], "two"), "base": planner([], "devns.base")})
    assert hooks.packages == {"one", "two"}


def test_the_bundled_plugins_answer() -> None:
    hooks = Hooks({name: plugins._import(where) for name, where in BUNDLED.items()})
    assert list(hooks.claims()) == ["mount", "network", "cgroup"]
    assert hooks.packages == {"devns_mount", "devns_network", "devns_cgroup"}


# --- bad plugins ------------------------------------------------------------------------------------------------------


def refused(plugin: object, **others: object) -> DevnsError:
    with pytest.raises(DevnsError) as caught:
        Hooks({**others, "sample": plugin})
    return caught.value


def test_a_misspelt_hook_is_refused_with_the_right_name() -> None:
    error = refused(module(devns_plann=lambda spec, host: []))
    assert (error.message, error.hint) == ("plugin sample: devns_plann: no such hook", "did you mean devns_plan?")


def test_a_hook_without_its_marker_is_refused() -> None:
    plugin = ModuleType("sample")
    plugin.devns_plan = lambda spec, host: []  # type: ignore[attr-defined]
    error = refused(plugin)
    assert (error.message, error.hint) == ("plugin sample: devns_plan: not marked as a hook", "put @hookimpl above it")


def test_a_marked_function_of_any_other_name_is_refused() -> None:
    error = refused(module(plan=lambda spec, host: []))
    assert "sample" in error.message
    assert "unknown hook 'plan'" in error.message


def test_an_argument_that_no_hook_has_is_refused() -> None:
    error = refused(module(devns_plan=lambda spec, machine: []))
    assert error.message.startswith("plugin sample: Plugin 'sample' for hook 'devns_plan'")
    assert "{'machine'}" in error.message


def test_a_plugin_without_hooks_is_refused() -> None:
    assert refused(ModuleType("sample")).message == "plugin sample: answers no hook"


def test_a_module_that_is_called_like_a_hook_is_none(host: Host) -> None:
    plugin = planner([note("x")])
    plugin.devns_sample = ModuleType("devns_sample")  # type: ignore[attr-defined]  # `import devns_sample` does this
    assert Hooks({"sample": plugin}).steps(SPEC, host) == [note("x")]


@pytest.mark.parametrize("options", [{"wrapper": True}, {"hookwrapper": True}])
def test_P_07_a_wrapper_that_could_change_the_others_answers_is_refused(options: Mapping[str, Any]) -> None:
    def devns_plan(spec: Spec, host: Host) -> Iterator[None]:
        yield

    plugin = ModuleType("sample")
    plugin.devns_plan = hookimpl(**options)(devns_plan)  # type: ignore[attr-defined]
    assert refused(plugin).message.startswith("plugin sample: devns_plan: a wrapper: ")


# --- bad answers ------------------------------------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[..., Any]:
    def hook(spec: Spec, host: Host) -> Any:
        raise error

    return hook


def late(spec: Spec, host: Host) -> Any:
    yield note("x")
    raise KeyError("late")


def error_of(question: Callable[[], object]) -> tuple[str, str | None]:
    with pytest.raises(DevnsError) as caught:
        question()
    return caught.value.message, caught.value.hint


@pytest.mark.parametrize(
    ("hook", "why"),
    [
        (failing(KeyError("x")), "KeyError: 'x'"),
        (failing(SystemExit(3)), "SystemExit: 3"),
        (late, "KeyError: 'late'"),
    ],
)
def test_P_08_what_a_plugin_raises_is_an_error_that_names_it(host: Host, hook: Callable[..., Any], why: str) -> None:
    hooks = Hooks({"good": planner([note("x")]), "sample": module(devns_plan=hook, devns_check=hook)})
    hint = "devns plugin disable sample"
    assert error_of(lambda: hooks.steps(SPEC, host)) == (f"plugin sample: devns_plan: {why}", hint)
    assert error_of(lambda: hooks.problems(SPEC, host)) == (f"plugin sample: devns_check: {why}", hint)


def test_a_mistake_in_the_template_that_a_plugin_finds_stays_one(host: Host) -> None:
    hooks = Hooks({"sample": module(devns_plan=failing(TemplateError("t: key: wrong", hint="right")))})
    with pytest.raises(TemplateError, match=r"^t: key: wrong$"):
        hooks.steps(SPEC, host)


def test_ctrl_c_goes_through(host: Host) -> None:
    with pytest.raises(KeyboardInterrupt):
        Hooks({"sample": module(devns_plan=failing(KeyboardInterrupt()))}).steps(SPEC, host)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, "expected an iterable, got NoneType"),
        (note("x"), "expected an iterable, got dict"),
        ("bind", "expected an iterable, got str"),
        ([None], "expected steps made by devns.api, got NoneType"),
        ([{"dst": "/"}], "expected steps made by devns.api, got dict"),
        ([("bind", "/")], "expected steps made by devns.api, got tuple"),
        ([note({1})], "note: not JSON: Object of type set is not JSON serializable"),  # type: ignore[arg-type]
        ([outside("sample.x:f", at=float("nan"))], "sample.x:f: not JSON: Out of range float values"),
        ([outside("os:system", command="id")], "os:system: not in its own package"),
        ([outside("devns.linux:unshare")], "devns.linux:unshare: not in its own package"),
        ([outside("sampler.x:f")], "sampler.x:f: not in its own package"),
    ],
)
def test_P_08_steps_that_are_none_are_refused(host: Host, answer: Any, why: str) -> None:
    message, _ = error_of(lambda: Hooks({"sample": planner(answer)}).steps(SPEC, host))
    assert message.startswith(f"plugin sample: devns_plan: {why}")


def test_an_effect_of_the_plugins_own_package_is_fine(host: Host) -> None:
    step = outside("sample.deep.effects:hold", size=1)
    assert Hooks({"sample": planner([step])}).steps(SPEC, host) == [step]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, "expected an iterable, got NoneType"),
        (["disk full"], "expected a Problem, got str"),
        ([("id", "message")], "expected a Problem, got tuple"),
    ],
)
def test_P_08_problems_that_are_none_are_refused(host: Host, answer: Any, why: str) -> None:
    hooks = Hooks({"sample": module(devns_check=lambda: answer)})
    assert error_of(lambda: hooks.problems(SPEC, host))[0] == f"plugin sample: devns_check: {why}"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, "expected a table's name and its dataclass, got NoneType"),
        ("gpu", "expected a table's name and its dataclass, got str"),
        (("gpu", Table, 1), "expected a table's name and its dataclass, got tuple"),
        (("gpu", dict), "expected a frozen dataclass, got dict"),
        (("gpu", Loose), "expected a frozen dataclass, got Loose"),
        (("gpu", Table()), "expected a frozen dataclass, got Table"),
        (("", Table), "'' cannot be the name of its table"),
        (("a.b", Table), "'a.b' cannot be the name of its table"),
        (("root", Table), "'root' cannot be the name of its table"),
        (("extends", Table), "'extends' cannot be the name of its table"),
        (("description", Table), "'description' cannot be the name of its table"),
        ((3, Table), "3 cannot be the name of its table"),
    ],
)
def test_P_08_a_claim_that_is_none_is_refused(answer: Any, why: str) -> None:
    hooks = Hooks({"sample": claimant(answer)})
    assert error_of(hooks.claims) == (f"plugin sample: devns_table: {why}", "devns plugin disable sample")


def test_a_table_that_two_plugins_claim_is_an_error_that_names_both() -> None:
    hooks = Hooks({"mount": claimant(("mount", Table)), "sample": claimant(("mount", Other))})
    message = "the table [mount] is claimed twice: by the plugins mount and sample"
    assert error_of(hooks.claims) == (message, "devns plugin disable sample")


def test_one_dataclass_cannot_stand_for_two_tables() -> None:
    hooks = Hooks({"one": claimant(("one", Table)), "two": claimant(("two", Table))})
    assert error_of(hooks.claims)[0] == "the table [two] is claimed twice: by the plugins one and two"


def test_P_08_a_plugin_that_changes_the_process_is_named_and_what_it_changed_is_put_back(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def hook(spec: Spec, host: Host) -> Any:
        os.chdir("/")
        os.environ["LEFT"] = "behind"
        return []

    monkeypatch.chdir(tmp_path)
    hooks = Hooks({"sample": module(devns_plan=hook)})
    message = "plugin sample: devns_plan: changed the working directory and environment"
    assert error_of(lambda: hooks.steps(SPEC, host))[0] == message
    assert Path.cwd() == tmp_path
    assert "LEFT" not in os.environ


# --- plugins of others ------------------------------------------------------------------------------------------------

SOURCE = """
from dataclasses import dataclass
from devns.api import hookimpl, note

@dataclass(frozen=True)
class Gpu:
    count: int = 0

@hookimpl
def devns_table():
    return "gpu", Gpu

@hookimpl
def devns_plan(spec, host):
    yield note("gpu acts")
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for installed distributions; what is imported from it is forgotten at the end."""
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(place)
    known = set(sys.modules)
    yield place
    for name in set(sys.modules) - known:
        del sys.modules[name]


def install(
    site: Path, *, name: str = "gpu", dist: str = "devns-gpu", source: str = SOURCE, version: str = "1.0", at: str = ""
) -> Path:
    """A distribution with one plugin; returns the plugin's file."""
    package = dist.replace("-", "_")
    code = (Path(at) if at else site) / package / "plugin.py"
    code.parent.mkdir(parents=True, exist_ok=True)
    (code.parent / "__init__.py").write_text("")
    code.write_text(source)
    info = site / f"{package}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[devns]\n{name} = {package}.plugin\n")
    files = [f"{info.name}/METADATA", f"{info.name}/entry_points.txt", f"{info.name}/RECORD"]
    files += [] if at else [f"{package}/__init__.py", f"{package}/plugin.py"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    return code


def outsiders(host: Host) -> list[Plugin]:
    return [plugin for plugin in plugins.installed(host) if plugin.state != "bundled"]


def record(host: Host, name: str = "gpu") -> Path:
    return Path(f"{host.root}{host.state}/plugins/{name}.json")


def reasons(host: Host) -> list[str]:
    """Why enabled plugins do not act; each refuses the environment."""
    found = [problem for problem in plugins.load(host).problems(SPEC, host) if problem.id == "plugin"]
    assert all(problem.fatal for problem in found)
    return [problem.message.removeprefix("the plugin gpu is enabled and cannot act: ") for problem in found]


OFF = Plugin("gpu", "off", "devns_gpu.plugin", "devns-gpu", "1.0", "not enabled: devns plugin enable gpu")
ON = Plugin("gpu", "enabled", "devns_gpu.plugin", "devns-gpu", "1.0")


def test_P_05_a_plugin_that_is_installed_is_listed_and_neither_loaded_nor_imported(host: Host, site: Path) -> None:
    install(site)
    assert outsiders(host) == [OFF]
    assert plugins.load(host).names == tuple(BUNDLED)
    assert not any(name.startswith("devns_gpu") for name in sys.modules)


def test_an_enabled_plugin_acts(host: Host, site: Path) -> None:
    install(site)
    assert plugins.enable("gpu", host) == ON
    assert outsiders(host) == [ON]
    hooks = plugins.load(host)
    assert hooks.names == (*BUNDLED, "gpu")
    assert "gpu" in hooks.claims()
    assert note("gpu acts") in hooks.steps(SPEC, host)
    assert record(host).stat().st_mode & 0o777 == 0o600
    assert record(host).parent.stat().st_mode & 0o777 == 0o700


def test_a_plugin_that_is_disabled_again_does_not_act(host: Host, site: Path) -> None:
    install(site)
    plugins.enable("gpu", host)
    plugins.disable("gpu", host)
    assert outsiders(host) == [OFF]
    assert plugins.load(host).names == tuple(BUNDLED)
    assert error_of(lambda: plugins.disable("gpu", host))[0] == "plugin gpu: is not enabled"


def test_P_05_one_variable_switches_all_of_them_off(host: Host, site: Path) -> None:
    install(site)
    plugins.enable("gpu", host)
    off = replace(host, environ={**host.environ, "DEVNS_NO_PLUGINS": "1"})
    assert plugins.load(off).names == tuple(BUNDLED)
    assert reasons(off) == []
    assert plugins.offer("gpu", off) == "DEVNS_NO_PLUGINS is set: no plugin but the bundled ones acts"


@pytest.mark.parametrize("file", ["devns_gpu/plugin.py", "devns_gpu/__init__.py", "devns_gpu-1.0.dist-info/METADATA"])
def test_P_06_a_plugin_whose_files_changed_is_refused_until_it_is_enabled_again(
    host: Host, site: Path, file: str
) -> None:
    install(site)
    plugins.enable("gpu", host)
    with (site / file).open("a") as text:
        text.write("# changed\n")
    assert reasons(host) == ["files of devns-gpu changed since it was enabled"]
    assert [plugin.state for plugin in outsiders(host)] == ["refused"]
    assert plugins.load(host).names == tuple(BUNDLED)
    plugins.enable("gpu", host)
    assert reasons(host) == []


def test_P_06_a_file_that_joins_the_package_is_a_change(host: Host, site: Path) -> None:
    install(site)
    plugins.enable("gpu", host)
    (site / "devns_gpu/dataclasses.py").write_text("")
    assert reasons(host) == ["files of devns-gpu changed since it was enabled"]


def test_P_06_an_editable_install_is_watched_where_its_sources_are(
    host: Host, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = install(site, at=str(tmp_path / "checkout"))
    monkeypatch.syspath_prepend(tmp_path / "checkout")
    plugins.enable("gpu", host)
    assert reasons(host) == []
    code.write_text(f"{SOURCE}\n# changed\n")
    assert reasons(host) == ["files of devns-gpu changed since it was enabled"]


def test_P_06_byte_code_is_no_change(host: Host, site: Path) -> None:
    install(site)
    plugins.enable("gpu", host)
    (site / "devns_gpu/__pycache__").mkdir(exist_ok=True)
    (site / "devns_gpu/__pycache__/plugin.cpython-311.pyc").write_bytes(b"x")
    assert reasons(host) == []


def test_P_06_another_version_is_named(host: Host, site: Path) -> None:
    install(site)
    plugins.enable("gpu", host)
    shutil.rmtree(site / "devns_gpu-1.0.dist-info")
    install(site, version="2.0")
    assert reasons(host) == ["devns-gpu 1.0 was enabled, 2.0 is installed"]


def test_P_10_an_enabled_plugin_that_is_gone_is_a_problem(host: Host, site: Path) -> None:
    install(site)
    plugins.enable("gpu", host)
    for directory in site.iterdir():
        shutil.rmtree(directory)
    assert reasons(host) == ["devns-gpu is not installed"]
    assert [(plugin.state, plugin.reason) for plugin in outsiders(host)] == [("refused", "is not installed")]


BROKEN = [
    ("import no_such_module", "No module named 'no_such_module'"),
    ("raise SystemExit(1)", "SystemExit: 1"),
    ("", "answers no hook"),
    (SOURCE.replace("devns_plan", "devns_plann"), "devns_plann: no such hook"),
    (SOURCE.replace('"gpu", Gpu', '"mount", Gpu'), "the table [mount] is claimed twice"),
]


@pytest.mark.parametrize(("source", "why"), BROKEN)
def test_P_10_a_plugin_that_cannot_be_loaded_cannot_be_enabled(host: Host, site: Path, source: str, why: str) -> None:
    install(site, source=source)
    assert why in error_of(lambda: plugins.enable("gpu", host))[0]
    assert not record(host).exists()


@pytest.mark.parametrize(("source", "why"), BROKEN)
def test_P_10_an_enabled_plugin_that_fails_to_load_is_a_problem(host: Host, site: Path, source: str, why: str) -> None:
    install(site, source=source)
    said = {"schema": 1, "module": "devns_gpu.plugin", "dist": "devns-gpu", "version": "1.0"}
    record(host).parent.mkdir(parents=True)
    record(host).write_text(json.dumps({**said, "files": plugins._hash("devns-gpu", "devns_gpu.plugin")}))
    record(host).chmod(0o600)
    assert why in reasons(host)[0]
    assert plugins.load(host).names == tuple(BUNDLED)


def test_P_10_a_name_that_two_distributions_offer_is_refused(host: Host, site: Path) -> None:
    install(site)
    install(site, dist="other-gpu")
    why = "several distributions offer it: devns-gpu, other-gpu"
    assert [(plugin.state, plugin.reason) for plugin in outsiders(host)] == [("refused", why)]
    assert error_of(lambda: plugins.enable("gpu", host))[0] == f"plugin gpu: {why}"


@pytest.mark.parametrize(
    ("name", "why"), [("mount", "a bundled plugin has this name"), ("Gpu Two", "not a name a plugin can have")]
)
def test_a_name_that_is_taken_or_none_cannot_be_enabled(host: Host, site: Path, name: str, why: str) -> None:
    install(site, name=name)
    assert [(plugin.name, plugin.state, plugin.reason) for plugin in outsiders(host)] == [(name, "refused", why)]
    with pytest.raises(DevnsError):
        plugins.enable(name, host)
    with pytest.raises(DevnsError):
        plugins.disable(name, host)


def test_what_is_not_installed_cannot_be_enabled_and_what_is_near_is_named(host: Host, site: Path) -> None:
    install(site)
    assert error_of(lambda: plugins.enable("gpus", host)) == ("plugin gpus: is not installed", "did you mean gpu?")
    assert error_of(lambda: plugins.enable("mount", host))[0] == "mount is bundled with devns and always on"


def test_the_owner_of_an_unknown_table_is_offered(host: Host, site: Path) -> None:
    assert plugins.offer("gpu", host) is None
    install(site)
    assert plugins.offer("gpu", host) == "devns plugin enable gpu"
    assert plugins.offer("graphics", host) == "devns plugin enable gpu"
    install(site, name="net", dist="devns-net")
    assert plugins.offer("gpu", host) == "devns plugin enable gpu"
    assert plugins.offer("graphics", host) is None


def test_P_04_nothing_in_a_project_enables_a_plugin(host: Host, site: Path) -> None:
    install(site)
    plugins.enable("gpu", host)
    project = Path(f"{host.root}/home/dev/project")
    for place in (".local/state/devns/plugins", ".devns/plugins", "devns/plugins", "plugins", ".config/devns/plugins"):
        (project / place).mkdir(parents=True)
        shutil.copy(record(host), project / place)
    plugins.disable("gpu", host)
    (project / ".devns.toml").write_text('plugins = ["gpu"]\n[plugins]\ngpu = true\n')
    inside = replace(host, cwd="/home/dev/project")
    assert plugins.load(inside).names == tuple(BUNDLED)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "its record cannot be read"),
        ("{", "its record cannot be read"),
        ("[" * 100000, "its record cannot be read"),
        ("[]", "its record is of another version of devns"),
        ('{"schema": 99}', "its record is of another version of devns"),
        ('{"schema": 1, "module": "x"}', "its record is of another version of devns"),
        ('{"schema": 1, "module": 3, "dist": "x", "version": "1", "files": ""}', "its record is broken"),
    ],
)
def test_C_22_a_record_that_is_none_enables_nothing(host: Host, site: Path, text: str, why: str) -> None:
    install(site)
    record(host).parent.mkdir(parents=True)
    record(host).write_text(text)
    record(host).chmod(0o600)
    assert reasons(host) == [why]


def test_C_22_a_record_that_somebody_else_could_have_written_enables_nothing(host: Host, site: Path) -> None:
    install(site)
    plugins.enable("gpu", host)
    record(host).chmod(0o602)
    assert reasons(host) == ["its record is not a file of the user's own"]
    record(host).chmod(0o600)
    record(host).rename(record(host, "real"))
    record(host).symlink_to("real.json")
    assert "its record cannot be read" in reasons(host)
    if os.getuid() == 0:
        record(host).unlink()
        record(host, "real").rename(record(host))
        os.chown(record(host), 4711, 4711)
        assert reasons(host) == ["its record is not a file of the user's own"]


# --- api --------------------------------------------------------------------------------------------------------------


def test_the_door_brings_neither_pluggy_nor_dataclasses() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from devns.api import DevnsError; print(*sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", code, str(REPOSITORY)]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "devns.errors" in loaded
    assert {"pluggy", "dataclasses", "devns.hooks", "devns.host", "devns.ops"} & set(loaded) == set()


def test_every_name_of_the_door_leads_somewhere() -> None:
    for name, room in devns.api._HOME.items():
        assert getattr(devns.api, name) is getattr(import_module(f"devns.{room}"), name)
    assert dir(devns.api) == devns.api.__all__ == sorted(devns.api._HOME)


def test_a_name_that_the_door_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^devns.api has no linux$"):
        _ = devns.api.linux


def test_what_type_checkers_see_is_what_there_is() -> None:
    tree = ast.parse(Path(devns.api.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and str(node.module)[:6] == "devns."]
    seen = {(alias.name, node.module) for node in imports for alias in node.names}
    assert seen == {(name, f"devns.{room}") for name, room in devns.api._HOME.items()}
