"""Experiment trackers behind one small interface: TensorBoard, Weights & Biases, trackio.

Every run writes ``metrics.jsonl`` anyway; a tracker gets the same numbers for its own pages. None needs an account or
the network: TensorBoard and W&B write into the run's folder (W&B offline, unless ``WANDB_MODE`` says otherwise;
``wandb sync`` sends it later), trackio into its local database (``trackio show``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from ssa.errors import MissingDependencyError

Tracker = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "ssa"


class Sink(Protocol):
    """One place that records go to. A record is a flat mapping with ``event``; numbers are Python's."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record."""

    def close(self) -> None:
        """No more records."""


def open_trackers(names: Sequence[Tracker], folder: Path, run: str, start_step: int = 0) -> list[Sink]:
    """One sink for each name.

    Args:
        names: which trackers.
        folder: folder of the run.
        run: name of the run in the tracker's pages; a resumed run appears under the same name again.
        start_step: last step before this process; TensorBoard drops what lies after it.

    Raises:
        MissingDependencyError: a package that is not installed; the message has the line that installs it.
    """
    found: list[Sink] = []
    for name in names:
        try:
            if name == "tensorboard":
                found.append(TensorBoard(folder / "tensorboard", start_step))
            elif name == "wandb":
                found.append(WeightsAndBiases(folder, run))
            else:
                found.append(Trackio(run))
        except ImportError as error:
            where, got = f"training.trackers: {name}", f"no package {name} ({error})"
            raise MissingDependencyError(where, got, "it installed", f"pip install {name}") from None
    return found


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step or validation record as ``train/KEY`` and ``valid/cross_entropy/MODE``; else none."""
    if record["event"] == "step":
        return {f"train/{key}": value for key, value in record.items() if isinstance(value, float)}
    if record["event"] == "validation":
        return {f"valid/cross_entropy/{record['mode']}": record["cross_entropy"]}
    return {}


class TensorBoard:
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, path: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(path), purge_step=start_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add the record's scalars."""
        for key, value in scalars(record).items():
            self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """A run in project ``ssa``, offline in ``RUN/wandb`` unless ``WANDB_MODE`` is set."""

    def __init__(self, folder: Path, run: str) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=run, dir=str(folder), mode=mode, settings=settings
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the record's scalars; W&B itself joins what one step logs twice."""
        if found := scalars(record):
            self._run.log(found, step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackio:
    """A run in the local project ``ssa``."""

    def __init__(self, run: str) -> None:
        import trackio

        self._run: Any = trackio.init(
            project=PROJECT, name=run, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the record's scalars."""
        if found := scalars(record):
            self._run.log(found, step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
