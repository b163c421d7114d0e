"""Attention mathematics on tensors ``[B, T, heads, D]``: selection, sparse, full and both at once. Needs torch only."""

from ssa.ops.bound import ErrorBound, attention_entropy, attention_sparsity, dropped_mass, error_bound
from ssa.ops.budget.api import AdaptiveBlocks, adaptive_blocks
from ssa.ops.cross_entropy import linear_cross_entropy
from ssa.ops.dispatch import explain
from ssa.ops.dual.alignment import Alignment, AlignmentSpec
from ssa.ops.dual.api import ssa_attention
from ssa.ops.full.api import full_attention
from ssa.ops.full.rows import full_attention_rows
from ssa.ops.nsa import compressed_attention, window_attention
from ssa.ops.selection.api import select_blocks
from ssa.ops.sparse.api import sparse_attention
from ssa.ops.spec import SparseSpec

__all__ = [
    "AdaptiveBlocks",
    "Alignment",
    "AlignmentSpec",
    "ErrorBound",
    "SparseSpec",
    "adaptive_blocks",
    "attention_entropy",
    "attention_sparsity",
    "compressed_attention",
    "dropped_mass",
    "error_bound",
    "explain",
    "full_attention",
    "full_attention_rows",
    "linear_cross_entropy",
    "select_blocks",
    "sparse_attention",
    "ssa_attention",
    "window_attention",
]
