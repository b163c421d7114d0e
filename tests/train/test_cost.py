"""Operations and memory: against counts by hand and against what PyTorch counts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_runs import VOCABULARY, tiny
from torch.utils.flop_counter import FlopCounterMode

from ssa.cli import main
from ssa.documents import DocumentLayout
from ssa.model import SSAForCausalLM
from ssa.train.cost import (
    GATHERED_BYTES,
    GIB,
    advise,
    attended_pairs,
    count_parameters,
    estimate_memory,
    matrix_parameters,
    must_recompute,
    must_reshard,
    peak_flops,
    step_flops,
    step_pairs,
)
from ssa.train.recipe_file import load_recipe
from ssa.train.summary import describe_size


@pytest.mark.parametrize("method", ["full", "moba", "nsa", "ssa"])
def test_matrix_weights_are_those_of_the_model(method: str, data: Path) -> None:
    config = tiny(data, method).model_config(VOCABULARY)
    model = SSAForCausalLM(config)
    assert matrix_parameters(config) == sum(p.numel() for p in model.parameters() if p.dim() == 2)  # tied: once
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())


def test_operations_are_those_that_pytorch_counts(data: Path) -> None:
    config = tiny(data, "full").model_config(VOCABULARY)
    config._attn_implementation = "eager"
    model = SSAForCausalLM(config)
    ids = torch.randint(0, VOCABULARY, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, stream="full").loss.backward()
    layout = DocumentLayout.single(2, 32)
    matrices = step_flops(config, 64, 0)
    # The counter sees the matrix products; attention may run in an operation that it does not know.
    by_name = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in by_name.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert products == matrices
    pairs = attended_pairs(layout, config, "full")
    assert step_flops(config, 64, pairs) - matrices == 12 * 2 * 32 * pairs


def test_pairs_are_counted_by_document(data: Path) -> None:
    config = tiny(data).model_config(VOCABULARY)  # 2 blocks of 8
    layout = DocumentLayout.from_lengths([[5, 27], [32]])
    assert attended_pairs(layout, config, "full") == sum(n * (n + 1) // 2 for n in (5, 27, 32))
    assert attended_pairs(layout, config, "sparse") == sum(min(t + 1, 16) for n in (5, 27, 32) for t in range(n))


def test_a_sampled_counterpart_counts_for_its_share(data: Path) -> None:
    layout = DocumentLayout.single(2, 64)
    exact, sampled = (tiny(data, model__align_query_fraction=f).model_config(VOCABULARY) for f in (1.0, 0.25))
    full, sparse = (attended_pairs(layout, exact, stream) for stream in ("full", "sparse"))
    assert step_pairs(layout, exact, "sparse") == step_pairs(layout, sampled, "full") == full + sparse
    assert step_pairs(layout, sampled, "sparse") == full // 4 + sparse


def test_peaks_are_known_by_name_and_never_guessed() -> None:
    assert peak_flops("NVIDIA H200") == 790e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("Some Other Device") is None
    assert peak_flops(None) is None


# ---------------------------------------------------------------------- memory
def test_sharding_divides_what_it_shards() -> None:
    recipe = load_recipe("1b/ssa")
    config = recipe.model_config()
    parameters = count_parameters(config)
    one, eight = (estimate_memory(recipe, config, n) for n in (1, 8))
    assert (one.weights, one.moments, one.gradients) == (4 * parameters, 8 * parameters, 4 * parameters)
    assert (eight.weights, eight.moments) == (one.weights / 8, one.moments / 8)
    assert (eight.activations, eight.logits) == (one.activations, one.logits)
    replicated = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, shard=1))
    assert estimate_memory(replicated, config, 8).weights == one.weights


def test_gathered_layers_stay_where_they_are_small() -> None:
    small, asked = load_recipe("1b/ssa"), load_recipe("1b/ssa", {"training.reshard": True})
    config = small.model_config()
    assert not must_reshard(small, config)
    assert must_reshard(asked, config)
    more = estimate_memory(small, config, 8).compute - estimate_memory(asked, config, 8).compute
    assert 0 < more <= GATHERED_BYTES
    assert "training.reshard: true" in advise(small, config, 8)
    copied = load_recipe("1b/ssa", {"training.shard": 1})  # whole copies are not gathered
    assert "training.reshard" not in advise(copied, config, 8)
    large = load_recipe("1b/ssa", {"model.num_hidden_layers": 64})
    assert must_reshard(large, large.model_config())


def test_smaller_choices_are_estimated_smaller_and_advised() -> None:
    recipe = load_recipe("1b/ssa", {"training.micro_batch_rows": 4, "training.activation_checkpointing": False})
    config = recipe.model_config()
    text = advise(recipe, config, 1)
    now = estimate_memory(recipe, config).total
    assert f"instead of {now / GIB:.1f} GiB" in text
    for key, value in (("activation_checkpointing", True), ("micro_batch_rows", 2)):
        other = load_recipe("1b/ssa", {"training.micro_batch_rows": 4, "training.activation_checkpointing": False})
        changed = dataclasses.replace(other, training=dataclasses.replace(other.training, **{key: value}))
        less = estimate_memory(changed, config).total
        assert less < now
        assert f"training.{key}: {str(value).lower()} (estimate {less / GIB:.1f} GiB)" in text
    least = load_recipe("1b/ssa", {"training.micro_batch_rows": 1, "training.activation_checkpointing": True})
    assert "more GPUs" in advise(least, config, 1)


@pytest.mark.parametrize(("method", "size"), [("full", "8k"), ("ssa", "8k"), ("full", "32k"), ("ssa", "32k")])
def test_the_estimate_is_what_was_measured(method: str, size: str) -> None:
    """Of the recorded run, which took one micro-batch a step: at its peak no gradient of the layers existed yet."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "h200-2026-11-25-training.json"
    cases = json.loads(path.read_text())["cases"]
    case = next(c for c in cases if (c["method"], c["stream"], c["workload"]["name"]) == (method, "full", size))
    rows, tokens = case["workload"]["rows"], case["workload"]["tokens"]
    shape = {"training.micro_batch_rows": rows, "training.rows_per_step": rows, "data.row_length": tokens}
    recipe = load_recipe(f"1b/{method}", shape)
    estimate = estimate_memory(recipe, recipe.model_config())
    assert estimate.total - estimate.gradients == pytest.approx(case["peak_bytes"], rel=0.05)


def test_activations_are_recomputed_where_the_recipe_says_so_or_memory_is_short() -> None:
    recipe = load_recipe("1b-32k/ssa")
    config, needed = recipe.model_config(), int(estimate_memory(recipe, recipe.model_config()).total)
    assert must_recompute(recipe, config, 1, needed)
    assert not must_recompute(recipe, config, 1, 2 * needed)
    assert not must_recompute(recipe, config, 1, None)
    for said in (False, True):
        told = load_recipe("1b-32k/ssa", {"training.activation_checkpointing": said})
        assert must_recompute(told, config, 1, 1) == said


def test_the_summary_leaves_out_splits_that_do_not_exist() -> None:
    recipe = load_recipe("64m/ssa", {"training.micro_batch_rows": 2})  # of 8 rows a step
    lines = describe_size(recipe).splitlines()
    table = [line.split() for line in lines[lines.index("estimated GiB on each GPU") + 2 :]]
    assert [row[0] for row in table] == ["1", "2", "4"]
    for row in table:
        assert sum(map(float, row[1:-1])) == pytest.approx(float(row[-1]), abs=0.05)


def test_doctor_tells_what_a_recipe_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "300m/ssa"]) == 0
    shown = capsys.readouterr().out
    assert "16/1 heads, D 64, blocks 16 x 16" in shown
    assert describe_size(load_recipe("300m/ssa")) in shown
    assert main(["doctor", "300m/sssa"]) == 2
