"""The architecture, as far as imports and calls show it: which room may use what. A new room gets its row here.

Only the source is read (AST), nothing is imported. An import inside a function counts like one at the top. One under
`if TYPE_CHECKING` does nothing when the program runs, so it counts for plugins only, whose one door is devns.api.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Who may import it: "typer" is for cli.py alone, pickle is for nobody.
FEW = {
    "typer": "devns.cli",
    "click": "",
    "rich": "devns.cli devns.console",
    "pluggy": "devns.hooks devns.plugins",
    "tomli": "devns.template devns.debian.mirrors",
    "pysequoia": "devns.debian.openpgp",
    "zstandard": "devns.archive",
    "ctypes": "devns.linux",
    "devns.cli": "devns.__main__",
    "devns.console": "devns.cli",
    "devns.verbs": "devns.cli devns.verbs.*",
    "devns.library": "devns",
    "devns.fast": "devns.__main__",
    "devns.api": "devns_*",
    "devns.base": "devns.plugins",
    "devns_*": "devns_*",  # launch resolves an effect by its name, and only that of an enabled plugin
    "subprocess": "devns.library",  # to answer as subprocess.run does
    "socket": "devns.launch devns.child devns.ops devns.debian.transport devns_network.*",
    "http": "devns.debian.transport",
    "ssl": "devns.debian.transport devns.debian.mirrors",
    "urllib.request": "",  # it follows redirects and proxies by rules of its own
    "threading": "devns.library devns.debian.*",  # whoever forks has one thread
    "asyncio": "",
    "multiprocessing": "",
    "pickle": "",
    "marshal": "",
    "shelve": "",
    "tarfile": "",  # its filters have been walked around again and again: devns.archive reads, devns.unpack writes
    "zipfile": "",
    "tomllib": "",  # tomli on every Python: one parser, with limits
}

# Who may call it. `.name` is a method of anything, `name=True` a keyword of any call.
CALLS = {
    "print": "devns.cli devns.console",
    "sys.exit": "devns.cli devns.__main__",
    "exit": "",
    "quit": "",
    "SystemExit": "devns.terminal",  # a fatal signal unwinds the contexts that hold the terminal
    "eval": "",
    "exec": "",
    "os.system": "",
    "os.popen": "",
    ".extractall": "",
    ".extract": "",
    "shell=True": "",
}

_PURE = "os io pathlib shutil subprocess socket tempfile ctypes devns.linux devns.launch devns.child devns.store"
_SLOW = "typer rich pluggy tomli dataclasses inspect"  # the fast lane has no time for them


class Room(NamedTuple):
    """What a room imports: `ours` of devns, `others` of everything else (None: whatever it likes), `never` these."""

    name: str
    ours: str | None = None
    others: str | None = None
    never: str = ""


ROOMS = (
    # --- the doors
    Room("devns", ours="", others="importlib"),
    Room("devns.__main__", ours="devns.cli devns.fast", others="os sys"),
    Room("devns.api", ours="", others="importlib typing"),
    Room("devns.cli", never="ctypes subprocess socket devns.linux devns.ops devns.launch devns.child devns.store"),
    Room("devns.console", ours="devns.decode devns.errors devns.progress"),
    Room("devns.library", never="devns.linux devns.ops"),
    Room("devns.spaces"),
    Room("devns.workflow", never="os ctypes subprocess socket devns.linux devns.ops"),
    Room("devns.verbs"),
    Room("devns.verbs.*", never="ctypes subprocess socket devns.linux devns.child"),
    Room("devns.fast", never=f"{_SLOW} devns.hooks devns.plugins devns.template devns.decode devns.spec"),
    # --- values, and the pure way from a template to a Plan
    Room("devns.errors", ours="", others=""),
    Room("devns.progress", ours="", others="typing"),
    Room("devns.decode", ours="devns.errors", never=_PURE),
    Room("devns.template", ours="devns.errors devns.decode devns.lock devns.spec"),
    Room("devns.lock", ours="", never=_PURE),
    Room("devns.trust", never="devns.linux devns.launch devns.plugins devns.hooks"),
    Room("devns.spec", ours="devns.errors devns.decode devns.lock", never=_PURE),
    Room("devns.host", ours="devns.errors", never="ctypes fcntl shutil socket subprocess tempfile"),
    Room("devns.hooks", ours="", others="pluggy collections.abc typing"),
    Room("devns.plugins", never="ctypes subprocess socket devns.linux devns.ops devns.launch"),
    Room("devns.base", never=_PURE),
    Room("devns.accounts", ours="devns.decode devns.errors", never=_PURE),
    Room("devns.identity", ours="devns.errors", never=_PURE),
    Room("devns.plan", ours="devns.accounts devns.errors devns.identity devns.ops", never=_PURE),
    Room("devns.diagnose", never="ctypes subprocess socket devns.ops"),
    # --- what acts
    Room("devns.linux", ours="", others="ctypes errno os collections.abc typing"),
    Room("devns.ops", ours="devns.errors devns.linux", never=_SLOW),
    Room("devns.seccomp", ours="devns.errors devns.linux", never=_SLOW),
    Room("devns.terminal", ours="devns.errors devns.linux", never=_SLOW),
    Room("devns.child", never=f"{_SLOW} devns.base devns.hooks devns.plugins devns.spec devns.store"),
    Room("devns.launch", never=f"{_SLOW} devns.base devns.hooks devns.plugins devns.spec devns.store"),
    # --- what lies on disk, and where it comes from
    Room("devns.store", ours="devns.errors devns.durable devns.trash", never=_SLOW),
    Room("devns.durable", ours="devns.errors devns.linux", never=_SLOW),
    Room("devns.trash", ours="devns.errors devns.linux", never=_SLOW),
    Room("devns.manifest", ours="devns.errors", never="ctypes subprocess socket"),
    Room("devns.copying", ours="", never="ctypes subprocess socket shutil"),
    Room("devns.changes", ours="", never="ctypes subprocess socket"),
    Room("devns.trees", never="ctypes subprocess socket devns.linux devns.workflow"),
    Room("devns.build", never="ctypes devns.linux devns.workflow"),
    Room("devns.sealed", never="devns.workflow devns.store"),
    Room("devns.archive", ours="devns.errors", never="subprocess socket ctypes"),
    Room("devns.debfile", ours="devns.archive devns.errors", never="subprocess socket ctypes"),
    Room("devns.writer", ours="devns.archive devns.durable devns.errors", never="subprocess socket ctypes"),
    Room("devns.unpack", never="devns.spec devns.store devns.workflow devns.plugins"),
    Room("devns.sources", never="devns.workflow devns.library devns.store"),
    Room("devns.sources.*", never="devns.workflow devns.library devns.store"),
    Room("devns.debian", never="devns.workflow devns.library devns.store"),
    Room("devns.debian.*", never="devns.workflow devns.library devns.store"),
    # --- plugins: a hook reads `host`, an effect acts
    Room("devns_*.plugin", ours="devns.api", never=_PURE),
    Room("devns_*", ours="devns.api", never="typer rich pluggy tomli"),
)


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_it_is_imported_only_where_it_is_meant_to_be(name: str) -> None:
    users = {module for module, tree in MODULES.items() if any(within(used, name) for used in imports(tree))}
    assert sorted(user for user in users if not named(user, FEW[name]) and not within(user, name)) == []


@pytest.mark.parametrize("call", CALLS)
def test_it_is_called_only_where_it_is_meant_to_be(call: str) -> None:
    users = {module for module, tree in MODULES.items() if call in calls(tree)}
    assert sorted(user for user in users if not named(user, CALLS[call])) == []


@pytest.mark.parametrize("room", ROOMS, ids=[room.name for room in ROOMS])
def test_a_room_imports_only_what_its_row_allows(room: Room) -> None:
    for module in (module for module in MODULES if room_of(module) is room):
        assert violations(module, MODULES[module], room) == []


def test_every_file_has_its_row_in_the_table() -> None:
    assert [module for module in MODULES if room_of(module) is None] == []


def test_nobody_catches_everything_without_naming_it() -> None:
    bare = [
        f"{module}:{node.lineno}"
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert bare == []


def test_only_the_command_line_ends_an_error_that_is_meant_for_the_user() -> None:
    enders = {
        module
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and "DevnsError" in names(node.type)
        if not isinstance(node.body[-1], ast.Raise)  # to say it better, or to let it by, is no end
    }
    assert enders <= {"devns.cli", "devns.child", "devns.unpack"}  # the latter send it on to the process that waits


def test_every_module_opens_with_the_sentence_that_says_what_it_owns() -> None:
    silent = [module for module, tree in MODULES.items() if tree.body and ast.get_docstring(tree) is None]
    assert silent == []


def test_the_hookspecs_are_nothing_but_their_docstrings() -> None:
    hooks = [node for node in ast.walk(MODULES["devns.hooks"]) if isinstance(node, ast.FunctionDef)]
    assert [hook.name for hook in hooks] == ["devns_table", "devns_check", "devns_plan"]
    assert [hook.name for hook in hooks if len(hook.body) != 1 or ast.get_docstring(hook) is None] == []


def test_the_plugin_authors_door_defines_nothing() -> None:
    body = ast.walk(MODULES["devns.api"])
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert defined <= {"__getattr__", "__dir__"}


@pytest.mark.parametrize("package", sorted(path.name for path in (REPOSITORY / "plugins").iterdir() if path.is_dir()))
def test_a_plugins_package_is_empty_so_that_an_effect_loads_alone(package: str) -> None:
    assert MODULES[package].body == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("import typer", ["typer"]),
        ("def verb():\n    from typer.core import Group", ["typer.core.Group"]),
        ("from devns import linux", ["devns.linux"]),
        ("from devns.linux import unshare", ["devns.linux.unshare"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import typer", []),
        ("import typing\nif not typing.TYPE_CHECKING:\n    import typer", ["typer"]),
        ("from typerish import typer\nfrom devns import launch", []),
    ],
)
def test_an_import_is_found_however_it_is_written(source: str, wrong: list[str]) -> None:
    assert violations("devns.verbs.x", ast.parse(source), Room("devns.verbs.*", never="typer devns.linux")) == wrong


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("subprocess.run('ls', shell=True)", {"subprocess.run", ".run", "shell=True"}),
        ("tar.extractall('/x')", {"tar.extractall", ".extractall"}),
        ("raise SystemExit(3)", {"SystemExit"}),
        ("raise SystemExit", {"SystemExit"}),
        ("console().print(1)", {"console", ".print"}),
    ],
)
def test_a_call_is_found_however_it_is_written(source: str, found: set[str]) -> None:
    assert calls(ast.parse(source)) == found


# --- reading the source -----------------------------------------------------------------------------------------------


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for root in (REPOSITORY, REPOSITORY / "plugins"):
        for path in sorted(root.glob("devns*/**/*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            yield name.removesuffix(".__init__"), ast.parse(path.read_text(), str(path))


MODULES = dict(_modules())


def imports(tree: ast.AST, *, types: bool = False) -> Iterator[str]:
    """What is imported, as dotted names: "os", "devns.linux.unshare". With `types` also what only annotations need."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module != "__future__")
        elif isinstance(node, ast.If) and not types and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            if ast.unparse(node.test).startswith("not "):
                yield from imports(node)
            else:
                yield from imports(ast.Module(body=node.orelse, type_ignores=[]))
        else:
            yield from imports(node, types=types)


def calls(tree: ast.AST) -> set[str]:
    """What is called or raised: "print", "os.system", ".extractall" for any object's, "shell=True" for any call's."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name):
            found.add(node.exc.id)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                found.add(f".{node.func.attr}")
            if isinstance(node.func, ast.Name) or (
                isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
            ):
                found.add(ast.unparse(node.func))
            found |= {ast.unparse(word) for word in node.keywords if ast.unparse(word) == "shell=True"}
    return found


def names(node: ast.expr | None) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} if node is not None else set()


def violations(module: str, tree: ast.Module, room: Room) -> list[str]:
    """The imports of `module` that its room does not allow."""
    package = module.partition(".")[0]
    plugin = package != "devns"
    return [
        used
        for used in imports(tree, types=plugin)
        if not _allowed(used, room) and not (plugin and within(used, package))  # a plugin's modules import each other
    ]


def _allowed(used: str, room: Room) -> bool:
    listed = room.ours if within(used, "devns") else room.others
    if used == "devns.__version__":  # a number, and of no room
        return True
    return (listed is None or _any_within(used, listed)) and not _any_within(used, room.never)


def _any_within(name: str, places: str) -> bool:
    return any(within(name, place) for place in places.split())


def within(name: str, place: str) -> bool:
    """A dotted name is the place, or lies in it: "devns.linux.unshare" in "devns.linux"."""
    return fnmatchcase(name, place) or fnmatchcase(name, f"{place}.*")


def named(module: str, patterns: str) -> bool:
    """A module is one of those named, itself: "devns.verbs.run" by "devns.verbs.*"."""
    return any(fnmatchcase(module, pattern) for pattern in patterns.split())


def room_of(module: str) -> Room | None:
    """The first row that names `module`."""
    return next((room for room in ROOMS if fnmatchcase(module, room.name)), None)
