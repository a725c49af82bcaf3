"""torch's process group over shared memory: what `dist.all_reduce(…)` and DDP call.

    shared_memory.register()
    dist.init_process_group("shared_memory", store=store, rank=rank, world_size=size)

All-reduce, reduce-scatter, all-gather (each also of lists and into one tensor), broadcast and
barrier of dense tensors on the CPU are done here. Everything else, send and receive included, goes
to a gloo group beside it, whose connections are made when they are first used. After an error the
group is of no more use, and every call says what the first error said.
"""

# torch's stubs lack some options, and call the arguments otherwise; torch gives them by position.
# mypy: disable-error-code="override,assignment,attr-defined"

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from shoal.comm.shared_memory import native
from shoal.comm.shared_memory.call import REDUCIBLE, Call, Kind, Operation
from shoal.comm.shared_memory.describe import error_of
from shoal.comm.shared_memory.memory import Memory, meet
from shoal.comm.shared_memory.native import NativeCore
from shoal.comm.shared_memory.outcome import Core, Verdict
from shoal.comm.shared_memory.plain import PlainCore
from shoal.comm.shared_memory.work import Turns

BACKEND = "shared_memory"
_OPERATIONS = {
    dist.ReduceOp.SUM: Operation.SUM,
    dist.ReduceOp.AVG: Operation.AVERAGE,
    dist.ReduceOp.PRODUCT: Operation.PRODUCT,
    dist.ReduceOp.MIN: Operation.MINIMUM,
    dist.ReduceOp.MAX: Operation.MAXIMUM,
}
_DENSE = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def register() -> None:
    """Make the backend known to torch. May be called again."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _make, extended_api=True, devices=["cpu"])


def _make(options: Any, _backend_options: Any) -> "SharedMemoryGroup":
    """Called by torch for each new group. Raises `CannotShare` on all of its ranks, or on none."""
    memory = meet(options.store, options.group_rank, options.group_size)
    names = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    gloo = _gloo(options.store, options.group_rank, options.group_size, options.timeout)
    return SharedMemoryGroup(memory, options.timeout, names, gloo)


def _gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    options = ProcessGroupGloo._Options()
    # Connections as they are needed: most groups never send anything this way.
    options._devices = [ProcessGroupGloo.create_default_device(lazy_init=True)]
    options._timeout = timeout
    return ProcessGroupGloo(store, rank, size, options)


class SharedMemoryGroup(dist.ProcessGroup):
    """The ranks of one host that share memory. ``names``: what each is called in errors."""

    def __init__(
        self,
        memory: Memory,
        timeout: timedelta,
        names: Sequence[int],
        beside: Any = None,
    ) -> None:
        # With a store, as the stubs want it, torch makes no group that Python can override.
        super().__init__(memory.rank, memory.layout.size)  # type: ignore[call-arg]
        if beside is not None:
            # What is not overridden below finds it by the tensors' device.
            self._register_backend(torch.device("cpu"), self.BackendType.GLOO, beside)
            self._set_default_backend(self.BackendType.GLOO)
        self._memory = memory
        self._timeout_s = timeout.total_seconds()
        self._names = tuple(names)
        self._error: RuntimeError | None = None
        self._core: Core = (NativeCore if memory.core == native.NAME else PlainCore)(memory)
        self._turns = Turns("shoal-collectives")

    @property
    def core_name(self) -> str:
        """Which core runs the collectives: "C" or "Python"."""
        return self._memory.core

    def getBackendName(self) -> str:
        return BACKEND

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a collective waits for the others."""
        self._timeout_s = timeout.total_seconds()

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """Leave: who still waits for this rank is told so at once."""
        if self._error is None:
            self._error = RuntimeError("this rank has left its shared-memory group")
            self._core.leave(-1)
            self._turns.close(self._memory.close)

    abort = shutdown

    # ---- collectives, by torch's names

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        opts = opts or dist.AllreduceOptions()
        calls = [self._reducing(Kind.ALL_REDUCE, (each,), each, opts) for each in tensors]
        return self._submit(calls, list(tensors), opts)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        calls = [
            self._call(Kind.BROADCAST, (each,), (each,), opts, root=opts.rootRank)
            for each in tensors
        ]
        return self._submit(calls, list(tensors), opts)

    def barrier(self, opts: Any = None) -> dist.Work:
        opts = opts or dist.BarrierOptions()
        return self._submit([self._call(Kind.BARRIER, (), (), opts)], [], opts)

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        opts = opts or dist.AllgatherOptions()
        calls = [
            self._call(Kind.ALL_GATHER, (given,), tuple(places), opts)
            for places, given in zip(outputs, inputs, strict=True)
        ]
        return self._submit(calls, [each for places in outputs for each in places], opts)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        # `outputs` is a list for each rank here, each as long as `inputs`.
        return self.allgather([list(each) for each in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        opts = opts or dist.AllgatherOptions()
        calls = [
            self._call(Kind.ALL_GATHER, (given,), self._rows(place), opts)
            for place, given in zip(outputs, inputs, strict=True)
        ]
        return self._submit(calls, list(outputs), opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        return self.all_gather_single_coalesced([output], [input], opts)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> dist.Work:
        opts = opts or dist.ReduceScatterOptions()
        calls = [
            self._reducing(Kind.REDUCE_SCATTER, tuple(given), place, opts)
            for place, given in zip(outputs, inputs, strict=True)
        ]
        return self._submit(calls, list(outputs), opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        rows = [list(self._rows(given)) for given in inputs]
        return self.reduce_scatter(outputs, rows, opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    # torch 2.11 and 2.12 call them so.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # ---- from torch's arguments to calls

    def _rows(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The equal pieces of a contiguous tensor, one a rank."""
        size = self.size()
        if not tensor.is_contiguous() or tensor.numel() % size:
            raise ValueError(
                f"a contiguous tensor of {size} equal pieces is needed, given "
                f"shape {list(tensor.shape)} with strides {list(tensor.stride())}"
            )
        return tensor.view(size, -1).unbind(0)

    def _reducing(self, kind: Kind, inputs: tuple[Tensor, ...], output: Tensor, opts: Any) -> Call:
        operation = _OPERATIONS.get(opts.reduceOp.op)
        dtype = output.dtype
        if operation is None or dtype not in REDUCIBLE:
            raise ValueError(
                f"a shared-memory group cannot reduce {dtype} by {opts.reduceOp.op.name}: "
                "it knows SUM, AVG, PRODUCT, MIN, MAX of real numbers (--comm gloo knows others)"
            )
        if operation == Operation.AVERAGE and not dtype.is_floating_point:
            raise ValueError(f"the average of {dtype} is no {dtype}: use SUM")
        return self._call(kind, inputs, (output,), opts, operation=operation)

    def _call(
        self,
        kind: Kind,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        opts: Any,
        operation: Operation = Operation.SUM,
        root: int = 0,
    ) -> Call:
        if kind == Kind.ALL_GATHER and len(outputs) != self.size():
            raise ValueError(f"{self.size()} outputs are needed, given {len(outputs)}")
        if kind == Kind.REDUCE_SCATTER and len(inputs) != self.size():
            raise ValueError(f"{self.size()} inputs are needed, given {len(inputs)}")
        _check_alike(inputs + outputs)
        timeout_s = opts.timeout.total_seconds()
        return Call(
            kind,
            inputs,
            outputs,
            operation,
            root,
            timeout_s if timeout_s > 0 else self._timeout_s,
            patient=_asynchronous(opts),
        )

    def _submit(self, calls: list[Call], result: list[Tensor], opts: Any) -> dist.Work:
        def job() -> list[Tensor]:
            for call in calls:
                self._run(call)
            return result

        return self._turns.start(job) if _asynchronous(opts) else self._turns.run(job)

    def _run(self, call: Call) -> None:
        if self._error is not None:
            raise self._error
        outcome = self._core.run(call)
        if outcome.verdict != Verdict.OK:
            error = error_of(self._memory, self._names, call, self._core.sequence, outcome)
            self._error = error
            self._core.leave(outcome.culprit)
            raise error


def _asynchronous(opts: Any) -> bool:
    """Whether the caller goes on meanwhile, as C++ does, which sets no options."""
    return bool(getattr(opts, "asyncOp", True))


def _check_alike(tensors: tuple[Tensor, ...]) -> None:
    """Raise ValueError unless all are of one type and size, dense and on the CPU."""
    for each in tensors:
        if each.device.type != "cpu" or each.layout != torch.strided:
            raise ValueError(
                f"a shared-memory group takes dense tensors on the CPU, given one on "
                f"{each.device} ({each.layout})"
            )
        if not each.is_contiguous() and not any(
            each.is_contiguous(memory_format=form) for form in _DENSE[1 : each.dim() - 2]
        ):
            raise ValueError(
                "a shared-memory group takes contiguous tensors, given one of shape "
                f"{list(each.shape)} with strides {list(each.stride())}: use .contiguous()"
            )
        if each.dtype != tensors[0].dtype or each.numel() != tensors[0].numel():
            raise ValueError(
                f"all tensors of a collective need one type and size, given {each.numel()} "
                f"{each.dtype} beside {tensors[0].numel()} {tensors[0].dtype}"
            )
