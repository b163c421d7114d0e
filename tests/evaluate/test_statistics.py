"""Statistics against brute force on a tiny model."""

import math
from dataclasses import dataclass

import pytest
import torch

from ssa import DocumentLayout
from ssa.evaluate.statistics import attention_statistics, selection_map
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.ops import SparseSpec, select_blocks


@dataclass
class Batch:
    input_ids: torch.Tensor
    labels: torch.Tensor
    layout: DocumentLayout


@pytest.fixture
def model():
    torch.manual_seed(3)
    config = SSAConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        block_size=4,
        num_blocks=2,
    )
    network = SSAForCausalLM(config).eval()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return network


@pytest.fixture
def batch():
    ids = torch.randint(0, 50, (2, 24))
    labels = ids.clone()
    labels[1, 17:] = -100  # padding
    return Batch(ids, labels, DocumentLayout.from_lengths([[10, 14], [17, 7]]))


def brute_force(model, batch, spec, mode):
    """Per layer: mean mass on selected tokens, and mean entropy in bits, over real queries and heads."""
    seen = []
    with torch.no_grad(), model.attention_mode(mode), model.observe_attention(lambda *given: seen.append(given)):
        model(batch.input_ids, layout=batch.layout)
    out = []
    ids, positions = batch.layout.document_ids(), batch.layout.positions()
    for _, q, k, _, layout in seen:
        indices = select_blocks(q, k, spec, layout)
        mass, entropy, count = 0.0, 0.0, 0
        for b in range(2):
            for t in range(24):
                if batch.labels[b, t] < 0:
                    continue
                keys = [j for j in range(t + 1) if ids[b, j] == ids[b, t]]
                for h in range(4):
                    p = (k[b, keys, h // 2] @ q[b, t, h] / math.sqrt(8)).softmax(0)
                    picked = [int(positions[b, j]) // 4 in indices[b, t, h // 2].tolist() for j in keys]
                    mass += float(p[torch.tensor(picked)].sum())
                    entropy -= float((p * p.log2()).sum())
                    count += 1
        out.append((mass / count, entropy / count))
    return out


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_sparsity_and_entropy_equal_brute_force(model, batch, mode):
    spec = SparseSpec(4, 2)
    rows = attention_statistics(model, [batch], spec, mode).rows()
    for row, (mass, entropy) in zip(rows, brute_force(model, batch, spec, mode), strict=True):
        assert row["attention_sparsity"] == pytest.approx(mass, abs=1e-5)
        assert row["dropped_mass"] == pytest.approx(1 - mass, abs=1e-5)
        assert row["entropy_bits"] == pytest.approx(entropy, abs=1e-4)
        assert row["bound_share"] == 1.0
        assert 0 < row["bound_tightness"] <= 1


def test_batches_add_up(model, batch):
    spec = SparseSpec(4, 2)
    once = attention_statistics(model, [batch], spec, "full").mean()
    twice = attention_statistics(model, [batch, batch], spec, "full").mean()
    assert once == pytest.approx(twice)


def test_a_budget_over_all_blocks_drops_nothing(model, batch):
    mean = attention_statistics(model, [batch], SparseSpec(4, 8), "full").mean()
    assert mean["attention_sparsity"] == pytest.approx(1.0, abs=1e-6)
    assert mean["bound_share"] == 1.0


def test_selection_map_is_the_share_of_queries_per_block(model, batch):
    picture = selection_map(model, batch, SparseSpec(4, 2), layer=1)
    share = torch.tensor(picture["picked_share"])
    assert share.shape == (5, 5)  # the longest document has 17 tokens
    assert torch.equal(share.diagonal(), torch.ones(5))  # the own block is always read
    assert (share.triu(1) == 0).all()
    torch.testing.assert_close(share.sum(1), torch.tensor([1.0, 2, 2, 2, 2]), atol=1e-3, rtol=0)
