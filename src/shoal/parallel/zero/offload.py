"""`/offload`: the optimizer's state in the host's memory, for models on a GPU.

    GPU    gradient ──copy──▶                    ──copy──▶ parameter
    host                     gradient ▸ update ▸ parameter, state

The optimizer gets copies of this rank's pieces in the host's memory, pinned, and updates them
there (Ren et al. 2021, ZeRO-Offload, without its overlap). On the CPU there is nothing to move.
"""

import torch
from torch import Tensor, nn

from shoal.layout import Part
from shoal.parallel.zero.states import States
from shoal.parallel.zero.twin import Twin


class Offloaded:
    """Other states, with what the optimizer needs in the host's memory."""

    def __init__(self, states: States) -> None:
        self._states = states
        self.in_step = states.in_step
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        twin = Twin(states.holding)
        twin.fill(self._piece)
        self.holding = twin.root

    def _piece(self, parameter: nn.Parameter) -> nn.Parameter:
        if not parameter.requires_grad:
            return parameter
        host = nn.Parameter(_on_host(parameter.detach()))
        self._pairs.append((parameter, host))
        return host

    def layout(self, whole: dict[str, Part]) -> dict[str, Part]:
        return self._states.layout(whole)

    def finish(self) -> None:
        self._states.finish()

    def take_gradients(self, factor: float) -> None:
        self._states.take_gradients(factor)
        for parameter, host in self._pairs:
            gradient = parameter.grad
            host.grad = None if gradient is None else _on_host(gradient)
        _settle(self._pairs)

    def norm(self) -> Tensor:
        return self._states.norm()

    @torch.no_grad()
    def spread(self) -> None:
        for parameter, host in self._pairs:
            parameter.grad = None
            parameter.copy_(host, non_blocking=True)
        _settle(self._pairs)
        self._states.spread()


def _on_host(tensor: Tensor) -> Tensor:
    """A copy, which may still be under way; in pinned memory where it comes from a GPU."""
    pinned = tensor.device.type == "cuda"
    host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    return host.copy_(tensor, non_blocking=pinned)


def _settle(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Wait for the copies: the host reads them, or is about to overwrite them."""
    if pairs and pairs[0][0].device.type == "cuda":
        torch.cuda.current_stream().synchronize()
