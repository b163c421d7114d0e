"""The folder of a run: who may write to it, which checkpoint it goes on from, and what it holds at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssa.data.lock import LOCK, folder_lock
from ssa.errors import CheckpointError, ConfigError
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.train.checkpoint import (
    find_latest,
    list_checkpoints,
    remove_leftovers,
    set_aside,
    verify_checkpoint,
)
from ssa.train.disk import disk_errors

LATEST = "latest"  # value of --resume without a path


@dataclass(frozen=True)
class RunFolder:
    """A locked run folder.

    Attributes:
        path: the folder.
        start: verified checkpoint to go on from; None for a new run.
        notes: what the user must hear about the choice of ``start``.
    """

    path: Path
    start: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / "metrics.jsonl"

    @property
    def continues(self) -> bool:
        """True if ``start`` is one of this folder's own checkpoints, so that its metrics go on too."""
        return self.start is not None and self.start.resolve().parent == self.checkpoints.resolve()


@contextmanager
def open_run(path: Path, resume: str | Path | None) -> Iterator[RunFolder]:
    """Lock the folder of a run and find where it goes on from.

    Args:
        path: created if needed; must be empty unless it is resumed.
        resume: None to start anew; ``"latest"`` for the folder's newest valid checkpoint, falling back with a note
            where a newer one is damaged; a path for exactly that checkpoint, which may belong to another run if
            ``path`` is empty.

    Raises:
        ConfigError: the folder is in use, or not empty and not resumed.
        CheckpointError: nothing valid to resume from.
        DiskError: the folder is not writable.
    """
    if resume is not None and str(resume) != LATEST:
        verify_checkpoint(_checkpoint_path(Path(resume)))  # before anything is created
    elif resume is not None and not path.is_dir():
        raise CheckpointError(str(path), "no such folder", "the folder of the run to resume")
    with _locked(path):
        empty = all(item.name == LOCK for item in path.iterdir())
        if resume is None:
            if not empty:
                raise ConfigError(
                    str(path), "a folder that is not empty", "a new or empty one", "--resume, or other --out"
                )
            yield RunFolder(path)
        elif str(resume) == LATEST:
            yield _latest(RunFolder(path))
        else:
            folder = RunFolder(path, Path(resume))
            if not (folder.continues or empty):
                raise ConfigError(str(path), "another run's folder", f"an empty one, or the run of {resume}")
            yield folder


def _checkpoint_path(path: Path) -> Path:
    inside = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if inside:
        raise CheckpointError(str(path), "a folder of checkpoints", "one checkpoint", f"--resume {inside[-1]}")
    return path


def _latest(folder: RunFolder) -> RunFolder:
    path, errors = find_latest(folder.checkpoints)
    notes = tuple(f"damaged checkpoint left out: {error}" for error in errors)
    if path is None:
        found = "; ".join(str(error) for error in errors) or "no checkpoint"
        raise CheckpointError(str(folder.checkpoints), found, "a valid one", "another --out, to start anew")
    return RunFolder(folder.path, path, notes)


def clear_way(folder: RunFolder) -> list[str]:
    """Remove what a killed save left, and rename checkpoints newer than ``start``, whose steps will be written again.

    Returns:
        Notes for the user on what was renamed.
    """
    if not folder.continues or folder.start is None:
        return []
    remove_leftovers(folder.checkpoints)
    newer = [path for path in list_checkpoints(folder.checkpoints) if path.name > folder.start.name]
    why = "damaged" if folder.notes else "superseded"
    return [f"{path.name} renamed to {set_aside(path, why).name}" for path in newer]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with ExitStack() as stack:
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder_lock(path))
        yield


def export_model(config: SSAConfig, tensors: Mapping[str, Tensor], data: Path, folder: RunFolder) -> None:
    """Write ``RUN/model``, a transformers folder with the data's tokenizer; it appears whole or not at all.

    Args:
        tensors: whole weights by name, tied ones once.

    Raises:
        DiskError: the disk cannot be written.
    """
    target, temporary = folder.path / "model", folder.path / ".temporary-model"
    with torch.device("meta"):
        model = SSAForCausalLM(config)
    model.load_state_dict(dict(tensors), strict=False, assign=True)  # not strict: tied weights come once
    model.tie_weights()
    with disk_errors(target):
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        if (data / "tokenizer").is_dir():
            shutil.copytree(data / "tokenizer", temporary, dirs_exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
