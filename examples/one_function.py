"""The attention as a PyTorch function: choose blocks, attend, train both streams."""

import torch

from ssa.ops import AlignmentSpec, SparseSpec, full_attention, select_blocks, sparse_attention, ssa_attention

q = torch.randn(1, 512, 8, 32, requires_grad=True)  # [B, T, query heads, D], after RoPE
k, v = torch.randn(2, 1, 512, 2, 32).unbind()  # [B, T, KV heads, D]
spec = SparseSpec(block_size=16, num_blocks=8)  # every query reads 8 blocks of 16 tokens

indices = select_blocks(q, k, spec)  # [B, T, KV heads, 8]
sparse = sparse_attention(q, k, v, indices, spec.block_size)
full = full_attention(q, k, v)
print(
    f"a query reads {spec.receptive_field} of up to {q.shape[1]} tokens; outputs differ by {(full - sparse).norm():.2f}"
)

everything = select_blocks(q, k, SparseSpec(block_size=16, num_blocks=512 // 16))
assert torch.allclose(sparse_attention(q, k, v, everything, 16), full, atol=1e-5)  # a budget over all blocks is full

# In training: the drawn stream goes on, the other one is computed for the alignment, and both learn from it.
out, alignment = ssa_attention(q, k, v, main="sparse", spec=spec, alignment=AlignmentSpec(weight=10.0))
(out.square().mean() + alignment.loss).backward()
print(f"alignment {alignment.loss:.4f}, attention on the chosen blocks {alignment.attention_sparsity:.3f}")
