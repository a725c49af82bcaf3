"""A second tree of the user's modules, whose parameters are the pieces that this rank keeps.

    user's   Block(Linear(weight), LayerNorm(weight))     what runs
    twin     Block(Linear(piece),  LayerNorm(piece))      what is updated, saved and compared

Names, classes and buffers are the user's: an optimizer that leaves out norms finds them, and a
running mean is one tensor in both.

    twin = Twin(model)                       # holds no parameter yet
    twin.fill(lambda parameter: pieces[parameter])
"""

from collections.abc import Callable

from torch import Tensor, nn

Piece = Callable[[nn.Parameter], nn.Parameter | None]


class Twin:
    """``root`` is the second tree; see the module."""

    def __init__(self, model: nn.Module) -> None:
        self._twins: dict[nn.Module, nn.Module] = {}
        self.root = self._twin(model)

    def _twin(self, module: nn.Module) -> nn.Module:
        if module not in self._twins:
            twin = object.__new__(type(module))
            self._twins[module] = twin
            # Not the module's own constructor: it would make parameters.
            twin.__dict__.update(module.__dict__)
            hooks = [name for name in twin.__dict__ if name.endswith("_hooks")]
            twin.__dict__.update({name: module.__dict__[name].copy() for name in hooks})
            twin.__dict__["_parameters"] = dict.fromkeys(module._parameters)
            twin.__dict__["_modules"] = {
                name: None if child is None else self._twin(child)
                for name, child in module._modules.items()
            }
        return self._twins[module]

    def fill(self, piece: Piece) -> None:
        """Put ``piece(parameter)`` in the place of each parameter; a tied one is asked for once.

        None leaves its place empty.
        """
        made: dict[int, nn.Parameter | None] = {}
        for module, twin in self._twins.items():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = piece(parameter)
                twin._parameters[name] = made[id(parameter)]

    def fill_buffers(self, piece: Callable[[Tensor], Tensor | None]) -> None:
        """Buffers of its own for the second tree, which has the user's otherwise."""
        made: dict[int, Tensor | None] = {}
        for module, twin in self._twins.items():
            own: dict[str, Tensor | None] = {}
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in made:
                    made[id(buffer)] = piece(buffer)
                own[name] = None if buffer is None else made[id(buffer)]
            twin.__dict__["_buffers"] = own


def rows(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """Which rows [start, stop) of `size` a rank keeps: equal pieces, the last ones smaller.

    As torch.chunk: rows(10, 4, 3) == (9, 10), rows(2, 4, 3) == (2, 2)
    """
    each = -(-size // ranks)
    return min(rank * each, size), min((rank + 1) * each, size)
