"""Any model that runs our attention, set to one mode and one budget: what evaluation and serving ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from ssa.errors import CheckpointError
from ssa.model.configuration import SSAConfig
from ssa.model.families import OFFICIAL
from ssa.model.interface import configure
from ssa.model.loading import load_model, model_folder, read_config_file
from ssa.model.weights import open_weights


def open_model(
    path: str | Path,
    *,
    mode: str | None = None,
    num_blocks: int | None = None,
    block_size: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A local model in evaluation mode, with the given attention: ours, or a stock one of transformers, which gets
    ``attn_implementation="ssa"``.

    Args:
        path: model folder or run folder.
        mode: ``"full"`` or ``"sparse"``; None: what the configuration says.
        num_blocks: blocks per query of the sparse mode; block_size: tokens per block; None: the configuration's.
        device: where to put it.
        dtype: convert the weights; None keeps the stored dtype.

    Raises:
        ConfigError: not a model folder, a key that chooses code, an unknown mode, an impossible budget.
        CheckpointError: weights that cannot be read or do not fit.
    """
    folder = model_folder(path)
    model: Any = load_model(folder, device=device, dtype=dtype) if _is_ours(folder) else _stock(folder, dtype)
    return set_attention(model.to(device).eval(), mode=mode, num_blocks=num_blocks, block_size=block_size)


def set_attention(
    model: PreTrainedModel, *, mode: str | None = None, num_blocks: int | None = None, block_size: int | None = None
) -> PreTrainedModel:
    """Set mode and budget of an opened model until the next change; None leaves a value as it is.

    Raises:
        ConfigError: an unknown mode, an impossible budget, full mode of an NSA model.
    """
    wanted = {"num_blocks": num_blocks, "block_size": block_size}
    changes = {name: value for name, value in wanted.items() if value is not None}
    if not isinstance(model.config, SSAConfig):
        return configure(model, **changes, **({} if mode is None else {"mode": mode}))
    if num_blocks is not None:
        model.config.budgets = None  # an explicit budget holds for every layer
    for key, value in {**changes, **({} if mode is None else {"inference_mode": mode})}.items():
        setattr(model.config, key, value)
    model.config.check()
    return model


def attention_in_words(model: PreTrainedModel) -> str:
    """``"full attention"`` or ``"sparse attention, 16 blocks of 16 tokens"``."""
    config: Any = model.config
    if isinstance(config, SSAConfig):
        mode, blocks, size = config.inference_mode, config.budgets or config.num_blocks, config.block_size
        if mode == "sparse" and config.max_dropped_mass is not None:
            limit = f"dropped mass {config.max_dropped_mass:g} at most ({config.budget_flavour})"
            return f"sparse attention, {limit}, up to {blocks} blocks of {size} tokens"
    else:
        text = config.get_text_config()
        mode, blocks, size = text.ssa_mode, text.ssa_num_blocks, text.ssa_block_size
    return "full attention" if mode == "full" else f"sparse attention, {blocks} blocks of {size} tokens"


def _is_ours(folder: Path) -> bool:
    """Ours, or one of the published checkpoints, which becomes ours."""
    return read_config_file(folder)["model_type"] in (SSAConfig.model_type, OFFICIAL)


def _stock(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model of transformers; its weights must be there and whole, as for ours."""
    open_weights(folder)  # refuses other kinds of weights, and headers and indices that lie
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(str(folder), str(error).splitlines()[0], "a causal language model") from error
    model, report = loaded
    if missing := sorted(map(str, report.get("missing_keys") or ())):
        got = f"{len(missing)} missing keys: {', '.join(missing[:5])}"
        raise CheckpointError(str(folder), got, "every tensor of the model")
    return model
