"""accounts, and what identity makes of them: who is meant by a name or a number, in which root, how it is mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from devns.accounts import ROOT, Account, find
from devns.errors import TemplateError
from devns.host import Host
from devns.identity import ROOT_CAPABILITIES, confine, identity
from devns.ops import bind, file, overlay
from devns.plan import Step, make_plan
from devns.spec import Spec, User

if TYPE_CHECKING:
    from tests.conftest import MakeHost

USERS = """\
root:x:0:0:root:/root:/bin/bash
broken:x:one:1::/:/bin/sh
nobody:x:4294967295:1::/:/bin/sh
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
postgres:x:102:104:PostgreSQL administrator,,,:/var/lib/postgresql:/bin/bash
homeless:x:103:104::nowhere:/bin/sh
"""
GROUPS = "root:x:0:\nshadow:x:42:\nssl-cert:x:103:postgres\npostgres:x:104:\nboth:x:105:www-data,postgres\n"
LAYER = {"/layer/etc/passwd": USERS, "/layer/etc/group": GROUPS}
OVERLAY = [overlay("/", lower=["/upper-layer", "/layer"], upper="/upper", work="/work")]
POSTGRES = Account("postgres", 102, 104, "/var/lib/postgresql", (103, 105))


def of(said: str, **user: Any) -> Spec:
    return Spec("box", "box.toml", user=User(identity=said, **user))


def found(said: str, host: Host, inside: Sequence[Step] = tuple(OVERLAY)) -> Account:
    return find(of(said), host, inside)


# --- who is meant -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "account"),
    [
        ("postgres", POSTGRES),
        ("102", POSTGRES),
        ("postgres:shadow", replace(POSTGRES, gid=42, groups=(103, 105))),
        ("postgres:103", replace(POSTGRES, gid=103, groups=(105,))),
        ("www-data", Account("www-data", 33, 33, "/var/www", (105,))),
        ("1234", Account("1234", 1234, 1234, "/", ())),
        ("1234:5", Account("1234", 1234, 5, "/", ())),
        ("homeless", Account("homeless", 103, 104, "/", ())),
        ("root:shadow", Account("root", 0, 42, "/root", ())),
    ],
)
def test_the_roots_own_files_say_who_is_meant(host: MakeHost, no_effects: Any, said: str, account: Account) -> None:
    made = host(LAYER)
    with no_effects():
        assert found(said, made) == account


def test_yourself_and_root_are_known_without_a_root(host: MakeHost) -> None:
    made = host(uid=1000, gid=100)
    assert [find(of(said), made, []) for said in ("self", "root")] == [Account("user", 1000, 100, "/home/user"), ROOT]


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        ("postgrs", 'no user "postgrs" inside', "did you mean postgres?"),
        ("mysql", 'no user "mysql" inside', "it comes with a package, or say its number"),
        ("broken", 'no user "broken" inside', "it comes with a package, or say its number"),
        ("nobody", 'no user "nobody" inside', "it comes with a package, or say its number"),
        ("postgres:shadows", 'no group "shadows" inside', "did you mean shadow?"),
    ],
)
def test_a_name_that_nobody_has_is_an_error(host: MakeHost, said: str, message: str, hint: str) -> None:
    with pytest.raises(TemplateError) as caught:
        found(said, host(LAYER))
    assert (caught.value.message, caught.value.hint) == (f"box.toml: user.as: {message}", hint)


def test_a_name_in_a_root_that_is_not_built_is_said_to_be_unknown_yet(host: MakeHost) -> None:
    made = host()
    with pytest.raises(
        TemplateError, match=r'no user "postgres" inside, as far as is known: the root is not built yet'
    ):
        found("postgres", made)
    assert found("102:104", made) == Account("102", 102, 104, "/", ())


# --- in which root ----------------------------------------------------------------------------------------------------


def test_what_was_written_in_the_environment_covers_the_layers(host: MakeHost) -> None:
    row = "postgres:x:999:999::/srv:/bin/sh\n"
    upper = host({**LAYER, "/upper/etc/passwd": row, "/upper/etc/group": ""})
    assert found("postgres", upper) == Account("postgres", 999, 999, "/srv", ())
    between = host({**LAYER, "/upper/etc/other": "", "/upper-layer/etc/passwd": row})
    assert found("postgres", between) == Account("postgres", 999, 999, "/srv", (103, 105))


def test_a_file_that_the_plan_places_covers_them_all(host: MakeHost) -> None:
    placed = [*OVERLAY, file("/etc/passwd", "postgres:x:7:8::/srv:/bin/sh\n"), file("/etc/group", "")]
    assert found("postgres", host(LAYER), placed) == Account("postgres", 7, 8, "/srv", ())


def test_a_root_that_is_a_directory_is_read_where_it_is(host: MakeHost) -> None:
    assert found("postgres", host(LAYER), [bind("/layer", "/")]) == POSTGRES


@pytest.mark.parametrize("link", ["/upper/etc", "/upper/etc/passwd"])
def test_no_link_of_a_root_leads_to_the_hosts_accounts(host: MakeHost, link: str) -> None:
    hosts = {"/etc/passwd": "postgres:x:1000:1000::/:/bin/sh\n"}
    made = host({**LAYER, **hosts}, links={link: link.removeprefix("/upper")})
    with pytest.raises(TemplateError, match="no user"):
        found("postgres", made)


def test_what_cannot_be_read_as_a_table_knows_nobody(host: MakeHost) -> None:
    with pytest.raises(TemplateError, match="no user"):
        found("postgres", host({"/layer/etc/passwd": USERS + "#" * (1 << 20)}))


# --- what becomes of it -----------------------------------------------------------------------------------------------

SUBIDS = {"/etc/subuid": "user:100000:65536\n", "/etc/subgid": "user:200000:65536\n"}
HELPERS = {"/usr/bin/newuidmap": "", "/usr/bin/newgidmap": ""}


def test_with_one_mapped_id_it_is_the_users(host: MakeHost) -> None:
    assert identity(of("postgres"), host(uid=1000, gid=100), POSTGRES) == {
        "map": "single",
        "uid": 102,
        "gid": 104,
        "uid_map": [[102, 1000, 1]],
        "gid_map": [[104, 100, 1]],
    }


def test_in_a_range_it_is_one_of_many_with_groups_of_its_own(host: MakeHost) -> None:
    made = host({**SUBIDS, **HELPERS})
    ids = identity(of("postgres", map="range"), made, POSTGRES)
    assert (ids["uid"], ids["gid"], ids["groups"]) == (102, 104, [104, 103, 105])
    assert ids["uid_map"] == [[0, 100000, 1000], [1000, 1000, 1], [1001, 101000, 64535]]
    assert "groups" not in identity(of("self", map="range"), made, find(of("self"), made, []))
    assert "groups" not in identity(of("root", map="range"), made, ROOT)


def test_a_group_that_no_map_holds_is_left_out(host: MakeHost) -> None:
    rows = ((102, 1000, 1), (104, 100000, 1))
    spec = of("postgres", uid_map=rows, gid_map=((104, 1000, 1), (105, 100000, 1)))
    assert identity(spec, host(HELPERS), POSTGRES)["groups"] == [104, 105]


@pytest.mark.parametrize(
    ("spec", "account", "message"),
    [
        (
            of("root", uid_map=((1, 1000, 1),), gid_map=((0, 1000, 1),)),
            ROOT,
            'uid_map: maps nobody to 0, and as = "root" is 0',
        ),
        (
            of("postgres", uid_map=((102, 1000, 1),), gid_map=((0, 1000, 1),)),
            POSTGRES,
            'gid_map: maps nobody to 104, and as = "postgres" is 104',
        ),
        (
            of("70000", map="range"),
            Account("70000", 70000, 70000, "/", ()),
            'maps nobody to 70000, and as = "70000" is',
        ),
    ],
)
def test_who_is_not_mapped_cannot_be_had(host: MakeHost, spec: Spec, account: Account, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        identity(spec, host({**SUBIDS, **HELPERS}), account)


@pytest.mark.parametrize(
    ("said", "account", "powers"),
    [
        ("postgres", POSTGRES, ([], ["deny"], False)),
        ("root", ROOT, (list(ROOT_CAPABILITIES), ["deny", "emulate-root"], True)),
        ("0", replace(ROOT, groups=()), (list(ROOT_CAPABILITIES), ["deny", "emulate-root"], True)),
    ],
)
def test_only_uid_0_has_the_powers_of_root(host: MakeHost, said: str, account: Account, powers: Any) -> None:
    limits = confine(of(said), identity(of(said), host(), account))
    assert (limits["capabilities"], limits["seccomp"], limits["setuid_bits"]) == powers


def test_a_plan_has_the_users_name_and_home(host: MakeHost) -> None:
    plan = make_plan(of("postgres"), host(LAYER), OVERLAY)
    assert plan["env"] == {"HOME": "/var/lib/postgresql", "LOGNAME": "postgres", "USER": "postgres"}
    assert (plan["identity"]["uid"], plan["cwd"]) == (102, "/var/lib/postgresql")
