"""Training on two GPUs of one host, really run: equal losses, scaling, checkpoints, a killed rank.

    python benchmarks/multi_gpu.py --out DIR [--seconds 240] [--parts scaling killing] [--tiny]

Needs no network: rows are made here. Jobs run in order of importance until the seconds are spent; what was not run is
said. Writes DIR/multi-gpu.json and the rows `fsdp_equals_single` and `scaling_1b_2gpu` of DIR/targets.json. `--tiny`
runs the same on two CPU processes, to prove the script; it writes no targets.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssa.bench.result import header
from ssa.bench.targets import Target, one_line, update
from ssa.data import prepare
from ssa.train.recipe_file import dump_recipe, load_recipe

WORKER = Path(__file__).with_name("multi_gpu_worker.py")
STEPS, SAVE_AT = 20, 10
LOSS_FLOOR = 2e-3  # relative; bfloat16 sums in another order. The limit is this, or 3 times what splitting a step does
END_LIMIT = 60.0  # seconds in which a killed rank must have ended the others
Losses = dict[int, tuple[str, float]]  # by step: stream, loss


@dataclass(frozen=True)
class Setting:
    """Where everything is, and what the recipes are changed to."""

    out: Path
    scratch: Path
    tiny: bool
    end: float
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.scratch / "data"

    @property
    def runs(self) -> Path:
        return self.scratch / "runs"

    @property
    def row_length(self) -> int:
        return 64 if self.tiny else 8192

    def left(self) -> float:
        """Seconds that may still be spent."""
        return self.end - time.monotonic()

    def recipe(self, name: str, method: str, **changes: Any) -> Path:
        """Write a recipe of the equality runs; dotted keys with ``__``."""
        base = "quickstart" if self.tiny else "300m"
        values: dict[str, Any] = {
            "name": name, "data.path": str(self.data), "data.row_length": self.row_length,
            "model.vocab_size": None, "model.num_hidden_layers": 2 if self.tiny else 4,
            "optimizer.warmup_steps": 2, "training.tokens": None, "training.steps": STEPS, "training.rows_per_step": 4,
            "training.micro_batch_rows": 2, "training.log_every": 1, "training.validate_every": 0,
            "training.timeout_seconds": 120.0, "training.checkpoint_every": STEPS, "training.keep_checkpoints": 3,
        }  # fmt: skip
        values |= {"training.precision": "fp32", "training.device": "cpu"} if self.tiny else {}
        if method == "ssa-8":
            values["model.align_query_fraction"] = 0.125
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        recipe = load_recipe(f"{base}/{method.partition('-')[0]}", values)
        path = self.out / f"{name}.yaml"
        path.write_text(dump_recipe(recipe))
        return path


METHODS = ("full", "ssa", "ssa-8")  # SSA exact, and with alignment on 1/8 of the queries


# ---------------------------------------------------------------------- jobs
class Job:
    """Processes of one run, started together; killed if they take too long."""

    def __init__(self, setting: Setting, name: str, commands: Sequence[tuple[list[str], dict[str, str]]]) -> None:
        self.setting, self.name, self.start = setting, name, time.monotonic()
        self.log = setting.out / f"{name}.log"
        # One host, perhaps without a network: the loopback is always there. Several jobs share the cores.
        quiet = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
        quiet |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
        with self.log.open("ab") as log:
            self.processes = [
                subprocess.Popen(
                    command, env={**quiet, **os.environ, **more}, stdout=log, stderr=log, start_new_session=True
                )
                for command, more in commands
            ]

    def wait(self, limit: float) -> bool:
        """True if all ended with 0 in time."""
        end = time.monotonic() + max(0.0, min(limit, self.setting.left()))
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(max(0.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
        self.kill()
        seconds = time.monotonic() - self.start
        self.setting.log.append({"job": self.name, "seconds": round(seconds, 1), "codes": codes})
        ok = all(code == 0 for code in codes)
        print(f"{self.name}: {'done' if ok else f'FAILED, codes {codes}'} after {seconds:.0f} s", flush=True)
        if not ok:
            print(self.tail(), flush=True)
        return ok

    def kill(self) -> None:
        """End what still runs of this job's own processes."""
        running = [process for process in self.processes if process.poll() is None]
        for process in running:
            process.terminate()  # a launcher ends its processes
        for process in running:
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def tail(self, lines: int = 12) -> str:
        """The last lines of the processes' output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def said(self, begin: str) -> str:
        """The last line that begins so, or the last of all."""
        found = self.log.read_text(errors="replace").splitlines()
        return next((line for line in reversed(found) if line.startswith(begin)), self.tail(1))


def torchrun(size: int, *command: str) -> list[tuple[list[str], dict[str, str]]]:
    """``command`` (a script or ``-m`` and a module, with arguments) on ``size`` processes, or alone."""
    here = ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]  # no host name has to resolve
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), *here]
    return [([sys.executable, *(launcher if size > 1 else []), *command], {})]


def worker(setting: Setting, name: str, size: int, kind: str, **arguments: Any) -> Job:
    """A job of ``multi_gpu_worker.py``."""
    return Job(setting, name, torchrun(size, str(WORKER), kind, json.dumps(arguments)))


def losses(run: Path) -> Losses:
    """What a run recorded; empty if it recorded nothing."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return {}
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # being written
    return {r["step"]: (r["stream"], r["loss"]) for r in records if r["event"] == "step"}


# ---------------------------------------------------------------------- (a) equality
def make_data(setting: Setting) -> None:
    """Rows of packed documents of random words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(2000)]
    wanted = 120 * setting.row_length * (1 if setting.tiny else 4)  # characters; at least 80 rows of tokens
    with (setting.scratch / "text.jsonl").open("w") as file:
        while wanted > 0:
            most = setting.row_length // (8 if setting.tiny else 2)
            text = " ".join(rng.choices(words, k=max(1, int(most ** rng.random()))))
            file.write(json.dumps({"text": text}) + "\n")
            wanted -= len(text)
    source, vocabulary = str(setting.scratch / "text.jsonl"), 300 if setting.tiny else 1024
    prepare([source], setting.data, row_length=setting.row_length, vocab_size=vocabulary, valid_fraction=0.0)


PLACES: dict[str, tuple[int, dict[str, Any]]] = {
    # processes, changes. HSDP with 2 copies of 1 shard is what `shard: 1` builds, and DDP's mathematics.
    "single": (1, {}),
    "single, one row at a time": (1, {"training__micro_batch_rows": 1}),
    "FSDP2": (2, {}),
    "replicated": (2, {"training__shard": 1}),
}


RESUMED = ("ssa", 2)  # method and place of the run whose checkpoint is resumed


def equality(setting: Setting) -> list[dict[str, Any]]:
    """Every method on one process, sharded and replicated, at the same time; only numbers matter here."""
    jobs = []
    for number, (size, changes) in enumerate(PLACES.values()):
        recipes = []
        for method in METHODS:
            saves = {"training__checkpoint_every": SAVE_AT} if (method, number) == RESUMED else {}
            path = setting.recipe(f"{method}-{number}", method, **changes, **saves)
            recipes.append((str(path), str(setting.runs / path.stem)))
        jobs.append(worker(setting, f"equality-{number}", size, "runs", recipes=recipes))
    for job in jobs:
        job.wait(120.0)
    return [compare(setting, method) for method in METHODS]


def compare(setting: Setting, method: str) -> dict[str, Any]:
    """A method's losses at every place against the single process's."""
    found = {place: losses(setting.runs / f"{method}-{n}") for n, place in enumerate(PLACES)}
    alone = found["single"]
    complete = all(len(steps) == STEPS for steps in found.values())
    record: dict[str, Any] = {"part": "equality", "method": method, "losses": found, "complete": complete}
    if not complete:
        return record | {"equal": False}
    apart = {place: furthest(steps, alone) for place, steps in found.items() if place != "single"}
    limit = max(LOSS_FLOOR, 3 * apart["single, one row at a time"])
    streams = all(
        {n: s for n, (s, _) in steps.items()} == {n: s for n, (s, _) in alone.items()} for steps in found.values()
    )
    worst = max(apart["FSDP2"], apart["replicated"])
    return record | {"apart": apart, "limit": limit, "same_streams": streams, "equal": streams and worst <= limit}


def furthest(ours: Losses, theirs: Losses) -> float:
    """Largest relative difference of the losses of the steps that ``ours`` has."""
    return max(abs(loss - theirs[step][1]) / abs(theirs[step][1]) for step, (_, loss) in ours.items())


# ---------------------------------------------------------------------- (b) scaling
def scaling(setting: Setting) -> list[dict[str, Any]]:
    """Whole steps of FullAttn 1B at 8K, weights sharded, the same batch a GPU: first on one, then on two."""
    records = []
    for size in (1, 2):
        rows = {
            "training.micro_batch_rows": 2,
            "training.rows_per_step": 2 * size,
            "data.row_length": setting.row_length,
        }
        rows |= {"training.precision": "fp32", "training.device": "cpu"} if setting.tiny else {}
        recipe, out = setting.out / f"scaling-{size}.yaml", setting.out / f"scaling-{size}.json"
        recipe.write_text(dump_recipe(load_recipe("quickstart/full" if setting.tiny else "1b/full", rows)))
        job = worker(
            setting, f"scaling-{size}", size, "scaling", recipe_file=str(recipe), out=str(out), rounds=3, steps=3
        )
        if job.wait(90.0):
            records.append({"part": "scaling", **json.loads(out.read_text())})
    return records


# ---------------------------------------------------------------------- (c) checkpoints
def resuming(setting: Setting) -> list[dict[str, Any]]:
    """The sharded run's checkpoint on two processes and on one, against the run that was not interrupted."""
    start = setting.runs / "ssa-2" / "checkpoints" / f"step-{SAVE_AT:08d}"
    recipe, whole = setting.out / "ssa-2.yaml", losses(setting.runs / "ssa-2")
    if not start.is_dir():
        return [{"part": "resume", "processes": n, "equal": False, "reason": "no checkpoint"} for n in (2, 1)]
    outs = {size: setting.runs / f"resumed-{size}" for size in (2, 1)}
    command = ["-m", "ssa", "train", str(recipe), "--resume", str(start), "--out"]
    jobs = [Job(setting, f"resume-{size}", torchrun(size, *command, str(out))) for size, out in outs.items()]
    for job in jobs:
        job.wait(90.0)
    records = []
    for size, out in outs.items():
        steps = losses(out)
        complete = sorted(steps) == list(range(SAVE_AT + 1, STEPS + 1)) and len(whole) == STEPS
        apart = furthest(steps, whole) if complete else None
        equal = apart is not None and apart <= LOSS_FLOOR
        equal = equal and all(whole[n][0] == stream for n, (stream, _) in steps.items())
        records.append({"part": "resume", "processes": size, "apart": apart, "limit": LOSS_FLOOR, "equal": equal})
    return records


# ---------------------------------------------------------------------- (d) a killed rank
def killing(setting: Setting) -> list[dict[str, Any]]:
    """SIGKILL rank 1 while it trains; the other must end by itself, say why, and the run must go on afterwards."""
    recipe, run = (
        setting.recipe(
            "killed", "ssa", training__steps=5000, training__checkpoint_every=5, training__timeout_seconds=50.0
        ),
        setting.runs / "killed",
    )
    train = ["-m", "ssa", "train", str(recipe), "--out", str(run)]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = [([sys.executable, *train], {**common, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(2)]
    job = Job(setting, "kill", ranks)  # without a launcher, which would end the other rank itself
    record: dict[str, Any] = {"part": "kill", "ended": False, "resumed": False}
    while len(losses(run)) < 7 and setting.left() > 0 and all(p.poll() is None for p in job.processes):
        time.sleep(0.2)
    if len(losses(run)) >= 7:
        job.processes[1].kill()
        start = time.monotonic()
        try:
            record["code"] = job.processes[0].wait(min(END_LIMIT, max(0.0, setting.left())))
            record |= {"ended": True, "seconds": time.monotonic() - start, "message": job.said("ssa train: rank 0")}
        except subprocess.TimeoutExpired:
            record["message"] = "rank 0 did not end"
    else:
        record["message"] = job.tail(3)
    job.kill()
    last = max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)
    if record["ended"] and last:
        again = Job(setting, "kill-resumed", torchrun(2, *train, "--resume", "--training.steps", str(last + 3)))
        record |= {"resumed": again.wait(60.0) and last + 3 in losses(run), "from_step": last}
    return [record]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# ---------------------------------------------------------------------- the record
def _equal(records: Sequence[dict[str, Any]]) -> float | None:
    found = [r["equal"] for r in records if r.get("part") == "equality"]
    return float(all(found)) if found else None


def _speed_up(records: Sequence[dict[str, Any]]) -> float | None:
    speed = {r["processes"]: r["tokens_per_second"] for r in records if r.get("part") == "scaling"}
    return speed[2] / speed[1] if {1, 2} <= speed.keys() else None


TARGETS = (
    Target("fsdp_equals_single", 1, "", True, _equal),
    Target("scaling_1b_2gpu", 1.9, "x", True, _speed_up),
)


def lines(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The result in words, a line a record."""
    for r in records:
        if r["part"] == "equality":
            apart = ", ".join(f"{place} {value:.1e}" for place, value in r.get("apart", {}).items()) or "incomplete"
            yield f"equality  {r['method']:<6} equal {r['equal']}  {apart}  limit {r.get('limit', 0):.1e}"
        elif r["part"] == "scaling":
            memory = "/".join(f"{n:.1f}" for n in r["peak_gib"])
            spent = r["communication"] or {}
            hidden = f"NCCL {spent['nccl_ms']:.1f} ms, not hidden {spent['exposed_ms']:.1f} ms" if spent else ""
            speed = f"{r['tokens_per_second']:,.0f} tokens/s, {r['step_ms']:.1f} ms a step"
            yield f"scaling   {r['processes']} processes: {speed}, {memory} GiB  {hidden}"
        elif r["part"] == "resume":
            yield f"resume    on {r['processes']}: equal {r['equal']}, apart {r.get('apart')}"
        elif r["part"] == "kill":
            ended = f"rank 0 ended {r['ended']} after {r.get('seconds', 0):.1f} s"
            yield f"kill      {ended}, resumed {r['resumed']}: {r['message']}"
        else:
            yield f"{r['part']}: not run, no time left"


PARTS = {"equality": equality, "scaling": scaling, "resuming": resuming, "killing": killing}


def main(argv: Sequence[str]) -> int:
    """Run the parts; exit code 1 if one says no."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results, logs and runs")
    parser.add_argument("--seconds", type=float, default=240.0, help="most seconds to spend")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on two CPU processes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run; default all")
    given = parser.parse_args(argv)
    end = time.monotonic() + given.seconds
    given.out.mkdir(parents=True, exist_ok=True)
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) and not given.tiny else None  # gigabytes of checkpoints
    with tempfile.TemporaryDirectory(dir=fast, prefix="ssa-multi-gpu-") as scratch:
        return measure(Setting(given.out.resolve(), Path(scratch), given.tiny, end), given.parts, argv)


def measure(setting: Setting, parts: Sequence[str], argv: Sequence[str]) -> int:
    """The parts, their record and their table; exit code 1 if one says no."""
    shown = [setting.out.name if Path(x).resolve() == setting.out else x for x in argv]
    result = header("multi-gpu", shlex.join(["benchmarks/multi_gpu.py", *shown]))
    make_data(setting)
    records: list[dict[str, Any]] = []
    for name in ("equality", "scaling"):
        if name in parts:
            records += PARTS[name](setting) if setting.left() > 20 else [{"part": name, "equal": False}]
    with ThreadPoolExecutor() as pool:  # neither of the other two is about time
        others = [PARTS[name] for name in ("resuming", "killing") if name in parts]
        for found in pool.map(lambda part: part(setting), others):
            records += found
    result |= {"cases": records, "jobs": setting.log, "model": "300m recipe with 4 layers and a vocabulary of 1024"}
    (setting.out / "multi-gpu.json").write_text(json.dumps(result, indent=1))
    print(*lines(records), sep="\n")
    if not setting.tiny:
        for row in update(setting.out / "targets.json", result, TARGETS):
            if row["id"] in {target.id for target in TARGETS}:
                print(one_line(row))
    wrong = [r for r in records if not r.get("equal", r.get("resumed", True))]
    return 1 if wrong or ("scaling" in parts and _speed_up(records) is None) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
