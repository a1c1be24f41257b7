"""[network]: which steps each mode becomes, what is borrowed from the host, and what the helpers are told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from devns.api import (
    Child,
    Host,
    Problem,
    Spec,
    Step,
    TemplateError,
    Unsupported,
    bind,
    file,
    loopback,
    namespace,
    note,
    outside,
    setenv,
    sysfs,
)
from devns.decode import At, decode
from devns.spec import Namespaces, Uts
from devns_network import helper, lent, user
from devns_network.plugin import NetworkTable, devns_check, devns_plan, devns_table

HOME = "/home/dev"
BARE = {"certificates": "own", "proxy": "none", "registries": "none"}
USER = {"mode": "user", **BARE}
TUN = {"/dev/net/tun": ""}
PASTA = {"/usr/bin/pasta": ""}
SLIRP = {"/usr/bin/slirp4netns": ""}


def machine(
    root: Path, files: Mapping[str, str] = MappingProxyType({}), *, release: str = "6.12.0", **env: str
) -> Host:
    for path, text in {"/usr/bin/x": "", "/dev/x": "", **files}.items():
        place = root / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(0o755 if path.startswith("/usr/bin/") else 0o666)
    for directory, _, _ in os.walk(root):
        os.chmod(directory, 0o755)
    environ = {"HOME": HOME, "PATH": "/usr/bin", **env}
    # The files are this process's, and a host believes in programs of root's or its user's only.
    user = os.getuid() or 1000
    return Host.make(root=str(root), uid=user, gid=user, environ=environ, machine="x86_64", release=release)


def table(data: Mapping[str, Any]) -> NetworkTable:
    return decode(NetworkTable, dict(data), At("t.toml", "network"))


def spec(data: Mapping[str, Any], *, namespaces: Namespaces | None = None) -> Spec:
    tables: dict[type, Any] = {NetworkTable: table(data)}
    return Spec(name="app", template="t.toml", tables=tables, namespaces=namespaces or Namespaces())


def steps(data: Mapping[str, Any], host: Host, **options: Any) -> list[Step]:
    return list(devns_plan(spec(data, **options), host))


def problems(data: Mapping[str, Any], host: Host) -> list[Problem]:
    return list(devns_check(spec({**BARE, **data}), host))


def etc(name: str, text: str) -> Step:
    return file(f"/etc/{name}", text, optional=True, default=True)


def env(name: str, value: str) -> Step:
    return setenv(name, value, default=True)


def test_E_17_a_kernel_that_cannot_keep_abstract_sockets_away_is_said_where_the_network_is_the_hosts(
    tmp_path: Path,
) -> None:
    old, new = machine(tmp_path, TUN | PASTA, release="6.11.9"), machine(tmp_path, TUN | PASTA)
    (problem,) = problems({"mode": "host"}, old)
    assert (problem.id, problem.fatal) == ("abstract-sockets", False)
    assert "Linux 6.11.9 cannot keep them away" in problem.message
    assert [problems({"mode": mode}, old) for mode in ("none", "user")] == [[], []]
    assert problems({"mode": "host"}, new) == []


# --- modes ------------------------------------------------------------------------------------------------------------


def test_the_table_is_called_network() -> None:
    assert devns_table() == ("network", NetworkTable)


def test_without_a_word_the_network_is_the_hosts_with_its_names(tmp_path: Path) -> None:
    host = machine(tmp_path, {"/etc/resolv.conf": "nameserver 127.0.0.53\n", "/etc/hosts": "127.0.0.1 localhost"})
    assert steps({}, host) == [
        etc("resolv.conf", "nameserver 127.0.0.53\n"),
        etc("hosts", "127.0.0.1 localhost\n127.0.1.1 app\n"),
    ]


def test_a_host_without_a_resolver_has_none_to_lend(tmp_path: Path) -> None:
    assert steps(BARE, machine(tmp_path)) == [
        etc("hosts", "127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 app\n")
    ]


def test_a_file_that_is_no_utf_8_is_carried_in_all_the_same(tmp_path: Path) -> None:
    host = machine(tmp_path, {"/etc/hosts": ""})
    for name in ("resolv.conf", "hosts"):
        (tmp_path / "etc" / name).write_bytes(b"# caf\xe9\n")
    assert steps(BARE, host) == [etc("resolv.conf", "# caf\ufffd\n"), etc("hosts", "# caf\ufffd\n127.0.1.1 app\n")]


def test_without_a_network_there_is_the_loopback_and_its_names_and_nothing_is_borrowed(tmp_path: Path) -> None:
    files = {"/etc/hosts": "10.0.0.1 intra\n", "/etc/resolv.conf": "nameserver 10.0.0.1\n"}
    bundle = {"/etc/ssl/certs/ca-certificates.crt": "x"}
    host = machine(tmp_path, files | bundle, https_proxy="http://proxy:3128", PIP_INDEX_URL="https://mirror/simple")
    assert steps({"mode": "none"}, host) == [
        namespace("net"),
        loopback(),
        etc("hosts", "127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 app\n"),
    ]


def test_the_hostname_that_is_set_is_the_one_that_resolves(tmp_path: Path) -> None:
    host = machine(tmp_path, {"/etc/hosts": "127.0.0.1 localhost\n"})
    assert steps(BARE, host, namespaces=Namespaces(uts=Uts(hostname="box"))) == [
        etc("hosts", "127.0.0.1 localhost\n127.0.1.1 box\n")
    ]
    assert steps(BARE, host, namespaces=Namespaces(uts=False)) == [etc("hosts", "127.0.0.1 localhost\n")]


MOUNT = "22 1 0:20 / {} rw,relatime shared:1 - {} x rw"


@pytest.mark.parametrize(
    ("mounts", "possible"),
    [
        ([("/sys", "sysfs")], True),
        ([("/sys", "sysfs"), ("/sys/fs/cgroup", "cgroup2"), ("/sys/kernel/debug/tracing", "tracefs")], True),
        ([("/sys", "sysfs"), ("/sys/firmware", "tmpfs")], False),
        ([("/sys", "tmpfs")], False),
        ([], False),
    ],
)
def test_a_sysfs_is_mounted_where_the_one_that_is_seen_hides_nothing(
    tmp_path: Path, mounts: list[tuple[str, str]], possible: bool
) -> None:
    text = "".join(MOUNT.format(*mount) + "\n" for mount in mounts)
    host = machine(tmp_path, {"/proc/self/mountinfo": text})
    assert (sysfs() in steps({"mode": "none"}, host)) is possible
    assert sysfs() not in steps({"mode": "host", **BARE}, host)


@pytest.mark.parametrize("key", [{"publish": ["80:80"]}, {"allow": []}, {"deny": ["b.org"]}, {"host_loopback": [5432]}])
@pytest.mark.parametrize("mode", ["host", "none"])
def test_what_only_an_own_network_can_do_is_refused_elsewhere(key: Mapping[str, Any], mode: str) -> None:
    with pytest.raises(TemplateError) as caught:
        table({"mode": mode, **key})
    assert caught.value.message == f't.toml: network: {next(iter(key))} needs mode = "user", not "{mode}"'


# --- mode = "user" ----------------------------------------------------------------------------------------------------


def user_step(*helpers: str, **said: Any) -> Step:
    """The step of mode = "user" where these helpers could stand in for the built-in engine."""
    rows = [["built-in", None], *([name, f"/usr/bin/{name}"] for name in helpers)]
    rules: dict[str, Any] = {"publish": [], "host_loopback": [], "allow": None, "deny": []}
    return outside("devns_network.user:hold", engines=rows, **{**rules, **said})


def test_an_own_network_needs_neither_a_helper_nor_a_tap_device(tmp_path: Path) -> None:
    host = machine(tmp_path, {"/etc/resolv.conf": "nameserver 10.0.0.1\nsearch example.org\n"})
    data = {"publish": ["8000:80"], "host_loopback": [5432, 5432], **USER}
    assert problems(data, host) == []
    assert steps(data, host) == [
        namespace("net"),
        loopback(),
        user_step(publish=[["127.0.0.1", 8000, 80]], host_loopback=[5432]),
        etc("resolv.conf", "nameserver 10.0.2.3\nsearch example.org\n"),
        etc("hosts", "127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 app\n"),
    ]


def engine_step(data: Mapping[str, Any], host: Host) -> Step:
    (found,) = (step for step in steps({**USER, **data}, host) if step["op"] == "devns_network.user:hold")
    return found


def test_helpers_stand_in_for_the_built_in_engine_in_the_order_of_what_they_can_do(tmp_path: Path) -> None:
    assert engine_step({}, machine(tmp_path, TUN | PASTA | SLIRP)) == user_step("pasta", "slirp4netns")


@pytest.mark.parametrize("asked", [{"publish": ["8000:80"]}, {"host_loopback": [5432]}])
def test_slirp4netns_cannot_open_single_ports(tmp_path: Path, asked: Mapping[str, Any]) -> None:
    named = [name for name, _program in engine_step(asked, machine(tmp_path, TUN | PASTA | SLIRP))["engines"]]
    assert named == ["built-in", "pasta"]


@pytest.mark.parametrize("rules", [{"allow": ["a.org:443"]}, {"allow": []}, {"deny": ["10.0.0.0/8"]}])
def test_no_helper_can_keep_an_environment_to_rules(tmp_path: Path, rules: Mapping[str, Any]) -> None:
    assert engine_step(rules, machine(tmp_path, TUN | PASTA | SLIRP))["engines"] == [["built-in", None]]


def test_the_rules_are_understood_before_the_engine_gets_them(tmp_path: Path) -> None:
    rules = {"allow": ["*.Example.org:443", "a.org", "10.0.0.0/8:22"], "deny": ["[2001:db8::]/32", "b.org"]}
    assert engine_step(rules, machine(tmp_path)) == user_step(
        allow=[["name", "*.example.org", 443], ["name", "a.org", 0], ["net", "10.0.0.0/8", 22]],
        deny=[["net", "2001:db8::/32", 0], ["name", "b.org", 0]],
    )


def test_a_name_is_denied_as_a_whole() -> None:
    with pytest.raises(TemplateError, match=r'"b.org:25": a name is denied as a whole, without a port'):
        table({"mode": "user", "deny": ["b.org:25"]})


def test_a_helper_that_cannot_have_a_tap_device_is_not_tried(tmp_path: Path) -> None:
    machine(tmp_path, TUN | PASTA)
    (tmp_path / "dev/net/tun").chmod(0o600)
    host = Host.make(root=str(tmp_path), uid=4711, gid=4711, environ={}, machine="x86_64", release="6.1.0")
    assert engine_step({}, host)["engines"] == [["built-in", None]]


def test_a_port_that_others_can_reach_is_said(tmp_path: Path) -> None:
    host = machine(tmp_path, TUN | PASTA)
    data = {**USER, "publish": ["0.0.0.0:8000:80", "127.0.0.2:1:1", "[::1]:2:2"]}
    assert [step for step in steps(data, host) if step["op"] == "note"] == [
        note("port 8000 of 0.0.0.0 is open to the network: it leads to port 80 inside")
    ]


def test_a_port_that_belongs_to_root_is_a_problem(tmp_path: Path) -> None:
    host = machine(tmp_path, {**TUN, **PASTA, "/proc/sys/net/ipv4/ip_unprivileged_port_start": "1024\n"})
    assert problems({"mode": "user", "publish": ["80:80", "1024:80"]}, host) == [
        Problem("publish", "port 80 may be opened only by root here", "publish 1024 or above")
    ]


# --- C-20, C-14: ports and names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("", "22", "8000-80000:80", "-1:80", "0:80", "65536:80", "80:65536", "80:0", "80:-1", "80:", ":80", "80: 80"),
        *("/run/x.sock:80", "unix:/run/x", "all", "--help", ";id", "$(id)", "80:80\n", "٨٠:80", "1e3:80", "100000:80"),
        *("256.0.0.1:80:80", "1.2.3:80:80", "host:80:80", "::1:80:80", "[::1:80:80", "[fe80::%lo]:80:80", "~:80"),
    ],
)
def test_C_20_what_is_no_port_is_not_published(text: str) -> None:
    with pytest.raises(TemplateError, match=r"^t.toml: network: "):
        table({"mode": "user", "publish": [text]})


@pytest.mark.parametrize("pair", [["80:1", "80:2"], ["0.0.0.0:80:1", "80:2"], ["80:1", "[::]:80:2"]])
def test_C_20_a_port_of_the_host_is_published_once(pair: list[str]) -> None:
    with pytest.raises(TemplateError, match="port 80 of the host is published twice"):
        table({"mode": "user", "publish": pair})


def test_C_20_the_same_port_of_two_addresses_is_two_ports() -> None:
    assert table({"mode": "user", "publish": ["127.0.0.1:80:1", "127.0.0.2:80:1"]}).mode == "user"


@pytest.mark.parametrize("port", [0, -1, 65536, 10**18])
def test_C_20_what_is_no_port_of_the_loopback_is_not_opened(port: int) -> None:
    with pytest.raises(TemplateError, match="a port is a number from 1 to 65535"):
        table({"mode": "user", "host_loopback": [port]})


@pytest.mark.parametrize("text", ["a.org", "*.example.org:443", "10.0.0.0/8", "192.0.2.1:22", "[2001:db8::]/32:80"])
def test_an_allowed_target_is_a_name_or_a_network(text: str) -> None:
    assert table({"mode": "user", "allow": [text]}).allow == (text,)


@pytest.mark.parametrize(
    "text",
    [
        *("", "*", "-x", "a b", "a..b", "*.*.org", "example.org:", "example.org:0", "example.org:https", "$(id)"),
        *("10.0.0.1/8", "300.1.1.1", "2001:db8::", "x\ny", f"{'a' * 64}.org", "--help", "example.org/path"),
    ],
)
def test_C_14_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(TemplateError, match=r"^t.toml: network: "):
        table({"mode": "user", "allow": [text]})


# --- what is borrowed -------------------------------------------------------------------------------------------------


def only(key: str, value: str = "host", **more: str) -> dict[str, str]:
    return {**BARE, key: value, **more}


def test_the_hosts_ca_bundle_is_seen_where_every_program_is_told_to_look(tmp_path: Path) -> None:
    host = machine(tmp_path, {"/etc/ssl/certs/ca-certificates.crt": "x"})
    inside = "/run/devns/ca-certificates.crt"
    names = "SSL_CERT_FILE REQUESTS_CA_BUNDLE PIP_CERT CURL_CA_BUNDLE GIT_SSL_CAINFO NODE_EXTRA_CA_CERTS".split()
    assert steps(only("certificates"), host)[1:] == [
        bind("/etc/ssl/certs/ca-certificates.crt", inside),
        *(env(name, inside) for name in names),
    ]


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("/opt/ca.pem", "/opt/ca.pem"),
        ("", "/etc/pki/real.pem"),
        ("/opt", "/etc/pki/real.pem"),
        ("/nowhere", "/etc/pki/real.pem"),
        ("opt/ca.pem", "/etc/pki/real.pem"),
    ],
)
def test_the_bundle_is_the_callers_own_or_the_machines(tmp_path: Path, said: str, found: str) -> None:
    host = machine(tmp_path, {"/opt/ca.pem": "", "/etc/pki/real.pem": ""}, SSL_CERT_FILE=said)
    place = tmp_path / "etc/pki/tls/certs/ca-bundle.crt"
    place.parent.mkdir(parents=True)
    place.symlink_to("/etc/pki/real.pem")
    assert lent.find_bundle(host) == found


def test_a_machine_without_certificates_says_so_and_goes_on(tmp_path: Path) -> None:
    (problem,) = problems(only("certificates"), machine(tmp_path))
    assert (problem.id, problem.fatal) == ("certificates", False)
    assert steps(only("certificates"), machine(tmp_path)) == steps(BARE, machine(tmp_path))


PROXIES = {
    "http_proxy": "http://proxy:3128",
    "HTTPS_PROXY": "http://me:secret@proxy:3128",
    "all_proxy": "me@proxy:3128",
    "no_proxy": "localhost,.example.org",
    "NO_PROXY": "bad\x1b",
    "HTTP_PROXY": "",
}


def test_a_proxy_with_a_password_is_lent_only_where_all_are_asked_for(tmp_path: Path) -> None:
    host = machine(tmp_path, {}, **PROXIES)
    plain = [env("http_proxy", "http://proxy:3128"), env("no_proxy", "localhost,.example.org")]
    secret = [env("all_proxy", "me@proxy:3128"), env("HTTPS_PROXY", "http://me:secret@proxy:3128")]
    assert steps(only("proxy", "auto"), host)[1:] == plain
    assert steps(only("proxy", "host"), host)[1:] == [plain[0], secret[0], plain[1], secret[1]]
    assert steps(BARE, host)[1:] == []


def test_a_proxy_that_is_kept_back_is_a_problem_that_does_not_show_its_password(tmp_path: Path) -> None:
    found = problems(only("proxy", "auto"), machine(tmp_path, {}, **PROXIES))
    assert [(problem.message, problem.fatal) for problem in found] == [
        ("all_proxy is not passed in: it may hold a password", False),
        ("HTTPS_PROXY is not passed in: it may hold a password", False),
    ]


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:3128", "localhost:3128", "http://[::1]:3128/"])
def test_a_proxy_on_the_hosts_loopback_is_of_no_use_in_an_own_network(tmp_path: Path, proxy: str) -> None:
    host = machine(tmp_path, TUN | PASTA, http_proxy=proxy)
    assert env("http_proxy", proxy) in steps(only("proxy", "auto"), host)
    assert env("http_proxy", proxy) not in steps(only("proxy", "auto", mode="user"), host)


def test_package_registries_come_from_the_environment_before_the_files(tmp_path: Path) -> None:
    files = {
        "/etc/pip.conf": "[global]\nindex-url = https://machine/simple\ntrusted-host = machine\n",
        f"{HOME}/.config/pip/pip.conf": "[global]\nindex-url=https://user/simple\n[install]\nextra-index-url =\n"
        "  https://extra/a\n  https://extra/b\n",
        f"{HOME}/.npmrc": "# x\nregistry = https://npm/\n//npm/:_authToken=secret\n",
    }
    host = machine(tmp_path, files)
    assert steps(only("registries"), host)[1:] == [
        env("NPM_CONFIG_REGISTRY", "https://npm/"),
        env("PIP_EXTRA_INDEX_URL", "https://extra/a https://extra/b"),
        env("PIP_INDEX_URL", "https://user/simple"),
        env("PIP_TRUSTED_HOST", "machine"),
    ]
    said = machine(tmp_path, PIP_INDEX_URL="https://said/simple", npm_config_registry="https://said/")
    assert steps(only("registries"), said)[1::2] == [
        env("NPM_CONFIG_REGISTRY", "https://said/"),
        env("PIP_INDEX_URL", "https://said/simple"),
    ]


def test_pip_without_configuration_files_has_none(tmp_path: Path) -> None:
    host = machine(tmp_path, {"/etc/pip.conf": "[global]\nindex-url = https://x/\n"}, PIP_CONFIG_FILE="/dev/null")
    assert steps(only("registries"), host)[1:] == []


@pytest.mark.parametrize(
    "url",
    [
        *("file:///srv/mirror", "/srv/mirror", "https://me:secret@mirror/simple", "https://token@mirror/simple"),
        *("https://mirror/${TOKEN}/simple", "ftp://mirror/", "https://mirror/\x1b[31m"),
    ],
)
def test_a_registry_that_means_nothing_inside_or_holds_a_secret_is_not_lent(tmp_path: Path, url: str) -> None:
    files = {"/etc/pip.conf": f"[global]\nindex-url = {url}\n", f"{HOME}/.npmrc": f"registry={url}\n"}
    assert steps(only("registries"), machine(tmp_path, files))[1:] == []
    assert steps(only("registries"), machine(tmp_path, PIP_EXTRA_INDEX_URL=url))[1:] == []


@pytest.mark.parametrize("text", ["no section\n", "[global\n", "[global]\nindex-url\n", "\x00"])
def test_a_configuration_that_pip_itself_could_not_read_is_passed_over(tmp_path: Path, text: str) -> None:
    assert steps(only("registries"), machine(tmp_path, {"/etc/pip.conf": text}))[1:] == []


# --- the helpers ------------------------------------------------------------------------------------------------------


def step(engine: str, program: str = "/bin/x", **fields: Any) -> Step:
    return outside("x:y", engine=engine, program=program, **{"publish": [], "host_loopback": [], **fields})


def test_N_01_pasta_closes_every_way_to_the_hosts_loopback() -> None:
    line = "/bin/x --foreground --quiet --config-net --ipv4-only --no-map-gw -u none -U none -t none -T none"
    rest = "--dns-forward 10.0.2.3 --pid /tmp/ready -- 42"
    assert helper.arguments(step("pasta"), 42, "/tmp/ready") == f"{line} {rest}".split()


def test_pasta_opens_the_ports_that_are_said_and_no_others() -> None:
    told = step("pasta", publish=[["127.0.0.1", 8000, 80], ["::1", 8001, 80]], host_loopback=[5432, 6379])
    line = "/bin/x --foreground --quiet --config-net --no-map-gw -u none -U none"
    ports = "-t 127.0.0.1/8000:80 -t ::1/8001:80 -T 5432 -T 6379"
    rest = "--dns-forward 10.0.2.3 --pid /tmp/ready -- 42"
    assert helper.arguments(told, 42, "/tmp/ready") == f"{line} {ports} {rest}".split()


def test_N_01_slirp4netns_closes_the_hosts_loopback_and_locks_itself_in() -> None:
    line = "/bin/x --configure --mtu=65520 --disable-host-loopback --enable-sandbox --enable-seccomp --ready-fd=3"
    assert helper.arguments(step("slirp4netns"), 42, "/tmp/ready") == f"{line} -- 42 tap0".split()


READY = """#!/bin/sh
env > {env}
ls -l /proc/$$/fd > {fds}
echo $$ > {pid}
echo 1 >&3
exec sleep 60
"""


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def pid_of(path: Path) -> int:
    for _ in range(1000):
        if path.exists() and path.read_text().endswith("\n"):
            return int(path.read_text())
        time.sleep(0.01)
    raise AssertionError(f"{path}: never written")


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter where it went between the opening and the reading
        return False


def silent(text: str) -> None:
    raise AssertionError(text)


def test_the_helper_lives_as_long_as_it_is_held_and_no_longer(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("pid", "env", "fds")}
    program = script(tmp_path / "helper", READY.format(**paths))
    with helper.hold(step("slirp4netns", program), Child(os.getpid(), silent)):
        pid = pid_of(paths["pid"])
        assert is_running(pid)
    assert not is_running(pid)


def test_C_16_the_helper_inherits_neither_the_callers_environment_nor_its_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", "x")
    paths = {name: tmp_path / name for name in ("pid", "env", "fds")}
    program = script(tmp_path / "helper", READY.format(**paths))
    with (tmp_path / "canary").open("w") as leak:
        os.set_inheritable(leak.fileno(), True)
        with helper.hold(step("slirp4netns", program), Child(os.getpid(), silent)):
            pid_of(paths["pid"])
    assert "CANARY" not in paths["env"].read_text()
    assert "/ready" in paths["fds"].read_text()
    assert "canary" not in paths["fds"].read_text()


def test_a_helper_that_gives_up_is_an_error_with_its_own_words(tmp_path: Path) -> None:
    program = script(tmp_path / "helper", "#!/bin/sh\necho Failed to open tun >&2\nexit 1\n")
    with (
        pytest.raises(Unsupported, match=r"^network: pasta did not start: Failed to open tun$"),
        helper.hold(step("pasta", program), Child(os.getpid(), silent)),
    ):
        raise AssertionError


def test_a_helper_that_is_not_there_is_an_error_that_names_it() -> None:
    with (
        pytest.raises(Unsupported, match=r"did not start: /nowhere/pasta: No such file or directory$"),
        helper.hold(step("pasta", "/nowhere/pasta"), Child(os.getpid(), silent)),
    ):
        raise AssertionError


def test_where_the_built_in_engine_cannot_start_a_helper_stands_in_and_that_is_said(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("pid", "env", "fds")}
    program = script(tmp_path / "helper", READY.format(**paths))
    notes: list[str] = []
    # This process has no namespaces of its own that the engine could enter.
    told = user_step() | {"engines": [["built-in", None], ["slirp4netns", program]]}
    with user.hold(told, Child(os.getpid(), notes.append)):
        assert is_running(pid_of(paths["pid"]))
    reason = "built-in: the environment's namespaces: invalid argument"
    assert notes == [f"network: carried by slirp4netns: {reason}"]


def test_H_10_where_nothing_can_carry_the_network_each_says_why() -> None:
    told = user_step() | {"engines": [["built-in", None], ["pasta", "/nowhere/pasta"]]}
    with (
        pytest.raises(Unsupported) as caught,
        user.hold(told, Child(os.getpid(), silent)),
    ):
        raise AssertionError
    assert caught.value.message == (
        "network: no way to a network of its own here: built-in: the environment's namespaces: invalid argument; "
        "pasta did not start: /nowhere/pasta: No such file or directory"
    )
    assert caught.value.hint == 'set mode = "host" or "none" in [network]'


def test_C_20_a_port_that_is_taken_is_an_error_and_no_reason_for_another_engine(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = user_step(publish=[["127.0.0.1", port, 80]]) | {"engines": [["built-in", None], ["pasta", "/bin/true"]]}
        expected = f"^network: port {port} of 127.0.0.1 cannot be opened: address already in use$"
        with pytest.raises(Unsupported, match=expected), user.hold(told, Child(os.getpid(), silent)):
            raise AssertionError


HOLDER = """
import sys
sys.path[:0] = {path!r}
from devns.api import Child
from devns_network import helper
import os, time
with helper.hold({step!r}, Child(os.getpid(), print)):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_helper_ends_when_the_parent_is_killed(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("pid", "env", "fds")}
    told = step("slirp4netns", script(tmp_path / "helper", READY.format(**paths)))
    code = HOLDER.format(path=sys.path, step=told)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        pid = pid_of(paths["pid"])
        holder.send_signal(signal.SIGKILL)
    for _ in range(500):
        if not is_running(pid):
            return
        time.sleep(0.01)
    raise AssertionError("the helper is still there")
