"""The plugin author's door: everything a plugin may import of devns, and nothing that is defined here.

Names are looked up when they are first used: a module with effects that imports a name or two for its errors brings
neither pluggy nor dataclasses with it, which the fast lane forbids.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devns.errors import DevnsError as DevnsError
    from devns.errors import StepError as StepError
    from devns.errors import TemplateError as TemplateError
    from devns.errors import Unsupported as Unsupported
    from devns.hooks import hookimpl as hookimpl
    from devns.host import Host as Host
    from devns.launch import Child as Child
    from devns.ops import account as account
    from devns.ops import bind as bind
    from devns.ops import clock as clock
    from devns.ops import cwd as cwd
    from devns.ops import dev as dev
    from devns.ops import directory as directory
    from devns.ops import file as file
    from devns.ops import hostname as hostname
    from devns.ops import loopback as loopback
    from devns.ops import mask as mask
    from devns.ops import mqueue as mqueue
    from devns.ops import namespace as namespace
    from devns.ops import note as note
    from devns.ops import outside as outside
    from devns.ops import overlay as overlay
    from devns.ops import proc as proc
    from devns.ops import rlimit as rlimit
    from devns.ops import setenv as setenv
    from devns.ops import symlink as symlink
    from devns.ops import sysfs as sysfs
    from devns.ops import tmpfs as tmpfs
    from devns.plan import Problem as Problem
    from devns.plan import Step as Step
    from devns.spec import Spec as Spec

_ROOMS = {
    "errors": "DevnsError StepError TemplateError Unsupported",
    "hooks": "hookimpl",
    "host": "Host",
    "launch": "Child",
    "ops": "account bind clock cwd dev directory file hostname loopback mask mqueue namespace note outside overlay proc"
    " rlimit setenv symlink sysfs tmpfs",
    "plan": "Problem Step",
    "spec": "Spec",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"devns.api has no {name}")
    return getattr(import_module(f"devns.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
