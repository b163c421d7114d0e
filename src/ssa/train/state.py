"""What a checkpoint knows beside weights and moments, and whether a recipe may go on from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssa.errors import CheckpointError, ConfigError, DataSourceError
from ssa.train.checkpoint import read_document
from ssa.train.recipe import Recipe, flatten

STATE = "state.json"

#: Keys that a resumed run may change: they move the end, the logs, the machine or the folder, not what is learnt.
MAY_DIFFER = frozenset(
    {
        *("name", "output", "data.path", "model.inference_mode", "model.weights"),
        *(
            f"training.{key}"
            for key in (
                *("steps", "tokens", "micro_batch_rows", "activation_checkpointing", "compile", "device", "log_every"),
                *("validate_every", "validate_rows", "checkpoint_every", "keep_checkpoints", "trackers", "tensorboard"),
                *("shard", "reshard", "spike_factor", "timeout_seconds"),
            )
        ),
    }
)


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands after an optimiser step.

    Attributes:
        step: optimiser steps done.
        tokens: tokens read, padding included.
        seconds: time spent training, over all resumptions.
        skipped: steps left out because of non-finite numbers; skipped_in_row: of these, the last ones without a gap.
        losses: of the last steps, oldest first (see :mod:`ssa.train.spikes`).
        data: the loader's state.
        data_fingerprint: identity of the training rows.
        recipe: the resolved recipe as plain values.
    """

    step: int
    tokens: int
    seconds: float
    skipped: int
    skipped_in_row: int
    losses: list[float]
    data: dict[str, Any]
    data_fingerprint: str
    recipe: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def read_state(checkpoint: Path) -> TrainingState:
    """The state of a verified checkpoint.

    Raises:
        CheckpointError: fields that this version does not know, or lacks.
    """
    values = read_document(checkpoint, STATE)
    names = {item.name for item in dataclasses.fields(TrainingState)}
    if set(values) != names:
        got = f"fields {', '.join(sorted(values))}"
        raise CheckpointError(str(checkpoint / STATE), got, f"fields {', '.join(sorted(names))}")
    return TrainingState(**values)


def check_resumable(state: TrainingState, recipe: Recipe, fingerprint: str, checkpoint: Path) -> None:
    """Refuse to go on with another model, optimiser, seed or data than the checkpoint's.

    Raises:
        CheckpointError: the recipe differs; the message lists the fields.
        DataSourceError: the data changed.
        ConfigError: the recipe ends before the checkpoint.
    """
    before, now = flatten(state.recipe), flatten(recipe.to_dict())
    differing = [key for key in sorted(before | now) if before.get(key) != now.get(key) and key not in MAY_DIFFER]
    if differing:
        got = ", ".join(f"{key} = {now.get(key)!r}" for key in differing)
        expected = ", ".join(f"{key} = {before.get(key)!r}" for key in differing)
        raise CheckpointError(f"resuming from {checkpoint}", got, f"the checkpoint's {expected}", "a new --out")
    if fingerprint != state.data_fingerprint:
        raise DataSourceError(
            f"{recipe.data.path} (resuming from {checkpoint})",
            f"data with fingerprint {fingerprint}",
            f"the data trained on so far, {state.data_fingerprint}",
        )
    if recipe.steps < state.step:
        raise ConfigError("training", f"{recipe.steps} steps", f"at least the {state.step} of {checkpoint}")
