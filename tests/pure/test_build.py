"""build: which layers an environment stands on is a pure question, and what each key depends on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from devns import build, template
from devns.errors import TemplateError
from devns.host import Host
from devns.plugins import Hooks
from devns.spec import Spec, make_spec
from devns_mount import plugin as mount
from devns_network import plugin as network

if TYPE_CHECKING:
    from tests.conftest import MakeHost

NoEffects = Callable[[], contextlib.AbstractContextManager[None]]

HOOKS = Hooks({"mount": mount, "network": network})
PROJECT = "/home/user/p"
TEMPLATES = "/home/user/.config/devns/templates"
TOOLS = '[root]\nfrom = "debian:bookworm"\npackages = ["git"]\n[build]\nrun = ["make tools"]\n[env.set]\nA = "1"\n'


@pytest.fixture
def project(host: MakeHost) -> Callable[..., tuple[Spec, Host]]:
    """`project(text, files)`: the Spec of a project file with this text beside these files, and its host."""

    def make(text: str, files: Mapping[str, Any] = {}, *, tools: str = TOOLS, at: str = PROJECT) -> tuple[Spec, Host]:
        placed = {f"{at}/{path}": content for path, content in files.items()}
        placed |= {f"{TEMPLATES}/tools.toml": tools, f"{at}/.devns.toml": text}
        machine = host(placed, uid=os.getuid(), gid=os.getgid(), cwd=at)
        return make_spec(template.load(None, machine, claims=HOOKS.claims()), HOOKS.claims()), machine

    return make


def test_recipes_are_read_and_nothing_else(project: Any, no_effects: NoEffects) -> None:
    text = 'extends = "tools"\n[root]\npackages = ["jq"]\n[build]\nrun = ["make"]\ninputs = ["a", "src"]\n'
    spec, host = project(text, {"a": "1", "src/b": "2"})
    build.layers(spec, host)  # loads the source's module
    with no_effects():
        first = build.recipes(spec, host)
        assert build.recipes(spec, host) == first
        names = build.layers(spec, host)
    assert [recipe["label"] for recipe in first][-2:] == ["run", "run"]
    assert build.lower_directories(spec, host) == [f"{host.store}/layers/{name}/root" for name in reversed(names)]


def test_a_commands_recipe_is_all_that_it_can_see(project: Any) -> None:
    text = '[root]\nfrom = "dir:/srv"\n[build]\nrun = ["one", "two"]\ninputs = ["./a"]\n[env.set]\nX = "1"\n'
    spec, host = project(text, {"a": "1", "../../../srv/x": None})
    first, second = build.recipes(spec, host)
    assert first == {
        "label": "run",
        "recipe": build.COMMAND,
        "parent": ["/srv"],
        "run": "one",
        "inputs": {"a": host.digest(f"{PROJECT}/a")},
        "project": PROJECT,
        "env": {"X": "1"},
        "network": False,
        "map": "single",
    }
    assert second == {**first, "run": "two", "parent": build.key(first)}


def test_what_a_template_runs_knows_nothing_of_the_project(project: Any) -> None:
    extending = 'extends = "tools"\n[build]\nrun = ["make"]\ninputs = ["a"]\n'
    one, there = project(extending, {"a": "1"})
    other, elsewhere = project(extending, {"a": "2"}, at="/home/user/q")
    keys, others = build.layers(one, there), build.layers(other, elsewhere)
    assert keys[:-1] == others[:-1]
    assert keys[-1] != others[-1]
    assert [recipe["project"] for recipe in build.recipes(one, there) if "run" in recipe] == [None, PROJECT]


def test_a_templates_command_sees_the_inputs_that_the_template_names(project: Any) -> None:
    tools = TOOLS.replace('["make tools"]', '["pip install"]\ninputs = ["list"]')
    spec, host = project(
        'extends = "tools"\n[build]\nrun = ["x"]\ninputs = ["a"]\n', {"list": "", "a": ""}, tools=tools
    )
    seen = [list(recipe["inputs"]) for recipe in build.recipes(spec, host) if "run" in recipe]
    assert seen == [["list"], ["list", "a"]]


def test_a_change_of_a_step_is_a_change_of_all_above_it_and_of_none_below(project: Any) -> None:
    text = '[root]\nfrom = "debian:bookworm"\n[build]\nrun = ["a", "b", "c"]\n'
    before, after = (build.layers(*project(text.replace('"b"', step))) for step in ('"b"', '"B"'))
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("text", "files", "why"),
    [
        ("['gone']", {}, "gone: no such file or directory"),
        ("['up/a']", {}, "up/a: leads out of the project, to /home/user/a"),
        ("['pipe']", {}, "pipe: neither a file nor a directory"),
        ("['.']", {}, ".: devns keeps its environments"),
    ],
)
def test_an_input_that_cannot_be_one_is_an_error(project: Any, text: str, files: Any, why: str, tmp_path: Path) -> None:
    spec, host = project(f"[root]\nfrom = 'debian:bookworm'\n[build]\nrun = ['x']\ninputs = {text}\n")
    here = tmp_path / PROJECT[1:]
    (here / "up").symlink_to("..")
    (tmp_path / "home/user/a").touch()
    os.mkfifo(here / "pipe")
    if text == "['.']":
        host = Host.make(
            root=host.root,
            uid=host.uid,
            gid=host.gid,
            environ={**host.environ, "DEVNS_STORE": f"{PROJECT}/store"},
            machine=host.machine,
            release=host.release,
        )
    with pytest.raises(TemplateError) as caught:
        build.recipes(spec, host)
    assert f"build.inputs: {why}" in caught.value.message


def test_a_named_template_with_inputs_says_that_there_is_no_project(host: MakeHost) -> None:
    tools = TOOLS.replace('["make tools"]', '["x"]\ninputs = ["list"]')
    machine = host({f"{TEMPLATES}/tools.toml": tools}, uid=os.getuid(), gid=os.getgid())
    with pytest.raises(TemplateError, match=r"build\.inputs: list: a file of the project, and there is none"):
        build.recipes(make_spec(template.load("tools", machine), {}), machine)


def test_the_hosts_own_root_takes_no_commands(project: Any) -> None:
    with pytest.raises(TemplateError, match=r"build\.run: the host's own root is read-only"):
        build.recipes(*project('[build]\nrun = ["x"]\n'))


def test_more_layers_than_can_be_mounted_are_an_error(project: Any) -> None:
    commands = [f"echo {number}" for number in range(build.LAYERS_MAX)]
    with pytest.raises(TemplateError, match=f"no more than {build.LAYERS_MAX} layers"):
        build.recipes(*project(f"[root]\nfrom = 'debian:bookworm'\n[build]\nrun = {commands}\n"))


def test_packages_that_a_project_adds_are_a_layer_on_the_templates_own(project: Any) -> None:
    extending = 'extends = "tools"\n[root]\npackages = ["jq", "git"]\n'
    base, added, _command = build.recipes(*project(extending))
    assert (base["packages"], added["packages"]) == (["git"], ["jq"])
    assert added["parent"] == build.key(base)
    assert base == build.recipes(*project('extends = "tools"\n'))[0]
    alone = build.recipes(*project('[root]\nfrom = "debian:bookworm"\npackages = ["jq", "git"]\n'))
    assert [recipe["packages"] for recipe in alone] == [["git", "jq"]]


# --- what a command with network is lent ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["host", "none", "user"])
def test_what_is_lent_is_the_hosts_and_can_only_be_read(project: Any, mode: str) -> None:
    text = (
        f'[root]\nfrom = "debian:bookworm"\n[network]\nmode = "{mode}"\n[mount]\nbind = [{{ src = "/a", dst = "/b" }}]'
    )
    machine = {
        "../../../etc/resolv.conf": "nameserver 192.0.2.1\n",
        "../../../etc/ssl/cert.pem": "CA",
        "../../../a": "",
    }
    spec, host = project(text, machine)
    steps, variables = build._lent(spec, host, HOOKS)
    assert {step["dst"]: step.get("text", step.get("src")) for step in steps} == {
        "/etc/resolv.conf": "nameserver 192.0.2.1\n",
        "/etc/hosts": next(step["text"] for step in steps if step["dst"] == "/etc/hosts"),
        "/run/devns/ca-certificates.crt": "/etc/ssl/cert.pem",
    }
    assert variables["SSL_CERT_FILE"] == "/run/devns/ca-certificates.crt"


def test_what_the_template_says_of_the_network_counts_for_what_is_lent(project: Any) -> None:
    text = '[root]\nfrom = "debian:bookworm"\n[network]\ncertificates = "own"\n'
    spec, host = project(text, {"../../../etc/ssl/cert.pem": "CA"})
    steps, variables = build._lent(spec, host, HOOKS)
    assert [step["dst"] for step in steps] == ["/etc/hosts"]
    assert "SSL_CERT_FILE" not in variables
