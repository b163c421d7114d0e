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
    "documents around chunks": ([[1, 15, 300, 8]], 4, 1, 16, SparseSpec(16, 3), plain),
    "forced blocks, two groups": ([[180]], 8, 2, 24, SparseSpec(16, 6, first_blocks=1, local_blocks=2), plain),
    "hidden keys": ([[340]], 4, 1, 16, SparseSpec(16, 4), spikes),
    "overflow": ([[320]], 4, 1, 16, SparseSpec(16, 4), overflowing),
    "repeated keys in slabs": ([[340, 17]], 4, 1, 16, SparseSpec(16, 4), repeated),
    "many heads": ([[310]], 16, 1, 16, SparseSpec(16, 4), spikes),
}


def compare(name: str) -> None:
    """One pass and, where that is another matter, two with queries in shared memory or not: the reference's blocks."""
    lengths, H, K, D, spec, change = CASES[name]
    torch.manual_seed(0)
    layout = DocumentLayout.from_lengths(lengths)
    q, k = (torch.randn(layout.batch, layout.tokens, heads, D) for heads in (H, K))
    change(q, k)
    expected = select_blocks(q, k, spec, layout, backend="reference")
    selection.lse_config = lambda *_: TileConfig(32, 16, Launch(4))  # small tiles have sums, chunks and edges
    selection.score_config = lambda *_: TileConfig(32, 8, Launch(4))
    selection.refine_config = lambda *_: (8, None)  # lists that are taken at once, and in parts
    if "slabs" in name:
        selection.SLAB_ELEMENTS = 1 << 13
    resident = TileConfig(128 * K // H, 16, Launch(4))
    ways = [(resident, 50 if change is plain else 0), (resident, 1 << 30), (None, 0)]  # 50 * 16 / G: a document of 300
    for tile, tokens in ways if change in (plain, overflowing) else ways[:1]:
        selection.resident_config, selection.ONE_PASS_TOKENS = lambda *_, tile=tile: tile, tokens
        assert torch.equal(select_blocks(q, k, spec, layout, backend="triton"), expected), (tile, tokens)


if __name__ == "__main__":
    compare(sys.argv[1])
