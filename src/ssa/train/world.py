"""Where this process runs: its rank, its device and what the device can do. The only reader of torchrun's variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ssa.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all of the run.

    Attributes:
        rank: number of this process, from 0; rank 0 writes the run's files.
        size: processes of the run.
        local_rank: number among the processes of this machine, which is the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """This process's place as ``torchrun`` says it; one process without torchrun.

    Raises:
        ConfigError: variables that are missing, no integers, or do not fit together.
    """
    names = ("RANK", "WORLD_SIZE")
    given = [name for name in names if name in environ]
    if len(given) == 1:
        missing = names[1 - names.index(given[0])]
        raise ConfigError(
            "environment", f"{given[0]} without {missing}", "both or neither", "torchrun, which sets both"
        )
    if not given:
        return World()
    try:
        rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        local_rank = int(environ.get("LOCAL_RANK", rank))
    except ValueError:
        raise ConfigError("environment", {name: environ[name] for name in names}, "two integers") from None
    if not 0 <= rank < size or local_rank < 0:
        raise ConfigError("environment", f"rank {rank} of {size} processes", "0 <= RANK < WORLD_SIZE", "torchrun")
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if size > 1 and name not in environ]
    if absent:
        raise ConfigError("environment", f"{size} processes without {absent[0]}", "it to be set", "torchrun")
    return World(rank, size, local_rank)


def resolve_device(name: str, world: World | None = None) -> torch.device:
    """The device of this process. ``auto`` is the GPU of its local rank, or the CPU on a machine without one.

    Raises:
        ConfigError: a GPU that this machine does not have, or one GPU named for several processes.
    """
    world = world or World()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name if name != "auto" else "cuda" if count else "cpu")
    if device.type != "cuda":
        return device
    if device.index is not None and world.size > 1:
        raise ConfigError("training.device", repr(name), "auto, cpu or cuda: each process takes its own GPU")
    index = device.index if device.index is not None else world.local_rank
    if index >= count:
        available = ["cpu", *(f"cuda:{i}" for i in range(count))]
        got = repr(name) if world.size == 1 else f"{name!r} for local rank {world.local_rank}"
        raise ConfigError("training.device", got, f"one of this machine's: {', '.join(available)}")
    return torch.device("cuda", index)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise :class:`ConfigError` if the device cannot compute in ``precision``."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ConfigError("training.precision", f"bf16 on {name}", "a device with bf16", "training.precision: fp32")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass. Weights, gradients and optimiser stay in fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
