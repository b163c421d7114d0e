"""The timed functions and what each is checked against.

Every operation is a function of inputs, so that the same code is checked on a small shape and timed on the large one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssa.bench.workloads import Tensors, Workload
from ssa.ops import full_attention, select_blocks, sparse_attention

Direction = Literal["forward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")
Results = dict[str, Tensor]
Build = Callable[[Workload, Tensors], Callable[[], Results]]
WORSE = {"out": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}  # than eager PyTorch in the same dtype
WIDE_FLOOR = 1e-6  # float32 sums in another order
LOST_BLOCKS = 1e-3  # share of selected blocks that may differ: float32 score ties


@dataclass(frozen=True)
class Operation:
    """Something to time.

    Attributes:
        family: ``"full"``, ``"selection"``, ``"sparse"`` (with selection) or ``"sparse, given blocks"``.
        direction: what is timed.
        backend: who computes it.
        build: makes the timed function from a workload and its inputs.
        checked: whether the reference can say what is right; a peer with another selection rule it cannot.
    """

    family: str
    direction: Direction
    backend: str
    build: Build
    checked: bool = True

    @property
    def name(self) -> str:
        """Unique among the operations of a workload."""
        return f"{self.family} {self.direction} [{self.backend}]"


def differentiated(forward: Callable[[Workload, Tensors], Callable[[], Tensor]], direction: Direction) -> Build:
    """``forward`` alone, or with the gradients of q, k and v."""

    def build(workload: Workload, x: Tensors) -> Callable[[], Results]:
        function = forward(workload, x)

        def run() -> Results:
            if direction == "forward":
                with torch.no_grad():
                    return {"out": function()}
            out = function()
            gradients = torch.autograd.grad(out, x.leaves, x.d_out)
            return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}

        return run

    return build


# ---------------------------------------------------------------------- full
def full(backend: str, direction: Direction) -> Operation:
    """``ssa.ops.full_attention`` of one backend."""

    def forward(workload: Workload, x: Tensors) -> Callable[[], Tensor]:
        layout = workload.layout  # one object per batch, as in training, so that its cached tensors are reused
        return lambda: full_attention(*x.leaves, layout, backend=backend)

    return Operation("full", direction, f"ssa {backend}", differentiated(forward, direction))


def sdpa(backend: SDPBackend, direction: Direction) -> Operation:
    """PyTorch's own attention; equally long documents become a batch."""

    def forward(workload: Workload, x: Tensors) -> Callable[[], Tensor]:
        lengths = {n for row in workload.rows for n in row}
        assert len(lengths) == 1, "PyTorch's attention has no documents: only equal lengths make a batch"
        length = lengths.pop()
        q, k, v = (y.view(-1, length, *y.shape[2:]).transpose(1, 2) for y in x.leaves)

        def run() -> Tensor:
            with sdpa_kernel(backend):
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(x.q.shape)

        return run

    return Operation("full", direction, f"sdpa {backend.name.lower()}", differentiated(forward, direction))


# ---------------------------------------------------------------------- sparse
def selection(backend: str) -> Operation:
    """``ssa.ops.select_blocks``."""

    def build(workload: Workload, x: Tensors) -> Callable[[], Results]:
        layout, spec = workload.layout, workload.spec
        return lambda: {"indices": select_blocks(x.q, x.k, spec, layout, backend=backend)}

    return Operation("selection", "forward", f"ssa {backend}", build)


def sparse(backend: str, direction: Direction) -> Operation:
    """Selection and sparse attention."""

    def forward(workload: Workload, x: Tensors) -> Callable[[], Tensor]:
        layout, spec = workload.layout, workload.spec

        def run() -> Tensor:
            indices = select_blocks(x.q, x.k, spec, layout, backend=backend)
            return sparse_attention(*x.leaves, indices, spec.block_size, layout, backend=backend)

        return run

    return Operation("sparse", direction, f"ssa {backend}", differentiated(forward, direction))


def sparse_given(backend: str, direction: Direction) -> Operation:
    """Sparse attention alone."""

    def forward(workload: Workload, x: Tensors) -> Callable[[], Tensor]:
        layout, spec = workload.layout, workload.spec
        indices = select_blocks(x.q, x.k, spec, layout, backend=backend)
        return lambda: sparse_attention(*x.leaves, indices, spec.block_size, layout, backend=backend)

    return Operation("sparse, given blocks", direction, f"ssa {backend}", differentiated(forward, direction))


def peer(target: str, function: Callable[..., Tensor], direction: Direction) -> Operation:
    """Somebody else's sparse attention, ``function(q, k, v, block_size, num_blocks) -> out [B, T, H, D]``."""

    def forward(workload: Workload, x: Tensors) -> Callable[[], Tensor]:
        return lambda: function(*x.leaves, workload.block_size, workload.num_blocks)

    return Operation("sparse", direction, f"peer {target}", differentiated(forward, direction), checked=False)


# ---------------------------------------------------------------------- checks
def check(operation: Operation, workload: Workload, x: Tensors) -> dict[str, tuple[float, float]]:
    """Per result: error against float64, and its limit: a multiple of eager PyTorch's error in the same dtype, with
    the same mask. Selection is compared with the reference as sets."""
    results = operation.build(workload, x)()
    if not operation.checked:
        return {"shape": (float(results["out"].shape != x.q.shape), 0.0), **_finite(results)}
    if operation.family == "selection":
        return {"indices": (_lost(results["indices"], _reference_indices(workload, x)), LOST_BLOCKS)}
    mask = visible(operation, workload, x)
    exact, rounded = dense(x, mask, torch.float64), dense(x, mask, workload.dtype)
    floor = WIDE_FLOOR if workload.dtype == torch.float32 else 0.0
    limits = {name: max(floor, WORSE[name] * _error(rounded[name], exact[name])) for name in results}
    return {name: (_error(value, exact[name]), limits[name]) for name, value in results.items()}


def _finite(results: Results) -> dict[str, tuple[float, float]]:
    return {f"{n} finite": (float(not bool(x.isfinite().all())), 0.0) for n, x in results.items()}


def _reference_indices(workload: Workload, x: Tensors) -> Tensor:
    return select_blocks(x.q, x.k, workload.spec, workload.layout, backend="reference")


def visible(operation: Operation, workload: Workload, x: Tensors) -> Tensor:
    """bool ``[B, K, T, T]``: which keys a query reads."""
    layout, S = workload.layout, workload.block_size
    document, position = layout.document_ids(x.q.device), layout.positions(x.q.device)
    causal = (document[:, :, None] == document[:, None]) & (position[:, :, None] >= position[:, None])
    causal = causal[:, None].expand(-1, workload.kv_heads, -1, -1)
    if operation.family == "full":
        return causal
    indices = _reference_indices(workload, x).transpose(1, 2)  # [B, K, T, n]
    block = (position // S)[:, None, None]  # of every key, [B, 1, 1, T]
    picked = torch.zeros_like(causal)
    for slot in range(indices.shape[-1]):  # one slot at a time bounds the memory
        picked |= indices[..., slot, None] == block
    return causal & picked


def dense(x: Tensors, mask: Tensor, dtype: torch.dtype) -> Results:
    """Attention under a dense mask in eager PyTorch, with its gradients."""
    q, k, v = (y.detach().to(dtype).requires_grad_() for y in x.leaves)
    group = q.shape[2] // k.shape[2]
    query, key, value = q.transpose(1, 2), *(y.repeat_interleave(group, 2).transpose(1, 2) for y in (k, v))
    logits = query @ key.mT * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~mask.repeat_interleave(group, 1), float("-inf"))
    out = (logits.softmax(-1) @ value).transpose(1, 2)
    gradients = torch.autograd.grad(out, (q, k, v), x.d_out.to(dtype))
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def _error(x: Tensor, exact: Tensor) -> float:
    """``||x - exact|| / ||exact||``; NaN stays NaN and passes no limit."""
    return float((x.double() - exact).norm() / exact.norm())


def _lost(mine: Tensor, exact: Tensor) -> float:
    """Share of the reference's blocks that are not in ``mine``; 1 if an index is repeated."""
    found = (exact[..., :, None] == mine[..., None, :]).any(-1)
    wanted = exact >= 0
    ascending = mine.sort(-1).values
    if bool(((ascending[..., 1:] == ascending[..., :-1]) & (ascending[..., 1:] >= 0)).any()):
        return 1.0
    return float((wanted & ~found).sum() / wanted.sum())


def passed(errors: dict[str, tuple[float, float]]) -> bool:
    """Whether every error is within its limit."""
    return all(error <= limit for error, limit in errors.values())


def failures(errors: dict[str, tuple[float, float]]) -> Sequence[str]:
    """The errors beyond their limits, in words."""
    return [f"{n}: error {e:.2g}, limit {l:.2g}" for n, (e, l) in errors.items() if not e <= l]
