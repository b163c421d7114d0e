"""Run by test_triton_interpreter.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import sys

import torch

from ssa import DocumentLayout
from ssa.ops import SparseSpec, full_attention, select_blocks, sparse_attention

CASES = {
    # name: document lengths per row, H, K, D, spec
    "mqa, lengths around a block": ([[15, 1, 16, 17]], 4, 1, 32, SparseSpec(16, 2)),
    "mha, two rows": ([[49], [32, 17]], 2, 2, 32, SparseSpec(16, 3)),
    "group of 16": ([[65]], 16, 1, 64, SparseSpec(16, 3)),
    "forced blocks": ([[80]], 2, 1, 32, SparseSpec(16, 4, first_blocks=1, local_blocks=2)),
    "official rule": ([[300]], 2, 1, 16, SparseSpec(16, 4, rule="official")),
    "blocks longer than a tile": ([[70]], 1, 1, 128, SparseSpec(64, 1)),
    "budget over all blocks": ([[40, 8]], 4, 2, 32, SparseSpec(16, 3)),
}


def compare(name: str) -> None:
    """Selection equal, outputs and gradients within float32 rounding of the reference."""
    lengths, H, K, D, spec = CASES[name]
    torch.manual_seed(0)
    layout = DocumentLayout.from_lengths(lengths)
    q, k, v = (torch.randn(layout.batch, layout.tokens, h, D, requires_grad=True) for h in (H, K, K))
    weight = torch.randn(q.shape)
    expected = select_blocks(q, k, spec, layout, backend="reference")
    assert torch.equal(select_blocks(q, k, spec, layout, backend="triton"), expected)
    results = []
    for backend in ("triton", "reference"):
        out, lse = sparse_attention(q, k, v, expected, spec.block_size, layout, return_lse=True, backend=backend)
        results.append((out, lse, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)
    if name == "budget over all blocks":
        full = full_attention(q, k, v, layout)
        torch.testing.assert_close(results[0][0], full, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    compare(sys.argv[1])
