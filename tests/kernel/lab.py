"""A laboratory of networks that nothing can leave: a "host" for devns to run on, and a remote host that it reaches.

    host   198.18.0.1, 2001:db8:18::1, a resolver on 127.0.0.53    the user's own, ordinary and without privilege there
     │ a virtual wire
    remote 198.18.0.2, 203.0.113.10, 2001:db8:99::10               servers, and what a cloud has at 169.254.169.254

All of it is made by an ordinary user: a user namespace has both networks, and devns runs in another one beneath.
"""

from __future__ import annotations

import ast
import contextlib
import encodings.idna  # noqa: F401  # inside nothing can be imported, and connecting by name asks for it
import os
import resource
import signal
import socket
import struct
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from devns import linux
from devns.base import Base
from devns.decode import At, decode
from devns.host import Host
from devns.launch import Child, started
from devns.plan import make_plan
from devns.spec import Root, Spec
from devns.workflow import explain
from devns_network import engine
from devns_network.plugin import NetworkTable, devns_plan

REMOTE, REMOTE6 = "203.0.113.10", "2001:db8:99::10"
NEIGHBOUR = "198.18.0.2"  # the remote host on the wire that it shares with the host
HOST, HOST6 = "198.18.0.1", "2001:db8:18::1"
METADATA = "169.254.169.254"
DEAD, BLACK_HOLE, UNREACHABLE, PROHIBITED = "198.18.0.77", "198.18.0.66", "198.51.100.1", "198.51.100.65"
_PATIENCE = 60  # seconds that a process of the laboratory may take

_HOST = f"""
link set lo up
link add h0 type veth peer name r0 netns {{remote}}
addr add {HOST}/24 dev h0
addr add {HOST6}/64 dev h0 nodad
link set h0 mtu 65520 up
"""
_ROUTES = f"""
route add default via {NEIGHBOUR}
-6 route add default via 2001:db8:18::2
route add unreachable {UNREACHABLE}
route add prohibit {PROHIBITED}
neigh add {BLACK_HOLE} lladdr 02:00:00:00:00:66 dev h0
"""
_REMOTE = f"""
link set lo up
addr add {NEIGHBOUR}/24 dev r0
addr add 2001:db8:18::2/64 dev r0 nodad
link set r0 mtu 65520 up
addr add {REMOTE}/32 dev lo
addr add {METADATA}/32 dev lo
-6 addr add {REMOTE6}/128 dev lo nodad
"""


class Lab:
    def __init__(self, directory: Path, over: Mapping[str, str]) -> None:
        self._directory = directory
        self._over = {**over, str(directory / "resolv.conf"): os.path.realpath("/etc/resolv.conf")}
        self._pids: list[int] = []
        self._spaces: dict[str, list[tuple[int, int]]] = {}
        self.resolv_conf = directory / "resolv.conf"
        self.resolv_conf.write_text("nameserver 127.0.0.53\nsearch lab.example\n")

    def open(self) -> None:
        user, group = os.getuid(), os.getgid()

        def make_host() -> None:
            linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNET | linux.CLONE_NEWNS)
            map_to(0, user, group)
            linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)
            for source, target in self._over.items():
                linux.mount(source, target, None, 4096)  # MS_BIND

        host = self._stay([], make_host)
        everything = [("user", linux.CLONE_NEWUSER), ("net", linux.CLONE_NEWNET), ("mnt", linux.CLONE_NEWNS)]
        self._spaces["host"] = _opened(host, everything)
        remote = self._stay(self._spaces["host"], lambda: _unshare(linux.CLONE_NEWNET))
        self._spaces["remote"] = [*_opened(host, [everything[0], everything[2]]), *_opened(remote, [everything[1]])]
        self.on("host", _ip, _HOST.format(remote=remote))
        self.on("remote", _ip, _REMOTE)
        self.on("host", _ip, _ROUTES)
        self.on("host", _write, "/proc/sys/net/ipv4/ping_group_range", "0 0")
        self.start("host", serve_names)
        self.start("remote", serve_all)

    def close(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for rows in self._spaces.values():
            for fd, _kind in rows:
                os.close(fd)

    # --- processes ----------------------------------------------------------------------------------------------------

    def on(self, side: str, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` returns, a literal, on the "host" or the "remote" side; on the "user" side it is on the host
        and has no privilege there."""
        ear, mouth = os.pipe2(os.O_CLOEXEC)
        pid = self._fork(side, lambda: _said(mouth, function, args))
        os.close(mouth)
        with os.fdopen(ear, "rb") as file:
            words = file.read().decode()
        os.waitpid(pid, 0)
        if not words.startswith("="):
            raise AssertionError(f"{getattr(function, '__name__', function)}: {words or 'it ended'}")
        return ast.literal_eval(words[1:])

    def start(self, side: str, function: Callable[..., Any], *args: Any) -> int:
        """Run `function`, which calls its first argument when it is ready, until the laboratory closes; its pid."""
        ear, mouth = os.pipe2(os.O_CLOEXEC)
        pid = self._fork(side, lambda: function(lambda: os.close(mouth), *args), patience=0)
        os.close(mouth)
        os.read(ear, 1)
        os.close(ear)
        self._pids.append(pid)
        return pid

    def inside(
        self,
        function: Callable[..., Any],
        *args: Any,
        drive: Callable[..., Any] | None = None,
        notes: list[str] | None = None,
        **table: Any,
    ) -> Any:
        """What `function` returns, run in an environment with [network] `mode = "user"` and `table`, on the host.

        With `drive` the function has a descriptor more, in front, and `drive(engine, ear)` runs beside it on the host:
        it is told the engine's pid and hears what is written to that descriptor. Then it is a pair of both values.
        """
        options = ({"mode": "user", **table}, function, args, drive)
        value, driven, said = self.on("user", enter, str(self._directory), *options)
        if notes is not None:
            notes += said
        return value if drive is None else (value, driven)

    def wired(self, function: Callable[..., Any], *args: Any, **step: Any) -> Any:
        """What `function` returns, run where there is nothing but the engine's network, with every power over it."""
        return self.on("user", _wire, function, args, step)

    def _fork(self, side: str, run: Callable[[], object], patience: int = _PATIENCE) -> int:
        pid = os.fork()
        if pid == 0:

            def go() -> None:
                signal.alarm(patience)
                self._go(side)
                run()

            _end(go)
        return pid

    def _go(self, side: str) -> None:
        os.setpgid(0, 0)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        for fd, kind in self._spaces["host" if side == "user" else side]:
            linux.setns(fd, kind)
        if side == "user":
            linux.unshare(linux.CLONE_NEWUSER)
            map_to(_USER, 0, 0)
            linux.set_capabilities(())
        linux.prctl(linux.PR_SET_DUMPABLE, 1)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)

    def _stay(self, spaces: list[tuple[int, int]], prepare: Callable[[], object]) -> int:
        """A process that is there for its namespaces."""

        def stay(ready: Callable[[], None]) -> None:
            for fd, kind in spaces:
                linux.setns(fd, kind)
            prepare()
            linux.prctl(linux.PR_SET_DUMPABLE, 1)
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            ready()
            signal.pause()

        self._spaces["here"] = []
        return self.start("here", stay)


_USER = 1000


def _end(run: Callable[[], object]) -> NoReturn:
    try:
        run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _said(mouth: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        words = f"={function(*args)!r}"
    except BaseException:
        words = traceback.format_exc()
    with os.fdopen(mouth, "wb") as file:
        file.write(words.encode())


def map_to(inside: int, user: int, group: int) -> None:
    """In a new user namespace: be `inside`, and that one alone."""
    for name, text in {"setgroups": "deny", "uid_map": f"{inside} {user} 1", "gid_map": f"{inside} {group} 1"}.items():
        _write(f"/proc/self/{name}", text)


def _unshare(flags: int) -> None:
    linux.unshare(flags)


def _opened(pid: int, kinds: list[tuple[str, int]]) -> list[tuple[int, int]]:
    return [(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC), kind) for name, kind in kinds]


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _ip(script: str) -> None:
    for line in script.strip().splitlines():
        words = [*(["-6"] if line.startswith("-6") else []), *line.removeprefix("-6 ").split()]
        subprocess.run(["ip", *words], check=True)


def enter(
    directory: str,
    table: Mapping[str, Any],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    drive: Callable[..., Any] | None,
) -> Any:
    """In an environment on the laboratory's host: the value, what came of `drive`, and what the user was told."""
    host = Host.probe()
    host = replace(host, environ={**host.environ, "DEVNS_STORE": f"{directory}/store"})
    tables: dict[type, Any] = {NetworkTable: decode(NetworkTable, dict(table), At("t.toml", "network"))}
    spec = Spec("box", "box", root=Root(writable="discard"), tables=tables)
    plan = make_plan(spec, host, [*Base().devns_plan(spec, host), *devns_plan(spec, host)])
    notes: list[str] = []
    ear, mouth = os.pipe2(os.O_CLOEXEC)
    given = (mouth, *args) if drive else args
    options: dict[str, Any] = {"note": notes.append, "explain": explain(host), "keep": [mouth] if drive else []}
    driven = None
    with started(plan, call=lambda: repr(function(*given)), **options) as running:
        os.close(mouth)
        if drive:
            driven = drive(engine_beside(running.pid), ear)
        running.wait(forward=False)
    return ast.literal_eval(str(running.result)), driven, notes


def _wire(function: Callable[..., Any], args: tuple[Any, ...], more: Mapping[str, Any]) -> Any:
    """In bare namespaces with the engine's network and every capability over it: the value."""
    ear, mouth = os.pipe2(os.O_CLOEXEC)
    value, spoken = os.pipe2(os.O_CLOEXEC)
    go, gone = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:

        def run() -> None:
            linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNET)
            map_to(0, _USER, _USER)
            os.close(mouth)
            os.close(gone)
            os.read(go, 1)
            _said(spoken, function, args)

        _end(run)
    for fd in (mouth, spoken, go):
        os.close(fd)
    os.read(ear, 1)
    rules: dict[str, Any] = {"publish": [], "host_loopback": [], "allow": None, "deny": []}
    with engine.hold({"op": "", **rules, **more}, Child(pid, lambda text: None)):
        os.close(gone)
        with os.fdopen(value, "rb") as file:
            words = file.read().decode()
        os.waitpid(pid, 0)
    os.close(ear)
    assert words.startswith("="), words
    return ast.literal_eval(words[1:])


def engine_beside(child: int) -> int:
    """The engine of a launch of this process: its other child."""
    return next(pid for pid in children(os.getpid()) if pid != child)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- the remote host's servers ----------------------------------------------------------------------------------------

ECHO, HALF, RESET, PEER, SILENT, LARGE = 7, 9001, 9002, 9003, 9004, 9005  # what each port does
CLOSED = 81


def serve_all(ready: Callable[[], None]) -> None:
    import threading

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    last: dict[str, str] = {}

    def half(client: socket.socket) -> None:
        """Read to the end, then answer: the other half is still open."""
        data = read_all(client)
        client.sendall(b"got %d" % len(data))

    def reset(client: socket.socket) -> None:
        client.recv(1)
        client.sendall(b"before")
        time.sleep(0.05)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def echo(client: socket.socket) -> None:
        while data := client.recv(1 << 16):
            client.sendall(data)

    def peer(client: socket.socket) -> None:
        client.sendall(client.getpeername()[0].encode())

    def silent(client: socket.socket) -> None:
        """How the client's side ends is told to the next one."""
        client.sendall(last.get("end", "").encode() + b"\n")
        try:
            read_all(client)
            last["end"] = "end"
        except OSError as error:
            last["end"] = error.strerror or ""

    def large(client: socket.socket) -> None:
        count = int.from_bytes(client.recv(8, socket.MSG_WAITALL), "big")
        block = bytes(range(256)) * 256
        while count:
            count -= client.send(block[: min(count, len(block))])

    def serve(port: int, behave: Callable[[socket.socket], None]) -> None:
        listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)

        def attend(client: socket.socket) -> None:
            with contextlib.suppress(OSError), client:
                behave(client)

        def accept() -> None:
            while True:
                threading.Thread(target=attend, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()

    behaviours = {ECHO: echo, HALF: half, RESET: reset, PEER: peer, SILENT: silent, LARGE: large, 80: peer}
    for port, behave in behaviours.items():
        serve(port, behave)
    ready()
    serve_datagrams(ECHO, lambda data: data)


def serve_datagrams(port: int, reply: Callable[[bytes], bytes]) -> NoReturn:
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    datagrams.setsockopt(socket.IPPROTO_IPV6, 49, 1)  # IPV6_RECVPKTINFO: the answer comes from where it was asked
    datagrams.bind(("", port))
    while True:
        data, ancillary, _flags, sender = datagrams.recvmsg(1 << 16, 256)
        with contextlib.suppress(OSError):
            rows = [row for row in ancillary if row[1] == socket.IPV6_PKTINFO]
            datagrams.sendmsg([reply(data)], rows, 0, sender)


def read_all(client: socket.socket) -> bytes:
    parts = []
    while data := client.recv(1 << 16):
        parts.append(data)
    return b"".join(parts)


# --- the host's resolver ----------------------------------------------------------------------------------------------

Records = list[tuple[str, int, int, str]]  # owner, type, ttl, data
_A, _CNAME, _AAAA = 1, 5, 28
ZONE: Records = [
    ("good.example", _A, 300, REMOTE),
    ("good.example", _AAAA, 300, REMOTE6),
    ("short.example", _A, 0, REMOTE),
    ("www.wild.example", _A, 300, REMOTE),
    ("alias.example", _CNAME, 300, "step.example"),
    ("step.example", _CNAME, 300, "end.example"),
    ("end.example", _A, 300, REMOTE),
    ("tracked.example", _CNAME, 300, "bad.example"),
    ("bad.example", _A, 300, REMOTE),
    ("loop.example", _A, 300, "127.0.0.1"),
    ("cloud.example", _A, 300, METADATA),
    ("own.example", _A, 300, HOST),
    ("other.example", _A, 300, NEIGHBOUR),
]


def serve_names(ready: Callable[[], None], address: str = "127.0.0.53", zone: Records = ZONE) -> None:
    """A resolver, over UDP and TCP, that knows a few names."""
    import threading

    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind((address, 53))
    listener = socket.create_server((address, 53))

    def accept() -> None:
        while True:
            client, _peer = listener.accept()
            with contextlib.suppress(OSError), client:
                while length := client.recv(2, socket.MSG_WAITALL):
                    reply = answer(client.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL), zone)
                    client.sendall(len(reply).to_bytes(2, "big") + reply)

    threading.Thread(target=accept, daemon=True).start()
    ready()
    while True:
        query, sender = datagrams.recvfrom(4096)
        datagrams.sendto(answer(query, zone), sender)


def answer(query: bytes, zone: Records) -> bytes:
    labels, place = [], 12
    while query[place]:
        labels.append(query[place + 1 : place + 1 + query[place]].decode())
        place += 1 + query[place]
    name, kind = ".".join(labels).lower(), int.from_bytes(query[place + 1 : place + 3], "big")
    names, rows = [name], []
    while names:
        now = names.pop()
        for owner, type_, ttl, data in zone:
            if owner == now and type_ in (kind, _CNAME):
                rows.append(
                    encode(owner) + struct.pack(">HHIH", type_, 1, ttl, len(raw(type_, data))) + raw(type_, data)
                )
                names += [data] if type_ == _CNAME else []
    known = any(owner == name for owner, *_rest in zone)
    head = query[:2] + bytes([0x81, 0x80 if known else 0x83]) + struct.pack(">HHHH", 1, len(rows), 0, 0)
    return head + query[12 : place + 5] + b"".join(rows)


def encode(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"


def raw(kind: int, data: str) -> bytes:
    if kind == _CNAME:
        return encode(data)
    return socket.inet_pton(socket.AF_INET if kind == _A else socket.AF_INET6, data)


def serve_canaries(ready: Callable[[], None], port: int) -> None:
    """Listen on every address of this side: whoever connects is told that it should not have been possible."""
    import threading

    listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)

    def accept() -> None:
        while True:
            client, _peer = listener.accept()
            with contextlib.suppress(OSError), client:
                client.sendall(b"canary")

    threading.Thread(target=accept, daemon=True).start()
    ready()
    serve_datagrams(port, lambda data: b"canary")


@contextlib.contextmanager
def opened(directory: Path, over: Mapping[str, str] = MappingProxyType({})) -> Iterator[Lab]:
    """A laboratory; `over` are files to mount over others on its host."""
    lab = Lab(directory, over)
    try:
        lab.open()
        yield lab
    finally:
        lab.close()
