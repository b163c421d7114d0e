"""Gradient accumulation: how a step is split into micro-batches does not change it."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny_runs import VOCABULARY, tiny
from torch import Tensor

from ssa.data import Loader, PackedDataset
from ssa.model import SSAForCausalLM
from ssa.ops.dual import api
from ssa.train.build import build_model
from ssa.train.step import StepSums, accumulate_gradients
from ssa.train.streams import Stream

CASES: list[tuple[str, Stream]] = [
    ("full", "full"),
    ("moba", "sparse"),
    ("nsa", "sparse"),
    ("ssa", "full"),
    ("ssa", "sparse"),
]


def gradients(model: SSAForCausalLM, data: Path, stream: Stream, rows: int) -> tuple[dict[str, Tensor], StepSums]:
    """Gradients of a step over 8 rows, ``rows`` of them at a time; the partly filled last row is among them."""
    loader = Loader(PackedDataset(data, "train"), rows, seed=0, start=14, shuffle=False)
    batches = list(islice(loader, 8 // rows))
    assert len({batch.targets for batch in batches}) > 1 or rows == 8, "the split must be uneven to prove anything"
    model.zero_grad()
    sums = accumulate_gradients(model, batches, stream, torch.device("cpu"), nullcontext)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sums


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of any parameter's gradient, relative to that gradient's largest entry."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / a[name].abs().max()) for name in a)


@pytest.mark.parametrize(("method", "stream"), CASES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_split_does_not_matter(method: str, stream: Stream, dtype: torch.dtype, limit: float, data: Path) -> None:
    model = build_model(tiny(data, method).model_config(VOCABULARY), 0).to(dtype)
    whole, sums = gradients(model, data, stream, 8)
    assert all(float(gradient.abs().max()) > 0 for gradient in whole.values())
    for rows in (4, 2, 1):
        split, split_sums = gradients(model, data, stream, rows)
        assert distance(whole, split) <= limit
        for name in ("loss", "cross_entropy", "sparsity_loss", "commitment_loss", "attention_sparsity"):
            one, other = getattr(sums, name), getattr(split_sums, name)
            assert (one is None) == (other is None) == (name not in ("loss", "cross_entropy") and method != "ssa")
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("stream", ["full", "sparse"])
def test_the_alignment_is_a_visible_part_of_what_is_compared(stream: Stream, data: Path) -> None:
    config = tiny(data, "ssa").model_config(VOCABULARY)
    model = build_model(config, 0).double()
    with_alignment, sums = gradients(model, data, stream, 4)
    assert sums.sparsity_loss is not None
    assert float(sums.loss) == pytest.approx(
        float(
            sums.cross_entropy
            + float(config.alignment_weight or 0) * (sums.sparsity_loss + sums.commitment_loss).mean()
        ),
        rel=1e-6,
    )
    config.alignment_weight = 0.0
    without, _ = gradients(model, data, stream, 4)
    assert distance(with_alignment, without) > 1e-6


@pytest.mark.parametrize("stream", ["full", "sparse"])
def test_activation_checkpointing_changes_no_gradient(stream: Stream, data: Path) -> None:
    model = build_model(tiny(data, "ssa").model_config(VOCABULARY), 0).train()
    plain, _ = gradients(model, data, stream, 4)
    model.activation_checkpointing_enable({"use_reentrant": False})
    again, _ = gradients(model, data, stream, 4)
    assert distance(plain, again) <= 1e-6


def test_micro_batches_sample_other_rows_and_a_step_is_repeatable(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(data, model__align_query_fraction=0.25)
    model = build_model(recipe.model_config(VOCABULARY), 0)
    seeds: list[int] = []
    sample = api.sample_rows
    monkeypatch.setattr(api, "sample_rows", lambda *x: seeds.append(x[2]) or sample(*x))  # type: ignore[func-returns-value]
    losses = [gradients(model, data, "sparse", 4)[1].loss for _ in range(2)]
    assert torch.equal(*losses)
    assert len(set(seeds[:4])) == 4, "two layers of two micro-batches"
    assert seeds[:4] == seeds[4:]
