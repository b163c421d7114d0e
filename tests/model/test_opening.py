"""Opening any model that runs our attention: mode and budget stick, bad folders are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ssa.errors import CheckpointError, ConfigError
from ssa.model.opening import attention_in_words, model_folder, open_model, set_attention

from .tiny import VOCABULARY, tiny_model, tokens


def stock(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)).save_pretrained(folder)
    return folder


def ours(folder: Path) -> Path:
    tiny_model().save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("make", [stock, ours])
def test_mode_and_budget_stick(make: object, tmp_path: Path) -> None:
    folder = make(tmp_path)  # type: ignore[operator]
    ids = tokens(1, 40)
    with torch.no_grad():
        full = open_model(folder, mode="full", block_size=4)(ids).logits
        model = open_model(folder, mode="sparse", num_blocks=1, block_size=4)
        sparse = model(ids).logits
        wide = set_attention(model, num_blocks=10)(ids).logits
    assert attention_in_words(model) == "sparse attention, 10 blocks of 4 tokens"
    assert attention_in_words(set_attention(model, mode="full")) == "full attention"
    assert not model.training
    torch.testing.assert_close(wide, full, rtol=1e-4, atol=1e-4)
    assert (sparse - full).abs().max() > 1e-3


def test_a_run_folder_or_its_model(tmp_path: Path) -> None:
    assert model_folder(ours(tmp_path)) == model_folder(tmp_path / "model") == tmp_path / "model"
    with pytest.raises(ConfigError, match=r"no config\.json"):
        model_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("make", [stock, ours])
@pytest.mark.parametrize("changes", [{"mode": "dense"}, {"num_blocks": 0}, {"block_size": 5}])
def test_impossible_attention_is_refused(make: object, changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        open_model(make(tmp_path), **changes)  # type: ignore[operator]


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    folder = stock(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for text, message in [
        ("{", "unreadable JSON"),
        ("{}", "no model_type"),
        (json.dumps({**config, "auto_map": {}}), "auto_map"),
    ]:
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            open_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing keys: model\.layers\.2"):
        open_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights; expected safetensors weights"):
        open_model(folder)
