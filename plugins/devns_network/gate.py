"""The gateway's namespace, at the other end of the environment's wire, and the process that is in it.

    environment                     gateway                              host
    eth0 10.0.2.100 ──── veth ────  gw0 10.0.2.2, 10.0.2.3
         fd00:d::100                    fd00:d::2, fd00:d::3
    default via 10.0.2.2            every other address is local  ────▶  the engine holds these sockets

The gate makes the wire, the addresses, the rules and the sockets, hands the sockets to the engine, which is in the
host's network, and then only makes more of them when it is asked. A socket belongs to the namespace where it was made,
whoever holds it. The gate is in the environment's user namespace, keeps the one capability that its sockets need, and
has no more of the host than any process there; the namespace is gone with the last process and socket in it.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import NoReturn

from devns.api import (
    CLONE_NEWNET,
    CLONE_NEWUSER,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    allow_only,
    attach_filter,
    close_all_but,
    prctl,
    seccomp_set_filter,
    set_capabilities,
    setns,
    unshare,
)
from devns_network import netlink, steer
from devns_network.packets import first_packets

GATEWAY, DNS, GUEST = "10.0.2.2", "10.0.2.3", "10.0.2.100"
GATEWAY6, DNS6, GUEST6 = "fd00:d::2", "fd00:d::3", "fd00:d::100"
BATCH = 32  # sockets at a time

_LINK, _GUEST_LINK = "gw0", "eth0"
_LOCAL6, _GUEST_LOCAL6 = "fe80::2", "fe80::100"
_MTU = 65520  # the largest that still takes whole 64 KiB bundles of segments
_UP_WITHIN = 2.0  # seconds; it takes less than a millisecond
_BACKLOG = 4096
_BUFFER = 4 << 20  # bytes; the kernel gives what net.core.rmem_max allows
# What the sockets' module has no names for: linux/in.h, linux/in6.h, asm-generic/socket.h, linux/if_ether.h
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
_IP_RECVTTL = 12
_IP_RECVORIGDSTADDR, _IPV6_RECVORIGDSTADDR = 20, 74
_ETH_P = {4: 0x0800, 6: 0x86DD}
_CALLS = (
    *("close", "sendmsg", "recvfrom", "sendto", "socket", "setsockopt", "bind", "listen", "ioctl", "fcntl"),
    *("getsockname", "getsockopt", "munmap", "mmap", "mremap", "brk", "madvise", "futex", "exit_group"),
    *("rt_sigreturn", "rt_sigprocmask", "restart_syscall"),
)


class GateError(Exception):
    """The kernel refused a part of the gateway: what, and why."""


@contextlib.contextmanager
def _making(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GateError(f"{what}: {os.strerror(error.errno or 0).lower()}") from None


def serve(pid: int, engine: socket.socket, *, v6: bool, opened: list[int]) -> NoReturn:
    """The process: make the gateway of the namespaces of `pid`, hand it over, and make sockets until `engine` closes.

    `opened` are ports of the environment's own loopback that lead to the host's.
    """
    try:
        guest, gateway = _enter(pid)
        standing = _gateway(guest, v6=v6)
        _configure_guest(guest, gateway, v6=v6)
        setns(guest, CLONE_NEWNET)
        standing |= {f"opened {port}": _listener("127.0.0.1", port) for port in opened}
        setns(gateway, CLONE_NEWNET)
        _await_up(_LINK)
        _hand(engine, json.dumps({"sockets": list(standing)}).encode(), list(standing.values()))
        _confine(engine.fileno())
        while request := engine.recv(64):
            kind, version = request.decode()[:3], int(request[3:4])
            _hand(engine, b"{}", [_flow_socket(kind, version) for _ in range(BATCH)])
    except Exception as error:  # a GateError, or a bug of ours: nothing may unwind into the caller's frames
        words = str(error) if isinstance(error, GateError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            engine.send(json.dumps({"failed": words}).encode())
    finally:
        os._exit(0)


def _hand(engine: socket.socket, words: bytes, sockets: list[socket.socket]) -> None:
    fds = array.array("i", [made.fileno() for made in sockets])
    engine.sendmsg([words], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    for made in sockets:
        made.close()


def _enter(pid: int) -> tuple[int, int]:
    """Into the environment's user namespace and a network namespace of our own; the environment's and ours."""
    with _making("the environment's namespaces"):
        user = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        guest = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        setns(user, CLONE_NEWUSER)
        os.close(user)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of credentials has taken it away
    with _making("a network namespace for the gateway"):
        unshare(CLONE_NEWNET)
        return guest, os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _confine(engine: int) -> None:
    """The one capability that a transparent socket needs, over these namespaces, and no other call than its work's."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    close_all_but([0, 1, 2, engine])
    set_capabilities(["net_raw"])
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    seccomp_set_filter(allow_only(_CALLS, os.uname().machine))


# --- the gateway ------------------------------------------------------------------------------------------------------


def _gateway(guest: int, *, v6: bool) -> dict[str, socket.socket]:
    """The wire to the environment, and this side of it: addresses, routes, rules and the sockets that stand."""
    control = netlink.Netlink()
    netlink.bring_up(control, socket.if_nametoindex("lo"))
    # A cookie would be answered past the rules; advertisements and redirects from inside are nothing to us.
    _write("ipv4/tcp_syncookies", "0")
    for which in ("all", "default"):
        for name in ("accept_ra", "accept_redirects"):
            _write(f"ipv6/conf/{which}/{name}", "0")
        _write(f"ipv4/conf/{which}/accept_redirects", "0")
    with _making("a pair of virtual network devices"):
        netlink.add_veth(control, _LINK, _GUEST_LINK, guest, _MTU)
    link = socket.if_nametoindex(_LINK)
    with _making("the gateway's addresses"):
        for address in (GATEWAY, DNS):
            netlink.add_address(control, link, address, 24)
        if v6:
            netlink.make_no_address(control, link)
        netlink.bring_up(control, link)
        local = socket.if_nametoindex("lo")
        netlink.add_default_route(control, socket.AF_INET, local, None)
        if v6:
            for address in (_LOCAL6, GATEWAY6, DNS6):
                netlink.add_address(control, link, address, 64)
            netlink.add_default_route(control, socket.AF_INET6, local, None)
    control.close()
    dns = {socket.AF_INET: DNS, **({socket.AF_INET6: DNS6} if v6 else {})}
    with _making("nf_tables with tproxy"):
        steer.load(_LINK, {int(family): address for family, address in dns.items()})
    with _making("the gateway's sockets"):
        return {name: made for version in ((4, 6) if v6 else (4,)) for name, made in _standing(version)}


def _standing(version: int) -> Iterator[tuple[str, socket.socket]]:
    family, every = (socket.AF_INET, "0.0.0.0") if version == 4 else (socket.AF_INET6, "::")  # noqa: S104  # of the gateway
    tcp = _transparent(family, socket.SOCK_STREAM)
    tcp.bind((every, steer.PORT))
    # What is accepted inherits these: see relay.py for the first, which makes a killed engine look like a reset.
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" + bytes(4))
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tcp.listen(_BACKLOG)
    yield f"tcp{version}", tcp
    udp = _transparent(family, socket.SOCK_DGRAM)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    if version == 4:
        udp.setsockopt(socket.IPPROTO_IP, _IP_RECVORIGDSTADDR, 1)
        udp.setsockopt(socket.IPPROTO_IP, _IP_RECVTTL, 1)
    else:
        udp.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVORIGDSTADDR, 1)
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
    udp.bind((every, steer.PORT))
    yield f"udp{version}", udp
    dns = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    dns.bind((DNS if version == 4 else DNS6, 53))
    yield f"dns{version}", dns
    for name, mark in (("again", steer.MARK), ("back", 0)):
        raw = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW)
        if mark:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        yield f"{name}{version}", raw
    # Opened without a protocol and bound to one: before it is bound, and has its filter, it takes nothing.
    first = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
    attach_filter(first.fileno(), first_packets(version))
    first.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    first.bind((_LINK, _ETH_P[version]))
    yield f"first{version}", first


def _transparent(family: int, kind: int) -> socket.socket:
    """A socket that may have any address as its own. ip(7), IP_TRANSPARENT"""
    made = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    if family == socket.AF_INET:
        made.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
    else:
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return made


def _flow_socket(kind: str, version: int) -> socket.socket:
    """For one flow of UDP, or for one connection from outside to a published port."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    made = _transparent(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
    if kind == "udp":
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    return made


def _write(name: str, value: str) -> None:
    """A switch of the network namespace that we are in; where /proc/sys is read-only, it stays as it is."""
    with contextlib.suppress(OSError), open(f"/proc/sys/net/{name}", "w") as switch:
        switch.write(value)


# --- the environment's side -------------------------------------------------------------------------------------------


def _configure_guest(guest: int, gateway: int, *, v6: bool) -> None:
    with _making("the environment's network"):
        setns(guest, CLONE_NEWNET)
        control = netlink.Netlink()
        netlink.bring_up(control, socket.if_nametoindex("lo"))
        link = socket.if_nametoindex(_GUEST_LINK)
        _write("ipv6/conf/eth0/accept_ra", "0")
        if v6:
            netlink.make_no_address(control, link)
        netlink.add_address(control, link, GUEST, 24)
        netlink.bring_up(control, link)
        netlink.add_default_route(control, socket.AF_INET, link, GATEWAY)
        if v6:
            for address in (_GUEST_LOCAL6, GUEST6):
                netlink.add_address(control, link, address, 64)
            netlink.add_default_route(control, socket.AF_INET6, link, _LOCAL6)
        control.close()
        _let_everybody_ping()
        _await_up(_GUEST_LINK)


def _let_everybody_ping() -> None:
    """ping(8) without a privilege, by a socket for echo requests, for each group that there is inside. icmp(7)"""
    with open("/proc/self/gid_map") as listing:
        rows = sorted([int(word) for word in line.split()] for line in listing)
    for first, _outside, count in rows[:1]:
        _write("ipv4/ping_group_range", f"{first} {first + count - 1}")


def _listener(address: str, port: int) -> socket.socket:
    with _making(f"port {port} of the environment's loopback"):
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" + bytes(4))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.bind((address, port))
        made.listen(_BACKLOG)
        return made


def _await_up(link: str) -> None:
    """Until it carries packets: the first ones would be lost."""
    control = netlink.Netlink()
    index, until = socket.if_nametoindex(link), time.monotonic() + _UP_WITHIN
    while not netlink.is_up(control, index) and time.monotonic() < until:
        time.sleep(0.0003)
    control.close()
