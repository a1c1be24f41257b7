"""Repositories beside Debian's: what a template says of one, whose signature counts for it, and how the root's own apt
is told of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from devns.debian import openpgp

SOURCES = "/etc/apt/sources.list.d/devns.sources"  # behind debian.sources, whose order apt and `Index` go by
KEYRINGS = "/etc/apt/keyrings"


@dataclass(frozen=True)
class Repository:
    """One suite of an archive. `uri` is what stands above `dists/`; `key` the text of OpenPGP certificates."""

    uri: str
    suite: str
    components: tuple[str, ...]
    key: str
    fingerprint: str

    @property
    def name(self) -> str:
        """What errors and records call it."""
        return f"{self.uri.partition('://')[2]}/dists/{self.suite}"

    @property
    def certificate(self) -> str:
        """Of `key` the one that is pinned, armored. TemplateError where that isn't in it."""
        return openpgp.pick(self.key, self.fingerprint, name=f"root.repository: {self.name}: key")

    @property
    def trust(self) -> openpgp.Trust:
        """The one key that was named, whatever else lies beside it."""
        return openpgp.Trust((self.certificate.encode(),), frozenset({self.fingerprint}))


def read(rows: Sequence[Mapping[str, Any]]) -> tuple[Repository, ...]:
    """As a recipe has them."""
    return tuple(Repository(**{**row, "components": tuple(row["components"])}) for row in rows)


def files(repositories: Sequence[Repository]) -> dict[str, str]:
    """What apt reads of them: path in the root -> text. Each believes its own key alone, as here."""
    found: dict[str, str] = {}
    stanzas = []
    for number, repository in enumerate(repositories, 1):
        keyring = f"{KEYRINGS}/devns-{number}.asc"
        found[keyring] = repository.certificate
        stanzas.append(
            f"Types: deb\nURIs: {repository.uri}\nSuites: {repository.suite}\n"
            f"Components: {' '.join(repository.components)}\nSigned-By: {keyring}\n"
        )
    return {**found, SOURCES: "\n".join(stanzas)} if stanzas else {}
