"""The whole study: workers on every GPU, what they have done so far, and what a call may expect to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from ssa.data.loader import PackedDataset
from ssa.data.lock import folder_lock
from ssa.errors import ConfigError
from ssa.reproduce.piece import Result, read_result
from ssa.reproduce.plan import SCALES
from ssa.reproduce.worker import CLAIMS, PIECES, UNUSABLE, Job, work

JOB, LOGS, CALLS = "job.json", "logs", "calls.jsonl"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Study:
    """A call of ``ssa reproduce``.

    Attributes:
        job: what to do.
        gpus: GPUs to use; 0: the CPU.
        workers_per_gpu: processes on each.
    """

    job: Job
    gpus: int
    workers_per_gpu: int = 1

    def __post_init__(self) -> None:
        if self.job.scale not in SCALES:
            raise ConfigError("scale", repr(self.job.scale), f"one of {', '.join(SCALES)}")
        available = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not 0 <= self.gpus <= available:
            raise ConfigError("gpus", self.gpus, f"0 (the CPU) to {available}, the GPUs of this machine")
        if self.workers_per_gpu < 1:
            raise ConfigError("workers_per_gpu", self.workers_per_gpu, "at least 1")
        PackedDataset(self.job.data, "valid")  # refuses what is no prepared data before anything starts

    @property
    def devices(self) -> list[str]:
        """The device of each worker."""
        if not self.gpus:
            return ["cpu"]
        return [f"cuda:{n % self.gpus}" for n in range(self.gpus * self.workers_per_gpu)]

    def estimate(self) -> tuple[int, float]:
        """Pieces still to do, and expected seconds: as the finished ones took, else the scale's own estimate."""
        results = {f"{r.variant}-seed{r.seed}": r for r in self.job.done()}
        todo = [piece for piece in self.job.pieces() if piece.name not in results]
        took = [r.train_seconds + r.evaluate_seconds for r in results.values()]
        each = sum(took) / len(took) if took else SCALES[self.job.scale].seconds
        return len(todo), each * len(todo) / len(self.devices)


@dataclass(frozen=True)
class Progress:
    """A piece that has just been done, and how many are."""

    result: Result
    done: int
    total: int


def run_study(study: Study, on_piece: Callable[[Progress], None] = lambda progress: None) -> list[Result]:
    """Do what is not done yet; returns all results there are.

    Claims that are found belong to processes that are gone, because the folder is locked; they are removed.
    """
    out = Path(study.job.out)
    for name in (PIECES, LOGS):
        (out / name).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(folder_lock(out))
        stack.callback(_record_call, out / CALLS, study, time.time(), len(study.job.done()))
        _check_same(out / JOB, study.job)
        shutil.rmtree(out / CLAIMS, ignore_errors=True)
        (out / CLAIMS).mkdir()
        study.job.write(out / JOB)
        watch = _Watch(study.job, on_piece)
        if len(study.devices) == 1:
            work(study.job, study.devices[0], watch.look)
        else:
            _run_workers(study, out, watch)
        watch.look()
    return study.job.results()


def _record_call(file: Path, study: Study, began: float, before: int) -> None:
    """Add what this call cost to the study's record, also if it was stopped."""
    call = {
        "began": datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - began, 1),
        "gpus": study.gpus,
        "workers": len(study.devices),
        "pieces": len(study.job.done()) - before,
    }
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(call) + "\n")


def _check_same(file: Path, job: Job) -> None:
    """Refuse to put pieces of different kinds into one study."""
    if not file.is_file():
        return
    before = Job.read(file)
    for name in ("scale", "changes", "brief"):
        old, new = getattr(before, name), getattr(job, name)
        if old != new and job.results():
            raise ConfigError(str(file), f"{name} {old} and now {new}", "one kind of pieces", "another --out")


class _Watch:
    """Tells of each piece that is done since the start."""

    def __init__(self, job: Job, on_piece: Callable[[Progress], None]) -> None:
        self.job, self.on_piece, self.pieces = job, on_piece, job.pieces()
        self.before = {piece.name for piece in self.pieces if self._is_done(read_result(job.folder(piece)))}
        self.told: set[str] = set()

    @staticmethod
    def _is_done(result: Result | None) -> bool:
        return result is not None and result.is_done

    def look(self) -> None:
        claims = Path(self.job.out) / CLAIMS
        for piece in self.pieces:
            if piece.name in self.told or not (claims / piece.name).exists():
                continue
            started = (claims / piece.name).stat().st_mtime
            file = self.job.folder(piece) / "piece.json"
            result = read_result(self.job.folder(piece))
            if result is None or file.stat().st_mtime < started:
                continue  # still at work; what is there is an earlier failure
            self.told.add(piece.name)
            self.on_piece(Progress(result, len(self.before | self.told), len(self.pieces)))


def _run_workers(study: Study, out: Path, watch: _Watch) -> None:
    """One process per device until all have ended; one whose GPU context broke is replaced."""
    with ExitStack() as stack:
        logs = [stack.enter_context((out / LOGS / f"worker-{n}.log").open("w")) for n in range(len(study.devices))]

        def start(number: int) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "ssa.reproduce.worker", str(out / JOB), study.devices[number]]
            return subprocess.Popen(command, stdout=logs[number], stderr=subprocess.STDOUT)

        processes = [start(number) for number in range(len(study.devices))]
        try:
            while any(process.poll() is None for process in processes):
                time.sleep(POLL_SECONDS)
                watch.look()
                for number, process in enumerate(processes):
                    if process.poll() == UNUSABLE:
                        processes[number] = start(number)
        except BaseException:
            for process in processes:
                process.terminate()
            raise
    broken = [number for number, process in enumerate(processes) if process.returncode not in (0, UNUSABLE)]
    if broken and len(broken) == len(processes):
        logs_of = ", ".join(str(out / LOGS / f"worker-{number}.log") for number in broken)
        raise ConfigError("ssa reproduce", "workers that ended with an error", "running ones", f"reading {logs_of}")
