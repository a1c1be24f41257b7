"""Progress: what a long job says while it runs. The job knows this protocol, the command line draws it."""

from __future__ import annotations

from typing import Literal, Protocol

Unit = Literal["bytes", "packages", "files", "steps"]


class Progress(Protocol):
    def stage(self, name: str, *, total: int | None = None, unit: Unit = "steps") -> None:
        """A new stage begins (the one before ends); `total` in `unit`s where it is known."""

    def advance(self, count: int = 1) -> None:
        """`count` more units of this stage are done."""

    def note(self, text: str) -> None:
        """One line worth keeping."""

    def end(self) -> None:
        """The last stage is over: the screen is another's again. A new stage may begin later."""


class Silent:
    """Says nothing: the library's default."""

    def stage(self, name: str, *, total: int | None = None, unit: Unit = "steps") -> None: ...

    def advance(self, count: int = 1) -> None: ...

    def note(self, text: str) -> None: ...

    def end(self) -> None: ...
