"""Two hosts: network namespaces joined by a veth pair, a rank in each, as torchrun starts them.

Needs root and iproute2. `.ci/run` installs it and sets SHOAL_CI: there a machine without is an
error, elsewhere these tests are skipped.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from shoal_process import equal, weights

from shoal.checkpoint import Checkpoint

pytestmark = pytest.mark.timeout(180)

NAMESPACES = Path(__file__).parents[2] / "benchmarks" / "namespaces.py"


def load_namespaces():
    spec = importlib.util.spec_from_file_location("namespaces", NAMESPACES)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


namespaces = load_namespaces()


@pytest.fixture
def hosts():
    reason = namespaces.missing()
    if reason is not None and os.environ.get("SHOAL_CI"):
        pytest.fail(f"CI has to run this: {reason}")
    if reason is not None:
        pytest.skip(reason)
    with namespaces.two_hosts() as made:
        yield made


def train(shoal, hosts, strategy, *options, command=(sys.executable, "-m", "shoal")):
    """`shoal train tiny.yaml` on both hosts; what each rank printed."""
    words = ("train", "tiny.yaml", "--out", "run", "--json", "--strategy", strategy, *options)
    # Nobody says which interface is the right one; files and processes are shared, memory must not.
    ours = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    environment = {**ours, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    ended = namespaces.run_ranks(
        hosts, [*command, *words, "--comm", "gloo"], environment, cwd=shoal.folder, timeout_s=100
    )
    assert [one.status for one in ended] == [0, 0], ended
    return shoal.summary()


def close(left, right):
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], rtol=1e-4, atol=1e-6) for name in left
    )


def test_two_hosts_compute_what_one_device_computes(shoal, hosts):
    document = train(shoal, hosts, "dp2")
    assert document["comm"] == "gloo"
    sent = [host.sent() for host in hosts]
    gradient = document["comm_bytes"]["all_reduce"]["gradient"][0]
    assert min(sent) > gradient  # it did go through the cable
    assert shoal.train("--strategy", "single", out="alone").status == 0
    assert close(weights(shoal.folder / "run", 12), weights(shoal.folder / "alone", 12))


def test_asynchronous_contributions_keep_their_bound(shoal, hosts):
    document = train(shoal, hosts, "dp2/async:2", "--set", "steps=40", "--set", "optimizer.lr=0.02")
    ledger = shoal.lines("staleness.jsonl")
    keys = [(line["step"], line["index"]) for line in ledger]
    assert keys == [(step, index) for step in range(40) for index in range(2)]
    assert all(0 <= line["staleness"] <= 2 for line in ledger)
    assert sum(document["staleness"]["contributions"].values()) == 80


def test_replicas_of_diloco_end_equal(shoal, hosts):
    document = train(shoal, hosts, "dp2/diloco:4", "--set", "steps=10")
    assert document["state"] == "done"
    checkpoint = Checkpoint.open(shoal.folder / "run/checkpoints/step-000000010")
    replicas = [
        {
            name.removeprefix(f"replica-{number}/"): checkpoint.read(name)
            for name in checkpoint.weights
            if name.startswith(f"replica-{number}/")
        }
        for number in range(2)
    ]
    assert replicas[0]
    assert equal(*replicas)
    # What carries the numbers does not change them.
    assert shoal.train("--strategy", "dp2/diloco:4", "--set", "steps=10", out="here").status == 0
    assert equal(weights(shoal.folder / "run", 10), weights(shoal.folder / "here", 10))


def test_torchrun_over_two_hosts(shoal, hosts):
    """As the manual says: one command a host, which differs in the node's number alone."""
    torchrun = Path(sys.executable).with_name("torchrun")
    command = (
        "sh",
        "-c",
        f'exec "{torchrun}" --nnodes 2 --nproc-per-node 1 --node-rank "$RANK" '
        '--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -m shoal "$@"',
        "torchrun",
    )
    document = train(shoal, hosts, "dp2/local:4", "--set", "steps=8", command=command)
    assert (document["state"], document["world_size"]) == ("done", 2)


def interrupted(names):
    with namespaces.two_hosts("100mbit") as made:
        names += [host.namespace for host in made]
        raise KeyboardInterrupt


def test_nothing_is_left_behind():
    reason = namespaces.missing()
    if reason is not None:
        pytest.skip(reason)
    names = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(names)
    there = namespaces._ip("netns", "list")
    assert len(names) == 2
    assert not any(name in there for name in names)
