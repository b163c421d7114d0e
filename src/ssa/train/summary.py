"""A recipe's size as text, before anything is built: steps, tokens, parameters, memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ssa.errors import ConfigError
from ssa.model import SSAConfig
from ssa.train.build import open_dataset
from ssa.train.cost import GIB, Memory, count_parameters, estimate_memory
from ssa.train.recipe import Recipe
from ssa.train.recipe_file import dump_recipe

PROCESSES = (1, 2, 4, 8, 16, 32, 64)


def summarise(recipe: Recipe) -> str:
    """The resolved recipe with the size of its model and of its training. Builds no weights, writes nothing."""
    return f"{dump_recipe(recipe)}\n{describe_size(recipe)}"


def describe_size(recipe: Recipe) -> str:
    """Steps, tokens, parameters, and estimated memory by number of GPUs."""
    prepared = Path(recipe.data.path).is_dir()
    vocabulary = open_dataset(recipe, "train").vocab_size if prepared else None
    config, parameters = None, "unknown until the data is prepared (model.vocab_size is not given)"
    if recipe.model.vocab_size or vocabulary:
        config = recipe.model_config(vocabulary)
        parameters = f"{count_parameters(config):,}"
    lines = [
        f"parameters       {parameters}",
        f"steps            {recipe.steps:,} ({recipe.warmup_steps:,} of them warm-up)",
        f"tokens per step  {recipe.tokens_per_step:,}",
        f"tokens           {recipe.steps * recipe.tokens_per_step:,}",
        f"data             {recipe.data.path}{'' if prepared else ' (not there yet: ssa prepare)'}",
    ]
    return "\n".join([*lines, *(_memory_table(recipe, config) if config else [])])


def _memory_table(recipe: Recipe, config: SSAConfig) -> list[str]:
    """Estimated GiB on each GPU; numbers of GPUs over which the step cannot be split are left out."""
    names = [item.name for item in dataclasses.fields(Memory)]
    lines = ["", "estimated GiB on each GPU", "  ".join(f"{name:>11}" for name in ("GPUs", *names, "total"))]
    for processes in PROCESSES:
        try:
            memory = estimate_memory(recipe, config, processes)
        except ConfigError:
            continue
        values = [*dataclasses.asdict(memory).values(), memory.total]
        lines.append("  ".join([f"{processes:>11}", *(f"{value / GIB:>11.2f}" for value in values)]))
    return lines
