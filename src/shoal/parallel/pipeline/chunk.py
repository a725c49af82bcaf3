"""`Chunk`: one stage of a traced model as a module that holds its own parameters.

    chunk = Chunk(segments, tensors, again=[False, True])
    values = chunk({"x": rows, "relu": received})       # live values, and the model's outputs

It is more than one segment where activations are recomputed: each block is one, under
`torch.utils.checkpoint`; and under zero2 and zero3, which gather the parameters of one after
another.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from shoal.parallel.zero.gathered import GatheredRows, Unit
from shoal.trace import Segment

Values = dict[str, Tensor]


@dataclass(frozen=True)
class _Part:
    """A segment: ``held`` are (placeholder, key) of tensors here, ``given`` all other arguments.

    ``passing`` are values that it only passes on.
    """

    run: Callable[[Values], Values]
    held: list[tuple[str, str]]
    given: tuple[str, ...]
    passing: tuple[str, ...]
    again: bool
    unit: Unit | None


class Chunk(nn.Module):
    """The segments of one stage; ``tensors``: parameters and buffers by their qualified names.

    ``again[i]``: whether segment i is computed again in the backward pass. ``takes`` and ``gives``
    are the names of the values that the stage needs from the one before, and passes to the next.
    ``rows`` gathers the parameters of each segment, its unit of ``units``.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        tensors: Mapping[str, Tensor],
        again: Sequence[bool],
        rows: GatheredRows | None = None,
        units: Sequence[Unit | None] = (),
    ) -> None:
        super().__init__()
        self._rows = rows
        self.takes = segments[0].live_in
        self.gives = segments[-1].live_out
        self.inputs = tuple(dict.fromkeys(name for each in segments for name in each.inputs))
        self.outputs = segments[-1].outputs
        self._parts: list[_Part] = []
        for segment, repeats, unit in zip(
            segments, again, units or [None] * len(segments), strict=True
        ):
            held = [(name, path.replace(".", "/")) for name, path in segment.state.items()]
            for (_, key), path in zip(held, segment.state.values(), strict=True):
                self._hold(key, tensors[path])
            passing = _only_passed_on(segment)
            given = tuple(n for n in (*segment.inputs, *segment.live_in) if n not in passing)
            self._parts.append(_Part(segment.callable(), held, given, passing, repeats, unit))

    def _hold(self, key: str, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(key, tensor)
        else:
            self.register_buffer(key, tensor)

    def forward(self, values: Values) -> Values:
        """``values``: the model's inputs and `takes`, by name; what comes of them likewise."""
        inputs = {name: values[name] for name in self.inputs}
        live = dict(values)
        for part in self._parts:
            passed = {name: live[name] for name in part.passing}
            made = self._run(part, {name: live[name] for name in part.given}, passed)
            live = inputs | passed | made  # what is not needed any more goes
        return live

    def _run(self, part: _Part, given: Values, passed: Values) -> Values:
        def call(values: Values) -> Values:
            arguments = values | passed | {name: getattr(self, key) for name, key in part.held}
            if part.again and is_grad_enabled():
                # Randomness is counted, not drawn: there is no generator's state to keep.
                made = checkpoint(
                    part.run, arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                made = part.run(arguments)
            return {name: value for name, value in made.items() if name not in passed}

        if self._rows is None or part.unit is None:
            return call(given)
        return self._rows.run(part.unit, call, given)


def _only_passed_on(segment: Segment) -> tuple[str, ...]:
    """The values that a segment gives on as they have come, and does not use."""
    used = {
        node.name
        for node in segment.graph.nodes
        if node.op == "placeholder" and any(user.op != "output" for user in node.users)
    }
    return tuple(name for name in (*segment.inputs, *segment.live_in) if name not in used)
