"""``ssa eval MODEL --tasks ...``: benchmark tasks through lm-evaluation-harness. Called by :mod:`ssa.cli.eval`."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg

FLAGS = ("--tasks", "--tasks-from")


def run(argv: list[str]) -> int:
    """Parse flags, run the tasks, write ``harness.json``, print the table; exit code 0."""
    if "--help" in argv or "-h" in argv:
        argv = ["--help"]  # the flags that lead here may stand without a value

    def command(
        model: Annotated[Path, tyro.conf.Positional],
        tasks: Annotated[str, arg(help="names with commas between; default with --tasks-from: all in the folder")] = "",
        tasks_from: Annotated[Path | None, arg(help="folder of NAME_SPLIT.jsonl files to use as data")] = None,
        mode: Annotated[Literal["full", "sparse", "both"], arg(help="attention to run")] = "both",
        num_blocks: Annotated[tuple[int, ...], arg(help="budgets of the sparse mode; default the model's")] = (),
        num_fewshot: Annotated[int | None, arg(help="examples per question; default each task's own")] = None,
        limit: Annotated[float | None, arg(help="rows of each task, or a share below 1; default all")] = None,
        seeds: Annotated[tuple[int, ...], arg(help="one run each; a seed draws the examples")] = (0,),
        batch_size: Annotated[int, arg(help="sequences at a time")] = 8,
        dtype: Annotated[Literal["auto", "float32", "bfloat16"], arg(help="of the weights; auto: as stored")] = "auto",
        download: Annotated[bool, arg(help="let lm-eval fetch data that is not on this machine")] = False,
        out: Annotated[Path | None, arg(help="result file; default MODEL/harness.json")] = None,
        device: Annotated[str, arg(help="auto, cpu, cuda")] = "auto",
    ) -> int:
        """Run benchmark tasks of lm-evaluation-harness in both modes and at several budgets; means and deviations
        over seeds. Tasks are lm-eval's own (hellaswag,piqa,arc_easy,...), or data sets of a local folder."""
        from rich.console import Console

        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if not download:  # before `datasets` is imported
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        plan = _plan(tasks, tasks_from, mode, num_blocks, num_fewshot, limit, seeds, batch_size)
        from ssa.evaluate import check_writable, write_result
        from ssa.evaluate.harness import SSALM, run_harness

        opened = SSALM(str(model), device=device, dtype=dtype, batch_size=batch_size)
        written = out or model / "harness.json"
        check_writable(written)
        result = run_harness(opened, plan, command=shlex.join(["ssa", "eval", *argv]))
        write_result(result, written)
        console = Console()
        console.print(_table(result))
        console.print(f"written to {written}", soft_wrap=True)
        return 0

    return tyro.cli(command, args=argv, prog="ssa eval")


def _plan(
    tasks: str, tasks_from: Path | None, mode: str, num_blocks: tuple[int, ...], *rest: Any
) -> Any:  # a HarnessPlan; lm-eval is imported only when it is needed
    from ssa.errors import MissingDependencyError

    try:
        from ssa.evaluate.harness import Attention, HarnessPlan
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("lm_eval", "accelerate"):
            raise
        hint = "pip install 'sparse-sparse-attention[harness]'"
        raise MissingDependencyError("ssa eval --tasks", f"no package {error.name}", "lm-eval", hint) from None
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    full = [] if mode == "sparse" else [Attention("full")]
    sparse = [] if mode == "full" else [Attention("sparse", n) for n in num_blocks or (None,)]
    fewshot, limit, seeds, batch_size = rest
    return HarnessPlan(names, tasks_from, [*full, *sparse], fewshot, limit, seeds, batch_size)


def _table(result: dict[str, Any]) -> Any:
    """Rows: task and metric; columns: ways to run."""
    from rich.table import Table

    table = Table(box=None)
    table.add_column("task")
    table.add_column("metric")
    for way in result["runs"]:
        budget = "" if way["num_blocks"] is None else f", {way['num_blocks']} blocks"
        table.add_column(f"{way['mode']}{budget}", justify="right")
    for task, metrics in result["runs"][0]["tasks"].items():
        for metric in metrics:
            cells = [_cell(way["tasks"][task][metric]) for way in result["runs"]]
            table.add_row(task, metric, *cells)
    return table


def _cell(figures: dict[str, Any]) -> str:
    spread = "" if figures["deviation"] is None else f" ± {figures['deviation']:.4f}"
    return f"{figures['mean']:.4f}{spread}"
