"""`Group`, a set of ranks that talk, and `Groups`, all the sets of one generation of ranks.

pp2.dp2.tp2       stage 0: replica 0: ranks 0 1      replica 1: ranks 2 3
                  stage 1: replica 0: ranks 4 5      replica 1: ranks 6 7

of rank 0         tensor 0 1    data 0 2    pipeline 0 4    model 0 1 4 5    world 0 … 7
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from shoal.comm import shared_memory
from shoal.comm.counter import Counter, Purpose
from shoal.comm.failures import peer_failures
from shoal.comm.interface import use_the_way_to
from shoal.comm.meeting import open_store
from shoal.comm.mesh import Axes, Mesh
from shoal.comm.pending import Pending
from shoal.comm.shared_memory import CannotShare, SharedMemoryGroup
from shoal.errors import WorldError

TIMEOUT_S = 600.0
Transport = Literal["auto", "shared_memory", "gloo"]
# torch 2.13 has given them other names.
_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other; ``process_group`` is None for a rank alone.

    ``rank`` is this rank's place in the group, ``ranks`` are the world's numbers of its members.
    Collectives work in place where torch's do. Sums are over all ranks of the group.
    """

    rank: int
    size: int
    process_group: dist.ProcessGroup | None = None
    counter: Counter = field(default_factory=Counter)
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.ranks:
            object.__setattr__(self, "ranks", tuple(range(self.size)))

    def _count(self, name: str, purpose: Purpose, tensor: Tensor) -> None:
        self.counter.add(name, purpose, tensor.numel() * tensor.element_size())

    @contextlib.contextmanager
    def _waiting(self, purpose: Purpose) -> Iterator[None]:
        """Around a call that stands still for other ranks."""
        began = time.perf_counter()
        with peer_failures():
            yield
        if purpose != "checkpoint":  # then it is the thread that saves, beside training
            self.counter.waited_s += time.perf_counter() - began

    def all_reduce(self, tensor: Tensor, purpose: Purpose, *, largest: bool = False) -> Tensor:
        """Sum `tensor` over the group (or take the largest), in place; returns it."""
        if self.process_group is not None:
            self._count("all_reduce", purpose, tensor)
            operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
            with self._waiting(purpose):
                dist.all_reduce(tensor, op=operation, group=self.process_group)
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
        with self._waiting(purpose):
            # Not all_gather_into_tensor: torch 2.13 has given it another name.
            dist.all_gather(list(result.unbind(0)), tensor.contiguous(), group=self.process_group)
        return result

    def all_gather_later(self, tensor: Tensor, purpose: Purpose) -> Pending:
        """Start :meth:`all_gather`; `tensor` must stay as it is until the result is waited for."""
        if self.process_group is None:
            return Pending(tensor.unsqueeze(0))
        self._count("all_gather", purpose, tensor)
        flat = tensor.new_empty(self.size * tensor.numel())
        with peer_failures():
            given = tensor.contiguous().view(-1)
            work = _GATHER(flat, given, group=self.process_group, async_op=True)
        return Pending(flat.view(self.size, *tensor.shape), work, self.counter)

    def all_gather_into(self, result: Tensor, tensor: Tensor, purpose: Purpose) -> None:
        """Fill `result`, contiguous, with every rank's `tensor`, one after another."""
        if self.process_group is None:
            result.view(-1).copy_(tensor.reshape(-1))
            return
        self._count("all_gather", purpose, tensor)
        with self._waiting(purpose):
            _GATHER(result, tensor, group=self.process_group)

    def reduce_scatter(self, result: Tensor, tensor: Tensor, purpose: Purpose) -> None:
        """Fill `result` with the sum over the ranks of this rank's equal piece of `tensor`."""
        if self.process_group is None:
            result.view(-1).copy_(tensor.reshape(-1))
            return
        self._count("reduce_scatter", purpose, tensor)
        with self._waiting(purpose):
            _SCATTER(result, tensor, group=self.process_group)

    def send_later(self, tensor: Tensor, to: int, purpose: Purpose) -> Pending:
        """Start sending `tensor`, dense and contiguous, to the group's rank `to`.

        The tensor must stay as it is until the result has been waited for. What two ranks send each
        other arrives in the order in which it was sent.
        """
        self._count("send", purpose, tensor)
        with peer_failures():
            work = dist.isend(tensor, group=self.process_group, group_dst=to)
        return Pending(tensor, work)

    def receive(self, tensor: Tensor, source: int, purpose: Purpose) -> Tensor:
        """Fill `tensor`, contiguous, with what the group's rank `source` sends; returns it."""
        with self._waiting(purpose):
            dist.recv(tensor, group=self.process_group, group_src=source)
        return tensor

    def receive_later(self, tensor: Tensor, source: int) -> Pending:
        """Start to fill `tensor`, as `receive`: sends and receives meet in the order of both."""
        with peer_failures():
            work = dist.irecv(tensor, group=self.process_group, group_src=source)
        return Pending(tensor, work, self.counter, tells_its_end=False)

    def broadcast(self, tensor: Tensor, source: int, purpose: Purpose) -> Tensor:
        """Give every rank `source`'s values, in place; returns the tensor."""
        if self.process_group is not None:
            if self.rank == source:
                self._count("broadcast", purpose, tensor)
            with self._waiting(purpose):
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
            json.loads(row[:length].numpy().tobytes())
            for row, length in zip(gathered, lengths, strict=True)
        ]


@dataclass(frozen=True)
class Groups:
    """The groups of one generation of ranks.

    ``data`` are the ranks that hold the same part of the model in each replica, ``statistics`` the
    same ranks over connections of their own (batch statistics must not queue behind a gradient
    bucket in flight). ``tensor`` are those that share this rank's layers, ``pipeline`` its
    neighbours in the other stages, ``model`` both: one replica. ``shard`` are the ranks of ``data``
    that keep one part of the model in pieces between them (ZeRO), ``copies`` those that hold the
    same piece: one rank alone, unless there are several such groups. ``checkpoint`` are all ranks
    over connections for the thread that saves while the others are in use: host memory only; or
    the first few, where only these have something to save (any other is alone there).
    ``between`` are the ranks with the same place in each replica, where replicas have weights of
    their own for a while, and ``inner`` the groups within one replica, as if it were alone; None
    where they agree at every step.
    ``mail`` are all ranks over connections for `Mail`: host memory only, None without.
    ``transport`` is what carries their collectives, "none" for a rank alone; ``reason`` why "auto"
    could not take shared memory on the CPU.
    """

    world: Group
    data: Group
    statistics: Group
    checkpoint: Group
    device: torch.device
    tensor: Group = field(default_factory=lambda: Group(0, 1))
    pipeline: Group = field(default_factory=lambda: Group(0, 1))
    model: Group = field(default_factory=lambda: Group(0, 1))
    shard: Group = field(default_factory=lambda: Group(0, 1))
    copies: Group = field(default_factory=lambda: Group(0, 1))
    between: Group = field(default_factory=lambda: Group(0, 1))
    inner: "Groups | None" = None
    mail: Group | None = None
    transport: str = "none"
    reason: str | None = None

    @property
    def within(self) -> "Groups":
        """The groups that a replica computes with."""
        return self if self.inner is None else self.inner

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one that counts for its replica, where one of them has to."""
        return self.model.rank == 0

    def carried_by(self, transport: str, reason: str | None = None) -> "Groups":
        """The same, with what carries their collectives, and why."""
        inner = None if self.inner is None else self.inner.carried_by(transport, reason)
        return replace(self, transport=transport, reason=reason, inner=inner)

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
        axes: Axes = (),
        shards: int | None = None,
        apart: bool = False,
        mail: bool = False,
        savers: int | None = None,
        transport: Transport = "auto",
        timeout_s: float = TIMEOUT_S,
    ) -> "Groups":
        """Meet the other ranks at `store` (``file:PATH``, ``tcp:HOST:PORT``, ``agent:HOST:PORT``).

        ``axes``: a strategy's (name, degree), outermost first; without any all are replicas.
        ``shards``: how many ranks of the data axis, next to one another, are a shard group; None
        for all of them. ``apart``: whether replicas (shard groups, if there are any) have weights
        of their own for a while. ``mail``: whether threads are to exchange letters.
        ``savers``: how many ranks, the first ones, save checkpoints; None for all.
        ``transport``: "auto" is shared memory where all ranks are on one host and compute on the
        CPU. Collective over all ranks. Raises `WorldError` if the meeting place cannot be had, or
        shared memory that was asked for.
        """
        device = device or torch.device("cpu")
        if world_size == 1:
            return cls.alone(device)
        timeout = timedelta(seconds=timeout_s)
        use_the_way_to(store)
        place = open_store(store, rank, world_size, timeout)
        mesh = Mesh(axes or (("dp", world_size),)).with_shards(shards)
        meeting = PrefixStore(generation, place)
        member = _Member(rank, mesh, meeting, timeout, apart, mail, savers or world_size)
        with peer_failures():
            reason = _why_not_shared(transport, device)
            if reason is None:
                try:
                    made = member.groups(shared_memory.BACKEND, device)
                    return made.carried_by(_carrier(made.world))
                except CannotShare as error:
                    reason = str(error)
            if transport == "shared_memory":
                raise WorldError(
                    f"the ranks cannot share memory: {reason}",
                    hint="Leave the choice to the program (--comm auto), or use --comm gloo.",
                    rank=rank,
                )
            # gloo for tensors on the CPU (counts, statuses), NCCL for those on a GPU.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            made = member.groups(backend, device)
        carrier = "nccl" if device.type == "cuda" else "gloo"
        told = reason if transport == "auto" and device.type == "cpu" else None
        return made.carried_by(carrier, told)

    def close(self) -> None:
        """Leave the groups. Collective."""
        if self.world.process_group is not None:
            dist.destroy_process_group()


@dataclass(frozen=True)
class _Member:
    """One rank where all of them meet."""

    rank: int
    mesh: Mesh
    meeting: PrefixStore
    timeout: timedelta
    apart: bool = False
    mail: bool = False
    savers: int = 1

    def groups(self, backend: str, device: torch.device) -> Groups:
        """Every group of this rank.

        Raises `CannotShare` on every rank, or on none. Collective over all ranks, which make all
        groups in one order, also those that they are not in.
        """
        shared_memory.register()
        size, counter = self.mesh.size, Counter()
        dist.init_process_group(
            backend,
            store=PrefixStore(backend, self.meeting),
            rank=self.rank,
            world_size=size,
            timeout=self.timeout,
        )
        for_saving = "gloo" if "nccl" in backend else backend
        everyone = tuple(range(size))
        world = Group(self.rank, size, dist.group.WORLD, counter, everyone)

        def group(axes: tuple[str, ...], kind: str = backend, *, own: bool = False) -> Group:
            return self._group(self.mesh.parts(axes), kind, world, own=own)

        cut = any(name == "shard" for name, _ in self.mesh.axes)
        try:
            made = Groups(
                world=world,
                statistics=group(("dp", "shard"), own=True),
                checkpoint=self._group([everyone[: self.savers]], for_saving, world, own=True),
                data=(data := group(("dp", "shard"))),
                shard=group(("shard",)) if cut else data,
                copies=group(("dp",)) if cut else Group(0, 1, None, counter, (self.rank,)),
                tensor=group(("tp",)),
                pipeline=group(("pp",)),
                model=group(("pp", "tp")),
                # Shared memory has no sends and receives from several threads.
                mail=self._group([everyone], "gloo", world, own=True) if self.mail else None,
                device=device,
            )
            return self._apart(made, group, cut=cut) if self.apart else made
        except CannotShare:
            dist.destroy_process_group()
            raise

    def _apart(self, made: Groups, group: Callable[..., Group], *, cut: bool) -> Groups:
        """With the groups within a replica. Collective over all ranks."""
        alone = Group(0, 1, None, made.world.counter, (self.rank,))
        shard = made.shard if cut else alone
        inner = replace(
            made,
            world=group(("pp", "shard", "tp")),
            data=shard,
            shard=shard,
            statistics=group(("shard",), own=True) if cut else alone,
            copies=alone,
        )
        return replace(made, between=made.copies if cut else made.data, inner=inner)

    def _group(
        self, parts: Iterable[tuple[int, ...]], backend: str, world: Group, *, own: bool
    ) -> Group:
        """Make a group of each of `parts`; the one that this rank is in.

        ``own``: over connections of its own, also where it is all ranks.
        """
        mine = Group(0, 1, None, world.counter, (self.rank,))
        for ranks in parts:
            if len(ranks) == 1:
                continue
            if len(ranks) == world.size and not own:
                return world
            made = dist.new_group(list(ranks), timeout=self.timeout, backend=backend)
            if self.rank in ranks:
                mine = Group(ranks.index(self.rank), len(ranks), made, world.counter, ranks)
        return mine


def _why_not_shared(transport: Transport, device: torch.device) -> str | None:
    """What is known before the others are asked; None if nothing speaks against it."""
    if device.type != "cpu":
        return f"tensors are on {device.type}"
    return "gloo was asked for" if transport == "gloo" else None


def _carrier(group: Group) -> str:
    """``shared_memory``, or ``shared_memory_python`` without the C library."""
    assert isinstance(group.process_group, SharedMemoryGroup)
    core = group.process_group.core_name
    return "shared_memory" if core == "C" else "shared_memory_python"
