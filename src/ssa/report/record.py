"""A study as one small JSON file, for a repository: every piece's figures, what they share said once."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ssa.report.fields import parse_json, read_text

SCHEMA = "ssa.study-record/1"
SHARED = ("machine", "commit", "data")
DIGITS = 6  # significant


def study_record(folder: Path) -> dict[str, Any]:
    """Pieces, calls and job of the study in ``folder``. Left out: selection maps, layers, needles by depth."""
    pieces: list[Any] = []
    shared: dict[str, list[Any]] = defaultdict(list)
    for file in sorted((folder / "pieces").glob("*/piece.json")):
        piece: Any = parse_json(read_text(file), str(file))
        source = file.parent / "evaluation.json"
        if source.is_file():
            evaluation: Any = parse_json(read_text(source), str(source))
            for key in SHARED:
                if evaluation.get(key) not in shared[key]:
                    shared[key].append(evaluation.get(key))
            piece["evaluation"] = _compact(evaluation)
        pieces.append(piece)
    calls = folder / "calls.jsonl"
    job: Any = parse_json(read_text(folder / "job.json"), "job.json") if (folder / "job.json").is_file() else {}
    return {
        "schema": SCHEMA,
        "command": "ssa reproduce --report --record",
        "job": {key: job.get(key) for key in ("scale", "changes", "brief")},
        "calls": [parse_json(line, str(calls)) for line in read_text(calls).splitlines()] if calls.is_file() else [],
        **shared,
        "pieces": pieces,
    }


def record_text(folder: Path) -> str:
    """The record as JSON, a line for each piece."""
    record = _rounded(study_record(folder))
    pieces = ",\n  ".join(json.dumps(piece, separators=(",", ":")) for piece in record.pop("pieces"))
    return f'{json.dumps(record, indent=1)[:-2]},\n "pieces": [\n  {pieces}\n ]\n}}\n'


def _compact(evaluation: dict[str, Any]) -> dict[str, Any]:
    suite = evaluation.get("suite") or {}
    cells: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for x in suite.get("needle", ()):
        cells[x["mode"], x["form"], x["length"], x["scaling"]].append(x["likelihood"])
    needle = [
        dict(zip(("mode", "form", "length", "scaling"), key, strict=True)) | {"likelihood": sum(v) / len(v)}
        for key, v in cells.items()
    ]
    return {
        "model": evaluation["model"],
        "runs": evaluation["runs"],
        "attention": [{k: v for k, v in x.items() if k != "layers"} for x in evaluation.get("attention", ())],
        **{key: suite[key] for key in ("sliding", "words", "rules") if suite.get(key)},
        **({"suite_attention": suite["attention"]} if suite.get("attention") else {}),
        **({"needle": needle} if needle else {}),
    }


def _rounded(value: Any) -> Any:
    """Floats with as many digits as they are worth."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
