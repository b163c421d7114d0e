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
    """This process among all of the run."""

    rank: int = 0
    size: int = 1


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """Rank and number of processes as ``torchrun`` sets them; one process without it.

    Raises:
        ConfigError: variables that do not fit together, or more than one process, which is not supported yet.
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
        world = World(int(environ["RANK"]), int(environ["WORLD_SIZE"]))
    except ValueError:
        raise ConfigError("environment", {name: environ[name] for name in names}, "two integers") from None
    if world != World():
        raise ConfigError("environment", f"rank {world.rank} of {world.size} processes", "one process")
    return world


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU without one.

    Raises:
        ConfigError: a GPU that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if count else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        available = ["cpu", *(f"cuda:{i}" for i in range(count))]
        raise ConfigError("training.device", repr(name), f"one of this machine's: {', '.join(available)}")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def check_precision(precision: str, device: torch.device) -> None:
    """Raise :class:`ConfigError` if the device cannot compute in ``precision``."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ConfigError("training.precision", f"bf16 on {name}", "a device with bf16", "training.precision: fp32")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass. Weights, gradients and optimiser stay in fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
