"""Both streams and their alignment: where every gradient goes, and what the numbers are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oracles import all_blocks, causal_mask, dense_attention, leaves, qkv, random_indices, selected_mask
from ssa.documents import DocumentLayout
from ssa.ops import AlignmentSpec, SparseSpec, full_attention, select_blocks, sparse_attention, ssa_attention
from ssa.ops.dual import api, passes
from ssa.ops.dual.alignment import align
from ssa.ops.dual.reference import ssa_attention as composed
from ssa.ops.full import reference as full_reference
from ssa.ops.sparse import reference as sparse_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EXACT = {"rtol": 1e-10, "atol": 1e-12}
LAYOUT = DocumentLayout.from_lengths([[9, 1, 16], [26]])
S = 4
MAINS = ["full", "sparse"]
DIRECTIONS = ["both", "sparsity", "commitment"]
DISTANCES = ["smooth_l1", "l2"]


def case(dtype: Any = torch.float64, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Leaves q, k, v, gate of 4 query and 2 KV heads, and block indices that drop much."""
    q, k, v = qkv(LAYOUT, 4, 2, 5, dtype, seed)
    gate = torch.rand(q.shape[:3], dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return leaves(q, k, 3 * v, gate), random_indices(LAYOUT, 2, 2, S, seed)  # 3 v: some differences exceed 1


def dense_streams(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    full = dense_attention(q, k, v, causal_mask(LAYOUT), scale).out
    return full, dense_attention(q, k, v, selected_mask(indices, S, LAYOUT), scale).out


def run(
    inputs: list[Tensor],
    indices: Tensor,
    main: str = "full",
    gated: bool = True,
    full_backend: str = "auto",
    **alignment: Any,
) -> Any:
    q, k, v, gate = inputs
    return ssa_attention(
        q,
        k,
        v,
        gate if gated else None,
        main,  # type: ignore[arg-type]
        spec=SparseSpec(S, 2),
        alignment=AlignmentSpec(**alignment),
        layout=LAYOUT,
        block_indices=indices,
        full_backend=full_backend,
    )


def grads(inputs: list[Tensor], value: Tensor) -> list[Tensor]:
    """Gradients, zeros where an input has none."""
    found = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


# ---------------------------------------------------------------------- align on leaves
def test_distances_by_hand() -> None:
    full, sparse = torch.tensor([0.0, 2.0]), torch.tensor([0.5, 0.0])
    # smooth L1: .5**2 / 2 and 2 - 1/2, mean .8125; L2: .25 and 4, mean 2.125
    loss, sparsity, commitment = align(full, sparse, AlignmentSpec(weight=10))
    assert (float(loss), float(sparsity), float(commitment)) == (16.25, 0.8125, 0.8125)
    loss, sparsity, commitment = align(full, sparse, AlignmentSpec(weight=1, distance="l2", directions="sparsity"))
    assert (float(loss), float(sparsity), float(commitment)) == (2.125, 2.125, 2.125)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_align_is_pytorchs_loss(distance: str, directions: str) -> None:
    full, sparse = (3 * torch.randn(2, 5, 4, 3) for _ in range(2))
    theirs = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}[distance](full, sparse)
    loss, sparsity, commitment = align(full, sparse, AlignmentSpec(7.0, distance, "raw", directions))  # type: ignore[arg-type]
    assert torch.equal(sparsity, theirs)
    assert torch.equal(commitment, theirs)
    assert torch.equal(loss, 7.0 * (2 if directions == "both" else 1) * theirs)


@pytest.mark.parametrize("distance", DISTANCES)
def test_each_direction_reaches_exactly_one_stream(distance: str) -> None:
    reached = {}
    for directions in DIRECTIONS:
        full, sparse = leaves(3 * torch.randn(4, 3), 3 * torch.randn(4, 3))
        align(full, sparse, AlignmentSpec(1.0, distance, "raw", directions))[0].backward()  # type: ignore[arg-type]
        reached[directions] = [x.grad is not None and bool((x.grad != 0).any()) for x in (full, sparse)]
    assert reached == {"both": [True, True], "sparsity": [True, False], "commitment": [False, True]}


def test_gradient_of_each_direction_by_hand() -> None:
    full, sparse = leaves(torch.tensor([0.0, 2.0, -3.0, 0.0]), torch.tensor([0.5, 0.0, 0.0, 0.0]))
    align(full, sparse, AlignmentSpec(weight=8))[0].backward()
    assert full.grad.tolist() == [-1.0, 2.0, -2.0, 0.0]  # weight / N * clamp(difference, -1, 1)
    assert sparse.grad.tolist() == [1.0, -2.0, 2.0, 0.0]


def test_alignment_is_measured_in_float32() -> None:
    full, sparse = leaves(*(torch.randn(40, 3).to(torch.bfloat16) for _ in range(2)))
    loss, *_ = align(full, sparse, AlignmentSpec(weight=1, directions="sparsity"))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.smooth_l1_loss(full.float(), sparse.float()))
    assert align(full.double(), sparse.double(), AlignmentSpec())[0].dtype == torch.float64


# ---------------------------------------------------------------------- values of the whole operation
@pytest.mark.parametrize("main", MAINS)
@pytest.mark.parametrize("gated", [True, False])
def test_returns_the_main_stream(main: str, gated: bool) -> None:
    (q, k, v, gate), indices = case()
    out, _ = run([q, k, v, gate], indices, main, gated)
    stream = dense_streams(q, k, v, indices)[MAINS.index(main)]
    torch.testing.assert_close(out, stream * gate[..., None] if gated else stream, **EXACT)


@pytest.mark.parametrize("main", MAINS)
@pytest.mark.parametrize("align_on", ["gated", "raw"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_alignment_and_its_gradients(main: str, align_on: str, distance: str, directions: str) -> None:
    """Value and gradients of the loss alone, the main output unused, against dense streams with detached targets."""
    inputs, indices = case()
    q, k, v, gate = inputs
    _, alignment = run(inputs, indices, main, distance=distance, align_on=align_on, directions=directions, weight=4.0)
    full, sparse = dense_streams(q, k, v, indices)
    if align_on == "gated":
        full, sparse = full * gate[..., None], sparse * gate[..., None]
    distance_of = F.smooth_l1_loss if distance == "smooth_l1" else F.mse_loss
    parts = {"sparsity": distance_of(full, sparse.detach()), "commitment": distance_of(sparse, full.detach())}
    loss = 4.0 * (sum(parts.values()) if directions == "both" else parts[directions])
    torch.testing.assert_close(alignment.loss, loss, **EXACT)
    torch.testing.assert_close(alignment.sparsity, parts["sparsity"].detach(), **EXACT)
    torch.testing.assert_close(alignment.commitment, parts["commitment"].detach(), **EXACT)
    for x, y in zip(grads(inputs, alignment.loss), grads(inputs, loss), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("align_on", ["gated", "raw"])
def test_the_gate_learns_from_the_alignment_only_if_gated(align_on: str) -> None:
    inputs, indices = case()
    out, alignment = run(inputs, indices, align_on=align_on)
    assert bool((grads(inputs, alignment.loss)[3] != 0).any()) == (align_on == "gated")
    assert (grads(inputs, out.sum())[3] != 0).all(), "and always from the main stream"


def test_raw_and_gated_agree_without_a_gate() -> None:
    inputs, indices = case()
    losses = [run(inputs, indices, gated=False, align_on=on)[1].loss for on in ("gated", "raw")]
    assert torch.equal(*losses)


def test_weight_scales_loss_and_gradient_but_not_the_reported_parts() -> None:
    inputs, indices = case()
    (_, one), (_, eight), (_, zero) = (run(inputs, indices, weight=w) for w in (1.0, 8.0, 0.0))
    assert torch.equal(8 * one.loss, eight.loss)
    assert torch.equal(one.sparsity, eight.sparsity)
    assert torch.equal(one.sparsity, zero.sparsity)
    assert zero.loss.item() == 0
    for x, y in zip(grads(inputs, one.loss), grads(inputs, eight.loss), strict=True):
        torch.testing.assert_close(8 * x, y, rtol=1e-14, atol=0)


def test_attention_sparsity_is_the_mean_mass_on_the_selected_tokens() -> None:
    inputs, indices = case()
    _, alignment = run(inputs, indices)
    probability = dense_attention(*inputs[:3], causal_mask(LAYOUT), 5**-0.5).probability
    mask = selected_mask(indices, S, LAYOUT).repeat_interleave(2, 2)
    torch.testing.assert_close(alignment.attention_sparsity, (probability * mask).sum(-1).mean().detach(), **EXACT)
    assert not any(x.requires_grad for x in alignment[1:])


@pytest.mark.parametrize("main", MAINS)
def test_a_budget_that_covers_all_blocks_aligns_perfectly(main: str) -> None:
    inputs, _ = case()
    _, alignment = run(inputs, all_blocks(LAYOUT, 2, S), main)
    assert alignment.loss.item() < 1e-28, "squares of float64 rounding"
    assert float(alignment.attention_sparsity) == pytest.approx(1.0, abs=1e-14)
    assert all(g.abs().max() < 1e-14 for g in grads(inputs, alignment.loss))


def test_selects_by_itself() -> None:
    (q, k, v, gate), _ = case()
    spec = SparseSpec(S, 3, first_blocks=1)
    arguments = {"spec": spec, "layout": LAYOUT, "scale": 4.0}
    alone, alignment = ssa_attention(q, k, v, gate, "sparse", **arguments)
    indices = select_blocks(q, k, spec, LAYOUT, scale=4.0)
    assert not torch.equal(indices, select_blocks(q, k, spec, LAYOUT)), "the scale matters here"
    given, given_alignment = ssa_attention(q, k, v, gate, "sparse", block_indices=indices, **arguments)
    assert torch.equal(alone, given)
    assert torch.equal(alignment.loss, given_alignment.loss)


def test_bfloat16_streams_are_gated_in_bfloat16() -> None:
    (q, k, v, gate), indices = case(torch.bfloat16)
    out, alignment = run([q, k, v, gate.float()], indices)  # a float32 gate is cast
    full = full_attention(q, k, v, LAYOUT) * gate[..., None]
    sparse = sparse_attention(q, k, v, indices, S, LAYOUT) * gate[..., None]
    assert torch.equal(out, full)
    assert alignment.loss.dtype == torch.float32
    # compared before their rounding to bfloat16, so not to the bit
    expected = F.smooth_l1_loss(full.float(), sparse.float()).detach()
    torch.testing.assert_close(alignment.sparsity, expected, rtol=1e-3, atol=0)


# ---------------------------------------------------------------------- who gets gradient at every step
@pytest.fixture
def inflow(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Outputs of both streams and the gradients that flow into them in the last backward pass: full, sparse."""
    seen: dict[str, Tensor] = {}
    backward = passes.backward

    def spy(x: Any, *args: Any) -> Any:
        found = backward(x, *args)
        seen.update(full=found.full, sparse=found.sparse, difference=x.full - x.sparse)
        return found

    monkeypatch.setattr(passes, "backward", spy)
    return seen


@pytest.mark.parametrize("main", MAINS)
@pytest.mark.parametrize("align_on", ["gated", "raw"])
def test_both_streams_get_gradient_whichever_is_main(inflow: dict[str, Tensor], main: str, align_on: str) -> None:
    inputs, indices = case()
    out, alignment = run(inputs, indices, main, align_on=align_on)
    (out.square().sum() + alignment.loss).backward()
    dropping = inflow["difference"].abs().amax(-1) > 1e-9  # rows that lost something
    assert dropping.any()
    for stream in MAINS:
        assert (inflow[stream][dropping] != 0).any(-1).all(), stream
    assert all((x.grad != 0).any() for x in inputs)


@pytest.mark.parametrize("main", MAINS)
def test_the_counterpart_enters_the_alignment_only(inflow: dict[str, Tensor], main: str) -> None:
    inputs, indices = case()
    out, _ = run(inputs, indices, main)
    out.sum().backward()
    counterpart = {"full": "sparse", "sparse": "full"}[main]
    assert (inflow[main] != 0).any()
    assert (inflow[counterpart] == 0).all()


@pytest.mark.parametrize(("directions", "reached"), [("sparsity", "full"), ("commitment", "sparse")])
@pytest.mark.parametrize("main", MAINS)
def test_one_direction_moves_one_stream(inflow: dict[str, Tensor], main: str, directions: str, reached: str) -> None:
    inputs, indices = case()
    run(inputs, indices, main, directions=directions)[1].loss.backward()
    other = {"full": "sparse", "sparse": "full"}[reached]
    assert (inflow[reached] != 0).any()
    assert (inflow[other] == 0).all()


@pytest.mark.parametrize("main", MAINS)
def test_a_stream_without_gradient_is_not_differentiated(main: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counterpart, directions = {"full": (sparse_reference, "sparsity"), "sparse": (full_reference, "commitment")}[main]
    monkeypatch.setattr(counterpart, "backward", lambda *_: pytest.fail("differentiated"))
    inputs, indices = case()
    out, alignment = run(inputs, indices, main, directions=directions, full_backend="reference")
    (out.sum() + alignment.loss).backward()
    assert (inputs[0].grad != 0).any()


@pytest.mark.parametrize("main", MAINS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("full_backend", ["reference", "cpu_flash"])
def test_is_the_composed_reference(main: str, gated: bool, full_backend: str) -> None:
    """Output, losses and gradients of everything at once, in float64 and in float32."""
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, {"rtol": 1e-4, "atol": 1e-5})):
        inputs, indices = case(dtype)
        gate = inputs[3] if gated else None
        mine = run(inputs, indices, main, gated, full_backend=full_backend)
        theirs = composed(*inputs[:3], gate, main, indices, S, AlignmentSpec(), LAYOUT)
        weight = torch.randn_like(mine[0])
        for x, y in zip((mine[0], *mine[1]), (theirs[0], *theirs[1]), strict=True):
            torch.testing.assert_close(x, y, **tolerance)
        values = [(out * weight).sum() + 7 * alignment.loss for out, alignment in (mine, theirs)]
        for x, y in zip(*(grads(inputs, value) for value in values), strict=True):
            torch.testing.assert_close(x, y, **tolerance)


def test_saves_nothing_but_inputs_outputs_and_row_statistics() -> None:
    (q, k, v, gate), indices = case()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        run([q, k, v, gate], indices)
    large = [x for x in saved if x.shape == q.shape]
    assert len(large) == 3, "q and both outputs"
    assert len(saved) == 9, "k, v, gate, indices, two log-sum-exps besides"


@pytest.mark.parametrize("main", MAINS)
def test_under_activation_checkpointing(main: str) -> None:
    inputs, indices = case()
    results = []
    for recompute in (False, True):

        def layer(*x: Tensor) -> tuple[Tensor, Tensor]:
            out, alignment = run([2 * y for y in x], indices, main)
            return out, alignment.loss

        out, loss = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
        results.append((out, loss, *grads(inputs, out.square().sum() + loss)))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_compiles_without_a_graph_break() -> None:
    inputs, _ = case(torch.float32)

    def step(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        out, alignment = ssa_attention(q, k, v, gate, "sparse", spec=SparseSpec(S, 2), layout=LAYOUT)
        return out.square().sum() + alignment.loss

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for x, y in zip(*(grads(inputs, f(*inputs)) for f in (step, compiled)), strict=True):
        torch.testing.assert_close(x, y)


def test_runs_inside_autocast_in_the_dtype_of_its_inputs() -> None:
    inputs, indices = case(torch.float32)
    plain, _ = run(inputs, indices, full_backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = run(inputs, indices, full_backend="reference")
    assert torch.equal(plain, cast)


def test_selection_carries_no_gradient() -> None:
    """With one block per query and attention to it alone, keys of other blocks matter to the selection only."""
    (q, k, v, gate), _ = case()
    out, _ = ssa_attention(q, k, v, gate, "sparse", spec=SparseSpec(S, 1), layout=LAYOUT)
    gradient = grads([k], out[1, 12:].square().sum())[0]
    assert (gradient[1, :12] == 0).all()
    assert (gradient[0] == 0).all()
    assert (gradient[1, 12:] != 0).any()


@pytest.mark.parametrize("main", MAINS)
@pytest.mark.parametrize("align_on", ["gated", "raw"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck(main: str, align_on: str, distance: str) -> None:
    """Finite differences do not stop at a stop-gradient. But d is symmetric, so moving both arguments of both terms
    changes the loss by exactly twice what the stopped gradients say: half the value has the gradient of the whole.
    """
    layout = DocumentLayout.from_lengths([5, 1, 7])
    inputs = leaves(*qkv(layout, 2, 1, 2), torch.rand(1, 13, 2, dtype=torch.float64))
    indices = random_indices(layout, 1, 2, 2, seed=3)

    def function(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        out, alignment = ssa_attention(
            q,
            k,
            v,
            gate,
            main,  # type: ignore[arg-type]
            spec=SparseSpec(2, 2),
            alignment=AlignmentSpec(align_on=align_on, distance=distance),  # type: ignore[arg-type]
            layout=layout,
            block_indices=indices,
        )
        return out, alignment.loss - alignment.loss.detach() / 2

    assert torch.autograd.gradcheck(function, inputs, atol=1e-5)


# ---------------------------------------------------------------------- specification
@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ({"weight": -1.0}, "AlignmentSpec.weight: got -1.0"),
        ({"weight": float("nan")}, "got nan"),
        ({"weight": float("inf")}, "got inf"),
        ({"weight": "10"}, "got '10'"),
        ({"distance": "l1"}, "AlignmentSpec.distance: got 'l1'; expected one of ('smooth_l1', 'l2')"),
        ({"align_on": "both"}, "AlignmentSpec.align_on: got 'both'"),
        ({"directions": "full"}, "AlignmentSpec.directions: got 'full'"),
        ({"query_fraction": 0.3}, "AlignmentSpec.query_fraction: got 0.3; expected 1/n"),
        ({"query_fraction": 0}, "got 0"),
        ({"query_fraction": 2.0}, "got 2.0"),
        ({"query_fraction": 1 / 65}, "expected 1/n for n from 1 to 64"),
        ({"query_fraction": float("nan")}, "got nan"),
    ],
)
def test_refused_specifications(arguments: dict[str, Any], got: str) -> None:
    with pytest.raises(ValueError, match=r"expected") as caught:
        AlignmentSpec(**arguments)
    assert got in str(caught.value)


def test_defaults_are_the_published_codes() -> None:
    assert AlignmentSpec() == AlignmentSpec(10.0, "smooth_l1", "gated", "both")


# ---------------------------------------------------------------------- documents that fit the budget
@pytest.mark.parametrize("main", MAINS)
@pytest.mark.parametrize("gated", [True, False])
def test_equal_streams_are_computed_once(main: str, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = case()
    inputs, gate = (inputs, inputs[3]) if gated else (inputs[:3], None)
    spec, up = SparseSpec(S, 7), torch.randn_like(inputs[0])  # 26 tokens are 7 blocks
    fraction = AlignmentSpec(query_fraction=1 / 2)

    def both(**backend: Any) -> tuple[Tensor, Any, list[Tensor]]:
        keywords: dict[str, Any] = {"spec": spec, "alignment": fraction, "layout": LAYOUT, "seed": 1, **backend}
        out, found = ssa_attention(*inputs[:3], gate, main, **keywords)
        return out, found, list(torch.autograd.grad([out, found.loss], inputs, [up, torch.ones_like(found.loss)]))

    twice = both(backend="reference")
    monkeypatch.setattr(api, "select_blocks", None)
    monkeypatch.setattr(api, "sparse_stream", None)
    once = both()
    torch.testing.assert_close([once[0], *once[2]], [twice[0], *twice[2]], **EXACT)
    assert [x.item() for x in once[1]] == [0.0, 0.0, 0.0, 1.0]
    torch.testing.assert_close(list(once[1]), list(twice[1]), **EXACT)


def test_only_documents_that_surely_fit_skip_selection() -> None:
    assert SparseSpec(4, 7).reads_all(28)
    assert not SparseSpec(4, 7).reads_all(29)
    assert not SparseSpec(4, 7, max_dropped_mass=0.1).reads_all(4)
    assert not SparseSpec(8, 7, rule="official").reads_all(8)  # its merge keeps half of a chunk
