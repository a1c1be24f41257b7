"""Plan: what will be done here, as one JSON document, made from steps: folded, sorted, conflicts refused."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from devns import accounts
from devns.errors import TemplateError
from devns.identity import confine, identity
from devns.ops import APPLIES, FOLDED

if TYPE_CHECKING:
    from devns.host import Host
    from devns.spec import Spec

Step = dict[str, Any]  # one line of a Plan: a JSON object with an "op"
Plan = dict[str, Any]

SCHEMA = 1
_MOUNTS = ("bind", "overlay", "tmpfs", "file", "proc", "dev", "sysfs", "mqueue")


@dataclass(frozen=True)
class Problem:
    """Something on this machine that stands in the way: a stable `id` ("userns", "overlay", "subuid", ...), one
    sentence, and the `remedy`, a command or a file to edit. `fatal` problems refuse; the others degrade."""

    id: str
    message: str
    remedy: str | None = None
    fatal: bool = True


def make_plan(spec: Spec, host: Host, steps: Iterable[Step], argv: Sequence[str] = ()) -> Plan:
    """The one document that launch runs: pure in its arguments, equal for equal ones.

    Raises TemplateError where two explicit steps want the same destination, or a mount point would have to be made on
    the host.
    """
    chosen = _choose(steps, spec.template)
    inside = [step for step in chosen if step["op"] in APPLIES]
    inside.sort(key=_order)
    _refuse_litter(inside, host)
    account = accounts.find(spec, host, inside)
    ids = identity(spec, host, account)
    env = {"HOME": account.home, "USER": account.name, "LOGNAME": account.name}
    env |= {step["name"]: step["value"] for step in chosen if step["op"] == "setenv"}
    clocks = [step for step in chosen if step["op"] == "clock"]
    return {
        "schema": SCHEMA,
        "name": spec.name,
        "argv": list(argv),
        "cwd": next((step["path"] for step in chosen if step["op"] == "cwd"), env.get("HOME", "/")),
        "env": dict(sorted(env.items())),
        "identity": ids,
        "namespaces": sorted({"user", "mount"} | {step["name"] for step in chosen if step["op"] == "namespace"}),
        "clock": {key: clocks[0][key] for key in ("boottime", "monotonic")} if clocks else None,
        "confine": confine(spec, ids),
        "rlimits": {s["name"]: [s["soft"], s["hard"]] for s in sorted(chosen, key=_name) if s["op"] == "rlimit"},
        "inside": inside,
        "outside": [step for step in chosen if ":" in step["op"]],
        "notes": [step["text"] for step in chosen if step["op"] == "note"],
    }


def describe(plan: Plan) -> list[tuple[str, str]]:
    """The Plan for people: rows of what and how, in the order things happen."""
    ids, limits = plan["identity"], plan["confine"]
    rows = [
        ("run", " ".join(plan["argv"]) or "-"),
        ("in", plan["cwd"]),
        ("namespaces", " ".join(plan["namespaces"])),
        ("identity", f"uid {ids['uid']}, gid {ids['gid']} ({ids['map']} map)"),
        *(("uid_map", f"{row[0]} {row[1]} {row[2]}") for row in ids["uid_map"]),
        ("capabilities", " ".join(limits["capabilities"]) or "none"),
        ("seccomp", " ".join(limits["seccomp"])),
    ]
    rows += [(step["op"], _sentence(step)) for step in (*plan["outside"], *plan["inside"])]
    rows += [("rlimit", f"{name} {soft}") for name, (soft, _hard) in plan["rlimits"].items()]
    rows += [("env", f"{name}={value}") for name, value in plan["env"].items()]
    return rows + [("note", text) for text in plan["notes"]]


def _sentence(step: Step) -> str:
    rest = {key: value for key, value in step.items() if key not in ("op", "dst", "text") and value is not None}
    if "mode" in rest:
        rest["mode"] = f"{rest['mode']:04o}"
    said = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in rest.items()]
    return " ".join([*([step["dst"]] if "dst" in step else []), *said])


def _name(step: Step) -> str:
    return str(step.get("name", ""))


def _order(step: Step) -> tuple[bool, bool, list[str], str]:
    """Mounts by the components of their destination, parents first; then files, which may stand behind a symbolic link
    in a directory that is mounted later by name; then what has no destination."""
    return ("dst" not in step, step["op"] == "file", _parts(step.get("dst", "/")), step["op"])


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _choose(steps: Iterable[Step], template: str) -> list[Step]:
    """One step for each key: an explicit one beats a default, equal ones are one, two explicit ones are an error."""
    chosen: dict[tuple[str, ...], Step] = {}
    for step in steps:
        if ":" not in step["op"] and step["op"] not in APPLIES and step["op"] not in FOLDED:
            raise TemplateError(f"{step['op']}: no such op")
        if "dst" in step:
            step = step | {"dst": posixpath.normpath(step["dst"])}
        key = _key(step)
        rival = chosen.get(key)
        if rival is None or (rival.get("default") and not step.get("default")):
            chosen[key] = step
        elif rival != step and not step.get("default"):
            raise TemplateError(
                f"{template}: {' '.join(key)}: two steps want it: {json.dumps(rival)} and {json.dumps(step)}",
                hint="leave one of them out of the template",
            )
    return [{key: value for key, value in step.items() if key != "default"} for step in chosen.values()]


def _key(step: Step) -> tuple[str, ...]:
    if "dst" in step:
        return (step["dst"],)
    if step["op"] in ("note", "account") or ":" in step["op"]:
        return (json.dumps(step, sort_keys=True),)
    return (step["op"], "" if step["op"] == "hostname" else _name(step))


def _refuse_litter(inside: Sequence[Step], host: Host) -> None:
    """Never leave a trace on the host by mounting: a mount point beneath a bind must be there already."""
    binds: list[Step] = []
    for step in inside:
        if "dst" not in step or step["dst"] == "/":
            continue
        above = [bind for bind in binds if _parts(step["dst"])[: len(_parts(bind["dst"]))] == _parts(bind["dst"])]
        if above and above[-1]["op"] == "bind" and not above[-1].get("own") and not step.get("optional"):
            bind = above[-1]
            missing = bind["src"].rstrip("/") + step["dst"][len(bind["dst"]) :]
            if host.kind(missing) is None and step["op"] in (*_MOUNTS, "directory"):
                raise TemplateError(
                    f"{step['dst']}: its mount point would have to be made on the host, as {missing}",
                    hint=f"make it yourself (mkdir -p {missing}), or choose a destination outside {bind['dst']}",
                )
        if step["op"] in _MOUNTS and step["op"] != "file":
            binds.append(step)
