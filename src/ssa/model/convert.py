"""Checkpoints from one form to another: shard by shard, verified after writing, there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ssa._version import __version__
from ssa.errors import CheckpointError, ConfigError, DiskError
from ssa.model.configuration import SSAConfig
from ssa.model.families import (
    is_official,
    official_config,
    official_tensor,
    plain_config,
    translate_config,
    translate_tensor,
)
from ssa.model.interface.settings import FIELDS, NAME, PREFIX, SAVED_KEY, Settings, attention_mode
from ssa.model.loading import check_finite, check_fit, empty_model, load_model, model_folder, read_config_file
from ssa.model.weights import INDEX, SINGLE, Weights, open_weights

Target = Literal["ssa", "stock", "plain", "official"]
SCHEMA, RECORD = "ssa.conversion/1", "conversion.json"
CHECKED_TOKENS = 64
# Beside config and weights: what a tokenizer and generation need, and the licence.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "*.model",
)
Change = Callable[[str, Tensor], Tensor | None]


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        folder: the new model folder; its ``conversion.json`` holds the SHA-256 of each file of weights.
        tensors, parameters: how many.
        difference: largest difference between the logits before and after on random tokens in full mode, float32;
            None where it was not measured.
        scale: largest logit there.
    """

    folder: Path
    tensors: int
    parameters: int
    difference: float | None = None
    scale: float | None = None


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    to: Target = "ssa",
    official: bool = False,
    check: bool = True,
    download: bool = False,
    **settings: Any,
) -> Conversion:
    """Write a checkpoint in another form. The source is only read.

    Args:
        source: model folder, run folder, or the name of a hub repository in the local cache.
        out: folder to write; must not exist, or be empty.
        to: ``"ssa"``: our model class, ungated for a stock checkpoint, the same function in full mode.
            ``"stock"``: the same architecture with ``attn_implementation: "ssa"`` in its configuration.
            ``"plain"``: an ungated model of ours as Llama, Qwen2 or Qwen3, for software that does not know ours.
            ``"official"``: a gated model of ours in the form of the published checkpoints.
        official: insist that the source is a published checkpoint (``llama-nsa``).
        check: compare the logits before and after in full mode, with both models in memory one after the other.
        download: allow fetching the hub repository.
        settings: keys of :class:`SSAConfig` (``"stock"``: of :class:`ssa.model.interface.Settings`).

    Raises:
        ConfigError: a source that has no such form, or an output folder in use.
        CheckpointError: weights that cannot be read, do not fit, or compute something else afterwards.
        DiskError: the disk is full or not writable.
    """
    folder, target = model_folder(_find(str(source), download)), Path(out)
    values = read_config_file(folder)
    if official and not is_official(values):
        raise ConfigError(str(folder), f"model_type {values['model_type']!r}", "'llama-nsa', a published checkpoint")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(str(target), "something there already", "a new or empty folder")
    weights = open_weights(folder)
    config, change = _plan(values, folder, weights, to, settings)
    temporary = target.with_name(f".temporary-{target.name}")
    with _disk_errors(target):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            written = _write(weights, config, change, temporary, {"source": str(source), "to": to})
            difference = _difference(folder, temporary, config["vocab_size"], settings) if check else None
            if target.exists():
                target.rmdir()
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Conversion(target, *written, *(difference or (None, None)))


def _find(source: str, download: bool) -> Path:
    """A folder as it is; else a repository in the hub's cache."""
    if Path(source).exists():
        return Path(source)
    wanted = ["*.json", "*.safetensors", *COMPANIONS]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted, local_files_only=not download))
    except (OSError, ValueError) as error:  # the hub's errors derive from these
        hint = None if download else "--download, or a folder"
        raise ConfigError(source, "no such folder, nor a cached hub repository", "a model", hint) from error


def _plan(
    values: dict[str, Any], folder: Path, weights: Weights, to: Target, settings: dict[str, Any]
) -> tuple[dict[str, Any], Change]:
    """The new ``config.json``, and what happens to each tensor. Everything is checked before anything is written."""
    where = str(folder / "config.json")
    if to == "stock":
        if values["model_type"] in (SSAConfig.model_type,) or is_official(values):
            raise ConfigError(where, f"model_type {values['model_type']!r}", "a stock architecture", "--to plain")
        if unknown := sorted(settings.keys() - set(FIELDS)):
            raise ConfigError(unknown[0], "a setting that --to stock does not have", f"one of {', '.join(FIELDS)}")
        keys = {f"{PREFIX}{name}": value for name, value in vars(Settings(**{"mode": "full", **settings})).items()}
        return {**values, SAVED_KEY: NAME, **keys}, lambda name, tensor: tensor
    config = translate_config(values, where, **settings)
    check_fit(empty_model(config), weights, is_official(values))

    def ours(name: str, tensor: Tensor) -> Tensor | None:
        return translate_tensor(name, tensor, config, is_official(values))

    if to == "ssa":
        return {**config.to_dict(), "architectures": ["SSAForCausalLM"]}, ours
    if to == "plain":
        return plain_config(config, where), ours

    def published(name: str, tensor: Tensor) -> Tensor | None:
        found = ours(name, tensor)
        return None if found is None else official_tensor(name, found, config)

    return official_config(config, where), published


# ---------------------------------------------------------------------- writing
def _write(
    weights: Weights, config: dict[str, Any], change: Change, folder: Path, facts: dict[str, str]
) -> tuple[int, int]:
    """Weights, configuration, companions and the record; counts of tensors and parameters."""
    index: dict[str, str] = {}
    parameters, size, hashes = 0, 0, {}
    for number, (file, names) in enumerate(weights.shards.items(), 1):
        with weights.open(file) as shard:
            changed = ((name, change(name, shard.get_tensor(name))) for name in names)
            tensors = {name: tensor.contiguous() for name, tensor in changed if tensor is not None}
        if not tensors:
            continue
        for name, tensor in tensors.items():
            check_finite(name, tensor, str(file))
        single = len(weights.shards) == 1
        name = SINGLE if single else f"model-{number:05d}-of-{len(weights.shards):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        _verify(folder / name, tensors)
        hashes[name] = _hash(folder / name)
        index |= dict.fromkeys(tensors, name)
        parameters += sum(tensor.numel() for tensor in tensors.values())
        size += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "config.json", config)
    if len(weights.shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": index})
    for pattern in COMPANIONS:
        for file in sorted(weights.folder.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    _write_json(folder / RECORD, {"schema": SCHEMA, "version": __version__, **facts, "sha256": hashes})
    return len(index), parameters


def _verify(file: Path, tensors: dict[str, Tensor]) -> None:
    """Read back what was written, and flush it to the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    written = load_file(file)
    for name, tensor in tensors.items():
        if written[name].dtype != tensor.dtype or not written[name].equal(tensor):
            raise CheckpointError(f"{file}: {name}", "other values than were written", "the same", "another disk")


def _hash(file: Path) -> str:
    digest = sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _disk_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskError):
            raise
        full = "a full disk" if error.errno == errno.ENOSPC else str(error)
        raise DiskError(str(where), full, "room and the right to write there") from error


# ---------------------------------------------------------------------- the check
@torch.no_grad()
def _difference(folder: Path, made: Path, vocabulary: int, settings: dict[str, Any]) -> tuple[float, float]:
    """Largest difference of the logits in full mode, and the largest logit; NSA has only its sparse mode."""
    ids = torch.randint(0, vocabulary, (1, CHECKED_TOKENS), generator=torch.Generator().manual_seed(0))
    before, after = _logits(folder, ids, settings), _logits(made, ids, {})
    difference, scale = float((after - before).abs().max()), float(before.abs().max())
    if difference > 1e-4 * max(scale, 1.0):
        raise CheckpointError(str(made), f"logits that differ by {difference:.2g} from {folder}", "the same function")
    return difference, scale


def _logits(folder: Path, ids: Tensor, settings: dict[str, Any]) -> Tensor:
    values = read_config_file(folder)
    if values["model_type"] == SSAConfig.model_type or is_official(values):
        model: Any = load_model(folder, dtype=torch.float32, **{**settings, "selection_rule": "exact"})
        with model.attention_mode(None if model.config.method == "nsa" else "full"):
            return model(ids).logits
    stock = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
    ).eval()
    if stock.config._attn_implementation != NAME:
        return stock(ids).logits
    with attention_mode(stock, "full"):
        return stock(ids).logits
