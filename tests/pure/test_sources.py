"""sources: which directories and tarballs of the host a root may come from."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from devns import sources
from devns.errors import TemplateError
from devns.host import Host
from devns.spec import Root, Spec

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


def test_a_root_beside_the_users_own_template_is_a_root(host: MakeHost) -> None:
    beside = f"{HOME}/.config/devns/templates/root"
    assert place(f"dir:{beside}", host({f"{beside}/x": ""}), project=None) == beside
