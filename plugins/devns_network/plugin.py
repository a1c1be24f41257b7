"""[network]: whose network the environment sees, and what it borrows from the host to get around in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from devns.api import (
    Host,
    Problem,
    Spec,
    Step,
    file,
    hookimpl,
    loopback,
    namespace,
    note,
    outside,
    sysfs,
)
from devns_network import lent
from devns_network.ports import parse_port, parse_published, parse_rule

_TUN = "/dev/net/tun"  # which both helpers need
_READ_WRITE = 0o6  # R_OK | W_OK, access(2)
_SCOPES_SINCE = (6, 12)  # Landlock's scopes, which launch uses: landlock(7)
_HELPERS = ("pasta", "slirp4netns")  # the better one first
_DNS = "10.0.2.3"  # where every engine answers for the host's resolver
# Directories of sysfs that are made to be mounted on: they hide nothing when they are. fs/sysfs/mount.c
_SYS_MOUNT_POINTS = (
    "/sys/firmware/efi/efivars",
    "/sys/fs/bpf",
    "/sys/fs/cgroup",
    "/sys/fs/fuse/connections",
    "/sys/fs/pstore",
    "/sys/fs/resctrl",
    "/sys/fs/selinux",
    "/sys/fs/smackfs",
    "/sys/hypervisor/s390",
    "/sys/kernel/config",
    "/sys/kernel/debug",
    "/sys/kernel/security",
    "/sys/kernel/tracing",
)


@dataclass(frozen=True)
class NetworkTable:
    """[network]. `publish` is "[ADDRESS:]HOST:GUEST", on 127.0.0.1 unless said; `host_loopback` are ports of the host's
    own loopback that can be reached from inside; with `allow`, nothing else can be reached, and `deny` beats it."""

    mode: Literal["host", "none", "user"] = "host"
    publish: tuple[str, ...] = field(default=(), metadata={"merge": "add"})
    allow: tuple[str, ...] | None = field(default=None, metadata={"merge": "add"})
    deny: tuple[str, ...] = field(default=(), metadata={"merge": "add"})
    host_loopback: tuple[int, ...] = field(default=(), metadata={"merge": "add"})
    certificates: Literal["host", "own"] = "host"
    proxy: Literal["auto", "host", "none"] = "auto"
    registries: Literal["host", "none"] = "host"

    def __post_init__(self) -> None:
        parse_published(self.publish)
        for rule in self.allow or ():
            parse_rule(rule)
        for rule in self.deny:
            kind, _target, port = parse_rule(rule)
            if kind == "name" and port:
                raise ValueError(f'"{rule}": a name is denied as a whole, without a port')
        for port in self.host_loopback:
            parse_port(port)
        said = {
            "publish": self.publish,
            "allow": self.allow is not None,
            "deny": self.deny,
            "host_loopback": self.host_loopback,
        }
        for key in (key for key, value in said.items() if value and self.mode != "user"):
            raise ValueError(f'{key} needs mode = "user", not "{self.mode}"')


# --- the hooks --------------------------------------------------------------------------------------------------------


@hookimpl
def devns_table() -> tuple[str, type]:
    return "network", NetworkTable


@hookimpl
def devns_check(spec: Spec, host: Host) -> Iterable[Problem]:
    table = spec.table(NetworkTable)
    if table.mode == "user":
        yield from _user_problems(table, host)
    if table.mode == "host" and host.kernel < _SCOPES_SINCE:
        yield Problem(
            "abstract-sockets",
            f"with the host's network the host's abstract sockets can be reached: Linux {host.release} cannot keep "
            "them away, 6.12 is the first",
            'set mode = "none" or "user" in [network]',
            fatal=False,
        )
    if table.mode != "none":
        if table.certificates == "host" and lent.find_bundle(host) is None:
            yield Problem(
                "certificates",
                "this machine has no CA bundle in any of the usual places: programs inside use their own",
                "install ca-certificates, or set SSL_CERT_FILE",
                fatal=False,
            )
        if table.proxy == "auto":
            yield from lent.proxy_problems(host, own_network=table.mode == "user")


@hookimpl
def devns_plan(spec: Spec, host: Host) -> Iterable[Step]:
    table = spec.table(NetworkTable)
    hostname = _hostname(spec)
    if table.mode != "host":
        yield namespace("net")
        yield loopback()
        if _is_sysfs_mountable(host):
            yield sysfs()
    if table.mode == "none":
        yield _file("/etc/hosts", lent.hosts_text(None, hostname))
        return
    if table.mode == "user":
        yield from _user(table, host)
    else:
        resolver = lent.read_text(host, "/etc/resolv.conf")
        if resolver is not None:
            yield _file("/etc/resolv.conf", resolver)
    yield _file("/etc/hosts", lent.hosts_text(host, hostname))
    yield from _lent(table, host)


# --- mode = "user" ----------------------------------------------------------------------------------------------------


def _user(table: NetworkTable, host: Host) -> Iterator[Step]:
    published = parse_published(table.publish)
    yield outside(
        "devns_network.user:hold",
        engines=[["built-in", None], *([name, host.which(name)] for name in _helpers(table, host))],
        publish=[list(row) for row in published],
        host_loopback=sorted(set(table.host_loopback)),
        allow=None if table.allow is None else [list(parse_rule(text)) for text in table.allow],
        deny=[list(parse_rule(text)) for text in table.deny],
    )
    yield _file("/etc/resolv.conf", lent.resolv_text(host, _DNS))
    for address, outer, inner in published:
        if not address.startswith("127.") and address != "::1":
            yield note(f"port {outer} of {address} is open to the network: it leads to port {inner} inside")


def _helpers(table: NetworkTable, host: Host) -> list[str]:
    """The helpers that can do all that is asked for, should the built-in engine not work here. slirp4netns cannot
    publish a port when it starts, nor open the host's loopback for single ports; neither can enforce a rule."""
    if table.allow is not None or table.deny or not host.access(_TUN, _READ_WRITE):
        return []
    able = _HELPERS[:1] if table.publish or table.host_loopback else _HELPERS
    return [name for name in able if host.which(name)]


def _user_problems(table: NetworkTable, host: Host) -> Iterator[Problem]:
    first = host.read("/proc/sys/net/ipv4/ip_unprivileged_port_start") or ""
    for _address, port, _inside in parse_published(table.publish):
        if host.uid != 0 and first.strip().isdecimal() and port < int(first):
            yield Problem("publish", f"port {port} may be opened only by root here", f"publish {int(first)} or above")


# --- helpers ----------------------------------------------------------------------------------------------------------


def _lent(table: NetworkTable, host: Host) -> Iterator[Step]:
    own_network = table.mode == "user"
    if table.certificates == "host":
        yield from lent.certificates(host)
    if table.proxy != "none":
        yield from lent.proxies(host, all_of_them=table.proxy == "host", own_network=own_network)
    if table.registries == "host":
        yield from lent.registries(host, own_network=own_network)


def _file(dst: str, text: str) -> Step:
    return file(dst, text, optional=True, default=True)


def _hostname(spec: Spec) -> str | None:
    """The environment's own name, where it has one. make_spec has seen to it that it is a name and nothing more."""
    return spec.namespaces.uts.hostname or spec.name if spec.namespaces.uts else None


def _is_sysfs_mountable(host: Host) -> bool:
    """A fresh sysfs shows everything, so the kernel allows one only where the one that is seen hides nothing beneath
    another mount (containers often mask parts of it). fs/namespace.c, mount_too_revealing()"""
    rows = [line.split(" ") for line in (host.read("/proc/self/mountinfo") or "").splitlines()]
    mounts = [(row[4], row[row.index("-") + 1]) for row in rows if "-" in row[6:] and len(row) > 9]
    beneath = [path for path, _kind in mounts if path.startswith("/sys/")]
    return ("/sys", "sysfs") in mounts and all(_is_meant_for_mounts(path) for path in beneath)


def _is_meant_for_mounts(path: str) -> bool:
    return any(path == point or path.startswith(f"{point}/") for point in _SYS_MOUNT_POINTS)
