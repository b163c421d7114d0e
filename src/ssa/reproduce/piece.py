"""One piece: train a variant with one seed, evaluate it, keep the results."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ssa.data.loader import PackedDataset
from ssa.errors import NumericError, SSAError
from ssa.evaluate import evaluate, run_facts, write_result
from ssa.model import load_model
from ssa.reproduce.plan import Piece, Scale
from ssa.train.loop import train
from ssa.train.world import resolve_device

SCHEMA = "ssa.piece/1"
RESULT, EVALUATION, ERROR = "piece.json", "evaluation.json", "error.txt"
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
KEPT_MIB = 64  # largest model that is kept


@dataclass(frozen=True)
class Result:
    """What became of a piece; ``piece.json``.

    Attributes:
        variant, seed, role: as in :class:`Piece`.
        overrides: what differs from the scale's recipe.
        status: ``finished``; ``diverged``: training met non-finite numbers and stopped, which is a result; ``failed``:
            anything else, which is tried again by the next call.
        message: of the error.
        train_seconds, evaluate_seconds: wall time.
    """

    variant: str
    seed: int
    role: str
    overrides: dict[str, Any]
    status: str
    message: str | None
    train_seconds: float
    evaluate_seconds: float

    @property
    def is_done(self) -> bool:
        """Whether the piece need not be done again."""
        return self.status in (FINISHED, DIVERGED)


def read_result(folder: Path) -> Result | None:
    """The result in a piece's folder, if it has one."""
    file = folder / RESULT
    if not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    values.pop("schema")
    return Result(**values)


def run_piece(piece: Piece, scale: Scale, data: Path, folder: Path, device: str) -> Result:
    """Train and evaluate ``piece`` in ``folder``; its result is written last, so a killed piece has none.

    Raises:
        KeyboardInterrupt: training was stopped by a signal; it goes on from its checkpoint next time.
    """
    status, message, began, trained = FINISHED, None, time.perf_counter(), 0.0
    try:
        _train(piece, data, folder, device)
        trained = time.perf_counter() - began
        _evaluate(piece, scale, data, folder, device)
    except NumericError as error:
        status, message = DIVERGED, str(error)
    except SSAError as error:
        status, message = FAILED, str(error)
    except Exception as error:  # the other pieces must go on; the traceback is kept
        status, message = FAILED, f"{type(error).__name__}: {error}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
    trained = trained or time.perf_counter() - began
    seconds = time.perf_counter() - began - trained
    result = Result(piece.variant, piece.seed, piece.role, piece.overrides, status, message, trained, seconds)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{RESULT}.tmp"
    temporary.write_text(json.dumps({"schema": SCHEMA, **asdict(result)}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / RESULT)
    if result.is_done:
        _tidy(piece, folder)
    gc.collect()  # modules hold each other in cycles; the next piece needs the memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def _train(piece: Piece, data: Path, folder: Path, device: str) -> None:
    if (folder / "model" / "config.json").is_file():
        return  # trained by an earlier call that was stopped before the evaluation was done
    resume = any((folder / "checkpoints").glob("step-*"))
    if folder.exists() and not resume:
        shutil.rmtree(folder)
    outcome = train(piece.load(str(data), device), folder, resume="latest" if resume else None)
    if outcome.reason != FINISHED:
        raise KeyboardInterrupt(outcome.reason)


def _evaluate(piece: Piece, scale: Scale, data: Path, folder: Path, device: str) -> None:
    model = load_model(folder, device=resolve_device(device))
    dataset = PackedDataset(data, "valid")
    began = time.perf_counter()

    def say(what: str) -> None:  # the log of a worker shows where its time goes
        print(f"  {time.perf_counter() - began:6.1f} s: {what}", flush=True)

    say("model and data are open")
    result = evaluate(model, dataset, piece.plan(scale), facts=run_facts(folder), command=piece.command(scale), say=say)
    say("evaluated")
    write_result(result, folder / EVALUATION)


def _tidy(piece: Piece, folder: Path) -> None:
    """Keep results; of weights only the core methods' first seed, in bf16, if small."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    weights = folder / "model"
    if not weights.is_dir():
        return
    size = sum(file.stat().st_size for file in weights.iterdir()) / 2 / 2**20
    if piece.role != "core" or piece.seed != 0 or size > KEPT_MIB:
        shutil.rmtree(weights)
        return
    load_model(weights, dtype=torch.bfloat16).save_pretrained(weights)
