"""The store: what it makes, what it refuses, who may remove what, and what many processes at once may do to it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devns import durable, linux
from devns.errors import DevnsError, Unsupported
from devns.store import Environment, ForeignFiles, InUse, Store, delete_tree, is_key, is_name, upper_name
from tests.store_checks import BASE, TOP, assert_store_sound, build, live, tree, write

_REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture
def path(tmp_path: Any) -> str:
    return f"{tmp_path}/store"


@pytest.fixture
def store(path: str) -> Store:
    return Store.open(path)


def ensure(store: Store, name: str, *layers: str) -> Environment:
    for key in layers:
        build(store, key)
    return store.ensure_environment(name, {"layers": list(layers)})[0]


def in_processes(count: int, function: Callable[[int], Any]) -> list[Any]:
    """What `function` returns (JSON) in so many forked processes at once; an exception there fails here."""
    ears: dict[int, int] = {}
    gate, key = os.pipe()
    for number in range(count):
        ear, mouth = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(key)
                os.read(gate, 1)  # all start when the last one is there
                said = json.dumps(["value", function(number)])
            except BaseException as error:
                said = json.dumps(["raised", f"{type(error).__name__}: {error}"])
            os.write(mouth, said.encode())
            os._exit(0)
        os.close(mouth)
        ears[pid] = ear
    os.close(gate)
    os.close(key)
    answers = []
    for pid, ear in ears.items():
        with open(ear) as file:
            answers.append(json.loads(file.read()))
        os.waitpid(pid, 0)
    assert [answer for answer in answers if answer[0] == "raised"] == []
    return [value for _, value in answers]


def held(function: Callable[[], Any]) -> tuple[int, int]:
    """A forked process that has entered the context of `function` and stays: its pid, and what ends it when closed."""
    ready, say = os.pipe()
    stay, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(end)
        with function():
            os.write(say, b".")
            os.read(stay, 1)
        os._exit(0)
    os.close(say)
    os.close(stay)
    assert os.read(ready, 1) == b"."
    os.close(ready)
    return pid, end


def released(pid: int, end: int) -> None:
    os.close(end)
    assert os.waitpid(pid, 0)[1] == 0


# --- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_L_01_L_05_all_of_a_store_is_closed_to_others_whatever_the_umask(path: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        live(path)
        Store.open(path).ensure_environment("demo", {"layers": [BASE]})
    finally:
        os.umask(before)
    modes = {entry: stat.S_IMODE(os.stat(f"{path}/{entry}").st_mode) for entry in os.listdir(path)}
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert {entry: mode for entry, mode in modes.items() if entry != "version"} == dict.fromkeys(
        ("layers", "environments", "staging", "trash", "locks", "cache"), 0o700
    )
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in os.scandir(f"{path}/locks")} == {0o600}
    assert stat.S_IMODE(os.stat(f"{path}/layers/{BASE}/root").st_mode) == 0o755  # "/" of the environment


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_the_directories_above_a_new_store_are_made_and_not_writable_by_others(tmp_path: Any, umask: int) -> None:
    before = os.umask(umask)
    try:
        Store.open(f"{tmp_path}/a/b/store")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(os.stat(f"{tmp_path}/{above}").st_mode) for above in ("a", "a/b")] == [0o755, 0o755]


def test_L_03_a_store_open_to_others_is_refused_with_the_command_that_mends_it(path: str) -> None:
    Store.open(path)
    os.chmod(path, 0o750)
    with pytest.raises(DevnsError, match="mode is 0750") as refused:
        Store.open(path)
    assert refused.value.hint == f"chmod 700 {path}"


def test_L_03_somebody_elses_store_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.open(path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(DevnsError, match=f"belongs to the user id {os.getuid()}"):
        Store.open(path)


@pytest.mark.parametrize("slash", ["", "/"])
def test_H_13_a_symbolic_link_is_no_store(path: str, tmp_path: Any, slash: str) -> None:
    Store.open(path)
    os.symlink(path, f"{tmp_path}/link")
    with pytest.raises(DevnsError, match="symbolic link"):
        Store.open(f"{tmp_path}/link{slash}")


def test_a_file_is_no_store(path: str) -> None:
    write(path, "")
    with pytest.raises(DevnsError, match="not a directory"):
        Store.open(path)


def test_a_directory_with_other_things_is_refused_and_left_as_it_is(path: str) -> None:
    os.mkdir(path, 0o700)
    write(f"{path}/thesis.txt", "")
    with pytest.raises(DevnsError, match="holds other things"):
        Store.open(path)
    assert os.listdir(path) == ["thesis.txt"]


def test_an_empty_private_directory_becomes_a_store(path: str) -> None:
    os.mkdir(path, 0o700)
    live(path)
    assert_store_sound(path)


@pytest.mark.parametrize("version", ["2\n", "", "1.0", "\0", "\xff"])
def test_X_31_a_store_of_another_version_is_refused(path: str, version: str) -> None:
    Store.open(path)
    write(f"{path}/version", version)
    with pytest.raises(DevnsError, match="this devns knows 1"):
        Store.open(path)


def test_a_store_that_is_not_there_reads_as_empty_and_is_not_made(path: str) -> None:
    store = Store.open(path, create=False)
    assert (store.layer(BASE), store.environment("demo"), [*store.environments()], store.layers()) == (
        None,
        None,
        [],
        (),
    )
    assert (store.unused_layers(), store.collect()) == ((), ())
    with pytest.raises(DevnsError, match="no such environment"):
        store.remove("demo")
    assert not os.path.lexists(path)


@pytest.mark.parametrize(
    "name", [" ", ",", ":", "lo,w:er=x", "\\", "a\nb", "'\"$(id)", "é", os.fsdecode(b"\xff\xfe"), "x" * 200, "-rf"]
)
def test_C_13_H_16_any_path_can_hold_a_store(tmp_path: Any, name: str) -> None:
    path = f"{tmp_path}/{name}/{name}"
    assert live(path) == live(path)
    assert_store_sound(path, again=partial(live, path))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_X_17_a_file_system_without_locks_is_refused(path: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(Unsupported, match="cannot hold a store") as refused:
        Store.open(path)
    assert "DEVNS_STORE" in str(refused.value.hint)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_X_17_a_file_system_whose_rename_has_no_flags_will_do(
    path: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def renameat2(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(linux, "renameat2", renameat2)
    assert_store_sound(path, again=partial(live, path)) if os.path.isdir(path) else live(path)
    store = Store.open(path)
    with store.staging() as staging:
        os.mkdir(f"{staging.path}/more")
        assert durable.rename_new(staging.path, f"{path}/layers/{BASE}") is False
    assert_store_sound(path, again=partial(live, path))


@pytest.mark.parametrize("part", ["layers", "environments", "staging", "trash", "locks", "cache"])
def test_a_directory_of_the_store_that_was_deleted_by_hand_comes_back(path: str, part: str) -> None:
    live(path)
    delete_tree(f"{path}/{part}")
    assert_store_sound(path, again=partial(live, path))


def test_loading_the_store_loads_nothing_heavy() -> None:
    heavy = "dataclasses pathlib shutil tempfile hashlib subprocess random uuid datetime logging inspect".split()
    code = f"import sys; sys.path.insert(0, {_REPOSITORY!r}); import devns.store; print({heavy} & sys.modules.keys())"
    code = code.replace(f"{heavy}", f"set({heavy})")
    assert subprocess.check_output([sys.executable, "-I", "-S", "-c", code], text=True) == "set()\n"


# --- names ------------------------------------------------------------------------------------------------------------

_BAD_NAMES = ["", ".", "..", "../x", "a/b", "/etc", "-rf", ".hidden", "A", "é", "a b", "a\n", "x" * 64, "\u0430", "a\0"]


@pytest.mark.parametrize("name", _BAD_NAMES)
def test_C_17_a_name_that_could_be_a_path_or_an_option_reaches_no_file(store: Store, name: str) -> None:
    before = sorted(os.listdir(store.path))
    calls: list[Callable[[], object]] = [
        lambda: store.environment(name),
        lambda: store.ensure_environment(name, {"layers": []}),
        lambda: store.remove(name),
        lambda: store.layer(name),
        lambda: store.remove_layer(name),
        lambda: store.lock(name).__enter__(),
    ]
    for call in calls:
        with pytest.raises(DevnsError, match="no name of anything"):
            call()
    assert sorted(os.listdir(store.path)) == before


@given(st.text())
def test_C_17_what_counts_as_a_name_or_a_key_is_one_plain_component_of_a_path(text: str) -> None:
    if is_name(text) or is_key(text):
        assert text.isascii()
        assert os.path.basename(text) == text
        assert text[0] not in ".-"
        assert len(text) <= 128


@pytest.mark.parametrize(
    ("key", "fits"),
    [
        ("0" * 64, True),
        ("bookworm-" + "0" * 32, True),
        ("py3.11-extra-" + "a" * 64, True),
        ("0" * 63, False),
        ("bookworm-" + "0" * 31, False),
        ("bookworm-" + "0" * 65, False),
        ("bookworm-" + "A" * 32, False),
        ("-" + "0" * 32, False),
        ("../x-" + "0" * 32, False),
    ],
)
def test_a_key_is_a_hash_with_or_without_a_label(key: str, fits: bool) -> None:
    assert is_key(key) is fits


# --- layers -----------------------------------------------------------------------------------------------------------


def test_a_layer_is_there_when_it_was_committed_and_not_before(store: Store) -> None:
    with store.staging() as staging:
        write(f"{staging.root}/file", "text")
        assert store.layer(BASE) is None
        layer = store.commit(staging, BASE, {"size": 4})
    assert (layer.key, layer.root, layer.record) == (BASE, f"{store.path}/layers/{BASE}/root", {"size": 4})
    found = Store.open(store.path).layer(BASE)
    assert found is not None
    assert (found.record, os.listdir(found.root)) == ({"size": 4}, ["file"])


def test_what_was_not_committed_is_gone_however_it_ended(store: Store) -> None:
    with suppress(ZeroDivisionError), store.staging() as staging:
        os.makedirs(f"{staging.root}/closed/deep")
        os.chmod(f"{staging.root}/closed", 0o000)
        raise ZeroDivisionError
    assert (os.listdir(f"{store.path}/staging"), os.listdir(f"{store.path}/trash")) == ([], [])
    assert_store_sound(store.path)


def test_who_loses_the_race_is_given_the_winners_layer(store: Store) -> None:
    with store.staging() as ours, Store.open(store.path).staging() as theirs:
        write(f"{theirs.root}/theirs", "")
        store.commit(theirs, BASE, {"by": "them"})
        layer = store.commit(ours, BASE, {"by": "us"})
    assert (layer.record, os.listdir(layer.root)) == ({"by": "them"}, ["theirs"])
    assert_store_sound(store.path)


def test_X_07_eight_processes_that_commit_one_key_all_get_the_same_layer(path: str) -> None:
    def commit(number: int) -> Any:
        store = Store.open(path)
        with store.staging() as staging:
            write(f"{staging.root}/number", str(number))
            layer = store.commit(staging, BASE, {"by": number})
        with open(f"{layer.root}/number") as file:
            return [layer.record["by"], int(file.read())]

    answers = in_processes(8, commit)
    assert len({tuple(answer) for answer in answers}) == 1
    assert answers[0][0] == answers[0][1]
    assert_store_sound(path, again=partial(live, path))


def test_X_07_of_eight_processes_that_need_one_layer_one_builds_it(path: str) -> None:
    Store.open(path)

    def need(number: int) -> int:
        store = Store.open(path)
        with store.lock(BASE):
            if store.layer(BASE) is not None:
                return 0
            with store.staging() as staging:
                store.commit(staging, BASE, {})
        return 1

    assert sum(in_processes(8, need)) == 1


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000, None])
def test_X_27_a_layer_whose_record_is_damaged_counts_as_not_there_and_is_made_again(
    store: Store, damage: bytes | None
) -> None:
    ensure(store, "demo", BASE)
    ensure(store, "other", TOP)
    record = f"{store.path}/layers/{BASE}/layer.json"
    os.unlink(record)
    if damage is not None:
        with open(record, "wb") as file:
            file.write(damage)
    assert store.layer(BASE) is None
    with ensure(store, "other", TOP).lease(), ensure(store, "demo", BASE).lease():
        assert store.layer(BASE) is not None
    assert_store_sound(store.path, again=partial(live, store.path))


def test_X_27_a_damaged_layer_stays_while_something_runs_over_it(store: Store) -> None:
    environment = ensure(store, "demo", BASE)
    with environment.lease():
        os.unlink(f"{store.path}/layers/{BASE}/layer.json")
        with pytest.raises(InUse):
            build(store, BASE)
        assert os.path.isdir(f"{store.path}/layers/{BASE}/root")
    build(store, BASE)
    assert_store_sound(store.path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_X_04_what_did_not_reach_the_disk_gets_no_name(
    store: Store, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def syncfs(fd: int) -> None:
        asked.append(fd)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(linux, "syncfs", syncfs)
    with pytest.raises(DevnsError, match=os.strerror(number).lower()):
        build(store, BASE)
    assert len(asked) == 1  # the kernel says it once, and forgets what was lost
    assert (store.layers(), os.listdir(f"{store.path}/staging")) == ((), [])


def test_a_layer_that_was_found_stays_until_it_is_named_or_given_up(store: Store) -> None:
    build(store, BASE)
    store.close()
    other = Store.open(store.path)
    assert store.unused_layers() == (BASE,)
    assert other.layer(BASE) is not None
    assert store.unused_layers() == ()
    with pytest.raises(InUse):
        store.remove_layer(BASE)
    other.ensure_environment("demo", {"layers": [BASE]})
    with pytest.raises(InUse, match="by the environment demo"):
        store.remove_layer(BASE)
    store.remove("demo")
    assert store.unused_layers() == (BASE,)
    store.remove_layer(BASE)
    assert store.layers() == ()
    assert_store_sound(store.path)


def test_a_layer_is_held_from_the_moment_it_can_be_seen(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rename_new = durable.rename_new
    unused = []

    def watched(old: str, new: str) -> bool:
        done = rename_new(old, new)
        unused.append(Store.open(store.path).unused_layers())
        return done

    monkeypatch.setattr(durable, "rename_new", watched)
    build(store, BASE)
    assert unused == [()]


def test_a_layer_is_given_up_when_an_environment_names_it_already(store: Store) -> None:
    ensure(store, "demo", BASE)
    ensure(store, "demo", BASE)
    other = Store.open(store.path)
    other.remove("demo")
    assert other.unused_layers() == (BASE,)


def test_a_layer_below_a_running_environment_stays_when_the_environment_moves_on(store: Store) -> None:
    before = ensure(store, "demo", BASE)
    with before.lease():
        ensure(store, "demo", TOP)
        assert store.unused_layers() == ()
        with pytest.raises(InUse):
            store.remove_layer(BASE)
    assert store.unused_layers() == (BASE,)


def test_an_environment_is_not_made_over_a_layer_that_is_not_there(store: Store) -> None:
    with pytest.raises(DevnsError, match="not in the store"):
        store.ensure_environment("demo", {"layers": [BASE]})
    assert store.environment("demo") is None


# --- staging, locks and leftovers -------------------------------------------------------------------------------------


def test_X_10_what_a_killed_build_left_is_collected_and_what_a_living_one_makes_is_not(store: Store) -> None:
    pid, end = held(store.staging)
    (living,) = os.listdir(f"{store.path}/staging")
    build(store, TOP)  # collects
    assert os.listdir(f"{store.path}/staging") == [living]
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    os.close(end)
    assert store.collect() == ()
    assert_store_sound(store.path)
    assert [name for name in os.listdir(f"{store.path}/locks") if living in name] == []


def test_collecting_deletes_the_locks_of_what_is_not_there_and_no_others(store: Store) -> None:
    ensure(store, "demo", BASE)
    with store.lock("0" * 64):
        pass
    with store.lock("1" * 64):
        store.collect()
        kept = {BASE, f"layer@{BASE}", "environment@demo", "turn@demo", "store@asking", "1" * 64}
        assert set(os.listdir(f"{store.path}/locks")) == {f"{name}.lock" for name in kept}


def test_a_lock_keeps_others_out_and_shared_ones_let_each_other_in(store: Store) -> None:
    with store.lock(BASE, shared=True), store.lock(BASE, shared=True):
        assert_locked(store, shared=False)
    with store.lock(BASE), store.lock(TOP):
        assert_locked(store, shared=True)


def assert_locked(store: Store, *, shared: bool) -> None:
    with pytest.raises(InUse), store.lock(BASE, shared=shared, blocking=False):
        pass


def test_who_waits_for_a_lock_that_is_deleted_meanwhile_gets_the_new_one(path: str) -> None:
    Store.open(path)
    lock = f"{path}/locks/{BASE}.lock"

    @contextmanager
    def deleting() -> Iterator[None]:
        fd = durable.flock(lock, fcntl.LOCK_EX)
        yield
        time.sleep(0.1)  # long enough for the others to wait
        os.unlink(lock)
        os.close(fd)

    def wait(number: int) -> bool:
        fd = durable.flock(lock, fcntl.LOCK_EX)
        return os.path.samestat(os.fstat(fd), os.stat(lock))

    pid, end = held(deleting)
    os.close(end)
    assert in_processes(2, wait) == [True, True]
    assert os.waitpid(pid, 0)[1] == 0


# --- environments -----------------------------------------------------------------------------------------------------


def test_an_environment_has_a_record_its_layers_a_home_and_an_upper_directory(store: Store) -> None:
    build(store, BASE)
    record = {"template": "demo", "project": "/a\udcffb", "layers": [BASE]}
    made, left = store.ensure_environment("demo", record)
    found = store.environment("demo")
    assert found is not None
    assert (left, found.record, found.layers, found.broken) == (False, record, (BASE,), None)
    place = f"{store.path}/environments/demo"
    upper = f"{place}/{upper_name([BASE])}"
    assert (made.path, found.path) == (place, place)
    assert (found.home, found.upper, found.work) == (f"{place}/home", f"{upper}/root", f"{upper}/work")
    assert [environment.name for environment in store.environments()] == ["demo"]
    assert_store_sound(store.path)


def test_an_environment_that_is_there_already_is_not_written_again(store: Store) -> None:
    ensure(store, "demo", BASE)
    before = os.stat(f"{store.path}/environments/demo/environment.json")
    again, left = store.ensure_environment("demo", {"layers": [BASE]})
    after = os.stat(f"{store.path}/environments/demo/environment.json")
    assert (left, after.st_ino, again.layers) == (False, before.st_ino, (BASE,))


def test_other_layers_mean_another_upper_directory_and_the_old_one_is_kept_and_told(store: Store) -> None:
    old = ensure(store, "demo", BASE)
    write(f"{old.upper}/by-hand", "")
    write(f"{old.home}/.profile", "")
    build(store, TOP)
    new, left = store.ensure_environment("demo", {"layers": [BASE, TOP]})
    assert left
    assert (new.upper != old.upper, os.listdir(new.upper), os.listdir(new.home)) == (True, [], [".profile"])
    back, left = store.ensure_environment("demo", {"layers": [BASE]})
    assert (left, back.upper, os.listdir(back.upper)) == (False, old.upper, ["by-hand"])


def test_a_changed_record_over_the_same_layers_keeps_what_was_written(store: Store) -> None:
    old = ensure(store, "demo", BASE)
    write(f"{old.upper}/by-hand", "")
    new, left = store.ensure_environment("demo", {"layers": [BASE], "template": "other"})
    assert (left, new.record["template"], os.listdir(new.upper)) == (False, "other", ["by-hand"])


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b"{}",
        b'{"upper": "upper-000000000000", "record": {}}',
        b'{"upper": "upper-000000000000", "record": {"layers": "text"}}',
        b'{"upper": "upper-000000000000", "record": {"layers": ["../../x"]}}',
        b'{"upper": "upper-000000000000", "record": {"layers": [1]}}',
        b'{"upper": "../../../etc", "record": {"layers": []}}',
        b'{"upper": 1, "record": {"layers": []}}',
        "missing",
        "directory",
        "fifo",
        "link",
    ],
    ids=str,
)
def test_X_27_a_damaged_record_is_reported_and_mended_and_harms_no_other(store: Store, damage: bytes | str) -> None:
    environment = ensure(store, "demo", BASE)
    write(f"{environment.upper}/by-hand", "")
    ensure(store, "other", TOP)
    record = f"{environment.path}/environment.json"
    os.unlink(record)
    if isinstance(damage, bytes):
        with open(record, "wb") as file:
            file.write(damage)
    elif damage == "directory":
        os.makedirs(f"{record}/deep")
    elif damage == "fifo":
        os.mkfifo(record)
    elif damage == "link":
        os.symlink(f"{store.path}/environments/other/environment.json", record)
    names = [(found.name, found.broken is None) for found in store.environments()]
    assert names == [("demo", False), ("other", True)]
    broken = store.environment("demo")
    assert broken is not None
    assert (broken.layers, broken.record, broken.upper) == ((), {}, "")
    with pytest.raises(DevnsError, match="record cannot be read"), broken.lease():
        pass
    assert os.listdir(ensure(store, "demo", BASE).upper) == ["by-hand"]
    assert_store_sound(store.path)


def test_X_27_a_broken_environment_can_be_removed(store: Store) -> None:
    os.makedirs(f"{store.path}/environments/demo/deep")
    write(f"{store.path}/environments/file", "")
    store.remove("demo")
    store.remove("file")
    assert_store_sound(store.path)


def test_X_27_a_file_in_the_place_of_an_environment_makes_way_for_it(store: Store) -> None:
    write(f"{store.path}/environments/demo", "")
    ensure(store, "demo", BASE)
    assert_store_sound(store.path)


@pytest.mark.parametrize("gone", ["home", "upper", "work"])
def test_X_27_what_was_deleted_of_an_environment_by_hand_comes_back(store: Store, gone: str) -> None:
    environment = ensure(store, "demo", BASE)
    os.rmdir(getattr(environment, gone))
    ensure(store, "demo", BASE)
    assert os.path.isdir(getattr(environment, gone))


def test_eight_processes_that_make_one_environment_all_get_it(path: str) -> None:
    store = Store.open(path)
    for key in (BASE, TOP):
        build(store, key)

    def make(number: int) -> list[str]:
        environment = ensure(Store.open(path), "demo", *([BASE], [BASE, TOP])[number % 2])
        with environment.lease():
            return [environment.upper, str(os.path.isdir(environment.work))]

    answers = in_processes(8, make)
    assert {tuple(answer) for answer in answers} == {
        (f"{path}/environments/demo/{upper_name(layers)}/root", "True") for layers in ([BASE], [BASE, TOP])
    }
    assert_store_sound(path)


# --- leases and removal -----------------------------------------------------------------------------------------------


def test_an_environment_in_use_is_not_removed_and_says_so(store: Store) -> None:
    environment = ensure(store, "demo", BASE)
    with environment.lease(), environment.lease():
        assert environment.in_use
        with pytest.raises(InUse, match="demo: in use"):
            store.remove("demo")
        with pytest.raises(InUse, match="demo: in use"), environment.lease(exclusive=True):
            pass
    assert not environment.in_use
    with environment.lease(exclusive=True), pytest.raises(InUse):
        store.remove("demo")
    store.remove("demo")
    assert store.environment("demo") is None


def test_an_environment_is_not_removed_while_it_is_changed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure(store, "demo", BASE)
    write_record = durable.write
    refused = []

    def watched(path: str, data: bytes) -> None:
        write_record(path, data)
        with pytest.raises(InUse):
            Store.open(store.path).remove("demo")
        refused.append(path)

    monkeypatch.setattr(durable, "write", watched)
    store.ensure_environment("demo", {"layers": [BASE], "template": "other"})
    assert len(refused) == 1


def test_X_10_somebody_who_asks_whether_it_is_in_use_does_not_count_as_a_use(store: Store) -> None:
    ensure(store, "demo", BASE)

    @contextmanager
    def asking() -> Iterator[None]:
        with store._asking(), store._held("environment@demo", fcntl.LOCK_EX):
            yield
            time.sleep(0.1)  # long enough for the removal to come

    pid, end = held(asking)
    os.close(end)
    store.remove("demo")
    assert os.waitpid(pid, 0)[1] == 0


def test_a_lease_is_not_inherited_by_programs_and_is_kept_by_forked_processes(store: Store) -> None:
    environment = ensure(store, "demo", BASE)
    with environment.lease():
        fds = [int(fd) for fd in os.listdir("/proc/self/fd")]
        locks = [fd for fd in fds if _target(fd).startswith(f"{store.path}/locks/")]
        assert len(locks) == 2
        assert [os.get_inheritable(fd) for fd in locks] == [False, False]
        pid, end = held(ExitStack)
    assert environment.in_use
    released(pid, end)
    assert not environment.in_use


def _target(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


def test_X_09_what_went_between_looking_and_leasing_is_noticed(store: Store) -> None:
    environment = ensure(store, "demo", BASE)
    store.remove("demo")
    with pytest.raises(DevnsError, match="is gone"), environment.lease():
        pass
    environment = ensure(store, "demo", BASE)
    ensure(store, "demo", TOP)
    store.remove_layer(BASE)
    with pytest.raises(DevnsError, match="is gone"), environment.lease():
        pass
    assert_store_sound(store.path)


def test_removing_an_environment_takes_its_home_and_leaves_its_layers(store: Store) -> None:
    environment = ensure(store, "demo", BASE)
    write(f"{environment.home}/file", "")
    store.remove("demo")
    assert (os.path.lexists(environment.path), store.layers()) == (False, (BASE,))
    with pytest.raises(DevnsError, match="no such environment"):
        store.remove("demo")
    assert_store_sound(store.path)
    assert [name for name in os.listdir(f"{store.path}/locks") if "demo" in name] == []


def test_X_30_what_is_of_another_user_id_is_taken_away_and_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = ensure(store, "demo", BASE)
    os.mkdir(f"{environment.upper}/theirs")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *path, dir_fd: _refuse())
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(ForeignFiles) as left:
            store.remove("demo")
        assert store.environment("demo") is None
        assert store.collect() == (left.value.path,)
    assert os.path.dirname(left.value.path) == f"{store.path}/trash"
    delete_tree(left.value.path)
    assert_store_sound(store.path)


def _refuse() -> None:
    raise PermissionError(errno.EACCES, "")


@contextmanager
def but_for(*sentences: str) -> Iterator[None]:
    """Passes over a DevnsError that says one of these."""
    try:
        yield
    except DevnsError as error:
        if not any(sentence in str(error) for sentence in sentences):
            raise


def test_X_07_X_09_builds_leases_and_removals_at_once_never_fail_and_never_build_twice_what_is_held(path: str) -> None:
    Store.open(path)
    until = time.monotonic() + 2

    def use(number: int) -> int:
        rounds = 0
        while time.monotonic() < until:
            name = f"env{number % 2}"
            environment = ensure(Store.open(path), name, BASE, *([TOP] if number % 3 else []))
            # "is gone": the other user of this name changed it, and what it stood on was removed
            with but_for("is gone"), environment.lease():
                assert all(os.listdir(f"{path}/layers/{key}/root") for key in environment.layers)
                rounds += 1
        return rounds

    def clean(number: int) -> int:
        rounds = 0
        while time.monotonic() < until:
            store = Store.open(path)
            for key in store.unused_layers():
                with but_for("in use", "no such layer"):
                    store.remove_layer(key)
            store.collect()
            rounds += 1
        return rounds

    assert all(in_processes(6, lambda number: clean(number) if number > 3 else use(number)))
    assert_store_sound(path, again=partial(live, path))


# --- deleting ---------------------------------------------------------------------------------------------------------


def test_deleting_what_is_not_there_is_no_error(tmp_path: Any) -> None:
    delete_tree(f"{tmp_path}/nothing")
    delete_tree(f"{tmp_path}/nothing/below")


def test_X_11_deleting_follows_no_symbolic_link(tmp_path: Any) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text("alive")
    root = tmp_path / "tree"
    (root / "deep").mkdir(parents=True)
    for place in (root, root / "deep"):
        (place / "absolute").symlink_to(canary)
        (place / "relative").symlink_to("../../canary")
        (place / "file").symlink_to(canary / "file")
        (place / "loop").symlink_to("loop")
        (place / "up").symlink_to("..")
    (tmp_path / "link").symlink_to(canary)
    delete_tree(str(root))
    delete_tree(str(tmp_path / "link"))
    assert os.listdir(tmp_path) == ["canary"]
    assert (canary / "file").read_text() == "alive"


def test_X_11_a_directory_that_turns_into_a_symbolic_link_meanwhile_leads_nowhere(tmp_path: Any) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text("alive")
    root = f"{tmp_path}/tree"
    until = time.monotonic() + 1

    def swap(number: int) -> int:
        while time.monotonic() < until:
            with suppress(OSError):
                os.makedirs(f"{root}/a/b")
            with suppress(OSError):
                os.symlink(canary, f"{root}/link")
            with suppress(OSError):
                linux.renameat2(linux.AT_FDCWD, f"{root}/a", linux.AT_FDCWD, f"{root}/link", linux.RENAME_EXCHANGE)
        return 0

    def delete(number: int) -> int:
        deleted = 0
        while time.monotonic() < until:
            try:
                delete_tree(root)
                deleted += 1
            except OSError as error:  # it was moved, or filled again and again
                if error.errno not in (errno.ESTALE, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
        return deleted

    in_processes(2, lambda number: (swap, delete)[number](number))
    assert (canary / "file").read_text() == "alive"


def test_X_11_a_directory_that_is_moved_out_meanwhile_leads_nowhere(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.makedirs(f"{tmp_path}/tree/a/b/c")
    os.makedirs(f"{tmp_path}/elsewhere/a")
    opened = os.open

    def moving(path: str, flags: int, *mode: int, dir_fd: int | None = None) -> int:
        if path == ".." and os.path.lexists(f"{tmp_path}/tree/a"):
            os.rename(f"{tmp_path}/tree/a", f"{tmp_path}/elsewhere/moved")
        return opened(path, flags, *mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", moving)
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        delete_tree(f"{tmp_path}/tree")
    assert sorted(os.listdir(f"{tmp_path}/elsewhere")) == ["a", "moved"]


def test_X_30_modes_that_keep_out_their_owner_are_no_obstacle(tmp_path: Any) -> None:
    root = tmp_path / "tree"
    (root / "a/b/c").mkdir(parents=True)
    (root / "a/b/c/file").write_text("")
    for path, mode in (("a/b/c/file", 0), ("a/b/c", 0o000), ("a/b", 0o400), ("a", 0o500), ("", 0o000)):
        os.chmod(root / path, mode)
    delete_tree(str(root))
    assert os.listdir(tmp_path) == []


def test_X_14_X_29_any_depth_is_deleted_with_few_descriptors(tmp_path: Any) -> None:
    def delete(number: int) -> list[str]:
        os.chdir(tmp_path)
        os.mkdir("tree")
        os.chdir("tree")
        for _ in range(1100):  # more than Python's recursion goes
            os.mkdir("d")
            os.chdir("d")
        os.mkdir("e")
        os.chdir(tmp_path)
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        delete_tree(f"{tmp_path}/tree")
        return os.listdir(tmp_path)

    assert in_processes(1, delete) == [[]]


def test_X_10_two_processes_can_delete_one_tree(tmp_path: Any) -> None:
    for number in range(200):
        os.makedirs(f"{tmp_path}/tree/{number % 20}/{number}/deep")
        write(f"{tmp_path}/tree/{number % 20}/{number}/file", "")
    in_processes(3, lambda number: delete_tree(f"{tmp_path}/tree"))
    assert os.listdir(tmp_path) == []


def test_X_11_another_mount_is_not_entered(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    os.makedirs(f"{tmp_path}/tree/mounted")
    write(f"{tmp_path}/tree/mounted/file", "alive")
    mounted = os.stat(f"{tmp_path}/tree/mounted").st_ino
    monkeypatch.setattr(linux, "mount_id", lambda fd: 2 if os.fstat(fd).st_ino == mounted else 1)
    with pytest.raises(DevnsError, match="mounted on mounted"):
        delete_tree(f"{tmp_path}/tree")
    assert os.path.exists(f"{tmp_path}/tree/mounted/file")


def test_E_05_deleting_works_where_importing_is_over(tmp_path: Any) -> None:
    os.makedirs(f"{tmp_path}/tree/a/b")
    os.chmod(f"{tmp_path}/tree/a/b", 0)
    os.mkdir(f"{tmp_path}/tree/theirs")
    write(f"{tmp_path}/tree/file", "")
    code = f"""if True:
        import sys
        sys.path.insert(0, {_REPOSITORY!r})
        from devns.store import delete_tree
        before = set(sys.modules)
        sys.path.clear(), sys.meta_path.clear(), sys.path_hooks.clear()
        delete_tree({str(tmp_path / "tree")!r})
        delete_tree("/nothing/there")
        assert set(sys.modules) == before
    """
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
    assert os.listdir(tmp_path) == []


# --- the checks themselves --------------------------------------------------------------------------------------------


def _spoil_layer(path: str) -> None:
    write(f"{path}/layers/{BASE}/root/etc/name", "other bytes")


def _spoil_record(path: str) -> None:
    write(f"{path}/environments/demo/environment.json", "")


def _spoil_upper(path: str) -> None:
    os.mkdir(f"{path}/environments/demo/upper-{'0' * 12}")


def _spoil_staging(path: str) -> None:
    os.mkdir(f"{path}/layers/{TOP}")


def _spoil_lock(path: str) -> None:
    write(f"{path}/locks/layer@{BASE}.lock", "text")


@pytest.fixture(params=[_spoil_layer, _spoil_record, _spoil_upper, _spoil_staging, _spoil_lock])
def spoiled(request: pytest.FixtureRequest, path: str) -> str:
    ensure(Store.open(path), "demo", BASE)
    assert_store_sound(path)
    request.param(path)
    return path


def test_a_store_that_is_not_sound_is_found_out(spoiled: str) -> None:
    with pytest.raises(AssertionError):
        assert_store_sound(spoiled)


def test_a_hash_over_a_tree_sees_bytes_modes_and_names(tmp_path: Any) -> None:
    def hash_of(name: str, text: str, mode: int) -> str:
        write(f"{tmp_path}/{name}", text)
        os.chmod(f"{tmp_path}/{name}", mode)
        try:
            return tree(str(tmp_path))
        finally:
            os.unlink(f"{tmp_path}/{name}")

    assert hash_of("a", "x", 0o600) == hash_of("a", "x", 0o600)
    assert (
        len({hash_of("a", "x", 0o600), hash_of("b", "x", 0o600), hash_of("a", "y", 0o600), hash_of("a", "x", 0o700)})
        == 4
    )
