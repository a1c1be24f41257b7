"""console: the command line's other half: how tables, progress and errors look on a terminal, in a pipe, as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from devns.decode import escape
from devns.errors import DevnsError
from devns.progress import Progress, Unit

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


def printable(text: str) -> str:
    """`text`, its lines kept, with what would act on a terminal escaped."""
    return "\n".join(map(escape, text.replace("\t", "    ").split("\n")))


def open_streams() -> None:
    """Open what the caller closed of the standard streams; else the next file opened would be taken for one."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, "r" if fd == 0 else "w", closefd=False))


def give_up(*fds: int) -> None:
    """Nobody reads on: what Python still holds for them goes nowhere, or it would fail once more at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    for fd in fds:
        os.dup2(null, fd)
    os.close(null)


def say(text: str) -> None:
    _answer(printable(text))


def tell(text: str) -> None:
    """One line for the user that is not the answer: to standard error."""
    _aside(f"devns: {printable(text)}")


def show_error(error: DevnsError) -> None:
    _aside(f"devns: {printable(error.message)}")
    if error.hint:
        _aside(f"hint: {printable(error.hint)}")


def show_json(value: Any) -> None:
    _answer(json.dumps(value, indent=2))


def _answer(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:  # the disk is full
        give_up(1)
        raise DevnsError(f"standard output cannot be written: {os.strerror(error.errno or 0).lower()}") from None


def _aside(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:  # there is nowhere left to say so
        give_up(2)


def show_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns: drawn by rich on a terminal, plain text in a pipe."""
    cells = [[printable(cell).replace("\n", "\\n") for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in [list(headings), *cells]) for column in range(len(headings))]
    for row in [[heading.upper() for heading in headings], *cells]:
        _answer("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def progress(*, as_json: bool = False) -> Iterator[Progress]:
    """What a long job is told to speak to: JSON lines, a drawn bar on a terminal, or plain lines elsewhere."""
    speaker = JsonLines() if as_json else Drawn() if sys.stderr.isatty() else Lines()
    try:
        yield speaker
    except BaseException:
        speaker.fail()
        raise
    speaker.end()


class Lines:
    """A line when a stage begins and when it ends, to standard error."""

    def __init__(self) -> None:
        self._stage: str | None = None

    def stage(self, name: str, *, total: int | None = None, unit: Unit = "steps") -> None:
        self.end()
        self._stage, self._since, self._done, self._unit = name, time.monotonic(), 0, unit
        tell(f"{name}{f': {_amount(total, unit)}' if total is not None else ''}")

    def advance(self, count: int = 1) -> None:
        self._done += count

    def note(self, text: str) -> None:
        tell(text)

    def end(self) -> None:
        if self._stage is not None:
            took = time.monotonic() - self._since
            done = f", {_amount(self._done, self._unit)}" if self._done else ""
            tell(f"{self._stage}: done in {took:.1f} s{done}")
            self._stage = None

    def fail(self) -> None:
        self._stage = None


class JsonLines:
    """One JSON object a line, to standard error: {"event": "stage" | "advance" | "note" | "end", ...}."""

    def __init__(self) -> None:
        self._said = 0.0
        self._begun = False

    def _emit(self, **event: Any) -> None:
        _aside(json.dumps(event))

    def stage(self, name: str, *, total: int | None = None, unit: Unit = "steps") -> None:
        self._done, self._unit, self._begun = 0, unit, True
        self._emit(event="stage", name=name, total=total, unit=unit)

    def advance(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._said > 0.1:  # ten lines a second are enough for anybody
            self._said = time.monotonic()
            self._emit(event="advance", done=self._done, unit=self._unit)

    def note(self, text: str) -> None:
        self._emit(event="note", text=text)

    def end(self) -> None:
        if self._begun:
            self._emit(event="end")
        self._begun = False

    def fail(self) -> None: ...


class Drawn:
    """One line a stage, with a bar, what is done, and the time left. Drawn when something is said and never by a thread
    of its own: a build forks."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._drawn = 0.0

    def stage(self, name: str, *, total: int | None = None, unit: Unit = "steps") -> None:
        self._complete()
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        self._done, self._total, self._unit = 0, total, unit
        self._task = self._bars.add_task(printable(name), total=total, amount="")
        self._bars.refresh()

    def advance(self, count: int = 1) -> None:
        self._done += count
        if self._bars is not None and self._task is not None and time.monotonic() - self._drawn > 0.05:
            of = f"/{_amount(self._total, self._unit)}" if self._total is not None else ""
            self._bars.update(self._task, completed=self._done, amount=f"{_amount(self._done, self._unit)}{of}")
            self._bars.refresh()
            self._drawn = time.monotonic()

    def note(self, text: str) -> None:
        if self._bars is None:
            tell(text)
        else:
            self._bars.console.print(f"devns: {printable(text)}", markup=False, highlight=False)

    def end(self) -> None:
        self._complete()
        self.fail()

    def fail(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _complete(self) -> None:
        if self._bars is not None and self._task is not None:
            whole = max(self._done, 1)
            amount = _amount(self._done, self._unit) if self._done else ""
            self._bars.update(self._task, total=whole, completed=whole, amount=amount)
            self._task = None
            self._bars.refresh()


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    return Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), auto_refresh=False)


def size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e6:.1f} MB" if count >= 50_000 else f"{count / 1e3:.1f} kB"


def _amount(count: int | None, unit: Unit) -> str:
    if count is None:
        return "?"
    return f"{count / 1e6:.1f} MB" if unit == "bytes" else f"{count} {unit}"
