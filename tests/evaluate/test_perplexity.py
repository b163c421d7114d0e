import math

import pytest
import torch
import torch.nn.functional as F

from ssa.evaluate import Setting, perplexity

from .test_statistics import batch, model  # noqa: F401  (fixtures)

SETTINGS = [Setting("full", 4), Setting("sparse", 4, 1), Setting("sparse", 4, 8)]


def test_nll_and_kl_equal_the_formulas(model, batch):  # noqa: F811
    full, one, all_blocks = (m.row() for m in perplexity(model, lambda: [batch], SETTINGS))
    targets = batch.layout.next_token_labels(batch.labels)
    counted = targets != -100
    with torch.no_grad():
        with model.attention_mode("full"):
            p = model(batch.input_ids, layout=batch.layout).logits[counted].log_softmax(-1)
        with model.attention_mode("sparse", num_blocks=1):
            s = model(batch.input_ids, layout=batch.layout).logits[counted].log_softmax(-1)
    assert full["nll"] == pytest.approx(float(F.nll_loss(p, targets[counted])), rel=1e-5)
    assert full["perplexity"] == pytest.approx(math.exp(full["nll"]))
    assert full["tokens"] == int(counted.sum()) == 9 + 13 + 16
    assert full["kl_full_sparse"] is None
    expected = float(F.kl_div(s, p, log_target=True, reduction="batchmean"))
    assert one["kl_full_sparse"] == pytest.approx(expected, rel=1e-4)
    assert one["kl_full_sparse"] > 1e-3
    assert all_blocks["kl_full_sparse"] == pytest.approx(0.0, abs=1e-5)
    assert (one["receptive_field"], full["receptive_field"]) == (4, None)


def test_the_model_keeps_its_mode(model, batch):  # noqa: F811
    before = model.config.to_dict()
    perplexity(model, lambda: [batch], SETTINGS)
    assert model.config.to_dict() == before
