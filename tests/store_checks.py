"""What holds for every store at every moment, and a small life of a store to check it against.

`assert_store_sound` checks the invariants I1 to I6 that a kill, an error or a race must not break.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from devns.errors import DevnsError
from devns.store import Store, is_key, upper_name

BASE = "base-" + "b" * 32
TOP = "top-" + "c" * 32
_KNOWN = {"version", "layers", "environments", "staging", "trash", "locks", "cache"}


def assert_store_sound(path: str, *, again: Callable[[], object] | None = None) -> None:
    """Nothing is half made, nothing is left over that nobody collects, and all of it can be used.

    `again` repeats what was interrupted: it must succeed, twice, with the same answer.
    """
    _assert_finished(path)  # before anything is mended
    if again is not None:
        assert again() == again(), "I5"
        _assert_finished(path)
    _assert_collectable(path)
    _assert_usable(path)
    _assert_nothing_left(path)


def _assert_finished(path: str) -> None:
    """I1: whatever has a final name is complete, and is what its name says."""
    assert os.stat(path).st_mode & 0o777 == 0o700
    assert _KNOWN.issuperset(os.listdir(path))
    if os.path.lexists(f"{path}/version"):
        with open(f"{path}/version") as file:
            assert file.read() == "1\n", "I1: version"
    store = Store(path)
    for key in _listdir(f"{path}/layers"):
        assert is_key(key), f"I1: {key}"
        layer = store.layer(key)
        assert layer is not None, f"I1: {key}"
        assert layer.record.get("tree", tree(layer.root)) == tree(layer.root), f"I1: {key}"
    store.close()
    for environment in store.environments():
        assert environment.broken is None, f"I1: {environment.name}: {environment.broken}"
        assert environment.upper == f"{environment.path}/{upper_name(environment.layers)}/root"
        for directory in (environment.home, environment.upper, environment.work):
            assert os.path.isdir(directory), f"I1: {directory}"
        uppers = [entry for entry in os.listdir(environment.path) if entry.startswith("upper-")]
        assert set(os.listdir(environment.path)) == {"environment.json", "home", *uppers}, "I1"
        assert all(set(os.listdir(f"{environment.path}/{entry}")) == {"root", "work"} for entry in uppers), "I1"
        assert stat.S_IMODE(os.stat(environment.upper).st_mode) == 0o755, "I1"


def _assert_collectable(path: str) -> None:
    """I2: what is in staging is collected, or somebody who lives holds its lock; and what is in trash is collected."""
    store = Store.open(path)
    assert store.collect() == (), "I2"
    for name in _listdir(f"{path}/staging"):
        assert store._is_held(f"staging@{name}"), f"I2: {name}: nobody makes it, and it was not collected"
    assert _listdir(f"{path}/trash") == [], "I2"


def _assert_usable(path: str) -> None:
    """I3: what lists, enters and removes works."""
    store = Store.open(path)
    store.unused_layers()
    for environment in store.environments():
        with environment.lease():
            assert environment.in_use
        assert not environment.in_use


def _assert_nothing_left(path: str) -> None:
    """I4 and I6: no mount, no lock and no file but those of what has a name."""
    with open("/proc/self/mountinfo", "rb") as file:
        assert os.fsencode(path) not in file.read(), "I4"
    Store.open(path).collect()
    names = {f"{kind}@{name}" for name in _listdir(f"{path}/environments") for kind in ("environment", "turn")}
    keys = _listdir(f"{path}/layers")
    known = {"store@asking", *names, *keys, *(f"layer@{key}" for key in keys)}
    known |= {f"staging@{name}" for name in _listdir(f"{path}/staging")}
    assert known.issuperset(name[: -len(".lock")] for name in os.listdir(f"{path}/locks")), "I6"
    for lock in os.listdir(f"{path}/locks"):
        assert os.stat(f"{path}/locks/{lock}").st_size == 0, "I6"


def tree(root: str) -> str:
    """A hash over the names, kinds, modes and bytes of a directory tree."""
    digest = hashlib.sha256()
    for directory, directories, files in os.walk(root):
        directories.sort()
        for name in sorted([*directories, *files]):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            digest.update(f"{os.path.relpath(path, root)}\0{status.st_mode}\0".encode())
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    digest.update(file.read())
            elif stat.S_ISLNK(status.st_mode):
                digest.update(os.fsencode(os.readlink(path)))
    return digest.hexdigest()


def _listdir(path: str) -> list[str]:
    return sorted(os.listdir(path)) if os.path.isdir(path) else []


# --- a small life of a store ------------------------------------------------------------------------------------------


def live(path: str) -> str:
    """Build two layers, stand an environment on one and then on both, enter it, and remove it and the second layer.

    From wherever it was interrupted it can be done again. The value says what is there in the end.
    """
    store = Store.open(path)
    build(store, BASE)
    environment, _ = store.ensure_environment("demo", {"template": "demo", "layers": [BASE]})
    with environment.lease(), _own():
        write(f"{environment.upper}/by-hand", "kept")
    build(store, TOP)
    environment, _ = store.ensure_environment("demo", {"template": "demo", "layers": [BASE, TOP]})
    with environment.lease(), _own():
        write(f"{environment.home}/.profile", "")
    store.remove("demo")
    if TOP in store.unused_layers():
        store.remove_layer(TOP)
    base = store.layer(BASE)
    assert base is not None
    names = [environment.name for environment in store.environments()]
    return f"{store.layers()} {names} {tree(base.root)}"


def build(store: Store, key: str) -> None:
    """Make the layer `key` where it is missing, as every build does."""
    if store.layer(key) is not None:
        return
    with store.lock(key):
        if store.layer(key) is not None:
            return
        store.collect()
        with store.staging() as staging:
            with _own():
                os.mkdir(f"{staging.root}/etc")
                write(f"{staging.root}/etc/name", key)
                os.symlink("etc/name", f"{staging.root}/name")
            store.commit(staging, key, {"recipe": {"label": key}, "tree": tree(staging.root)})


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


class OwnTrouble(DevnsError):
    """What `live` itself wrote failed, not the store."""


@contextmanager
def _own() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OwnTrouble(str(error)) from error


def told(path: str) -> int:
    """`live` for a process of its own, as an exit status: 0, or 3 where it ended with a sentence for the user."""
    try:
        live(path)
    except DevnsError:
        return 3
    return 0
