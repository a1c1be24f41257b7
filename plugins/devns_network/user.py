"""The effect of mode = "user": the first of the engines that a step names which works here, tried by starting it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from devns.api import Unsupported
from devns_network import engine

if TYPE_CHECKING:
    from devns.api import Child, Step

BUILT_IN = "built-in"


@contextlib.contextmanager
def hold(step: Step, child: Child) -> Iterator[None]:
    """Carry the network of `child` by the first engine of `step["engines"]`, pairs of its name and its program, that
    starts. Where it is not the first one, the user is told which it is, and why.

    Raises Unsupported with what each of them said, where none does.
    """
    with contextlib.ExitStack() as held:
        reasons: list[str] = []
        for name, program in step["engines"]:
            try:
                if name == BUILT_IN:
                    held.enter_context(engine.hold(step, child))
                else:
                    from devns_network import helper

                    held.enter_context(helper.hold({**step, "engine": name, "program": program}, child))
            except engine.NotHere as error:
                reasons.append(f"{name}: {error}")
                continue
            except Unsupported as error:
                if name == BUILT_IN:  # a port that is taken, which is so for every engine
                    raise
                reasons.append(error.message.removeprefix("network: "))
                continue
            break
        else:
            raise Unsupported(
                f"network: no way to a network of its own here: {'; '.join(reasons)}",
                hint='set mode = "host" or "none" in [network]',
            )
        if reasons:
            child.note(f"network: carried by {name}: {'; '.join(reasons)}")
        yield
