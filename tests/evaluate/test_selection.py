"""Selection statistics against brute force."""

import pytest
import torch

from ssa import DocumentLayout
from ssa.data.loader import Batch
from ssa.evaluate import Setting, selection_statistics
from ssa.evaluate.selection import SelectionSums
from ssa.ops import SparseSpec, select_blocks

from .test_statistics import model  # noqa: F401  (a fixture)


def test_sums_by_hand():
    # 8 queries, 1 KV head, blocks of 2; the second half chooses {own, 0}, but query 5 its own alone
    picks = [[0, -1], [0, -1], [0, 1], [0, 1], [0, 2], [2, -1], [0, 3], [1, 3]]
    sums = SelectionSums()
    sums.add_picks(torch.tensor(picks)[:, None], 2)
    row = sums.row(0)
    assert row["union"] == {"2": 2.5, "4": 4.0}  # {0,2}, {0,1,3}; {0,1,2,3}
    # distances of the picks: 2 0 | 0 | 3 0 | 2 0, in classes 0, 1, 2-3
    assert row["distance"] == {"0": 4 / 7, "1": 0.0, "2": 3 / 7}
    assert row["most_popular"] == 2 / 4


def test_union_and_sinks_equal_brute_force(model):  # noqa: F811
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 64))
    batch = Batch(ids, ids, DocumentLayout.single(2, 64), 126, 2)
    setting = Setting("full", 4)
    seen = []
    with torch.no_grad(), model.attention_mode("full"), model.observe_attention(lambda *given: seen.append(given)):
        model(ids, layout=batch.layout)
    _, q, k, _, layout = seen[1]
    indices = select_blocks(q, k, SparseSpec(4, 2), layout)
    unions = [
        len({int(n) for t in range(start, start + 4) for n in indices[b, t, g]} - {-1})
        for b in range(2)
        for g in range(2)
        for start in range(32, 64, 4)
    ]
    sinks = [
        float((k[b, : t + 1, h // 2] @ q[b, t, h] * 8**-0.5).softmax(0)[0])
        for b in range(2)
        for t in range(32, 64)
        for h in range(4)
    ]
    row = selection_statistics(model, [batch], setting)["layers"][1]
    assert row["union"]["4"] == pytest.approx(sum(unions) / len(unions))
    assert row["first_token_mass"] == pytest.approx(sum(sinks) / len(sinks), rel=1e-4)
    assert sum(row["distance"].values()) == pytest.approx(1.0)
