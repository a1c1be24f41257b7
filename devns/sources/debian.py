"""`debian:SUITE`: a Debian root made from its archive: verified, unpacked once, configured inside. Nothing of apt's or
dpkg's is needed on the host: the dpkg that configures is the one that was just unpacked.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from devns import sealed
from devns.debian import archive, install, mirrors, repository
from devns.debian.errors import MirrorError
from devns.errors import TemplateError, Unsupported
from devns.lock import FILE as LOCK_FILE
from devns.lock import VERSION as LOCK_VERSION
from devns.lock import Lock, Pinned
from devns.ops import bind, directory, file, tmpfs
from devns.sources import key, lent

if TYPE_CHECKING:
    from devns.host import Host
    from devns.progress import Progress
    from devns.sealed import Place
    from devns.spec import Spec

RECIPE = 2  # raised when the same packages would give another tree
ADDED = 2  # the same for what is added to such a tree
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def recipes(spec: Spec, host: Host) -> list[dict[str, Any]]:
    """One layer: the suite's essential packages, apt, and those the template names. What a project adds to a named
    template is a second one, so that the first is the template's own and there for all who extend it."""
    suite = spec.root.source.removeprefix("debian:")
    if suite not in archive.SUITES:
        hint = f"one of: {', '.join(archive.SUITES)}"
        raise TemplateError(f"{spec.template}: root.from: debian:{suite}: no such suite", hint=hint)
    if host.machine not in ARCHITECTURES:
        raise Unsupported(f"debian:{suite}: no packages for this machine's processor: {host.machine}")
    map = "range" if spec.user.map == "range" else "single"
    rows = _repositories(spec, host)
    shared = rows[: len(rows) - len(spec.said.repositories)]  # what extends adds behind
    base = {
        "label": suite,
        "recipe": RECIPE,
        "architecture": ARCHITECTURES[host.machine],
        "packages": sorted(set(spec.root.packages) - set(spec.said.packages)),
        "map": map,
        **({"repositories": shared} if shared else {}),
    }
    made = [base]
    if spec.said.packages or spec.said.repositories:
        packages = sorted(set(spec.said.packages))
        added = {"label": f"{suite}-more", "suite": suite, "architecture": base["architecture"], "recipe": ADDED}
        made.append({**added, "packages": packages, "network": True, "map": map})
        if rows:
            made[1]["repositories"] = rows
    if spec.lock:
        _refuse_stale(made, spec)
        for recipe, pinned in zip(made, (spec.lock.base, spec.lock.more), strict=False):
            recipe |= {"locked": [asdict(one) for one in pinned], "built": spec.lock.built}
    if len(made) > 1:
        made[1] |= {"parent": key(base), "network": "locked" not in base}
    return made


# --- lock files -------------------------------------------------------------------------------------------------------


def lock(spec: Spec, host: Host, cache: str, progress: Progress) -> Lock:
    """What the packages that `spec` asks for come to today: each is found in an index that was verified."""
    made = recipes(replace(spec, lock=None), host)
    found = [_select(recipe, host, cache, progress) for recipe in made]
    base = found[0].packages
    known = set(base)
    more = [package for package in found[-1].packages if package not in known] if len(found) > 1 else []
    return Lock(
        version=LOCK_VERSION,
        recipe=RECIPE,
        source=spec.root.source,
        architecture=made[0]["architecture"],
        request=request(made),
        built=max(found[-1].released.values()),
        base=tuple(map(archive.pin, base)),
        more=tuple(map(archive.pin, more)),
    )


def request(recipes: Sequence[dict[str, Any]]) -> str:
    """What the templates ask for, as a hash: whoever asks for the same may use the same lock file."""
    asked = [[recipe["packages"], recipe.get("repositories", [])] for recipe in recipes]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _refuse_stale(recipes: Sequence[dict[str, Any]], spec: Spec) -> None:
    """TemplateError for a lock file of other requests, another machine, or another way to make a tree."""
    lock = spec.lock
    if lock is None:
        return
    why = None
    if lock.architecture != recipes[0]["architecture"]:
        why = f"it is for {lock.architecture}, and this machine is {recipes[0]['architecture']}"
    elif lock.source != spec.root.source or lock.request != request(recipes):
        why = "the templates ask for other packages than when it was made"
    elif lock.recipe != RECIPE:
        why = f"this devns would make another tree of the same packages (recipe {RECIPE}, and not {lock.recipe})"
    if why:
        raise TemplateError(f"{spec.project}/{LOCK_FILE}: {why}", hint="devns lock")


def _repositories(spec: Spec, host: Host) -> list[dict[str, Any]]:
    """As recipes have them: with the key itself, so that another key makes another layer."""
    rows = []
    for said in spec.root.repositories:
        certificate = said.key
        if said.key.startswith("/"):
            certificate = host.read(lent(said.key, "root.repository.key", spec, host)) or ""
            if not certificate:
                raise TemplateError(
                    f"{spec.template}: root.repository.key: {said.key}: no such file, or an unreadable or empty one"
                )
        rows.append({**asdict(said), "components": list(said.components), "key": certificate})
    return rows


def directories(spec: Spec, host: Host) -> list[str]:
    return []


def make(recipe: dict[str, Any], place: Place, host: Host, cache: str, progress: Progress) -> dict[str, Any]:
    """Resolve, download, unpack, configure. What was installed is returned, for the layer's record."""
    try:
        return (_add if "parent" in recipe else _begin)(recipe, place, host, cache, progress)
    except MirrorError as error:
        if "locked" not in recipe:
            raise
        raise MirrorError(error.message, hint="the archive may have it no more: devns lock --update") from None


def _begin(recipe: dict[str, Any], place: Place, host: Host, cache: str, progress: Progress) -> dict[str, Any]:
    """The first layer, out of nothing."""
    selection = _select(recipe, host, cache, progress)
    built = max(selection.released.values())
    install.install(selection, place, host, cache, progress, map=recipe["map"], built=built)
    return {"packages": {package.name: package.version for package in selection.packages}, "built": built}


def _select(recipe: dict[str, Any], host: Host, cache: str, progress: Progress) -> archive.Selection:
    suite, repositories = recipe.get("suite", recipe["label"]), repository.read(recipe.get("repositories", ()))
    if "locked" in recipe:
        pinned = [Pinned(**row) for row in recipe["locked"]]
        return archive.locked(
            suite,
            pinned,
            built=recipe["built"],
            architecture=recipe["architecture"],
            host=host,
            repositories=repositories,
        )
    return archive.select(
        suite,
        recipe["packages"],
        architecture=recipe["architecture"],
        host=host,
        cache=cache,
        progress=progress,
        repositories=repositories,
    )


# --- packages on top --------------------------------------------------------------------------------------------------


def _add(recipe: dict[str, Any], place: Place, host: Host, cache: str, progress: Progress) -> dict[str, Any]:
    """The apt inside installs over the layer beneath, by today's lists and with what it will most likely want at hand:
    both verified here. It decides; what it wants besides it fetches itself. With a lock file there are no lists, and
    what is at hand is what is installed."""
    before = place.record.get("packages", {})
    selection = _select(recipe, host, cache, progress)
    built = max(selection.released.values())
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
        *install.files(selection.files.values()),
        file("/etc/apt/apt.conf.d/90devns", _proxies(host)),
        file("/run/devns/install", _install_script(recipe, list(files), list(selection.files), built)),
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
            argv=install.patient("/run/devns/install"),
            env={**place.variables, **sealed.ENV, "DEBCONF_NONINTERACTIVE_SEEN": "true"},
            network=recipe["network"],
        )
        sealed.run_sealed(plan, host, line=line, what=f"apt-get install {' '.join(recipe['packages'])}")
    return {"packages": installed, "built": built}


def _install_script(recipe: dict[str, Any], debs: Sequence[str], files: Sequence[str], built: int) -> str:
    wanted = recipe["packages"]
    automatic: list[str] = []
    if "locked" in recipe:
        asked = {text.partition("=")[0].partition(":")[0] for text in recipe["packages"]}
        automatic = [row["name"] for row in recipe["locked"] if row["name"] not in asked]
        left_out = [text for text in wanted if text.endswith("-")]
        wanted = [*(f"/var/cache/apt/archives/{name}" for name in debs), *left_out]
    lines = [
        "set -eu",
        *install.copies(files),
        f"printf {shlex.quote(install.NO_SERVICES)} > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d",
        # What the layer beneath has in a newer version than is asked for goes back to it.
        f"apt-get install --yes --no-install-recommends --allow-downgrades -- {' '.join(map(shlex.quote, wanted))}",
        *([f"apt-mark auto {' '.join(map(shlex.quote, automatic))}"] if automatic else []),
        "rm -f /usr/sbin/policy-rc.d",
        *install.tidy(built),
        "dpkg-query --show --showformat 'installed ${Package} ${Version}\\n'",
    ]
    return "\n".join(lines) + "\n"


def _proxies(host: Host) -> str:
    """The proxies that apt's configuration names here, for the apt inside; one with a password stays outside."""
    found = mirrors.route(host, mirrors.read_apt_conf(host)).proxies
    keys = {key: key.partition("::") for key in found}
    return "".join(
        f'Acquire::{scheme}::Proxy{mark}{name} "{found[key]}";\n'
        for key, (scheme, mark, name) in keys.items()
        if found[key].isprintable() and not set(found[key]) & {"@", '"'}
    )
