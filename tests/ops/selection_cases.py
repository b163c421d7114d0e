"""Run by test_selection_interpreter.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import sys

import torch

from ssa import DocumentLayout
from ssa.ops import SparseSpec, select_blocks
from ssa.ops.selection import triton as selection
from ssa.ops.selection.triton import TileConfig
from ssa.ops.triton_support import Launch


def plain(q, k):
    """As drawn."""


def spikes(q, k):
    """Single keys far from their neighbours, which the mean key of a chunk hides: a bad guess, for one head only."""
    k[:, 18 * 16 : 19 * 16] = 40 * q[:, -1:, :1]


def overflowing(q, k):
    """Logits whose exponentials leave float32 under any guess that does not know the spike."""
    q *= 4
    k[:, 18 * 16 : 19 * 16] = 400 * q[:, -1:, :1]


def repeated(q, k):
    """Groups of blocks with equal keys: ties that a threshold cuts."""
    k.copy_(k[:, :64].repeat(1, -(-k.shape[1] // 64), 1, 1)[:, : k.shape[1]])


CASES = {
    # name: document lengths per row, H, K, D, spec, change of the inputs
    "documents around chunks": ([[1, 15, 400, 8]], 2, 1, 16, SparseSpec(16, 3), plain),
    "forced blocks, two groups": ([[300]], 4, 2, 16, SparseSpec(16, 6, first_blocks=1, local_blocks=2), plain),
    "hidden keys": ([[400]], 3, 1, 16, SparseSpec(16, 4), spikes),
    "overflow": ([[400]], 2, 1, 16, SparseSpec(16, 4), overflowing),
    "repeated keys in slabs": ([[400, 17]], 2, 1, 16, SparseSpec(16, 4), repeated),
    "resident queries": ([[1, 15, 300, 8]], 8, 2, 24, SparseSpec(16, 5, first_blocks=1, local_blocks=2), plain),
    "resident queries of many heads, in slabs": ([[340]], 16, 1, 16, SparseSpec(16, 4), spikes),
    "resident queries, overflow": ([[330]], 4, 1, 16, SparseSpec(16, 4), overflowing),
}


def compare(name: str) -> None:
    """One pass and, once, two passes choose what the reference chooses."""
    lengths, H, K, D, spec, change = CASES[name]
    torch.manual_seed(0)
    layout = DocumentLayout.from_lengths(lengths)
    q, k = (torch.randn(layout.batch, layout.tokens, heads, D) for heads in (H, K))
    change(q, k)
    expected = select_blocks(q, k, spec, layout, backend="reference")
    selection.lse_config = lambda *_: TileConfig(32, 16, Launch(4))  # small tiles have sums, chunks and edges
    selection.score_config = lambda *_: TileConfig(32, 8, Launch(4))
    selection.refine_config = lambda *_: (8, None)  # short lists, long ones, and chunks instead of a list
    if "resident" in name:
        selection.resident_config = lambda D, G, *_: TileConfig(2 * 64 // G, 16, Launch(4))
    if "slabs" in name:
        selection.SLAB_ELEMENTS = 1 << 13
    one = 12 if change is plain else 0  # 12: for documents of at least 12 S / G tokens
    for tokens in (one, 1 << 30) if change is plain or "resident" in name else (one,):
        selection.ONE_PASS_TOKENS = tokens
        assert torch.equal(select_blocks(q, k, spec, layout, backend="triton"), expected), tokens


if __name__ == "__main__":
    compare(sys.argv[1])
