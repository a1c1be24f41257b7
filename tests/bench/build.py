"""How long a Debian root takes, next to mmdebstrap: the same packages, already downloaded, the same machine, in turns.

    python -m tests.bench.build [--rounds 5] [--template py311] [--json FILE]

Both get every package from the disk and the indexes from the mirror. mmdebstrap runs as fast as it can
(`--mode=unshare --variant=apt`, dpkg's force-unsafe-io); devns builds the template's first layer into an empty store,
once with each id map. CPU is that of all processes of a run, user and system. Nothing is asserted.

What a run made stays until the end: for each new file ext4 passes over inodes that were deleted in the last minutes,
one by one, and whoever comes after a deletion would pay for it (recently_deleted() in fs/ext4/ialloc.c).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from devns import sealed, spec, template
from devns.debian import archive
from devns.host import Host
from devns.sources.debian import ARCHITECTURES

CHECKOUT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.build", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--template", default="py311")
    parser.add_argument("--json", metavar="FILE", help="write the samples there")
    options = parser.parse_args()
    host = Host.probe()
    made = spec.make_spec(template.load(options.template, host), {})
    suite = made.root.source.removeprefix("debian:")
    work = tempfile.mkdtemp(prefix="devns-bench-", dir="/var/tmp")
    os.chmod(work, 0o755)  # mmdebstrap's subordinate ids look into it
    try:
        cache = f"{work}/cache"
        selection = archive.select(
            suite, made.root.packages, architecture=ARCHITECTURES[host.machine], host=host, cache=cache
        )
        debs = archive.fetch(selection, host=host, cache=cache)
        os.mkdir(f"{work}/archives")
        for package in selection.packages:
            name = f"{package.name}_{package.version.replace(':', '%3a')}_{package.architecture}.deb"
            os.link(debs[package.name], f"{work}/archives/{name}")
        Path(f"{work}/debian.sources").write_text(selection.sources)
        os.chmod(f"{work}/archives", 0o755)
        contestants = {f"devns {map}": _devns(map, options.template) for map in ("single", "range")}
        if shutil.which("mmdebstrap"):
            names = ",".join(package.name for package in selection.packages)
            contestants["mmdebstrap"] = _mmdebstrap(suite, names, work)
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
        for number in range(options.rounds):
            for name, command in contestants.items():
                place = f"{work}/{len(samples[name])}-{name.replace(' ', '-')}"
                samples[name].append(_measured(command, place, work))
                print(f"round {number + 1}: {name}: {_shown(samples[name][-1])}", flush=True)
        _report(samples, contestants, len(selection.packages), selection.size)
        if options.json:
            Path(options.json).write_text(json.dumps(samples, indent=1))
    finally:
        sealed.delete(work, host)


def _devns(map: str, template: str) -> list[str]:
    return [sys.executable, "-m", "devns", "build", "--map", map, template]


def _mmdebstrap(suite: str, names: str, work: str) -> list[str]:
    return [
        *("mmdebstrap", "--quiet", "--mode=unshare", "--variant=apt", f"--include={names}"),
        *("--dpkgopt=force-unsafe-io", "--skip=download/empty"),
        '--setup-hook=mkdir -p "$1"/var/cache/apt/archives/partial',
        f"--setup-hook=sync-in {work}/archives /var/cache/apt/archives",
        *(suite, "out", f"{work}/debian.sources"),
    ]


def _measured(command: Sequence[str], place: str, work: str) -> dict[str, float]:
    """Run it in the new directory `place`: "wall" and "cpu" in seconds, "memory" in MiB of all processes at once."""
    os.mkdir(place, 0o755)
    environ = {**os.environ, "DEVNS_STORE": f"{place}/store", "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT}/plugins"}
    os.makedirs(f"{place}/store", mode=0o700)
    shutil.copytree(f"{work}/cache", f"{place}/store/cache", copy_function=os.link)
    os.chmod(f"{place}/store/cache", 0o700)
    os.sync()
    before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0.0
    with open(f"{place}/log", "wb") as file:
        process = subprocess.Popen(command, env=environ, stdout=file, stderr=file, cwd=place)
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.1)
    wall = time.monotonic() - start
    if process.returncode:
        said = Path(f"{place}/log").read_text(errors="replace")[-3000:]
        sys.exit(f"{' '.join(command)[:200]} ended with {process.returncode}:\n{said}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu, "memory": peak}


def _memory(pid: int) -> float:
    """MiB of a process and all below it, what they share counted once for all who share it: Pss, proc_pid_smaps(5).
    Of what belongs to other ids, whose maps nobody else may read, the resident pages."""
    total = 0.0
    with contextlib.suppress(OSError):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024
        except PermissionError:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1048576
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += _memory(int(child))
    return total


def _shown(sample: dict[str, float]) -> str:
    return f"{sample['wall']:.1f} s, {sample['cpu']:.1f} s of CPU, {sample['memory']:.0f} MiB"


def _report(
    samples: dict[str, list[dict[str, float]]], contestants: dict[str, list[str]], count: int, size: int
) -> None:
    middle = {
        name: {key: statistics.median(sample[key] for sample in rows) for key in rows[0]}
        for name, rows in samples.items()
    }
    base = middle.get("mmdebstrap")
    rounds = len(samples["devns single"])
    print(f"\n{count} packages, {size / 1e6:.1f} MB, {os.cpu_count()} processors; medians of {rounds}")
    for name, row in middle.items():
        ratio = f"  {row['wall'] / base['wall']:.2f}x wall  {row['cpu'] / base['cpu']:.2f}x CPU" if base else ""
        print(f"  {name:14} {_shown(row)}{ratio}")
    for command in contestants.values():
        print("  $", " ".join(command)[:400])
    if not base:
        print("  mmdebstrap is not installed: nothing to compare with")


if __name__ == "__main__":
    main()
