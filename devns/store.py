"""store: what lives on disk: layers and environments, who uses them, and how they come and go.

    version                                     of this layout
    layers/KEY/{root/,layer.json}               finished and never changed, named by the hash of what made it
    environments/NAME/{environment.json,home/}  what it was made for, and its private home
    environments/NAME/upper-HEX/{root/,work/}   what was written over one list of layers
    staging/RANDOM/                             being made while somebody holds its lock, left over otherwise
    trash/RANDOM/                               being deleted
    locks/NAME.lock                             for flock(2), and nothing else
    cache/                                      what can be fetched again

There is no index: the directories are the database. What gets a final name was finished in staging/, and what loses it
is in trash/ before the first file of it goes, each by one rename(2). So a kill between any two system calls leaves
nothing half made or half deleted under a final name.

Nothing that runs in an environment can change the directories above, so these are reached by path. What lies in root/
and home/ can be hostile: it is only ever deleted, and by descriptor.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from devns import durable
from devns.errors import DevnsError
from devns.trash import ForeignFiles as ForeignFiles
from devns.trash import delete_tree as delete_tree

VERSION = "1"

_PARTS = ("layers", "environments", "staging", "trash", "locks", "cache")
_ALPHANUMERIC = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_NAME = _ALPHANUMERIC | set("._-")
_HEX = frozenset("0123456789abcdef")
_OPEN = 0o755  # of a tree's own root: the mode of "/" in an environment
_CACHE = "store@cache"  # a lock: who makes layers shares it
_ASKING = "store@asking"  # a lock; see Store._asking
_OUR_TROUBLE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # and not that of a record that cannot be read
_LEAVE = "leave every shell and command in it first"


class InUse(DevnsError):
    """Somebody uses it at this moment, so it cannot go."""


def is_name(name: str) -> bool:
    """Fit for an environment: plain as a file name, on a command line and as a host name."""
    return 0 < len(name) <= 63 and name[0] in _ALPHANUMERIC and _NAME.issuperset(name)


def is_key(key: str) -> bool:
    """A sha256 in hex; or a label, a dash and at least half of one."""
    label, dash, digest = key.rpartition("-")
    if not _HEX.issuperset(digest):
        return False
    return is_name(label) and 32 <= len(digest) <= 64 if dash else len(digest) == 64


def upper_name(layers: Sequence[str]) -> str:
    """The directory beneath an environment's own that holds what is written over exactly these layers."""
    import hashlib  # it loads OpenSSL; who only enters an environment reads the name from its record

    return f"upper-{hashlib.sha256(chr(10).join(layers).encode()).hexdigest()[:12]}"


class Layer:
    """A finished directory tree: `root` is its path, `record` what its maker had to say of it."""

    __slots__ = ("key", "path", "record", "root")

    def __init__(self, key: str, path: str, record: dict[str, Any]) -> None:
        self.key = key
        self.path = path
        self.root = f"{path}/root"
        self.record = record


class Staging:
    """A layer being made: `root` is its tree, `path` the directory around that, for what is not part of it."""

    __slots__ = ("path", "root")

    def __init__(self, path: str) -> None:
        self.path = path
        self.root = f"{path}/root"


class Environment:
    """What is entered: a record, the layers it names (bottom first), an upper directory over them, and a home.

    Where the record cannot be read `broken` says why; `record` and `layers` are empty then, `upper` and `work` are "",
    and `Store.ensure_environment` and `Store.remove` both mend it.
    """

    __slots__ = ("_store", "broken", "home", "layers", "name", "path", "record", "upper", "work")

    def __init__(
        self,
        store: Store,
        name: str,
        saved: dict[str, Any] | None,
        broken: str | None = None,
        *,
        place: str | None = None,  # where it is being made
    ) -> None:
        self._store = store
        self.name = name
        self.path = place or f"{store.path}/environments/{name}"
        self.home = f"{self.path}/home"
        self.record: dict[str, Any] = saved["record"] if saved else {}
        self.layers: tuple[str, ...] = tuple(saved["record"]["layers"]) if saved else ()
        self.upper = f"{self.path}/{saved['upper']}/root" if saved else ""
        self.work = f"{self.path}/{saved['upper']}/work" if saved else ""
        self.broken = broken

    @contextmanager
    def lease(self, *, exclusive: bool = False) -> Iterator[None]:
        """Use it: while the lease is held neither the environment nor a layer of it goes.

        What was forked meanwhile holds the lease too, until it execs or ends. Raises DevnsError where something of it
        went since it was looked up. An exclusive lease is for changing it as a whole, and InUse where there is another.
        """
        store, lock = self._store, f"environment@{self.name}"
        held: list[int] = []
        try:
            if exclusive:
                with store._asking():
                    held.append(store._take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, f"{self.name}: in use", _LEAVE))
            else:
                held.append(store._take(lock, fcntl.LOCK_SH))
                held += [store._take(f"layer@{key}", fcntl.LOCK_SH) for key in self.layers]
                self._require()
            yield
        finally:
            for fd in held:
                os.close(fd)

    @contextmanager
    def turn(self, *, blocking: bool = True) -> Iterator[None]:
        """Be the only one who writes in it. Without `blocking` raises InUse where another does."""
        busy = f"{self.name}: another devns writes in it"
        operation = fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB)
        with self._store._held(f"turn@{self.name}", operation, busy, "try again"):
            yield

    @property
    def in_use(self) -> bool:
        """Does anyone hold a lease?"""
        with self._store._asking():
            return self._store._is_held(f"environment@{self.name}")

    def _require(self) -> None:
        if self.broken:
            raise DevnsError(f"{self.name}: {self.broken}", hint="try again")  # what prepares it mends it
        for path in (self.upper, *(f"{self._store.path}/layers/{key}/root" for key in self.layers)):
            if not os.path.isdir(path):
                raise DevnsError(f"{self.name}: {path} is gone", hint="try again")

    def _is_complete(self) -> bool:
        return not self.broken and all(map(os.path.isdir, (self.home, self.upper, self.work)))


class Store:
    """The store at `path`; made by `Store.open`. Where the file system fails, all of it raises DevnsError.

    A layer that one Store found or committed stays until this Store names it in an environment or is closed: nothing
    can come between `layer` or `commit` and `ensure_environment`.
    """

    __slots__ = ("_pins", "cache", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.cache = f"{path}/cache"
        self._pins: dict[str, int] = {}

    @classmethod
    def open(cls, path: str, *, create: bool = True) -> Store:
        """The store at `path`, which nobody but this user can reach; made where nothing is there.

        With `create=False` nothing is made, and a store that is not there reads as an empty one. Raises DevnsError
        for a path that belongs to someone else, is open to others, a symbolic link, full of other things, or a store
        of another version; Unsupported for a file system without locks.
        """
        store = cls(os.path.abspath(path))
        with durable.telling(store.path):
            try:
                status = os.lstat(store.path)
            except FileNotFoundError:
                if not create:
                    return store
                durable.make_private(store.path)
                status = os.lstat(store.path)
            _check_private(store.path, status)
            try:
                version = durable.read(f"{store.path}/version").decode("ascii", "replace").strip()
            except FileNotFoundError:
                version = VERSION
                if create:
                    store._begin()
            except OSError as error:
                raise durable.refused(f"{store.path}/version", error) from error
        if version != VERSION:
            said = f"{store.path}: a store of version {version[:20]!r}, and this devns knows {VERSION}"
            raise DevnsError(said, hint=durable.ELSEWHERE)
        return store

    def close(self) -> None:
        """Let go of the layers that no environment names."""
        while self._pins:
            os.close(self._pins.popitem()[1])

    def __del__(self) -> None:
        self.close()

    # --- layers -------------------------------------------------------------------------------------------------------

    def layer(self, key: str) -> Layer | None:
        """The finished layer `key`, or None. One whose record cannot be read counts as not there: it is made again."""
        path = f"{self.path}/layers/{_checked(key, is_key)}"
        if not os.path.isdir(path):
            return None
        with durable.telling(path):
            self._pin(key)
            layer = self._read_layer(key)
            if layer is None:
                self._unpin(key)
            return layer

    def layers(self) -> tuple[str, ...]:
        """The sorted keys of all layers, the damaged ones too."""
        return tuple(filter(is_key, self._list("layers")))

    @contextmanager
    def staging(self) -> Iterator[Staging]:
        """A place to make a layer in. What is not committed at the end is deleted. Meanwhile the cache stays."""
        with self._held(_CACHE, fcntl.LOCK_SH), self._scratch() as path:
            staging = Staging(path)
            with durable.telling(path):
                durable.make_directory(staging.root, _OPEN)
            yield staging

    def commit(self, staging: Staging, key: str, record: Mapping[str, Any]) -> Layer:
        """Write everything to disk, then give what was made its name, with `record` beside it.

        Where another process was faster its layer is returned, and ours is dropped.
        """
        final = f"{self.path}/layers/{_checked(key, is_key)}"
        with durable.telling(final):
            layer = self.layer(key)
            if layer is None:
                self._make_way(key)
                self._pin(key)  # before it can be seen, so that nobody finds it unused
                _write(f"{staging.path}/layer.json", dict(record))
                durable.sync_file_system(staging.path)
                if durable.rename_new(staging.path, final):
                    durable.sync(f"{self.path}/layers")
                layer = self.layer(key)
        if layer is None:
            raise DevnsError(f"{final}: went as soon as it was made", hint="try again")
        return layer

    def unused_layers(self) -> tuple[str, ...]:
        """The sorted keys of layers that no environment names, nothing runs over and no build holds."""
        with durable.telling(self.path):
            unnamed = set(self.layers()).difference(*(environment.layers for environment in self.environments()))
            if not unnamed:
                return ()
            with self._asking():
                return tuple(key for key in sorted(unnamed) if not self._is_held(f"layer@{key}"))

    def remove_layer(self, key: str) -> None:
        """Remove a layer that is unused; else raise InUse."""
        path = f"{self.path}/layers/{_checked(key, is_key)}"
        self._unpin(key)
        with self._removal(path, f"layer@{key}", DevnsError(f"{key}: no such layer"), f"{key}: in use"):
            for environment in self.environments():
                if key in environment.layers:
                    name = environment.name
                    raise InUse(f"{key}: in use by the environment {name}", hint=f"devns remove {name}")

    # --- environments -------------------------------------------------------------------------------------------------

    def environment(self, name: str) -> Environment | None:
        """The environment `name`, or None."""
        path = f"{self.path}/environments/{_checked(name, is_name)}"
        with durable.telling(path):
            try:
                return Environment(self, name, _checked_record(_load(f"{path}/environment.json")))
            except ValueError as error:
                why = str(error)
            except OSError as error:
                if not os.path.lexists(path):
                    return None
                if error.errno in _OUR_TROUBLE:
                    raise
                why = os.strerror(error.errno or 0).lower()
        return Environment(self, name, None, f"its record cannot be read: {why}")

    def environments(self) -> Iterator[Environment]:
        """All of them, sorted by name, the broken ones too."""
        for name in self._list("environments"):
            found = self.environment(name) if is_name(name) else Environment(self, name, None, "no name devns gives")
            if found is not None:
                yield found

    def ensure_environment(self, name: str, record: Mapping[str, Any]) -> tuple[Environment, bool]:
        """The environment `name` with this record, whose `layers` lists the keys of its layers; made where it is not.

        Over each list of layers it has an upper directory of its own. The second value is True where the list is
        another one than before and something was written over that: it is kept, and back when the list is.
        """
        wanted = json.loads(json.dumps(dict(record)))  # as it will be read again
        layers = wanted["layers"]
        saved = _checked_record({"upper": upper_name(layers), "record": wanted})
        before = self.environment(name)
        if before is not None and before.record == wanted and before._is_complete():
            self._unpin(*layers)
            return before, False
        with durable.telling(f"{self.path}/environments/{name}"):
            for key in layers:
                if self.layer(key) is None:
                    raise DevnsError(f"{name}: its layer {key} is not in the store", hint="try again")
            with self._held(f"environment@{name}", fcntl.LOCK_SH):  # so that it is not removed meanwhile
                before = self.environment(name)
                if before is None or not os.path.isdir(before.path):
                    self._create_environment(name, saved)
                self._update_environment(name, saved)
        self._unpin(*layers)
        made = Environment(self, name, saved)
        return made, before is not None and before.upper not in ("", made.upper) and _holds_something(before.upper)

    def remove(self, name: str) -> None:
        """Remove an environment with all that was written in it; its layers stay.

        Raises InUse while something runs in it. When it raises ForeignFiles the environment is gone, and what lies at
        the error's `path` is still to be deleted.
        """
        path = f"{self.path}/environments/{_checked(name, is_name)}"
        missing = DevnsError(f"{name}: no such environment", hint="devns list")
        with self._removal(path, f"environment@{name}", missing, f"{name}: in use"):
            pass

    @contextmanager
    def new_environment(self, name: str, record: Mapping[str, Any]) -> Iterator[Environment]:
        """Make the environment `name` of what the caller writes into its empty `upper` and `home`: all of it or none.

        Its layers must stay meanwhile: hold an environment that names them. Raises DevnsError where `name` is one.
        """
        final = f"{self.path}/environments/{_checked(name, is_name)}"
        taken = DevnsError(f"{name}: there is such an environment already", hint=f"devns remove {name}")
        with self._held(f"environment@{name}", fcntl.LOCK_SH), self._scratch() as path:
            with durable.telling(final):
                if os.path.lexists(final):
                    raise taken
                wanted = json.loads(json.dumps(dict(record)))
                saved = _checked_record({"upper": upper_name(wanted["layers"]), "record": wanted})
                os.mkdir(f"{path}/home", 0o700)
                _make_upper(f"{path}/{saved['upper']}")
            yield Environment(self, name, saved, place=path)
            with durable.telling(final):
                _write(f"{path}/environment.json", saved)
                durable.sync_file_system(path)
                if not durable.rename_new(path, final):
                    raise taken
                self._ready(name)
                durable.sync(f"{self.path}/environments")

    def reset(self, name: str, *, home: bool = False) -> None:
        """Empty what was written in an environment, over its layers and over those it had before; with `home` its home.

        Raises InUse while something runs in it, and ForeignFiles as `remove` does: the environment is empty then.
        """
        place = f"{self.path}/environments/{_checked(name, is_name)}"
        missing = DevnsError(f"{name}: no such environment", hint="devns list")
        with durable.telling(place):
            if not os.path.lexists(place):
                raise missing
            self._complete()
            with self._asking():
                held = self._take(f"environment@{name}", fcntl.LOCK_EX | fcntl.LOCK_NB, f"{name}: in use", _LEAVE)
            try:
                environment = self.environment(name)
                if environment is None:  # another process was faster
                    raise missing
                if environment.broken:
                    raise DevnsError(f"{name}: {environment.broken}", hint=f"devns remove {name}")
                trashed = self._empty(environment, home)
            finally:
                os.close(held)
            delete_tree(trashed)

    def _empty(self, environment: Environment, home: bool) -> str:
        """Exchange what was written for empty directories, each at once: there is no moment without them."""
        place, current = environment.path, os.path.basename(os.path.dirname(environment.upper))
        with self._scratch() as path:
            _make_upper(f"{path}/{current}")
            durable.exchange(f"{path}/{current}", f"{place}/{current}")
            for entry in os.listdir(place):
                if entry.startswith("upper-") and entry != current:
                    os.rename(f"{place}/{entry}", f"{path}/{entry}")
            if home:
                os.chmod(f"{place}/home", 0o700)  # to be moved a directory must be writable itself. rename(2)
                os.mkdir(f"{path}/home", 0o700)
                durable.exchange(f"{path}/home", f"{place}/home")
            durable.sync(place)
            return self._trash(path)

    # --- locks and leftovers ------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, name: str, *, shared: bool = False, blocking: bool = True) -> Iterator[None]:
        """Hold the lock `name`, a layer's key for example, against every other holder, in this process too.

        Without `blocking` raises InUse where it is held.
        """
        _checked(name, lambda text: is_key(text) or is_name(text))
        operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if blocking else fcntl.LOCK_NB)
        with self._held(name, operation, f"{name}: locked by another devns", "try again"):
            yield

    @contextmanager
    def clearing(self) -> Iterator[None]:
        """Nobody makes a layer meanwhile, so that what is in the cache can go. InUse where somebody does."""
        busy = f"{self.cache}: in use: a layer is being made"
        with self._held(_CACHE, fcntl.LOCK_EX | fcntl.LOCK_NB, busy, "try again when it is finished"):
            yield

    def leftovers(self) -> tuple[str, ...]:
        """What `collect` would delete: paths relative to the store's."""
        with durable.telling(self.path):
            made = self._list("staging")
            if made:
                with self._asking():
                    made = [name for name in made if not self._is_held(f"staging@{name}")]
                # Where nobody holds it any more, it may have been finished meanwhile.
                made = [name for name in made if os.path.lexists(f"{self.path}/staging/{name}")]
            return (*(f"staging/{name}" for name in made), *(f"trash/{name}" for name in self._list("trash")))

    def collect(self) -> tuple[str, ...]:
        """Delete what interrupted commands left over. Returns the paths that hold files of other user ids.

        Cheap where there is nothing. What cannot be deleted now is left for the next time.
        """
        for name in self._list("staging"):
            with suppress(DevnsError, OSError):
                self._complete()
                with self._held(f"staging@{name}", fcntl.LOCK_EX | fcntl.LOCK_NB):
                    self._trash(f"{self.path}/staging/{name}")
        foreign = []
        for name in self._list("trash"):
            with suppress(DevnsError, OSError):
                try:
                    delete_tree(f"{self.path}/trash/{name}")
                except ForeignFiles as error:
                    foreign.append(error.path)
        self._collect_locks()
        return tuple(foreign)

    def _collect_locks(self) -> None:
        """Delete the lock files of what is not there any more."""
        parts = {"environment": "environments", "turn": "environments", "staging": "staging"}
        for entry in self._list("locks"):
            lock = entry.removesuffix(".lock")
            kind, _, name = lock.rpartition("@")
            path = f"{self.path}/{parts.get(kind, 'layers')}/{name}"
            if lock == _ASKING or os.path.lexists(path):
                continue
            with suppress(DevnsError, OSError), self._held(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                if not os.path.lexists(path):
                    self._drop(lock)

    # --- making things ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Make a store of an empty directory, or of one where this was interrupted."""
        if not {*_PARTS, "version"}.issuperset(os.listdir(self.path)):
            raise DevnsError(f"{self.path}: holds other things than a store", hint=durable.ELSEWHERE)
        with self._scratch() as path:
            durable.write(f"{path}/version", f"{VERSION}\n".encode())
            os.rename(f"{path}/version", f"{self.path}/version")
            with self._asking():  # its file is there from now on: things can go where no space is left for a new one
                pass
        durable.sync(self.path)
        durable.sync(os.path.dirname(self.path))

    def _complete(self) -> None:
        """Make those of the store's own directories that are missing: who frees a disk by hand takes them along."""
        for part in _PARTS:
            if not os.path.isdir(f"{self.path}/{part}"):
                durable.make_private(f"{self.path}/{part}")

    @contextmanager
    def _scratch(self) -> Iterator[str]:
        """A fresh directory in staging/, deleted at the end unless it was renamed away."""
        name = os.urandom(8).hex()
        path, lock = f"{self.path}/staging/{name}", f"staging@{name}"
        with durable.telling(path):
            self._complete()
        with self._held(lock, fcntl.LOCK_EX):
            try:
                with durable.telling(path):
                    os.mkdir(path, 0o700)
                yield path
            finally:
                with suppress(DevnsError, OSError):  # what led here matters more, and collect() tries again
                    if os.path.lexists(path):
                        delete_tree(path)
                    self._drop(lock)

    def _create_environment(self, name: str, saved: dict[str, Any]) -> None:
        """Make it as a whole; nothing where another process was faster."""
        final = f"{self.path}/environments/{name}"
        with self._scratch() as path:
            os.mkdir(f"{path}/home", 0o700)
            _make_upper(f"{path}/{saved['upper']}")
            _write(f"{path}/environment.json", saved)
            durable.sync(path)
            if os.path.lexists(final) and not os.path.isdir(final):
                delete_tree(self._trash(final))
            durable.rename_new(path, final)
        self._ready(name)
        durable.sync(f"{self.path}/environments")

    def _update_environment(self, name: str, saved: dict[str, Any]) -> None:
        """Make what is missing or damaged, and the record last: it never names what is not there."""
        now = self.environment(name)
        if now is not None and now.record == saved["record"] and now._is_complete():
            return
        place = f"{self.path}/environments/{name}"
        upper = f"{place}/{saved['upper']}"
        with self._scratch() as path:
            self._as_directory(f"{place}/home")
            if not os.path.lexists(upper):
                _make_upper(f"{path}/upper")
                durable.rename_new(f"{path}/upper", upper)
            for directory in (upper, f"{upper}/root", f"{upper}/work"):
                self._as_directory(directory)
            _write(f"{path}/environment.json", saved)
            if os.path.isdir(f"{place}/environment.json"):
                delete_tree(self._trash(f"{place}/environment.json"))
            os.rename(f"{path}/environment.json", f"{place}/environment.json")
        durable.sync(place)

    def _as_directory(self, path: str) -> None:
        """Make a directory where somebody took it away; what is there instead goes."""
        if not os.path.isdir(path):
            if os.path.lexists(path):
                delete_tree(self._trash(path))
            durable.make_directory(path, _OPEN)

    def _make_way(self, key: str) -> None:
        """Remove what has the name of a layer but is damaged."""
        path = f"{self.path}/layers/{key}"
        if not os.path.lexists(path) or self._read_layer(key) is not None:
            return
        lock = f"layer@{key}"
        with self._asking(), self._held(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, f"{path}: damaged, and in use", _LEAVE):
            trashed = self._trash(path) if self._read_layer(key) is None else None
        if trashed:
            with suppress(DevnsError, OSError):  # collect() tries again; the layer in its place is worth more
                delete_tree(trashed)

    @contextmanager
    def _removal(self, path: str, lock: str, missing: DevnsError, busy: str) -> Iterator[None]:
        """Have `path` alone while it is decided whether it may go; then it goes."""
        with durable.telling(path):
            if not os.path.lexists(path):
                raise missing
            self._complete()
            with self._asking(), self._held(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, busy, _LEAVE):
                if not os.path.lexists(path):  # another process was faster
                    raise missing
                yield
                trashed = self._trash(path)
                self._drop(lock)
            delete_tree(trashed)

    def _trash(self, path: str) -> str:
        """Take away a name, for good before anything beneath it is deleted. The value is what to delete."""
        trashed = f"{self.path}/trash/{os.urandom(8).hex()}"
        os.rename(path, trashed)
        durable.sync(os.path.dirname(path))
        durable.sync(os.path.dirname(trashed))
        return trashed

    # --- reading ------------------------------------------------------------------------------------------------------

    def _list(self, part: str) -> list[str]:
        with durable.telling(f"{self.path}/{part}"):
            try:
                return sorted(os.listdir(f"{self.path}/{part}"))
            except FileNotFoundError:
                return []

    def _read_layer(self, key: str) -> Layer | None:
        path = f"{self.path}/layers/{key}"
        try:
            layer = Layer(key, path, _load(f"{path}/layer.json"))
        except ValueError:
            return None
        except OSError as error:
            if error.errno in _OUR_TROUBLE:
                raise
            return None
        return layer if os.path.isdir(layer.root) else None

    # --- locks --------------------------------------------------------------------------------------------------------

    def _lock(self, name: str) -> str:
        return f"{self.path}/locks/{name}.lock"

    def _take(self, name: str, operation: int, busy: str = "", hint: str | None = None) -> int:
        """A descriptor that holds a lock until it is closed. InUse(busy) for LOCK_NB where somebody else does."""
        path = self._lock(name)
        with durable.telling(path):
            try:
                try:
                    return durable.flock(path, operation)
                except FileNotFoundError:
                    durable.make_private(os.path.dirname(path))
                    return durable.flock(path, operation)
            except BlockingIOError:
                raise InUse(busy, hint=hint) from None

    @contextmanager
    def _held(self, name: str, operation: int, busy: str = "", hint: str | None = None) -> Iterator[None]:
        fd = self._take(name, operation, busy, hint)
        try:
            yield
        finally:
            os.close(fd)

    def _drop(self, lock: str) -> None:
        """Delete the file of a lock that is held exclusively. Where that fails collect() tries again."""
        with suppress(OSError):
            os.unlink(self._lock(lock))

    def _ready(self, name: str) -> None:
        """Make the lock of whose turn it is in an environment: it is entered where no space is left for a new file."""
        os.close(os.open(self._lock(f"turn@{name}"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Be the only one who asks whether something is in use.

        That is asked by taking its lock for a moment, and another who asks must not take that for a use.
        """
        with self._held(_ASKING, fcntl.LOCK_EX):
            yield

    def _is_held(self, lock: str) -> bool:
        if not os.path.lexists(self._lock(lock)):
            return False
        try:
            with self._held(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
        except InUse:
            return True

    def _pin(self, key: str) -> None:
        if key not in self._pins:
            self._pins[key] = self._take(f"layer@{key}", fcntl.LOCK_SH)

    def _unpin(self, *keys: str) -> None:
        for key in keys:
            if key in self._pins:
                os.close(self._pins.pop(key))


# --- helpers ----------------------------------------------------------------------------------------------------------


def _checked(text: str, fits: Callable[[str], bool]) -> str:
    if not fits(text):
        raise DevnsError(f"{text!a}: no name of anything in the store")
    return text


def _checked_record(saved: dict[str, Any]) -> dict[str, Any]:
    """`saved`, if it is what an environment.json holds; else ValueError."""
    record, upper = saved.get("record"), saved.get("upper")
    layers = record.get("layers") if isinstance(record, dict) else None
    if not isinstance(layers, list) or not all(isinstance(key, str) and is_key(key) for key in layers):
        raise ValueError("it names no layers")
    if not isinstance(upper, str) or upper[:6] != "upper-" or len(upper) != 18 or not _HEX.issuperset(upper[6:]):
        raise ValueError("it names no upper directory")
    return saved


def _check_private(path: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise DevnsError(f"{path}: a symbolic link, where the store itself must stand", hint=durable.ELSEWHERE)
    if not stat.S_ISDIR(status.st_mode):
        raise DevnsError(f"{path}: not a directory", hint=durable.ELSEWHERE)
    if status.st_uid != os.geteuid():
        said = f"{path}: belongs to the user id {status.st_uid}, and you are {os.geteuid()}"
        raise DevnsError(said, hint=durable.ELSEWHERE)
    if status.st_mode & 0o777 != 0o700:
        import shlex

        said = f"{path}: its mode is {status.st_mode & 0o777:04o}, and a store must be closed to others"
        raise DevnsError(said, hint=f"chmod 700 {shlex.quote(path)}")


def _write(path: str, value: dict[str, Any]) -> None:
    durable.write(path, json.dumps(value, indent=1).encode())


def _load(path: str) -> dict[str, Any]:
    """A JSON object; ValueError where the file holds anything else."""
    try:
        value = json.loads(durable.read(path))
    except RecursionError:
        raise ValueError("too deep") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _make_upper(path: str) -> None:
    os.mkdir(path, 0o700)
    durable.make_directory(f"{path}/root", _OPEN)
    os.mkdir(f"{path}/work", 0o700)
    durable.sync(path)


def _holds_something(directory: str) -> bool:
    try:
        with os.scandir(directory) as entries:
            return next(entries, None) is not None
    except FileNotFoundError:
        return False
    except OSError:  # not ours to read, so somebody wrote there
        return True
