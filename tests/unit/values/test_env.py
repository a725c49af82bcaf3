"""The environment: a world, half a world, no world; and the folder of data."""

from pathlib import Path

import pytest

from shoal import env
from shoal.env import World
from shoal.errors import WorldError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "node[003-004,010],login1",
}


@pytest.fixture(autouse=True)
def no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that no launcher has started."""
    for name in {*TORCHRUN, *SLURM, "SLURM_NODELIST", "SLURM_TASKS_PER_NODE", "SHOAL_DATA"}:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_no_launcher_no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.torchrun_world() is None
    # Left over in a shell, these say nothing about ranks.
    set_all(monkeypatch, {"MASTER_ADDR": "a", "MASTER_PORT": "1", "RANK": "", "WORLD_SIZE": ""})
    assert env.torchrun_world() is None


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TORCHRUN)
    assert env.torchrun_world() == World(3, 4, 1, 2, "10.0.0.7", 29500, "torchrun")


@pytest.mark.parametrize("missing", sorted(TORCHRUN))
def test_half_a_torchrun_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    set_all(monkeypatch, {name: text for name, text in TORCHRUN.items() if name != missing})
    with pytest.raises(WorldError, match=f"{missing} missing"):
        env.torchrun_world()


def test_world_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(WorldError) as caught:
        env.torchrun_world()
    assert "WORLD_SIZE=2 given" in str(caught.value)
    assert "RANK, LOCAL_RANK" in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "one"),
        ("RANK", "-1"),
        ("RANK", "4"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "4.0"),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "70000"),
    ],
)
def test_numbers_that_are_none_or_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    set_all(monkeypatch, {**TORCHRUN, name: value})
    with pytest.raises(WorldError, match=f"{name}.*{value}"):
        env.torchrun_world()


def test_local_ranks_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**TORCHRUN, "LOCAL_RANK": "2"})
    with pytest.raises(WorldError, match="local rank 2 of 2"):
        env.torchrun_world()


def test_slurm_step(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SLURM)
    world = env.torchrun_world()
    assert world is not None
    assert (world.rank, world.world_size) == (5, 7)
    assert (world.local_rank, world.local_world_size) == (1, 3)
    assert world.master_addr == "node003"
    assert 12000 <= world.master_port < 32000
    assert world.launcher == "slurm"
    monkeypatch.setenv("SLURM_PROCID", "0")
    other = env.torchrun_world()
    assert other is not None
    assert other.master_port == world.master_port


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu-a1", "gpu-a1"), ("a,b", "a"), ("r1n[7]", "r1n7"), ("x[01-02]-ib,y", "x01-ib")],
)
def test_slurm_first_host(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    set_all(monkeypatch, {**SLURM, "SLURM_STEP_NODELIST": nodes})
    world = env.torchrun_world()
    assert world is not None
    assert world.master_addr == first


def test_slurm_with_the_masters_address_given(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    world = env.torchrun_world()
    assert world is not None
    assert (world.master_addr, world.master_port) == ("head", 1234)


def test_slurm_many_nodes_with_equal_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"}
    set_all(monkeypatch, {**SLURM, **tasks})
    world = env.torchrun_world()
    assert world is not None
    assert world.local_world_size == 2


@pytest.mark.parametrize(
    "step", [{"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_ID": ""}, {"SLURM_NTASKS": "1"}]
)
def test_a_batch_script_or_one_task_is_no_world(
    monkeypatch: pytest.MonkeyPatch, step: dict[str, str]
) -> None:
    set_all(monkeypatch, {**SLURM, **step})
    assert env.torchrun_world() is None


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"])
def test_half_a_slurm_step_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    set_all(monkeypatch, SLURM)
    monkeypatch.delenv(missing)
    with pytest.raises(WorldError, match=f"{missing} missing"):
        env.torchrun_world()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_PROCID", "x"),
        ("SLURM_PROCID", "7"),
        ("SLURM_NODEID", "9"),
        ("SLURM_STEP_TASKS_PER_NODE", "4;3"),
    ],
)
def test_slurm_numbers_that_are_none(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    set_all(monkeypatch, {**SLURM, name: value})
    with pytest.raises(WorldError, match=value):
        env.torchrun_world()


def test_a_slurm_step_without_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SLURM)
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    with pytest.raises(WorldError, match="SLURM_STEP_NODELIST"):
        env.torchrun_world()


def test_torchrun_inside_a_slurm_step_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**SLURM, **TORCHRUN})
    world = env.torchrun_world()
    assert world is not None
    assert world.launcher == "torchrun"


def test_data_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert env.data_home() is None
    monkeypatch.setenv("SHOAL_DATA", str(tmp_path))
    assert env.data_home() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHOAL_DATA", "~/sets")
    assert env.data_home() == tmp_path / "sets"


def test_child_environment_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_DATA", "here")
    child = env.child_environment(RANK="0")
    assert (child["SHOAL_DATA"], child["RANK"]) == ("here", "0")
    child["SHOAL_DATA"] = "there"
    assert env.data_home() == Path("here")
    assert env.torchrun_world() is None


def test_set_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_DATA", "before")
    env.set_variable("SHOAL_DATA", "after")
    assert env.data_home() == Path("after")


def test_visible_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert env.visible_cuda_devices() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, GPU-ab")
    assert env.visible_cuda_devices() == ("1", "GPU-ab")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert env.visible_cuda_devices() == ()
