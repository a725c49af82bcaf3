"""The C core: `core.c`, built when Shoal is installed, loaded by ctypes, which lets go of the GIL.

available()                     # False where there was no compiler
NativeCore(memory).run(call)
"""

import contextlib
import ctypes
import functools
import importlib.machinery
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.comm.shared_memory.call import Call, Kind
from shoal.comm.shared_memory.layout import LANE_BYTES
from shoal.comm.shared_memory.outcome import Outcome, Verdict

if TYPE_CHECKING:
    from shoal.comm.shared_memory.memory import Memory

NAME = "C"
_ABI = 1
_NO_POINTERS = (ctypes.c_void_p * 1)()


class _Group(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("slot_bytes", ctypes.c_uint64),
        ("chunk_bytes", ctypes.c_uint64),
        ("single_bytes", ctypes.c_uint64),
        ("sequence", ctypes.c_uint64),
        ("tick", ctypes.c_uint32),
        ("culprit", ctypes.c_int32),
        ("process_fds", ctypes.c_void_p),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("label", ctypes.c_uint32),
        ("operation", ctypes.c_uint32),
        ("root", ctypes.c_uint32),
        ("item_bytes", ctypes.c_uint32),
        ("count", ctypes.c_uint64),
        ("inputs", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p),
        ("timeout_ns", ctypes.c_int64),
        ("spin_ns", ctypes.c_int64),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_core{suffix}")
        if path.exists():
            with contextlib.suppress(OSError, AttributeError):  # built for another machine
                return load(path)
    return None


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`. Raises OSError or AttributeError if it is not what it should be."""
    library = ctypes.CDLL(str(path))
    library.shoal_lane_bytes.restype = ctypes.c_uint64
    if library.shoal_abi() != _ABI or library.shoal_lane_bytes() != LANE_BYTES:
        raise OSError(f"{path} is of another version")
    library.shoal_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.shoal_leave.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.shoal_leave.restype = None
    return library


def available() -> bool:
    """Whether the library was built and can be loaded."""
    return _library() is not None


class NativeCore:
    """Runs collectives over a group's memory, by the C library."""

    def __init__(self, memory: "Memory") -> None:
        library = _library()
        assert library is not None  # the ranks have agreed on this core
        self._library = library
        self._memory = memory
        self._base = (ctypes.c_char * len(memory.buffer)).from_buffer(memory.buffer)
        self._process_fds = (ctypes.c_int32 * memory.layout.size)(*memory.process_fds)
        self._group = _Group(
            base=ctypes.addressof(self._base),
            rank=memory.rank,
            size=memory.layout.size,
            slot_bytes=memory.layout.slot_bytes,
            chunk_bytes=memory.layout.chunk_bytes,
            single_bytes=memory.layout.single_bytes,
            process_fds=ctypes.addressof(self._process_fds),
        )
        # More ranks than cores: whoever spins keeps another from arriving.
        self._may_spin = memory.cores >= memory.layout.size

    @property
    def sequence(self) -> int:
        """How many collectives there have been."""
        return int(self._group.sequence)

    def run(self, call: Call) -> Outcome:
        """Run one collective, and wait for its end."""
        inputs = _pointers(call.inputs)
        outputs = _pointers(call.outputs)
        made = _Call(
            call.kind,
            call.type,
            call.label,
            call.arithmetic,
            call.root,
            call.item_bytes,
            call.count,
            ctypes.addressof(inputs),
            ctypes.addressof(outputs),
            int(call.timeout_s * 1e9),
            self._spin_ns(call),
        )
        verdict = self._library.shoal_run(ctypes.addressof(self._group), ctypes.addressof(made))
        return Outcome(Verdict(verdict), int(self._group.culprit))

    def _spin_ns(self, call: Call) -> int:
        if not self._may_spin:
            return 0
        return SPIN_PATIENT_NS if call.patient and call.kind != Kind.BARRIER else SPIN_NS

    def leave(self, blamed: int) -> None:
        """Say that this rank will arrive nowhere any more; ``blamed``: for whose sake, or -1."""
        self._library.shoal_leave(ctypes.addressof(self._group), blamed)


SPIN_NS = 100_000  # how long a rank spins before it sleeps, where its caller has nothing else to do
SPIN_PATIENT_NS = 5_000  # where the processor is computing meanwhile


def _pointers(tensors: tuple[object, ...]) -> ctypes.Array[ctypes.c_void_p]:
    if not tensors:
        return _NO_POINTERS
    return (ctypes.c_void_p * len(tensors))(*[each.data_ptr() for each in tensors])  # type: ignore[attr-defined]
