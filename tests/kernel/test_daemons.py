"""Real daemons, installed by apt as root inside, started as who they must be, and spoken to in their own protocols.

Four of them run each time, with one mapped id. With DEVNS_TEST_DAEMONS=all there are ten, with one mapped id and with a
range: `DEVNS_TEST_DAEMONS=all pytest tests/kernel/test_daemons.py`. Their environments have no network but a loopback
of their own, other than while packages are installed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from devns import sealed
from devns.debian import mirrors
from devns.debian.errors import MirrorError
from devns.debian.transport import Session
from devns.errors import Unsupported
from devns.host import Host

CHECKOUT = Path(__file__).parents[2]
ALL = os.environ.get("DEVNS_TEST_DAEMONS") == "all"
PAGE = (CHECKOUT / "docs/services.md").read_text()
(TEMPLATE,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(PACKAGES,) = re.findall(r"^packages = .*$", TEMPLATE, re.MULTILINE)
EXAMPLES = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMON: list[str] = re.findall(r'"(.*?)"', PACKAGES)
MORE = (
    "amqp-tools bind9 bind9-dnsutils mariadb-server memcached mosquitto mosquitto-clients rabbitmq-server squid".split()
)

# Users, groups, capabilities of files, statoverrides, device nodes, ACLs: each of these once failed somewhere with one
# mapped id. There can be only one mail server and one time server at a time: the last two replace others.
MANY = (
    "dbus nginx openssh-server postgresql sudo systemd",
    "apache2 at avahi-daemon bind9 build-essential chrony cron cups-daemon dovecot-core fontconfig git iputils-ping "
    "man-db mariadb-server memcached mosquitto nfs-common nodejs openjdk-17-jre-headless php-fpm polkitd postfix "
    "rabbitmq-server redis-server rsyslog rtkit screen slapd squid tor udev",
    "ntpsec nullmailer",
)
# What dpkg has to complain about: nothing where all that is installed is configured.
UNCONFIGURED = "dpkg --audit; dpkg-query -W -f '${db:Status-Abbrev}${Package}\\n' | grep -v -e ^ii -e ^rc || true"

pytestmark = pytest.mark.network
when_all = pytest.mark.skipif(not ALL, reason="one of the ten that run with DEVNS_TEST_DAEMONS=all")

# What the scripts share. `soon` waits for a command to succeed; `as` is runuser(1) where one is not that user already;
# `owner` says whom a process belongs to.
PRELUDE = """\
set -eu
readlink /proc/self/ns/pid
soon() { for _ in $(seq 300); do "$@" > /dev/null 2>&1 && return; sleep 0.1; done; "$@"; }
as() { local who=$1; shift; if [ "$(id -un)" = "$who" ]; then "$@"; else runuser -u "$who" -- "$@"; fi; }
owner() { stat -c %U "/proc/$1"; }
cd /
"""


class Answer(NamedTuple):
    status: int
    lines: list[str]
    errors: str


class Box:
    """One environment with all these daemons in it, in a store of its own."""

    def __init__(self, place: Path, map: str) -> None:
        self.place = place
        self.map = map
        self.range = map == "range"

    def write(self, network: str) -> None:
        """The template of docs/services.md, whose packages apt is to install instead, with this map and network."""
        path = self.place / "home/.config/devns/templates/services.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = TEMPLATE.replace('mode = "none"', f'mode = "{network}"').replace(PACKAGES, "packages = []")
        path.write_text(f'{text}\n[user]\nmap = "{self.map}"\n')

    def command(self, *arguments: str) -> dict[str, Any]:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "DEVNS"))}
        env |= {key: value for key, value in os.environ.items() if key.startswith("DEVNS_DEBIAN_")}
        env |= {"HOME": str(self.place / "home"), "DEVNS_STORE": str(self.place / "store")}
        env |= {"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'plugins'}"}
        return {"args": [sys.executable, "-m", "devns", *arguments], "env": env, "cwd": self.place, "text": True}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            **self.command("run", *arguments), check=False, capture_output=True, stdin=subprocess.DEVNULL
        )

    def apt(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        install = ["apt-get", "install", "--yes", *arguments]
        return self.run("--root", "-e", "DEBIAN_FRONTEND=noninteractive", "services", "--", *install)

    def serve(self, script: str, *who: str) -> Answer:
        """Run the script as `who` ("--root", "--user", NAME); afterwards not a process is left of it."""
        done = self.run(*who, "services", "--", "bash", "-c", PRELUDE + script)
        namespace, *lines = done.stdout.splitlines()
        assert members(namespace) == []
        return Answer(done.returncode, lines, done.stderr)

    def said(self, script: str, *who: str) -> list[str]:
        """What it printed; it must have ended well."""
        answer = self.serve(script, *who)
        assert answer.status == 0, "\n".join([*answer.lines, answer.errors])
        return answer.lines

    def typed(self, script: str) -> list[str]:
        """What is said to who types this on the host, where `devns` is the command of that name."""
        run = self.command()
        program = f'devns() {{ {shlex.join(run["args"])} "$@"; }}; set -e\n{script}'
        done = subprocess.run(**run | {"args": ["bash", "-c", program]}, check=False, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout).splitlines()

    def as_user(self, name: str) -> tuple[str, ...]:
        """How a daemon that must not be root comes to be `name`: at once, or in a range by way of root."""
        return ("--root",) if self.range else ("--user", name)


def members(namespace: str) -> list[int]:
    """The processes in a PID namespace, as far as this process may see: also those of subordinate ids."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                found.append(int(pid))
    return found


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Box]]:
    """The environment for a map, made when it is first asked for."""
    need_a_mirror()
    made: dict[str, Box] = {}

    def find(map: str) -> Box:
        if map not in made:
            box = Box(tmp_path_factory.mktemp(map), map)
            box.write("host")
            done = box.apt("--no-install-recommends", *COMMON, *(MORE if ALL else []))
            assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
            box.write("none")
            made[map] = box
        return made[map]

    yield find
    for box in made.values():
        sealed.delete(str(box.place / "store"), Host.probe())


def need_a_mirror() -> None:
    try:
        found = mirrors.find(Host.probe())
        with Session(found.route) as session:
            session.read(f"{found.main}/dists/bookworm/InRelease", limit=1 << 20)
    except (MirrorError, Unsupported) as error:
        if "archive" in os.environ.get("DEVNS_MUST_WORK", "").split(","):
            pytest.fail(f"archive must work here: {error}", pytrace=False)
        pytest.skip(f"needs archive, a Debian mirror that can be reached: {error}")


@pytest.fixture(params=["single", pytest.param("range", marks=when_all)])
def box(request: pytest.FixtureRequest, boxes: Callable[[str], Box], require: Any) -> Box:
    require("userns", "overlay", "net", *(["range"] if request.param == "range" else []))
    return boxes(request.param)


# --- what apt installed -----------------------------------------------------------------------------------------------


def test_every_package_is_configured(box: Box) -> None:
    script = f"{UNCONFIGURED}; dpkg-query -W -f '${{Package}} ' {' '.join(COMMON)}"
    names = " ".join(box.said(script, "--root"))
    assert sorted(names.split()) == sorted(COMMON)


@when_all
def test_packages_that_need_many_users_are_installed_with_one_mapped_id(tmp_path: Path, require: Any) -> None:
    require("userns", "overlay")
    need_a_mirror()
    box = Box(tmp_path, "single")
    box.write("host")
    try:
        for names in MANY:
            done = box.apt(*names.split())
            assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
            assert box.said(f"{UNCONFIGURED}; dpkg-query -W -f '${{Package}}\\n' {names}", "--root") == sorted(
                names.split()
            )
    finally:
        sealed.delete(str(tmp_path / "store"), Host.probe())


# --- the daemons ------------------------------------------------------------------------------------------------------


def test_postgresql_answers_a_query(box: Box) -> None:
    script = """
        pg_createcluster 15 shop -o ssl=off > /dev/null
        pg_ctlcluster 15 shop start
        as postgres psql --cluster 15/shop -qAt -c 'create table t (n int); insert into t values (20), (22)' \\
            -c 'select sum(n), current_user from t'
        owner "$(head -n 1 /var/lib/postgresql/15/shop/postmaster.pid)"
        pg_dropcluster --stop 15 shop
    """
    assert box.said(script, *box.as_user("postgres")) == ["42|postgres", "postgres"]


def test_sshd_lets_in_whoever_has_the_key(box: Box) -> None:
    """With one mapped id there is one user: sshd is started as you, and lets you in. In a range it is root's."""
    script = """
        guest=$(id -un)
        if [ "$guest" = root ]; then guest=guest; useradd --create-home guest; fi
        home=$(getent passwd $guest | cut -d: -f6)
        ssh-keygen -q -t ed25519 -N '' -f /tmp/key
        as $guest mkdir -p -m 700 $home/.ssh
        as $guest tee $home/.ssh/authorized_keys < /tmp/key.pub > /dev/null
        mkdir -p /run/sshd
        /usr/sbin/sshd
        printf '%s\n' 'StrictHostKeyChecking no' 'BatchMode yes' 'LogLevel ERROR' > /tmp/config
        login() { ssh -F /tmp/config -i /tmp/key $guest@localhost "$@"; }
        soon login true
        login 'id -un; grep CapEff /proc/self/status; cat /etc/shadow > /dev/null 2>&1; echo $? $SSH_CONNECTION'
        if [ "$guest" = guest ]; then userdel guest; fi
    """
    who, powers, connection = box.said(script, *(["--root"] if box.range else []))
    assert who == ("guest" if box.range else Host.probe().user)
    assert int(powers.split()[1], 16) == 0
    status, *_addresses, port = connection.split()
    assert (status, port) == ("1" if box.range else "0", "22")  # with one mapped id every file is yours


def test_redis_keeps_what_it_is_given(box: Box) -> None:
    script = """
        as redis mkdir -p /tmp/redis
        as redis redis-server --port 6379 --dir /tmp/redis --daemonize yes --pidfile /tmp/redis/pid > /dev/null
        soon redis-cli ping
        redis-cli set answer 42
        redis-cli incr answer
        redis-cli get answer
        owner "$(cat /tmp/redis/pid)"
    """
    assert box.said(script, *box.as_user("redis")) == ["OK", "43", "43", "redis"]


def test_nginx_serves_a_page_on_port_80(box: Box) -> None:
    """It drops its privileges without looking whether they are gone: root's is good enough for both maps."""
    script = """
        echo 'forty-two' > /var/www/html/answer
        nginx
        curl -sS -w '%{http_code} %{content_type}\\n' http://127.0.0.1/answer
        curl -sS -o /dev/null -w '%{http_code}\\n' http://127.0.0.1/absent
        master=$(cat /run/nginx.pid)
        owner $master
        owner "$(cut -d' ' -f1 /proc/$master/task/$master/children)"
    """
    worker = "www-data" if box.range else "root"
    answer = ["forty-two", "200 application/octet-stream", "404", "root", worker]
    assert box.said(script, "--root") == answer


@when_all
def test_mariadb_answers_a_query(box: Box) -> None:
    script = """
        install -d -o mysql -g mysql /run/mysqld
        mariadbd-safe --user=mysql > /dev/null 2>&1 &
        soon mariadb-admin ping
        mariadb -N -e 'create database shop; create table shop.t (n int); insert into shop.t values (20), (22)'
        mariadb -N -e 'select sum(n), current_user() from shop.t; drop database shop'
        owner "$(cat /run/mysqld/mysqld.pid)"
    """
    name = "root" if box.range else "mysql"  # who asks
    assert box.said(script, *box.as_user("mysql")) == [f"42\t{name}@localhost", "mysql"]


@when_all
def test_memcached_keeps_what_it_is_given(box: Box) -> None:
    script = """
        memcached -u memcache -l 127.0.0.1 -d -P /tmp/pid
        soon test -s /tmp/pid
        exec 3<>/dev/tcp/127.0.0.1/11211
        printf 'set answer 0 0 2\\r\\n42\\r\\nincr answer 1\\r\\nget answer\\r\\nquit\\r\\n' >&3
        tr -d '\\r' <&3
        owner "$(cat /tmp/pid)"
    """
    owner = "memcache" if box.range else "root"
    assert box.said(script, "--root") == ["STORED", "43", "VALUE answer 0 2", "43", "END", owner]


@when_all
def test_rabbitmq_hands_on_a_message(box: Box) -> None:
    script = """
        export RABBITMQ_PID_FILE=/tmp/rabbit.pid
        rabbitmq-server > /tmp/log 2>&1 &
        rabbitmqctl -q wait --timeout 90 /tmp/rabbit.pid > /dev/null || { cat /tmp/log; exit 1; }
        amqp-declare-queue -q jobs
        amqp-publish -r jobs -b 'job 42'
        rabbitmqctl -q list_queues | tail -n 1
        amqp-get -q jobs; echo
        rabbitmqctl -q list_queues | tail -n 1
        amqp-delete-queue -q jobs > /dev/null
        owner "$(cat /tmp/rabbit.pid)"
    """
    assert box.said(script, *box.as_user("rabbitmq")) == ["jobs", "jobs\t1", "job 42", "jobs\t0", "rabbitmq"]


@when_all
def test_bind_answers_for_a_zone_of_its_own_on_port_53(box: Box) -> None:
    script = """
        install -d -o bind -g bind /run/named
        printf '%s\\n' '$TTL 60' '@ SOA ns root 1 60 60 60 60' '@ NS ns' 'ns A 127.0.0.1' 'www A 192.0.2.7' > /tmp/zone
        cat > /tmp/named.conf <<-'END'
            options { directory "/tmp"; listen-on { 127.0.0.1; }; recursion no; };
            zone "shop.test" { type primary; file "/tmp/zone"; };
END
        named $([ "$(id -u)" != 0 ] || echo -u bind) -c /tmp/named.conf
        ask() { dig +short +tries=1 +time=1 @127.0.0.1 "$@"; }
        soon ask www.shop.test A
        ask www.shop.test A; ask shop.test NS
        ask absent.shop.test A; dig @127.0.0.1 absent.shop.test | grep -o 'status: [A-Z]*'
        owner "$(cat /run/named/named.pid)"
    """
    said = ["192.0.2.7", "ns.shop.test.", "status: NXDOMAIN", "bind"]
    assert box.said(script, *box.as_user("bind")) == said


@when_all
def test_squid_fetches_a_page_of_a_server_behind_it(box: Box) -> None:
    script = """
        echo 'forty-two' > /var/www/html/answer
        nginx
        squid
        fetch() { curl -sS -i -x http://127.0.0.1:3128 http://127.0.0.1/answer; }
        soon fetch
        fetch | tr -d '\\r' | grep -E '^(HTTP|Via|forty)'
        owner "$(cat "/proc/$(cat /run/squid.pid)/task/$(cat /run/squid.pid)/children" | cut -d' ' -f1)"
    """
    said = ["HTTP/1.1 200 OK", "Via: 1.1 services (squid/5.7)", "forty-two", "proxy"]
    assert box.said(script, *box.as_user("proxy")) == said


@when_all
def test_mosquitto_hands_on_a_message(box: Box) -> None:
    script = """
        install -d -o mosquitto /run/mosquitto
        mosquitto -d -c /etc/mosquitto/mosquitto.conf 2> /dev/null
        soon mosquitto_pub -t other -m nothing
        mosquitto_sub -v -t shop/answer -C 1 -W 60 > /tmp/heard & subscriber=$!
        while [ -d /proc/$subscriber ] && [ ! -s /tmp/heard ]; do mosquitto_pub -t shop/answer -m 42; sleep 0.2; done
        wait $subscriber
        cat /tmp/heard
        owner "$(cat /run/mosquitto/mosquitto.pid)"
    """
    assert box.said(script, "--root") == ["shop/answer 42", "mosquitto" if box.range else "root"]


# --- as another user --------------------------------------------------------------------------------------------------


def test_another_user_is_in_its_groups_only_where_there_are_others(box: Box) -> None:
    groups, powers, home = box.said("id -nG; grep CapBnd /proc/self/status; echo ~", "--user", "postgres")
    assert groups == ("postgres ssl-cert" if box.range else "postgres")
    assert int(powers.split()[1], 16) == 0
    assert home == "/var/lib/postgresql"


@when_all
def test_in_a_range_postgresql_can_be_started_by_its_user(boxes: Callable[[str], Box], require: Any) -> None:
    require("range")
    start = "pg_ctlcluster 15 main start > /dev/null"
    script = f"{start}; psql -At -c 'select current_user' -c 'show ssl'; cat /etc/shadow || echo no"
    assert boxes("range").said(script, "--user", "postgres") == ["postgres", "on", "no"]


# --- the page on services ---------------------------------------------------------------------------------------------


def test_every_example_of_the_page_on_services_says_what_it_should(boxes: Callable[[str], Box], require: Any) -> None:
    require("userns", "overlay", "net")
    for example in EXAMPLES:
        assert boxes("single").typed(example) == re.findall(r"^# (.*)$", example, re.MULTILINE)


@when_all
def test_the_template_of_the_page_on_services_can_be_built(tmp_path: Path, require: Any) -> None:
    require("userns", "overlay", "net")
    box = Box(tmp_path, "single")
    box.write("none")
    path = tmp_path / "home/.config/devns/templates/services.toml"
    path.write_text(TEMPLATE)
    need_a_mirror()
    try:
        for example in EXAMPLES:
            assert box.typed(example) == re.findall(r"^# (.*)$", example, re.MULTILINE)
    finally:
        sealed.delete(str(tmp_path / "store"), Host.probe())


# --- what does not work -----------------------------------------------------------------------------------------------

NOTICED = {
    "sshd": (
        "mkdir -p /run/sshd; /usr/sbin/sshd -E /tmp/log; ssh -o BatchMode=yes localhost 2>&1 || true; cat /tmp/log",
        "permanently_set_uid: was able to restore old [e]gid",
    ),
    "postgresql": (
        "runuser -u postgres -- /usr/lib/postgresql/15/bin/initdb /tmp/db 2>&1 || true",
        "initdb: error: cannot be run as root",
    ),
    "squid": ("squid -N -d1 2>&1 || true", "FATAL: Don't run Squid as root, set 'cache_effective_user'!"),
    "named": ("mkdir /run/named; named -g -u bind 2>&1 || true", "REQUIRE(olduid == runas_pw->pw_uid) failed"),
}


@pytest.mark.parametrize(
    "daemon", [*list(NOTICED)[:2], *(pytest.param(name, marks=when_all) for name in list(NOTICED)[2:])]
)
def test_under_root_emulation_some_notice_that_they_still_are_root(
    daemon: str, boxes: Callable[[str], Box], require: Any
) -> None:
    require("userns", "overlay", "net")
    script, complaint = NOTICED[daemon]
    assert any(complaint in line for line in boxes("single").said(script, "--root"))


def test_a_daemon_ends_with_the_devns_that_runs_it(box: Box) -> None:
    script = f"{PRELUDE} redis-server --daemonize yes > /dev/null; soon redis-cli ping; echo ready; sleep 1000"
    command = box.command("run", "--root", "services", "--", "bash", "-c", script)
    with subprocess.Popen(**command, stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout is not None
            namespace = running.stdout.readline().strip()
            assert running.stdout.readline() == "ready\n"
            names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in members(namespace)}
            assert "redis-server" in names
            assert names & {"bash", "sleep"}  # the one becomes the other, as it has nothing else left to do
        finally:
            running.kill()
    deadline = time.monotonic() + 20
    while members(namespace) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members(namespace) == []
