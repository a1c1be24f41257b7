"""The hookspecs. Their docstrings are the plugin manual."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from devns.host import Host
    from devns.plan import Problem, Step
    from devns.spec import Spec

hookspec = pluggy.HookspecMarker("devns")
hookimpl = pluggy.HookimplMarker("devns")


class Hookspecs:
    """Three pure questions. An answer depends on nothing but the arguments; nobody registers or mutates anything."""

    @hookspec
    def devns_table(self) -> tuple[str, type]:  # type: ignore[empty-body]
        """Claim one TOML table: its name, and the frozen dataclass that describes it.

        Called once, before any template is read. A table that two plugins claim is an error that names both.
        Fields without a default are required keys. `field(metadata={"key": "from"})` gives a key another name than
        its field, `metadata={"merge": "add"}` makes a list add up along `extends`.
        """

    @hookspec
    def devns_check(self, spec: Spec, host: Host) -> Iterable[Problem]:  # type: ignore[empty-body]
        """Say what on this machine stands in the way of `spec`, and the command that mends it.

        Called before a plan is made and by `devns check`. A problem with `fatal=True` refuses the environment.
        Read `host`, never the machine.
        """

    @hookspec
    def devns_plan(self, spec: Spec, host: Host) -> Iterable[Step]:  # type: ignore[empty-body]
        """Turn your table into steps, made with the makers of `devns.api` (`bind`, `tmpfs`, `setenv`, `outside`, ...).

        The order between plugins does not matter: inside steps are sorted by destination, parents first.
        """
