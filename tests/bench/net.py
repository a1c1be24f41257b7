"""How fast the engines of [network] mode = "user" are: python -m tests.bench.net [ROUNDS] [ENGINE ...]

Each round runs every engine in turn, in the tests' laboratory of namespaces, against an iperf3 server on its remote
host; "direct" is the same without an engine. Printed are medians, their ratio to direct, and the processor time of the
engine's own process. Nothing is asserted: on a busy machine only the ratios mean something.

pasta and slirp4netns need a tap device. Where /dev/net/tun is closed, root can lend a node of the benchmark's own, and
takes it away afterwards:  sudo mknod -m 666 /tmp/tun c 10 200; DEVNS_BENCH_TUN=/tmp/tun python -m tests.bench.net
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from devns import linux
from devns.launch import Child
from devns_network import engine, helper
from tests.kernel import lab as labs

_PORT = 5201
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
Row = dict[str, float]


# --- what is measured, inside -----------------------------------------------------------------------------------------


def stream(*options: str) -> Row:
    """Gbit/s and GB of one second of iperf3."""
    words = ["iperf3", "-c", labs.REMOTE, "-p", str(_PORT), "-t", "1", "-J", *options]
    report = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    end = report["end"]["sum_received"]
    return {"Gbit/s": end["bits_per_second"] / 1e9, "GB": end["bytes"] / 1e9}


def datagrams() -> Row:
    words = ["iperf3", "-c", labs.REMOTE, "-p", str(_PORT), "-t", "1", "-J", "-u", "-b", "200M", "-l", "1400"]
    end = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)["end"]["sum"]
    return {"lost %": end["lost_percent"], "thousand": (end["packets"] - end["lost_packets"]) / 1e3}


def connections(at_once: int, seconds: float = 1.0) -> Row:
    """Connect, a byte there and back, close: how many in a second."""
    poll, done, began = select.epoll(), 0, time.monotonic()
    clients: dict[int, socket.socket] = {}
    ports = 0
    while (now := time.monotonic()) < began + seconds or clients:
        while len(clients) < at_once and now < began + seconds:
            client = socket.socket()
            client.setblocking(False)
            # Many addresses: connections that have ended keep their ports for a minute.
            client.connect_ex((f"203.0.113.{20 + ports % 64}", labs.ECHO))
            ports += 1
            clients[client.fileno()] = client
            poll.register(client, select.EPOLLOUT)
        for fd, events in poll.poll(1):
            if events & select.EPOLLIN:
                if clients[fd].recv(1) == b"x":
                    done += 1
                clients.pop(fd).close()
            elif events & select.EPOLLOUT:
                clients[fd].send(b"x")
                poll.modify(fd, select.EPOLLIN)
    return {"per s": done / (time.monotonic() - began), "thousand": done / 1e3}


def replies(seconds: float = 1.0) -> Row:
    """One byte there and back on one connection, again and again."""
    with socket.create_connection((labs.REMOTE, labs.ECHO)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        taken, until = [], time.monotonic() + seconds
        while (before := time.monotonic()) < until:
            client.send(b"x")
            client.recv(1)
            taken.append(time.monotonic() - before)
    return {"us": statistics.median(taken) * 1e6, "thousand": len(taken) / 1e3}


def first_byte() -> Row:
    with socket.create_connection((labs.REMOTE, labs.PEER)) as client:
        client.recv(1)
    return {}


MEASURES: dict[str, tuple[str, Callable[[], Row]]] = {
    "up, 1 stream": ("Gbit/s", lambda: stream()),
    "down, 1 stream": ("Gbit/s", lambda: stream("-R")),
    "up, 8 streams": ("Gbit/s", lambda: stream("-P", "8")),
    "down, 8 streams": ("Gbit/s", lambda: stream("-P", "8", "-R")),
    "connections, 1 at a time": ("per s", lambda: connections(1)),
    "connections, 16 at once": ("per s", lambda: connections(16)),
    "byte there and back": ("us", replies),
    "datagrams, 200 Mbit/s": ("lost %", datagrams),
    "start to first byte": ("ms", first_byte),
}


# --- the engines ------------------------------------------------------------------------------------------------------


def measure(name: str, what: str) -> Row:
    """One measure with one engine: what it gave, and what the engine's process used for it."""
    began = time.monotonic()
    if name == "direct":
        return MEASURES[what][1]() | {"ms": (time.monotonic() - began) * 1e3}
    (value, spoken), (go, gone), (entered, enter) = os.pipe(), os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNET)
            labs.map_to(0, 1000, 1000)
            os.close(gone)
            os.write(enter, b"x")
            os.read(go, 1)
            linux.prctl(linux.PR_SET_DUMPABLE, 1)
            os.write(spoken, json.dumps(MEASURES[what][1]()).encode())
        os._exit(0)
    os.close(spoken)
    os.close(go)
    os.read(entered, 1)
    with held(name, Child(pid, print)) as process:
        before = used(process)
        os.close(gone)
        with os.fdopen(value) as file:
            words = file.read()
        row: Row = json.loads(words) if words else {}
        after = used(process)
        row |= {"cpu": after["cpu"] - before["cpu"], "MB": after["MB"], "ms": (time.monotonic() - began) * 1e3}
    os.waitpid(pid, 0)
    os.close(entered)
    os.close(enter)
    return row


@contextlib.contextmanager
def held(name: str, child: Child) -> Iterator[int]:
    step: dict[str, Any] = {"publish": [], "host_loopback": [], "allow": None, "deny": []}
    if name == "built-in":
        with engine.hold(step, child):
            yield labs.engine_beside(child.pid)
    else:
        with helper.hold({**step, "engine": name, "program": shutil.which(name)}, child):
            guard = labs.engine_beside(child.pid)
            yield labs.children(guard)[0]


def used(pid: int) -> Row:
    """Seconds of processor time so far, and the MB that only this process has."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    _size, resident, shared, *_rest = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return {"cpu": (int(fields[11]) + int(fields[12])) / _TICK, "MB": (resident - shared) * _PAGE / 1e6}


# --- the table --------------------------------------------------------------------------------------------------------


def table(results: dict[tuple[str, str], list[Row]], names: list[str]) -> Iterator[str]:
    for what, (unit, _function) in MEASURES.items():
        yield f"\n{what} ({unit}; ratio to direct; processor time of the engine)"
        direct = median(results[what, "direct"], unit)
        for name in names:
            rows = results[what, name]
            value = median(rows, unit)
            line = f"  {name:12} {value:9.2f}"
            if direct and value:
                line += f"  {value / direct:5.2f}"
            for amount, per in (("GB", "s per GB"), ("thousand", "ms per thousand")):
                spent = [row["cpu"] / row[amount] for row in rows if row.get(amount) and "cpu" in row]
                if spent:
                    cost = statistics.median(spent) * (1e3 if amount == "thousand" else 1)
                    line += f"  {cost:7.2f} {per}"
            memory = [row["MB"] for row in rows if "MB" in row]
            yield line + (f"  {statistics.median(memory):5.1f} MB" if memory else "")


def median(rows: list[Row], unit: str) -> float:
    return statistics.median([row[unit] for row in rows if unit in row] or [0])


def main(rounds: int, wanted: list[str]) -> None:
    missing = [name for name in ("iperf3", "ip") if shutil.which(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}")
    tun = os.environ.get("DEVNS_BENCH_TUN", "/dev/net/tun")
    helpers = [name for name in ("pasta", "slirp4netns") if shutil.which(name) and os.access(tun, os.R_OK | os.W_OK)]
    names = ["direct", *(wanted or ["built-in", *helpers])]
    with tempfile.TemporaryDirectory() as directory, labs.opened(Path(directory), {tun: "/dev/net/tun"}) as lab:
        lab.start("remote", serve)
        time.sleep(0.5)  # until iperf3 listens
        results: dict[tuple[str, str], list[Row]] = {(what, name): [] for what in MEASURES for name in names}
        for number in range(rounds):
            for what, name in results:
                results[what, name].append(lab.on("user", measure, name, what))
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    print(f"{rounds} rounds, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    print("\n".join(table(results, names)))


def serve(ready: Callable[[], None]) -> NoReturn:
    for number in range(64):
        subprocess.run(["ip", "addr", "add", f"203.0.113.{20 + number}/32", "dev", "lo"], check=True)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    ready()
    os.execvp("iperf3", ["iperf3", "-s", "-B", labs.REMOTE, "-p", str(_PORT)])  # so that it is ended as this process is


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, sys.argv[2:])
