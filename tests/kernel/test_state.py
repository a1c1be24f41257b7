"""What an environment keeps, and how it goes: reset, diff, clone, gc, du, verify, as a user meets them."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
Devns = Callable[..., "subprocess.CompletedProcess[str]"]
TOOLS = ("sh", "cat", "rm", "mkdir", "echo", "ln", "touch", "chmod", "mv", "ls", "chown", "mkfifo", "truncate")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    """The user's own templates."""
    path = tmp_path / "home" / ".config" / "devns" / "templates"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def environ(tmp_path: Path, store: Path, templates: Path) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "DEVNS"))}
    env |= {"HOME": str(tmp_path / "home"), "DEVNS_STORE": str(store)}
    return env | {"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'plugins'}"}


@pytest.fixture
def devns(environ: dict[str, str], tmp_path: Path) -> Devns:
    """`devns(*arguments, cwd=...)`: the finished process, its words captured."""

    def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "devns", *arguments],
            cwd=cwd or tmp_path / "home",
            env=environ,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    return run


@pytest.fixture
def running(environ: dict[str, str], tmp_path: Path) -> Callable[[str], Any]:
    """`with running("host"):` somebody is in it."""

    @contextmanager
    def run(name: str) -> Iterator[None]:
        command = [sys.executable, "-m", "devns", "run", name, "--", "sh", "-c", "echo here; cat"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, cwd=tmp_path / "home", env=environ, text=True, **pipes) as process:  # type: ignore[call-overload]  # a dict of options
            assert process.stdout.readline() == "here\n"
            try:
                yield
            finally:
                process.stdin.close()
                process.wait()

    return run


@pytest.fixture
def tiny(templates: Path, tmp_path: Path) -> Callable[..., str]:
    """`tiny()`: a template whose layer is a tarball of a few of the host's tools and three files."""

    def make(name: str = "tiny", text: str = "one\n", table: str = "") -> str:
        path = tmp_path / f"{name}.tar"
        with tarfile.open(path, "w", dereference=True) as tar:
            for directory in ("bin", "etc", "etc/deep", "var", "proc", "tmp", "dev", "sys", "run", "home", "srv"):
                entry = tarfile.TarInfo(directory)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
            for place, words in {"etc/name": text, "etc/other": "other\n", "etc/deep/file": "deep\n"}.items():
                entry = tarfile.TarInfo(place)
                entry.size, entry.mode = len(words), 0o644
                tar.addfile(entry, io.BytesIO(words.encode()))
            for place, source in tools().items():
                tar.add(source, place, filter=as_root)
        (templates / f"{name}.toml").write_text(f'[root]\nfrom = "tar:{path}"\n{table}')
        return name

    return make


@functools.cache
def tools() -> dict[str, str]:
    """Programs of the host's and the libraries they need: place in a root -> path here."""
    found = {f"bin/{tool}": path for tool in TOOLS if (path := shutil.which(tool))}
    ldd = shutil.which("ldd")
    if ldd is None:
        pytest.skip("no ldd(1) to make a root by")
    said = subprocess.run([ldd, *found.values()], capture_output=True, text=True, check=False).stdout
    return found | {path.lstrip("/"): path for path in re.findall(r"(/\S+) \(0x", said)}


def as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    return entry


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The error, which is one line and at most a hint."""
    assert done.returncode == 125
    first, *hints = done.stderr.splitlines()
    assert first.startswith("devns: ")
    assert all(hint.startswith("hint: ") for hint in hints[:1])
    assert len(hints) <= 1
    return first.removeprefix("devns: ")


def listdir(path: Path) -> list[str]:
    return sorted(os.listdir(path)) if path.exists() else []


# --- reset ------------------------------------------------------------------------------------------------------------


def test_reset_empties_the_root_and_leaves_the_home(devns: Devns, store: Path) -> None:
    devns("run", "host", "--", "sh", "-c", "echo 1 > /srv/file; echo 2 > ~/file")
    assert (devns("reset", "host").returncode, listdir(store / "trash"), listdir(store / "staging")) == (0, [], [])
    done = devns("run", "host", "--", "sh", "-c", "ls /srv; cat ~/file")
    assert (done.returncode, done.stdout) == (0, "2\n")


def test_reset_with_home_empties_the_home_too_however_it_is_closed(devns: Devns) -> None:
    devns("run", "host", "--", "sh", "-c", "mkdir ~/closed; echo 2 > ~/closed/file; chmod 0 ~/closed; chmod 500 ~")
    assert devns("reset", "--home", "host").stderr == ""
    assert devns("run", "host", "--", "sh", "-c", "ls -A ~").stdout == ""


def test_reset_takes_what_was_written_over_layers_before_too(devns: Devns, tiny: Callable[..., str]) -> None:
    devns("run", tiny(), "--", "sh", "-c", "echo 1 > /etc/by-hand")
    tiny("tiny", "two\n")
    assert "other layers" in devns("run", "tiny", "--", "sh", "-c", "echo 2 > /etc/later").stderr
    assert devns("reset", "tiny").returncode == 0
    assert devns("run", "tiny", "--", "sh", "-c", "cat /etc/name; test ! -e /etc/later").stdout == "two\n"
    tiny("tiny", "one\n")
    done = devns("run", "tiny", "--", "sh", "-c", "cat /etc/name; test ! -e /etc/by-hand")
    assert (done.returncode, done.stdout) == (0, "one\n")


def test_reset_refuses_while_somebody_is_in_it(devns: Devns, running: Callable[[str], Any]) -> None:
    devns("run", "host", "--", "touch", "/srv/file")
    with running("host"):
        assert one_sentence(devns("reset", "host")) == "host: in use"
    assert devns("run", "host", "--", "ls", "/srv").stdout == "file\n"
    assert devns("reset", "host").returncode == 0


def test_reset_deletes_what_other_ids_own(devns: Devns, require: Any, store: Path) -> None:
    require("range")
    said = "mkdir -p /srv/deep; touch /srv/deep/file; chown -R 7:7 /srv/deep; chmod 700 /srv/deep"
    assert devns("run", "--root", "--map", "range", "host", "--", "sh", "-c", said).returncode == 0
    assert devns("reset", "host").stderr == ""
    assert (listdir(store / "trash"), devns("run", "host", "--", "ls", "/srv").stdout) == ([], "")


def test_reset_empties_a_home_that_root_inside_gave_away(devns: Devns, require: Any) -> None:
    require("range")
    said = "touch /root/file; chown -R 7:7 /root; chmod 700 /root"
    assert devns("run", "--root", "--map", "range", "host", "--", "sh", "-c", said).returncode == 0
    assert devns("reset", "--home", "host").stderr == ""
    assert devns("run", "--root", "--map", "range", "host", "--", "ls", "-A", "/root").stdout == ""


@pytest.mark.parametrize("verb", ["reset", "diff", "verify"])
def test_what_was_never_made_is_one_sentence(devns: Devns, verb: str) -> None:
    assert one_sentence(devns(verb, "host")) == "host: no such environment"


# --- diff -------------------------------------------------------------------------------------------------------------


def changed(devns: Devns, name: str) -> list[tuple[str, str]]:
    return [(row["change"], row["path"]) for row in answer(devns("diff", name, "--json"))["files"]]


@pytest.mark.parametrize("name", ["host", "tiny"])
def test_an_environment_that_was_only_entered_did_not_change(devns: Devns, tiny: Callable[..., str], name: str) -> None:
    tiny()
    assert devns("run", name, "--", "sh", "-c", "echo kept > ~/file").returncode == 0
    assert answer(devns("diff", name, "--json")) == {"name": name, "files": [], "packages": []}
    assert devns("diff", name).stdout == ""


def test_diff_tells_what_was_added_modified_and_deleted(devns: Devns, tiny: Callable[..., str]) -> None:
    said = (
        "cd /etc; echo 2 > name; rm other; mkdir new; echo 3 > new/file; ln -s name link; rm -r deep;"
        "mkdir deep; echo 4 > deep/later; chmod 700 /srv; echo 5 > gone; rm gone; touch /bin/sh; rm -r /var;"
        "echo 6 > /var"
    )
    assert devns("run", tiny(), "--", "sh", "-c", said).returncode == 0
    assert changed(devns, "tiny") == [
        ("deleted", "/etc/deep/file"),
        ("added", "/etc/deep/later"),
        ("added", "/etc/link"),
        ("modified", "/etc/name"),
        ("added", "/etc/new"),
        ("added", "/etc/new/file"),
        ("deleted", "/etc/other"),
        ("modified", "/srv"),
        ("modified", "/var"),
    ]
    assert devns("diff", "tiny").stdout.splitlines()[1].split() == ["deleted", "file", "/etc/deep/file"]


def test_diff_compares_with_a_directory_that_is_the_root(
    devns: Devns, templates: Path, store: Path, tmp_path: Path, tiny: Callable[..., str]
) -> None:
    devns("build", tiny())
    (layer,) = (store / "layers").iterdir()
    root = shutil.copytree(layer / "root", tmp_path / "root", symlinks=True)
    (templates / "here.toml").write_text(f'[root]\nfrom = "dir:{root}"\n')
    assert devns("run", "here", "--", "sh", "-c", "rm /etc/name; echo 1 > /srv/file").stderr == ""
    assert changed(devns, "here") == [("deleted", "/etc/name"), ("added", "/srv/file")]


def test_diff_tells_packages_by_dpkgs_database(devns: Devns, tiny: Callable[..., str], store: Path) -> None:
    devns("run", tiny(), "--", "true")
    (layer,) = (store / "layers").iterdir()
    (upper,) = (store / "environments" / "tiny").glob("upper-*/root")
    for root, versions in (
        (layer / "root", {"a": "1.0", "b": "1.0~rc1", "c": "1:2"}),
        (upper, {"b": "1.0", "c": "2", "d": "1"}),
    ):
        (root / "var" / "lib" / "dpkg").mkdir(parents=True)
        paragraphs = [
            f"Package: {name}\nStatus: install ok installed\nVersion: {version}\nDescription: x\n Version: 0\n"
            for name, version in versions.items()
        ]
        paragraphs.append("Package: e\nStatus: deinstall ok config-files\nVersion: 1\n")
        (root / "var" / "lib" / "dpkg" / "status").write_text("\n".join(paragraphs))
    assert answer(devns("diff", "tiny", "--json"))["packages"] == [
        {"change": "removed", "name": "a", "from": "1.0", "to": None},
        {"change": "upgraded", "name": "b", "from": "1.0~rc1", "to": "1.0"},
        {"change": "downgraded", "name": "c", "from": "1:2", "to": "2"},
        {"change": "added", "name": "d", "from": None, "to": "1"},
    ]


def test_diff_says_odd_names_without_acting_on_them(devns: Devns) -> None:
    devns("run", "host", "--", "sh", "-c", "cd /srv; touch $(printf '\\033[31m\\377')")
    assert changed(devns, "host") == [("added", "/srv/\x1b[31m\udcff")]
    assert devns("diff", "host").stdout.splitlines()[1].isprintable()


# --- clone ------------------------------------------------------------------------------------------------------------


def test_a_clone_is_entered_by_its_name_and_goes_its_own_way(devns: Devns, tiny: Callable[..., str]) -> None:
    said = "echo 1 > /etc/name; rm /etc/other; rm -r /etc/deep; mkdir /etc/deep; echo 2 > ~/file"
    devns("run", tiny(), "--", "sh", "-c", said)
    assert devns("clone", "tiny", "copy").stderr == ""
    assert changed(devns, "copy") == changed(devns, "tiny") != []
    done = devns("run", "copy", "--", "sh", "-c", "echo $DEVNS; cat /etc/name ~/file; ls /etc/deep; echo 3 > /etc/name")
    assert (done.returncode, done.stdout, done.stderr) == (0, "copy\n1\n2\n", "")
    assert devns("run", "tiny", "--", "cat", "/etc/name").stdout == "1\n"
    assert [row["name"] for row in answer(devns("list", "--json"))] == ["copy", "tiny"]
    assert devns("remove", "tiny").returncode == 0
    assert devns("run", "copy", "--", "cat", "/etc/name").stdout == "3\n"
    assert devns("reset", "copy").returncode == 0
    assert devns("run", "copy", "--", "cat", "/etc/name").stdout == "one\n"


def test_a_clone_is_the_same_file_by_file(devns: Devns, tiny: Callable[..., str], store: Path) -> None:
    said = (
        "cd /srv; truncate -s 64M hole; echo end >> hole; echo 1 > a; ln a b; ln -s a link; ln -s nowhere dangling;"
        "mkfifo fifo; touch -d 2001-02-03 a; touch -h -d 2002-03-04 link; chmod 4751 a; mkdir closed;"
        "touch closed/file; chmod 0 closed; touch -d 2003-04-05 .; rm /etc/other; rm -r /etc/deep; mkdir /etc/deep"
    )
    assert devns("run", "--root", tiny(), "--", "sh", "-c", said).returncode == 0
    assert devns("clone", "tiny", "copy").stderr == ""

    def rows(name: str) -> list[Any]:
        (upper,) = (store / "environments" / name).glob("upper-*/root")
        found: list[Any] = []
        (upper / "srv/closed").chmod(0o700)
        for path in [upper, *sorted(upper.rglob("*"))]:
            status = path.lstat()
            names = [] if path.is_symlink() else sorted(os.listxattr(path))
            data = path.read_bytes()[-9:] if path.is_file() and not path.is_symlink() else None
            link = os.readlink(path) if path.is_symlink() else None
            links = status.st_nlink if path.is_file() else 0  # overlayfs keeps a name of its whiteouts elsewhere
            row = (status.st_mode, links, status.st_mtime_ns, status.st_rdev, names, data, link)
            found.append((str(path.relative_to(upper)), *row, status.st_blocks if path.is_file() else 0))
        return found

    assert rows("copy") == rows("tiny")
    assert (store / "environments/copy").stat().st_mode & 0o777 == 0o700


def test_a_clone_keeps_the_owners_of_files(devns: Devns, require: Any) -> None:
    require("range")
    said = "mkdir -p /srv/deep; touch /srv/deep/file; chown -R 7:8 /srv/deep; chmod 700 /srv/deep"
    assert devns("run", "--root", "--map", "range", "host", "--", "sh", "-c", said).returncode == 0
    assert devns("clone", "host", "copy").stderr == ""
    done = devns("run", "--root", "--map", "range", "copy", "--", "stat", "-c", "%u:%g", "/srv/deep", "/srv/deep/file")
    assert done.stdout == "7:8\n7:8\n"


def test_a_projects_environment_is_cloned_with_its_project(devns: Devns, tmp_path: Path) -> None:
    project = tmp_path / "home" / "project"
    project.mkdir()
    (project / ".devns.toml").write_text('extends = "host"\n')
    (project / "file").write_text("ours\n")
    name = answer(devns("build", "--json", cwd=project))["name"]
    assert devns("clone", name, "copy").stderr == ""
    done = devns("run", "copy", "--", "cat", f"{project}/file")
    assert (done.returncode, done.stdout) == (0, "ours\n")
    (project / ".devns.toml").rename(project.parent / ".devns.toml")
    done = devns("run", "copy", "--", "true")
    assert (done.returncode, done.stderr) == (78, f"devns: copy: {project}: no .devns.toml there any more\n")


def test_clone_refuses_what_it_could_not_enter_or_would_overwrite(
    devns: Devns, running: Callable[[str], Any], store: Path
) -> None:
    devns("run", "host", "--", "true")
    assert "template of this name" in one_sentence(devns("clone", "host", "py311"))
    assert "not fit" in one_sentence(devns("clone", "host", "../x"))
    assert one_sentence(devns("clone", "nothing", "copy")) == "nothing: no such environment"
    with running("host"):
        assert one_sentence(devns("clone", "host", "copy")) == "host: in use"
    assert devns("clone", "host", "copy").returncode == 0
    assert one_sentence(devns("clone", "host", "copy")) == "copy: there is such an environment already"
    assert (listdir(store / "staging"), listdir(store / "trash")) == ([], [])


# --- gc ---------------------------------------------------------------------------------------------------------------


def test_gc_takes_what_no_environment_names_and_nothing_else(
    devns: Devns, tiny: Callable[..., str], store: Path
) -> None:
    devns("build", tiny())
    devns("build", tiny("other", "two\n"))
    assert answer(devns("gc", "--json")) == []
    kept = json.loads(devns("info", "--json", "tiny").stdout)["layers"]
    (unused,) = json.loads(devns("info", "--json", "other").stdout)["layers"]
    devns("remove", "other")
    (store / "trash" / "abandoned").mkdir()
    (store / "staging" / "left").mkdir()
    (store / "staging" / "left" / "file").write_text("x" * 9000)

    shown = answer(devns("gc", "--dry-run", "--json"))
    assert [(row["kind"], row["name"]) for row in shown] == [
        ("layer", unused),
        ("leftover", "staging/left"),
        ("leftover", "trash/abandoned"),
    ]
    assert shown[0]["bytes"] >= os.path.getsize(tools()["bin/sh"])
    assert shown[1]["bytes"] >= 9000
    assert listdir(store / "layers") == sorted([*kept, unused])
    assert answer(devns("gc", "--json")) == shown
    assert (listdir(store / "layers"), listdir(store / "trash"), listdir(store / "staging")) == (kept, [], [])
    assert devns("run", "tiny", "--", "cat", "/etc/name").stdout == "one\n"
    assert devns("gc").stdout == ""


def test_gc_says_in_a_table_what_went(devns: Devns, tiny: Callable[..., str]) -> None:
    devns("build", tiny())
    devns("remove", "tiny")
    head, layer, total = devns("gc").stdout.splitlines()
    assert head.split() == ["WHAT", "NAME", "SIZE"]
    assert layer.split()[0] == "layer"
    assert total.split()[1:] == layer.split()[2:]


def test_gc_leaves_a_layer_in_which_somebody_still_is(
    devns: Devns, tiny: Callable[..., str], running: Callable[[str], Any], store: Path
) -> None:
    devns("build", tiny())
    (layer,) = listdir(store / "layers")
    with running("tiny"):
        tiny("tiny", "two\n")  # from now on the environment names another layer
        assert devns("build", "tiny").returncode == 0
        assert answer(devns("gc", "--json")) == []
    assert [row["name"] for row in answer(devns("gc", "--json"))] == [layer]


def test_gc_leaves_the_cache_unless_told_and_then_what_a_layer_names(
    devns: Devns, tiny: Callable[..., str], store: Path
) -> None:
    devns("build", tiny())
    named, unnamed = "a" * 64, "b" * 64
    for part in ("debs", "indexes", "releases"):
        (store / "cache" / part).mkdir()
    (store / "cache" / "debs" / f"{named}.deb").write_text("x")
    (store / "cache" / "debs" / f"{unnamed}.deb").write_text("x")
    (store / "cache" / "debs" / f"{unnamed}.deb.part").write_text("x")
    (store / "cache" / "indexes" / f"bookworm-amd64-{unnamed}").write_text("x")
    (store / "cache" / "releases" / "bookworm").write_text("never older than this")
    (layer,) = listdir(store / "layers")
    path = store / "layers" / layer / "layer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "debs": {"a": {"sha256": named}}}))

    assert answer(devns("gc", "--json")) == []
    shown = answer(devns("gc", "--cache", "--dry-run", "--json"))
    assert [(row["kind"], row["name"], row["files"]) for row in shown] == [
        ("cache", "debs", 2),
        ("cache", "indexes", 1),
    ]
    assert answer(devns("gc", "--cache", "--json")) == shown
    assert listdir(store / "cache" / "debs") == [f"{named}.deb"]
    assert (listdir(store / "cache" / "indexes"), listdir(store / "cache" / "releases")) == ([], ["bookworm"])


def test_gc_does_not_empty_the_cache_beneath_a_build(devns: Devns, store: Path) -> None:
    from devns.store import Store

    devns("build", "host")
    with Store.open(str(store)).staging():
        assert one_sentence(devns("gc", "--cache")) == f"{store}/cache: in use: a layer is being made"
    assert devns("gc", "--cache").returncode == 0


def test_gc_takes_what_other_ids_own(devns: Devns, tiny: Callable[..., str], require: Any, store: Path) -> None:
    require("range")
    devns("build", tiny(table='[user]\nmap = "range"\n'))
    assert devns("remove", "tiny").returncode == 0
    assert [row["kind"] for row in answer(devns("gc", "--json"))] == ["layer"]
    assert (listdir(store / "layers"), listdir(store / "trash")) == ([], [])


def test_gc_of_no_store_makes_none(devns: Devns, store: Path) -> None:
    assert answer(devns("gc", "--cache", "--json")) == []
    assert not store.exists()


# --- du ---------------------------------------------------------------------------------------------------------------


def test_du_tells_own_and_shared_bytes_and_who_shares(devns: Devns, tiny: Callable[..., str], store: Path) -> None:
    tiny()
    (store.parent / "home/.config/devns/templates/second.toml").write_text('extends = "tiny"\n')
    devns("build", "tiny")
    devns(
        "run",
        "second",
        "--",
        "sh",
        "-c",
        "truncate -s 1G /srv/hole; cat /bin/sh > /srv/a; ln /srv/a /srv/b; echo > ~/x",
    )
    found = answer(devns("du", "--json"))
    (layer,) = found["layers"]
    assert layer["users"] == ["second", "tiny"]
    first, second = sorted(found["environments"], key=lambda row: str(row["name"]), reverse=True)
    assert first["shared"] == second["shared"] == layer["bytes"] >= os.path.getsize(tools()["bin/sh"])
    size = os.path.getsize(tools()["bin/sh"])
    assert size < second["root"] - first["root"] < 2 * size  # a hole takes nothing, two names count once
    assert second["own"] == second["root"] + second["home"]
    whole = found["cache"] + found["leftovers"] + layer["bytes"] + first["own"] + second["own"]
    assert found["total"] == whole
    said = devns("du").stdout.splitlines()
    assert said[0].split()[:3] == ["WHAT", "NAME", "SIZE"]
    assert said[-1].split()[0] == "total"


def test_du_counts_what_other_ids_own_and_keep_closed(devns: Devns, require: Any) -> None:
    require("range")
    said = "mkdir /srv/deep; cat /bin/ls > /srv/deep/file; chown -R 7:7 /srv/deep; chmod 0 /srv/deep"
    assert devns("run", "--root", "--map", "range", "host", "--", "sh", "-c", said).returncode == 0
    (row,) = answer(devns("du", "--json"))["environments"]
    assert row["root"] > os.path.getsize(tools()["bin/ls"])


def test_du_of_no_store_is_nothing(devns: Devns) -> None:
    assert answer(devns("du", "--json")) == {"environments": [], "layers": [], "cache": 0, "leftovers": 0, "total": 0}


# --- verify -----------------------------------------------------------------------------------------------------------


def problems(done: subprocess.CompletedProcess[str]) -> list[tuple[str, str | None, str]]:
    assert done.returncode == 125
    return [(row["kind"], row["path"], row["problem"]) for row in json.loads(done.stdout)["problems"]]


@pytest.fixture
def layer(devns: Devns, tiny: Callable[..., str], store: Path) -> Path:
    """The directory of a finished layer."""
    devns("build", tiny())
    (path,) = (store / "layers").iterdir()
    return path


def test_verify_of_what_is_whole_says_so(devns: Devns, layer: Path) -> None:
    found = answer(devns("verify", "--json"))
    assert found == {"environments": ["tiny"], "layers": [layer.name], "problems": []}
    assert devns("verify", "tiny").stdout == "1 layers, 1 environments: all is well\n"


def test_verify_finds_every_changed_missing_and_extra_file(devns: Devns, layer: Path) -> None:
    root = layer / "root"
    before = (root / "etc/name").stat()
    (root / "etc/name").write_text("eno\n")  # as long, and as old
    os.utime(root / "etc/name", ns=(before.st_atime_ns, before.st_mtime_ns))
    (root / "etc/other").unlink()
    (root / "etc/deep/file").chmod(0o600)
    (root / "etc/.extra").mkdir()
    (root / "etc/deep.d").symlink_to("deep")
    (root / "bin/sh").write_bytes((root / "bin/sh").read_bytes() + b"\n")
    (root / "srv").rmdir()
    (root / "srv").write_text("")
    os.setxattr(root / "var", "user.overlay.opaque", b"y")
    assert problems(devns("verify", "--json")) == [
        ("layer", "/bin/sh", "size, content"),
        ("layer", "/etc/.extra", "extra"),
        ("layer", "/etc/deep/file", "mode"),
        ("layer", "/etc/deep.d", "extra"),
        ("layer", "/etc/name", "content"),
        ("layer", "/etc/other", "missing"),
        ("layer", "/srv", "kind, mode, content"),
        ("layer", "/var", "attributes"),
    ]
    table = devns("verify").stdout.splitlines()
    assert table[1].split() == ["layer", layer.name, "/bin/sh", "size,", "content"]


def test_verify_finds_one_flipped_bit_in_any_file_of_a_layer(devns: Devns, layer: Path) -> None:
    root = layer / "root"
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in files:
        with path.open("r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(bytes([first[0] ^ 1]))
    wanted = sorted(("layer", f"/{path.relative_to(root)}", "content") for path in files)
    assert sorted(problems(devns("verify", "--json"))) == wanted


def _cut(layer: Path) -> None:
    path = layer / "manifest"
    path.write_bytes(path.read_bytes().rpartition(b"\n[")[0] + b"\n")


def _other_recipe(layer: Path) -> None:
    path = layer / "layer.json"
    path.write_text(path.read_text().replace('"size"', '"sise"'))


BREAK: dict[str, tuple[Callable[[Path], object], str]] = {
    "no record": (lambda layer: (layer / "layer.json").unlink(), "cannot be read"),
    "no JSON": (lambda layer: (layer / "layer.json").write_text("{"), "cannot be read"),
    "no tree": (lambda layer: shutil.rmtree(layer / "root"), "cannot be read"),
    "another recipe": (_other_recipe, "not the one that its name stands for"),
    "a shorter manifest": (_cut, "not the one that was recorded"),
    "no manifest": (lambda layer: (layer / "manifest").unlink(), "not the one that was recorded"),
}


@pytest.mark.parametrize("kind", BREAK)
def test_verify_finds_a_broken_record(devns: Devns, layer: Path, kind: str) -> None:
    breaks, said = BREAK[kind]
    breaks(layer)
    found = problems(devns("verify", "--json"))
    assert [row for row in found if row[0] == "layer" and said in row[2]] != []


def test_verify_finds_a_broken_environment_and_a_layer_that_went(devns: Devns, layer: Path, store: Path) -> None:
    shutil.rmtree(layer)
    assert problems(devns("verify", "--json")) == [("environment", None, f"its layer {layer.name} is not there")]
    (store / "environments/tiny/environment.json").write_text("[]")
    ((kind, path, said),) = problems(devns("verify", "tiny", "--json"))
    assert (kind, path) == ("environment", None)
    assert "cannot be read" in said


def test_verify_reads_what_other_ids_own(devns: Devns, tiny: Callable[..., str], require: Any, store: Path) -> None:
    require("range")
    devns("build", tiny(table='[user]\nmap = "range"\n'))
    assert devns("verify").returncode == 0
    devns("build", tiny("other", "two\n"))
    found = answer(devns("verify", "tiny", "--json"))
    assert (len(found["layers"]), found["problems"]) == (1, [])


# --- commit -----------------------------------------------------------------------------------------------------------


def test_what_was_written_becomes_a_template_that_outlives_its_environment(
    devns: Devns, tiny: Callable[..., str], templates: Path, store: Path
) -> None:
    script = "echo new > /etc/new; echo changed > /etc/name; rm /etc/other; mkdir -m 700 /srv/d; ln -s d /srv/l"
    assert devns("run", "--root", tiny(), "--", "sh", "-c", script).returncode == 0
    done = answer(devns("commit", "mine", "tiny", "--json"))
    assert done["template"] == str(templates / "mine.toml")
    assert devns("remove", "tiny").returncode == 0
    assert answer(devns("gc", "--json")) == []  # the template names both layers
    seen = devns("run", "mine", "--", "sh", "-c", "cat /etc/new /etc/name; cat /etc/other || ls /srv; ls -ld /srv/d")
    assert seen.stdout.splitlines()[:4] == ["new", "changed", "d", "l"]
    assert seen.stdout.splitlines()[4].startswith("drwx------")
    assert answer(devns("diff", "mine", "--json"))["files"] == []
    layers = answer(devns("info", "mine", "--json"))["layers"]
    assert (len(layers), layers[1]) == (2, done["layer"])
    rows = {row["key"]: row["users"] for row in answer(devns("du", "--json"))["layers"]}
    assert rows[done["layer"]] == ["mine", "template mine"]
    assert answer(devns("verify", "--json"))["problems"] == []


def test_a_commit_of_a_commit_stands_on_it_and_without_templates_both_go(
    devns: Devns, tiny: Callable[..., str], templates: Path, store: Path
) -> None:
    assert devns("run", "--root", tiny(), "--", "sh", "-c", "echo 1 > /etc/first").returncode == 0
    first = answer(devns("commit", "first", "tiny", "--json"))["layer"]
    assert devns("run", "--root", "first", "--", "sh", "-c", "echo 2 > /etc/second").returncode == 0
    second = answer(devns("commit", "second", "first", "--json"))["layer"]
    assert answer(devns("info", "second", "--json"))["layers"][1:] == [first, second]
    assert devns("run", "second", "--", "cat", "/etc/first", "/etc/second").stdout == "1\n2\n"
    for name in ("first", "second"):
        (templates / f"{name}.toml").unlink()
    assert devns("remove", "tiny", "first", "second").returncode == 0
    gone = {row["name"] for row in answer(devns("gc", "--json"))}
    assert gone >= {first, second}
    assert listdir(store / "layers") == []


def test_what_was_not_written_gives_the_same_layer_twice(devns: Devns, tiny: Callable[..., str]) -> None:
    assert devns("run", "--root", tiny(), "--", "sh", "-c", "echo 1 > /etc/first").returncode == 0
    layers = [answer(devns("commit", name, "tiny", "--json"))["layer"] for name in ("one", "two")]
    assert layers[0] == layers[1]


def test_a_commit_that_cannot_be_is_one_sentence_and_nothing_is_made(
    devns: Devns, tiny: Callable[..., str], templates: Path, store: Path, running: Callable[[str], Any]
) -> None:
    assert devns("build", tiny()).returncode == 0
    before = listdir(store / "layers")
    assert "there is a template of this name" in one_sentence(devns("commit", "py311", "tiny"))
    assert "not fit for a template's name" in one_sentence(devns("commit", "../x", "tiny"))
    assert devns("run", "host", "--", "true").returncode == 0
    assert "its root is the host's" in one_sentence(devns("commit", "mine", "host"))
    with running("tiny"):
        assert "tiny: in use" in one_sentence(devns("commit", "mine", "tiny"))
    assert (listdir(templates), listdir(store / "layers")) == (["tiny.toml"], before)
    assert listdir(store / "staging") == []


def test_a_template_of_layers_that_are_not_here_says_so(
    devns: Devns, tiny: Callable[..., str], templates: Path
) -> None:
    key = "commit-" + "0" * 32
    (templates / "lost.toml").write_text(f'extends = "{tiny()}"\n[root]\nlayers = ["{key}"]\n')
    done = devns("run", "lost", "--", "true")
    assert (done.returncode, f"root.layers: {key}: not in this store" in done.stderr) == (78, True)
    (templates / "lost.toml").write_text('extends = "tiny"\n[root]\nlayers = ["../../x"]\n')
    done = devns("run", "lost", "--", "true")
    assert (done.returncode, "no name of a layer" in done.stderr) == (78, True)
    (templates / "lost.toml").write_text("layers = [")
    done = devns("gc")
    assert (done.returncode, "lost.toml" in done.stderr) == (78, True)  # it may name layers, so none is taken away
