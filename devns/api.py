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
    from devns.linux import CLONE_NEWNET as CLONE_NEWNET
    from devns.linux import CLONE_NEWUSER as CLONE_NEWUSER
    from devns.linux import LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET as LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
    from devns.linux import LANDLOCK_SCOPE_SIGNAL as LANDLOCK_SCOPE_SIGNAL
    from devns.linux import PR_SET_DUMPABLE as PR_SET_DUMPABLE
    from devns.linux import PR_SET_NO_NEW_PRIVS as PR_SET_NO_NEW_PRIVS
    from devns.linux import PR_SET_PDEATHSIG as PR_SET_PDEATHSIG
    from devns.linux import attach_filter as attach_filter
    from devns.linux import close_all_but as close_all_but
    from devns.linux import landlock_files as landlock_files
    from devns.linux import prctl as prctl
    from devns.linux import seccomp_set_filter as seccomp_set_filter
    from devns.linux import set_capabilities as set_capabilities
    from devns.linux import setns as setns
    from devns.linux import unshare as unshare
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
    from devns.seccomp import allow_only as allow_only
    from devns.spec import Spec as Spec

_ROOMS = {
    "errors": "DevnsError StepError TemplateError Unsupported",
    "hooks": "hookimpl",
    "host": "Host",
    "launch": "Child",
    "linux": "CLONE_NEWNET CLONE_NEWUSER LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET LANDLOCK_SCOPE_SIGNAL PR_SET_DUMPABLE"
    " PR_SET_NO_NEW_PRIVS PR_SET_PDEATHSIG attach_filter close_all_but landlock_files prctl seccomp_set_filter"
    " set_capabilities setns unshare",
    "ops": "account bind clock cwd dev directory file hostname loopback mask mqueue namespace note outside overlay proc"
    " rlimit setenv symlink sysfs tmpfs",
    "plan": "Problem Step",
    "seccomp": "allow_only",
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
