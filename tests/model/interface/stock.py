"""Stock models of transformers, small and with weights wide enough (std 0.3) that a wrong key shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

import ssa
from ssa.model import SSAConfig, SSAForCausalLM

VOCABULARY = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def plain(kind: type[PreTrainedConfig] = LlamaConfig, **changes: Any) -> PreTrainedModel:
    """With transformers' own attention."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(kind(**{**SHAPE, **changes}), attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def stock(kind: type[PreTrainedConfig] = LlamaConfig, settings: dict[str, Any] | None = None, **changes: Any) -> Any:
    """With ours: blocks of 4 tokens, 3 of them, unless ``settings`` says otherwise."""
    return ssa.configure(plain(kind, **changes), **{"block_size": 4, "num_blocks": 3, **(settings or {})})


def ours(model: Any, **changes: Any) -> SSAForCausalLM:
    """Our own model class with the weights of a stock Llama and its settings."""
    shape = {key: getattr(model.config, key) for key in SHAPE}
    named = {"block_size": 4, "num_blocks": 3, "gated": False, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
    twin = SSAForCausalLM(SSAConfig(**shape, rope_theta=10000.0, **{**named, **changes}))
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Ids from 3 up: no special token."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor, **keywords: Any) -> Tensor:
    """Of an inference pass."""
    with torch.no_grad():
        return model(ids, **keywords).logits
