"""Checkpoints of other origin as our one model class: which configuration and which tensors they are in it.

Llama, Mistral, Qwen2 and Qwen3 are our layers without the gate (Qwen2 has biases, Qwen3 norms queries and keys). The
checkpoints of the paper's authors (``llama-nsa``) are gated; their gate has three columns per head of which SSA, MoBA
and full attention use the second (paper section 4; docs/guides/official-checkpoints.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from ssa.errors import CheckpointError, ConfigError
from ssa.model.configuration import SSAConfig

OFFICIAL = "llama-nsa"
STOCK: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
READABLE = (SSAConfig.model_type, *STOCK, OFFICIAL)
#: Keys that say how large a model is, by the same name in every family.
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
)
SHARED = (
    *SHAPE,
    "hidden_act",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)
GATE = ".self_attn.g_proj.weight"
GATE_COLUMN = 1  # of (compression, selection, window)


def is_official(values: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of the published checkpoints."""
    return values.get("model_type") == OFFICIAL


def translate_config(values: Mapping[str, Any], where: str, **settings: Any) -> SSAConfig:
    """Our configuration for a checkpoint's ``config.json``.

    A stock model becomes an ungated model in full mode: the function that it was. Its ``ssa_*`` keys, if it was
    trained with ``attn_implementation="ssa"``, are kept. An official one keeps its mode, block size and budget, and
    the selection rule ``"official"`` that it was trained under.

    Args:
        values: the JSON object; ``model_type`` one of ``READABLE``.
        where: for errors.
        settings: keys of :class:`SSAConfig` that replace what follows from ``values``.

    Raises:
        ConfigError: an architecture, or a feature of it, that our model does not have.
    """
    kind = values.get("model_type")
    if kind not in READABLE:
        raise ConfigError(where, f"model_type {kind!r}", f"one of {', '.join(map(repr, READABLE))}")
    if kind == SSAConfig.model_type:
        return SSAConfig.from_dict({**values, **settings})
    if "quantization_config" in values:
        raise ConfigError(f"{where}: quantization_config", "quantised weights", "float weights")
    source = _stock_config(values)
    _refuse_features(source, where)
    shape = {key: getattr(source, key) for key in SHARED if getattr(source, key, None) is not None}
    shape |= {"qkv_bias": kind == "qwen2", "qk_norm": kind == "qwen3", "architectures": ["SSAForCausalLM"]}
    origin = _official_settings(values) if is_official(values) else _stock_settings(values)
    return SSAConfig(**{**shape, **origin, **settings})


def _stock_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """As transformers reads it: defaults filled in, RoPE in one form."""
    kind = STOCK["llama" if is_official(values) else str(values["model_type"])]
    return kind.from_dict({key: value for key, value in values.items() if key != "model_type"})


def _refuse_features(source: Any, where: str) -> None:
    window = getattr(source, "sliding_window", None)
    uses_window = getattr(source, "use_sliding_window", True) and window and window < source.max_position_embeddings
    if uses_window or set(getattr(source, "layer_types", None) or ()) - {"full_attention"}:
        raise ConfigError(f"{where}: sliding_window", window, "attention over the whole context")
    rope = source.rope_parameters or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor", rope["partial_rotary_factor"], "1")


def _stock_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Ungated and full, or what the ``ssa_*`` keys say."""
    kept = {key.removeprefix("ssa_"): value for key, value in values.items() if key.startswith("ssa_")}
    mode = kept.pop("mode", "full")
    return {"method": "ssa", "gated": False, "inference_mode": mode, **kept}


def _official_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Only NSA has a window; nothing in a configuration tells SSA, MoBA and full attention apart."""
    window = int(values.get("window_size") or 0)
    nsa = {"method": "nsa", "window_size": window} if window else {"method": "ssa"}
    return {
        **nsa,
        "gated": True,
        "block_size": values.get("block_size", 64),  # what the published class takes where the file says nothing
        "num_blocks": values.get("block_counts", 16),
        "selection_rule": "official",
        "inference_mode": "sparse" if window else values.get("inference_mode", "sparse"),
    }


# ---------------------------------------------------------------------- tensors
def translate_shapes(shapes: Mapping[str, tuple[int, ...]], config: SSAConfig, official: bool) -> dict[str, Any]:
    """Names and shapes that :func:`translate_tensor` gives, without reading a tensor."""
    kept = {name: shape for name, shape in shapes.items() if not _is_dropped(name, config)}
    if official and config.method != "nsa":
        kept |= {
            name: (shape[0] // 3, *shape[1:])
            for name, shape in kept.items()
            if name.endswith(GATE) and len(shape) == 2 and shape[0] % 3 == 0
        }
    return kept


def translate_tensor(name: str, tensor: Tensor, config: SSAConfig, official: bool) -> Tensor | None:
    """A checkpoint's tensor as ours, under the same name; None where it is not needed."""
    if _is_dropped(name, config):
        return None
    if official and config.method != "nsa" and name.endswith(GATE):
        return tensor.unflatten(0, (-1, 3))[:, GATE_COLUMN].contiguous()  # [3 * heads, C] -> [heads, C]
    return tensor


def _is_dropped(name: str, config: SSAConfig) -> bool:
    """The second copy of a tied embedding, and tables that old versions stored."""
    return (name == "lm_head.weight" and bool(config.tie_word_embeddings)) or name.endswith("rotary_emb.inv_freq")


def check_tied(embedding: Tensor, head: Tensor, where: str) -> None:
    """Raise :class:`CheckpointError` if a head that is said to be tied is another matrix."""
    if not embedding.equal(head):
        raise CheckpointError(
            where, "an lm_head other than the embedding with tie_word_embeddings", "one matrix", "setting it to false"
        )


# ---------------------------------------------------------------------- back
def plain_config(config: SSAConfig, where: str) -> dict[str, Any]:
    """``config.json`` of the stock model with the same full attention, for software that does not know ours.

    Raises:
        ConfigError: a gate, or both biases and norms: no stock architecture has them.
    """
    if config.gated or (config.qk_norm and config.qkv_bias):
        what = "a gated model" if config.gated else "biases and norms of queries and keys"
        raise ConfigError(where, what, "an ungated model (one that came from a stock checkpoint)", "--to official")
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    shape = {key: getattr(config, key) for key in SHARED if getattr(config, key, None) is not None}
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return STOCK[kind](**shape, architectures=[names[kind]]).to_dict()


def official_config(config: SSAConfig, where: str) -> dict[str, Any]:
    """``config.json`` in the published form, without its code.

    Raises:
        ConfigError: a model that the published class does not have.
    """
    if not config.gated or config.qk_norm or config.qkv_bias:
        raise ConfigError(where, "a model without a gate, or with biases or norms", "a gated Llama", "--to plain")
    shape = {key: getattr(config, key) for key in SHARED if getattr(config, key, None) is not None}
    rope = dict(shape.pop("rope_parameters"))
    shape["rope_theta"] = rope.pop("rope_theta")
    shape["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if (dtype := shape.pop("dtype", None)) is not None:
        shape["torch_dtype"] = str(dtype).removeprefix("torch.")
    return {
        **shape,
        "architectures": ["LlamaNSAForCausalLM"],
        "model_type": OFFICIAL,
        "block_size": config.block_size,
        "block_counts": config.num_blocks,
        "window_size": config.window_size if config.method == "nsa" else 0,
        "inference_mode": config.inference_mode,
    }


def official_tensor(name: str, tensor: Tensor, config: SSAConfig) -> Tensor:
    """The published form of a tensor: a gate gets its two unused columns, as zeros."""
    if not name.endswith(GATE) or config.method == "nsa":
        return tensor
    whole = tensor.new_zeros(tensor.shape[0], 3, tensor.shape[1])
    whole[:, GATE_COLUMN] = tensor
    return whole.flatten(0, 1)
