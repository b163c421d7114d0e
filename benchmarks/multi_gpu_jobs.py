"""Processes, recipes and data of `multi_gpu.py`: everything but what is measured."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ssa.data import prepare
from ssa.train.recipe_file import dump_recipe, load_recipe

WORKER = Path(__file__).with_name("multi_gpu_worker.py")
STEPS, SAVE_AT = 20, 10


@dataclass
class Setting:
    """Where everything is, how long it may take, and what still runs."""

    out: Path
    scratch: Path
    tiny: bool
    end: float
    gpu_gib: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)

    @property
    def data(self) -> Path:
        """Folder of prepared rows."""
        return self.scratch / "data"

    @property
    def runs(self) -> Path:
        """Folder of the runs."""
        return self.scratch / "runs"

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return 64 if self.tiny else 8192

    def left(self) -> float:
        """Seconds that may still be spent."""
        return self.end - time.monotonic()

    def stop(self) -> None:
        """End every job now; nothing starts or waits any more."""
        self.end = 0.0
        for job in list(self.jobs):
            job.kill(0.5)

    def recipe(self, name: str, base: str, method: str, **changes: Any) -> Path:
        """Write a recipe; ``base`` is the shipped one's folder, dotted keys have ``__``.

        The rate of the first steps is that of the recipe itself, whose warm-up takes 160 steps: a peak that is reached
        at step 20 instead would let rounding grow until no two runs agree.
        """
        values: dict[str, Any] = {
            "name": name, "data.path": str(self.data), "data.row_length": self.row_length,
            "optimizer.learning_rate": 1.25e-4, "optimizer.warmup_steps": STEPS, "training.tokens": None,
            "training.steps": STEPS, "training.rows_per_step": 2, "training.micro_batch_rows": 1,
            "training.log_every": 1, "training.validate_every": 0, "training.timeout_seconds": 100.0,
            "training.checkpoint_every": STEPS, "training.keep_checkpoints": 3,
        }  # fmt: skip
        values |= {"training.precision": "fp32", "training.device": "cpu"} if self.tiny else {}
        if method == "ssa-8":
            values["model.align_query_fraction"] = 0.125
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        recipe = load_recipe(f"{'quickstart' if self.tiny else base}/{method.partition('-')[0]}", values)
        path = self.out / f"{name}.yaml"
        path.write_text(dump_recipe(recipe))
        return path


Command = tuple[list[str], dict[str, str]]  # arguments, environment variables beside this process's


class Job:
    """Processes of one run, started together; killed if they take too long."""

    def __init__(self, setting: Setting, name: str, commands: Sequence[Command]) -> None:
        self.setting, self.name, self.start = setting, name, time.monotonic()
        self._ending = threading.Lock()
        self.log = setting.out / f"{name}.log"
        # One host, perhaps without a network: the loopback is always there. Several jobs share the cores.
        quiet = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
        quiet |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4", "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("ab") as log:
            self.processes = [
                subprocess.Popen(
                    command, env={**quiet, **os.environ, **more}, stdout=log, stderr=log, start_new_session=True
                )
                for command, more in commands
            ]
        setting.jobs.append(self)

    @property
    def runs(self) -> bool:
        """Whether a process of it still runs."""
        return any(process.poll() is None for process in self.processes)

    @property
    def whole(self) -> bool:
        """Whether all processes of it still run."""
        return all(process.poll() is None for process in self.processes)

    def wait(self, limit: float) -> bool:
        """True if all ended with 0 in time."""
        end = time.monotonic() + max(0.0, min(limit, self.setting.left()))
        while self.runs and time.monotonic() < min(end, self.setting.end):
            time.sleep(0.1)
        return self.finish()

    def finish(self) -> bool:
        """End it if it still runs, write down how it went; True if all ended with 0."""
        codes = [process.poll() for process in self.processes]
        self.kill()
        seconds = time.monotonic() - self.start
        self.setting.log.append({"job": self.name, "seconds": round(seconds, 1), "codes": codes})
        ok = all(code == 0 for code in codes)
        print(f"{self.name}: {'done' if ok else f'FAILED, codes {codes}'} after {seconds:.0f} s", flush=True)
        if not ok:
            print(self.tail(), flush=True)
        return ok

    def kill(self, patience: float = 8.0) -> None:
        """End what still runs of this job: first its launchers, which end their processes, then all that is left."""
        with self._ending:
            for process in self.processes:
                if process.poll() is None:
                    process.terminate()
            end = time.monotonic() + patience
            while self.runs and time.monotonic() < end:
                time.sleep(0.05)
            for process in self.processes:
                try:  # the session of each, and only that; a launcher that died may have left its processes
                    os.killpg(process.pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    continue
                process.wait()

    def tail(self, lines: int = 12) -> str:
        """The last lines of the processes' output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def said(self, begin: str) -> str:
        """The last line that begins so, or the last of all."""
        found = self.log.read_text(errors="replace").splitlines()
        return next((line for line in reversed(found) if line.startswith(begin)), self.tail(1))


def torchrun(size: int, *command: str, gpu: int | None = None) -> list[Command]:
    """``command`` (a script or ``-m`` and a module, with arguments) on ``size`` processes, or alone, on GPU ``gpu``."""
    here = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]  # no host name has to resolve
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), *here]
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    chosen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": given[gpu % len(given)]}
    return [([sys.executable, *(launcher if size > 1 else []), *command], chosen)]


def worker(setting: Setting, name: str, size: int, kind: str, gpu: int | None = None, **arguments: Any) -> Job:
    """A job of ``multi_gpu_worker.py``."""
    return Job(setting, name, torchrun(size, str(WORKER), kind, json.dumps(arguments), gpu=gpu))


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# ---------------------------------------------------------------------- what runs read and write
class Step(NamedTuple):
    """What a run recorded of a step."""

    stream: str
    loss: float
    norm: float


Steps = dict[int, Step]


def recorded(run: Path) -> Steps:
    """The steps of a run; empty if it recorded nothing."""
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
    return {r["step"]: Step(r["stream"], r["loss"], r["gradient_norm"]) for r in records if r["event"] == "step"}


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
