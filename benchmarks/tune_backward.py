"""Variants of the union tiles and of dk/dv for `tune_kernels.py`.

    python benchmarks/tune_backward.py --out tune.json --shapes 1B-8K 8B-8K 1B-32K

Takes the options of `tune_kernels.py`, and checks and times like it.
"""

from __future__ import annotations

from pathlib import Path

import tune_kernels as tune

from ssa.ops.sparse.triton import Readers, Tile
from ssa.ops.triton_support import Launch

# dk/dv of groups of 1, 2, 4 blocks: tokens per step, keys as rows or not, warps, stages, registers
NARROW_READERS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((4, 0, 4, 3), (4, 0, 4, 2)),
    ((4, 0, 4, 3), (4, 0, 4, 2, 128)),
    ((4, 1, 4, 3), (2, 1, 4, 4), (4, 0, 4, 3)),
)
WIDE_READERS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((16, 0, 4, 2),),
    ((16, 0, 4, 2),),
    ((8, 1, 4, 3), (8, 1, 4, 2), (16, 0, 4, 2)),
)
COSTS = ((16, 20, 29), (16, 22, 32), (16, 18, 26))
# columns, warps, stages, registers
NARROW_FORWARD: tuple[tuple[int, ...], ...] = ((64, 4, 2, 128), (32, 4, 2, 96), (32, 4, 3, 96), (32, 4, 3, 80))
WIDE_FORWARD: tuple[tuple[int, ...], ...] = ((32, 4, 3), (32, 4, 2), (32, 4, 3, 168))
NARROW_DQ: tuple[tuple[int, ...], ...] = ((64, 4, 2, 128), (32, 4, 2, 96), (32, 4, 3, 96), (32, 4, 4, 96))
WIDE_DQ: tuple[tuple[int, ...], ...] = ((64, 4, 2), (32, 4, 2, 168), (32, 4, 3, 168))


def readers(level: int, tokens: int, keys_first: int, *how: int) -> Readers:
    return Readers(tokens, 16 << level, bool(keys_first), Launch(*how))


def variants(D: int) -> list[tune.Variant]:
    """All of a head dim; ``shipped`` first."""
    found: list[tune.Variant] = [("shipped", "", {})]
    narrow = D <= 64
    for name, place, tiles in (
        ("forward", 0, NARROW_FORWARD if narrow else WIDE_FORWARD),
        ("dq", 1, NARROW_DQ if narrow else WIDE_DQ),
    ):
        for BN, *how in tiles:
            for select in (False, True):
                change = {f"union_{name}": Tile(BN, Launch(*how)), "select": (select and not place, select and place)}
                found.append((name, f"BN{BN} {how}{' select' * select}", change))
    for level, plans in enumerate(NARROW_READERS if narrow else WIDE_READERS):
        for plan in plans:
            cost = tuple(1 if i == level else 99 for i in range(3))
            found.append((f"dkv{1 << level}", f"{plan}", {"dkv": (readers(level, *plan),) * 3, "cost": cost}))
    for cost in COSTS:
        for overlap in (False, True):
            found.append(("dkv", f"{cost}{' overlap' * overlap}", {"cost": cost, "overlap": overlap}))
    for segment in (128, 192):
        found.append(("segment", f"{segment}", {"segment": segment}))
    return found


if __name__ == "__main__":
    tune.variants = variants
    tune.COUNTED |= {"forward": ("union_forward_kernel",), "dq": ("union_dq_kernel",)}
    tune.__file__ = str(Path(__file__).resolve())  # what its worker processes run
    tune.main()
