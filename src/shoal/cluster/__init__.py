"""Where a recipe is trained: hosts, devices, memory, links, as one frozen value.

Cluster.local().cores        # 2
"""

from shoal.cluster.local import computes_in_bf16
from shoal.cluster.parts import Device, Host, Link, Nic, Peak
from shoal.cluster.value import Cluster

__all__ = ["Cluster", "Device", "Host", "Link", "Nic", "Peak", "computes_in_bf16"]
