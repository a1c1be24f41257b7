"""check: what this machine can do, tried by doing."""

from __future__ import annotations

from devns import diagnose
from devns.diagnose import Fact
from devns.store import Store
from devns.workflow import Bench


def check(bench: Bench) -> list[Fact]:
    """Every capability that devns knows of, each tried in a process of its own that ends at once."""
    store = Store.open(bench.host.store)
    with store.staging() as staging:
        return list(diagnose.probe(bench.host, staging.path).values())
