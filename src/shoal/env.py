"""The one place that reads the environment, and gives back frozen values.

world = torchrun_world()        # World(rank=1, world_size=2, …), or None: start ranks ourselves
data_home()                     # Path of SHOAL_DATA, or None
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import WorldError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
# Slurm numbers the steps that are not started by srun from here on: batch script, salloc's shell, …
_SLURM_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class World:
    """The ranks that a launcher has started, seen from one of them.

    ``master_addr`` and ``master_port`` are where rank 0 is met; ``launcher`` is `torchrun` or
    `slurm`.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str
    # torchrun's agent keeps the meeting place itself, unless it is told to leave that to rank 0.
    store_is_running: bool = False
    restart_count: int = 0


def torchrun_world() -> World | None:
    """The world that torchrun or a Slurm step has made, None if nobody has.

    torchrun's variables come first. A Slurm step of one task counts as none, since `srun` with one
    task is how people start an ordinary command there. Raises WorldError, naming the variables, if
    some are missing, are not numbers or contradict each other.
    """
    environment = os.environ
    if environment.get("RANK") or environment.get("WORLD_SIZE"):
        return _from_torchrun(environment)
    if _in_slurm_step(environment):
        return _from_slurm(environment)
    return None


def torchrun_world_or_none() -> World | None:
    """:func:`torchrun_world`, or None where its variables are half set: for telling of errors."""
    try:
        return torchrun_world()
    except WorldError:
        return None


def data_home() -> Path | None:
    """The folder of data sets that the user has set with SHOAL_DATA; None if it is not set."""
    folder = os.environ.get("SHOAL_DATA")
    return Path(folder).expanduser() if folder else None


def cache_home() -> Path:
    """The folder for what can be found out again: ``shoal`` in the user's cache."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "shoal"


def malloc_threshold() -> str | None:
    """From how many bytes on glibc is told to ask the system for memory; None if it is not told."""
    return os.environ.get("MALLOC_MMAP_THRESHOLD_")


def gloo_interface() -> str | None:
    """The network interface that gloo is told to use; None if it looks for one itself."""
    return os.environ.get("GLOO_SOCKET_IFNAME") or None


def visible_cuda_devices() -> tuple[str, ...] | None:
    """The entries of CUDA_VISIBLE_DEVICES (indices or UUIDs); None if every device is visible."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    return tuple(entry.strip() for entry in text.split(",") if entry.strip())


def child_environment(
    defaults: Mapping[str, str] | None = None, **overrides: str
) -> dict[str, str]:
    """A copy of this process's environment for a process to be started.

    ``defaults`` are what the user may have set otherwise, ``overrides`` what has to be so.
    """
    return {**(defaults or {}), **os.environ, **overrides}


def set_variable(name: str, value: str) -> None:
    """Set a variable of this process, for libraries that are configured in no other way."""
    os.environ[name] = value


def _from_torchrun(environment: Mapping[str, str]) -> World:
    _need_all(environment, _TORCHRUN, "torchrun")
    world = World(
        rank=_whole(environment, "RANK"),
        world_size=_whole(environment, "WORLD_SIZE", least=1),
        local_rank=_whole(environment, "LOCAL_RANK"),
        local_world_size=_whole(environment, "LOCAL_WORLD_SIZE", least=1),
        master_addr=environment["MASTER_ADDR"],
        master_port=_port(environment),
        launcher="torchrun",
        store_is_running=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restart_count=int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0),
    )
    return _checked(world, _TORCHRUN)


def _in_slurm_step(environment: Mapping[str, str]) -> bool:
    step = environment.get("SLURM_STEP_ID", "")
    if not step or (step.isdecimal() and int(step) >= _SLURM_FIRST_SPECIAL_STEP):
        return False
    return environment.get("SLURM_NTASKS") != "1"


def _from_slurm(environment: Mapping[str, str]) -> World:
    _need_all(environment, _SLURM, "a Slurm step")
    world_size = _whole(environment, "SLURM_NTASKS", least=1)
    world = World(
        rank=_whole(environment, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_whole(environment, "SLURM_LOCALID"),
        local_world_size=_slurm_tasks_here(environment, world_size),
        master_addr=environment.get("MASTER_ADDR") or _slurm_first_host(environment),
        master_port=_slurm_port(environment),
        launcher="slurm",
    )
    return _checked(world, _SLURM)


def _slurm_tasks_here(environment: Mapping[str, str], world_size: int) -> int:
    """Tasks on this node: entry SLURM_NODEID of a list like `4(x2),3`."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if not text:
        return world_size
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", entry)
        if match is None:
            raise WorldError(f"the tasks per node of the Slurm step can't be read: {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _whole(environment, "SLURM_NODEID") if environment.get("SLURM_NODEID") else 0
    if node >= len(counts):
        raise WorldError(
            f"SLURM_NODEID={node}, but the Slurm step has tasks on {len(counts)} nodes"
        )
    return counts[node]


def _slurm_first_host(environment: Mapping[str, str]) -> str:
    """`node003` of a list like `node[003-007,010],other1`: where rank 0 is."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST")
    if not nodes:
        raise WorldError(
            "the Slurm step does not say where rank 0 is: SLURM_STEP_NODELIST is not set",
            hint="Set MASTER_ADDR to the host of rank 0.",
        )
    match = re.match(r"([^,\[]+)(?:\[([0-9]+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise WorldError(
            f"SLURM_STEP_NODELIST={nodes!r} can't be read",
            hint="Set MASTER_ADDR to the host of rank 0.",
        )
    return match[1] + (match[2] or "") + (match[3] or "")


def _slurm_port(environment: Mapping[str, str]) -> int:
    """MASTER_PORT, else a port that all ranks of a step compute alike and other jobs do not share.

    From 12000 to 31999: below the ports that Linux gives to outgoing connections.
    """
    if environment.get("MASTER_PORT"):
        return _port(environment)
    digits = re.sub(r"[^0-9]", "", environment.get("SLURM_JOB_ID", "")) or "0"
    step = re.sub(r"[^0-9]", "", environment.get("SLURM_STEP_ID", "")) or "0"
    return 12000 + (int(digits) * 37 + int(step)) % 20000


def _need_all(environment: Mapping[str, str], names: tuple[str, ...], launcher: str) -> None:
    given = [f"{name}={environment[name]}" for name in names if environment.get(name)]
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise WorldError(
            f"{launcher} is half set: {', '.join(given) or 'nothing'} given, "
            f"{', '.join(missing)} missing",
            hint="Start the command with torchrun or srun, which set all of them, or unset "
            "RANK and WORLD_SIZE to let Shoal start its own ranks.",
        )


def _whole(environment: Mapping[str, str], name: str, least: int = 0) -> int:
    text = environment.get(name, "").strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise WorldError(
            f"{name} must be a whole number, {least} or more; given {environment.get(name)!r}"
        )
    return int(text)


def _port(environment: Mapping[str, str]) -> int:
    port = _whole(environment, "MASTER_PORT", least=1)
    if port > 65535:
        raise WorldError(f"MASTER_PORT must be a port, 1 to 65535; given {port}")
    return port


def _checked(world: World, names: tuple[str, ...]) -> World:
    """The world, if its numbers fit together."""
    rank_name, size_name = names[:2]
    if world.rank >= world.world_size:
        raise WorldError(f"{rank_name}={world.rank} is not below {size_name}={world.world_size}")
    if world.local_rank >= world.local_world_size or world.local_world_size > world.world_size:
        raise WorldError(
            f"local rank {world.local_rank} of {world.local_world_size} ranks on this host does "
            f"not fit {size_name}={world.world_size}"
        )
    return world
