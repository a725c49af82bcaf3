"""Groups of a process alone, the byte counter, and how a lost peer is told from other errors."""

import socket

import pytest
import torch

from shoal.comm import Counter, Groups, is_peer_failure, peer_failures
from shoal.errors import PeerLost, WorldError


def test_alone_every_collective_is_the_identity() -> None:
    groups = Groups.alone()
    group = groups.data
    assert (group.rank, group.size, groups.world.size, groups.statistics.size) == (0, 1, 1, 1)
    tensor = torch.arange(3.0)
    assert group.all_reduce(tensor, "metric") is tensor
    assert group.all_reduce_later(tensor, "gradient").wait() is tensor
    assert group.broadcast(tensor, 0, "parameter") is tensor
    assert torch.equal(group.all_gather(tensor, "metric"), tensor[None])
    assert group.all_gather_json({"ü": [1]}) == [{"ü": [1]}]
    assert group.counter.as_dict() == {}
    groups.close()


def test_one_rank_is_alone_wherever_it_would_meet() -> None:
    groups = Groups.form(0, 1, "file:/nowhere/at/all", "first")
    assert groups.world.process_group is None


def test_counter_sums_by_collective_and_purpose() -> None:
    counter = Counter()
    for purpose, count in (("metric", 3), ("gradient", 8), ("metric", 4)):
        counter.add("all_reduce", purpose, count)
    counter.add("all_gather", "metric", 1)
    assert counter.as_dict() == {
        "all_gather": {"metric": 1},
        "all_reduce": {"gradient": 8, "metric": 7},
    }


LOST = [
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [lo]",
    "[/a/gloo/transport/tcp/buffer.cc:78] Timed out waiting 60000ms for send operation to complete",
    "Application timeout caused pair closure",
    "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error",
]
OTHER = [
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    "expected scalar type Float but found Double",
    "Connection reset by peer",  # of a user's own data base, say
]


@pytest.mark.parametrize("words", LOST)
def test_words_for_a_lost_peer(words: str) -> None:
    assert is_peer_failure(RuntimeError(words))
    with pytest.raises(PeerLost), peer_failures():
        raise RuntimeError(words)


@pytest.mark.parametrize("words", OTHER)
def test_words_for_something_else(words: str) -> None:
    assert not is_peer_failure(RuntimeError(words))
    with pytest.raises(RuntimeError) as raised, peer_failures():
        raise RuntimeError(words)
    assert type(raised.value) is RuntimeError


def test_only_torchs_own_kind_of_error_is_a_lost_peer() -> None:
    assert not is_peer_failure(ValueError("Connection closed by peer"))


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(WorldError, match=f"cannot listen on .*:{port}") as error:
            Groups.form(0, 2, f"tcp:127.0.0.1:{port}", "first", timeout_s=1)
    assert "MASTER_PORT" in str(error.value)
