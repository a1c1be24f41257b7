"""A Debian root made of its packages: unpacked while they arrive, configured by the dpkg in it, caches made last.

Of what dpkg's scripts do while they configure, half the time goes into caches: byte code, and the hashed links to
certificates, which ca-certificates makes twice. Nothing that is configured reads them. So the programs that make them
are told "later" for that while, and are run when dpkg has finished: each request once, on all processors. What lies
over them is mounted, and gone with the mounts: the tree never holds anything but Debian's own.
"""

from __future__ import annotations

import glob
import os
import shlex
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from devns import sealed, trees, unpack
from devns.debian import archive
from devns.errors import DevnsError
from devns.ops import bind, dev, file, proc, tmpfs

if TYPE_CHECKING:
    from devns.debian.archive import Selection
    from devns.debian.index import Package
    from devns.host import Host
    from devns.progress import Progress
    from devns.sealed import Place

ENV = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "DEBCONF_NONINTERACTIVE_SEEN": "true",
}
_SCRIPT_ENV = {"DPKG_MAINTSCRIPT_NAME": "preinst", "DPKG_ROOT": ""}
# Nothing is started while it is installed: there is no init that could. invoke-rc.d(8)
NO_SERVICES = "#!/bin/sh\nexit 101\n"
# timeout(1), of coreutils, which is Essential. Thousands of packages on a slow machine take less.
_PATIENCE = "3h"
# Packages whose preinst others lean on: the first accounts, then the C library. The rest have no order among them.
_FIRST = ("base-passwd", "libc6")


def install(
    selection: Selection, place: Place, host: Host, cache: str, progress: Progress, *, map: str, built: int
) -> None:
    """Fetch what is selected, and make of it the tree of `place`. `built` is when it counts as made, in seconds since
    the epoch: whoever makes the same another day makes the same tree."""
    preinsts = _unpack(selection, place.root, host, cache, progress, map=map, built=built)
    later = f"{place.scratch}/later"
    os.mkdir(later, 0o700)
    _configure(selection, place.root, later, host, preinsts, progress, map=map, built=built)
    _catch_up(place.root, later, host, progress, map=map, built=built)


# --- fetch and unpack -------------------------------------------------------------------------------------------------


def _unpack(
    selection: Selection, root: str, host: Host, cache: str, progress: Progress, *, map: str, built: int
) -> list[str]:
    """Unpack all packages in a process that sees nothing but them and the new root, each as soon as it is verified;
    returns who has a preinst."""
    os.makedirs(f"{cache}/debs", mode=0o700, exist_ok=True)
    plan = sealed.sealed_plan(
        host,
        map=map,
        inside=[tmpfs("/"), bind(root, "/root", readonly=False), bind(f"{cache}/debs", "/debs")],
    )
    debs = [(archive.path_of(package, ""), package.name, package.version) for package in selection.packages]
    workers, owners = len(os.sched_getaffinity(0)), map == "range"

    def call() -> str:
        if owners:
            os.chown("/root", 0, 0)
        os.chmod("/root", 0o755)  # noqa: S103  # what / is everywhere
        records = unpack.unpack_debs(
            debs,
            "/root",
            architecture=selection.architecture,
            built=built,
            owners=owners,
            workers=workers,
            report=_report,
            arrivals=arrivals.ear,
        )
        return " ".join(record.key for record in records if "preinst" in record.scripts)

    with _Arrivals(selection, host, cache, progress) as arrivals:
        keys = sealed.run_sealed(
            plan, host, call=call, line=arrivals.unpacked, keep=[arrivals.ear], beside=arrivals.fetching
        ).split()
    return sorted(keys, key=lambda key: (*(key.partition(":")[0] != name for name in _FIRST), key))


def _report(record: unpack.DebRecord) -> None:
    """One line a package, for the parent to count."""
    os.write(1, f"{record.key}\n".encode())


class _Arrivals:
    """What is fetched while it is unpacked: `ear` is where the one who unpacks hears of each package that is there."""

    def __init__(self, selection: Selection, host: Host, cache: str, progress: Progress) -> None:
        self._selection, self._host, self._cache, self._progress = selection, host, cache, progress
        self._places = {package.name: place for place, package in enumerate(selection.packages)}
        self._unpacked = 0
        self._fetched = False

    def __enter__(self) -> _Arrivals:
        self.ear, self._mouth = os.pipe2(os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.ear)
        self._shut()

    @contextmanager
    def fetching(self, watch: sealed.Watch) -> Iterator[None]:
        """Fetch, and pass on what comes."""

        def take() -> None:
            if downloads.take():
                del watch[downloads.fileno()]
                self._shut()
                self._fetched = True
                self._progress.stage("unpack", total=len(self._places), unit="packages")
                self._progress.advance(self._unpacked)

        with archive.fetching(
            self._selection, host=self._host, cache=self._cache, progress=self._progress, ready=self._pass_on
        ) as downloads:
            watch[downloads.fileno()] = take
            yield

    def unpacked(self, line: str) -> None:
        self._unpacked += 1
        if self._fetched:
            self._progress.advance()

    def _pass_on(self, package: Package) -> None:
        with suppress(BrokenPipeError):  # who unpacks has ended, and its status will say why
            os.write(self._mouth, self._places[package.name].to_bytes(unpack.ARRIVAL, sys.byteorder))

    def _shut(self) -> None:
        if self._mouth >= 0:
            os.close(self._mouth)
            self._mouth = -1


# --- configure --------------------------------------------------------------------------------------------------------


def _configure(
    selection: Selection,
    root: str,
    later: str,
    host: Host,
    preinsts: Sequence[str],
    progress: Progress,
    *,
    map: str,
    built: int,
) -> None:
    """Run each preinst, then `dpkg --configure -a`, in the new root itself."""
    progress.stage("configure", total=len(selection.packages), unit="packages")
    made = {
        "/etc/apt/sources.list.d/debian.sources": selection.sources,
        **selection.files,
        "/etc/apt/apt.conf.d/00devns": apt_conf(map),
        # An interrupted install is repeated, never half trusted; and in an overlay each fsync is dear.
        "/etc/dpkg/dpkg.cfg.d/devns": "force-unsafe-io\n",
        "/usr/sbin/policy-rc.d": NO_SERVICES,
    }
    inside = [
        *_opened(root, later),
        *_postponed(host.realpath(root)),
        file("/run/devns/configure", _script(selection, preinsts, list(made), built)),
        *files(made.values()),
        *(bind(path, f"/run/devns/lists/{name}") for name, path in selection.lists.items()),
    ]
    plan = sealed.sealed_plan(
        host, map=map, inside=inside, argv=patient("/run/devns/configure"), env={**ENV, **_SCRIPT_ENV}
    )

    def line(text: str) -> None:
        if text.startswith("Setting up "):
            progress.advance()

    sealed.run_sealed(plan, host, line=line)


def patient(script: str, patience: str = _PATIENCE) -> list[str]:
    """What runs `script` and ends it when it hangs. What it started ends with its PID namespace."""
    said = f"stopped: not done in {patience}: one of its packages' scripts hangs"
    watch = f'timeout --kill-after=10 {patience} /bin/sh "$0" || {{ s=$?; [ $s -ne 124 ] || echo "{said}"; exit $s; }}'
    return ["/bin/sh", "-c", watch, script]


def tidy(built: int) -> tuple[str, ...]:
    """Commands that take away what only this build knows: it does not belong to a layer that others share."""
    # useradd(8) writes down the day. (SOURCE_DATE_EPOCH would tell it another, and make Python compile byte code whose
    # source is hashed on each import.)
    days = f"awk -F: -v OFS=: -v day={built // 86400} '$3 > day {{ $3 = day }} {{ print }}' /etc/shadow"
    return (
        "[ ! -e /etc/machine-id ] || : > /etc/machine-id",
        "rm -f /var/log/*.log /var/log/apt/*.log /var/log/apt/*.xz",
        "rm -f /var/lib/systemd/random-seed /var/lib/dbus/machine-id",
        "rm -f /var/lib/dpkg/*-old /var/cache/debconf/*-old /var/cache/apt/*.bin /var/cache/ldconfig/aux-cache",
        "rm -f /etc/passwd- /etc/shadow- /etc/group- /etc/gshadow- /etc/subuid- /etc/subgid- /etc/.pwd.lock",
        f"[ ! -e /etc/shadow ] || {{ {days} > /run/shadow; cat /run/shadow > /etc/shadow; rm /run/shadow; }}",
    )


def _opened(root: str, later: str) -> list[dict[str, Any]]:
    """The new root as `/`, to be written in, and the directory of what is put off."""
    return [
        bind(root, "/", readonly=False, own=True),
        proc(),
        dev(),
        tmpfs("/tmp", mode=0o1777),
        tmpfs("/run"),
        bind(later, _LATER, readonly=False),
    ]


def apt_conf(map: str) -> str:
    """With one mapped id apt cannot become its own user to download; it stays root, who is you."""
    return 'APT::Sandbox::User "root";\n' if map == "single" else ""


def files(texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Files that are ours, where `copies` finds them."""
    for number, text in enumerate(texts):
        yield file(f"/run/devns/files/{number}", text)


def copies(paths: Sequence[str]) -> Iterator[str]:
    """Each of them to its place in the layer."""
    for number, path in enumerate(paths):
        yield f"mkdir -p {shlex.quote(os.path.dirname(path))}; cp /run/devns/files/{number} {shlex.quote(path)}"


def _script(selection: Selection, preinsts: Sequence[str], paths: Sequence[str], built: int) -> str:
    """What runs inside, readable: the files that are ours, the preinsts, the configuration, and a tidy end."""
    lines = ["set -eu", "umask 022", *copies(paths)]
    lines += ["chmod 755 /usr/sbin/policy-rc.d", f"export DPKG_MAINTSCRIPT_ARCH={selection.architecture}"]
    versions = {package.name: package.version for package in selection.packages}
    lines.append(f"export DPKG_RUNNING_VERSION={shlex.quote(versions['dpkg'])}")
    for owner in preinsts:
        script = shlex.quote(f"/var/lib/dpkg/info/{owner}.preinst")
        lines.append(f"DPKG_MAINTSCRIPT_PACKAGE={shlex.quote(owner.partition(':')[0])} {script} install")
    lines += [
        "unset DPKG_MAINTSCRIPT_ARCH DPKG_MAINTSCRIPT_NAME DPKG_RUNNING_VERSION DPKG_ROOT",
        "dpkg --configure -a --force-depends",
        "rm -f /usr/sbin/policy-rc.d",
        "mkdir -p /var/lib/apt/lists/partial",
        'for list in /run/devns/lists/*; do [ -f "$list" ] && cp "$list" /var/lib/apt/lists/; done',
        "find /var/lib/apt/lists -type f -exec chmod 644 {} +",
        *tidy(built),
    ]
    return "\n".join(lines) + "\n"


# --- caches, later ----------------------------------------------------------------------------------------------------

_LATER = "/run/devns/later"  # each request is a file there: the words of a command, a NUL after each
_DONE = "devns: one more is made"
# A program that writes down what it was asked for. Requests for the same thing are one: ln(1) refuses the second.
_PROGRAM = """#!/bin/sh
set -eu
{others}
request=$(mktemp {later}/.XXXXXXXX)
printf '%s\\0' {program} {words} > "$request"
ln "$request" "{later}/$(cksum < "$request" | tr ' ' -)" 2> /dev/null || true
rm "$request"
"""
# py_compile is a module, too: imported, or told to read names from its input, it is what it always was.
_MODULE = """import os, sys
if __name__ == "__main__" and sys.argv[1:] and sys.argv[1] != "-":
    words = [sys.executable, "-E", "-S", *["-O"] * sys.flags.optimize, {path!r}, *sys.argv[1:]]
    with open("{later}/py_compile-%d" % os.getpid(), "w") as request:
        request.write("".join(word + chr(0) for word in words))
else:
    with open({real!r}, encoding="utf-8") as source:
        exec(compile(source.read(), {path!r}, "exec"))
"""
_CERTIFICATES, _COMPILE = "/usr/sbin/update-ca-certificates", "/usr/bin/py3compile"


def _postponed(root: str) -> Iterator[dict[str, Any]]:
    """What lies over the programs that make caches while dpkg configures. A link in their place is left alone, and one
    on the way to them refused: what is bound is the root's own."""
    if _is_file(f"{root}{_CERTIFICATES}"):
        # All that its package asks for comes to one plain call in the end. Whoever wants something else gets it now.
        real = "/run/devns/update-ca-certificates"
        others = f"""for word; do case $word in --fresh | --hooksdir | '') ;; *) exec {real} "$@" ;; esac; done"""
        yield bind(f"{root}{_CERTIFICATES}", real, canonical=True)
        yield file(
            _CERTIFICATES, _PROGRAM.format(later=_LATER, program=_CERTIFICATES, words="", others=others), mode=0o755
        )
    if _is_file(f"{root}{_COMPILE}"):
        yield file(_COMPILE, _PROGRAM.format(later=_LATER, program=_COMPILE, words='"$@"', others=""), mode=0o755)
    modules = sorted(glob.glob(f"{glob.escape(root)}/usr/lib/python3.*/py_compile.py"))
    for number, module in enumerate(filter(_is_file, modules)):
        path, real = module[len(root) :], f"/run/devns/py_compile/{number}"
        yield bind(module, real, canonical=True)
        yield file(path, _MODULE.format(later=_LATER, path=path, real=real))


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _catch_up(root: str, later: str, host: Host, progress: Progress, *, map: str, built: int) -> None:
    """Do what was put off, as many at a time as there are processors, and see that nothing is newer than `built`."""
    progress.stage("make caches", total=len(os.listdir(later)), unit="steps")
    plan = sealed.sealed_plan(host, map=map, inside=_opened(root, later))
    workers = len(os.sched_getaffinity(0))

    def call() -> str:
        trees.settle("/", built)  # byte code says when its source was written
        requests, running = _requests(), dict[int, list[str]]()
        while requests or running:
            while requests and len(running) < workers:
                words = requests.pop()
                running[os.posix_spawn(words[0], words, ENV)] = words
            pid, status = os.waitpid(-1, 0)
            words = running.pop(pid, [])
            if status:
                raise DevnsError(f"{' '.join(words)[:200]} ended with status {os.waitstatus_to_exitcode(status)}")
            os.write(1, f"{_DONE}\n".encode())
        return ""

    sealed.run_sealed(plan, host, call=call, line=lambda text: progress.advance(text == _DONE), what="making caches")


def _requests() -> list[list[str]]:
    """What was asked for, what takes longest last; read inside, and gone then."""
    found = []
    for name in sorted(os.listdir(_LATER)):
        with open(f"{_LATER}/{name}") as request:
            found.append(request.read().split("\0")[:-1])
        os.unlink(f"{_LATER}/{name}")
    return sorted(found, key=len)
