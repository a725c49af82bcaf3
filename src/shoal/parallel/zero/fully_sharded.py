"""zero2 and zero3 over torch's `fully_shard`, for models and steps that are not as it expects.

    forward    gather block 0 ▸ run ▸ (free) ▸ gather block 1 ▸ run ▸ …
    backward   … ▸ (gather block 0) ▸ run ▸ free ▸ sum its gradient, keep this rank's rows

Blocks are those that recompute finds, and the rest is one unit around them. A block that shares a
parameter with something outside it belongs to the rest. Gradients are summed, never averaged, in
their own type. Collectives are those of `comm.Group`: counted, and with errors that name a rank.

Ranks that run other blocks than one another would be given wrong weights, without a word, where the
sizes happen to agree. So all compare at the end of a step which units they gathered and summed.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from shoal.comm import Group, Groups
from shoal.errors import Refused, RunError
from shoal.layout import Part
from shoal.parallel.recompute import find_blocks
from shoal.parallel.zero.persistent import local_of
from shoal.parallel.zero.states import norm_of, scale
from shoal.parallel.zero.twin import Twin, rows

_DIGEST = 1 << 20  # its square, summed over the ranks, is exact in float64


class FullySharded:
    """The rows of every parameter of `model` that this rank keeps. 0-d ones are whole on all ranks.

    ``root`` is what is called, with `model` in it. ``keep``: parameters stay whole from the forward
    pass to the end of the backward pass (zero2). Raises `Refused` for parameters of several types
    in one unit. Collective.
    """

    in_step = True

    def __init__(
        self, root: nn.Module, model: nn.Module, groups: Groups, *, keep: bool = False
    ) -> None:
        self._group = groups.shard
        self._everyone = groups.data
        self._copies = groups.copies
        self._device = groups.device
        self._keep = keep
        self.order: list[str] = []
        self.gathered: set[str] = set()  # units, in the step in hand
        self._shards: list[tuple[nn.Parameter, nn.Parameter]] = []  # the model's, the piece
        self._whole = [p for p in model.parameters() if p.dim() == 0]
        self._used: dict[nn.Parameter, float] = {}
        _lay_out(model)
        twin = Twin(model)
        self._wrap(root, model)
        self._outermost: Any = root
        twin.fill(self._piece)
        self.holding = twin.root

    # ---- cutting

    def _wrap(self, root: nn.Module, model: nn.Module) -> None:
        ranks = self._group.process_group
        assert ranks is not None  # one rank alone shards nothing
        mesh = DeviceMesh.from_group(ranks, self._device.type)
        names = {module: name for name, module in model.named_modules()}
        units = {names[block]: block for block in _own_blocks(model)}
        for number, (name, block) in enumerate({**units, "": root}.items()):
            _require_one_type(name, block, set(self._whole))
            block.register_forward_hook(_no_views)
            fully_shard(
                block,
                mesh=mesh,
                # None: the outermost unit is needed again at once.
                reshard_after_forward=False if self._keep else None,
                ignored_params=set(self._whole),
            )
            self._prepare(block, f"{number} {name}")

    def _prepare(self, block: Any, unit: str) -> None:
        """Sums in place of means, our collectives, and zeros where this rank has no gradient."""
        assert isinstance(block, FSDPModule)
        block.set_gradient_divide_factor(1.0)
        # A factor of 1 would else be a PREMUL_SUM, which neither gloo nor shared memory knows.
        block.set_force_sum_reduction_for_comms(True)
        block.set_custom_all_gather(_Gather(self, unit, self._group))
        block.set_custom_reduce_scatter(_Scatter(self, unit, self._group))
        if self._copies.size > 1:
            block.set_all_reduce_hook(self._sum_copies)
        for group in _parameter_groups(block):
            _before(group, "post_backward", lambda group=group: self._fill(group, unit))

    def _sum_copies(self, gradient: Tensor) -> None:
        self._copies.all_reduce(gradient, "gradient")

    def _piece(self, parameter: nn.Parameter) -> nn.Parameter:
        local = local_of(parameter)
        if local is parameter or parameter.dim() == 0:
            return parameter
        piece = nn.Parameter(local, requires_grad=parameter.requires_grad)
        self._shards.append((parameter, piece))
        return piece

    def layout(self, whole: dict[str, Part]) -> dict[str, Part]:
        pieces = {id(piece) for _, piece in self._shards}
        cut = dict(whole)
        for name, piece in self.holding.named_parameters(remove_duplicate=False):
            if id(piece) in pieces:
                held = rows(whole[name].shape[0], self._group.size, self._group.rank)
                cut[name] = whole[name].narrow(0, *held)
        return cut

    # ---- a step

    def _fill(self, group: Any, unit: str) -> None:
        """Before a unit's gradients are summed: zeros for what this rank has not used.

        All ranks then sum the same tensors. What no rank has used gets no gradient, see `finish`.
        """
        for each in group.fsdp_params if unit in self.gathered else ():
            if not each.sharded_param.requires_grad:
                continue
            whole = each.unsharded_param
            if whole.grad is not None:
                self._used[each.sharded_param] = 1.0
            else:
                whole.grad = torch.zeros_like(whole)

    def finish(self) -> None:
        """Compare what the ranks have run, and find what none of them has used. Collective."""
        trained = [parameter for parameter, _ in self._shards if parameter.requires_grad]
        scalars = [p for p in self._whole if p.requires_grad]
        digest = float(zlib.crc32("\n".join(self.order).encode()) % _DIGEST)
        used = [self._used.get(each, 0.0) for each in trained]
        used += [float(each.grad is not None) for each in scalars]
        # On the host, as it is read at once.
        vector = torch.tensor([digest, digest**2, *used], dtype=torch.float64)
        total, squares, *counts = self._everyone.all_reduce(vector, "agreement").tolist()
        if int(total) ** 2 != int(squares) * self._everyone.size:
            raise self._unlike()
        self._sum_scalars(scalars, counts[len(trained) :])
        for parameter, count in zip(trained, counts, strict=False):
            if not count:
                parameter.grad = None
        self.order.clear()
        self.gathered.clear()
        self._used.clear()

    def _sum_scalars(self, scalars: Sequence[nn.Parameter], counts: Sequence[float]) -> None:
        if not scalars:
            return
        zero = torch.zeros_like(scalars[0])
        own = torch.stack([zero if p.grad is None else p.grad for p in scalars])
        summed = self._everyone.all_reduce(own, "gradient")
        for parameter, gradient, count in zip(scalars, summed, counts, strict=True):
            parameter.grad = gradient if count else None

    def _unlike(self) -> RunError:
        return RunError(
            "zero2 and zero3 need every rank to run the same blocks in the same order, and in this "
            "step the ranks have not",
            hint="A model that chooses its blocks by the data can be trained with zero1.",
            phase="backward",
        )

    def take_gradients(self, factor: float) -> None:
        for parameter, piece in self._shards:
            gradient = parameter.grad
            piece.grad = None if gradient is None else local_of(gradient)
            # It would be added to in the next step.
            parameter.grad = None
        scale(self.holding, factor)

    def norm(self) -> Tensor:
        own = norm_of(self.holding)
        squares = own.double().square()
        if self._group.rank > 0:  # what all ranks hold counts once
            held = [p.grad for p in self._whole if p.grad is not None]
            squares = squares - sum(gradient.double().square() for gradient in held)
        return self._group.all_reduce(squares.cpu(), "agreement").sqrt().to(own)

    def spread(self) -> None:
        """Let go of what an evaluation has gathered: weights may have changed since."""
        self._outermost.reshard()


class _Comm:
    """What both collectives of a unit have in common."""

    def __init__(self, states: FullySharded, unit: str, group: Group) -> None:
        self._states = states
        self._unit = unit
        self._group = group

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Comm, AllGather):  # type: ignore[misc]  # torch's own `allocate` is abstract
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        self._states.order.append(f"gather {self._unit}")
        self._states.gathered.add(self._unit)
        self._group.all_gather_into(output_tensor, input_tensor, "parameter")


class _Scatter(_Comm, ReduceScatter):  # type: ignore[misc]
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == torch.distributed.ReduceOp.SUM
        self._states.order.append(f"sum {self._unit}")
        self._group.reduce_scatter(output_tensor, input_tensor, "gradient")


def _own_blocks(model: nn.Module) -> list[nn.Module]:
    """Blocks that share no parameter with what is outside them."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(module)
    found = []
    for block in find_blocks(model):
        inside = set(block.modules())
        if block is not model and all(owners[id(p)] <= inside for p in block.parameters()):
            found.append(block)
    return found


def _lay_out(model: nn.Module) -> None:
    """Every parameter dense and in the usual order: torch cuts no other."""
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def _require_one_type(name: str, block: nn.Module, spared: set[nn.Parameter]) -> None:
    types = {p.dtype for p in block.parameters() if p.requires_grad and p not in spared}
    if len(types) > 1:
        listed = " and ".join(sorted(str(each).removeprefix("torch.") for each in types))
        raise Refused(
            f"zero2 and zero3: {name or 'the model'} has parameters of {listed}, and those of one "
            "block travel together",
            hint="Give them one type, or use zero1.",
        )


def _no_views(_block: nn.Module, _inputs: Any, outputs: Any) -> Any:
    """A block's outputs, none of them a view.

    torch gathers a block's weights again when the gradient of an output comes. An in-place
    operation on an output that is a view would drop that hook.
    """
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda each: each.clone() if each._base is not None else each, outputs
    )


def _parameter_groups(block: Any) -> list[Any]:
    """torch's own groups of one unit's parameters: private, and some versions have one only."""
    state = block._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _before(group: Any, name: str, first: Any) -> None:
    """Do `first` before each call of a method of this one object."""
    plain = getattr(group, name)

    def both(*arguments: Any) -> Any:
        first()
        return plain(*arguments)

    setattr(group, name, both)
