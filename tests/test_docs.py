"""The documentation is true: its templates parse, its programs run, its commands, links, keys and defaults exist."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import pytest
import tomli
import typer

import devns
from devns import api, cli, ops, plugins, template
from devns.debian import mirrors
from devns.decode import show
from devns.diagnose import probe
from devns.host import Host
from devns.spec import make_spec, tables

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted([*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")])
ENVIRONMENTS = ("userns", "mount", "proc", "pid", "ipc", "uts", "net", "cgroup", "time", "seccomp")


class Block(NamedTuple):
    """A fenced block. `title` is what stands after the language: a file's name, where the block is not a whole."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        for match in re.finditer(r"^```(\w*)[ ]?(.*)\n((?:.*\n)*?)```$", page.read_text(), re.MULTILINE):
            line = page.read_text()[: match.start()].count("\n") + 1
            yield Block(page, line, match[1], match[2], match[3])


BLOCKS = list(blocks())


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def titled(page: str, title: str) -> str:
    (found,) = (block.text for block in BLOCKS if block.page.name == page and block.title == title)
    return found


# --- templates --------------------------------------------------------------------------------------------------------

TEMPLATES = [block for block in BLOCKS if block.language == "toml" and not block.title]


@pytest.fixture
def machine(tmp_path: Path) -> Host:
    """A host of the caller's own files: a home with a project in it."""
    project = tmp_path / "home/user/project"
    project.mkdir(parents=True)
    for directory in (project, *project.parents):
        if tmp_path in directory.parents or directory == tmp_path:
            directory.chmod(0o755)
    return Host.make(
        root=str(tmp_path),
        uid=os.getuid(),
        gid=os.getgid(),
        environ={"HOME": "/home/user"},
        cwd="/home/user/project",
        machine="x86_64",
        release="6.12.0",
    )


@pytest.mark.parametrize("block", TEMPLATES, ids=[block.id for block in TEMPLATES])
def test_every_template_in_the_docs_makes_a_spec(block: Block, machine: Host) -> None:
    file = Path(f"{machine.root}{machine.cwd}/.devns.toml")
    file.write_text(block.text)
    file.chmod(0o644)
    claims = plugins.load(machine).claims()
    assert make_spec(template.load(None, machine, claims=claims), claims).project == machine.cwd


def test_every_other_toml_block_says_what_it_is() -> None:
    names = {block.title for block in BLOCKS if block.language == "toml" and block.title}
    assert names == {"pyproject.toml", "config.toml", "timesheet"}


def test_the_configuration_in_the_docs_names_a_mirror(machine: Host) -> None:
    text = titled("hosts.md", "config.toml")
    path = Path(machine.root + machine.config)
    path.mkdir(parents=True)
    (path / "config.toml").write_text(text)
    assert mirrors.find(machine).main == tomli.loads(text)["debian"]["mirror"]


# --- every table and key ----------------------------------------------------------------------------------------------

ROW = re.compile(r"^\| `([\w-]+)` \| (.*?) \| (.*?) \| (.*) \|$", re.MULTILINE)
NAMES: Mapping[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number"}


def documented() -> dict[str, dict[str, tuple[str, str, str]]]:
    """{"mount.bind": {"src": (type, default, meaning)}} as docs/templates.md has it."""
    parts = re.split(r"^#{2,3} `?([\w .]+)`?$", (DOCS / "templates.md").read_text(), flags=re.MULTILINE)
    return {
        heading: {key: (kind, default, meaning) for key, kind, default, meaning in ROW.findall(text)}
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
        if ROW.search(text)
    }


def every_table() -> dict[str, type]:
    """Every table a template may have, by its path, those in tables too."""
    found: dict[str, type] = {}

    def add(path: str, table: type) -> None:
        found[path] = table
        for field in dataclasses.fields(table):
            for kind in flat(get_type_hints(table)[field.name]):
                if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                    add(f"{path}.{field.metadata.get('key', field.name)}", kind)

    for name, table in tables(plugins.load(Host.probe()).claims()).items():
        add(name, table)
    return found


def flat(annotation: Any) -> Iterator[Any]:
    """An annotation and all it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from flat(part)


TABLES = every_table()


def kind_in_words(annotation: Any, unit: str | None) -> str:
    union = get_origin(annotation) in (Union, types.UnionType)
    sides = [side for side in (get_args(annotation) if union else (annotation,)) if side is not types.NoneType]
    words = [word for side in sides for word in side_in_words(side, unit)]
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def side_in_words(side: Any, unit: str | None) -> list[str]:
    if get_origin(side) is Literal:
        return [f"`{show(choice)}`" for choice in get_args(side)]
    if get_origin(side) is tuple and get_args(side)[-1] is Ellipsis:
        (item,) = side_in_words(get_args(side)[0], None)
        return [f"list of {item}" if item.startswith("[") else f"list of {item}s"]
    if get_origin(side) is tuple:
        return [f"[{', '.join(NAMES[item] for item in get_args(side))}]"]
    if dataclasses.is_dataclass(side):
        return ["table"]
    if side not in NAMES:
        return [f"table of {NAMES[get_args(side)[1]]}s"]
    return [unit if unit and side is int else NAMES[side]]


def default_in_words(field: dataclasses.Field[Any]) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else f"`{show(field.default_factory())}`"
    if default is None:
        return "not set"
    if dataclasses.is_dataclass(default):
        return "`true`"
    return f"`{show(list(default) if isinstance(default, tuple) else default)}`"


@pytest.mark.parametrize("path", TABLES)
def test_the_manual_has_every_key_of_a_table_with_its_type_and_default(path: str) -> None:
    said = {key: (kind, default) for key, (kind, default, _) in documented()[path].items()}
    hints = get_type_hints(TABLES[path])
    assert said == {
        field.metadata.get("key", field.name): (
            kind_in_words(hints[field.name], field.metadata.get("unit")),
            default_in_words(field),
        )
        for field in dataclasses.fields(TABLES[path])
    }


@pytest.mark.parametrize("path", TABLES)
def test_the_manual_says_which_lists_add_up(path: str) -> None:
    said = {key for key, (_, _, meaning) in documented()[path].items() if "Adds up." in meaning}
    fields = dataclasses.fields(TABLES[path])
    assert said == {field.metadata.get("key", field.name) for field in fields if field.metadata.get("merge") == "add"}


def test_the_manual_has_no_table_that_is_not_there() -> None:
    assert set(documented()) == {"Top level", *TABLES}
    assert set(documented()["Top level"]) == {"description", "extends"}


@pytest.mark.parametrize("path", TABLES)
def test_the_manual_has_an_example_of_every_key(path: str) -> None:
    used = {key for block in TEMPLATES if block.page.name == "templates.md" for key in leaves(tomli.loads(block.text))}
    assert {f"{path}.{field.metadata.get('key', field.name)}" for field in dataclasses.fields(TABLES[path])} <= used


def leaves(data: Any, path: str = "") -> Iterator[str]:
    """The paths of all keys; the items of a list have their list's."""
    for item in data if isinstance(data, list) else ():
        yield from leaves(item, path)
    for key, value in data.items() if isinstance(data, dict) else ():
        below = f"{path}.{key}" if path else key
        yield below
        yield from leaves(value, below)


# --- programs ---------------------------------------------------------------------------------------------------------

PROGRAMS = [block for block in BLOCKS if block.language == "python" and not block.title]


@pytest.fixture
def surroundings(tmp_path: Path) -> dict[str, str]:
    """The variables of a process that uses this checkout, with a home and a store of the test's."""
    (tmp_path / "home").mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "DEVNS"))}
    env |= {"HOME": str(tmp_path / "home"), "DEVNS_STORE": str(tmp_path / "store"), "PYTHONDONTWRITEBYTECODE": "1"}
    return env | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'plugins'}"}


@pytest.mark.parametrize("block", PROGRAMS, ids=[block.id for block in PROGRAMS])
def test_every_program_in_the_docs_prints_what_it_says(
    block: Block, surroundings: dict[str, str], tmp_path: Path, require: Any
) -> None:
    require(*ENVIRONMENTS)
    program = block.text.replace('"py311"', '"host"')  # the one that needs no network
    done = subprocess.run(
        [sys.executable, "-c", program], env=surroundings, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout.splitlines(), done.stderr) == (promised(block.text), "")


def promised(program: str) -> list[str]:
    """What the comments say will be printed: behind each print, and at the program's end."""
    lines = program.rstrip().split("\n")
    beside = [line.split("  # ", 1)[1] for line in lines if "print(" in line and "  # " in line]
    last = max(number for number, line in enumerate(lines) if not line.startswith("#"))
    return beside + [line.removeprefix("# ") for line in lines[last + 1 :]]


def test_the_plugin_in_the_docs_can_be_enabled_and_acts(
    surroundings: dict[str, str], tmp_path: Path, require: Any
) -> None:
    require(*ENVIRONMENTS)
    install_timesheet(tmp_path / "site")
    env = {**surroundings, "PYTHONPATH": f"{surroundings['PYTHONPATH']}:{tmp_path / 'site'}"}
    project, sheet = tmp_path / "home/project", tmp_path / "sheet"
    (project / ".git").mkdir(parents=True)
    (project / ".devns.toml").write_text(titled("plugins.md", "timesheet").replace("/tmp/timesheet", str(sheet)))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "devns", *arguments]
        return subprocess.run(command, env=env, cwd=project, capture_output=True, text=True, check=False)

    def state() -> str:
        (found,) = (row for row in json.loads(run("plugin", "list", "--json").stdout) if row["name"] == "timesheet")
        return str(found["state"])

    assert state() == "off"
    assert "timesheet: no such table" in run("plan").stderr
    assert run("plugin", "enable", "timesheet").returncode == 0
    assert state() == "enabled"
    assert run("run", "--", "true").returncode == 78  # a plugin's table needs trust
    assert run("trust").returncode == 0
    done = run("run", "--", "sh", "-c", "echo $TIMESHEET")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{re.escape(done.stdout.strip())} \d+ s\n", sheet.read_text())

    effect = tmp_path / "site/devns_timesheet/effect.py"
    effect.write_text(effect.read_text() + "# changed\n")
    assert state() == "refused"
    assert run("run", "host", "--", "true").returncode == 125
    assert run("plugin", "disable", "timesheet").returncode == 0


def install_timesheet(site: Path) -> None:
    """What pip would make of the example: its package and its metadata."""
    project = tomli.loads(titled("plugins.md", "pyproject.toml"))["project"]
    name = project["name"].replace("-", "_")
    metadata = site / f"{name}-{project['version']}.dist-info"
    files = {f"{name}/__init__.py": ""}
    files |= {block.title: block.text for block in BLOCKS if block.language == "python" and block.title}
    points = "".join(f"{key} = {value}\n" for key, value in project["entry-points"]["devns"].items())
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (metadata / "entry_points.txt").write_text(f"[devns]\n{points}")
    (metadata / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    for path, text in files.items():
        (site / path).parent.mkdir(exist_ok=True)
        (site / path).write_text(text)


# --- commands ---------------------------------------------------------------------------------------------------------


def command_lines() -> Iterator[str]:
    """What a reader may type: in sh blocks, in indented lines, and in a line's code spans."""
    for page in PAGES:
        yield from re.findall(r"^ {4,}((?:\S*/)?devns .*)$", prose(page), re.MULTILINE)
        yield from re.findall(r"`(devns\s[^`]+)`", prose(page))
    for block in BLOCKS:
        if block.language == "sh":
            yield from (part for part in re.split(r"&&|\n", block.text) if "devns " in part)


COMMANDS = sorted({" ".join(line.split()) for line in command_lines()})


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_in_the_docs_names_verbs_and_options_that_exist(line: str) -> None:
    command: Any = typer.main.get_command(cli.app)
    words = shlex.split(line, comments=True)[1:]
    for word in words[: words.index("--")] if "--" in words else words:
        if word.startswith("-"):
            options = {name for option in command.params for name in option.opts} | {"--help", "-h"}
            assert word.partition("=")[0] in options
        elif hasattr(command, "commands"):
            assert word in command.commands
            command = command.commands[word]


def test_the_docs_name_every_verb() -> None:
    command: Any = typer.main.get_command(cli.app)
    said = " ".join(COMMANDS)
    assert [verb for verb in command.commands if f"devns {verb}" not in said] == []


def test_readme_opens_with_two_commands_of_one_line() -> None:
    commands = [block.text for block in BLOCKS if block.page.name == "README.md" and block.language == "sh"]
    assert [command.count("\n") for command in commands] == [1, 1]


# --- links ------------------------------------------------------------------------------------------------------------


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
            if "://" not in target:
                yield page, target


LINKS = list(links())


@pytest.mark.parametrize(
    ("page", "target"), LINKS, ids=[f"{page.relative_to(REPOSITORY)}:{target}" for page, target in LINKS]
)
def test_every_relative_link_leads_somewhere(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    linked = page.parent / path if path else page
    assert linked.exists()
    if anchor:
        assert anchor in {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(linked), re.MULTILINE)}


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_every_decision_is_listed_by_its_number() -> None:
    files = sorted(path.name for path in (DOCS / "decisions").glob("[0-9]*.md"))
    listed = re.findall(r"^(\d+)\. \[.*\]\((.+)\)$", (DOCS / "decisions/README.md").read_text(), re.MULTILINE)
    assert [name for _, name in listed] == files
    assert [f"{int(number):04}" for number, _ in listed] == [name[:4] for name in files]


def test_every_decision_that_the_code_names_is_there() -> None:
    sources = [path for root in ("devns", "plugins", "tests") for path in (REPOSITORY / root).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"docs/decisions/[\w-]+\.md", path.read_text())}
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []


# --- lists that must not fall behind ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "function"),
    [("open", devns.open), ("namespaces", devns.namespaces), ("run", devns.Environment.run)],
    ids=["open", "namespaces", "Environment.run"],
)
def test_the_librarys_page_has_the_signature(name: str, function: Any) -> None:
    signature = inspect.signature(function)
    bare = [part.replace(annotation=part.empty) for part in signature.parameters.values() if part.name != "self"]
    said = str(signature.replace(parameters=bare, return_annotation=signature.empty)).replace("'", '"')
    assert f"{name}{said}" in " ".join((DOCS / "library.md").read_text().split())


def test_the_librarys_page_has_every_key_of_a_plan() -> None:
    plan = devns.namespaces().plan()
    section = (DOCS / "library.md").read_text().partition("## The Plan")[2]
    assert [row[0] for row in re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE)] == list(plan)
    assert [key for key in plan["confine"] if f"`{key}`" not in section] == []


def test_the_librarys_page_has_everything_that_devns_exports() -> None:
    text = (DOCS / "library.md").read_text()
    assert [name for name in devns.__all__ if name not in text] == []


def test_the_plugins_page_has_every_maker_of_a_step() -> None:
    text = (DOCS / "plugins.md").read_text()
    makers = [name for name in api.__all__ if getattr(getattr(api, name), "__module__", None) == "devns.ops"]
    assert [name for name in makers if f"`{name}`" not in text] == []


def test_the_page_on_how_it_works_has_every_op() -> None:
    text = (DOCS / "how.md").read_text()
    assert [op for op in (*ops.APPLIES, *ops.FOLDED) if f"`{op}`" not in text] == []


def test_the_page_on_hosts_has_every_fact_that_check_tries(tmp_path: Path) -> None:
    section = (DOCS / "hosts.md").read_text().partition("## ")[0]
    rows = " ".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))
    assert sorted(re.findall(r"`(\w+)`", rows.replace("`devns check`", ""))) == sorted(
        probe(Host.probe(), str(tmp_path))
    )


def test_the_page_on_hosts_has_every_variable_that_devns_reads() -> None:
    sources = [path for root in ("devns", "plugins") for path in (REPOSITORY / root).rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"\bDEVNS_[A-Z_]+", path.read_text())}
    text = (DOCS / "hosts.md").read_text()
    assert [name for name in sorted(read) if f"`{name}`" not in text] == []
