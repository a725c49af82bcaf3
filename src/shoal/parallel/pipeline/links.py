"""What stages send each other: live values forwards, their gradients backwards.

    rank 0   F0 ─values→  F1 ─values→                ←gradients─ B0
    rank 1        ─→ F0 ──────→ B0 ─gradients→

    links = Links(group, table)
    links.begin(keys)                                   # of the microbatches that there are
    links.send(Message("F", stage, 0), tensors)         # does not wait
    tensors = links.receive(Message("F", stage, 0))
    links.finish()

A message is some tensors, or None for one that is not there (a value that no loss depends on has no
gradient). Types, shapes and strides are sent ahead of the first message of each (direction, stage,
key), and kept by both sides: a microbatch's key is what they depend on, the shapes of the model's
inputs above all. Between two ranks messages arrive in the order in which they were sent, which the
table says; one that is not needed yet is kept. The next one from each rank is received beside the
computation: gloo moves nothing until the receiver has asked for it.
"""

import json
from collections import defaultdict, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from shoal.comm import Group, Pending
from shoal.errors import RunError
from shoal.schedule import Action, Table

Tensors: TypeAlias = list[Tensor | None]
Arriving: TypeAlias = tuple["Message", Tensors, list[Pending]]


class Message(NamedTuple):
    """Values that `stage` has made (F), or gradients of those that it was given (B)."""

    kind: str
    stage: int
    microbatch: int


@dataclass(frozen=True)
class Spec:
    """What has to be known of a tensor in order to receive it."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "Spec":
        strides = tensor.stride() if _is_dense(tensor) else _contiguous(tensor.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(dtype, tuple(tensor.shape), tuple(strides), tensor.requires_grad)

    def empty(self, device: torch.device) -> Tensor:
        dtype = getattr(torch, self.dtype)
        return torch.empty_strided(self.shape, self.strides, dtype=dtype, device=device)


class Links:
    """One rank's messages to and from the other stages of its replica."""

    def __init__(self, group: Group, table: Table, device: torch.device) -> None:
        self._group, self._table, self._device = group, table, device
        self._known: dict[Hashable, list[Spec | None]] = {}
        self._keys: Mapping[int, Hashable] = {}
        self._coming: dict[int, deque[Message]] = {}
        self._here: dict[Message, Tensors] = {}
        self._arriving: dict[int, Arriving] = {}
        self._sending: dict[int, list[tuple[int, Pending]]] = {}
        self._places = [{action: i for i, action in enumerate(row)} for row in table.rows]

    def begin(self, keys: Mapping[int, Hashable], *, backward: bool = True) -> None:
        """A step begins, with these microbatches and their keys: the same on all ranks."""
        self._keys = keys
        self._here.clear()
        self._coming = defaultdict(deque)
        for rank, row in enumerate(self._table.rows):
            for action in row:
                message, to = self._message(action)
                mine = to == self._group.rank != rank and action.microbatch in keys
                if message is not None and mine and (backward or message.kind == "F"):
                    self._coming[rank].append(message)
        for source in self._coming:
            self._ask_ahead(source)

    def _message(self, action: Action) -> tuple[Message | None, int]:
        """What is sent after an action, and to which rank."""
        kind, stage, microbatch = action
        if kind == "F" and stage + 1 < self._table.stages:
            return Message("F", stage, microbatch), self._table.rank_of(stage + 1)
        if kind in ("B", "I") and stage > 0:
            return Message("B", stage, microbatch), self._table.rank_of(stage - 1)
        return None, -1

    def send(self, message: Message, tensors: Sequence[Tensor | None]) -> None:
        """Begin to send a message to the stage after, or before; on this rank, hand it over."""
        to = self._table.rank_of(message.stage + (1 if message.kind == "F" else -1))
        if to == self._group.rank:
            self._here[message] = [None if t is None else _handed(t) for t in tensors]
            return
        taken = self._taken_at(message, to)
        for spec, tensor in zip(self._specs(message, tensors, to, taken), tensors, strict=True):
            if spec is not None and tensor is not None and tensor.numel():
                pending = self._group.send_later(_flat(tensor, spec), to, "activation")
                self._sending.setdefault(to, []).append((taken, pending))

    def _taken_at(self, message: Message, to: int) -> int:
        """The place, in the row of rank `to`, of the action that a message is for."""
        step = 1 if message.kind == "F" else -1
        kinds = ("F",) if message.kind == "F" else ("B", "I")
        actions = (Action(k, message.stage + step, message.microbatch) for k in kinds)  # type: ignore[arg-type]
        return next(self._places[to][a] for a in actions if a in self._places[to])

    def _release(self, message: Message, source: int) -> None:
        """What `source` took before it sent this message need not be kept any more."""
        kinds = ("F",) if message.kind == "F" else ("B", "I")
        actions = (Action(k, message.stage, message.microbatch) for k in kinds)  # type: ignore[arg-type]
        now = next(self._places[source][a] for a in actions if a in self._places[source])
        left = []
        for taken, pending in self._sending.get(source, ()):
            if taken <= now:
                pending.wait()
            else:
                left.append((taken, pending))
        self._sending[source] = left

    def _specs(
        self, message: Message, tensors: Sequence[Tensor | None], to: int, taken: int
    ) -> list[Spec | None]:
        place = self._place(message)
        known = self._known.get(place)
        if known is None:
            specs = [None if tensor is None else Spec.of(tensor) for tensor in tensors]
            self._known[place] = specs
            self._tell(specs, to, taken)
            return specs
        for number, (spec, tensor) in enumerate(zip(known, tensors, strict=True)):
            if _differs(spec, tensor):
                raise RunError(
                    f"what stage {message.stage} sends as number {number} was {spec} and is "
                    f"{None if tensor is None else Spec.of(tensor)}, for inputs of one shape",
                    hint="A model in a pipeline has to compute the same shapes from the same "
                    "shapes, and from parameters that stay frozen or stay trained.",
                )
        return known

    def _tell(self, specs: list[Spec | None], to: int, taken: int) -> None:
        document = [None if spec is None else list(vars(spec).values()) for spec in specs]
        data = torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)
        for part in (torch.tensor([len(data)]), data):
            pending = self._group.send_later(part.to(self._device), to, "start-up")
            self._sending.setdefault(to, []).append((taken, pending))

    def receive(self, message: Message) -> Tensors:
        """The tensors of a message, once they are there."""
        source = self._table.rank_of(message.stage)
        while message not in self._here:
            ahead = source in self._arriving
            coming, tensors, pending = self._arriving.pop(source) if ahead else self._ask(source)
            self._ask_ahead(source)
            for each in pending:
                each.wait()
            for spec, tensor in zip(self._known[self._place(coming)], tensors, strict=True):
                if spec is not None and tensor is not None:
                    tensor.requires_grad_(spec.requires_grad)
            self._here[coming] = tensors
            self._release(coming, source)
        return self._here.pop(message)

    def _place(self, message: Message) -> Hashable:
        """What the shapes of a message depend on."""
        return (message.kind, message.stage, self._keys[message.microbatch])

    def _ask_ahead(self, source: int) -> None:
        """Begin to receive the message after, if it is known what it will be."""
        # NCCL does one thing after another between two ranks: what is sent would wait for it.
        known = self._coming[source] and self._place(self._coming[source][0]) in self._known
        if known and self._device.type == "cpu":
            self._arriving[source] = self._ask(source)

    def _ask(self, source: int) -> Arriving:
        """Begin to receive the next message from a rank."""
        message = self._coming[source].popleft()
        place = self._place(message)
        if place not in self._known:
            self._known[place] = self._hear(source)
        tensors: Tensors = []
        pending = []
        for spec in self._known[place]:
            tensor = None if spec is None else spec.empty(self._device)
            if spec is not None and tensor is not None and tensor.numel():
                pending.append(self._group.receive_later(_flat(tensor, spec), source))
            tensors.append(tensor)
        return message, tensors, pending

    def _hear(self, source: int) -> list[Spec | None]:
        length = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._group.receive(length, source, "start-up")
        data = torch.zeros(int(length), dtype=torch.uint8, device=self._device)
        self._group.receive(data, source, "start-up")
        document: list[Any] = json.loads(data.cpu().numpy().tobytes())
        return [
            None if spec is None else Spec(spec[0], tuple(spec[1]), tuple(spec[2]), spec[3])
            for spec in document
        ]

    def finish(self) -> None:
        """Wait until everything has been sent."""
        for sent in self._sending.values():
            for _, pending in sent:
                pending.wait()
        self._sending.clear()


def _handed(tensor: Tensor) -> Tensor:
    """The same values for another stage on this rank, with a gradient of their own."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _differs(spec: Spec | None, tensor: Tensor | None) -> bool:
    if spec is None or tensor is None:
        return (spec is None) != (tensor is None)
    same = spec.shape == tuple(tensor.shape) and spec.requires_grad == tensor.requires_grad
    return not same or spec.dtype != str(tensor.dtype).removeprefix("torch.")


def _flat(tensor: Tensor, spec: Spec) -> Tensor:
    """The tensor's memory in its order, as one row; a copy if its strides are not the spec's."""
    tensor = tensor.detach()
    if tensor.stride() != spec.strides:
        tensor = spec.empty(tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory, in whatever order."""
    if tensor.layout != torch.strided:
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))
