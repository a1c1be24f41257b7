"""Which packages an environment needs: the set that apt would install in an empty system, without Recommends.

It is apt's own way of marking (MarkInstall in apt-pkg/depcache.cc), cut down to a system where nothing is installed:
requests are protected, what has only one solution becomes protected with them, alternatives are tried in their
order, providers in apt's, and a package that can't be had is discarded and never tried again. A search that finds
more solutions would find others than apt does, and the root's own apt would want to change them.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from devns.debian import version
from devns.debian.index import Group, Index, Package, Paragraph, Relation, is_name
from devns.errors import TemplateError

# A step of the marking: it yields the marking of another package and is sent whether that worked. Chains of
# dependencies are deeper than Python's stack.
Marking = Generator["Marking", bool, bool]

_REQUEST = re.compile(r"(?P<name>[a-z0-9+.-]+?)(?::(?P<architecture>[a-z0-9-]+?))?(?:(?P<minus>-)|=(?P<version>\S+))?")


@dataclass(frozen=True)
class Request:
    """One item of a template's `packages`, written as for apt-get: "NAME", "NAME:ARCHITECTURE", "NAME=VERSION", and
    "NAME-" for what must not come whoever wants it."""

    name: str
    version: str | None = None
    unwanted: bool = False


def read_request(text: str, architecture: str) -> Request:
    """What `text` asks for on this architecture. TemplateError where it is no request."""
    match = _REQUEST.fullmatch(text)
    if match is None or not is_name(match["name"]) or not version.is_version(match["version"] or "0"):
        raise TemplateError(f"packages: {text!r}: not the name of a package", hint="NAME, NAME=VERSION or NAME-")
    # To apt these all mean the package that this machine can run, even where that is "all" itself.
    if match["architecture"] not in (None, "any", "all", "native", architecture):
        raise TemplateError(f"packages: {text}: a root has packages of {architecture} alone", hint=match["name"])
    return Request(match["name"], match["version"], match["minus"] is not None)


def resolve(index: Index, requested: Sequence[str]) -> tuple[Package, ...]:
    """Everything that `requested`, apt and the Essential packages need, sorted by name.

    TemplateError for a name or version that doesn't exist, and for a request that nothing in the archive can satisfy.
    """
    asked = [read_request(text, index.architecture) for text in requested]
    unwanted = [_known(index, request.name) for request in asked if request.unwanted]
    wanted = [_real(index, request.name) for request in asked if not request.unwanted]
    index = index.choose(_chosen(index, asked))
    essential = base(index)
    for name in unwanted:
        if name in wanted or name in essential:
            why = "it is asked for, too" if name in wanted else "every system has it"
            raise TemplateError(f"packages: {name}-: it can't be left out: {why}")
    marks = _Marks(index, unwanted)
    marks.install(list(dict.fromkeys([*essential, *wanted])))
    if marks.broken():
        blamed, clauses = marks.explain([*wanted, *essential])
        raise TemplateError(
            f"packages: {blamed} can't be installed: {'; '.join(clauses)}",
            hint="leave one of them out" if len(requested) > 1 else None,
        )
    return tuple(p.package for name in sorted(marks.installed) if (p := index.candidate(name)) is not None)


def base(index: Index) -> tuple[str, ...]:
    """What every system has: the Essential packages and apt.

    Where an Essential package wants either usrmerge, which turns an old system into a merged one and brings perl, or
    the empty usr-is-merged, it gets the second: our roots are merged before the first package is unpacked.
    """
    names = [*index.essential(), "apt"]
    wanted = [group for name in names if (p := index.candidate(name)) for group in p.depends]
    if any({"usrmerge", "usr-is-merged"} == {relation.name for relation in group} for group in wanted):
        names.append("usr-is-merged")
    return tuple(names)


def _chosen(index: Index, asked: Sequence[Request]) -> dict[str, str]:
    """The version of each package that a request names."""
    chosen: dict[str, str] = {}
    for request in asked:
        if request.version is None or request.unwanted:
            continue
        known = index.versions(request.name)
        if request.version not in known:
            raise TemplateError(
                f"packages: {request.name}={request.version}: no such version",
                hint=f"there is {', '.join(known[:8])}" if known else None,
            )
        if chosen.setdefault(request.name, request.version) != request.version:
            raise TemplateError(f"packages: {request.name}: {chosen[request.name]} and {request.version} are asked for")
    return chosen


def _real(index: Index, name: str) -> str:
    """The package that `name` stands for: itself, or the only one that provides it."""
    if index.candidate(name) is not None:
        return name
    providers = sorted({paragraph.package.name for paragraph, _ in index.providers(name)})
    if len(providers) == 1:
        return providers[0]
    if providers:
        raise TemplateError(f"packages: {name} is provided by several", hint=f"say which: {', '.join(providers[:8])}")
    return _known(index, name)


def _known(index: Index, name: str) -> str:
    """`name`, which must be a package's own."""
    if index.candidate(name) is None:
        near = index.near(name)
        hint = f"did you mean {', '.join(near)}?" if near else None
        raise TemplateError(f"packages: {name}: no such package", hint=hint)
    return name


@dataclass(frozen=True)
class _Blame:
    """Why a package was given up: a group that nothing could satisfy, or the package it can't be together with."""

    group: Group = ()
    conflict: str = ""


class _Marks:
    """apt's pkgDepCache for an empty system."""

    def __init__(self, index: Index, unwanted: Iterable[str] = ()) -> None:
        self.index = index
        self.installed: set[str] = set()
        self.discarded: set[str] = set()
        self.unwanted = frozenset(unwanted)
        self.protected = set(unwanted)  # protected and not installed: it must not come
        self.blames: dict[str, _Blame] = {}
        self._targets: dict[Relation, tuple[Paragraph, ...]] = {}

    def install(self, names: Sequence[str]) -> None:
        for name in names:
            self.protected.add(name)
            self.installed.add(name)
        for name in names:
            _run(self._mark(name, deep=True, requested=True))
        # A later request may have unmarked what an earlier one chose. apt looks once more for what was asked for by
        # name; deeper down another choice may be left, but that is its problem resolver's, which rather holds back.
        for name in names:
            if self._is_broken(self._paragraph(name)):
                _run(self._mark(name, deep=True, requested=True))
        self._sweep(names)

    def _sweep(self, roots: Sequence[str]) -> None:
        """Drop what was marked for a package that could then not be had, as apt's mark and sweep does.

        It keeps what somebody who stays recommends or suggests; nothing was marked for that reason.
        """
        if self._reached(roots, wishes=False) < self.installed:
            self.installed &= self._reached(roots, wishes=True)

    def _reached(self, roots: Sequence[str], *, wishes: bool) -> set[str]:
        todo, reached = list(roots), set[str]()
        while todo:
            name = todo.pop()
            if name in self.installed and name not in reached:
                reached.add(name)
                groups = self._paragraph(name).depends + (self.index.wishes(name) if wishes else ())
                todo += [p.package.name for group in groups for relation in group for p in self._solutions(relation)]
        return reached

    def broken(self) -> list[str]:
        return sorted(name for name in self.installed if self._is_broken(self._paragraph(name)))

    def explain(self, roots: Sequence[str]) -> tuple[str, list[str]]:
        """Which of `roots` can't be installed, and the chain from it to what is missing, a clause each."""
        broken = set(self.broken())
        ways: list[tuple[str, str, list[str]]] = [(root, root, []) for root in roots]
        seen: set[str] = set()
        for root, name, clauses in ways:  # it grows
            if name in broken:
                return root, clauses + self._explain(name)
            for group in self._paragraph(name).depends if name not in seen else ():
                names = {p.package.name for relation in group for p in self._solutions(relation)} & self.installed
                ways += [(root, needed, [*clauses, f"{name} needs {_text(group)}"]) for needed in sorted(names)]
            seen.add(name)
        return sorted(broken)[0], self._explain(sorted(broken)[0])

    def _explain(self, name: str, seen: frozenset[str] = frozenset()) -> list[str]:
        paragraph = self._paragraph(name)
        for group in paragraph.depends:
            if self._satisfied(group):
                continue
            said = [f"{name} needs {_text(group)}"]
            for relation in group:
                if found := [p.package.name for p in self._solutions(relation) if p.package.name not in seen | {name}]:
                    if found[0] in self.unwanted:
                        return [*said, f"{found[0]} is left out"]
                    blame = self.blames.get(found[0])
                    if blame and blame.conflict:
                        return [*said, f"{found[0]} conflicts with {blame.conflict}"]
                    return said + self._explain(found[0], seen | {name})
            return said + [self._missing(relation) for relation in group[:1]]
        for relation in paragraph.conflicts:
            if enemy := self._enemy(paragraph, relation):
                return [f"{name} conflicts with {enemy}"]
        return []

    # --- questions ---------------------------------------------------------------------------------------------------

    def _paragraph(self, name: str) -> Paragraph:
        paragraph = self.index.candidate(name)
        if paragraph is None:
            raise KeyError(name)
        return paragraph

    def _solutions(self, relation: Relation) -> tuple[Paragraph, ...]:
        """Every candidate that satisfies `relation`, discarded or not: the package of that name, then the providers."""
        try:
            return self._targets[relation]
        except KeyError:
            pairs = [
                paragraph
                for paragraph, said in self._named(relation)
                if relation.relation is None
                or (said is not None and version.satisfies(said, relation.relation, relation.version or ""))
            ]
            unique = {paragraph.package.name: paragraph for paragraph in reversed(pairs)}
            found = self._targets[relation] = tuple(unique[name] for name in list(unique)[::-1])
            return found

    def _named(self, relation: Relation) -> Iterable[tuple[Paragraph, str | None]]:
        candidate = self.index.candidate(relation.name)
        own = [(candidate, candidate.package.version)] if candidate else []
        if relation.architecture in (None, "native", self.index.architecture):
            return own + self.index.providers(relation.name)
        if relation.architecture == "any":  # only of packages that allow it, and of what these provide
            provided = own + self.index.providers(relation.name)
            allowed = [pair for pair in provided if pair[0].package.multi_arch == "allowed"]
            return allowed + self.index.providers(relation.full_name)
        return []

    def _satisfied(self, group: Group) -> bool:
        return any(p.package.name in self.installed for relation in group for p in self._solutions(relation))

    def _satisfiable(self, group: Group) -> bool:
        return any(
            p.package.name in self.installed or p.package.name not in self.discarded
            for relation in group
            for p in self._solutions(relation)
        )

    def _enemies(self, paragraph: Paragraph, relation: Relation) -> list[Paragraph]:
        """Whom a Conflicts or Breaks hits. A package never conflicts with itself, nor with what it provides."""
        return [p for p in self._solutions(relation) if p.package.name != paragraph.package.name]

    def _enemy(self, paragraph: Paragraph, relation: Relation) -> str | None:
        names = (p.package.name for p in self._enemies(paragraph, relation))
        return next((name for name in names if name in self.installed), None)

    def _is_broken(self, paragraph: Paragraph) -> bool:
        return not all(map(self._satisfied, paragraph.depends)) or any(
            self._enemy(paragraph, relation) for relation in paragraph.conflicts
        )

    def _missing(self, relation: Relation) -> str:
        candidate = self.index.candidate(relation.name)
        if candidate is None:
            return f"there is no {relation.name}"
        return f"{relation.name} is {candidate.package.version}"

    def _choices(self, group: Group) -> list[list[str]]:
        """What could satisfy `group`, in the order in which apt tries it; see `_in_order` for the inner lists."""
        found: list[list[str]] = []
        for relation in group:
            found += self._preferred(relation.full_name, self._solutions(relation))
        unwanted = self.protected - self.installed
        return [names for row in found if (names := [name for name in row if name not in unwanted])]

    def _preferred(self, target: str, found: Iterable[Paragraph]) -> list[list[str]]:
        """apt's CompareProviders: what is wanted anyway, the package of that name, Essential, Important, Priority."""
        rows: dict[tuple[bool, bool, bool, bool, int], list[str]] = {}
        for p in found:
            name = p.package.name
            if name not in self.discarded:
                order = (name not in self.protected, name != target, not p.package.essential, not p.important, p.rank)
                rows.setdefault(order, []).append(name)
        return [rows[order] for order in sorted(rows)]

    def _in_order(self, rows: Iterable[list[str]]) -> Iterator[str]:
        """Each of `rows` in turn. What is equal to apt otherwise it takes by age in its cache: dear to find out, so it
        is asked for as late as possible."""
        for row in rows:
            yield from sorted(row, key=self.index.mentioned, reverse=True) if len(row) > 1 else row

    # --- marking -----------------------------------------------------------------------------------------------------

    def _mark(self, name: str, *, deep: bool, requested: bool = False) -> Marking:
        """MarkInstall: mark `name` and, if `deep`, what it needs. False where that can't be."""
        if not requested and name in self.protected and name not in self.installed:
            return False
        if name in self.discarded:
            return False
        paragraph = self._paragraph(name)
        if name not in self.protected and name in self.installed and not self._is_broken(paragraph):
            return True
        hopeless = next((group for group in paragraph.depends if not self._satisfiable(group)), None) if deep else None
        if hopeless is not None:
            if name not in self.protected:
                self._discard(name, _Blame(group=hopeless))
            return False

        protected = name in self.protected
        stubborn = protected or requested
        groups = [group for group in paragraph.depends if protected or not self._satisfied(group)] if deep else []
        enemies = [r for r in paragraph.conflicts if protected or self._enemy(paragraph, r)] if deep else []
        worked = self._drop_enemies(paragraph, enemies, stubborn=stubborn)
        if not worked and not stubborn:
            return False
        self.installed.add(name)
        if not deep:
            return worked

        self.protected.add(name)  # while its dependencies are looked for
        satisfied = yield self._mark_dependencies(name, groups, protected=protected, stubborn=stubborn)
        if not protected:
            self.protected.discard(name)
        if not satisfied and not stubborn:
            self._discard(name, self.blames.get(name))
            return False
        return worked and satisfied

    def _drop_enemies(self, paragraph: Paragraph, relations: Sequence[Relation], *, stubborn: bool) -> bool:
        """Unmark what `paragraph` conflicts with; where it is protected, for good. False where that can't be."""
        name = paragraph.package.name
        failed = False
        for relation in relations:
            for enemy in self._in_order(self._preferred(relation.full_name, self._enemies(paragraph, relation))):
                if enemy in self.installed and enemy in self.protected:
                    failed = True
                    self.blames.setdefault(name, _Blame(conflict=enemy))
                    if not stubborn:
                        return False
                    continue
                self.installed.discard(enemy)
                if name in self.protected:
                    self._discard(enemy, _Blame(conflict=name))
                    self.protected.add(enemy)
        return not failed

    def _mark_dependencies(self, name: str, groups: Sequence[Group], *, protected: bool, stubborn: bool) -> Marking:
        failed = False
        for group in groups:
            if self._satisfied(group):
                only = {name for row in self._choices(group) for name in row} if protected else set()
                if len(only) == 1 and not only <= self.protected:
                    self.protected |= only
                    failed |= not (yield self._mark(*only, deep=True))
                continue
            choices = self._choices(group)
            only = {name for row in choices for name in row}
            for choice in self._in_order(choices):
                if choice in self.discarded:  # by a choice before
                    continue
                if protected and len(only) == 1:
                    if not (yield self._mark(choice, deep=False)):
                        continue
                    self.protected.add(choice)
                if (yield self._mark(choice, deep=True)):
                    break
            else:
                failed = True
                self.blames.setdefault(name, _Blame(group=group))
                if not stubborn:
                    return False
        return not failed

    def _discard(self, name: str, blame: _Blame | None) -> None:
        self.installed.discard(name)
        self.discarded.add(name)
        if blame is not None:
            self.blames.setdefault(name, blame)


def _text(group: Group) -> str:
    return " | ".join(map(str, group))


def _run(marking: Marking) -> bool:
    """Run a marking and all that it yields, without recursion."""
    stack, answer = [marking], None
    while stack:
        try:
            stack.append(stack[-1].send(answer))  # type: ignore[arg-type]  # None starts a generator
            answer = None
        except StopIteration as end:
            stack.pop()
            answer = end.value
    return bool(answer)
