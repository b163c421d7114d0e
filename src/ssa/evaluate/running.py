"""How a model runs while it is measured: mode, budget, selection rule, precision, and positions beyond its training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ssa.errors import ConfigError
from ssa.model import SSAForCausalLM

Scaling = Literal["none", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class Setting:
    """How to run the model: full, or sparse with a budget. ``rule`` None keeps the model's selection rule."""

    mode: str
    block_size: int
    num_blocks: int | None = None
    rule: str | None = None

    @property
    def receptive_field(self) -> int | None:
        """Tokens a query may read; None for full attention."""
        return None if self.num_blocks is None else self.block_size * self.num_blocks

    def facts(self) -> dict[str, str | int | None]:
        """Mode and receptive field, for a line of a result file."""
        return {"mode": self.mode, "receptive_field": self.receptive_field}


@contextmanager
def running(model: SSAForCausalLM, setting: Setting) -> Iterator[None]:
    """Run ``model`` in a setting inside a ``with``: evaluation mode, no gradient, bf16 autocast on a GPU.

    Raises:
        ConfigError: a setting that the model has not (full mode of an NSA model, an impossible budget).
    """
    model.eval()
    rule = model.config.selection_rule
    mode = model.attention_mode(setting.mode, num_blocks=setting.num_blocks, block_size=setting.block_size)
    try:
        # before the mode, so that rule and budget are checked together
        model.config.selection_rule = setting.rule or rule
        with torch.no_grad(), mode, precision(model):
            yield
    finally:
        model.config.selection_rule = rule


def precision(model: SSAForCausalLM) -> AbstractContextManager[object]:
    """bf16 autocast on a GPU, as in training; the stored precision elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if model.device.type == "cuda" else nullcontext()


@contextmanager
def stretched(model: SSAForCausalLM, length: int, scaling: Scaling = "none") -> Iterator[str]:
    """Let ``model`` read documents of ``length`` tokens; yields the scaling that is applied.

    Nothing changes for documents that fit. For longer ones positions go on (``"none"``), or RoPE is stretched by
    ``length / trained length`` in one of transformers' ways.

    Raises:
        ConfigError: an unknown way, or a model whose RoPE is scaled already.
    """
    if scaling not in get_args(Scaling):
        raise ConfigError("scaling", repr(scaling), f"one of {get_args(Scaling)}")
    trained = int(model.config.max_position_embeddings)
    if length <= trained:
        yield "none"
        return
    before = model.model.rotary_emb
    try:
        model.config.max_position_embeddings = length
        if scaling != "none":
            model.model.rotary_emb = _rotary(model, length, trained, scaling)
        yield scaling
    finally:
        model.config.max_position_embeddings = trained
        model.model.rotary_emb = before


def _rotary(model: SSAForCausalLM, length: int, trained: int, scaling: Scaling) -> LlamaRotaryEmbedding:
    rope = dict(model.config.rope_parameters or {})
    if rope.get("rope_type", "default") != "default":
        raise ConfigError("scaling", f"{scaling} on RoPE of type {rope['rope_type']!r}", "unscaled RoPE", "none")
    rope |= {"rope_type": scaling, "factor": length / trained}
    if scaling in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = trained
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = copy.deepcopy(model.config)
    config.rope_parameters = rope
    return LlamaRotaryEmbedding(config).to(model.device)
