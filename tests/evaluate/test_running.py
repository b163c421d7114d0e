"""Settings leave no trace; RoPE beyond the trained length."""

import pytest
import torch

from ssa import DocumentLayout
from ssa.errors import ConfigError, InputError
from ssa.evaluate import Setting, running, stretched

from .test_statistics import model  # noqa: F401  (a fixture)


def logits(model, length):  # noqa: F811
    ids = torch.arange(length)[None] % 50
    with torch.no_grad():
        return model(ids, layout=DocumentLayout.single(1, length)).logits


def test_a_setting_is_undone(model):  # noqa: F811
    before = model.config.to_dict()
    with running(model, Setting("full", 8, None, "official")):
        assert (model.config.inference_mode, model.config.selection_rule) == ("full", "official")
    assert model.config.to_dict() == before
    with pytest.raises(ConfigError), running(model, Setting("sparse", 4, 8, "official")):
        pass  # more blocks than the published merge holds
    assert model.config.to_dict() == before


@pytest.mark.parametrize("scaling", ["none", "linear", "llama3", "yarn"])
def test_longer_documents_run_and_shorter_ones_do_not_change(model, scaling):  # noqa: F811
    model.config.max_position_embeddings = 32
    short = logits(model, 32)
    with pytest.raises(InputError):
        logits(model, 40)
    with stretched(model, 64, scaling) as applied:
        assert applied == scaling
        assert torch.isfinite(logits(model, 64)).all()
        assert torch.equal(logits(model, 32), short) == (scaling == "none")
    with stretched(model, 32, scaling) as applied:
        assert applied == "none"
    assert torch.equal(logits(model, 32), short)


def test_an_unknown_scaling_is_refused(model):  # noqa: F811
    with pytest.raises(ConfigError, match="scaling"), stretched(model, 10**6, "ntk"):
        pass
