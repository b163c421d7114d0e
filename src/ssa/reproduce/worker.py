"""A process that takes piece after piece: the next one that no other process has claimed, while there is time.

Started as ``python -m ssa.reproduce.worker JOB.json DEVICE``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ssa.reproduce.piece import Result, read_result, run_piece
from ssa.reproduce.plan import SCALES, Piece, pieces

PIECES, CLAIMS = "pieces", "claims"
UNUSABLE = 3  # exit code of a process whose GPU context is broken


@dataclass(frozen=True)
class Job:
    """What all workers of a call share.

    Attributes:
        scale: name of the scale; data: prepared data; out: folder of the study.
        seeds, only: see :func:`ssa.reproduce.pieces`.
        deadline: seconds since the epoch after which no piece should run; None: none.
        changes, brief: see :class:`ssa.reproduce.Piece`.
    """

    scale: str
    data: str
    out: str
    seeds: tuple[int, ...] | None = None
    only: tuple[str, ...] = ()
    deadline: float | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    brief: bool = False

    def pieces(self) -> list[Piece]:
        """The pieces in order of importance."""
        return pieces(SCALES[self.scale], self.seeds, self.only, self.changes, self.brief)

    def folder(self, piece: Piece) -> Path:
        """Where a piece's results are."""
        return Path(self.out) / PIECES / piece.name

    def results(self) -> list[Result]:
        """Results that there are."""
        return [found for piece in self.pieces() if (found := read_result(self.folder(piece)))]

    def done(self) -> list[Result]:
        """Results of pieces that need not be done again."""
        return [result for result in self.results() if result.is_done]

    def write(self, path: Path) -> None:
        """Write it for the workers."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read what :meth:`write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["seeds"] = values["seeds"] and tuple(values["seeds"])
        return cls(**{**values, "only": tuple(values["only"])})


def claim(job: Job, piece: Piece) -> bool:
    """Take a piece, or learn that it is taken or done. Creating a file that must not exist is atomic."""
    found = read_result(job.folder(piece))
    if found is not None and found.is_done:
        return False
    try:
        handle = os.open(Path(job.out) / CLAIMS / piece.name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.write(handle, f"{os.getpid()}\n".encode())
    os.close(handle)
    return True


def work(job: Job, device: str, on_result: Callable[[], None] = lambda: None) -> bool:
    """Do pieces until none is left, or none would be finished by the deadline.

    Returns:
        False if a piece left the GPU unusable for this process; another process may go on.
    """
    scale = SCALES[job.scale]
    took: dict[str, list[float]] = defaultdict(list)  # by recipe: NSA takes several times what the others take
    first = True
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # kernels are launched on the current device
    for piece in job.pieces():
        expected = max(took[piece.recipe][-3:], default=scale.seconds)
        if job.deadline is not None and time.time() + expected > job.deadline:
            continue
        if not claim(job, piece):
            continue
        began = time.perf_counter()
        result = run_piece(piece, scale, Path(job.data), job.folder(piece), device)
        seconds = time.perf_counter() - began
        if result.is_done and not first:  # the first also compiled this process's kernels
            took[piece.recipe].append(seconds)
        first = False
        print(f"{piece.name}: {result.status} after {seconds:.1f} s {result.message or ''}", flush=True)
        on_result()
        if not result.is_done and not _usable(device):
            return False
    return True


def _usable(device: str) -> bool:
    """Whether the GPU still answers: after some errors every later call of the process fails."""
    if not device.startswith("cuda"):
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main(argv: Sequence[str]) -> int:
    """Entry of the process."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for library in ("HF_HUB", "HF_DATASETS"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    return 0 if work(Job.read(Path(argv[0])), argv[1]) else UNUSABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
