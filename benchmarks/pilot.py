"""Which learning rate and batch suit a scale: a few calls of ``ssa reproduce`` side by side on one GPU.

    python benchmarks/pilot.py DATA --out OUT [--seconds 220] [--call "--brief --only ssa --set KEY=VALUE ..."]...

Each call runs in a process and a folder of its own. Prints held-out perplexity in both modes, tokens per second and the
share of the time in which the GPU was busy, and writes the same to ``OUT/pilot.json``. A call that is not done in time
is stopped and shown as far as it came.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ssa.environment import commit, machine

STEP = "--set training.rows_per_step={0} training.micro_batch_rows={0} optimizer.learning_rate={1}"
CALLS = (
    "--only ssa nsa --seeds 0 " + STEP.format(16, "2e-3"),  # evaluated wholly: the log shows where time goes
    *("--brief --only ssa full --seeds 0 " + STEP.format(4, rate) for rate in ("5e-4", "1e-3", "2e-3")),
)


def command(given: argparse.Namespace, call: str, out: Path) -> list[str]:
    """The call of ``ssa reproduce`` with what all calls share."""
    shared = ["--scale", given.scale, "--data", str(given.data), "--out", str(out), "--gpus", str(given.gpus)]
    return [sys.executable, "-m", "ssa", "reproduce", *shared, "--seconds", str(given.seconds), *call.split()]


def run_all(given: argparse.Namespace, folders: list[Path]) -> list[float]:
    """Run all calls at once; returns the samples of the GPU's busy share in percent."""
    began, busy = time.monotonic(), []
    with ExitStack() as stack:
        calls = []
        for call, folder in zip(given.call, folders, strict=True):
            log = stack.enter_context((given.out / f"{folder.name}.log").open("w"))
            calls.append(subprocess.Popen(command(given, call, folder), stdout=log, stderr=subprocess.STDOUT))
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        query.append(f"--id={os.environ.get('CUDA_VISIBLE_DEVICES', '0').partition(',')[0]}")
        while any(call.poll() is None for call in calls) and time.monotonic() - began < given.seconds:
            time.sleep(2)
            if given.gpus:
                answer = subprocess.run(query, capture_output=True, text=True, check=False)
                busy += [float(answer.stdout)] if answer.stdout.strip().isdigit() else []
        for call in calls:
            call.terminate()
        for call in calls:
            call.wait()
    return busy


def read(folder: Path, call: str) -> list[dict[str, Any]]:
    """What there is of each piece in a folder."""
    found = []
    for piece in sorted(folder.glob("pieces/*")):
        row: dict[str, Any] = {"call": call, "piece": piece.name}
        for name in ("piece", "evaluation"):
            file = piece / f"{name}.json"
            values = json.loads(file.read_text()) if file.is_file() else {}
            keys = ("status", "message", "train_seconds", "evaluate_seconds") if name == "piece" else ()
            row |= {key: values.get(key) for key in keys}
            row |= {str(r["receptive_field"]): r["perplexity"] for r in values.get("runs", ())}
        lines = (piece / "metrics.jsonl").read_text().splitlines() if (piece / "metrics.jsonl").is_file() else []
        events = [json.loads(line) for line in lines]
        steps = [e for e in events if e["event"] == "step"]
        if steps:
            row["step"] = steps[-1]["step"]
            row["cross_entropy"] = statistics.fmean(e["cross_entropy"] for e in steps[-5:])
            row["tokens_per_second"] = statistics.median(e["tokens_per_second"] for e in steps[len(steps) // 3 :])
        found.append(row)
    return found


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    show = lambda key, form: format(row[key], form) if row.get(key) is not None else "-"  # noqa: E731
    fields = [key for key in row if key.isdigit()]
    sparse = "  ".join(f"RF {key} {row[key]:.2f}" for key in fields)
    loss = f"training loss {show('cross_entropy', '.3f')} at step {show('step', 'd')}"
    speed = f"{show('tokens_per_second', ',.0f')} tokens/s"
    took = f"trained {show('train_seconds', '.0f')} s  evaluated {show('evaluate_seconds', '.0f')} s"
    perplexity = f"full {show('None', '.2f')}  {sparse or '-'}"
    return f"{row['piece']:<12} {row['call']}\n    {perplexity}  {loss}  {speed}  {took}  {row.get('message') or ''}"


def main() -> int:
    """Exit code 1 if no piece was finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", default="small")
    parser.add_argument("--seconds", type=float, default=220)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--call", action="append", help="flags of ssa reproduce, a process each; default: three rates")
    given = parser.parse_args()
    given.call = given.call or list(CALLS)
    given.out.mkdir(parents=True, exist_ok=True)
    folders = [given.out / f"call-{number}" for number in range(len(given.call))]
    busy = run_all(given, folders)
    rows = [row for folder, call in zip(folders, given.call, strict=True) for row in read(folder, call)]
    facts = {"command": shlex.join(["python", *sys.argv]), "commit": commit(), "machine": machine()}
    result = {"schema": "ssa.pilot/1", **facts, "busy_percent": busy, "rows": rows}
    (given.out / "pilot.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(map(line, rows)))
    if busy:
        print(f"GPU busy, % of each two seconds: {' '.join(f'{x:.0f}' for x in busy)}")
    return int(not any(row.get("status") == "finished" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
