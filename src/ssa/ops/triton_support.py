"""What the Triton kernels share on the host: who may call them, and the launch helpers. Imports no triton.

Kernels take tensors as flat tokens: ``[B, T, heads, D]`` is read as ``[N, heads, D]`` with N = B*T, a row stride and a
head stride, so views of a fused projection are not copied.
"""

from __future__ import annotations

import math
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ssa.ops.dispatch import Request, first_reason

BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 256
MAX_GROUP = 64
MAX_TOKENS = 1 << 27  # an entry of the inverted index packs a token and four flags into 31 bits
MAX_ENTRIES = (1 << 31) - (1 << 11)
LOG2E = math.log2(math.e)


def refuse(request: Request) -> str | None:
    """Why the Triton kernels cannot serve ``request``, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.device.type != "cuda" and not (interpreted and request.device.type == "cpu"):
        return f"needs a CUDA device (or TRITON_INTERPRET=1), not {request.device.type}"
    if not interpreted and not torch.cuda.is_available():
        return "no CUDA device is available"
    major = 8 if interpreted else capability(request.device.index)[0]
    group = request.heads // request.kv_heads
    tokens = request.layout.total if request.layout else 0
    return first_reason(
        [
            (major < 8, f"needs compute capability 8.0 or newer, not {major}.x"),
            (request.dtype == torch.float64, "computes in float32 at most, not float64"),
            (interpreted and request.dtype != torch.float32, "Triton's interpreter serves float32 only"),
            (request.block_size not in BLOCK_SIZES, f"block_size {request.block_size} is not one of {BLOCK_SIZES}"),
            (
                not 16 <= request.head_dim <= MAX_HEAD_DIM or request.head_dim % 8 != 0,
                f"head_dim {request.head_dim} is not a multiple of 8 from 16 to {MAX_HEAD_DIM}",
            ),
            (group > MAX_GROUP, f"{group} query heads per KV head are more than {MAX_GROUP}"),
            (tokens > MAX_TOKENS, f"more than {MAX_TOKENS} tokens in a batch"),
            (
                tokens * request.kv_heads * (request.num_blocks or 1) > MAX_ENTRIES,
                "more (token, KV head, block) entries than 32 bits count",
            ),
        ]
    )


@cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device; ``(9, 0)`` where there is none (the interpreter)."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else (9, 0)


def flat(x: Tensor) -> Tensor:
    """``[B, T, heads, D]`` as ``[N, heads, D]``: a view where rows are evenly spaced and elements adjacent."""
    B, T, heads, D = x.shape
    row, head = x.stride(1), x.stride(2)
    aligned = row % 8 == 0 and (head % 8 == 0 or heads == 1) and x.data_ptr() % 16 == 0
    if x.stride(3) == 1 and aligned and row > 0 and (B == 1 or x.stride(0) == T * row):
        return x.as_strided((B * T, heads, D), (row, head, 1))
    return x.contiguous().view(B * T, heads, D)


def next_power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)
