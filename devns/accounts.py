"""accounts: who is meant by [user] as: yourself, root, or somebody whom the root's own passwd and group files know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from devns.decode import near, show
from devns.errors import TemplateError

if TYPE_CHECKING:
    from devns.host import Host
    from devns.spec import Spec

Step = Mapping[str, Any]

_ID_MAX = 2**32 - 1  # (uid_t)-1 is no id


@dataclass(frozen=True)
class Account:
    """A user inside. `groups` are those it is in besides its own, as /etc/group has them; nothing for yourself and
    root, who keep those they have."""

    name: str
    uid: int
    gid: int
    home: str
    groups: tuple[int, ...] | None = None


ROOT = Account("root", 0, 0, "/root")


def find(spec: Spec, host: Host, inside: Sequence[Step]) -> Account:
    """Who the payload is in the root that the steps `inside` make. Reads that root's files where a name, or what
    belongs to a number, stands there and nowhere else.

    Raises TemplateError for a name that nobody has, and where the root that would know it is not built yet.
    """
    said = spec.user.identity
    if said == "self":
        return Account(host.user, host.uid, host.gid, host.home)
    if said == "root":
        return ROOT
    who, _, of = said.partition(":")
    users = list(_rows("/etc/passwd", 7, inside, host))
    groups = list(_rows("/etc/group", 4, inside, host))
    if not who.isdecimal():
        row = _named(who, users, "user", spec, host, inside)
    else:
        row = next((row for row in users if int(row[2]) == int(who)), [who, "", who, who, "", "/", ""])
    if of:
        gid = int(of) if of.isdecimal() else int(_named(of, groups, "group", spec, host, inside)[2])
    else:
        gid = int(row[3])
    more = {int(group[2]) for group in groups if row[0] in group[3].split(",")} - {gid}
    return Account(row[0], int(row[2]), gid, row[5] if row[5].startswith("/") else "/", tuple(sorted(more)))


def _named(
    name: str, rows: Sequence[list[str]], kind: str, spec: Spec, host: Host, inside: Sequence[Step]
) -> list[str]:
    for row in rows:
        if row[0] == name:
            return row
    says = f"{spec.template}: user.as: no {kind} {show(name)} inside"
    if not any(host.kind(tree) == "directory" for tree in _trees(inside)[-1:]):
        raise TemplateError(f"{says}, as far as is known: the root is not built yet", hint=f"devns build {spec.name}")
    raise TemplateError(says, hint=near(name, [row[0] for row in rows]) or "it comes with a package, or say its number")


def _rows(path: str, columns: int, inside: Sequence[Step], host: Host) -> Iterator[list[str]]:
    """The rows of a database with a name and two numbers, or a number: passwd(5), group(5)."""
    numbers = (2, 3) if columns == 7 else (2,)
    for line in _text(path, inside, host).split("\n"):
        row = line.split(":")
        if len(row) == columns and row[0] and all(_is_id(row[at]) for at in numbers):
            yield row


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) < _ID_MAX


def _text(path: str, inside: Sequence[Step], host: Host) -> str:
    """What `path` will hold inside: a step's own text, else the topmost file among the trees that are merged there.

    The trees may be a stranger's, so no link in them is followed. What an overlay hides is not looked for beneath it:
    a whiteout is a device, and a directory that was made anew is opaque. Documentation/filesystems/overlayfs.rst
    """
    for step in inside:
        if step["op"] == "file" and step["dst"] == path:
            return str(step["text"])
    directory = path.rpartition("/")[0]
    for tree in map(host.realpath, _trees(inside)):
        text = host.read(tree + path, symlinks=False)
        if text is not None:
            return text
        ways = (tree + directory, tree + path)
        if any(host.readlink(way) is not None or host.kind(way) == "other" for way in ways):
            return ""
        if host.xattr(tree + directory, "user.overlay.opaque") == b"y":
            return ""
    return ""


def _trees(inside: Sequence[Step]) -> list[str]:
    """The directories that make up `/`, topmost first."""
    for step in inside:
        if step.get("dst") == "/":
            return [tree for tree in (step.get("upper"), *step.get("lower", ()), step.get("src")) if tree]
    return []
