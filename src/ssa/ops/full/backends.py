"""Which kernels of the full stream can serve a call, and what the cost model makes of it."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch

from ssa.ops.dispatch import Request, constant_when_compiled, first_reason
from ssa.ops.full.plan import Direction, Plan, Shape, plan
from ssa.ops.full.rates import rate

LOW_PRECISION = (torch.float16, torch.bfloat16)
KERNELS = ("cudnn", "packed", "flash")


def refuse_cpu_flash(request: Request) -> str | None:
    """Reason against PyTorch's flash kernel for CPUs."""
    return first_reason([(request.device.type != "cpu", f"runs on the CPU, not on {request.device.type}")])


class Device(NamedTuple):
    """What a GPU and the installation offer."""

    gpu: bool
    capability: tuple[int, int] = (0, 0)
    cudnn: bool = False
    frontend: bool = False


@lru_cache(maxsize=16)
def device_facts(device: str) -> Device:
    """Asked once per device."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return Device(False)
    capability = torch.cuda.get_device_capability(device)
    return Device(True, capability, torch.backends.cudnn.is_available(), find_spec("cudnn") is not None)


def _refuse(kernel: str, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    facts = device_facts(device)
    largest = 256 if kernel == "flash" or facts.capability[0] == 9 else 128  # cuDNN: 256 on Hopper alone
    return first_reason(
        [
            (not facts.gpu, "no NVIDIA GPU here"),
            (facts.capability < (8, 0), "needs compute capability 8.0"),
            (kernel != "flash" and not facts.cudnn, "this PyTorch has no cuDNN"),
            (kernel == "packed" and not facts.frontend, "needs the package nvidia-cudnn-frontend"),
            (dtype not in LOW_PRECISION, f"takes float16 and bfloat16, not {dtype}"),
            (head_dim % 8 != 0, f"takes head dimensions that are multiples of 8, not {head_dim}"),
            (largest < head_dim, f"takes head dimensions up to {largest}, not {head_dim}"),
        ]
    )


# torch.compile cannot trace these questions; their answers are strings because it takes few types as constants
@constant_when_compiled
def _reason(kernel: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    return _refuse(kernel, device, dtype, head_dim) or ""


@constant_when_compiled
def _usable(device: str, dtype: torch.dtype, head_dim: int) -> str:
    return _cached_usable(device, dtype, head_dim)


@lru_cache(maxsize=64)
def _cached_usable(device: str, dtype: torch.dtype, head_dim: int) -> str:
    kernels = [kernel for kernel in KERNELS if _refuse(kernel, device, dtype, head_dim) is None]
    # cuDNN's lead was measured on Hopper; nothing has been shown to beat Flash on Ampere and Ada
    return "+".join(kernels if device_facts(device).capability >= (9, 0) else kernels[-1:])


def refuse(kernel: str, request: Request) -> str | None:
    """Reason against a CUDA kernel."""
    if request.device.type != "cuda":
        return f"needs an NVIDIA GPU, not {request.device.type}"
    return _reason(kernel, str(request.device), request.dtype, request.head_dim) or None


def usable(request: Request) -> str:
    """Kernels that the cost model may choose from, joined by ``+``; empty if there is none."""
    if request.device.type != "cuda":
        return ""
    return _usable(str(request.device), request.dtype, request.head_dim)


def refuse_cudnn(request: Request) -> str | None:
    """Reason against batched cuDNN."""
    return refuse("cudnn", request)


def refuse_packed(request: Request) -> str | None:
    """Reason against packed cuDNN."""
    return refuse("packed", request)


def refuse_flash(request: Request) -> str | None:
    """Reason against PyTorch's Flash kernel."""
    return refuse("flash", request)


def refuse_planned(request: Request) -> str | None:
    """Reason against all of them: that of the least demanding, if it stands."""
    return None if usable(request) else refuse("flash", request)


def choose_plan(lengths: tuple[int, ...], shape: Shape, direction: Direction, names: str) -> Plan:
    """The plan of least estimated time among kernels ``names``, joined by ``+``."""
    kernels = tuple(names.split("+"))
    if direction == "backward" and torch.are_deterministic_algorithms_enabled():
        # PyTorch's batched cuDNN backward has no deterministic mode; the others obey the global switch
        kernels = tuple(kernel for kernel in kernels if kernel != "cudnn") or kernels
    return plan(lengths, shape, direction, _rates(kernels, direction, shape.head_dim))


@lru_cache(maxsize=256)
def _rates(kernels: tuple[str, ...], direction: Direction, head_dim: int) -> tuple:
    return tuple((kernel, rate(kernel, direction, head_dim)) for kernel in kernels)


def describe(request: Request) -> str:
    """The chosen plans, for :func:`ssa.ops.explain`."""
    kernels = usable(request)
    if request.layout is None:
        return f"chooses out of {kernels} by document lengths"
    shape = Shape(request.heads, request.kv_heads, request.head_dim)
    directions: tuple[Direction, ...] = ("forward", "backward")
    return "; ".join(f"{d} {choose_plan(request.layout.lengths, shape, d, kernels)}" for d in directions)
