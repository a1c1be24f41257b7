"""Identity: who you are inside, the id maps that make it so, and what is left of your powers there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devns.errors import TemplateError, Unsupported

if TYPE_CHECKING:
    from devns.accounts import Account
    from devns.host import Host
    from devns.spec import Spec

Rows = list[list[int]]

# What package managers need of root, as podman grants it, less SETPCAP. Never SYS_ADMIN: with it masks and read-only
# mounts could be taken off again. capabilities(7)
ROOT_CAPABILITIES = (
    "chown",
    "dac_override",
    "fowner",
    "fsetid",
    "kill",
    "net_bind_service",
    "setfcap",
    "setgid",
    "setuid",
    "sys_chroot",
)
INSIDE_IDS = 65536  # ids 0 to 65535: what a distribution's packages expect to exist


def identity(spec: Spec, host: Host, account: Account) -> dict[str, Any]:
    """`{"uid", "gid", "uid_map", "gid_map", "map", ...}`: who the payload is, and rows of [inside, outside, count].

    `map` is "single" where the caller's own id is the only one mapped, which needs no helper; "range" where a range of
    subordinate ids joins it, which newuidmap(1) and newgidmap(1) write: then their paths are here too, and the `groups`
    that another user than yourself and root gets in place of yours.
    Raises Unsupported where a range is asked for and this host grants none.
    """
    user = spec.user
    uid, gid = account.uid, account.gid
    if user.uid_map:
        uid_map, gid_map = [list(row) for row in user.uid_map], [list(row) for row in user.gid_map]
        if user.identity == "self":
            uid, gid = _inside(uid_map, host.uid), _inside(gid_map, host.gid)
    elif user.map == "range":
        uid_map, gid_map = _range(host, "uid", host.uid), _range(host, "gid", host.gid)
    else:
        uid_map, gid_map = [[uid, host.uid, 1]], [[gid, host.gid, 1]]
    for key, rows, number in (("uid_map", uid_map, uid), ("gid_map", gid_map, gid)):
        if not _maps(rows, number):
            raise TemplateError(
                f'{spec.template}: user.{key}: maps nobody to {number}, and as = "{user.identity}" is {number}'
            )
    answer: dict[str, Any] = {"map": "single", "uid": uid, "gid": gid, "uid_map": uid_map, "gid_map": gid_map}
    if not _single(uid_map, host.uid) or not _single(gid_map, host.gid):
        answer |= {"map": "range"}
        if account.groups is not None:
            answer |= {"groups": [gid, *(group for group in account.groups if _maps(gid_map, group))]}
        if host.uid != 0:
            answer |= {"newuidmap": _helper(host, "newuidmap"), "newgidmap": _helper(host, "newgidmap")}
    return answer


def confine(spec: Spec, ids: dict[str, Any]) -> dict[str, Any]:
    """`{"capabilities", "seccomp", "nested", "setuid_bits", "scoped"}` for the payload; no plugin decides it."""
    root = ids["uid"] == 0 and spec.user.identity != "self"
    emulate = root and ids["map"] == "single"
    return {
        "capabilities": list(ROOT_CAPABILITIES) if root else [],
        "seccomp": ["deny", "emulate-root"] if emulate else ["deny"],
        "nested": spec.user.nested,
        "setuid_bits": root,
        "scoped": True,
    }


def _single(rows: Rows, outside: int) -> bool:
    return len(rows) == 1 and rows[0][1:] == [outside, 1]


def _maps(rows: Rows, inside: int) -> bool:
    return any(start <= inside < start + count for start, _, count in rows)


def _inside(rows: Rows, outside: int) -> int:
    """What `outside` is called inside, or the first id there is where the map leaves it out."""
    for inside, start, count in rows:
        if start <= outside < start + count:
            return inside + outside - start
    return rows[0][0]


def _range(host: Host, which: str, own: int) -> Rows:
    """Inside 0 to 65535 are subordinate ids, but for the caller's own id, which stays itself.

    One layout serves `self` and `root`, so that a file belongs to the same id however the environment is entered.
    """
    granted = host.subordinate(which)  # type: ignore[arg-type]  # "uid" or "gid", from this file only
    if granted is None:
        raise Unsupported(
            f"this host grants {host.user} no range of subordinate {which}s: no line in /etc/sub{which}",
            hint=f'ask for: usermod --add-sub{which}s 100000-165535 {host.user}; or set map = "single" in [user]',
        )
    start, count = granted
    if own >= INSIDE_IDS:
        return [[0, start, min(count, INSIDE_IDS)], [own, own, 1]]
    below, above = min(own, count), min(count, INSIDE_IDS - 1) - own
    rows = [[0, start, below], [own, own, 1], [own + 1, start + own, above]]
    return [row for row in rows if row[2] > 0]


def _helper(host: Host, name: str) -> str:
    path = host.which(name)
    if path is None:
        raise Unsupported(
            f"{name} is not installed: only it can map a range of ids",
            hint='ask for the package uidmap (shadow-utils, shadow-uidmap); or set map = "single" in [user]',
        )
    return path
