"""A model small enough for every test."""

from typing import Any

import torch

from ssa.model import SSAConfig, SSAForCausalLM

VOCABULARY = 97


def tiny_config(**changes: Any) -> SSAConfig:
    """Two layers, 4 query heads on 2 KV heads, blocks of 4 tokens, 3 blocks per query."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "block_size": 4,
        "num_blocks": 3,
    }
    return SSAConfig(**{**values, **changes})


def tiny_model(**changes: Any) -> SSAForCausalLM:
    """Weights wide enough (std 0.3) that attention is far from uniform, so leaks and wrong blocks show."""
    torch.manual_seed(1)
    model = SSAForCausalLM(tiny_config(**changes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random ids from 1 up; 0 is left for padding."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
