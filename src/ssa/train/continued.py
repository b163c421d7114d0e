"""Continued training: the shape of a recipe's model from a checkpoint, which weights train, and LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssa.errors import ConfigError, MissingDependencyError
from ssa.model.families import SHAPE
from ssa.model.loading import model_folder, read_config

if TYPE_CHECKING:
    from ssa.train.recipe import ModelSection

# Keys of recipe and configuration that a checkpoint decides; all else is the recipe's.
DECIDED = (*SHAPE, "gated", "qkv_bias", "qk_norm")
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # what a recipe cannot say otherwise
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "g_proj")


def shape_of(checkpoint: str | Path) -> dict[str, Any]:
    """``ssa train --from CHECKPOINT``: the recipe's keys that the checkpoint decides, and ``model.weights``.

    Args:
        checkpoint: model folder or run folder of ours, or a stock or published checkpoint that
            :func:`ssa.model.load_model` reads.

    Raises:
        ConfigError: no model there, or one whose shape no recipe describes.
    """
    from ssa.train.recipe import LLAMA3_FREQUENCIES

    config = read_config(checkpoint)
    for key, value in FIXED.items():
        if getattr(config, key) != value:
            raise ConfigError(f"--from {checkpoint}: {key}", getattr(config, key), value)
    values = {f"model.{key}": getattr(config, key) for key in DECIDED}
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    scaled = kind == "llama3" and {key: rope[key] for key in LLAMA3_FREQUENCIES} == LLAMA3_FREQUENCIES
    if kind != "default" and not scaled:
        raise ConfigError(f"--from {checkpoint}: rope_parameters", rope, "no RoPE scaling, or Llama 3's")
    values["model.rope_theta"] = rope["rope_theta"]
    values["model.rope_factor"] = rope["factor"] if scaled else None
    values["model.rope_original_length"] = rope["original_max_position_embeddings"] if scaled else None
    return values | {"model.weights": str(checkpoint)}


def check_vocabulary(weights: str, vocabulary: Mapping[str, int], data: str) -> None:
    """Raise :class:`ConfigError` if the data's tokens are not the checkpoint's: ids would mean other words."""
    from ssa.data.tokenizer import load_tokenizer

    folder = model_folder(weights)
    if not (folder / "tokenizer.json").is_file():
        return  # nothing to compare with
    theirs = load_tokenizer(str(folder)).get_vocab()
    if any(theirs.get(token) != number for token, number in vocabulary.items()):
        hint = f"ssa prepare --tokenizer {folder}"
        raise ConfigError("data.path", f"{data}, tokenised with another vocabulary", f"that of {weights}", hint)


def choose_trainable(model: nn.Module, section: ModelSection, seed: int) -> None:
    """Freeze what does not train, in place, and add LoRA's matrices if asked. The same on every rank.

    Raises:
        MissingDependencyError: LoRA without peft.
    """
    if section.trainable == "all":
        return
    model.requires_grad_(False)
    if section.trainable == "attention":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".self_attn." in name)
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        hint = "pip install 'sparse-sparse-attention[lora]'"
        raise MissingDependencyError("model.trainable lora", "no package peft", "it", hint) from None
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in ADAPTED if name in present]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora = LoraConfig(r=section.lora_rank, lora_alpha=section.lora_alpha, target_modules=targets)
        inject_adapter_in_model(lora, model)


def merge_adapters(tensors: Mapping[str, Tensor], section: ModelSection) -> dict[str, Tensor]:
    """Weights of the model without adapters: ``W + alpha / rank * B A`` where there are some."""
    merged = {}
    scale = section.lora_alpha / section.lora_rank
    for name, value in tensors.items():
        if ".lora_" in name:
            continue
        whole, plain = value, name.replace(".base_layer.", ".")
        if plain != name and name.endswith(".weight"):
            a, b = (tensors[name.replace("base_layer.", f"lora_{which}.default.")].to(value.device) for which in "AB")
            whole = value + (scale * (b.double() @ a.double())).to(value.dtype)
        merged[plain] = whole
    return merged
