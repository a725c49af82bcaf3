"""What `auto` has found out here before: a JSON file for each kind of run, in the user's cache.

    trials = Remembered.of(recipe, resolved, cluster)
    trials.load()                # [Tried(…), …] or None
    trials.save(tried)           # nothing happens where it cannot be written

So a choice costs its steps once, and the same run gets the same choice again. Kinds differ by
all that decides how a step computes: the recipe without its length and seed, the strategy, the
processor, torch. Recipes with components of the user's own are tried each time: their code may have
changed under the same name.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import xxhash

from shoal import env
from shoal.cluster import Cluster
from shoal.job.numerics import Tried
from shoal.job.resolve import Resolved
from shoal.recipe import Recipe

_NOT_OF_A_STEP = ("name", "seed", "steps", "epochs", "evaluate", "checkpoint", "stop", "schedule")
_COMPONENTS = ("model", "objective", "optimizer", "schedule")


@dataclass(frozen=True)
class Remembered:
    """The file of one kind of run; ``path`` is None where nothing is to be remembered."""

    path: Path | None

    @classmethod
    def of(cls, recipe: Recipe, resolved: Resolved, cluster: Cluster) -> "Remembered":
        if not all(getattr(recipe, role).builtin for role in _COMPONENTS):
            return cls(None)
        values = recipe.to_dict()
        what = {key: value for key, value in values.items() if key not in _NOT_OF_A_STEP}
        what["strategy"], what["threads"] = str(resolved.strategy), resolved.threads
        what["devices"] = [
            [device.kind, device.name] for host in cluster.hosts for device in host.devices
        ]
        with contextlib.suppress(PackageNotFoundError):
            what["torch"] = version("torch")
        text = json.dumps(what, sort_keys=True)
        return cls(env.cache_home() / "auto" / f"{xxhash.xxh3_128_hexdigest(text.encode())}.json")

    def load(self) -> list[Tried] | None:
        """What was tried, if that is known. A file that cannot be read is as good as none."""
        if self.path is None:
            return None
        try:
            return [Tried.from_json(each) for each in json.loads(self.path.read_text())]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def save(self, tried: Sequence[Tried]) -> None:
        """Remember it; the file is there whole or not at all."""
        if self.path is None:
            return
        with contextlib.suppress(OSError):  # a disk that is full or not to be written to
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps([each.to_json() for each in tried]))
            beside.replace(self.path)
