"""Writing a safetensors file one tensor at a time, and the checksum of a tensor.

    8 bytes: n | n bytes of JSON: {key: {dtype, shape, data_offsets}} | the tensors' bytes

The library's own writer wants every tensor as bytes in memory first (two copies of the model) and
turns a full disk into an error without its number; reading is left to the library.

    write(path, [Spec("fc.bias", "float32", (10,))], lambda key: bias)
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from shoal.checkpoint import files

DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "float64": (torch.float64, "F64"),
    "float32": (torch.float32, "F32"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float8_e4m3fn": (torch.float8_e4m3fn, "F8_E4M3"),
    "float8_e5m2": (torch.float8_e5m2, "F8_E5M2"),
    "complex64": (torch.complex64, "C64"),
    "int64": (torch.int64, "I64"),
    "int32": (torch.int32, "I32"),
    "int16": (torch.int16, "I16"),
    "int8": (torch.int8, "I8"),
    "uint64": (torch.uint64, "U64"),
    "uint32": (torch.uint32, "U32"),
    "uint16": (torch.uint16, "U16"),
    "uint8": (torch.uint8, "U8"),
    "bool": (torch.bool, "BOOL"),
}

_RESERVED = "__metadata__"


@dataclass(frozen=True)
class Spec:
    """A tensor in a file before its bytes are there; `dtype` as in ``float32``."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0].itemsize


def dtype_name(name: str, tensor: Tensor) -> str:
    """``float32``. Raises ValueError naming the tensor if a file cannot hold it."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES or tensor.layout is not torch.strided:
        raise ValueError(
            f"{name} is a {tensor.layout} tensor of {dtype}: a checkpoint holds dense tensors of "
            + ", ".join(DTYPES)
        )
    if name == _RESERVED:
        raise ValueError(f"no tensor can be named {name}: safetensors reserves it")
    return dtype


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order, whatever the strides; a copy only where one is needed."""
    host = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return host.reshape(-1).view(torch.uint8).numpy().data


def checksum(tensor: Tensor) -> str:
    """xxh3-128 of the tensor's bytes in row-major order, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(as_bytes(tensor))


def write(path: Path, specs: Sequence[Spec], get: Callable[[str], Tensor]) -> int:
    """Write and sync a file of these tensors, asking for each when its turn comes.

    Returns the bytes written; raises OSError and leaves no file behind if it cannot.
    """
    # Wide types first, as the library orders them: each tensor then starts at a multiple of its
    # item size and can be mapped into memory.
    ordered = sorted(specs, key=lambda s: (-DTYPES[s.dtype][0].itemsize, s.key))
    return files.write(path, _chunks(ordered, get))


def _chunks(specs: Sequence[Spec], get: Callable[[str], Tensor]) -> Iterator[memoryview]:
    header = _header(specs)
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for spec in specs:
        data = as_bytes(get(spec.key))
        if len(data) != spec.bytes:
            raise ValueError(f"{spec.key} has {len(data)} bytes, {spec.bytes} were announced")
        yield data


def _header(specs: Sequence[Spec]) -> bytes:
    table: dict[str, object] = {_RESERVED: {"format": "pt"}}
    start = 0
    for spec in specs:
        table[spec.key] = {
            "dtype": DTYPES[spec.dtype][1],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.bytes],
        }
        start += spec.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
