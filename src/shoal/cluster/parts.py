"""What a cluster is made of: devices, hosts, network cards, links; units are in the names.

    Device(kind="cuda", name="H100", count=8, memory_bytes=85_899_345_920,
           peak_flops_per_s=Peak(bf16=989e12), memory_bytes_per_s=3.35e12)

Bandwidths are bytes per second, arithmetic is floating-point operations per second, memory is
bytes, latency is seconds. A number that can only be in another unit is refused.
"""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Level = Literal["devices", "hosts"]


def _number(value: object) -> object:
    """YAML's `true` is no number, though Python's is."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _at_least(least: float, unit: str, mistake: str) -> Callable[[float], float]:
    def check(value: float) -> float:
        if 0 < value < least:
            raise ValueError(f"is in {unit}: {value:g} is too small to be meant ({mistake}?)")
        return value

    return check


Count = Annotated[int, BeforeValidator(_number), Field(gt=0, le=10_000_000)]
MemoryBytes = Annotated[
    int,
    BeforeValidator(_number),
    Field(gt=0),
    AfterValidator(_at_least(2**20, "bytes", "GB given")),
]
BytesPerSecond = Annotated[
    float,
    BeforeValidator(_number),
    Field(gt=0),
    AfterValidator(_at_least(1000, "bytes per second", "Gbit/s or GB/s given")),
]
FlopsPerSecond = Annotated[
    float,
    BeforeValidator(_number),
    Field(gt=0),
    AfterValidator(_at_least(1e6, "operations per second", "TFLOP/s given")),
]


def _latency(value: float) -> float:
    if value > 10:
        raise ValueError(f"is in seconds: {value:g} is too large to be meant (µs or ms given?)")
    return value


Seconds = Annotated[float, BeforeValidator(_number), Field(ge=0), AfterValidator(_latency)]


class Value(BaseModel):
    """A frozen value that knows all of its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Peak(Value):
    """Peak dense matrix arithmetic by precision, in operations per second; None is unknown."""

    float64: FlopsPerSecond | None = None
    float32: FlopsPerSecond | None = None
    tf32: FlopsPerSecond | None = None
    float16: FlopsPerSecond | None = None
    bf16: FlopsPerSecond | None = None
    fp8: FlopsPerSecond | None = None
    int8: FlopsPerSecond | None = None


class Device(Value):
    """``count`` equal devices, each of which one rank runs on.

    A `cpu` device is one rank's share of a host's cores and memory. ``matmul_efficiency`` is the
    share of the peak that large matrix products reach.
    """

    kind: Literal["cpu", "cuda", "rocm", "xpu", "mps", "tpu"]
    name: str = Field(min_length=1)
    count: Count = 1
    memory_bytes: MemoryBytes
    peak_flops_per_s: Peak = Peak()
    memory_bytes_per_s: BytesPerSecond | None = None
    matmul_efficiency: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] | None = None


class Nic(Value):
    """``count`` equal network cards of a host, with the bandwidth of one, in one direction."""

    name: str = "nic"
    count: Count = 1
    bytes_per_s: BytesPerSecond


class Host(Value):
    """``count`` equal hosts; several are named `name-0`, `name-1`, ….

    ``cores`` are those that ranks may use; ``memory_bytes`` is that of the whole host.
    """

    name: str = Field(min_length=1)
    count: Count = 1
    cores: Count | None = None
    memory_bytes: MemoryBytes | None = None
    devices: tuple[Device, ...] = Field(min_length=1)
    nics: tuple[Nic, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each of the hosts."""
        if self.count == 1:
            return (self.name,)
        return tuple(f"{self.name}-{index}" for index in range(self.count))

    @property
    def device_count(self) -> int:
        """Devices of one of the hosts."""
        return sum(device.count for device in self.devices)


class Link(Value):
    """What two devices of a host, or two hosts, talk over: bandwidth in one direction."""

    between: Level
    name: str = ""
    bytes_per_s: BytesPerSecond
    latency_s: Seconds = 0.0


class ClusterFields(Value):
    """The fields of a cluster, and how they must fit together."""

    name: str = Field(min_length=1)
    hosts: tuple[Host, ...] = Field(min_length=1)
    links: tuple[Link, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> "ClusterFields":
        names = [host.name for host in self.hosts]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"has two entries of hosts named {name!r}: names must differ")
        levels = [link.between for link in self.links]
        for level in levels:
            if levels.count(level) > 1:
                raise ValueError(f"has two links between {level}: give one for each level")
        count = sum(host.count for host in self.hosts)
        if count > 1 and "hosts" not in levels:
            raise ValueError(
                f"has {count} hosts and no link between them: links needs an entry with "
                "`between: hosts`, bytes_per_s and latency_s"
            )
        return self
