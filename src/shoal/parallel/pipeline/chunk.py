"""`Chunk`: one stage of a traced model as a module that holds its own parameters.

    chunk = Chunk(segments, tensors, again=[False, True])
    values = chunk({"x": rows, "relu": received})       # live values, and the model's outputs

It is more than one segment where activations are recomputed: each block is one, under
`torch.utils.checkpoint`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from shoal.trace import Segment

Values = dict[str, Tensor]


class Chunk(nn.Module):
    """The segments of one stage; ``tensors``: parameters and buffers by their qualified names.

    ``again[i]``: whether segment i is computed again in the backward pass. ``takes`` and ``gives``
    are the names of the values that the stage needs from the one before, and passes to the next.
    """

    def __init__(
        self, segments: Sequence[Segment], tensors: Mapping[str, Tensor], again: Sequence[bool]
    ) -> None:
        super().__init__()
        self.takes = segments[0].live_in
        self.gives = segments[-1].live_out
        self.inputs = tuple(dict.fromkeys(name for each in segments for name in each.inputs))
        self.outputs = segments[-1].outputs
        self._parts: list[tuple[Any, list[tuple[str, str]], tuple[str, ...], bool]] = []
        for segment, repeats in zip(segments, again, strict=True):
            held = [(name, path.replace(".", "/")) for name, path in segment.state.items()]
            for (_, key), path in zip(held, segment.state.values(), strict=True):
                self._hold(key, tensors[path])
            given = (*segment.inputs, *segment.live_in)
            self._parts.append((segment.callable(), held, given, repeats))

    def _hold(self, key: str, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(key, tensor)
        else:
            self.register_buffer(key, tensor)

    def forward(self, values: Values) -> Values:
        """``values``: the model's inputs and `takes`, by name; what comes of them likewise."""
        inputs = {name: values[name] for name in self.inputs}
        live = dict(values)
        for run, held, given, repeats in self._parts:
            arguments = {name: live[name] for name in given}
            arguments |= {name: getattr(self, key) for name, key in held}
            if repeats and is_grad_enabled():
                # Randomness is counted, not drawn: there is no generator's state to keep.
                made = checkpoint(run, arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                made = run(arguments)
            live = inputs | made  # what is not needed any more goes
        return live
