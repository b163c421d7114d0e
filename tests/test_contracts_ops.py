"""House contracts 1-3 on operations: who can see whom, to the last bit.

Perturbations are placed everywhere, inside the query's own block too: a mask that is wrong by one token leaks only
there, and block-aligned perturbations never see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import all_blocks, document_slices, leaves, qkv
from ssa.documents import DocumentLayout
from ssa.ops import (
    AlignmentSpec,
    SparseSpec,
    attention_entropy,
    compressed_attention,
    error_bound,
    full_attention,
    select_blocks,
    sparse_attention,
    ssa_attention,
    window_attention,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
S, H, K, D = 4, 4, 2, 5
LAYOUT = DocumentLayout.from_lengths([[6, 1, 9, 8], [13, 11]])  # document ends inside blocks, equal neighbours absent
EQUAL = DocumentLayout.from_lengths([[8, 8, 8], [12, 12]])  # runs of equal documents, which some backends batch
LONG = DocumentLayout.from_lengths([[61, 35], [96]])  # several tiles of a flash kernel
SPEC = SparseSpec(S, 2)
OFFICIAL = SparseSpec(2, 2, rule="official")

Function = Callable[[Tensor, Tensor, Tensor, DocumentLayout], list[Tensor]]


def selected(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, spec: SparseSpec = SPEC) -> Tensor:
    return select_blocks(q, k, spec, layout)


def dual(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, main: Any) -> Tensor:
    gate = v.mean(-1).repeat_interleave(H // K, 2).sigmoid()  # moves with the token, as the model's does
    return ssa_attention(q, k, v, gate, main, spec=SPEC, layout=layout)[0]


# every result is [B, T, ...] and its row t belongs to token t
FUNCTIONS: dict[str, Function] = {
    "select": lambda q, k, v, l: [selected(q, k, v, l)],
    "select official": lambda q, k, v, l: [selected(q, k, v, l, OFFICIAL)],
    "select forced": lambda q, k, v, l: [selected(q, k, v, l, SparseSpec(2, 3, first_blocks=1, local_blocks=1))],
    "sparse": lambda q, k, v, l: list(
        sparse_attention(q, k, v, selected(q, k, v, l), S, l, return_lse=True, backend="reference")
    ),
    "full reference": lambda q, k, v, l: list(full_attention(q, k, v, l, return_lse=True, backend="reference")),
    "full cpu_flash": lambda q, k, v, l: list(full_attention(q, k, v, l, return_lse=True, backend="cpu_flash")),
    "dual, full main": lambda q, k, v, l: [dual(q, k, v, l, "full")],
    "dual, sparse main": lambda q, k, v, l: [dual(q, k, v, l, "sparse")],
    "compressed": lambda q, k, v, l: [compressed_attention(q, k, v, S, l)],
    "window": lambda q, k, v, l: [window_attention(q, k, v, 6, l)],
    "entropy": lambda q, k, v, l: [attention_entropy(q, k, l)],
    "bound": lambda q, k, v, l: list(error_bound(q, k, v, selected(q, k, v, l), S, l)),
}
DIFFERENTIABLE = [name for name in FUNCTIONS if not name.startswith(("select", "entropy", "bound"))]


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x, y) and torch.equal(x.isnan(), y.isnan())


def perturbed(inputs: tuple, row: int, token: int, seed: int) -> list[Tensor]:
    """The same q, k, v with one token replaced by something much larger."""
    generator = torch.Generator().manual_seed(seed)
    out = [x.clone() for x in inputs]
    for x in out:
        x[row, token] = (100 * torch.randn(x.shape[2:], generator=generator)).to(x.dtype)
    return out


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("layout", [LAYOUT, EQUAL, LONG], ids=["ragged", "equal", "long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_token_changes_nothing_before_it_or_beyond_its_document(
    name: str, layout: DocumentLayout, dtype: torch.dtype
) -> None:
    """Every token in turn (of long documents every seventh, which visits every place in a block): 0 changed bits in
    the past and in all other documents, and some in its own future."""
    function, inputs = FUNCTIONS[name], qkv(layout, H, K, D, dtype)
    before = function(*inputs, layout)
    changes, step = 0, 7 if layout is LONG else 1
    for row, document in document_slices(layout):
        for token in range(document.start, document.stop, step):
            after = function(*perturbed(inputs, row, token, token), layout)
            for x, y in zip(before, after, strict=True):
                may_change = torch.zeros(layout.batch, layout.tokens, dtype=torch.bool)
                may_change[row, token : document.stop] = True
                assert same_bits(x[~may_change], y[~may_change]), f"row {row}, token {token}"
                changes += int((x[may_change] != y[may_change]).any())
    assert changes > layout.total // step // 4, "the perturbation must matter somewhere, or nothing was tested"


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("layout", [LAYOUT, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_documents_nan_stays_inside(name: str, layout: DocumentLayout, bad: float) -> None:
    """0 times NaN is NaN: masked-out keys must not even be multiplied if they belong to somebody else."""
    function, inputs = FUNCTIONS[name], qkv(layout, H, K, D, torch.float32)
    before = function(*inputs, layout)
    for row, document in document_slices(layout):
        broken = [x.clone() for x in inputs]
        for x in broken:
            x[row, document] = bad
        others = torch.ones(layout.batch, layout.tokens, dtype=torch.bool)
        others[row, document] = False
        for x, y in zip(before, function(*broken, layout), strict=True):
            assert same_bits(x[others], y[others])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("layout", [LAYOUT, EQUAL], ids=["ragged", "equal"])
def test_gradients_flow_to_the_past_of_the_same_document_only(name: str, layout: DocumentLayout) -> None:
    for row, document in document_slices(layout):
        middle = (document.start + document.stop) // 2
        inputs = leaves(*qkv(layout, H, K, D, torch.float32))
        out = FUNCTIONS[name](*inputs, layout)[0]
        if not out.requires_grad:
            continue
        out[row, document.start : middle + 1].square().sum().backward()
        outside = torch.ones(layout.batch, layout.tokens, dtype=torch.bool)
        outside[row, document.start : middle + 1] = False
        for x in inputs:
            assert x.grad is not None
            assert (x.grad[outside] == 0).all()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("layout", [LAYOUT, EQUAL], ids=["ragged", "equal"])
def test_a_documents_nan_does_not_reach_other_gradients(name: str, layout: DocumentLayout) -> None:
    def gradients(inputs: tuple) -> list[Tensor]:
        mine = leaves(*inputs)
        sum(x.sum() for x in FUNCTIONS[name](*mine, layout) if x.requires_grad).backward()
        return [x.grad for x in mine]

    clean = qkv(layout, H, K, D, torch.float32)
    before = gradients(clean)
    for row, document in document_slices(layout):
        broken = tuple(x.clone() for x in clean)
        for x in broken:
            x[row, document] = float("nan")
        others = torch.ones(layout.batch, layout.tokens, dtype=torch.bool)
        others[row, document] = False
        for x, y in zip(before, gradients(broken), strict=True):
            assert same_bits(x[others], y[others])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_repeats_bit_for_bit(name: str) -> None:
    inputs = qkv(LAYOUT, H, K, D, torch.float32)
    first = FUNCTIONS[name](*inputs, LAYOUT)
    for _ in range(5):
        assert all(same_bits(x, y) for x, y in zip(first, FUNCTIONS[name](*inputs, LAYOUT), strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_packing_changes_nothing(name: str) -> None:
    inputs = qkv(LAYOUT, H, K, D, torch.float32)
    packed = FUNCTIONS[name](*inputs, LAYOUT)
    for row, document in document_slices(LAYOUT):
        length = document.stop - document.start
        alone = FUNCTIONS[name](*(x[row : row + 1, document] for x in inputs), DocumentLayout.single(1, length))
        for x, y in zip(packed, alone, strict=True):
            torch.testing.assert_close(x[row, document], y[0], rtol=2e-6, atol=2e-6)


# ---------------------------------------------------------------------- contract 2
@pytest.mark.parametrize("full_backend", ["reference", "cpu_flash"])
@pytest.mark.parametrize("main", ["full", "sparse"])
def test_a_budget_that_covers_all_blocks_is_full_attention(full_backend: str, main: Any) -> None:
    q, k, v = qkv(LAYOUT, H, K, D)
    spec = SparseSpec(S, 4)  # the longest document has four blocks
    full, full_lse = full_attention(q, k, v, LAYOUT, return_lse=True, backend=full_backend)
    indices = select_blocks(q, k, spec, LAYOUT)
    assert torch.equal(indices, all_blocks(LAYOUT, K, S))
    sparse, sparse_lse = sparse_attention(q, k, v, indices, S, LAYOUT, return_lse=True)
    out, alignment = ssa_attention(q, k, v, None, main, spec=spec, layout=LAYOUT)
    assert (full - sparse).abs().max() < 1e-14
    assert (full - out).abs().max() < 1e-14
    assert (full_lse - sparse_lse).abs().max() < 1e-14
    assert error_bound(q, k, v, indices, S, LAYOUT).dropped_mass.max() < 1e-14
    assert alignment.loss < 1e-28
    assert 1 - alignment.attention_sparsity < 1e-14


# ---------------------------------------------------------------------- contract 3 (details: tests/ops/test_dual.py)
@pytest.mark.parametrize("main", ["full", "sparse"])
def test_alignment_keeps_both_streams_learning(main: Any) -> None:
    """With the main output unused, each direction alone moves q, k and v, by different amounts, and both add up."""
    gradients = {}
    for directions in ("sparsity", "commitment", "both"):
        inputs = leaves(*qkv(LAYOUT, H, K, D))
        alignment = AlignmentSpec(directions=directions)  # type: ignore[arg-type]
        ssa_attention(*inputs, None, main, spec=SPEC, alignment=alignment, layout=LAYOUT)[1].loss.backward()
        gradients[directions] = [x.grad for x in inputs]
    for a, b, both in zip(*gradients.values(), strict=True):
        assert (a != 0).any()
        assert (b != 0).any()
        assert not torch.equal(a, b)
        torch.testing.assert_close(a + b, both, rtol=1e-10, atol=1e-14)
