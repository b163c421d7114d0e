"""Variants of the union tiles and of dk/dv for `tune_kernels.py`.

    python benchmarks/tune_backward.py --out tune.json --shapes 1B-8K 8B-8K 1B-32K

Takes the options of `tune_kernels.py`, and checks and times like it.
"""

from __future__ import annotations

from pathlib import Path

import tune_kernels as tune

from ssa.ops.sparse.triton import Readers, Tile
from ssa.ops.triton_support import Launch

# dk/dv of groups of 1, 2, 4 blocks: tokens per step, keys as rows or not, programs per multiprocessor, warps, stages,
# registers
NARROW_READERS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((4, 0, 4, 4, 3), (4, 0, 8, 4, 3), (4, 0, 16, 4, 3), (4, 0, 5, 4, 2), (4, 0, 10, 4, 2), (1, 1, 12, 1, 3),
     (1, 1, 16, 1, 3, 128), (1, 1, 16, 1, 4, 128), (1, 1, 48, 1, 3, 128), (1, 1, 12, 1, 4), (2, 1, 8, 1, 3),
     (2, 1, 8, 1, 2)),
    ((4, 0, 3, 4, 3), (4, 0, 6, 4, 3), (4, 0, 3, 4, 3, 128), (4, 0, 4, 4, 2, 128), (4, 0, 12, 4, 2, 128),
     (1, 1, 8, 1, 3), (1, 1, 8, 1, 4), (1, 1, 24, 1, 3), (1, 1, 4, 2, 3), (1, 1, 5, 2, 3, 192), (2, 1, 4, 2, 3)),
    ((4, 1, 2, 4, 3), (4, 1, 4, 4, 3), (4, 1, 8, 4, 3), (4, 1, 2, 4, 2), (2, 1, 2, 4, 3), (2, 1, 3, 4, 3, 168),
     (2, 1, 3, 4, 4, 168), (4, 0, 2, 4, 3)),
)  # fmt: skip
WIDE_READERS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((16, 0, 3, 4, 2), (16, 0, 6, 4, 2), (16, 0, 12, 4, 2), (16, 0, 2, 4, 3), (4, 1, 8, 1, 2), (4, 1, 8, 1, 3),
     (4, 1, 6, 2, 3), (4, 1, 8, 2, 3, 128), (8, 1, 6, 2, 2)),
    ((16, 0, 2, 4, 2), (16, 0, 4, 4, 2), (4, 1, 4, 2, 2), (4, 1, 4, 2, 3), (8, 1, 4, 2, 2)),
    ((16, 0, 2, 4, 2), (16, 1, 2, 4, 2), (8, 1, 2, 4, 2), (8, 1, 2, 4, 3)),
)  # fmt: skip
NARROW_MIXED: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((4, 0, 4, 4, 3), (4, 0, 3, 4, 3), (4, 1, 2, 4, 3)),
    ((1, 1, 16, 1, 3, 128), (1, 1, 8, 1, 3), (4, 1, 2, 4, 3)),
    ((1, 1, 16, 1, 3, 128), (4, 0, 3, 4, 3, 128), (2, 1, 3, 4, 3, 168)),
)
WIDE_MIXED: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((16, 0, 6, 4, 2), (16, 0, 4, 4, 2), (16, 0, 4, 4, 2)),
    ((16, 0, 3, 4, 2), (16, 0, 2, 4, 2), (8, 1, 2, 4, 2)),
)
NARROW_DQ: tuple[tuple[int, ...], ...] = (
    (32, 4, 2, 96), (32, 4, 3, 96), (32, 4, 2), (32, 4, 3), (32, 4, 4, 96), (32, 4, 2, 80), (64, 4, 2, 128),
    (64, 4, 2, 160),
)  # fmt: skip
NARROW_FORWARD: tuple[tuple[int, ...], ...] = (
    (64, 4, 2, 128), (32, 4, 2, 96), (32, 4, 3, 96), (32, 4, 2), (32, 4, 3), (32, 4, 4), (32, 4, 2, 80),
)  # fmt: skip
WIDE_FORWARD: tuple[tuple[int, ...], ...] = ((32, 4, 3), (32, 4, 2), (32, 4, 3, 168), (32, 4, 4))
WIDE_DQ: tuple[tuple[int, ...], ...] = ((64, 4, 2), (32, 4, 2), (32, 4, 3), (32, 4, 2, 168), (32, 4, 3, 168))


def variants(D: int) -> list[tune.Variant]:
    """All of a head dim; ``shipped`` first."""
    found: list[tune.Variant] = [("shipped", "", {})]
    narrow = D <= 64
    for level, readers in enumerate(NARROW_READERS if narrow else WIDE_READERS):
        for TQ, keys_first, programs, *how in readers:
            plan = Readers(TQ, 16 << level, bool(keys_first), programs, Launch(*how))
            change = {"dkv": (plan, plan, plan), "cost": tuple(1 if i == level else 99 for i in range(3))}
            side = "keys" if keys_first else "readers"
            found.append((f"dkv{1 << level}", f"TQ{TQ} {side} x{programs} {how}", change))
    for cost in ((16, 26, 40), (16, 24, 33), (16, 21, 33), (16, 99, 40), (16, 99, 33), (16, 99, 28)):
        for i, mixed in enumerate(NARROW_MIXED if narrow else WIDE_MIXED):
            dkv = tuple(Readers(r[0], 16 << j, bool(r[1]), r[2], Launch(*r[3:])) for j, r in enumerate(mixed))
            found.append(("dkvmix", f"{i} {cost}", {"dkv": dkv, "cost": cost}))
    for BN, *how in NARROW_DQ if narrow else WIDE_DQ:
        for select in (False, True):
            change = {"union_dq": Tile(BN, Launch(*how)), "select": (False, select)}
            found.append(("dq", f"BN{BN} {how}{' select' * select}", change))
    for BN, *how in NARROW_FORWARD if narrow else WIDE_FORWARD:
        for select in (False, True):
            change = {"union_forward": Tile(BN, Launch(*how)), "select": (select, False)}
            found.append(("forward", f"BN{BN} {how}{' select' * select}", change))
    return found


if __name__ == "__main__":
    tune.variants = variants
    tune.COUNTED["forward"] = ("union_forward_kernel",)
    tune.COUNTED["dq"] = ("union_dq_kernel",)
    tune.__file__ = str(Path(__file__).resolve())  # what its worker processes run
    tune.main()
