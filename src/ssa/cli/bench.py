"""``ssa bench``: time the attention operations against the best full attention; correctness first."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg

HELP = "speed of the attention operations against the best full attention, correctness first"


def run(argv: list[str]) -> int:
    """Parse flags, run a suite, write its result; exit code 1 if a case is wrong or failed."""

    def command(
        suite: Annotated[
            Literal["kernels", "full", "targets", "smoke"],
            arg(
                help="smoke: seconds, on a CPU too; full: full-attention backends; kernels: all shapes; targets: record"
            ),
        ] = "smoke",
        out: Annotated[Path, arg(help="folder of bench-SUITE.json and .png; its targets.json is updated")] = Path(
            "benchmarks/results"
        ),
        peer: Annotated[
            tuple[str, ...],
            arg(help="module:function, called as f(q, k, v, block_size, num_blocks), timed beside ours"),
        ] = (),
        device: Annotated[str, arg(help="auto, cpu, cuda")] = "auto",
        budget: Annotated[float, arg(help="milliseconds of device time per case")] = 100.0,
    ) -> int:
        """Check every case against float64, then time it; print a table, write JSON and a plot."""
        # results are published: the output folder by its name, without the path of somebody's machine
        shown = [out.name if Path(argument) == out else argument for argument in argv]
        return bench(suite, out, peer, device, budget, shlex.join(["ssa", "bench", *shown]))

    return tyro.cli(command, args=argv, prog="ssa bench")


def bench(suite: str, out: Path, peers: tuple[str, ...], device: str, budget: float, command: str) -> int:
    """The command behind the flags."""
    from importlib.util import find_spec

    from rich.console import Console

    from ssa.bench.plot import plot
    from ssa.bench.result import run as run_suite
    from ssa.bench.result import table, write
    from ssa.bench.runner import Options
    from ssa.bench.targets import update
    from ssa.environment import default_device

    console = Console()
    say = lambda line: console.print(line, soft_wrap=True, highlight=False, markup=False)  # noqa: E731
    result = run_suite(suite, command, Options(default_device(device), budget, say), peers)
    written = out / f"bench-{suite}.json"
    write(result, written)
    console.print(table(result))
    for reason in result["skipped"]:
        say(f"skipped: {reason}")
    if find_spec("matplotlib") and plot([result], written.with_suffix(".png")):
        say(f"plot written to {written.with_suffix('.png')}")
    if suite != "smoke":
        for row in update(out / "targets.json", result):
            verdict = {True: "met", False: "MISSED", None: "not measured"}[row["met"]]
            say(f"{row['id']:<26} target {row['target']:g}{row['unit']}, measured {row['measured']}: {verdict}")
    say(f"written to {written}")
    return 1 if any(case["status"] in ("wrong", "failed") for case in result["cases"]) else 0
