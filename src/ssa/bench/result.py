"""The result file of a run (``ssa.bench/1``) and its table."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssa.bench.runner import Options, Record, add_ratios, run_entry
from ssa.bench.suites import suite
from ssa.environment import commit, machine
from ssa.errors import InputError

SCHEMA = "ssa.bench/1"


def header(name: str, command: str) -> dict[str, Any]:
    """Schema, time, command, commit and machine."""
    facts = machine()
    versions = facts["packages"]
    where = facts["gpu"] or facts["processor"]
    facts["driver"] = _driver()
    facts["cudnn"] = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    facts["label"] = f"{where}, torch {versions['torch']}, triton {versions['triton']}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "schema": SCHEMA, "suite": name, "created": created, "command": command, "commit": commit(), "machine": facts,
    }  # fmt: skip


def _driver() -> str | None:
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(question, capture_output=True, text=True, timeout=10).stdout.split("\n")[0] or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def load_peers(targets: Sequence[str]) -> dict[str, Callable[..., Tensor]]:
    """Functions named ``module:function``."""
    found: dict[str, Callable[..., Tensor]] = {}
    for target in targets:
        module, _, function = target.partition(":")
        try:
            found[target] = getattr(import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError("ssa bench --peer", repr(target), "an importable module:function", str(error)) from error
    return found


def run(name: str, command: str, options: Options, peers: Sequence[str] = ()) -> dict[str, Any]:
    """Run a suite. The result has one record per case; those that failed say why instead of a time."""
    result = header(name, command)
    if name == "generate":
        from ssa.bench.generation import run as run_generation  # imports the model, which the operations need not

        return {**result, "cases": run_generation(options), "skipped": []}
    functions = load_peers(peers)
    cases: list[Record] = []
    for entry in suite(name, functions):
        cases += run_entry(entry, options)
    add_ratios(cases)
    result["cases"] = cases
    result["skipped"] = [] if peers else ["peers (fla, the official SSA operation): no --peer was given"]
    return result


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def table(result: dict[str, Any]) -> Any:
    """The cases as a table of ``rich``."""
    from rich.table import Table

    found = Table(title=f"{result['suite']}: {result['machine']['label']}", title_justify="left")
    for column, justify in (
        ("workload", "left"), ("inputs", "left"), ("operation", "left"), ("backend", "left"), ("ms", "right"),
        ("wall", "right"), ("vs full", "right"), ("worst error / limit", "right"),
    ):  # fmt: skip
        found.add_column(column, justify=justify, no_wrap=column == "ms")  # type: ignore[arg-type]
    for case in result["cases"]:
        work = case["workload"]
        cells = [work["name"], work["inputs"], f"{case['family']} {case['direction']}", case["backend"]]
        ratio = f"{case['ratio']['value']:.2f}x" if "ratio" in case else ""
        if case["status"] == "ok":
            timing = case["timing"]
            error, limit = max(case["check"]["errors"].values(), key=lambda e: e[0] / e[1] if e[1] else e[0])
            cells += [f"{timing['median']:.3f}", f"{timing['wall']:.3f}", ratio, f"{error:.1e} / {limit:.1e}"]
        elif case["status"] == "estimate":
            cells += [f"{case['estimate_ms']:.3f}", "", ratio, "estimate"]
        else:
            cells += [case["status"], "", "", case["reason"][:60]]
        found.add_row(*cells)
    return found
