"""Measured cost of the full-attention kernels. Written from the output of ``benchmarks/calibrate_full.py``.

One NVIDIA H200, torch 2.11, bf16. Only the ratios between kernels decide anything.
"""

from __future__ import annotations

from ssa.ops.full.plan import Direction, Rate

# kernel, direction -> head dimension -> cost; a head dimension in between takes the next larger entry
RATES: dict[tuple[str, Direction], dict[int, Rate]] = {
    ("cudnn", "forward"): {
        32: Rate(80, 0.275, 148, 170, 0.5),
        64: Rate(80, 0.264, 116, 170, 0.5),
        96: Rate(80, 0.388, 187, 170, 0.5),
        128: Rate(80, 0.395, 150, 170, 0.5),
        256: Rate(80, 0.709, 321, 170, 0.5),
    },
    ("cudnn", "backward"): {
        32: Rate(145, 0.7, 609, 430, 0.5),
        64: Rate(145, 0.691, 687, 430, 0.5),
        96: Rate(145, 1.089, 1008, 430, 0.5),
        128: Rate(145, 1.105, 1051, 430, 0.5),
        256: Rate(145, 2.843, 2413, 430, 0.5),
    },
    ("packed", "forward"): {
        32: Rate(70, 0.288, 208, empty=0.8),
        64: Rate(70, 0.276, 168, empty=0.8),
        96: Rate(70, 0.401, 248, empty=0.8),
        128: Rate(70, 0.413, 184, empty=0.8),
        256: Rate(70, 0.717, 405, empty=0.8),
    },
    ("packed", "backward"): {
        32: Rate(85, 0.735, 750, empty=3.0),
        64: Rate(85, 0.761, 772, empty=3.0),
        96: Rate(85, 1.087, 1186, empty=3.0),
        128: Rate(85, 1.183, 1178, empty=3.0),
        256: Rate(85, 3.306, 2761, empty=3.0),
    },
    ("flash", "forward"): {
        32: Rate(45, 0.346, 268, empty=13.5),
        64: Rate(45, 0.451, 206, empty=13.5),
        96: Rate(45, 0.575, 280, empty=13.5),
        128: Rate(45, 0.723, 446, empty=13.5),
        256: Rate(45, 1.73, 331, empty=13.5),
    },
    ("flash", "backward"): {
        32: Rate(90, 0.827, 585, empty=58),
        64: Rate(90, 1.09, 753, empty=58),
        96: Rate(90, 1.802, 1218, empty=58),
        128: Rate(90, 1.984, 1337, empty=58),
        256: Rate(90, 5.066, 2518, empty=58),
    },
}


def rate(kernel: str, direction: Direction, head_dim: int) -> Rate:
    """Cost of a kernel at a head dimension."""
    table = RATES[kernel, direction]
    return table[min((d for d in table if d >= head_dim), default=max(table))]
