"""A model folder with a tokenizer, small enough for every test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))  # `import tiny`


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``ours`` and ``stock`` (a Llama): two layers, random weights, the same tokenizer of 300 tokens."""
    import torch
    from tiny import tiny_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from ssa.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([Path(__file__).read_text()], 300)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    ours = tiny_model(vocab_size=300, max_position_embeddings=256, **ids)
    values = {key: getattr(ours.config, key) for key in SHAPE}
    torch.manual_seed(2)
    found = {}
    for name, model in (("ours", ours), ("stock", LlamaForCausalLM(LlamaConfig(**values, **ids)))):
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
