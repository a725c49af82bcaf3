"""`Cluster`: where a recipe is trained, detected on this machine or described in a file.

Cluster.local().world_size_max             # 2, on a machine with two cores
Cluster.from_yaml("64x8-h100.yaml")

name: 64x8-h100
hosts:
  - name: node
    count: 64
    devices: [{kind: cuda, name: H100, count: 8, memory_bytes: 85899345920}]
    nics: [{count: 8, bytes_per_s: 50e9}]
links:
  - {between: devices, bytes_per_s: 450e9, latency_s: 3e-6}
  - {between: hosts, bytes_per_s: 400e9, latency_s: 1e-5}
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shoal import yaml_source
from shoal.cluster.local import detect
from shoal.cluster.parts import ClusterFields, Device, Level, Link
from shoal.errors import RecipeError


class Cluster(ClusterFields):
    """Hosts, their devices, and the links between them. Frozen; equal parts are equal values."""

    @classmethod
    def local(cls, ranks: int | None = None) -> "Cluster":
        """This machine. ``ranks``: how many ranks share it; None for one a CUDA device, or a core.

        Where there are fewer CUDA devices than ranks, the ranks share the processor. Raises
        WorldError for fewer than one rank.
        """
        return cls(name="local", hosts=(detect(ranks),))

    @classmethod
    def from_yaml(cls, path: Path | str) -> "Cluster":
        """Read a file of YAML, or of JSON if it is named so.

        Raises RecipeError with every problem at once, each with its line.
        """
        document = yaml_source.load(path)
        try:
            return cls.model_validate(document.value)
        except ValidationError as error:
            raise RecipeError(yaml_source.problems(error, document, cls)) from None

    @classmethod
    def from_json(cls, value: object) -> "Cluster":
        """Read what :meth:`to_json` gives. Raises RecipeError with every problem at once."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise RecipeError(yaml_source.problems(error, None, cls)) from None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; keys with their defaults are left out."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_yaml(self) -> str:
        """The text of a file that :meth:`from_yaml` reads back equal."""
        return yaml_source.dump(self.to_json())

    def write(self, path: Path | str) -> None:
        """Write a file: JSON if it is named `….json`, else YAML."""
        path = Path(path)
        is_json = path.suffix == ".json"
        text = json.dumps(self.to_json(), indent=2) + "\n" if is_json else self.to_yaml()
        path.write_text(text, encoding="utf-8")

    @property
    def host_count(self) -> int:
        """How many hosts there are."""
        return sum(host.count for host in self.hosts)

    @property
    def cores(self) -> int:
        """Cores that ranks may use on all hosts together; 0 where no host states them."""
        return sum((host.cores or 0) * host.count for host in self.hosts)

    @property
    def cuda_devices(self) -> tuple[Device, ...]:
        """The CUDA devices of all hosts, one entry each (:attr:`Device.count` is 1)."""
        return tuple(
            device.model_copy(update={"count": 1})
            for host in self.hosts
            for device in host.devices
            if device.kind == "cuda"
            for _ in range(host.count * device.count)
        )

    @property
    def world_size_max(self) -> int:
        """The most ranks that have a device of their own."""
        return sum(host.count * host.device_count for host in self.hosts)

    def link(self, between: Level) -> Link | None:
        """The link between two devices of a host, or between two hosts; None if not stated."""
        return next((link for link in self.links if link.between == between), None)
