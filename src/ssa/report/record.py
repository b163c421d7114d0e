"""A study as one small JSON file, for a repository: every piece's figures, what they share said once.

A study can go on from the file on another machine: its pieces count as done, and the report reads them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ssa.errors import ConfigError, DataError
from ssa.report.build import write_file
from ssa.report.fields import Fields, parse_json, read_text
from ssa.report.results import EVALUATION_SCHEMA, MAJOR

SCHEMA_NAME, SCHEMA_MAJOR = "ssa.study-record", 1
JOB = ("scale", "changes", "brief")
SHARED = ("machine", "commit", "data")
NEEDLE = ("mode", "form", "length", "scaling", "chance")
SUITE = ("sliding", "words", "rules")
DIGITS = 9  # significant


def study_record(folder: Path) -> dict[str, Any]:
    """Pieces, calls and job of the study in ``folder``. Left out: selection maps, layers, needles by depth."""
    pieces: list[Any] = []
    shared: dict[str, list[Any]] = defaultdict(list)
    for file in sorted((folder / "pieces").glob("*/piece.json")):
        piece: Any = parse_json(read_text(file), str(file))
        source = file.parent / "evaluation.json"
        if source.is_file():
            evaluation: Any = parse_json(read_text(source), str(source))
            piece["evaluation"] = _compact(evaluation)
            for key in SHARED:
                if evaluation.get(key) not in shared[key]:
                    shared[key].append(evaluation.get(key))
                if index := shared[key].index(evaluation.get(key)):
                    piece["evaluation"][key] = index
        pieces.append(piece)
    calls = folder / "calls.jsonl"
    job: Any = parse_json(read_text(folder / "job.json"), "job.json") if (folder / "job.json").is_file() else {}
    return {
        "schema": f"{SCHEMA_NAME}/{SCHEMA_MAJOR}",
        "command": "ssa reproduce --report --record",
        "job": {key: job.get(key) for key in JOB},
        "calls": [parse_json(line, str(calls)) for line in read_text(calls).splitlines()] if calls.is_file() else [],
        **shared,
        "pieces": pieces,
    }


def write_record(folder: Path, path: Path) -> None:
    """Write the record of the study in ``folder`` to ``path``, a line for each piece."""
    record = _rounded(study_record(folder))
    pieces = ",\n  ".join(json.dumps(piece, separators=(",", ":")) for piece in record.pop("pieces"))
    text = f'{json.dumps(record, indent=1)[:-2]},\n "pieces": [\n  {pieces}\n ]\n}}\n'
    write_file(path, text.encode())


def _compact(evaluation: dict[str, Any]) -> dict[str, Any]:
    suite = evaluation.get("suite") or {}
    cells: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for x in suite.get("needle", ()):
        cells[tuple(x.get(key) for key in NEEDLE)].append(x["likelihood"])
    needle = [
        {name: x for name, x in zip(NEEDLE, key, strict=True) if x is not None} | {"likelihood": sum(v) / len(v)}
        for key, v in cells.items()
    ]
    return {
        "model": evaluation["model"],
        "runs": evaluation["runs"],
        "attention": [{k: v for k, v in x.items() if k != "layers"} for x in evaluation.get("attention", ())],
        **{key: suite[key] for key in SUITE if suite.get(key)},
        **({"suite_attention": suite["attention"]} if suite.get("attention") else {}),
        **({"needle": needle} if needle else {}),
    }


def restore_record(record: Path, folder: Path) -> int:
    """Write the pieces, calls and job of a record into ``folder``; a piece that is there already stays as it is.

    Returns:
        How many pieces were written.

    Raises:
        ConfigError: a file that is no record, or one of other pieces than those in ``folder``.
        DataError: a damaged one.
    """
    document: Any = parse_json(read_text(record), str(record))
    Fields(document, str(record)).require_schema(SCHEMA_NAME, SCHEMA_MAJOR)
    try:
        files = _files(document)
        job = {key: document["job"][key] for key in JOB}
        calls = [json.dumps(call) for call in document["calls"]]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise DataError(str(record), f"{type(error).__name__}: {error}", "a file that --record wrote") from error
    if (source := folder / "job.json").is_file():
        here: Any = parse_json(read_text(source), str(source))
        if (there := {key: here.get(key) for key in JOB}) != job:
            raise ConfigError(str(record), f"pieces of {job}", f"{there}, as in {folder}", "another --out")
    else:
        write_file(source, _dump({**job, "data": "", "out": str(folder), "seeds": None, "only": []}))
    new = {name: contents for name, contents in files.items() if not (folder / "pieces" / name / "piece.json").exists()}
    for name, contents in new.items():
        for file, content in contents.items():
            write_file(folder / "pieces" / name / file, _dump(content))
    ledger = folder / "calls.jsonl"
    known = read_text(ledger).splitlines() if ledger.is_file() else []
    write_file(ledger, "".join(f"{line}\n" for line in dict.fromkeys([*calls, *known])).encode())
    return len(new)


def _files(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Contents by name of the files of every piece; the one that says that it is done comes last."""
    found = {}
    for piece in document["pieces"]:
        name = f"{piece['variant']}-seed{piece['seed']}"
        if not re.fullmatch(r"[\w-]+", name):
            raise KeyError(name)
        evaluation = piece.pop("evaluation", None)
        files = {"evaluation.json": _expanded(evaluation, document)} if evaluation else {}
        found[name] = {**files, "piece.json": piece}
    return found


def _expanded(evaluation: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """An evaluation as the report reads it, from a record's."""
    suite = {key: evaluation[key] for key in (*SUITE, "needle") if key in evaluation}
    return {
        "schema": f"{EVALUATION_SCHEMA}/{MAJOR}",
        "command": _study_command(**document["job"]),
        **{key: document[key][evaluation.get(key, 0)] for key in SHARED},
        **{key: evaluation[key] for key in ("model", "runs", "attention")},
        "suite": {**suite, "attention": evaluation.get("suite_attention", [])},
    }


def _study_command(scale: str, changes: dict[str, Any], brief: bool) -> str:
    """What trained the pieces of such a job, without variants, seeds and places."""
    values = "".join(f" {key}={value}" for key, value in changes.items())
    return f"ssa reproduce --scale {scale}{' --brief' * brief}{values and f' --set{values}'}"


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _rounded(value: Any) -> Any:
    """Floats with as many digits as they are worth."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
