"""``ssa quickstart``: the main job in minutes. Prepare text, train FullAttn, MoBA and SSA, evaluate, report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import arg

if TYPE_CHECKING:
    from ssa.train.recipe import Recipe

METHODS = ("full", "moba", "ssa")
BUDGETS = (1, 2, 4, 8)  # blocks of 16 tokens; the models are trained at 2
VOCABULARY = 2048


def run(argv: list[str]) -> int:
    """Parse flags and do the whole; exit code 0."""
    return tyro.cli(quickstart, args=argv, prog="ssa quickstart")


def quickstart(
    out: Annotated[Path, arg(help="folder for data, runs and report; finished parts in it are not done again")] = Path(
        "runs/quickstart"
    ),
    seeds: Annotated[tuple[int, ...], arg(help="one set of models per seed")] = (0,),
    steps: Annotated[int | None, arg(help="optimiser steps per model; default the recipe's")] = None,
    rows: Annotated[int, arg(help="validation rows to evaluate on")] = 128,
    device: Annotated[str, arg(help="auto, cpu, cuda")] = "auto",
) -> int:
    """Prepare the built-in corpus (the sources of Python's standard library), train FullAttn, MoBA and SSA from
    the same seed on the same tokens, run each in full mode and at four budgets, print a table, write an HTML page."""
    from rich.console import Console

    from ssa.report import build_report, read_evaluation, render_table

    console, began = Console(), time.perf_counter()
    data = out / "data"
    _check(seeds, steps, rows, device)
    with _stage(console, "prepare", "the standard library's sources"):
        _prepare(data)
    runs = [(method, seed, out / f"{method}-seed{seed}") for seed in dict.fromkeys(seeds) for method in METHODS]
    for method, seed, folder in runs:
        with _stage(console, "train", f"{method}, seed {seed}"):
            _train(method, seed, data, folder, steps, device)
        with _stage(console, "evaluate", f"{method}, seed {seed}: full, sparse at {len(BUDGETS)} budgets"):
            _evaluate(folder, data, rows, device)
    page = build_report([folder for _, _, folder in runs], out / "report.html", figures=out / "figures")
    console.print(render_table([read_evaluation(folder / "evaluation.json") for _, _, folder in runs]))
    console.print(f"{(time.perf_counter() - began) / 60:.1f} minutes in all")
    console.print(f"report: {page.resolve()}", soft_wrap=True)
    console.print(f"try:    ssa generate {runs[-1][2]} --prompt 'def main(' --mode sparse", soft_wrap=True)
    return 0


@contextmanager
def _stage(console, name: str, what: str) -> Iterator[None]:  # type: ignore[no-untyped-def]
    console.print(f"[bold]{name}[/bold]  {what}")
    started = time.perf_counter()
    yield
    console.print(f"[dim]{name} took {time.perf_counter() - started:.0f} s[/dim]")


def _prepare(data: Path) -> None:
    from ssa.data import prepare

    if not (data / "manifest.json").is_file():
        prepare(["builtin:stdlib"], data, row_length=512, vocab_size=VOCABULARY, valid_fraction=0.05)


def _check(seeds: tuple[int, ...], steps: int | None, rows: int, device: str) -> None:
    """Refuse what cannot be before the corpus is prepared."""
    from ssa.environment import default_device
    from ssa.errors import ConfigError
    from ssa.evaluate import Plan

    default_device(device)
    Plan(BUDGETS, rows=rows)
    if not seeds:
        raise ConfigError("--seeds", "none", "at least one")
    for seed in seeds:
        _recipe(METHODS[0], seed, Path(), steps, device)


def _recipe(method: str, seed: int, data: Path, steps: int | None, device: str) -> Recipe:
    from ssa.train.recipe_file import load_recipe

    changes: dict[str, Any] = {"seed": seed, "data.path": str(data), "training.device": device}
    return load_recipe(f"quickstart/{method}", changes if steps is None else {**changes, "training.steps": steps})


def _train(method: str, seed: int, data: Path, folder: Path, steps: int | None, device: str) -> None:
    from ssa.train.loop import train

    if (folder / "model" / "config.json").is_file():
        return
    resume = any((folder / "checkpoints").glob("step-*"))
    if folder.exists() and not resume:
        shutil.rmtree(folder)  # stopped before its first checkpoint: nothing to go on from
    outcome = train(_recipe(method, seed, data, steps, device), folder, resume="latest" if resume else None)
    if outcome.reason != "finished":
        raise SystemExit(outcome.exit_code)


def _evaluate(folder: Path, data: Path, rows: int, device: str) -> None:
    from ssa.cli.eval import evaluate_run
    from ssa.evaluate import Plan

    if not (folder / "evaluation.json").is_file():
        plan = Plan(BUDGETS, rows=rows, statistics_rows=32)
        evaluate_run(folder, data, plan, "valid", folder / "evaluation.json", device, "ssa quickstart")
