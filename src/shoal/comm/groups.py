"""`Group`, a set of ranks that talk, and `Groups`, all the sets of one generation of ranks."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from shoal.comm.counter import Counter, Purpose
from shoal.comm.failures import peer_failures
from shoal.comm.meeting import open_store
from shoal.comm.pending import Pending

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other; ``process_group`` is None for a rank alone.

    Collectives work in place where torch's do. Sums are over all ranks of the group.
    """

    rank: int
    size: int
    process_group: dist.ProcessGroup | None = None
    counter: Counter = field(default_factory=Counter)

    def _count(self, name: str, purpose: Purpose, tensor: Tensor) -> None:
        self.counter.add(name, purpose, tensor.numel() * tensor.element_size())

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around a call that stands still for other ranks."""
        began = time.perf_counter()
        with peer_failures():
            yield
        self.counter.waited_s += time.perf_counter() - began

    def all_reduce(self, tensor: Tensor, purpose: Purpose) -> Tensor:
        """Sum `tensor` over the group, in place; returns it."""
        if self.process_group is not None:
            self._count("all_reduce", purpose, tensor)
            with self._waiting():
                dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def all_reduce_later(self, tensor: Tensor, purpose: Purpose, *, agreement: int = 0) -> Pending:
        """Start summing `tensor` over the group, in place.

        ``agreement``: how many of its elements are for the ranks to agree, not of `purpose`.
        """
        if self.process_group is None:
            return Pending(tensor)
        size = tensor.element_size()
        self.counter.add("all_reduce", purpose, (tensor.numel() - agreement) * size)
        if agreement:
            self.counter.add("all_reduce", "agreement", agreement * size)
        with peer_failures():
            work = dist.all_reduce(tensor, group=self.process_group, async_op=True)
        return Pending(tensor, work, self.counter)

    def all_gather(self, tensor: Tensor, purpose: Purpose) -> Tensor:
        """Tensors of one shape from every rank, stacked: ``[size, *tensor.shape]``."""
        if self.process_group is None:
            return tensor.unsqueeze(0)
        self._count("all_gather", purpose, tensor)
        result = tensor.new_empty((self.size, *tensor.shape))
        with peer_failures():
            # Not all_gather_into_tensor: torch 2.13 has given it another name.
            dist.all_gather(list(result.unbind(0)), tensor.contiguous(), group=self.process_group)
        return result

    def broadcast(self, tensor: Tensor, source: int, purpose: Purpose) -> Tensor:
        """Give every rank `source`'s values, in place; returns the tensor."""
        if self.process_group is not None:
            if self.rank == source:
                self._count("broadcast", purpose, tensor)
            with self._waiting():
                dist.broadcast(tensor, group=self.process_group, group_src=source)
        return tensor

    def all_gather_json(self, value: Any, purpose: Purpose = "start-up") -> list[Any]:
        """A JSON value from every rank, in the order of ranks. Nothing is pickled."""
        if self.process_group is None:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self.all_gather(torch.tensor([len(data)]), purpose).flatten().tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(data)] = data
        gathered = self.all_gather(padded, purpose)
        return [
            json.loads(bytes(row[:length].tolist()))
            for row, length in zip(gathered, lengths, strict=True)
        ]


@dataclass(frozen=True)
class Groups:
    """The groups of one generation of ranks.

    ``data`` are the replicas of the model, ``statistics`` the same ranks over connections of their
    own (batch statistics must not queue behind a gradient bucket in flight), ``checkpoint`` all
    ranks over connections for the thread that saves while the others are in use: host memory only.
    """

    world: Group
    data: Group
    statistics: Group
    checkpoint: Group
    device: torch.device

    @classmethod
    def alone(cls, device: torch.device | None = None) -> Self:
        """One process, no groups: every collective is the identity."""
        group = Group(0, 1)
        return cls(group, group, group, group, device or torch.device("cpu"))

    @classmethod
    def form(
        cls,
        rank: int,
        world_size: int,
        store: str,
        generation: str,
        device: torch.device | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> Self:
        """Meet the other ranks at `store` (``file:PATH``, ``tcp:HOST:PORT``, ``agent:HOST:PORT``).

        Collective over all ranks. Raises `WorldError` if the meeting place cannot be had.
        """
        device = device or torch.device("cpu")
        if world_size == 1:
            return cls.alone(device)
        timeout = timedelta(seconds=timeout_s)
        meeting = PrefixStore(generation, open_store(store, rank, world_size, timeout))
        # gloo for tensors on the CPU (counts, statuses), NCCL for those on a GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        counter = Counter()
        with peer_failures():
            dist.init_process_group(
                backend, store=meeting, rank=rank, world_size=world_size, timeout=timeout
            )
            world = Group(rank, world_size, dist.group.WORLD, counter)
            others = dist.new_group(timeout=timeout, backend=backend)
            for_saving = dist.new_group(timeout=timeout, backend="gloo")
        statistics = Group(rank, world_size, others, counter)
        checkpoint = Group(rank, world_size, for_saving, counter)
        return cls(world, world, statistics, checkpoint, device)

    def close(self) -> None:
        """Leave the groups. Collective."""
        if self.world.process_group is not None:
            dist.destroy_process_group()
