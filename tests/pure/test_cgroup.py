"""[cgroup]: which rung a host offers, what is written there, and what is said where nothing can be."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from devns.api import Child, Host, Problem, Spec, Step, TemplateError, Unsupported, outside, rlimit
from devns.decode import At, decode
from devns.spec import User
from devns_cgroup import groups, limits
from devns_cgroup.plugin import CgroupTable, devns_check, devns_plan, devns_table

UID = 1000
GIB = 1 << 30
OWN = "/sys/fs/cgroup/user.slice/box.scope"
UNIFIED = {
    "/proc/self/cgroup": "0::/user.slice/box.scope\n",
    "/proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
    f"{OWN}/cgroup.controllers": "cpu memory pids\n",
    f"{OWN}/cgroup.subtree_control": "\n",
    f"{OWN}/cgroup.procs": "4711\n",
}
LEGACY = {
    "/proc/self/cgroup": "5:cpu,cpuacct:/box\n4:memory:/box\n3:pids:/box\n1:name=systemd:/box\n0::/box\n",
    "/proc/self/mountinfo": "31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct\n"
    "32 30 0:28 / /sys/fs/cgroup/memory rw shared:11 - cgroup cgroup rw,memory\n"
    "33 30 0:29 / /sys/fs/cgroup/pids rw shared:12 - cgroup cgroup rw,pids\n"
    "34 30 0:30 / /sys/fs/cgroup/systemd rw shared:13 - cgroup cgroup rw,xattr,name=systemd\n",
    **{f"/sys/fs/cgroup/{name}/box/cgroup.procs": "" for name in ("cpu,cpuacct", "memory", "pids")},
}
ALL = {"memory": "4G", "memory_high": "3G", "swap": "1G", "cpu": 1.5, "cpu_weight": 50, "pids": 1024}
LIMITS = {"memory": 4 * GIB, "memory_high": 3 * GIB, "swap": GIB, "cpu": 1.5, "cpu_weight": 50, "pids": 1024}
ANY = (1 << 63) - 1
ASK = "ask root for a control group of your own: cgroups(7), Delegation"


def machine(root: Path, files: Mapping[str, str], *, release: str = "6.1.0", uid: int = UID) -> Host:
    """A host of these files, and one on which a user may write exactly where everybody may."""
    for path, text in files.items():
        place = root / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(0o666)
        place.parent.chmod(0o777)
    return Host.make(root=str(root), uid=uid, gid=uid, environ={}, machine="x86_64", release=release)


def table(data: Mapping[str, Any]) -> CgroupTable:
    return decode(CgroupTable, dict(data), At("t.toml", "cgroup"))


def spec(data: Mapping[str, Any], user: User | None = None) -> Spec:
    tables: dict[type, Any] = {CgroupTable: table(data)}
    return Spec(name="app", template="t.toml", tables=tables, user=user or User())


def steps(data: Mapping[str, Any], host: Host) -> list[Step]:
    return list(devns_plan(spec(data), host))


def hold(wanted: Mapping[str, float], *, instead: tuple[str, ...] = (), enforce: str = "warn") -> Step:
    return outside("devns_cgroup.limits:hold", limits=dict(wanted), instead=list(instead), enforce=enforce)


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_is_called_cgroup() -> None:
    assert devns_table() == ("cgroup", CgroupTable)


def test_the_limits_are_what_was_said_and_no_more() -> None:
    assert table(ALL).limits == LIMITS
    assert table({"cpu": 2}).limits == {"cpu": 2.0}
    assert table({"enforce": "fail"}).limits == {}


@pytest.mark.parametrize(
    "data",
    [
        *({"memory": "0G"}, {"memory": 4}, {"memory": "4"}, {"memory": "-1G"}, {"memory_high": "1K"}, {"cpu": 0}),
        *({"cpu": -1}, {"cpu": 1e9}, {"cpu_weight": 0}, {"cpu_weight": 10001}, {"pids": 0}, {"pids": 1 << 40}),
        *({"pids": 1.5}, {"pids": True}, {"enforce": "maybe"}, {"io": 1}),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(data: Mapping[str, Any]) -> None:
    with pytest.raises(TemplateError, match=r"^t.toml: cgroup"):
        table(data)


# --- where control groups lie -----------------------------------------------------------------------------------------


def test_the_own_directory_in_the_unified_hierarchy() -> None:
    assert groups.directories(UNIFIED["/proc/self/cgroup"], UNIFIED["/proc/self/mountinfo"]) == {"": OWN}


def test_the_own_directories_of_version_1() -> None:
    assert groups.directories(LEGACY["/proc/self/cgroup"], LEGACY["/proc/self/mountinfo"]) == {
        "cpu": "/sys/fs/cgroup/cpu,cpuacct/box",
        "cpuacct": "/sys/fs/cgroup/cpu,cpuacct/box",
        "memory": "/sys/fs/cgroup/memory/box",
        "pids": "/sys/fs/cgroup/pids/box",
        "name=systemd": "/sys/fs/cgroup/systemd/box",
    }


@pytest.mark.parametrize(
    ("own", "mount", "found"),
    [
        ("0::/", "1 0 0:1 / /sys/fs/cgroup rw - cgroup2 x rw", {"": "/sys/fs/cgroup"}),
        ("0::/a/b", "1 0 0:1 /a /sys/fs/cgroup rw - cgroup2 x rw", {"": "/sys/fs/cgroup/b"}),
        ("0::/a", "1 0 0:1 /a /sys/fs/cgroup rw - cgroup2 x rw", {"": "/sys/fs/cgroup"}),
        ("0::/ab", "1 0 0:1 /a /sys/fs/cgroup rw - cgroup2 x rw", {}),
        ("0::/../x", "1 0 0:1 / /sys/fs/cgroup rw - cgroup2 x rw", {}),
        ("0::/a", "1 0 0:1 / /sys/fs/cgroup ro,nosuid - cgroup2 x rw", {}),
        ("0::/a b", "1 0 0:1 / /mnt/with\\040space rw - cgroup2 x rw", {"": "/mnt/with space/a b"}),
        ("0::/a:b", "1 0 0:1 / /c rw master:1 propagate_from:2 - cgroup2 x rw", {"": "/c/a:b"}),
        ("0::/a", "1 0 0:1 / /sys rw - sysfs x rw", {}),
        ("0::/a", "", {}),
        ("", "1 0 0:1 / /c rw - cgroup2 x rw", {}),
        ("nonsense", "nonsense", {}),
    ],
)
def test_H_11_a_directory_that_cannot_be_seen_or_written_is_none(own: str, mount: str, found: dict[str, str]) -> None:
    assert groups.directories(own, mount) == found


def test_a_controller_is_in_one_hierarchy_or_the_other() -> None:
    own = {"": "/u/devns-supervisor", "memory": "/m/box", "pids": "/p/box"}
    assert groups.places(LIMITS, own, "cpu io pids") == {
        "memory": "/m/box",
        "swap": "/m/box",
        "cpu": "/u",
        "cpu_weight": "/u",
        "pids": "/u",
    }


# --- what is written --------------------------------------------------------------------------------------------------


def test_what_is_written_in_the_unified_hierarchy() -> None:
    assert groups.unified_writes(LIMITS) == [
        ("memory", "memory.max", "4294967296"),
        ("memory_high", "memory.high", "3221225472"),
        ("swap", "memory.swap.max", "1073741824"),
        ("cpu", "cpu.max", "150000 100000"),
        ("cpu_weight", "cpu.weight", "50"),
        ("pids", "pids.max", "1024"),
    ]


def test_what_is_written_in_version_1() -> None:
    assert groups.legacy_writes(LIMITS) == [
        ("memory", "memory.limit_in_bytes", "4294967296"),
        ("swap", "memory.memsw.limit_in_bytes", "5368709120"),
        ("cpu", "cpu.cfs_period_us", "100000"),
        ("cpu", "cpu.cfs_quota_us", "150000"),
        ("cpu_weight", "cpu.shares", "512"),
        ("pids", "pids.max", "1024"),
    ]


def test_no_share_of_a_processor_is_too_small_for_the_kernel() -> None:
    assert groups.unified_writes({"cpu": 0.01}) == [("cpu", "cpu.max", "1000 100000")]


@pytest.mark.parametrize(
    ("file", "written", "read", "same"),
    [
        ("memory.max", "4294967300", "4294967296\n", True),
        ("memory.max", "4294967296", "max\n", False),
        ("memory.max", "4294967296", "8589934592\n", False),
        ("memory.max", "4294967296", "", False),
        ("pids.max", "1024", "1024\n", True),
        ("pids.max", "1024", "20\n", False),
        ("pids.max", "1024", "max\n", False),
        ("cpu.max", "150000 100000", "150000 100000\n", True),
        ("cpu.max", "150000 100000", "max 100000\n", False),
    ],
)
def test_what_is_read_back_must_be_what_was_written(file: str, written: str, read: str, same: bool) -> None:
    assert groups.holds(file, written, read) is same


@pytest.mark.parametrize(
    ("limit", "value", "text"),
    [
        ("memory", 4 * GIB, "memory 4G"),
        ("memory", 1536 << 20, "memory 1536M"),
        ("memory", 1000001, "memory 1000001"),
        ("swap", 0, "swap 0"),
        ("cpu", 1.5, "cpu 1.5"),
        ("cpu", 2.0, "cpu 2"),
        ("pids", 1024, "pids 1024"),
    ],
)
def test_a_limit_is_shown_as_it_was_written(limit: str, value: float, text: str) -> None:
    assert groups.shown(limit, value) == text


# --- plan and check ---------------------------------------------------------------------------------------------------


def test_without_limits_there_is_nothing_to_do(tmp_path: Path) -> None:
    host = machine(tmp_path, {})
    assert steps({"enforce": "fail"}, host) == []
    assert list(devns_check(spec({"enforce": "fail"}), host)) == []


def test_a_delegated_group_holds_every_limit(tmp_path: Path) -> None:
    host = machine(tmp_path, UNIFIED)
    assert list(devns_check(spec(ALL), host)) == []
    assert steps(ALL, host) == [rlimit("nproc", 1024, 1024), hold(LIMITS)]


def test_directories_of_version_1_hold_all_but_the_soft_memory_limit(tmp_path: Path) -> None:
    host = machine(tmp_path, LEGACY)
    reason = "only the unified hierarchy has it, and its memory controller is not in use here"
    assert list(devns_check(spec(ALL), host)) == [
        Problem("cgroup", f"memory_high 3G cannot be enforced here: {reason}", ASK, fatal=False)
    ]
    assert steps(ALL, host) == [rlimit("nproc", 1024, 1024), hold(LIMITS)]


def test_H_11_without_a_control_group_rlimits_stand_in_for_memory_and_processes(tmp_path: Path) -> None:
    host = machine(tmp_path, {})
    assert steps(ALL, host) == [
        rlimit("nproc", 1024, 1024),
        rlimit("data", 4 * GIB, ANY),
        hold(LIMITS, instead=("memory", "pids")),
    ]
    assert [problem.message.partition(" cannot")[0] for problem in devns_check(spec(ALL), host)] == [
        *("memory_high 3G", "swap 1G", "cpu 1.5", "cpu_weight 50")
    ]


def test_H_11_a_group_that_is_not_delegated_is_said_to_be_so(tmp_path: Path) -> None:
    host = machine(tmp_path, {**UNIFIED, "/run/systemd/system/x": "", "/sys/fs/cgroup/cgroup.controllers": "cpu"})
    (tmp_path / OWN[1:]).chmod(0o755)
    if os.getuid() != 0:  # the files are this user's own
        host = machine(tmp_path, {}, uid=os.getuid() + 1)
    remedy = "systemd-run --user --scope -p Delegate=yes devns ..."
    message = f"cpu 1.5 cannot be enforced here: its control group is not delegated to you: {OWN}"
    assert list(devns_check(spec({"cpu": 1.5}), host)) == [Problem("cgroup", message, remedy, fatal=False)]
    assert list(devns_check(spec({"cpu": 1.5, "enforce": "fail"}), host)) == [Problem("cgroup", message, remedy)]


def test_a_group_with_processes_of_others_can_hand_no_controller_down(tmp_path: Path) -> None:
    host = machine(tmp_path, {**UNIFIED, f"{OWN}/cgroup.procs": "4711\n4712\n"})
    message = f"cpu 1.5 cannot be enforced here: other processes share its control group: {OWN}"
    assert list(devns_check(spec({"cpu": 1.5}), host)) == [Problem("cgroup", message, ASK, fatal=False)]


def test_a_group_that_hands_the_controller_down_already_is_fine(tmp_path: Path) -> None:
    files = {f"{OWN}/cgroup.procs": "1\n2\n", f"{OWN}/cgroup.subtree_control": "cpu\n"}
    assert list(devns_check(spec({"cpu": 1.5}), machine(tmp_path, {**UNIFIED, **files}))) == []


@pytest.mark.parametrize(
    ("user", "uid", "release", "enough"),
    [
        (User(), UID, "6.1.0", True),
        (User(identity="root", map="single"), UID, "6.1.0", True),
        (User(identity="root", map="range"), UID, "6.1.0", False),  # root inside can be many users
        (User(), 0, "6.1.0", False),  # the kernel doesn't count root's processes
        (User(), UID, "5.13.0", False),  # it counts all of the user's on the machine
    ],
)
def test_an_rlimit_is_enough_for_pids_only_where_it_counts_the_same_processes(
    tmp_path: Path, user: User, uid: int, release: str, enough: bool
) -> None:
    host = machine(tmp_path, {}, uid=uid, release=release)
    strict = spec({"pids": 64, "enforce": "fail"}, user)
    assert (list(devns_check(strict, host)) == []) is enough
    assert list(devns_plan(strict, host))[-1]["instead"] == (["pids"] if enough else [])


def test_an_old_kernel_gets_no_limit_on_processes_that_would_count_the_hosts(tmp_path: Path) -> None:
    assert steps({"pids": 64}, machine(tmp_path, {}, release="5.13.0")) == [hold({"pids": 64})]


def test_memory_of_single_processes_is_never_enough_where_enforcement_is_asked_for(tmp_path: Path) -> None:
    (problem,) = devns_check(spec({"memory": "4G", "enforce": "fail"}), machine(tmp_path, {}))
    assert problem.fatal
    assert problem.message == "memory 4G cannot be enforced here: no memory controller is within reach"


# --- the effect, on directories that are no control groups ------------------------------------------------------------

CHILD = 4242


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def child(said: list[str]) -> Child:
    return Child(CHILD, said.append)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Directories get the files that the kernel would put there; removing the directory removes them."""

    def pretend(**files: str) -> None:
        def make(path: str) -> None:
            os.mkdir(path)
            writes = [*groups.unified_writes(LIMITS), *groups.legacy_writes(LIMITS)]
            for name in ("cgroup.procs", *(file for _limit, file, _value in writes)):
                Path(path, name).write_text(files.get(name.replace(".", "_"), ""))

        def remove(path: str) -> None:
            for file in Path(path).iterdir():
                file.unlink()
            Path(path).rmdir()

        monkeypatch.setattr(limits, "_make", make)
        monkeypatch.setattr(limits, "_remove", remove)

    return pretend


def test_the_child_joins_a_group_with_the_limits_which_goes_when_it_has_ended(
    tmp_path: Path, child: Child, said: list[str], kernel: Callable[..., None]
) -> None:
    kernel()
    machine(tmp_path, {**UNIFIED, f"{OWN}/cgroup.procs": f"{os.getpid()}\n{CHILD}\n"})
    own = tmp_path / OWN[1:]
    with limits.hold(hold({"memory": 4 * GIB, "pids": 1024}), child, root=str(tmp_path)):
        assert sorted(path.name for path in own.iterdir() if path.is_dir()) == ["devns-4242", "devns-supervisor"]
        group = own / f"devns-{CHILD}"
        assert {file.name: file.read_text() for file in group.iterdir() if file.read_text()} == {
            "cgroup.procs": f"{CHILD}",
            "memory.max": f"{4 * GIB}",
            "pids.max": "1024",
        }
        assert (own / "devns-supervisor/cgroup.procs").read_text() == f"{os.getpid()}"
        assert said == ["limits: memory 4G, pids 1024"]
    assert not group.exists()


def test_each_hierarchy_of_version_1_gets_its_own_group(
    tmp_path: Path, child: Child, said: list[str], kernel: Callable[..., None]
) -> None:
    kernel()
    machine(tmp_path, LEGACY)
    with limits.hold(hold({"memory": 4 * GIB, "cpu": 1.5, "pids": 1024}), child, root=str(tmp_path)):
        places = [tmp_path / f"sys/fs/cgroup/{name}/box/devns-{CHILD}" for name in ("memory", "cpu,cpuacct", "pids")]
        files = ["memory.limit_in_bytes", "cpu.cfs_quota_us", "pids.max"]
        assert [(place / file).read_text() for place, file in zip(places, files, strict=True)] == [
            *(f"{4 * GIB}", "150000", "1024")
        ]
        assert [(place / "cgroup.procs").read_text() for place in places] == [f"{CHILD}"] * 3
    assert not any(place.exists() for place in places)
    assert said == ["limits: memory 4G, cpu 1.5, pids 1024"]


def test_what_cannot_be_enforced_is_said_with_its_reason(tmp_path: Path, child: Child, said: list[str]) -> None:
    step = hold({"memory": 4 * GIB, "cpu": 1.5, "pids": 64}, instead=("memory", "pids"))
    with limits.hold(step, child, root=str(tmp_path)):
        assert said == [
            "memory 4G: by RLIMIT_DATA, for each process by itself and not for all together"
            " (ulimit -Sd hard lifts it): no memory controller is within reach",
            "cpu 1.5: not enforced here: no cpu controller is within reach",
            "pids 64: by RLIMIT_NPROC, for each user inside: no pids controller is within reach",
        ]


def test_a_limit_that_must_be_enforced_and_cannot_be_refuses_the_launch(tmp_path: Path, child: Child) -> None:
    step = hold({"cpu": 1.5, "pids": 64}, instead=("pids",), enforce="fail")
    with (
        pytest.raises(Unsupported, match=r"^cpu 1.5 cannot be enforced here: no cpu controller is within reach$"),
        limits.hold(step, child, root=str(tmp_path)),
    ):
        raise AssertionError


def test_processes_of_others_are_not_moved(
    tmp_path: Path, child: Child, said: list[str], kernel: Callable[..., None]
) -> None:
    kernel()
    machine(tmp_path, {**UNIFIED, f"{OWN}/cgroup.procs": f"{os.getppid()}\n{os.getpid()}\n{CHILD}\n"})
    with limits.hold(hold({"cpu": 1.5}), child, root=str(tmp_path)):
        assert said == [f"cpu 1.5: not enforced here: other processes share its control group: {tmp_path}{OWN}"]
        assert [path.name for path in (tmp_path / OWN[1:]).iterdir() if path.is_dir()] == []


def test_a_kernel_that_takes_a_limit_and_forgets_it_is_caught(
    tmp_path: Path, child: Child, said: list[str], kernel: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel(pids_max="max\n")
    write = limits._write
    monkeypatch.setattr(limits, "_write", lambda path, text: None if path.endswith("pids.max") else write(path, text))
    machine(tmp_path, LEGACY)
    with limits.hold(hold({"pids": 64}), child, root=str(tmp_path)):
        assert said == ["pids 64: not enforced here: pids.max was set to 64 and says max"]


def test_a_file_that_the_kernel_lacks_costs_one_limit_and_not_the_others(
    tmp_path: Path, child: Child, said: list[str], kernel: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel()
    make = limits._make

    def without_swap(path: str) -> None:
        make(path)
        Path(path, "memory.memsw.limit_in_bytes").unlink()

    monkeypatch.setattr(limits, "_make", without_swap)
    machine(tmp_path, LEGACY)
    with limits.hold(hold({"memory": 4 * GIB, "swap": 0}), child, root=str(tmp_path)):
        assert said == [
            "limits: memory 4G",
            "swap 0: not enforced here: memory.memsw.limit_in_bytes: no such file or directory",
        ]


def test_a_group_that_a_killed_launch_left_behind_is_swept(
    tmp_path: Path, child: Child, kernel: Callable[..., None]
) -> None:
    kernel()
    machine(tmp_path, {**LEGACY, "/proc/17/stat": ""})
    box = tmp_path / "sys/fs/cgroup/pids/box"
    for name in ("devns-16", "devns-17", "devns-x", "other"):
        (box / name).mkdir()
    with limits.hold(hold({"pids": 64}), child, root=str(tmp_path)):
        assert sorted(path.name for path in box.iterdir() if path.is_dir()) == [
            *("devns-17", f"devns-{CHILD}", "devns-x", "other")
        ]


def test_memory_that_ran_out_is_said_at_the_end(
    tmp_path: Path, child: Child, said: list[str], kernel: Callable[..., None]
) -> None:
    kernel()
    machine(tmp_path, LEGACY)
    with limits.hold(hold({"memory": 4 * GIB}), child, root=str(tmp_path)):
        group = tmp_path / f"sys/fs/cgroup/memory/box/devns-{CHILD}"
        (group / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert said[1:] == ["out of memory: memory 4G was not enough, and the kernel ended processes"]
