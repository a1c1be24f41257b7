"""A repository on the loopback, with a key and packages of its own, from a template to what runs inside."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from devns.debian import mirrors
from devns.host import Host
from tests.kernel.test_debian_root import Cli, Done, need_a_mirror
from tests.pure.test_debian_kit import Server, Signer, date, release_text, send, serving

VENDOR, STRANGER = Signer(), Signer()
INDEX = "main/binary-amd64/Packages"
FILE = """\
{first}

[root]
{source}
packages = ["gadget"]

[[root.repository]]
uri = "{uri}"
suite = "v1"
key = {key}
fingerprint = "{fingerprint}"
"""


def tarball(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path, (mode, data) in files.items():
            parts = path.split("/")
            for depth in range(1, len(parts) + 1):
                entry = tarfile.TarInfo("./" + "/".join(parts[:depth]))
                if depth < len(parts):
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(entry)
                else:
                    entry.size, entry.mode = len(data), mode
                    tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


POSTINST = "echo configured > /etc/gadget.state"
# What a package's script may not do in a build: reach the network, the kernel's settings, init, namespaces or devices.
# What it leaves running ends. A line for each that worked; all of these programs are Essential.
HOSTILE = r"""
tried() { if "$@" >/dev/null 2>&1; then echo "$1 $2 worked"; fi; }
{
    tried true control
    tried perl -MIO::Socket::INET -e 'IO::Socket::INET->new(PeerAddr => "ADDRESS", Timeout => 5) or exit 1'
    tried sh -c 'echo x > /proc/sys/kernel/core_pattern'
    tried sh -c 'echo 1 > /proc/sys/vm/drop_caches'
    tried sh -c 'echo b > /proc/sysrq-trigger'
    tried unshare --user true
    tried unshare --mount true
    tried chroot /proc/1/root true
    tried hostname other
    mknod /mnt/mem c 1 1 2>/dev/null; tried test -c /mnt/mem
    tried dd if=/dev/mem of=/dev/null count=1
    [ "$(bash -c 'ulimit -u')" -le 4096 ] || echo no limit of processes
    kill -9 1
    (setsid sleep 86397.25 &) >/dev/null 2>&1
    echo done
} > /etc/gadget.state
"""


def make_deb(version: str, postinst: str = POSTINST) -> tuple[bytes, bytes]:
    """The package `gadget`, and its paragraph in an index. What it installs says its version."""
    control = (
        f"Package: gadget\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody <nobody@test.invalid>\n"
        "Depends: libc6, ca-certificates\nDescription: a gadget\n"
    )
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": tarball(
            {"control": (0o644, control.encode()), "postinst": (0o755, f"#!/bin/sh\n{postinst}\n".encode())}
        ),
        "data.tar.gz": tarball({"usr/bin/gadget": (0o755, f"#!/bin/sh\necho gadget {version}\n".encode())}),
    }
    deb = b"!<arch>\n"
    for name, data in members.items():
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    digest = hashlib.sha256(deb).hexdigest()
    fields = f"Filename: pool/gadget_{version}_amd64.deb\nSize: {len(deb)}\nSHA256: {digest}\n"
    return deb, f"{control}{fields}\n".encode()


class Vendor:
    """The repository, and a project that names it."""

    def __init__(self, cli: Cli, server: Server, project: Path) -> None:
        self.cli = cli
        self.server = server
        self.project = project
        self.uri = f"{server.url}/{project.name}"
        self.publish("1.0")

    def publish(
        self, *versions: str, signer: Signer = VENDOR, age: float = 60, postinst: str = POSTINST, **fields: str
    ) -> None:
        made = {version: make_deb(version, postinst) for version in versions}
        index = b"".join(paragraph for _, paragraph in made.values())
        text = release_text({INDEX: index}, suite="v1", origin="Vendor", date=date(time.time() - age), **fields)
        self.put("dists/v1/InRelease", signer.sign(text))
        self.put(f"dists/v1/{INDEX}", index)
        self.put(f"dists/v1/main/binary-amd64/by-hash/SHA256/{hashlib.sha256(index).hexdigest()}", index)
        for version, (deb, _) in made.items():
            self.put(f"pool/gadget_{version}_amd64.deb", deb)

    def put(self, path: str, data: bytes) -> None:
        self.server.replies[f"/{self.project.name}/{path}"] = send(data)

    def write(self, *, first: str = 'extends = "debian12"', source: str = "", key: str = '"./vendor.asc"') -> None:
        """The project file, trusted."""
        (self.project / "vendor.asc").write_text(str(VENDOR.secret.extract_certificate()))
        digits = VENDOR.fingerprint.upper()
        spaced = " ".join(digits[at : at + 4] for at in range(0, 40, 4))
        text = FILE.format(first=first, source=source, uri=self.uri, key=key, fingerprint=spaced)
        (self.project / ".devns.toml").write_text(text)

    def devns(self, *arguments: str) -> Done:
        return self.cli(*arguments, cwd=self.project)

    def ok(self, *arguments: str) -> str:
        done = self.devns(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """The command line over the store that the tests of the Debian root use too, so that debian12 is built once."""
    need_a_mirror()
    said = os.environ.get("DEVNS_TEST_STORE")
    store = Path(said) if said else tmp_path_factory.getbasetemp() / "shared-store"
    return Cli(tmp_path_factory.mktemp("home"), store)


@contextlib.contextmanager
def a_vendor(cli: Cli) -> Iterator[Vendor]:
    project = cli.home / "work" / f"vendor-{os.urandom(3).hex()}"
    (project / ".git").mkdir(parents=True)
    with serving() as server:
        vendor = Vendor(cli, server, project)
        vendor.write()
        yield vendor
    if made := [name for name in cli.names("environments") if name.startswith(project.name)]:
        assert cli("remove", *made).returncode == 0


@pytest.fixture
def vendor(cli: Cli) -> Iterator[Vendor]:
    with a_vendor(cli) as vendor:
        yield vendor


@pytest.fixture(scope="module")
def direct(cli: Cli) -> Iterator[Vendor]:
    """A root of the project's own, built in one layer, by a package that tries what it may not do."""
    certificate = str(VENDOR.secret.extract_certificate())
    with a_vendor(cli) as vendor:
        address = vendor.server.url.partition("://")[2]
        vendor.publish("1.0", age=50, postinst=HOSTILE.replace("ADDRESS", address))
        vendor.write(first="", source='from = "debian:bookworm"', key=f"'''\n{certificate}'''")
        vendor.ok("trust")
        vendor.ok("build")
        yield vendor


@pytest.mark.parametrize("template", ["debian12", "debian13"])  # their apts verify by gpgv and by sqv
def test_a_project_runs_what_its_own_repository_has_and_the_apt_inside_goes_on(vendor: Vendor, template: str) -> None:
    vendor.write(first=f'extends = "{template}"')
    vendor.ok("trust")
    assert vendor.ok("run", "--", "sh", "-c", "gadget && cat /etc/gadget.state") == "gadget 1.0\nconfigured\n"
    updated = vendor.devns("run", "--root", "--", "apt-get", "update")
    assert updated.returncode == 0, updated.stderr
    assert [line for line in (updated.stdout + updated.stderr).splitlines() if line[:2] in ("W:", "E:")] == []
    assert f"500 {vendor.uri} v1/main amd64 Packages" in vendor.ok("run", "--", "apt-cache", "policy", "gadget")

    vendor.publish("1.0", "2.0", age=30)
    script = "apt-get update -qq && apt-get install -qq --only-upgrade gadget >/dev/null && gadget"
    assert vendor.ok("run", "--root", "--", "sh", "-c", script) == "gadget 2.0\n"


def test_a_root_of_the_projects_own_is_built_with_it_in_one_layer(direct: Vendor) -> None:
    assert direct.ok("run", "--", "gadget") == "gadget 1.0\n"
    listing = direct.ok("run", "--", "sh", "-c", "stat -c '%a %n' /etc/apt/keyrings/* /etc/apt/sources.list.d/*")
    assert listing.splitlines() == [
        "644 /etc/apt/keyrings/devns-1.asc",
        "644 /etc/apt/sources.list.d/debian.sources",
        "644 /etc/apt/sources.list.d/devns.sources",
    ]
    keyring = direct.ok("run", "--", "cat", "/etc/apt/keyrings/devns-1.asc")
    assert keyring == str(VENDOR.secret.extract_certificate())
    assert direct.devns("run", "--root", "--", "apt-get", "update").returncode == 0


def test_a_proxy_that_apt_has_here_is_the_way_of_devns_and_of_the_apt_inside(vendor: Vendor, tmp_path: Path) -> None:
    vendor.cli.build("debian12", "single")
    vendor.publish("1.0", age=50, postinst="apt-config dump Acquire::http::Proxy > /etc/gadget.state")
    elsewhere = f"http://apt.invalid/{vendor.project.name}"
    for path, reply in list(vendor.server.replies.items()):
        vendor.server.replies[f"http://apt.invalid{path}"] = reply  # what a proxy is asked for
    vendor.uri = elsewhere
    vendor.write()
    vendor.ok("trust")
    conf = tmp_path / "apt.conf"
    conf.write_text(f'Acquire::http::Proxy::apt.invalid "{vendor.server.url}";\n')
    done = vendor.cli("build", cwd=vendor.project, env={"APT_CONFIG": str(conf)})
    assert done.returncode == 0, done.stderr
    assert f'Acquire::http::Proxy::apt.invalid "{vendor.server.url}";' in vendor.ok(
        "run", "--", "cat", "/etc/gadget.state"
    )
    assert "90devns" not in vendor.ok("run", "--", "ls", "/etc/apt/apt.conf.d")


def test_A_32_what_a_packages_script_tries_in_a_build_leads_nowhere(direct: Vendor) -> None:
    assert direct.ok("run", "--", "cat", "/etc/gadget.state") == "true control worked\ndone\n"
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert [command for command in running if b"86397.25" in command] == []


def test_A_32_a_script_that_ends_all_it_can_see_ends_its_own_build(vendor: Vendor) -> None:
    vendor.cli.build("debian12", "single")
    vendor.ok("trust")
    before = vendor.cli.names("layers")
    vendor.publish("1.0", age=50, postinst="kill -9 -1")
    done = vendor.devns("build")
    assert (done.returncode, "Traceback" in done.stderr) == (125, False)
    assert "apt-get install gadget ended with status 137" in done.stderr
    assert (vendor.cli.names("layers"), vendor.cli.names("staging")) == (before, [])


def test_the_apt_inside_believes_no_other_key_for_it(vendor: Vendor) -> None:
    vendor.ok("trust")
    vendor.ok("build")
    vendor.publish("3.0", signer=STRANGER, age=10)
    updated = vendor.devns("run", "--root", "--", "apt-get", "update")
    assert "NO_PUBKEY" in updated.stdout + updated.stderr
    assert "Candidate: 1.0" in vendor.ok("run", "--", "apt-cache", "policy", "gadget")


def test_S_24_an_untrusted_project_names_no_repository(vendor: Vendor) -> None:
    done = vendor.devns("run", "--", "gadget")
    assert (done.returncode, done.stdout) == (78, "")
    assert "is not trusted, and asks for root.repository = { uri = " in done.stderr
    assert "hint: devns trust" in done.stderr
    shown = vendor.ok("trust", "--show").splitlines()
    assert [line.partition(" = ")[0] for line in shown if line.startswith("+")] == ["+ root.repository"]
    assert vendor.server.asked == []


def wrong_key(vendor: Vendor) -> None:
    (vendor.project / "vendor.asc").write_text(str(STRANGER.secret.extract_certificate()))


def no_key(vendor: Vendor) -> None:
    (vendor.project / "vendor.asc").unlink()


def a_link_out(vendor: Vendor) -> None:
    no_key(vendor)
    (vendor.project / "vendor.asc").symlink_to("/etc/passwd")


def no_fingerprint(vendor: Vendor) -> None:
    path = vendor.project / ".devns.toml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("fingerprint")))


def signed_by_a_stranger(vendor: Vendor) -> None:
    vendor.publish("1.0", signer=STRANGER)


def expired(vendor: Vendor) -> None:
    if not mirrors.find(Host.probe()).ages[""].check_until:
        pytest.skip("needs an apt that is not told to ignore Valid-Until, and this machine's is")
    vendor.publish("1.0", age=90000, valid_until=date(time.time() - 86400))


def tampered_index(vendor: Vendor) -> None:
    for path in [path for path in vendor.server.replies if "Packages" in path or "by-hash" in path]:
        vendor.server.replies[path] = send(make_deb("9.9")[1])


def tampered_package(vendor: Vendor) -> None:
    deb = make_deb("1.0")[0]
    vendor.put("pool/gadget_1.0_amd64.deb", deb[:-20] + b"\0" * 20)


def no_index(vendor: Vendor) -> None:
    vendor.put("dists/v1/InRelease", VENDOR.sign(release_text({"x": b""}, suite="v1")))


def redirected(vendor: Vendor) -> None:
    name = f"/{vendor.project.name}/dists/v1/InRelease"
    vendor.server.replies[name] = send(b"", status=302, Location="file:///etc/passwd")


REFUSALS = {
    wrong_key: (78, "it has no key with the fingerprint"),
    no_key: (78, "vendor.asc: no such file"),
    a_link_out: (78, "leads out of the project, to /etc/passwd"),
    no_fingerprint: (78, "root.repository[0].fingerprint: is required"),
    signed_by_a_stranger: (125, "v1/InRelease: not signed by a key that is good for it"),
    expired: (125, "it was good until"),
    tampered_index: (125, "promise"),
    tampered_package: (125, "not the file that was promised"),
    no_index: (125, f"it does not list {INDEX}"),
    redirected: (125, "redirected to file:///etc/passwd"),
}


@pytest.mark.parametrize("spoil", REFUSALS)
def test_what_is_not_as_the_template_says_is_one_sentence_and_leaves_nothing(vendor: Vendor, spoil: object) -> None:
    vendor.cli.build("debian12", "single")
    status, sentence = REFUSALS[spoil]  # type: ignore[index]  # parametrize hides what it is
    vendor.ok("trust")
    before = vendor.cli.names("layers")
    spoil(vendor)  # type: ignore[operator]
    vendor.devns("trust")
    done = vendor.devns("run", "--", "gadget")
    assert (done.returncode, done.stdout) == (status, "")
    said = [line for line in done.stderr.splitlines() if line.startswith("devns: ")]  # stages of the build, then it
    assert sentence in said[-1], done.stderr
    assert (done.stderr.count(sentence), "Traceback" in done.stderr) == (1, False)
    assert (vendor.cli.names("layers"), vendor.cli.names("staging")) == (before, [])
