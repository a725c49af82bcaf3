"""The strategy, the device and the threads of a run, settled before any rank starts."""

from importlib import import_module

import pytest

from shoal.cluster import Cluster, Device, Host
from shoal.env import World
from shoal.errors import Refused, StrategyError, WorldError
from shoal.job import check_before_start, resolve
from shoal.recipe import Recipe


def recipe(*changes):
    return Recipe.from_dict(
        {
            "name": "r",
            "batch_size": 64,
            "steps": 2,
            "model": "mlp",
            "data": {"train": "digits:train"},
            "objective": "cross_entropy",
            "optimizer": {"name": "sgd", "lr": 0.1},
        }
    ).with_changes(*changes)


def machine(cores=4, gpus=0):
    kind, count = ("cuda", gpus) if gpus else ("cpu", cores)
    devices = (Device(kind=kind, name="a device", count=count, memory_bytes=2**30),)
    return Cluster(name="local", hosts=(Host(name="h", cores=cores, devices=devices),))


def world(size, local=None, launcher="torchrun"):
    return World(0, size, 0, local or size, "localhost", 1234, launcher)


@pytest.fixture
def torch_with_cuda(monkeypatch):
    monkeypatch.setattr(import_module("shoal.job.resolve"), "_torch_has_cuda", lambda: True)


@pytest.mark.parametrize(
    ("cores", "batch", "ranks"), [(4, 64, 4), (2, 64, 2), (4, 40, 2), (1, 64, 1), (32, 4096, 8)]
)
def test_auto_gives_each_core_a_rank_while_shares_are_worth_it(cores, batch, ranks):
    resolved = resolve(recipe(f"batch_size={batch}"), "auto", machine(cores))
    assert resolved.strategy.world_size == ranks
    assert resolved.threads == max(1, cores // ranks)
    assert resolved.device == "cpu"
    assert resolved.reasons[0].startswith(f"auto chose {resolved.strategy}: {cores} core")


@pytest.mark.parametrize(("strategy", "threads"), [("single", 8), ("dp2", 4), ("dp3", 2)])
def test_ranks_share_the_cores(strategy, threads):
    assert resolve(recipe(), strategy, machine(8)).threads == threads


def test_auto_keeps_what_else_was_asked_for():
    resolved = resolve(recipe(), "auto+bf16+channels_last", machine(2))
    assert str(resolved.strategy) == "dp2+bf16+channels_last"


@pytest.mark.usefixtures("torch_with_cuda")
def test_gpus_are_used_where_there_are_enough():
    assert resolve(recipe(), "auto", machine(8, gpus=2)).device == "cuda"
    assert str(resolve(recipe(), "auto", machine(8, gpus=2)).strategy) == "dp2"
    few = resolve(recipe(), "dp4", machine(8, gpus=2))
    assert few.device == "cpu"
    assert any("4 here, and 2 GPUs" in reason for reason in few.reasons)


def test_gpus_without_a_torch_for_them_are_left_alone_and_said_so(monkeypatch):
    monkeypatch.setattr(import_module("shoal.job.resolve"), "_torch_has_cuda", lambda: False)
    resolved = resolve(recipe(), "auto", machine(2, gpus=1))
    assert resolved.device == "cpu"
    assert resolved.strategy.world_size == 2
    assert any("built without CUDA" in reason for reason in resolved.reasons)


def test_the_installed_torch_is_asked_by_its_file():
    import torch

    assert import_module("shoal.job.resolve")._torch_has_cuda() == bool(
        torch.version.cuda or torch.version.hip
    )


@pytest.mark.usefixtures("torch_with_cuda")
def test_on_several_hosts_the_ranks_of_this_one_count():
    resolved = resolve(recipe(), "dp8", machine(16, gpus=4), world=world(8, local=4))
    assert (resolved.device, resolved.threads) == ("cuda", 4)


def test_a_world_of_another_size_is_refused():
    with pytest.raises(WorldError, match="dp3 needs 3 ranks, and WORLD_SIZE says that 2"):
        resolve(recipe(), "dp3", machine(), world=world(2))
    with pytest.raises(WorldError, match="single needs 1 rank, and SLURM_NTASKS says that 2"):
        resolve(recipe(), "single", machine(), world=world(2, launcher="slurm"))
    assert resolve(recipe(), "auto", machine(), world=world(3)).strategy.world_size == 3


def test_precision_bounds_the_strategy():
    with pytest.raises(Refused, match="bf16, and the recipe says precision: float32"):
        resolve(recipe("precision=float32"), "dp2+bf16", machine())
    assert resolve(recipe("precision=bf16"), "dp2", machine()).strategy.bf16
    assert not resolve(recipe(), "dp2", machine()).strategy.bf16


@pytest.mark.parametrize("strategy", ["dp65", "dq2", "cp2", "dp2/gossip:ring/compress:bf16"])
def test_what_cannot_run_is_refused(strategy):
    with pytest.raises(StrategyError):
        resolve(recipe(), strategy, machine())


def build(width, classes):
    raise AssertionError("nothing is built before the ranks are there")


def loss(outputs, targets, sharpness=1.0):
    return outputs.sum() * sharpness


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model=no_such_module_here:build", "there is no module 'no_such_module_here'"),
        (f"model={__name__}:buld", "has no attribute 'buld'"),
        (f"model={__name__}:build", "missing a required argument: 'width'"),
        (f"model={{name: '{__name__}:build', widht: 3}}", "width|unexpected"),
        (f"objective={{name: '{__name__}:loss', sharp: 2}}", "unexpected keyword argument 'sharp'"),
        (f"schedule={{name: '{__name__}:loss', sharpness: 2}}", "missing a required argument"),
        ("model.classes=5", "label"),
        ("data.train=./nowhere", "nowhere"),
    ],
)
def test_what_can_be_known_is_known_before_the_start(change, said):
    from shoal.errors import UsageError

    with pytest.raises(UsageError, match=said):
        check_before_start(recipe(change))


def test_options_that_fit_pass():
    check_before_start(recipe(f"model={{name: '{__name__}:build', width: 3}}"))
    check_before_start(recipe(f"objective={{name: '{__name__}:loss', sharpness: 2.0}}"))
    optimizer = "{name: 'torch.optim:Adagrad', lr: 0.1, clip_norm: 1.0, no_decay: [bias]}"
    check_before_start(recipe(f"optimizer={optimizer}"))
