"""Facts about this machine and installation, for result files and ``ssa doctor``."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ssa.errors import ConfigError

PACKAGES = ("torch", "triton", "transformers", "datasets", "safetensors", "tyro")


def machine() -> dict[str, Any]:
    """Platform, processor, memory, GPU and package versions; values are JSON-able and None where unknown."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(terse=True),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "python": platform.python_version(),
        "gpu": gpu.name if gpu else None,
        "gpu_count": torch.cuda.device_count(),
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "cuda": torch.version.cuda,
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def package_version(name: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Commit of the source tree that this package runs from (``-dirty`` if changed), ``SSA_COMMIT``, or None."""
    if told := os.environ.get("SSA_COMMIT"):
        return told
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    inside = (here.parent.parent / ".git").exists()  # a wheel inside somebody else's repository has no commit of ours
    return described.stdout.strip() or None if inside and described.returncode == 0 else None


def default_device(name: str = "auto") -> torch.device:
    """The device of a ``--device`` flag. ``"auto"``: the GPU if there is one, else the CPU.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in known:
        raise ConfigError("--device", repr(name), f"auto or one of this machine's: {', '.join(known)}")
    return torch.device(name)


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
