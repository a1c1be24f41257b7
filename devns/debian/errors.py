"""The two ways a mirror fails: it can't be had, or what it sends isn't to be believed."""

from __future__ import annotations

from devns.errors import DevnsError, Unsupported


class MirrorError(Unsupported):
    """No answer, or not the file that was asked for: the network, the proxy, or another mirror."""


class Untrusted(DevnsError):
    """What came is not what Debian signed. Nothing of it is kept and nothing of it is used."""
