"""From a recipe to what a run needs: data, validation rows, configuration and model."""

from __future__ import annotations

import torch

from ssa.data import Batch, Loader, PackedDataset
from ssa.errors import ConfigError
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.model.loading import load_model
from ssa.train.recipe import Recipe
from ssa.train.tensors import load_model_tensors, model_tensors


def open_dataset(recipe: Recipe, split: str) -> PackedDataset:
    """Open a split of the recipe's data.

    Raises:
        ConfigError: rows of another length, or a larger vocabulary, than the recipe says.
        DataError: no prepared data there.
    """
    dataset = PackedDataset(recipe.data.path, split)
    if dataset.row_length != recipe.data.row_length:
        raise ConfigError("data.row_length", recipe.data.row_length, f"{dataset.row_length}, as in {recipe.data.path}")
    if recipe.model.vocab_size is not None and dataset.vocab_size > recipe.model.vocab_size:
        expected = f"at least the {dataset.vocab_size} ids of {recipe.data.path}"
        raise ConfigError("model.vocab_size", recipe.model.vocab_size, expected)
    return dataset


def read_validation_rows(recipe: Recipe) -> list[Batch]:
    """The first rows of the valid split, as micro-batches; none if the recipe does not validate."""
    training = recipe.training
    if not training.validate_every:
        return []
    dataset = open_dataset(recipe, "valid")
    return list(Loader(dataset, training.micro_batch_rows, shuffle=False, epochs=1, limit=training.validate_rows))


def check_split(recipe: Recipe, processes: int) -> None:
    """Raise :class:`ConfigError` if a step's rows cannot be dealt out to ``processes`` in equal micro-batches."""
    rows, micro = recipe.training.rows_per_step, recipe.training.micro_batch_rows
    if rows % processes:
        raise ConfigError("training.rows_per_step", rows, f"a multiple of the {processes} processes")
    share = rows // processes
    if share % micro:
        factors = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        expected = f"a divisor of the {share} rows of each of {processes} processes: {factors}"
        raise ConfigError("training.micro_batch_rows", micro, expected)


def configure(recipe: Recipe, dataset: PackedDataset) -> SSAConfig:
    """The model's configuration, with the special tokens of the data's tokenizer, which generation needs."""
    config = recipe.model_config(dataset.vocab_size)
    tokenizer = dataset.tokenizer()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    return config


def build_model(config: SSAConfig, seed: int, weights: str | None = None) -> SSAForCausalLM:
    """A model on the CPU, so that its weights are the same for any device.

    Args:
        seed: of the random initial weights.
        weights: model or run folder to take the weights from instead.

    Raises:
        ConfigError, CheckpointError: the folder holds no model, or one of another shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SSAForCausalLM(config)
    if weights is not None:
        load_model_tensors(model, model_tensors(load_model(weights, dtype=torch.float32)), weights)
    return model


def recompute_activations(model: SSAForCausalLM) -> None:
    """Keep no activations inside the layers but attention's; the backward pass computes the rest again.

    Outputs, log-sum-exps and selected blocks stay, so that no attention is computed twice.
    """
    for layer in model.model.layers:
        layer.recomputes = True


def compile_layers(model: SSAForCausalLM) -> None:
    """Compile everything whose graph is the same for every batch: all but the attention operations.

    Those follow the documents of a batch, so their graph would be compiled again and again.
    """
    model.compiled = True
    model.model.norm.compile(dynamic=False)
    for layer in model.model.layers:
        layer.compiled = True
