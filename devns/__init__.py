"""devns: rootless development environments from nothing but Python and a kernel.

    import devns

    devns.open("py311").run(["make", "test"], check=True)
    devns.namespaces(pid=True, hostname="box").call(os.getpid)  # 2: PID 1 is init

Names are loaded when they are first asked for: importing devns costs nothing.
"""

# Nothing is imported here, not even typing or __future__: a module of that name in the working directory, where Python
# may look first, would run before devns can take that place off sys.path.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from devns.errors import DevnsError, StepError, TemplateError, Unsupported
    from devns.library import Environment, open
    from devns.spaces import CallError, Namespaces, namespaces

__version__ = "0.1.0"
__all__ = [
    "CallError",
    "DevnsError",
    "Environment",
    "Namespaces",
    "StepError",
    "TemplateError",
    "Unsupported",
    "namespaces",
    "open",
]

_ROOMS = {
    "devns.errors": ("DevnsError", "StepError", "TemplateError", "Unsupported"),
    "devns.library": ("Environment", "open"),
    "devns.spaces": ("CallError", "Namespaces", "namespaces"),
}


def __getattr__(name: str) -> object:
    import importlib

    for room, names in _ROOMS.items():
        if name in names:
            value = getattr(importlib.import_module(room), name)
            globals()[name] = value  # asked once
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
