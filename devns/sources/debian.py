"""`debian:SUITE`: a Debian root made from its archive: verified, unpacked once, configured inside. Nothing of apt's or
dpkg's is needed on the host: the dpkg that configures is the one that was just unpacked.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from devns import sealed, unpack
from devns.debian import archive, index
from devns.errors import TemplateError, Unsupported
from devns.ops import bind, dev, directory, file, proc, tmpfs
from devns.sources import key

if TYPE_CHECKING:
    from devns.host import Host
    from devns.progress import Progress
    from devns.sealed import Place
    from devns.spec import Spec

RECIPE = 1  # raised when the same packages would give another tree
ADDED = 1  # the same for what is added to such a tree
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

_ENV = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "DEBCONF_NONINTERACTIVE_SEEN": "true",
    "DPKG_MAINTSCRIPT_NAME": "preinst",
    "DPKG_ROOT": "",
}
# Nothing is started while it is installed: there is no init that could. invoke-rc.d(8)
_NO_SERVICES = "#!/bin/sh\nexit 101\n"
# What only this build knows does not belong to a layer that others share.
_TIDY = (
    "[ ! -e /etc/machine-id ] || : > /etc/machine-id",
    "rm -f /var/log/dpkg.log /var/log/alternatives.log /var/log/bootstrap.log /var/log/apt/*.log /var/log/apt/*.xz",
    "rm -f /var/lib/dpkg/*-old /var/cache/debconf/*-old /var/cache/apt/*.bin /etc/passwd- /etc/shadow- /etc/group-",
)
# Packages whose preinst others lean on: the first accounts, then the C library. The rest have no order among them.
_FIRST = ("base-passwd", "libc6")


def recipes(spec: Spec, host: Host) -> list[dict[str, Any]]:
    """One layer: the suite's essential packages, apt, and those the template names. What a project adds to a named
    template is a second one, so that the first is the template's own and there for all who extend it."""
    suite = spec.root.source.removeprefix("debian:")
    if suite not in archive.SUITES:
        raise TemplateError(f"root.from: debian:{suite}: no such suite", hint=f"one of: {', '.join(archive.SUITES)}")
    if host.machine not in ARCHITECTURES:
        raise Unsupported(f"debian:{suite}: no packages for this machine's processor: {host.machine}")
    map = "range" if spec.user.map == "range" else "single"
    base = {
        "label": suite,
        "recipe": RECIPE,
        "architecture": ARCHITECTURES[host.machine],
        "packages": sorted(set(spec.root.packages) - set(spec.said.packages)),
        "map": map,
    }
    if not spec.said.packages:
        return [base]
    packages = sorted(set(spec.said.packages))
    added = {"recipe": ADDED, "parent": key(base), "packages": packages, "network": True, "map": map}
    return [base, {"label": f"{suite}-more", "suite": suite, "architecture": base["architecture"], **added}]


def directories(spec: Spec, host: Host) -> list[str]:
    return []


def make(recipe: dict[str, Any], place: Place, host: Host, cache: str, progress: Progress) -> dict[str, Any]:
    """Resolve, download, unpack, configure. What was installed is returned, for the layer's record."""
    if "parent" in recipe:
        return _add(recipe, place, host, cache, progress)
    selection = archive.select(
        recipe["label"],
        recipe["packages"],
        architecture=recipe["architecture"],
        host=host,
        cache=cache,
        progress=progress,
    )
    debs = archive.fetch(selection, host=host, cache=cache, progress=progress)
    named = [(debs[package.name], package.name, package.version) for package in selection.packages]
    scripts = _unpack(recipe, place.root, host, cache, named, progress)
    _configure(recipe, place.root, host, cache, selection, scripts, progress)
    return {"packages": {package.name: package.version for package in selection.packages}}


def _unpack(
    recipe: dict[str, Any],
    root: str,
    host: Host,
    cache: str,
    debs: Sequence[tuple[str, str, str]],
    progress: Progress,
) -> list[str]:
    """Unpack all packages in a process that sees nothing but them and the new root; returns who has a preinst."""
    progress.stage("unpack", total=len(debs), unit="packages")
    owners = recipe["map"] == "range"
    plan = sealed.sealed_plan(
        host,
        map=recipe["map"],
        inside=[tmpfs("/"), bind(root, "/root", readonly=False), bind(f"{cache}/debs", "/debs")],
    )
    inside = [(f"/debs/{os.path.basename(path)}", name, version) for path, name, version in debs]
    workers = len(os.sched_getaffinity(0))

    def call() -> str:
        if owners:
            os.chown("/root", 0, 0)
        os.chmod("/root", 0o755)  # noqa: S103  # what / is everywhere
        records = unpack.unpack_debs(inside, "/root", owners=owners, workers=workers, report=_report)
        return " ".join(record.key for record in records if "preinst" in record.scripts)

    keys = sealed.run_sealed(plan, call=call, line=lambda text: progress.advance()).split()
    return sorted(keys, key=lambda key: (*(key.partition(":")[0] != name for name in _FIRST), key))


def _report(record: unpack.DebRecord) -> None:
    """One line a package, for the parent to count."""
    os.write(1, f"{record.key}\n".encode())


def _configure(
    recipe: dict[str, Any],
    root: str,
    host: Host,
    cache: str,
    selection: archive.Selection,
    preinsts: Sequence[str],
    progress: Progress,
) -> None:
    """Run each preinst, then `dpkg --configure -a`, in the new root itself."""
    progress.stage("configure", total=len(selection.packages), unit="packages")
    files = {
        "/etc/apt/sources.list.d/debian.sources": selection.sources,
        "/etc/apt/apt.conf.d/00devns": _apt_conf(recipe["map"]),
        # An interrupted install is repeated, never half trusted; and in an overlay each fsync is dear.
        "/etc/dpkg/dpkg.cfg.d/devns": "force-unsafe-io\n",
        "/usr/sbin/policy-rc.d": _NO_SERVICES,
    }
    inside = [
        bind(root, "/", readonly=False, own=True),
        proc(),
        dev(),
        tmpfs("/tmp", mode=0o1777),
        tmpfs("/run"),
        file("/run/devns/configure", _script(recipe, preinsts, selection, list(files))),
        *(file(f"/run/devns/files/{number}", text) for number, text in enumerate(files.values())),
        *(bind(path, f"/run/devns/lists/{name}") for name, path in selection.lists.items()),
    ]
    plan = sealed.sealed_plan(
        host, map=recipe["map"], inside=inside, argv=["/bin/sh", "/run/devns/configure"], env=_ENV
    )

    def line(text: str) -> None:
        if text.startswith("Setting up "):
            progress.advance()

    sealed.run_sealed(plan, line=line)


# --- packages on top --------------------------------------------------------------------------------------------------


def _add(recipe: dict[str, Any], place: Place, host: Host, cache: str, progress: Progress) -> dict[str, Any]:
    """The apt inside installs over the layer beneath, by today's lists and with what it will most likely want at hand:
    both verified here. It decides; what it wants besides it fetches itself."""
    plain = [name for name in recipe["packages"] if index.is_name(name)]
    before = place.record.get("packages", {})
    selection = archive.select(
        recipe["suite"],
        plain,
        architecture=recipe["architecture"],
        host=host,
        cache=cache,
        progress=progress,
    )
    missing = tuple(package for package in selection.packages if before.get(package.name) != package.version)
    debs = archive.fetch(replace(selection, packages=missing), host=host, cache=cache, progress=progress)
    files = {
        f"{package.name}_{package.version.replace(':', '%3a')}_{package.architecture}.deb": debs[package.name]
        for package in missing
    }
    mounts = [
        tmpfs("/var/cache/apt"),
        directory("/var/cache/apt/archives/partial"),
        *(bind(path, f"/var/cache/apt/archives/{name}") for name, path in files.items()),
        tmpfs("/var/lib/apt/lists"),
        directory("/var/lib/apt/lists/partial"),
        *(bind(path, f"/var/lib/apt/lists/{name}") for name, path in selection.lists.items()),
        file("/etc/apt/sources.list.d/debian.sources", selection.sources),
        file("/run/devns/install", _install_script(recipe["packages"])),
    ]
    progress.stage("install", total=len(missing), unit="packages")
    installed: dict[str, str] = {}

    def line(text: str) -> None:
        words = text.split()
        if text.startswith("Setting up "):
            progress.advance()
        elif words[:1] == ["installed"] and len(words) == 3:
            installed[words[1]] = words[2]

    with sealed.stacked(place, host, mounts) as inside:
        plan = sealed.sealed_plan(
            host,
            map=recipe["map"],
            inside=inside,
            argv=["/bin/sh", "/run/devns/install"],
            env={**place.variables, **sealed.ENV, "DEBCONF_NONINTERACTIVE_SEEN": "true"},
            network=True,
        )
        sealed.run_sealed(plan, line=line, what=f"apt-get install {' '.join(recipe['packages'])}")
    return {"packages": installed}


def _install_script(packages: Sequence[str]) -> str:
    lines = [
        "set -eu",
        f"printf {shlex.quote(_NO_SERVICES)} > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d",
        f"apt-get install --yes --no-install-recommends -- {' '.join(map(shlex.quote, packages))}",
        "rm -f /usr/sbin/policy-rc.d",
        *_TIDY,
        "dpkg-query --show --showformat 'installed ${Package} ${Version}\\n'",
    ]
    return "\n".join(lines) + "\n"


def _apt_conf(map: str) -> str:
    """With one mapped id apt cannot become its own user to download; it stays root, who is you."""
    return 'APT::Sandbox::User "root";\n' if map == "single" else ""


def _script(recipe: dict[str, Any], preinsts: Sequence[str], selection: archive.Selection, files: Sequence[str]) -> str:
    """What runs inside, readable: the files that are ours, the preinsts, the configuration, and a tidy end."""
    lines = ["set -eu", "umask 022"]
    for number, path in enumerate(files):
        lines.append(f"mkdir -p {shlex.quote(os.path.dirname(path))}; cp /run/devns/files/{number} {shlex.quote(path)}")
    lines += ["chmod 755 /usr/sbin/policy-rc.d", f"export DPKG_MAINTSCRIPT_ARCH={recipe['architecture']}"]
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
        *_TIDY,
    ]
    return "\n".join(lines) + "\n"
