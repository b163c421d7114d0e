"""Loading a model folder: local files, safetensors only, no code from the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ssa.errors import CheckpointError, ConfigError
from ssa.model.configuration import SSAConfig
from ssa.model.families import check_tied, is_official, translate_config, translate_shapes, translate_tensor
from ssa.model.modeling import SSAForCausalLM
from ssa.model.weights import Weights, describe, open_weights

# Keys that would make transformers import or fetch code, or choose an attention behind our back.
REFUSED_KEYS = ("auto_map", "custom_pipelines", "_attn_implementation_internal", "_attn_implementation_autoset")
TIED = ("model.embed_tokens.weight", "lm_head.weight")


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, **settings: Any
) -> SSAForCausalLM:
    """Load an :class:`SSAForCausalLM` from a folder that ``save_pretrained``, ``ssa train`` or ``ssa convert`` wrote.

    A Llama, Mistral, Qwen2 or Qwen3 checkpoint loads too, ungated and in full mode, and so does one of the paper's
    (``llama-nsa``, without its code); see :mod:`ssa.model.families`.

    Args:
        path: a model folder, or a run folder that holds ``model/``.
        device: where to put it.
        dtype: convert the weights; None keeps the stored dtype.
        settings: keys of :class:`SSAConfig` to replace, such as ``num_blocks``.

    Raises:
        ConfigError: not a folder, or a configuration that is not ours and cannot become ours.
        CheckpointError: missing or unreadable weights, pickled weights, tensors that do not fit, non-finite weights.
    """
    folder = model_folder(path)
    values = read_config_file(folder)
    config = translate_config(values, str(folder / "config.json"), **settings)
    weights, official = open_weights(folder), is_official(values)
    model = empty_model(config)
    check_fit(model, weights, official)
    tensors: dict[str, Tensor] = {}
    for file, names in weights.shards.items():
        with weights.open(file) as shard:
            for name in names:
                tensor = translate_tensor(name, shard.get_tensor(name), config, official)
                if tensor is not None:
                    check_finite(name, tensor, str(folder))
                    tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    model.load_state_dict(tensors, strict=False, assign=True)  # not strict: tied weights come once
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # made on the meta device, it has no tables
    config.dtype = tensors[TIED[0]].dtype
    config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def read_config(path: str | Path, **settings: Any) -> SSAConfig:
    """The configuration that :func:`load_model` gives the model, without its weights; the same errors."""
    folder = model_folder(path)
    return translate_config(read_config_file(folder), str(folder / "config.json"), **settings)


def model_folder(path: str | Path) -> Path:
    """The model folder at ``path``, which may be a run folder that holds ``model/``.

    Raises:
        ConfigError: no ``config.json`` in either.
    """
    for folder in (Path(path) / "model", Path(path)):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(str(path), "no config.json", "a model folder or a run folder with model/")


def read_config_file(folder: Path) -> dict[str, Any]:
    """The JSON object of ``config.json``.

    Raises:
        ConfigError: unreadable, or with a key that chooses code. The published checkpoints name their own
            code; it is neither read nor needed.
    """
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(str(file), f"unreadable JSON ({error})", "a model configuration") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ConfigError(str(file), "no model_type", "a model configuration")
    if is_official(values):
        values.pop("auto_map", None)
    if refused := [key for key in REFUSED_KEYS if key in values]:
        raise ConfigError(f"{file}: {refused[0]}", "a key that chooses code", "its absence", "removing the key")
    return values


def empty_model(config: SSAConfig) -> SSAForCausalLM:
    """A model whose parameters have shapes and no values."""
    with torch.device("meta"):
        return SSAForCausalLM(config)


def check_fit(model: SSAForCausalLM, weights: Weights, official: bool) -> None:
    """Raise :class:`CheckpointError` unless ``weights`` holds exactly the model's tensors."""
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = translate_shapes(weights.shapes, model.config, official)
    differing = [name for name in sorted(own.keys() & found.keys()) if found[name] != own[name]]
    wrong = {
        "missing keys": sorted(own.keys() - found.keys()),
        "unexpected keys": sorted(found.keys() - own.keys()),
        "mismatched keys": [f"{name} {found[name]}, not {own[name]}" for name in differing],
    }
    for kind, names in wrong.items():
        if names:
            raise CheckpointError(str(weights.folder), describe(names, kind), "every tensor of the model and no other")
    if model.config.tie_word_embeddings and TIED[1] in weights.shapes:
        pair = []
        for name in TIED:
            with weights.open(weights.file_of(name)) as shard:
                pair.append(shard.get_tensor(name))
        check_tied(pair[0], pair[1], str(weights.folder))


def check_finite(name: str, tensor: Tensor, where: str) -> None:
    """Raise :class:`CheckpointError` for NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{where}: tensor {name}", "non-finite values", "finite weights")
