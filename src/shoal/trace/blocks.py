"""A sequential model that cannot be traced, as a graph whose operations are its children.

    Sequential(a, b, c)      →      a │ b │ c        each run as it is, by Python

    blocks = Blocks.measure(model, inputs, why)        # while the model is whole
    graph, state = blocks.graph(model, places)

What happens inside a child (control flow by values, gradients of its own) stays as it is. Children
that share what a call changes, or overwrite what an earlier one has made, are one operation.
"""

import copy
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Graph, Node
from torch.utils.flop_counter import FlopCounterMode

from shoal.errors import Refused, UserCodeError
from shoal.trace.costs import BYTES_PER_S, FLOPS_PER_S, PASSES
from shoal.trace.structure import Structure, take_apart


def is_sequential(module: nn.Module) -> bool:
    """Whether calling it is calling its children one after another, and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
             module._backward_pre_hooks)  # fmt: skip
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return plain and "forward" not in vars(module) and not any(hooks)


def steps_of(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """The children in the order in which they run, those of sequential children in their place."""
    found = []
    for name, child in module._modules.items():
        if child is None:
            continue
        inner = f"{path}.{name}" if path else name
        found += steps_of(child, inner) if is_sequential(child) else [(inner, child)]
    return found


class Block:
    """The target of a node: children that run as they are, with the tensors that are given.

    ``Block(*values, *state)``: what the block before it gives, then parameters and buffers in the
    order of ``names``. In the mode (train, eval) that its modules had when it was made.
    """

    __name__ = "block"

    def __init__(self, body: nn.Sequential, given: Structure, made: Structure, *, copies: bool):
        self.body, self.given, self.made, self.copies = body, given, made, copies
        self.names = _state_names(body)
        self._modes = [(module, module.training) for module in body.modules()]

    def __call__(self, *tensors: Tensor) -> Any:
        for module, training in self._modes:
            if module.training != training:
                module.training = training
        values = list(tensors[: self.given.count])
        if self.copies:
            values = [value.clone() for value in values]
        state = dict(zip(self.names, tensors[self.given.count :], strict=True))
        held = dict(state)
        result = functional_call(self.body, held, (self.given.build(values),))
        for name, tensor in state.items():  # ``self.buffer = value`` in a forward pass
            if held[name] is not tensor:
                tensor.detach().copy_(held[name].detach())
        return self._taken_apart(result)

    def _taken_apart(self, result: Any) -> Any:
        structure, made = take_apart(result)
        if structure.count != self.made.count:
            raise UserCodeError(
                f"a block gave {structure.count} tensors, and {self.made.count} when it was tried",
                hint="A block of a model that is cut between its blocks gives the same number of "
                "tensors for all inputs.",
            )
        return made[0] if len(made) == 1 else tuple(made)


def _state_names(body: nn.Module) -> list[str]:
    return [name for named in (body.named_parameters, body.named_buffers) for name, _ in named()]


@dataclass
class _Run:
    """What one forward pass showed, child by child."""

    flops: list[float]
    values: list[Structure]  # of the input, and what each child gave
    tensors: list[list[Tensor]]  # without memory
    joined: list[tuple[int, int]]  # children that have to be one operation, first to last
    changes_input: bool


@dataclass
class Blocks:
    """A sequential model's children, and what one forward pass in each mode showed of them."""

    runs: dict[bool, _Run]
    groups: list[tuple[int, int]]  # children first, …, last - 1 of each operation
    why: str  # why the model is not traced

    @classmethod
    def measure(cls, model: nn.Module, inputs: Any, why: Refused) -> "Blocks":
        """Run a copy of `model`, with its own values, once in each mode. Raises `why` if it fails.

        The copy has the model's parameters and buffers of its own: nothing of `model` changes. The
        same on all ranks for the same values.
        """
        own = inputs if isinstance(inputs, tuple) else (inputs,)
        if not is_sequential(model) or len(own) != 1 or len(steps_of(model)) < 2:
            raise why
        runs = {}
        for training in (True, False):
            try:
                runs[training] = _watch(_copy(model).train(training), own[0])
            except Refused as error:
                raise error from why
            except Exception as error:
                if training:
                    raise why from error
                runs[training] = runs[True]
        count = len(steps_of(model))
        joined = [*runs[True].joined, *runs[False].joined, *_sharing(model)]
        return cls(runs, _grouped(count, joined), str(why))

    def changes_input(self) -> bool:
        """Whether the first block overwrites the model's input."""
        return any(run.changes_input for run in self.runs.values())

    def outputs(self, training: bool) -> Structure:
        """The structure of what the model gives."""
        return self.runs[training].values[-1]

    def graph(
        self, model: nn.Module, places: Sequence[tuple[str, Any]]
    ) -> tuple[Graph, dict[str, str]]:
        """The graph of `model` (in its mode) and {placeholder: name of a parameter or buffer}.

        ``places``: names and traced values of the model's inputs.
        """
        graph, steps, run = Graph(), steps_of(model), self.runs[model.training]
        live = [graph.placeholder(name) for name, _ in places]
        for node, (_, value) in zip(live, places, strict=True):
            node.meta["val"] = value
        state: dict[str, str] = {}
        held = _placeholders(graph, model, state)
        for first, last in self.groups:
            body = nn.Sequential(*(module for _, module in steps[first:last]))
            copies = first == 0 and self.changes_input()
            block = Block(body, run.values[first], run.values[last], copies=copies)
            tensors = {**dict(body.named_parameters()), **dict(body.named_buffers())}
            given = [held[id(tensors[name])] for name in block.names]
            node = graph.call_function(block, (*live, *given))
            live = self._results(graph, node, run, (first, last), steps[first])
        graph.output(tuple(live))
        _drop_unused(graph, state)
        graph.lint()
        return graph, state

    def _results(
        self,
        graph: Graph,
        node: Node,
        run: _Run,
        span: tuple[int, int],
        step: tuple[str, nn.Module],
    ) -> list[Node]:
        """Describe a block's node; the nodes of the tensors that it gives."""
        first, last = span
        made = run.tensors[last]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in made)
        seconds = PASSES * (sum(run.flops[first:last]) / FLOPS_PER_S + 2 * moved / BYTES_PER_S)
        line = f"block {step[0]} ({type(step[1]).__name__})"
        node.meta |= {"path": step[0], "call": 0, "line": line, "seconds": seconds}
        if len(made) == 1:
            node.meta["val"] = made[0]
            return [node]
        node.meta["val"] = tuple(made)
        parts = []
        for index, tensor in enumerate(made):
            part = graph.call_function(operator.getitem, (node, index))
            part.meta = {
                "val": tensor,
                "path": step[0],
                "call": index,
                "line": line,
                "seconds": 0.0,
            }
            parts.append(part)
        return parts


def _placeholders(graph: Graph, model: nn.Module, state: dict[str, str]) -> dict[int, Node]:
    """One for every parameter and buffer, by its identity; a tied one goes by its first name."""
    held: dict[int, Node] = {}
    for kind, named in (("p", model.named_parameters), ("b", model.named_buffers)):
        for name, tensor in named():
            place = graph.placeholder(f"{kind}_{name.replace('.', '_')}")
            place.meta["val"] = tensor.detach().to("meta")
            held[id(tensor)] = place
            state[place.name] = name
    return held


def _drop_unused(graph: Graph, state: dict[str, str]) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "placeholder" and node.name in state and not node.users:
            del state[node.name]
            graph.erase_node(node)


def _copy(model: nn.Module) -> nn.Module:
    """With the same parameters, and buffers of its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _watch(model: nn.Module, inputs: Any) -> _Run:
    """Run the children one after another, and note what each does."""
    structure, tensors = take_apart(inputs)
    tensors = [tensor.clone() for tensor in tensors]
    run = _Run([], [structure], [_hollow(tensors)], [], False)
    made_at: dict[int, int] = {}  # memory → the child that has made it
    alive, steps = [*tensors], steps_of(model)  # what is freed would give its memory away
    with torch.random.fork_rng(_devices(model)), torch.enable_grad():
        for index, (path, module) in enumerate(steps):
            before = [tensor._version for tensor in tensors]
            with FlopCounterMode(display=False) as counter:
                result = module(structure.build(tensors))
            for tensor, version in zip(tensors, before, strict=True):
                if tensor._version != version:
                    maker = made_at.get(_memory(tensor), -1)
                    run.joined.append((max(0, maker), index))
                    run.changes_input |= maker < 0
            run.flops.append(_flops(counter, module, tensors))
            structure, tensors = take_apart(result)
            _require_tensors(result, tensors, path, last=index + 1 == len(steps))
            run.values.append(structure)
            run.tensors.append(_hollow(tensors))
            alive += tensors
            for tensor in tensors:
                made_at.setdefault(_memory(tensor), index)
    return run


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _hollow(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor, device="meta", requires_grad=False) for tensor in tensors]


def _devices(model: nn.Module) -> list[torch.device]:
    """The devices whose generators a forward pass may move."""
    found = {each.device for each in itertools.chain(model.parameters(), model.buffers())}
    return [device for device in found if device.type == "cuda"]


def _flops(counter: FlopCounterMode, module: nn.Module, given: Sequence[Tensor]) -> float:
    """Those counted; for what nobody counts (an LSTM), two for each weight and position."""
    counted = float(counter.get_total_flops())
    if counted:
        return counted
    positions = max((math.prod(tensor.shape[:-1]) for tensor in given), default=1)
    weights = [w for w in module.parameters() if w.dim() > 1]
    looks_up = any(isinstance(each, nn.Embedding | nn.EmbeddingBag) for each in module.modules())
    return 0.0 if looks_up else 2.0 * positions * sum(weight.numel() for weight in weights)


def _require_tensors(result: Any, made: Sequence[Tensor], path: str, *, last: bool) -> None:
    flat = isinstance(result, Tensor) or (
        isinstance(result, tuple) and all(isinstance(item, Tensor) for item in result)
    )
    if made and (last or flat):
        return
    raise Refused(
        f"block {path} of the model gives {'a ' + type(result).__name__ if made else 'no tensor'}, "
        "and between blocks a model that cannot be traced can only pass tensors",
        hint="Let each block but the last give a tensor or a tuple of tensors.",
    )


def _sharing(model: nn.Module) -> list[tuple[int, int]]:
    """First and last child of those that have a part in common whose calls are counted.

    Only torch's own layers without buffers and without random choices can be called anywhere.
    """
    places: dict[int, tuple[int, int]] = {}
    for index, (_, child) in enumerate(steps_of(model)):
        for module in child.modules():
            keys = [id(buffer) for buffer in module._buffers.values() if buffer is not None]
            if not _is_simple(module):
                keys.append(id(module))
            for key in keys:
                first, _ = places.get(key, (index, index))
                places[key] = first, index
    return [span for span in places.values() if span[0] != span[1]]


def _is_simple(module: nn.Module) -> bool:
    random = hasattr(module, "dropout") or isinstance(module, nn.modules.dropout._DropoutNd)
    buffers = any(buffer is not None for buffer in module._buffers.values())
    return type(module).__module__.startswith("torch.nn.") and not random and not buffers


def _grouped(count: int, joined: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first, behind the last) of each operation: what is joined, and all between, is one."""
    inside = {index for first, last in joined for index in range(first + 1, last + 1)}
    starts = [index for index in range(count) if index not in inside]
    return list(itertools.pairwise([*starts, count]))
