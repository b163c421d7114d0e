"""``ssa.nn.SSAAttention``: the paper's attention layer as a torch module. Needs torch only.

attention = SSAAttention(512, num_heads=8, num_kv_heads=2)
out, alignment = attention(x, stream="full")  # training; the stream is drawn for each optimiser step
(task_loss(out) + alignment.loss).backward()
attention.eval().mode = "sparse"
out = attention(x)
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from ssa.documents import DocumentLayout
from ssa.errors import InputError
from ssa.ops import Alignment, AlignmentSpec, SparseSpec, full_attention, select_blocks, sparse_attention, ssa_attention

Stream = Literal["full", "sparse"]


class SSAAttention(nn.Module):
    """Causal grouped-query attention with RoPE and a sigmoid gate per head, full, sparse, or both (paper section 4).

    Attributes:
        mode: ``"full"`` or ``"sparse"``, what a call without a stream runs; may be changed at any time.
        spec: block size, budget and rule of the sparse stream; may be replaced at any time.
        alignment: how training aligns the streams.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        spec: SparseSpec | None = None,
        alignment: AlignmentSpec | None = None,
        mode: Stream = "sparse",
        gated: bool = True,
        bias: bool = False,
        rope_theta: float | None = 500000.0,
    ) -> None:
        """Make the layer.

        Args:
            hidden_size: width C of the residual stream.
            num_heads: query heads H; num_kv_heads: key-value heads K, a divisor of H; None: H.
            head_dim: width D of a head; None: ``hidden_size // num_heads``.
            spec: default ``SparseSpec()``: 16 blocks of 16 tokens.
            alignment: default ``AlignmentSpec()``: weight 10 on both directions. Means over layers are the caller's.
            mode: what runs without a stream.
            gated: multiply each head's output by ``sigmoid(W_g x)``.
            bias: on the projections to q, k, v.
            rope_theta: base of the rotary embedding; None: no positions (apply your own before, or none).

        Raises:
            InputError: heads that do not fit, an odd head width with RoPE, an unknown mode.
        """
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(hidden_size, num_heads, kv_heads) < 1 or num_heads % kv_heads:
            got = f"{num_heads} heads and {kv_heads} KV heads of width {hidden_size}"
            raise InputError("SSAAttention", got, "positive numbers, heads a multiple of KV heads")
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        if self.head_dim < 1 or (rope_theta is not None and self.head_dim % 2):
            raise InputError("SSAAttention.head_dim", self.head_dim, "a positive number, even with RoPE")
        self.spec, self.alignment, self.mode = spec or SparseSpec(), alignment or AlignmentSpec(), mode
        self.rope_theta = rope_theta
        _check(mode, "SSAAttention.mode")
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)
        self.g_proj = nn.Linear(hidden_size, num_heads, bias=False) if gated else None

    @overload
    def forward(self, x: Tensor, layout: DocumentLayout | None = ..., *, stream: None = ...) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, layout: DocumentLayout | None = ..., *, stream: Stream
    ) -> tuple[Tensor, Alignment]: ...

    def forward(
        self, x: Tensor, layout: DocumentLayout | None = None, *, stream: Stream | None = None
    ) -> Tensor | tuple[Tensor, Alignment]:
        """``x [B, T, C]`` -> ``[B, T, C]``; with a ``stream`` also the alignment, whose ``loss`` belongs to yours.

        Args:
            x: hidden states.
            layout: documents of the batch; None: one per row. Positions restart at each.
            stream: the main stream of this training step, the same in all layers and on all ranks.

        Raises:
            InputError: another shape, an unknown stream or mode.
        """
        if x.dim() != 3 or x.shape[-1] != self.q_proj.in_features:
            raise InputError("SSAAttention", f"shape {tuple(x.shape)}", f"[B, T, {self.q_proj.in_features}]")
        layout = layout or DocumentLayout.single(x.shape[0], x.shape[1])
        layout.check(x, "SSAAttention")
        _check(self.mode if stream is None else stream, "SSAAttention")
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_theta is not None:
            q, k = self._rotate(q, k, layout)
        gate = None if self.g_proj is None else torch.sigmoid(self.g_proj(x))
        if stream is not None:
            out, alignment = ssa_attention(
                q, k, v, gate, stream, spec=self.spec, alignment=self.alignment, layout=layout
            )
            return self.o_proj(out.flatten(2)), alignment
        if self.mode == "full":
            out = full_attention(q, k, v, layout)
        else:
            indices = select_blocks(q, k, self.spec, layout)
            out = sparse_attention(q, k, v, indices, self.spec.block_size, layout)
        if gate is not None:
            out = out * gate[..., None].to(out.dtype)
        return self.o_proj(out.flatten(2))

    def _rotate(self, q: Tensor, k: Tensor, layout: DocumentLayout) -> tuple[Tensor, Tensor]:
        """RoPE in float32; dimension i turns with i + D/2, as in Llama."""
        half = torch.arange(0, self.head_dim, 2, device=q.device, dtype=torch.float32)
        frequencies = float(self.rope_theta or 1.0) ** (-half / self.head_dim)
        angles = layout.positions(q.device)[..., None, None] * frequencies  # [B, T, 1, D/2]
        cos, sin = angles.cos(), angles.sin()

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

        return turn(q), turn(k)


def _check(stream: str, where: str) -> None:
    if stream not in ("full", "sparse"):
        raise InputError(where, repr(stream), "'full' or 'sparse'")
