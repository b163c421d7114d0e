"""``ssa reproduce``: the paper's experiments, from training to the claims table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import arg

if TYPE_CHECKING:
    from rich.console import Console

    from ssa.reproduce.worker import Job

REPORT_SECONDS = 20.0  # set aside of --seconds for writing the report


def run(argv: list[str]) -> int:
    """Parse flags and do the whole; exit code 0."""
    return tyro.cli(reproduce, args=argv, prog="ssa reproduce")


def reproduce(
    out: Annotated[Path, arg(help="folder of the study; finished pieces in it are not done again")],
    data: Annotated[Path | None, arg(help="folder that `ssa prepare` wrote; not needed with --report")] = None,
    scale: Annotated[Literal["tiny", "small", "64m"], arg(help="size of the models and of the study")] = "small",
    seconds: Annotated[float | None, arg(help="start no piece that would not be done after so many seconds")] = None,
    gpus: Annotated[int | None, arg(help="GPUs to use, 0 for the CPU; default all")] = None,
    workers_per_gpu: Annotated[int, arg(help="processes on each GPU")] = 1,
    seeds: Annotated[tuple[int, ...], arg(help="instead of the scale's own")] = (),
    only: Annotated[tuple[str, ...], arg(help="variants to do, such as ssa or alpha-160; default all")] = (),
    set: Annotated[tuple[str, ...], arg(help="recipe keys of all pieces, such as optimizer.learning_rate=1e-3")] = (),
    brief: Annotated[bool, arg(help="perplexity and statistics at the trained budget alone, and no page")] = False,
    known: Annotated[Path | None, arg(help="record of an earlier study; its pieces count as done")] = None,
    report: Annotated[bool, arg(help="train nothing: write the report of what is there")] = False,
    claims: Annotated[Path | None, arg(help="also write the claims table to this Markdown file")] = None,
    record: Annotated[Path | None, arg(help="also write all figures to this JSON file")] = None,
    summary: Annotated[
        Path | None, arg(help="also put a short one between <!-- claims --> and <!-- /claims -->")
    ] = None,
) -> int:
    """Train FullAttn, MoBA, NSA and SSA on the same tokens with several seeds, then SSA with the alignment on a
    fraction of the queries, then ablations; evaluate each; write report.html and claims.md with a verdict for every
    claim of the paper. Every variant and seed is one piece: a call goes on where the last one stopped."""
    from rich.console import Console

    from ssa.errors import ConfigError

    began = time.time()
    console = Console(soft_wrap=True, highlight=False)
    if brief and not report and (claims or summary):
        flag = "--claims" if claims else "--summary"
        raise ConfigError(flag, "--brief, which judges nothing", "one of the two", "--report afterwards")
    if known is not None:
        from ssa.report import restore_record

        console.print(f"{restore_record(known, out)} pieces from {known}", markup=False)
    if not report:
        if data is None:
            raise ConfigError("--data", "none", "a folder that `ssa prepare` wrote")
        deadline = None if seconds is None else began + seconds - REPORT_SECONDS
        from ssa.reproduce.worker import Job

        job = Job(scale, str(data), str(out), seeds or None, only, deadline, _changes(set), brief)
        _run(console, job, gpus, workers_per_gpu)
    if brief and not report:
        if record is not None:
            from ssa.report import write_record

            write_record(out, record)
            console.print(f"written to {record}", markup=False)
        return 0
    from ssa.report import read_study, render_claims, write_study

    study = read_study(out)
    for path in write_study(study, out, claims, summary, record):
        console.print(f"written to {path}", markup=False)
    console.print(render_claims(study))
    console.print(f"{time.time() - began:.0f} s in all")
    return 0


def _changes(given: tuple[str, ...]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; values as YAML has them."""
    from ssa.errors import ConfigError
    from ssa.train.recipe_file import parse_value

    found = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or "." not in key:
            raise ConfigError("--set", repr(item), "section.key=value", "optimizer.learning_rate=1e-3")
        found[key] = parse_value(value)
    return found


def _run(console: Console, job: Job, gpus: int | None, workers_per_gpu: int) -> None:
    import torch

    from ssa.reproduce import Progress, Study, run_study

    study = Study(job, torch.cuda.device_count() if gpus is None else gpus, workers_per_gpu)
    count, expected = study.estimate()
    console.print(f"{count} pieces to do on {len(study.devices)} workers, about {expected / 60:.1f} minutes")

    def tell(progress: Progress) -> None:
        result = progress.result
        name, took = f"{result.variant}-seed{result.seed}", (result.train_seconds, result.evaluate_seconds)
        line = f"[{progress.done}/{progress.total}] {name}: {result.status}, trained {took[0]:.1f} s"
        line += f", evaluated {took[1]:.1f} s" if result.status == "finished" else f", {result.message}"
        console.print(line, markup=False)

    run_study(study, tell)
