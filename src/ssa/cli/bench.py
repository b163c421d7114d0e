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
            Literal[
                "kernels",
                "full",
                "targets",
                "smoke",
                "layer",
                "layer-smoke",
                "training",
                "training-smoke",
                "decode",
                "decode-designs",
                "decode-smoke",
                "generate",
            ],
            arg(
                help="smoke: seconds, on a CPU too; full: full-attention backends; kernels: all shapes; targets: "
                "record; layer: one layer's attention in a training step; training: whole steps of the 1B model; "
                "decode: one layer's step of decoding at 128K; decode-designs: other designs of its launches; "
                "generate: decoding and prefill of whole models; "
                "layer-smoke, training-smoke, decode-smoke: tiny, on a CPU too"
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
        line = shlex.join(["ssa", "bench", *shown])
        if suite.startswith(("layer", "training", "decode")):
            return bench_whole(suite, out, device, line)
        return bench(suite, out, peer, device, budget, line)

    return tyro.cli(command, args=argv, prog="ssa bench")


def bench(suite: str, out: Path, peers: tuple[str, ...], device: str, budget: float, command: str) -> int:
    """The command behind the flags."""
    from importlib.util import find_spec

    from rich.console import Console

    from ssa.bench.plot import plot
    from ssa.bench.result import run as run_suite
    from ssa.bench.result import table, write
    from ssa.bench.runner import Options
    from ssa.bench.targets import one_line, update
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
            say(one_line(row))
    say(f"written to {written}")
    return 1 if any(case["status"] in ("wrong", "failed") for case in result["cases"]) else 0


def bench_whole(suite: str, out: Path, device: str, command: str) -> int:
    """A suite with records of its own: layer, training, decode. Exit code 1 if a check fails or nothing is left."""
    from importlib import import_module

    from rich.console import Console

    from ssa.bench.result import write
    from ssa.bench.targets import one_line, update
    from ssa.environment import default_device

    family = suite.removesuffix("-smoke")
    module = import_module(f"ssa.bench.{family}")
    console = Console(width=160)
    say = lambda line: console.print(line, soft_wrap=True, highlight=False, markup=False)  # noqa: E731
    result = module.run(suite, command, default_device(device), say)
    written = out / f"bench-{suite}.json"
    write(result, written)
    if suite == family:
        ids = {target.id for target in module.TARGETS}
        for row in update(out / "targets.json", result, module.TARGETS):
            if row["id"] in ids:
                say(one_line(row))
    say(f"written to {written}")
    console.print(module.table(result))
    wrong = any(case.get("status") in ("wrong", "failed") for case in result["cases"])
    return 1 if wrong or not result["cases"] else 0
