"""console: the command line's other half: how tables, progress and errors look on a terminal, in a pipe, as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from devns.decode import escape
from devns.errors import DevnsError
from devns.progress import Progress, Silent, Unit

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


def printable(text: str) -> str:
    """`text`, its lines kept, with what would act on a terminal escaped."""
    return "\n".join(map(escape, text.replace("\t", "    ").split("\n")))


def say(text: str) -> None:
    print(printable(text), flush=True)


def tell(text: str) -> None:
    """One line for the user that is not the answer: to standard error."""
    print(f"devns: {printable(text)}", file=sys.stderr, flush=True)


def show_error(error: DevnsError) -> None:
    print(f"devns: {printable(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {printable(error.hint)}", file=sys.stderr, flush=True)


def show_json(value: Any) -> None:
    print(json.dumps(value, indent=2), flush=True)


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
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


@contextmanager
def progress(*, as_json: bool = False, quiet: bool = False) -> Iterator[Progress]:
    """What a long job is told to speak to: JSON lines, a drawn bar on a terminal, or plain lines elsewhere."""
    if quiet:
        yield Silent()
    elif as_json:
        yield JsonLines()
    elif sys.stderr.isatty():
        with Drawn() as drawn:
            yield drawn
    else:
        lines = Lines()
        yield lines
        lines.end()


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


class JsonLines:
    """One JSON object a line, to standard error: {"event": "stage" | "advance" | "note", ...}."""

    def __init__(self) -> None:
        self._said = 0.0

    def _emit(self, **event: Any) -> None:
        print(json.dumps(event), file=sys.stderr, flush=True)

    def stage(self, name: str, *, total: int | None = None, unit: Unit = "steps") -> None:
        self._done = 0
        self._unit = unit
        self._emit(event="stage", name=name, total=total, unit=unit)

    def advance(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._said > 0.1:  # ten lines a second are enough for anybody
            self._said = time.monotonic()
            self._emit(event="advance", done=self._done, unit=self._unit)

    def note(self, text: str) -> None:
        self._emit(event="note", text=text)


class Drawn:
    """One line a stage, with a bar, what is done, and the time left."""

    def __enter__(self) -> Drawn:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.fields[amount]}"))
        self._bars: Bars = Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=False)
        self._bars.__enter__()
        self._task: TaskID | None = None
        return self

    def __exit__(self, *reason: Any) -> None:
        self._finish(failed=reason[0] is not None)
        self._bars.__exit__(*reason)

    def _finish(self, *, failed: bool = False) -> None:
        if self._task is not None and not failed:
            self._bars.update(self._task, total=max(self._done, 1), completed=max(self._done, 1))
        self._task = None

    def stage(self, name: str, *, total: int | None = None, unit: Unit = "steps") -> None:
        self._finish()
        self._done, self._total, self._unit = 0, total, unit
        self._task = self._bars.add_task(printable(name), total=total, amount="")

    def advance(self, count: int = 1) -> None:
        self._done += count
        if self._task is not None:
            of = f"/{_amount(self._total, self._unit)}" if self._total is not None else ""
            amount = f"{_amount(self._done, self._unit)}{of}"
            self._bars.update(self._task, completed=self._done, amount=amount)

    def note(self, text: str) -> None:
        self._bars.console.print(f"devns: {printable(text)}", markup=False, highlight=False)


def _amount(count: int | None, unit: Unit) -> str:
    if count is None:
        return "?"
    return f"{count / 1e6:.1f} MB" if unit == "bytes" else f"{count} {unit}"
