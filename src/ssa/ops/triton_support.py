"""What the Triton kernels share on the host: who may call them, and the launch helpers. Imports no triton.

Kernels take tensors as flat tokens: ``[B, T, heads, D]`` is read as ``[N, heads, D]`` with N = B*T, a row stride and a
head stride, so views of a fused projection are not copied.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops.dispatch import Request, constant_when_compiled

T = TypeVar("T")
BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 256
MAX_GROUP = 64
WORTH_A_STREAM = 1 << 15  # tokens times KV heads
MAX_TOKENS = 1 << 27  # an entry of the inverted index packs a token and four flags into 31 bits
MAX_ENTRIES = (1 << 31) - (1 << 11)
LOG2E = math.log2(math.e)


@lru_cache(maxsize=64)
def layout_of(lengths: tuple[int, ...], batch: int, tokens: int) -> DocumentLayout:
    """The layout behind the document lengths that an operation was given; one object, so its tensors are made once."""
    return DocumentLayout(lengths, batch, tokens)


class Launch(NamedTuple):
    """Warps and pipeline stages of a kernel, most registers per thread (None: the compiler's choice).

    ``overlap``: may start before the kernel ahead of it has ended (programmatic dependent launch).
    """

    warps: int
    stages: int = 2
    registers: int | None = None
    overlap: bool = False


class Launcher:
    """Launches kernels of one call of an operation.

    Triton looks at every argument of every launch to find the compiled variant, which can take longer than the kernel.
    Here the variant is found by the ``facts`` of the call, the kernel's constants and its launch options, which
    together must decide it: dtypes, strides, integers on which a kernel specializes. Pointers must be aligned to 16
    bytes, and integers that vary under the same facts must be named in the kernel's ``do_not_specialize``.
    """

    def __init__(self, device: torch.device, *facts: object) -> None:
        self.facts = (device, facts)
        self.stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        how: Launch,
    ) -> None:
        """Launch ``kernel`` on ``grid`` with its run-time ``arguments``, then its ``constants``, in order."""
        key = (id(kernel), self.facts, constants, how)
        known = _COMPILED.get(key)
        if known is not None:
            known.run(
                *grid, self.stream, known.function, known.packed_metadata, None, None, None, *arguments, *constants
            )
            return
        options = {"launch_pdl": True} if how.overlap else {}
        compiled = kernel[grid](
            *arguments, *constants, num_warps=how.warps, num_stages=how.stages, maxnreg=how.registers, **options
        )
        if compiled is not None:  # None from the interpreter
            _COMPILED[key] = compiled


_COMPILED: dict[tuple[Any, ...], Any] = {}


def beside(device: torch.device, size: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call ``function`` with its launches on a second stream, in step with the current one up to here.

    :func:`join` waits for it. ``size``: tokens times KV heads, of which there must be so many that the GPU's time, not
    the host's, is what counts; fewer, and what is being compiled, stay on the current stream. What is allocated within
    may be freed at any time after the join: the second stream's next use begins by waiting for the current one.
    """
    second = _second_stream(device, size)
    if second is None:
        return function(*arguments)
    second.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(second):
        return function(*arguments)


def join(device: torch.device, size: int) -> None:
    """The current stream waits for what was launched beside it."""
    second = _second_stream(device, size)
    if second is not None:
        torch.cuda.current_stream(device).wait_stream(second)


def _second_stream(device: torch.device, size: int) -> torch.cuda.Stream | None:
    if torch.compiler.is_compiling() or device.type != "cuda" or size < WORTH_A_STREAM:
        return None
    return _stream_beside(device, torch.cuda.current_stream(device).cuda_stream)


@cache
def _stream_beside(device: torch.device, current: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of ``x`` the current one, on which Triton launches."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def aligned(x: Tensor) -> Tensor:
    """``x``, contiguous and at an address that is a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def refuse(request: Request) -> str | None:
    """Why the Triton kernels cannot serve ``request``, or None."""
    interpreted = is_interpreted()
    if not has_triton():
        return "triton is not installed"
    if request.device.type != "cuda" and not (interpreted and request.device.type == "cpu"):
        return f"needs a CUDA device (or TRITON_INTERPRET=1), not {request.device.type}"
    if not interpreted and not torch.cuda.is_available():
        return "no CUDA device is available"
    return _refuse_shape(request, interpreted)


def _refuse_shape(request: Request, interpreted: bool) -> str | None:
    major = 8 if interpreted else capability(request.device.index)[0]
    group = request.heads // request.kv_heads
    tokens = request.layout.total if request.layout else 0
    if major < 8:
        return f"needs compute capability 8.0 or newer, not {major}.x"
    if request.dtype == torch.float64:
        return "computes in float32 at most, not float64"
    if interpreted and request.dtype != torch.float32:
        return "Triton's interpreter serves float32 only"
    if request.block_size not in BLOCK_SIZES:
        return f"block_size {request.block_size} is not one of {BLOCK_SIZES}"
    if not 16 <= request.head_dim <= MAX_HEAD_DIM or request.head_dim % 8 != 0:
        return f"head_dim {request.head_dim} is not a multiple of 8 from 16 to {MAX_HEAD_DIM}"
    if group > MAX_GROUP:
        return f"{group} query heads per KV head are more than {MAX_GROUP}"
    if tokens > MAX_TOKENS:
        return f"more than {MAX_TOKENS} tokens in a batch"
    if tokens * request.kv_heads * (request.num_blocks or 1) > MAX_ENTRIES:
        return "more (token, KV head, block) entries than 32 bits count"
    return None


@constant_when_compiled
def is_interpreted() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@constant_when_compiled
def has_triton() -> bool:
    """Whether the package is installed."""
    return find_spec("triton") is not None


@cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device; ``(9, 0)`` where there is none (the interpreter)."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else (9, 0)


@cache
def can_overlap(index: int | None) -> bool:
    """Whether a kernel may begin while the one ahead of it in the stream runs its last programs."""
    return torch.cuda.is_available() and capability(index)[0] >= 9 and not is_interpreted()


@cache
def small_shared_memory(index: int | None) -> bool:
    """Whether a CUDA device has less than 160 KiB of shared memory per block (compute capability 8.6, 8.9, 12.x)."""
    return torch.cuda.is_available() and capability(index) not in ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0))


def rows(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """``x [B, T, heads, D]``, read as B * T rows of heads: itself if evenly spaced, aligned and with adjacent elements,
    else a copy; with the strides of a row and of a head."""
    B, T, heads, D = x.shape
    batch, row, head, element = x.stride()
    even = B == 1 or batch == T * row
    if even and element == 1 and row > 0 and row % 8 == 0 and (head % 8 == 0 or heads == 1) and x.data_ptr() % 16 == 0:
        return x, (row, head)
    return x.contiguous(), (heads * D, D)


def next_power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)
