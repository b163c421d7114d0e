"""Loading a model folder: local files, safetensors only, no code from the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ssa.errors import CheckpointError, ConfigError
from ssa.model.configuration import SSAConfig
from ssa.model.modeling import SSAForCausalLM

# Keys that would make transformers import or fetch code, or choose an attention behind our back.
REFUSED_KEYS = ("auto_map", "custom_pipelines", "_attn_implementation_internal", "_attn_implementation_autoset")


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> SSAForCausalLM:
    """Load an :class:`SSAForCausalLM` from a folder that ``save_pretrained`` or ``ssa train`` wrote.

    Args:
        path: a model folder, or a run folder that holds ``model/``.
        device: where to put it.
        dtype: convert the weights; None keeps the stored dtype.

    Raises:
        ConfigError: not a folder, or a configuration that is not ours.
        CheckpointError: missing or unreadable weights, pickled weights, tensors that do not fit, non-finite weights.
    """
    folder = _model_folder(Path(path))
    config = _read_config(folder)
    if not any(folder.glob("*.safetensors")):
        pickled = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth")]
        got = f"only {pickled[0]}" if pickled else "no weights"
        raise CheckpointError(str(folder), got, "safetensors weights", "saving the model with save_pretrained")
    try:
        # transformers would initialise what is missing or misshapen and go on; its report is judged below
        loaded: Any = SSAForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(str(folder), str(error).splitlines()[0], "weights of this configuration") from error
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(name if isinstance(name, str) else name[0] for name in report.get(kind) or ()):
            raise CheckpointError(
                str(folder),
                f"{len(names)} {kind.replace('_', ' ')}: {', '.join(names[:5])}",
                "every tensor of the model",
            )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"{folder}: tensor {name}", "non-finite values", "finite weights")
    return model.to(device).eval()


def read_config(path: str | Path) -> SSAConfig:
    """The configuration in a model folder or run folder, without its weights; errors as :func:`load_model`."""
    return _read_config(_model_folder(Path(path)))


def _model_folder(path: Path) -> Path:
    return path / "model" if (path / "model" / "config.json").is_file() else path


def _read_config(folder: Path) -> SSAConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(str(folder), "no config.json", "a model folder or a run folder with model/")
    try:
        values: dict[str, Any] = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(str(file), f"unreadable JSON ({error})", "a model configuration") from error
    if not isinstance(values, dict) or values.get("model_type") != SSAConfig.model_type:
        got = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise ConfigError(str(file), f"model_type {got!r}", repr(SSAConfig.model_type))
    if refused := [key for key in REFUSED_KEYS if key in values]:
        raise ConfigError(f"{file}: {refused[0]}", "a key that chooses code", "its absence", "removing the key")
    return SSAConfig.from_dict(values)
