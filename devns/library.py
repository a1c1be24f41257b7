"""library: environments for programs. Everything a verb does is a call here; `run` returns as subprocess.run does."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import IO, Any, Literal, TypeVar

from devns import plugins, spaces, store, trees, workflow
from devns.host import Host
from devns.launch import Plan, started
from devns.progress import Progress, Silent
from devns.spec import is_identity, is_variable
from devns.workflow import Bench, Options

Value = TypeVar("Value")


def open(
    name: str | None = None,
    *,
    directory: str | os.PathLike[str] | None = None,
    root: bool = False,
    user: str | None = None,
    map: Literal["auto", "single", "range"] | None = None,
    progress: Progress | None = None,
) -> Environment:
    """The environment of a named template; with None that of the project above `directory` (the working directory).

    `root` enters it as uid 0, `user` as another one, by a name that it knows or by number. Nothing is built or started
    yet. Raises TemplateError for a bad or untrusted template.
    """
    if root and user is not None:
        raise ValueError('root is user="root": both cannot be said')
    if user is not None and not is_identity(user):
        raise ValueError(f"user: no name or number of a user: {user!r}")
    host = Host.probe()
    if directory is not None:
        host = replace(host, cwd=os.path.abspath(directory))
    bench = Bench(host, plugins.load(host), progress or Silent())
    return Environment(name, bench, Options(user="root" if root else user, map=map))


class Environment:
    """One environment; made by `devns.open`."""

    def __init__(self, name: str | None, bench: Bench, options: Options) -> None:
        self._bench = bench
        self._options = options
        self._spec = workflow.understand(name, bench, options)

    @property
    def name(self) -> str:
        """Its name in the store."""
        return self._spec.name

    def plan(self, argv: Sequence[str] = ()) -> Plan:
        """The JSON document that running `argv` would launch. Nothing is built for it."""
        return workflow.plan(self._spec, self._bench, argv, self._options)

    def build(self) -> None:
        """Build its layers where they are missing: the first time of a distribution's root that takes a while."""
        workflow.prepare(self._spec, self._bench)

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        input: str | bytes | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        capture_output: bool = False,
        text: bool = False,
        encoding: str | None = None,
        errors: str | None = None,
        timeout: float | None = None,
        check: bool = False,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command inside and return a CompletedProcess; the arguments mean what they mean to subprocess.run.

        `env` adds to the environment's own variables. `returncode` is 128+n where signal n ended the command. A
        command that cannot be started raises StepError. `timeout` in seconds; then all that ran inside has ended.
        """
        command = spaces.checked_command(argv)
        if capture_output and (stdout is not None or stderr is not None):
            raise ValueError("capture_output says what becomes of stdout and stderr: they cannot be said besides")
        if capture_output:
            stdout = stderr = subprocess.PIPE
        options = Options(self._options.user, self._options.map, _checked_variables(env or {}), _checked_cwd(cwd))
        environment = workflow.prepare(self._spec, self._bench)
        plan = workflow.plan(workflow.adjusted(self._spec, options), self._bench, command, options)
        text = text or encoding is not None or errors is not None or isinstance(input, str)
        codec = (encoding or "utf-8", errors or "strict") if text else None
        with workflow.entered(environment, plan, self._bench), _Pipes(input, stdin, stdout, stderr, codec) as pipes:
            with started(plan, stdio=pipes.inside, **workflow.run_options(self._bench)) as running:
                pipes.begin()
                timer = _Timer(timeout, running.end)
                with timer:
                    status = running.wait(forward=False)
            out, err = pipes.finish()
        if timer.expired:
            raise subprocess.TimeoutExpired(command, timeout or 0, output=out, stderr=err)
        if check and status:
            raise subprocess.CalledProcessError(status, command, output=out, stderr=err)
        return subprocess.CompletedProcess(command, status, out, err)

    def call(self, function: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        """Run a Python function of this program inside and return its value; see `Namespaces.call` for what can travel.

        It runs in this interpreter, forked: the root file system is the environment's, the modules are those
        imported already.
        """
        environment = workflow.prepare(self._spec, self._bench)
        plan = self.plan()
        with workflow.entered(environment, plan, self._bench):
            options = workflow.run_options(self._bench)
            return spaces.run_call(plan, function, args, kwargs, self._bench.host, **options)

    def remove(self) -> None:
        """Remove what was written in it, its home included. The layers stay for others."""
        with trees.finishing(self._bench.host):
            store.Store.open(self._bench.host.store).remove(self.name)


def _checked_variables(env: Mapping[Any, Any]) -> dict[str, str]:
    for name, value in env.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"env: names and values are strings, not {name!r}: {value!r}")
        if not is_variable(name) or "\0" in value:
            raise ValueError(f"env: cannot be a variable: {name!r}")
    return dict(env)


def _checked_cwd(cwd: str | os.PathLike[str] | None) -> str | None:
    path = None if cwd is None else os.fspath(cwd)
    if path is not None and (not path or "\0" in path):
        raise ValueError(f"cwd: no path: {path!r}")
    return path


class _Timer:
    """Calls `end` after `timeout` seconds, unless the context was left before."""

    def __init__(self, timeout: float | None, end: Callable[[], None]) -> None:
        self.expired = False
        self._end = end
        self._timer = None if timeout is None else threading.Timer(timeout, self._expire)

    def _expire(self) -> None:
        self.expired = True
        self._end()

    def __enter__(self) -> None:
        if self._timer:
            self._timer.daemon = True
            self._timer.start()

    def __exit__(self, *reason: object) -> None:
        if self._timer:
            self._timer.cancel()


class _Pipes:
    """The payload's standard streams, as subprocess.run would make them, and the threads that feed and drain them."""

    def __init__(
        self,
        input: str | bytes | None,
        stdin: int | IO[Any] | None,
        stdout: int | IO[Any] | None,
        stderr: int | IO[Any] | None,
        codec: tuple[str, str] | None,
    ) -> None:
        if input is not None and stdin is not None:
            raise ValueError("input is what stdin gets: both cannot be said")
        if subprocess.STDOUT in (stdin, stdout):
            raise ValueError("STDOUT is a value for stderr alone")
        self._codec = codec  # encoding and errors; None for bytes
        self._input = input.encode(*(codec or ())) if isinstance(input, str) else input
        self._asked = (subprocess.PIPE if input is not None else stdin, stdout, stderr)
        self._close_at_begin: list[int] = []
        self._threads: list[threading.Thread] = []
        self._ours: dict[int, int] = {}
        self._said: dict[int, bytes] = {}

    def __enter__(self) -> _Pipes:
        self.inside: list[int] = []
        try:
            for number, asked in enumerate(self._asked):
                self.inside.append(self._open(number, asked))
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self, number: int, asked: int | IO[Any] | None) -> int:
        if asked is None:
            return number
        if asked == subprocess.DEVNULL:
            fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        elif asked == subprocess.STDOUT:
            return self.inside[1]
        elif asked == subprocess.PIPE:
            read, write = os.pipe2(os.O_CLOEXEC)
            fd, self._ours[number] = (read, write) if number == 0 else (write, read)
        else:
            return asked if isinstance(asked, int) else asked.fileno()
        self._close_at_begin.append(fd)
        return fd

    def begin(self) -> None:
        """The payload has its ends: close them here, and start to feed and to drain. After the fork, never before."""
        for fd in self._close_at_begin:
            os.close(fd)
        self._close_at_begin.clear()
        for number, fd in self._ours.items():
            target = self._feed if number == 0 else self._drain
            thread = threading.Thread(target=target, args=(number, fd), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _feed(self, number: int, fd: int) -> None:
        with os.fdopen(fd, "wb") as pipe:
            try:
                pipe.write(self._input or b"")
            except BrokenPipeError:
                return

    def _drain(self, number: int, fd: int) -> None:
        with os.fdopen(fd, "rb") as pipe:
            self._said[number] = pipe.read()

    def finish(self) -> tuple[Any, Any]:
        for thread in self._threads:
            thread.join()
        self._ours.clear()
        out, err = self._said.get(1), self._said.get(2)
        return self._read(out), self._read(err)

    def _read(self, said: bytes | None) -> Any:
        if said is None or self._codec is None:
            return said
        return said.decode(*self._codec).replace("\r\n", "\n").replace("\r", "\n")

    def __exit__(self, *reason: object) -> None:
        for fd in self._close_at_begin:
            os.close(fd)
        if not self._threads:
            for fd in self._ours.values():
                os.close(fd)
