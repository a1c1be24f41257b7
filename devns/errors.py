"""The ways devns says no: one base class, three kinds, told apart by who must act."""

from __future__ import annotations


class DevnsError(Exception):
    """Something the user should read: one sentence, and a hint that can be typed.

    `message` is lower case, has no full stop and carries its operands; the cause stands after a colon.
    `hint` is a command or an edit that mends it. The command line prints both and exits with `exit_code`.
    """

    exit_code = 125

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class TemplateError(DevnsError):
    """The author of a template or project file must act: names the file and the key path."""

    exit_code = 78  # EX_CONFIG, sysexits.h


class Unsupported(DevnsError):
    """The owner of this machine must act: names what is missing and what brings it."""


class StepError(DevnsError):
    """A step of a Plan failed in the kernel: carries the step's `op`, the `errno` and the `path`."""

    def __init__(self, op: str, errno: int, path: str | None, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.op = op
        self.errno = errno
        self.path = path
