"""A study: the pieces that ``ssa reproduce`` has done, by variant and seed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ssa.errors import ConfigError
from ssa.report.fields import Fields, parse_json, read_text
from ssa.report.results import Evaluation, read_evaluation, read_metrics
from ssa.report.runs import METHODS, Group, Run, group_runs

SCHEMA, MAJOR = "ssa.piece", 1
STATES = ("finished", "diverged", "failed")
ROLES = ("core", "fraction", "ablation")
Measure = Callable[[Evaluation], float]


@dataclass(frozen=True)
class PieceResult:
    """One piece. ``run`` is there if it finished.

    Attributes:
        variant, seed, role, status, message, overrides: as ``piece.json`` has them.
        train_seconds, evaluate_seconds: wall time.
    """

    variant: str
    seed: int
    role: str
    status: str
    message: str
    overrides: tuple[tuple[str, str], ...]
    train_seconds: float
    evaluate_seconds: float
    run: Run | None


@dataclass(frozen=True)
class Call:
    """A call of ``ssa reproduce``: when it began, how long it took, on how many GPUs and processes."""

    began: str
    seconds: float
    gpus: int
    workers: int
    pieces: int


@dataclass(frozen=True)
class Study:
    """All pieces in a folder, and the calls that made them."""

    pieces: tuple[PieceResult, ...]
    calls: tuple[Call, ...] = ()

    def of(self, variant: str) -> list[PieceResult]:
        """The pieces of a variant, by seed; failed ones are no result."""
        found = (piece for piece in self.pieces if piece.variant == variant and piece.status != "failed")
        return sorted(found, key=lambda piece: piece.seed)

    def values(self, variant: str, measure: Measure) -> dict[int, float]:
        """A measure by seed; only where it is a finite number."""
        found = {p.seed: measure(p.run.evaluation) for p in self.of(variant) if p.run and p.run.evaluation}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def variants(self, role: str) -> list[str]:
        """Variants of a role: the core methods in the paper's order, others by name, numbers in it as numbers."""
        found = {piece.variant for piece in self.pieces if piece.role == role and piece.status != "failed"}
        known = [*METHODS]
        return sorted(found, key=lambda name: (known.index(name) if name in known else len(known), _natural(name)))

    @cached_property
    def core(self) -> list[Group]:
        """The core methods as groups, for tables and figures."""
        return group_runs([piece.run for piece in self.pieces if piece.role == "core" and piece.run])

    @property
    def seconds(self) -> float:
        """Wall time of all pieces together."""
        return math.fsum(piece.train_seconds + piece.evaluate_seconds for piece in self.pieces)

    @property
    def gpu_seconds(self) -> float:
        """Wall time of all calls times their GPUs, whatever those were busy with."""
        return math.fsum(call.seconds * call.gpus for call in self.calls)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorting key: alpha-5 before alpha-40, and p-025 between p-0 and p-075."""
    return [(int(part), "") if part.isdigit() and part[0] != "0" else (0, part) for part in re.split(r"[-x]", name)]


def read_study(folder: Path) -> Study:
    """Read a folder that ``ssa reproduce`` wrote.

    Raises:
        ConfigError: no finished piece in it.
        DataError: a damaged result file.
    """
    files = sorted((folder / "pieces").glob("*/piece.json"))
    if not files:
        raise ConfigError(str(folder), "no finished piece", "a folder of `ssa reproduce`", "ssa reproduce --data DATA")
    return Study(tuple(_read_piece(file) for file in files), tuple(_read_calls(folder / "calls.jsonl")))


def _read_calls(file: Path) -> list[Call]:
    """The calls, oldest first; none where the file is not there."""
    found = []
    for number, line in enumerate(read_text(file).splitlines() if file.is_file() else (), 1):
        fields = Fields(parse_json(line, f"{file}:{number}"), f"{file}:{number}")
        counts = (fields.count(name) for name in ("gpus", "workers", "pieces"))
        found.append(Call(fields.text("began"), fields.number("seconds"), *counts))
    return found


def _read_piece(file: Path) -> PieceResult:
    fields = Fields(parse_json(read_text(file), str(file)), str(file))
    fields.require_schema(SCHEMA, MAJOR)
    status = fields.choice("status", STATES)
    run = None
    if status == "finished":
        metrics = file.parent / "metrics.jsonl"
        run = Run(
            read_evaluation(file.parent / "evaluation.json"),
            read_metrics(metrics) if metrics.exists() else None,
        )
    return PieceResult(
        variant=fields.text("variant"),
        seed=fields.count("seed"),
        role=fields.choice("role", ROLES),
        status=status,
        message=fields.text_or_none("message") or "",
        overrides=fields.described("overrides"),
        train_seconds=fields.number("train_seconds"),
        evaluate_seconds=fields.number("evaluate_seconds"),
        run=run,
    )
