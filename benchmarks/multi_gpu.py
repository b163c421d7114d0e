"""Training on two GPUs of one host, really run: scaling, checkpoints, a killed rank, equal losses.

    python benchmarks/multi_gpu.py --out DIR [--seconds 240] [--parts scaling resuming killing] [--tiny]

Needs no network: rows are made here. Parts run in the order given until the seconds are spent; what was not run is
said. After every piece of a part DIR/multi-gpu.json is written anew, and the rows `fsdp_equals_single` and
`scaling_1b_2gpu` of DIR/targets.json, so that a run that is cut keeps what it found. `--tiny` runs the same on two CPU
processes, to prove the script; it writes no targets.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from multi_gpu_jobs import (
    SAVE_AT,
    STEPS,
    Job,
    Setting,
    Steps,
    free_port,
    make_data,
    recorded,
    torchrun,
    worker,
)

from ssa.bench.result import header
from ssa.bench.targets import Target, one_line, update
from ssa.train.recipe_file import dump_recipe, load_recipe

LOSS_FLOOR, NORM_FLOOR = 2e-3, 1e-2  # relative; bfloat16 sums in another order. The limit of losses and gradient
# norms is this, or 3 times what splitting a step differently on one GPU changes
END_LIMIT = 60.0  # seconds in which a killed rank must have ended the others; more than the run's timeout
ROOMY = 120.0  # GiB of a GPU on which all runs of the equality fit at the same time
Add = Callable[[dict[str, Any]], None]  # takes a record, and writes all of them


# ---------------------------------------------------------------------- (a) scaling
def scaling(setting: Setting, add: Add) -> None:
    """Whole steps of FullAttn 1B at 8K, weights sharded, the same batch a GPU: on each alone, at the same time, since
    no two are equally fast; then on both."""
    for wave in ({"scaling-first": 0, "scaling-second": 1}, {"scaling-both": None}):
        jobs = {name: _timed(setting, name, gpu) for name, gpu in wave.items()}
        for name, job in jobs.items():
            if job.wait(90.0):
                add({"part": "scaling", **json.loads((setting.out / f"{name}.json").read_text())})


def _timed(setting: Setting, name: str, gpu: int | None) -> Job:
    size = 2 if gpu is None else 1
    rows = {
        "training.micro_batch_rows": 2,
        "training.rows_per_step": 2 * size,
        "data.row_length": setting.row_length,
    }
    rows |= {"training.precision": "fp32", "training.device": "cpu"} if setting.tiny else {}
    recipe, out = setting.out / f"{name}.yaml", setting.out / f"{name}.json"
    recipe.write_text(dump_recipe(load_recipe("quickstart/full" if setting.tiny else "1b/full", rows)))
    arguments = {"recipe_file": str(recipe), "out": str(out), "rounds": 3, "steps": 3}
    return worker(setting, name, size, "scaling", None if setting.tiny else gpu, **arguments)


# ---------------------------------------------------------------------- (b) checkpoints
def resuming(setting: Setting, add: Add) -> None:
    """A checkpoint of two processes, resumed on two and on one, against the run that was not interrupted."""
    changes = {} if setting.tiny else SMALL
    recipe = setting.recipe("saved", "300m", "ssa", training__checkpoint_every=SAVE_AT, **changes)
    train = ["-m", "ssa", "train", str(recipe), "--out"]
    Job(setting, "saved", torchrun(2, *train, str(setting.runs / "saved"))).wait(120.0)
    start = setting.runs / "saved" / "checkpoints" / f"step-{SAVE_AT:08d}"
    whole = recorded(setting.runs / "saved")
    if not start.is_dir():
        for size in (2, 1):
            late = setting.left() <= 0  # which proves nothing
            reason = "not enough time left" if late else "no checkpoint"
            add({"part": "resume", "processes": size, "equal": None if late else False, "reason": reason})
        return
    outs = {size: setting.runs / f"resumed-{size}" for size in (2, 1)}
    jobs = {
        size: Job(setting, f"resumed-{size}", torchrun(size, *train, str(out), "--resume", str(start)))
        for size, out in outs.items()
    }
    for size, out in outs.items():
        jobs[size].wait(90.0)
        steps = recorded(out)
        complete = sorted(steps) == list(range(SAVE_AT + 1, STEPS + 1)) and len(whole) == STEPS
        apart = furthest(steps, whole, "loss") if complete else None
        equal: bool | None = apart is not None and apart <= LOSS_FLOOR
        equal = equal and all(whole[n].stream == step.stream for n, step in steps.items())
        equal = None if apart is None and setting.left() <= 0 else equal
        record = {"part": "resume", "processes": size, "apart": apart, "limit": LOSS_FLOOR, "equal": equal}
        add(record | {"losses": {n: [whole[n].loss, step.loss] for n, step in steps.items() if n in whole}})


SMALL = {"model__num_hidden_layers": 4, "model__vocab_size": None}  # of the 300m recipe: checkpoints of a gigabyte


# ---------------------------------------------------------------------- (c) a killed rank
def killing(setting: Setting, add: Add) -> None:
    """SIGKILL rank 1 while it trains; the other must end by itself, say why, and the run must go on afterwards."""
    changes = {} if setting.tiny else SMALL
    recipe = setting.recipe(
        "killed", "300m", "ssa", training__steps=5000, training__checkpoint_every=5, training__timeout_seconds=50.0,
        optimizer__warmup_steps=2, **changes,
    )  # fmt: skip
    run = setting.runs / "killed"
    train = ["-m", "ssa", "train", str(recipe), "--out", str(run)]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [([sys.executable, *train], {**common, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(2)]
    job = Job(setting, "killed", ranks)  # without a launcher, which would end the other rank itself
    record: dict[str, Any] = {"part": "kill", "ended": False, "resumed": False}
    while job.whole and len(recorded(run)) < 7 and setting.left() > END_LIMIT:
        time.sleep(0.2)
    if job.whole and setting.left() <= END_LIMIT:  # proves nothing
        record |= {"ended": None, "resumed": None, "message": "not enough time left"}
    elif len(recorded(run)) >= 7:
        job.processes[1].kill()
        start = time.monotonic()
        try:
            record["code"] = job.processes[0].wait(END_LIMIT)
            record |= {"ended": True, "seconds": time.monotonic() - start, "message": job.said("ssa train: rank 0")}
        except subprocess.TimeoutExpired:
            record["message"] = "rank 0 did not end"
    else:
        record["message"] = job.tail(3)
    job.kill()
    last = max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)
    if record["ended"] and last:
        again = Job(setting, "killed-resumed", torchrun(2, *train, "--resume", "--training.steps", str(last + 3)))
        done = again.wait(90.0) and last + 3 in recorded(run)
        record |= {"resumed": done or (None if setting.left() <= 0 else False), "from_step": last}
    add(record)


# ---------------------------------------------------------------------- (d) equality
PLACES: dict[str, tuple[int, int | None, dict[str, Any]]] = {
    # processes, GPU, changes. HSDP with 2 copies of 1 shard is what `shard: 1` builds, and DDP's mathematics.
    "single": (1, 0, {}),
    "single, both rows at once": (1, 1, {"training__micro_batch_rows": 2}),
    "FSDP2": (2, None, {}),
    "replicated": (2, None, {"training__shard": 1}),
}
CONTROL = "single, both rows at once"
METHODS = ("ssa", "ssa-8", "full")  # SSA exact, with alignment on 1/8 of the queries, and FullAttn
PIECES = [(base, method) for base in ("1b", "300m") for method in METHODS]


def equality(setting: Setting, add: Add) -> None:
    """The first 20 steps of each recipe on one process, sharded and replicated; only numbers matter here.

    All four places run at the same time where the GPUs hold them; they meet the recipes in the same order.
    """
    open_pieces = [piece for piece in PIECES if not setting.tiny or piece[0] == "300m"]
    together = setting.tiny or setting.gpu_gib >= ROOMY
    numbers = list(range(len(PLACES)))
    for wave in [numbers] if together else [[0, 1], [2], [3]]:
        jobs = [_place(setting, number, open_pieces) for number in wave]
        while any(job.runs for job in jobs) and setting.left() > 0:
            time.sleep(0.5)
            open_pieces = _record_complete(setting, open_pieces, add)
        for job in jobs:
            job.finish()
    for base, method in _record_complete(setting, open_pieces, add):
        add(compare(setting, base, method))


def _place(setting: Setting, number: int, pieces: Sequence[tuple[str, str]]) -> Job:
    size, gpu, changes = list(PLACES.values())[number]
    recipes = []
    for base, method in pieces:
        path = setting.recipe(f"{base}-{method}-{number}", base, method, **changes)
        recipes.append((str(path), str(setting.runs / path.stem)))
    return worker(setting, f"equality-{number}", size, "runs", None if setting.tiny else gpu, recipes=recipes)


def _record_complete(setting: Setting, pieces: list[tuple[str, str]], add: Add) -> list[tuple[str, str]]:
    """Record the pieces that every place has finished; the others."""
    rest = []
    for base, method in pieces:
        record = compare(setting, base, method)
        if record["complete"]:
            add(record)
        else:
            rest.append((base, method))
    return rest


def compare(setting: Setting, base: str, method: str) -> dict[str, Any]:
    """Losses and gradient norms at every place against the single process's."""
    found = {place: recorded(setting.runs / f"{base}-{method}-{n}") for n, place in enumerate(PLACES)}
    alone, steps_of = found["single"], found.values()
    record: dict[str, Any] = {"part": "equality", "recipe": base, "method": method, "steps": found}
    record["complete"] = all(len(steps) == STEPS for steps in steps_of)
    if not record["complete"]:
        return record | {"equal": False if setting.left() > 0 else None}  # None: cut, which proves nothing
    record["same_streams"] = all(steps[n].stream == alone[n].stream for steps in steps_of for n in alone)
    equal = bool(record["same_streams"])
    for what, floor in (("loss", LOSS_FLOOR), ("norm", NORM_FLOOR)):
        apart = {place: furthest(steps, alone, what) for place, steps in found.items() if place != "single"}
        limit = max(floor, 3 * apart[CONTROL])
        equal = equal and max(apart["FSDP2"], apart["replicated"]) <= limit
        record |= {f"{what}_apart": apart, f"{what}_limit": limit}
    return record | {"equal": equal}


def furthest(ours: Steps, theirs: Steps, what: str) -> float:
    """Largest relative difference of ``"loss"`` or ``"norm"`` in the steps that ``ours`` has."""
    pairs = ((getattr(step, what), getattr(theirs[n], what)) for n, step in ours.items())
    return max(abs(x - y) / abs(y) for x, y in pairs)


# ---------------------------------------------------------------------- the record
class Report:
    """The records so far, in files."""

    def __init__(self, setting: Setting, result: dict[str, Any]) -> None:
        self.setting, self.result = setting, result
        self.records: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def add(self, record: dict[str, Any]) -> None:
        """Take a record and write everything."""
        with self._lock:
            self.records.append(record)
            self.write()
        print(*lines([record]), sep="\n", flush=True)

    def write(self) -> None:
        """Files anew; targets of what was run."""
        result = self.result | {"cases": self.records, "jobs": self.setting.log}
        path = self.setting.out / "multi-gpu.json"
        path.with_suffix(".new").write_text(json.dumps(result, indent=1))
        path.with_suffix(".new").replace(path)
        if not self.setting.tiny:
            rows = update(self.setting.out / "targets.json", result, TARGETS)
            self.rows = [row for row in rows if row["id"] in {target.id for target in TARGETS}]


def _equal(records: Sequence[dict[str, Any]]) -> float | None:
    """1 if all pieces are equal, 0 if one is not; None if one was not run to its end."""
    found = {(r["recipe"], r["method"]): r["equal"] for r in records if r.get("part") == "equality"}
    if False in found.values():
        return 0.0
    return 1.0 if all(found.get(piece) for piece in PIECES) else None


def _speed_up(records: Sequence[dict[str, Any]]) -> float | None:
    alone, both = (
        [r["tokens_per_second"] for r in records if r.get("part") == "scaling" and r["processes"] == n] for n in (1, 2)
    )
    return both[0] / statistics.mean(alone) if both and len(alone) == 2 else None


TARGETS = (
    Target("fsdp_equals_single", 1, "", True, _equal),
    Target("scaling_1b_2gpu", 1.9, "x", True, _speed_up),
)


def lines(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The result in words, a line a record."""
    for r in records:
        if r["part"] == "equality":
            what = [
                f"{name} " + ", ".join(f"{place} {value:.1e}" for place, value in r[f"{name}_apart"].items())
                + f" (limit {r[f'{name}_limit']:.1e})"
                for name in ("loss", "norm") if r["complete"]
            ]  # fmt: skip
            reached = ", ".join(f"{place} {len(steps)} steps" for place, steps in r["steps"].items())
            yield f"equality  {r['recipe']} {r['method']:<6} equal {r['equal']}  {'; '.join(what) or reached}"
        elif r["part"] == "scaling":
            memory = "/".join(f"{n:.1f}" for n in r["peak_gib"])
            spent = r["communication"] or {}
            hidden = f"NCCL {spent['nccl_ms']:.1f} ms, not hidden {spent['exposed_ms']:.1f} ms" if spent else ""
            hidden += "".join(f", {name} {x:.1f}" for name, x in spent.get("exposed_by", {}).items())
            speed = f"{r['tokens_per_second']:,.0f} tokens/s, {r['step_ms']:.1f} ms a step"
            yield f"scaling   {r['processes']} processes: {speed}, {memory} GiB  {hidden}"
        elif r["part"] == "resume":
            why = r.get("reason", f"apart {r.get('apart')}")
            yield f"resume    on {r['processes']}: equal {r['equal']}, {why}"
        elif r["part"] == "kill":
            ended = f"rank 0 ended {r['ended']} after {r.get('seconds', 0):.1f} s, code {r.get('code')}, "
            yield f"kill      {ended if 'code' in r else ''}resumed {r['resumed']}: {r['message']}"
        else:
            yield f"{r['part']}: {r['reason']}"


PARTS = {"scaling": scaling, "resuming": resuming, "killing": killing, "equality": equality}


def main(argv: Sequence[str]) -> int:
    """Run the parts; exit code 1 if one says no."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results, logs and runs")
    parser.add_argument("--seconds", type=float, default=240.0, help="most seconds to spend")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on two CPU processes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run; default all")
    given = parser.parse_args(argv)
    end = time.monotonic() + given.seconds - 10.0  # to end what still runs, and to write
    given.out.mkdir(parents=True, exist_ok=True)
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) and not given.tiny else None  # gigabytes of checkpoints
    with tempfile.TemporaryDirectory(dir=fast, prefix="ssa-multi-gpu-", ignore_cleanup_errors=True) as scratch:
        setting = Setting(given.out.resolve(), Path(scratch), given.tiny, end)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: setting.stop())
        try:
            return measure(setting, given.parts, argv)
        finally:
            setting.stop()


def measure(setting: Setting, parts: Sequence[str], argv: Sequence[str]) -> int:
    """The parts, their record and their table; exit code 1 if one says no."""
    shown = [setting.out.name if Path(x).resolve() == setting.out else x for x in argv]
    result = header("multi-gpu", shlex.join(["benchmarks/multi_gpu.py", *shown]))
    result["resumed model"] = "300m recipe with 4 layers and the vocabulary of its data"
    setting.gpu_gib = result["machine"].get("gpu_memory_gib") or 0.0
    report = Report(setting, result)
    make_data(setting)
    run_parts(setting, parts, report.add)
    report.write()
    print(*lines(report.records), sep="\n")
    print(*(one_line(row) for row in report.rows), sep="\n")
    wrong = [r for r in report.records if not r.get("equal", r.get("resumed", True))]
    return 1 if wrong or ("scaling" in parts and _speed_up(report.records) is None) else 0


def run_parts(setting: Setting, parts: Sequence[str], add: Add) -> None:
    """The parts in order. Resuming and killing run beside each other: neither is about time."""

    def run(name: str) -> None:
        if setting.left() < 20:
            add({"part": name, "equal": None, "reason": "not run, no time left"})
            return
        try:
            PARTS[name](setting, add)
        except Exception as error:  # a part that breaks must not take the others with it
            add({"part": name, "equal": False, "reason": f"broke: {type(error).__name__}: {error}"})

    beside = [name for name in parts if name in ("resuming", "killing")]
    for name in dict.fromkeys("beside" if name in beside else name for name in parts):
        if name == "beside":
            with ThreadPoolExecutor() as pool:
                list(pool.map(run, beside))
        else:
            run(name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
