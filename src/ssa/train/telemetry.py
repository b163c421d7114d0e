"""What a run says while it trains: metrics.jsonl always, trackers if asked, progress on the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ssa.train.disk import disk_errors
from ssa.train.trackers import Sink

SCHEMA = "ssa.metrics/1"


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the records after ``step`` and a half-written last line, so that a resumed run repeats no step."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break  # the process was killed while it wrote this line
        if record.get("step", 0) <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".temporary")
    with disk_errors(path):
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)


class MetricsFile:
    """JSON lines, appended; numbers that JSON cannot hold (NaN, infinity) become null."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with disk_errors(path):
            self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        with disk_errors(self._path):
            self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Bring the lines to the disk; before a checkpoint that claims to follow them."""
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class PlainProgress:
    """One line per record, for logs."""

    def __init__(self, steps: int, out: IO[str]) -> None:
        self._steps, self._out = steps, out

    def advance(self, step: int) -> None:
        """Nothing: only records are lines."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Print the record."""
        line = describe(record, self._steps)
        if line:
            print(line, file=self._out, flush=True)

    def close(self) -> None:
        """Nothing to close."""


class TerminalProgress:
    """A progress bar with the last losses beside it."""

    def __init__(self, steps: int, start_step: int, console: Console) -> None:
        self._steps = steps
        whole = Column(no_wrap=True)  # a narrow terminal shortens the text at the end, not the counts
        counts = (MofNCompleteColumn(table_column=whole), TimeRemainingColumn(table_column=Column(no_wrap=True)))
        text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._progress = Progress(BarColumn(bar_width=20), *counts, text, console=console)
        self._task = self._progress.add_task("", total=steps, completed=start_step)
        self._progress.start()

    def advance(self, step: int) -> None:
        """Show that a step was queued; the device may still be at it."""
        self._progress.update(self._task, completed=step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Step records move the text beside the bar, other events are lines above it."""
        line = describe(record, self._steps)
        if record["event"] == "step":
            text = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
            self._progress.update(self._task, description=text)
        elif line:
            self._progress.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


class Telemetry:
    """Sends each record to every sink; silent without a metrics file, as on all ranks but the first."""

    def __init__(self, metrics: Path | None, steps: int, start_step: int, trackers: Sequence[Sink] = ()) -> None:
        self._sinks: list[Sink] = []
        self._metrics: MetricsFile | None = None
        self._progress: PlainProgress | TerminalProgress | None = None
        if metrics is None:
            return
        self._metrics = MetricsFile(metrics)
        console = Console(stderr=True)
        plain = PlainProgress(steps, sys.stderr)
        self._progress = TerminalProgress(steps, start_step, console) if console.is_terminal else plain
        self._sinks += [self._metrics, self._progress, *trackers]

    def record(self, event: str, **values: Any) -> None:
        """Write one record: an event with its values."""
        for sink in self._sinks:
            sink.write({"event": event, **values})

    def start(self, **values: Any) -> None:
        """The first record of a metrics file."""
        self.record("start", schema=SCHEMA, **values)

    def advance(self, step: int) -> None:
        """Move the progress bar; costs no synchronisation."""
        if self._progress is not None:
            self._progress.advance(step)

    def sync(self) -> None:
        """Bring the metrics to the disk."""
        if self._metrics is not None:
            self._metrics.sync()

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def say(message: str) -> None:
    """A line for the user that is no metric."""
    print(message, file=sys.stderr, flush=True)


def describe(record: Mapping[str, Any], steps: int) -> str:
    """A record as one line of text; empty where there is nothing to tell."""
    event, step = record["event"], record.get("step")
    if event == "step":
        parts = [f"step {step}/{steps}", f"{record['stream']:<6}", f"loss {record['loss']:.4f}"]
        parts.append(f"cross-entropy {record['cross_entropy']:.4f}")
        if record["alignment"] is not None:
            parts.append(f"alignment {record['alignment']:.2e}  sparsity {record['attention_sparsity']:.3f}")
        parts.append(f"lr {record['learning_rate']:.2e}  {record['tokens_per_second']:,.0f} tokens/s")
        return "  ".join(parts)
    if event == "validation":
        perplexity = math.exp(min(record["cross_entropy"], 700.0))
        return f"step {step}/{steps}  validation, {record['mode']}: perplexity {perplexity:.2f}"
    if event == "skip":
        return f"step {step}/{steps}  LEFT OUT: loss or gradient is not finite"
    if event == "spike":
        return f"step {step}/{steps}  SPIKE: loss {record['loss']:.4f}, median before {record['median']:.4f}"
    if event == "resume":
        return f"resuming after step {step}"
    if event == "end":
        return f"end after step {step}: {record['reason']} ({record['seconds']:.0f} s of training)"
    return f"{record['name']}: {record['method']}, {record['parameters']:,} parameters" if event == "start" else ""


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return value
