"""Selection and sparse stream of a training step, its kernels one after another, for a profiler to look at.

    ncu --clock-control none --set full -k regex:'dkv|union|resident|select' python benchmarks/profile_kernels.py

Runs everything twice, 1B layer, 4 x 8K, correlated inputs. `--page source --csv` of the report tells per instruction
what it waits for and how often it occupies shared memory (wavefronts).
"""

from __future__ import annotations

import torch

from ssa.bench.layer import SHAPE
from ssa.bench.workloads import draw
from ssa.ops import select_blocks, triton_support
from ssa.ops.dual.streams import sparse_stream


def main() -> None:
    """Forward, and the two halves of the backward pass, as the operation of both streams calls them."""
    triton_support.WORTH_A_STREAM = 1 << 62  # no second stream: a profiler runs kernels in turn
    x, layout, spec = draw(SHAPE, torch.device("cuda")), SHAPE.layout, SHAPE.spec
    with torch.no_grad():
        for _ in range(2):
            blocks = select_blocks(x.q, x.k, spec, layout, backend="triton")
            stream = sparse_stream(
                x.q, x.k, spec.block_size, blocks.shape[3], layout, x.q.shape[3] ** -0.5, backend="triton"
            )
            results = stream.forward(*x.leaves, blocks)
            delta = (results[0].float() * x.d_out.float()).sum(-1)
            begun = stream.begin(x.d_out, delta, *x.leaves, blocks, results)
            stream.finish(x.d_out, delta, *x.leaves, blocks, results, begun, ())
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
