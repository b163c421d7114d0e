"""The metrics file and the lines on the terminal."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ssa.train.telemetry import MetricsFile, PlainProgress, Telemetry, TerminalProgress, describe, truncate_metrics

STEP: dict[str, Any] = {
    "event": "step",
    "step": 3,
    "stream": "full",
    "loss": 2.5,
    "cross_entropy": 2.25,
    "alignment": 0.025,
    "attention_sparsity": 0.5,
    "learning_rate": 1e-3,
    "tokens_per_second": 1234.5,
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "m.jsonl")
    metrics.write({"event": "step", "loss": math.nan, "layers": [1.0, math.inf], "inner": {"x": -math.inf}})
    metrics.close()
    assert lines(tmp_path / "m.jsonl") == [{"event": "step", "loss": None, "layers": [1.0, None], "inner": {"x": None}}]


def test_truncation_keeps_what_the_checkpoint_has_seen(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    records = [
        {"event": "start"},
        *({"event": "step", "step": n} for n in range(1, 7)),
        {"event": "validation", "step": 4},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"event": "step", "st')
    truncate_metrics(path, 4)
    assert [r.get("step") for r in lines(path)] == [None, 1, 2, 3, 4, 4]
    assert path.read_text().endswith("\n")
    truncate_metrics(path, 0)
    assert lines(path) == [{"event": "start"}]
    assert list(tmp_path.iterdir()) == [path]


def test_records_are_on_disk_as_soon_as_they_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = Telemetry(tmp_path / "m.jsonl", steps=9, start_step=0)
    telemetry.start(name="x", method="ssa", seed=0, parameters=1000)
    telemetry.record(**STEP)
    assert [r["event"] for r in lines(tmp_path / "m.jsonl")] == ["start", "step"]
    assert lines(tmp_path / "m.jsonl")[0]["schema"] == "ssa.metrics/1"
    telemetry.close()
    shown = capsys.readouterr().err
    assert "x: ssa, 1,000 parameters" in shown
    assert "step 3/9" in shown


def test_plain_lines_hold_the_losses() -> None:
    out = io.StringIO()
    progress = PlainProgress(9, out)
    progress.write(STEP)
    progress.write(STEP | {"alignment": None, "attention_sparsity": None, "loss": math.nan})
    first, second = out.getvalue().splitlines()
    assert "loss 2.5000" in first
    assert "sparsity 0.500" in first
    assert "alignment" not in second
    assert "loss nan" in second


def test_a_narrow_terminal_shows_bar_counts_and_loss() -> None:
    out = io.StringIO()
    progress = TerminalProgress(9, 0, Console(file=out, force_terminal=True, width=80, color_system=None))
    progress.advance(3)
    progress.write(STEP)
    progress.write({"event": "validation", "step": 3, "mode": "full", "cross_entropy": 0.0})
    progress.close()
    shown = out.getvalue()
    assert "3/9" in shown
    assert "loss 2.5000  1,234 tokens/s" in shown
    assert "validation, full: perplexity 1.00" in shown


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"event": "validation", "step": 3, "mode": "sparse", "cross_entropy": 0.0}, "sparse: perplexity 1.00"),
        ({"event": "validation", "step": 3, "mode": "full", "cross_entropy": math.nan}, "perplexity nan"),
        ({"event": "skip", "step": 3}, "LEFT OUT"),
        ({"event": "resume", "step": 3}, "after step 3"),
        ({"event": "end", "step": 3, "seconds": 2.0, "reason": "SIGTERM"}, "SIGTERM"),
    ],
)
def test_other_events_are_told(record: dict[str, Any], text: str) -> None:
    assert text in describe(record, 9)
