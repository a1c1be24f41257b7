"""clone: an environment once more, with all that was written in it."""

from __future__ import annotations

from devns import copying, template, trees
from devns.errors import DevnsError
from devns.store import Store, is_name
from devns.workflow import Bench


def clone(original: str, name: str, bench: Bench) -> None:
    """Copy the environment `original`, its home too, under `name`. It stands on the same layers and template.

    `name` must be no template's, or that is what would be entered by it. Raises DevnsError while `original` runs.
    """
    if not is_name(name):
        raise DevnsError(f"{name!a}: not fit for an environment's name", hint="lower-case letters, digits and . _ -")
    if template.is_known(name, bench.host):
        raise DevnsError(f"{name}: there is a template of this name", hint="devns template list")
    store = Store.open(bench.host.store, create=False)
    source = store.environment(original)
    if source is None:
        raise DevnsError(f"{original}: no such environment", hint="devns list")
    if source.broken:
        raise DevnsError(f"{original}: {source.broken}", hint=f"devns remove {original}")

    def copy() -> None:
        copying.copy_tree("/old/root", "/new/root")
        copying.copy_tree("/old/home", "/new/home")

    with source.lease(exclusive=True), store.new_environment(name, source.record) as made:
        read = {"/old/root": source.upper, "/old/home": source.home}
        trees.run(bench.host, copy, read=read, write={"/new/root": made.upper, "/new/home": made.home})
