"""Clusters: described in files, with every mistake in its line, and detected on this machine."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.cluster import Cluster, Device, Host, Link, Nic, Peak
from shoal.cluster import local as detection
from shoal.errors import RecipeError, WorldError

names = st.text(min_size=1, max_size=12)
rates = st.floats(1e6, 1e18)
counts = st.integers(1, 20_000)
memory = st.integers(2**20, 2**50)
precisions = ["float64", "float32", "tf32", "float16", "bf16", "fp8", "int8"]
peaks = st.dictionaries(st.sampled_from(precisions), rates).map(lambda given: Peak(**given))
devices = st.builds(
    Device,
    kind=st.sampled_from(["cpu", "cuda", "rocm"]),
    name=names,
    count=counts,
    memory_bytes=memory,
    peak_flops_per_s=peaks,
    memory_bytes_per_s=st.none() | rates,
    matmul_efficiency=st.none() | st.floats(0.01, 1),
)
hosts = st.builds(
    Host,
    name=names,
    count=counts,
    cores=st.none() | counts,
    memory_bytes=st.none() | memory,
    devices=st.lists(devices, min_size=1, max_size=3).map(tuple),
    nics=st.lists(st.builds(Nic, name=names, count=counts, bytes_per_s=rates), max_size=2).map(
        tuple
    ),
)
links = [
    st.builds(
        Link, between=st.just(level), name=names, bytes_per_s=rates, latency_s=st.floats(0, 1)
    )
    for level in ("devices", "hosts")
]
clusters = st.builds(
    Cluster,
    name=names,
    hosts=st.lists(hosts, min_size=1, max_size=3, unique_by=lambda host: host.name).map(tuple),
    links=st.tuples(*links),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(clusters, st.sampled_from(["c.yaml", "c.json"]))
def test_a_file_reads_back_equal(tmp_path: Path, cluster: Cluster, name: str) -> None:
    cluster.write(tmp_path / name)
    again = Cluster.from_yaml(tmp_path / name)
    assert again == cluster
    assert hash(again) == hash(cluster)
    assert Cluster.from_json(cluster.to_json()) == cluster


DESCRIBED = """
name: 64x8-h100
hosts:
  - name: node
    count: 64
    cores: 96
    devices:
      - kind: cuda
        name: H100
        count: 8
        memory_bytes: 80e9
        peak_flops_per_s: {bf16: 989e12}
        memory_bytes_per_s: 3.35e12
    nics: [{count: 8, bytes_per_s: 50e9}]
links:
  - {between: devices, bytes_per_s: 450e9, latency_s: 3e-6}
  - {between: hosts, bytes_per_s: 400e9, latency_s: 1e-5}
"""


def read(tmp_path: Path, text: str) -> Cluster:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    return Cluster.from_yaml(file)


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    assert caught.value.exit_status == 2
    prefix = f"{tmp_path / 'cluster.yaml'}:"
    return [str(problem).removeprefix(prefix) for problem in caught.value.problems]


def test_a_described_cluster(tmp_path: Path) -> None:
    cluster = read(tmp_path, DESCRIBED)
    assert cluster.world_size_max == 512
    assert cluster.host_count == 64
    assert cluster.cores == 64 * 96
    assert len(cluster.cuda_devices) == 512
    device = cluster.cuda_devices[0]
    assert device.memory_bytes == 80_000_000_000
    assert device.peak_flops_per_s.bf16 == 989e12
    assert device.peak_flops_per_s.fp8 is None
    assert cluster.hosts[0].names[63] == "node-63"
    link = cluster.link("hosts")
    assert link is not None
    assert link.bytes_per_s == 400e9
    one = Cluster(name="x", hosts=(cluster.hosts[0].model_copy(update={"count": 1}),))
    assert one.link("devices") is None
    assert one.hosts[0].names == ("node",)


def test_all_problems_at_once_each_in_its_line(tmp_path: Path) -> None:
    text = DESCRIBED.replace("cores: 96", "coers: 96")
    text = text.replace("count: 64", "count: none").replace("kind: cuda", "kind: gpu")
    text = text.replace("{bf16: 989e12}", "{bfloat16: 989e12}").replace("400e9", "0")
    found = problems(tmp_path, text)
    assert [line.partition(": ")[0] for line in found] == ["5", "6", "8", "12", "17"]
    assert found[0].endswith('hosts.0.count: must be a whole number, given "none"')
    assert found[1].endswith("hosts.0.coers: is not a known key: did you mean 'cores'?")
    assert "hosts.0.devices.0.kind: must be 'cpu', 'cuda'" in found[2]
    assert 'given "gpu"' in found[2]
    assert "did you mean 'float16'?" in found[3] or "did you mean 'bf16'?" in found[3]
    assert found[4].endswith("links.1.bytes_per_s: must be more than 0, given 0")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("80e9", "80", "memory_bytes: is in bytes: 80 is too small to be meant (GB given?)"),
        ("80e9", "-1", "must be more than 0"),
        ("80e9", "true", "must be a number, given true"),
        ("80e9", ".inf", "must be a"),
        ("80e9", "1.5", "must be a whole number"),
        ("450e9", "450", "bytes_per_s: is in bytes per second: 450 is too small"),
        ("450e9", "-5", "must be more than 0"),
        ("450e9", ".nan", "must be a finite number"),
        ("989e12", "989", "peak_flops_per_s.bf16: is in operations per second"),
        ("3e-6", "3000", "latency_s: is in seconds: 3000 is too large"),
        ("memory_bytes:", "memory_gb:", "memory_gb: is not a known key: did you mean"),
        ("between: devices", "between: hosts", "has two links between hosts"),
        ("  - {between: hosts, bytes_per_s: 400e9, latency_s: 1e-5}\n", "", "no link between them"),
        ("    count: 64\n", "    count: 0\n", "must be more than 0, given 0"),
        ("name: 64x8-h100\n", "", "name: is missing"),
        ("name: 64x8-h100\n", "name: a\nname: b\n", "given twice"),
    ],
)
def test_impossible_clusters(tmp_path: Path, old: str, new: str, says: str) -> None:
    found = problems(tmp_path, DESCRIBED.replace(old, new, 1))
    assert any(says in problem for problem in found), found


def test_hosts_need_devices_and_names_of_their_own(tmp_path: Path) -> None:
    assert "hosts: must have 1 or more" in problems(tmp_path, "name: x\nhosts: []")[0]
    assert "must be a mapping" in problems(tmp_path, "- 1\n")[0]
    assert "must be a mapping" in problems(tmp_path, "")[0]
    host = "{name: a, devices: [{kind: cpu, name: x, memory_bytes: 1e9}]}"
    link = "links: [{between: hosts, bytes_per_s: 1e9}]"
    found = problems(tmp_path, f"name: x\nhosts: [{host}, {host}]\n{link}\n")
    assert "two entries of hosts named 'a'" in found[0]


def test_values_of_json_without_a_file() -> None:
    with pytest.raises(RecipeError, match=r"^hosts\.0\.devices: is missing$"):
        Cluster.from_json({"name": "x", "hosts": [{"name": "a"}]})


def test_this_machine() -> None:
    cluster = Cluster.local()
    assert cluster.host_count == 1
    assert 1 <= cluster.cores <= len(os.sched_getaffinity(0))
    assert cluster.world_size_max >= 1
    total = cluster.hosts[0].memory_bytes
    assert total is not None
    assert 2**28 < total <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 1.01
    assert Cluster.from_json(cluster.to_json()) == cluster


def no_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is all of the search path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def nvidia_smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


THREE = """echo '0, GPU-aa01, NVIDIA H100 80GB HBM3, 81559'
echo '1, GPU-aa02, NVIDIA H100 80GB HBM3, 81559'
echo '2, GPU-bb01, NVIDIA A100-PCIE-40GB, 40960'"""


def test_ranks_share_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_gpus(monkeypatch, tmp_path)
    cluster = Cluster.local(ranks=4)
    (device,) = cluster.hosts[0].devices
    assert (device.kind, device.count) == ("cpu", 4)
    assert cluster.world_size_max == 4
    assert device.memory_bytes == (cluster.hosts[0].memory_bytes or 0) // 4
    assert cluster.cuda_devices == ()
    with pytest.raises(WorldError, match="1 rank or more; given 0"):
        Cluster.local(ranks=0)


def test_gpus_that_nvidia_smi_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvidia_smi(no_gpus(monkeypatch, tmp_path), THREE)
    cluster = Cluster.local()
    assert [(each.name, each.count) for each in cluster.hosts[0].devices] == [
        ("NVIDIA H100 80GB HBM3", 2),
        ("NVIDIA A100-PCIE-40GB", 1),
    ]
    assert cluster.world_size_max == len(cluster.cuda_devices) == 3
    assert cluster.cuda_devices[2].memory_bytes == 40960 * 2**20
    assert Cluster.local(ranks=2).world_size_max == 2
    assert Cluster.local(ranks=4).hosts[0].devices[0].kind == "cpu"


@pytest.mark.parametrize(
    ("visible", "memories"),
    [("2,0", [40960, 81559]), ("GPU-aa02", [81559]), ("0,7,1", [81559]), ("-1", []), ("", [])],
)
def test_gpus_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str, memories: list[int]
) -> None:
    nvidia_smi(no_gpus(monkeypatch, tmp_path), THREE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = detection.cuda_devices()
    assert [device.memory_bytes // 2**20 for device in found] == memories


@pytest.mark.parametrize(
    "script", ["exit 9", "echo 'No devices were found'; exit 6", "echo garbage", "printf '\\377'"]
)
def test_an_nvidia_smi_that_fails_means_no_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str
) -> None:
    nvidia_smi(no_gpus(monkeypatch, tmp_path), script)
    assert detection.cuda_devices() == ()


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       16384 kB\nMemFree: 1 kB\n"}


def test_memory_without_limits(tmp_path: Path) -> None:
    assert detection.available_memory_bytes(tree(tmp_path, MEMINFO)) == 16 * 2**20


def test_the_lowest_limit_of_the_cgroups_around_counts(tmp_path: Path) -> None:
    limits = {
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/job/memory.max": "max\n",
        "sys/fs/cgroup/user/memory.max": f"{5 * 2**20}\n",
        "sys/fs/cgroup/user/job/cpu.max": "max 100000\n",
        "sys/fs/cgroup/user/cpu.max": "50000 100000\n",
    }
    root = tree(tmp_path, {**MEMINFO, **limits})
    assert detection.available_memory_bytes(root) == 5 * 2**20
    assert detection.available_cores(root) == 1


def test_limits_of_cgroup_version_1_seen_from_inside_a_container(tmp_path: Path) -> None:
    limits = {
        "proc/self/cgroup": "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{7 * 2**20}\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    root = tree(tmp_path, {**MEMINFO, **limits})
    assert detection.available_memory_bytes(root) == 7 * 2**20
    assert detection.available_cores(root) == len(os.sched_getaffinity(0))
