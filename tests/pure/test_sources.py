"""sources: which directories and tarballs of the host a root may come from."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from devns import sources
from devns.debian import install
from devns.errors import TemplateError
from devns.host import Host
from devns.sources import debian
from devns.spec import Repository, Root, Said, Spec

if TYPE_CHECKING:
    from tests.conftest import MakeHost

HOME = "/home/user"
PROJECT = f"{HOME}/p"
FILES = {f"{PROJECT}/root/x": "", f"{HOME}/.ssh/id": "", "/srv/root/x": "", "/srv/root.tar": "", "/dev/x": ""}


def place(source: str, host: Host, *, project: str | None = PROJECT) -> str:
    return sources.place(Spec("p", "t.toml", project=project, root=Root(source)), host)


def test_a_directory_of_the_host_is_named_by_where_it_really_lies(host: MakeHost) -> None:
    made = host(FILES, links={"/srv/link": "root"})
    assert place("dir:/srv/link", made) == "/srv/root"
    assert place(f"dir:{PROJECT}/root", made) == f"{PROJECT}/root"
    assert place("tar:/srv/root.tar", made) == "/srv/root.tar"


def test_C_11_a_root_in_the_project_that_becomes_a_link_leads_nowhere_else(host: MakeHost) -> None:
    made = host(FILES)
    assert place(f"dir:{PROJECT}/root", made) == f"{PROJECT}/root"
    shutil.rmtree(f"{made.root}{PROJECT}/root")
    os.symlink("../.ssh", f"{made.root}{PROJECT}/root")
    for kind in ("dir", "tar"):
        with pytest.raises(TemplateError, match=rf"root: leads out of the project, to {HOME}/\.ssh$"):
            place(f"{kind}:{PROJECT}/root", made)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/", "the whole host"),
        (HOME, "your home directory"),
        ("/home", "your home directory"),
        ("/proc/self/root", "/proc of the host"),
        ("/dev", "/dev of the host"),
        ("/run/user/1000", "the sockets of your session"),
        (f"{HOME}/.local/share/devns/environments/other/home", "devns keeps"),
        ("/srv/home", "your home directory"),
    ],
)
def test_C_11_a_root_on_the_deny_list_is_refused(host: MakeHost, path: str, why: str) -> None:
    made = host(FILES, links={"/srv/home": HOME})
    with pytest.raises(TemplateError, match=f"t.toml: root.from: {path}: {why}"):
        place(f"dir:{path}", made)


ROW = {"uri": "https://apt.test", "suite": "x", "fingerprint": "f"}
KEYED = Repository("https://apt.test", "x", f"{PROJECT}/x.asc", "f")
INLINE = replace(KEYED, key="-----BEGIN PGP PUBLIC KEY BLOCK-----\n")


def recipes(host: Host, said: Said = Said(), **root: Any) -> list[dict[str, Any]]:
    spec = Spec("p", "t.toml", project=PROJECT, root=Root("debian:bookworm", **root), said=said)
    return debian.recipes(spec, host)


def test_a_recipe_has_the_key_itself_and_another_key_is_another_recipe(host: MakeHost) -> None:
    made = host({f"{PROJECT}/x.asc": "one"})
    (recipe,) = recipes(made, repositories=(KEYED, INLINE))
    assert recipe["repositories"] == [
        {**ROW, "components": ["main"], "key": "one"},
        {**ROW, "components": ["main"], "key": INLINE.key},
    ]
    before = sources.key(recipe)
    Path(f"{made.root}{PROJECT}/x.asc").write_text("two")
    assert sources.key(recipes(made, repositories=(KEYED, INLINE))[0]) != before
    assert "repositories" not in recipes(made)[0]


def test_a_repository_of_the_projects_own_leaves_the_templates_layer_as_it_is(host: MakeHost) -> None:
    made = host({f"{PROJECT}/x.asc": "one"})
    (plain,) = recipes(made, repositories=(INLINE,), packages=("a",))
    base, added = recipes(made, Said(("b",), (KEYED,)), repositories=(INLINE, KEYED), packages=("a", "b"))
    assert base == plain
    assert (added["parent"], added["packages"]) == (sources.key(base), ["b"])
    assert [row["key"] for row in added["repositories"]] == [INLINE.key, "one"]
    base, added = recipes(made, Said((), (KEYED,)), repositories=(INLINE, KEYED), packages=("a",))
    assert (base, added["packages"]) == (plain, [])


@pytest.mark.parametrize(
    ("files", "links", "why"),
    [
        ({}, {}, "no such file"),
        ({f"{PROJECT}/x.asc": ""}, {}, "no such file, or an unreadable or empty one"),
        ({f"{PROJECT}/x.asc": None}, {}, "no such file, or an unreadable or empty one"),
        (FILES, {f"{PROJECT}/x.asc": "../.ssh/id"}, f"leads out of the project, to {HOME}/.ssh/id"),
    ],
)
def test_C_11_a_key_is_a_file_that_may_be_read_for_it(
    host: MakeHost, files: dict[str, str], links: dict[str, str], why: str
) -> None:
    with pytest.raises(TemplateError) as caught:
        recipes(host(files, links=links), repositories=(KEYED,))
    assert caught.value.message.startswith(f"t.toml: root.repository.key: {PROJECT}/x.asc: {why}")


def test_a_root_beside_the_users_own_template_is_a_root(host: MakeHost) -> None:
    beside = f"{HOME}/.config/devns/templates/root"
    assert place(f"dir:{beside}", host({f"{beside}/x": ""}), project=None) == beside


def test_S_25_the_apt_inside_learns_of_proxies_without_a_password(host: MakeHost) -> None:
    conf = """
        Acquire::http::Proxy "http://proxy.test:3128"; Acquire::http::Proxy::a.test "DIRECT";
        Acquire::https::Proxy "http://user:secret@proxy.test";
    """
    assert debian._proxies(host({"/etc/apt/apt.conf": conf})) == (
        'Acquire::http::Proxy "http://proxy.test:3128";\nAcquire::http::Proxy::a.test "DIRECT";\n'
    )


def test_A_32_a_script_that_hangs_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo begun; sleep 600")
    done = subprocess.run(install.patient(str(script), "0.3"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (
        124,
        ["begun", "stopped: not done in 0.3: one of its packages' scripts hangs"],
    )
    script.write_text("exit 3")
    assert subprocess.run(install.patient(str(script)), check=False).returncode == 3
