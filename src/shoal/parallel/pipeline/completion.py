"""When the gradient of each parameter is complete, for whoever sums it over the replicas.

B0 B1 B2 B3        of one chunk: complete, one after another, while B3 runs
I0 I1 W0 … W3      in halves, or of several chunks: after the last action

completion = Completion({stage: parameters})
completion.begin(actions)              # this rank's, of one step
with completion.during(action): …
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from shoal.schedule import Action

Listener = Callable[[Iterable[Tensor]], None]


class Completion:
    """The parameters of this rank's chunks, by stage."""

    def __init__(self, parameters: Mapping[int, Sequence[Tensor]]) -> None:
        self._parameters = parameters
        self._listeners: list[Listener] = []
        self._last: dict[Action, int] = {}
        self._left: dict[int, int] = {}
        self._finishing: set[int] = set()

    def tell(self, listener: Listener) -> None:
        """Call `listener` with parameters to whose gradients nothing is added any more."""
        self._listeners.append(listener)

    def finishes(self, parameter: Tensor) -> bool:
        """Whether what is being added to a gradient now is the last of the step."""
        return id(parameter) in self._finishing

    def begin(self, actions: Sequence[Action]) -> None:
        """A step begins, in which this rank does `actions`."""
        latest = {action.stage: action for action in actions if action.kind != "F"}
        self._last = {action: stage for stage, action in latest.items()}
        self._left = {}
        for parameters in self._parameters.values():
            for parameter in parameters:
                self._left[id(parameter)] = self._left.get(id(parameter), 0) + 1

    @contextlib.contextmanager
    def during(self, action: Action) -> Iterator[None]:
        """While an action runs, and what is complete after it."""
        stage = self._last.get(action)
        if stage is None:
            yield
            return
        complete = []
        for parameter in self._parameters[stage]:
            self._left[id(parameter)] -= 1
            if not self._left[id(parameter)]:
                complete.append(parameter)
        # In halves a gradient may come from both: then only the end is certain.
        if action.kind == "B":
            self._finishing = {id(parameter) for parameter in complete}
        yield
        self._finishing = set()
        for listener in self._listeners:
            listener(complete)
