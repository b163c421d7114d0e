import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssa.errors import CheckpointError, ConfigError
from ssa.model import load_model

from .tiny import tiny_model, tokens


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_a_run_folder_or_a_model_folder_loads(folder):
    ids = tokens(1, 20)
    with torch.no_grad():
        expected = tiny_model()(ids).logits
        for path in (folder, folder / "model"):
            assert torch.equal(load_model(path)(ids).logits, expected)


def change_config(folder, **changes):
    file = folder / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type .gpt2.; expected one of .ssa."),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map: got a key that chooses code"),
        ({"_attn_implementation_internal": "x/y"}, "_attn_implementation_internal"),
        ({"block_size": 24}, "SparseSpec.block_size: got 24"),
    ],
)
def test_a_hostile_or_foreign_configuration_is_refused(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        load_model(folder)


def test_broken_json_is_refused(folder):
    (folder / "model" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="unreadable JSON"):
        load_model(folder)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model(folder / "nowhere")


def test_pickled_weights_are_refused(folder):
    weights = folder / "model" / "model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="safetensors weights"):
        load_model(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 missing keys: model\.norm\.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 unexpected keys: extra"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), r"tensor model\.norm\.weight: got non-finite"),
        (lambda t: t.update({"model.norm.weight": torch.ones(5)}), r"model\.norm\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, edit, message):
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_truncated_weights_are_refused(folder):
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        load_model(folder)
