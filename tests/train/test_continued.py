"""Continued training of checkpoints that others trained: all weights, attention alone, LoRA."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TINY, VOCABULARY, metrics, results, same_bits, tiny
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from ssa.cli import main
from ssa.cli.train import parse
from ssa.data import Loader, PackedDataset
from ssa.errors import ConfigError
from ssa.model import load_model
from ssa.train.continued import shape_of
from ssa.train.loop import train

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY + 5,  # padded, as published models are
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def checkpoint(folder: Path, data: Path, kind: Any = LlamaConfig, **changes: Any) -> Path:
    """A stock model with the data's tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(kind(**{**SIZES, **changes})).save_pretrained(folder)
    shutil.copytree(data / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def flags(data: Path, out: Path, **changes: Any) -> list[str]:
    """The tiny recipe as flags of the command, without the shape of its model."""
    values = {**TINY, "data.path": data, "output": out, "training.steps": 4, **changes}
    kept = {key: value for key, value in values.items() if key.partition("model.")[2] not in SIZES}
    return [word for key, value in kept.items() for word in (f"--{key.replace('_', '-')}", str(value))]


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_training_goes_on_from_a_stock_checkpoint(kind: Any, data: Path, tmp_path: Path) -> None:
    """The first step's cross-entropy in the full stream is the stock model's own."""
    source = checkpoint(tmp_path / "stock", data, kind)
    options = flags(data, tmp_path / "run", **{"model.full_probability": 1.0, "model.alignment_weight": 0.0})
    assert main(["train", "quickstart/ssa", "--from", str(source), *options]) == 0
    steps = [record for record in metrics(tmp_path / "run") if record["event"] == "step"]
    stock, dataset = AutoModelForCausalLM.from_pretrained(source), PackedDataset(data, "train")
    total, targets = 0.0, 0
    for batch in islice(Loader(dataset, 2, TINY["seed"]), 2):
        with torch.no_grad():
            logits = stock(batch.input_ids, position_ids=batch.layout.positions(), use_cache=False).logits
        labels = batch.layout.next_token_labels(batch.labels)
        total += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        targets += batch.targets
    assert steps[0]["cross_entropy"] == pytest.approx(total / targets, rel=1e-5)
    model = load_model(tmp_path / "run")
    assert (model.config.qk_norm, model.config.qkv_bias) == (kind is Qwen3Config, kind is Qwen2Config)
    assert not model.config.gated


def test_the_shape_is_the_checkpoints_and_the_rest_the_recipes(data: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 7e3, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = {"rope_parameters": {**rope, "original_max_position_embeddings": 64}, "tie_word_embeddings": True}
    source = checkpoint(tmp_path / "stock", data, **scaled)
    command = parse(["quickstart/ssa", "--from", str(source), "--model.num-blocks", "5"])
    model = command.settings.model
    assert {key: getattr(model, key) for key in SIZES} == SIZES
    assert (model.num_blocks, model.block_size, model.gated, model.weights) == (5, 16, False, str(source))
    assert (model.rope_theta, model.rope_factor, model.rope_original_length) == (7e3, 2.0, 64)
    config = command.settings.model_config()
    assert config.rope_parameters == scaled["rope_parameters"]
    assert config.tie_word_embeddings


@pytest.mark.parametrize("trainable", ["attention", "lora"])
def test_frozen_weights_stay(trainable: str, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    source = checkpoint(tmp_path / "stock", data)
    options = flags(data, tmp_path / "run", **{"model.trainable": trainable, "model.lora_rank": 4})
    assert main(["train", "quickstart/ssa", f"--from={source}", *options]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "run" / "model"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if ".self_attn." in name}


def test_lora_starts_where_the_checkpoint_is_and_resumes_to_the_bit(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    source = checkpoint(tmp_path / "stock", data)
    lora = {"model__trainable": "lora", "model__lora_rank": 4}
    shape = {key.replace(".", "__"): value for key, value in shape_of(source).items()}
    full = tiny(data, **shape, training__steps=6, training__checkpoint_every=3)
    adapted = tiny(data, **shape, **lora, training__steps=6, training__checkpoint_every=3)
    train(full, tmp_path / "full")
    train(adapted, tmp_path / "whole")
    first = [results(tmp_path / name)[0] for name in ("full", "whole")]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-6)  # B is zero at first
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
    shutil.rmtree(source)  # a resumed run needs its own checkpoint alone
    train(adapted, tmp_path / "cut", resume="latest")
    assert same_bits(tmp_path / "whole", tmp_path / "cut", 6)
    merged = load_file(tmp_path / "cut" / "model" / "model.safetensors")
    raw = load_file(tmp_path / "cut" / "checkpoints" / "step-00000006" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    b, a = (raw[f"{name}.lora_{which}.default.weight"] for which in "BA")
    expected = raw[f"{name}.base_layer.weight"] + 32.0 / 4 * b @ a
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-6, atol=1e-7)
    assert (b @ a).abs().max() > 1e-4


# ---------------------------------------------------------------------- what is refused
def test_another_vocabulary_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "stock", data)
    file = source / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"] = {key: -value % 300 for key, value in tokenizer["model"]["vocab"].items()}
    file.write_text(json.dumps(tokenizer))
    assert main(["train", "quickstart/ssa", "--from", str(source), *flags(data, tmp_path / "run")]) == 2
    assert "ssa prepare --tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: got gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
    ],
)
def test_shapes_that_no_recipe_describes(changes: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_of(checkpoint(tmp_path / "stock", data, **changes))


def test_from_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart/ssa", "--from", str(tmp_path / "nothing")]) == 2
    assert "no config.json" in capsys.readouterr().err
