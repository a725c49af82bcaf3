"""Where a recipe is trained: hosts, devices, memory, links, as one frozen value.

Cluster.local().cores        # 2

`limits.py` alone is there at once; the value, which needs pydantic, when it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.cluster.limits import computes_in_bf16
    from shoal.cluster.parts import Device, Host, Link, Nic, Peak
    from shoal.cluster.value import Cluster

__all__ = ["Cluster", "Device", "Host", "Link", "Nic", "Peak", "computes_in_bf16"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = {"Cluster": "value", "computes_in_bf16": "limits"}
    return getattr(import_module(f"shoal.cluster.{homes.get(name, 'parts')}"), name)
