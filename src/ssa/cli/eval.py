"""``ssa eval``: perplexity and attention statistics of a checkpoint in both modes and at several budgets."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import tyro


def run(argv: list[str]) -> int:
    """Parse flags, evaluate, write ``evaluation.json``, print the table; exit code 0."""

    def command(
        model: Annotated[Path, tyro.conf.Positional],
        data: Annotated[Path, "folder that `ssa prepare` wrote"],
        budgets: Annotated[tuple[int, ...], "blocks per query of the sparse runs"] = (4, 8, 16, 32),
        block_size: Annotated[int | None, "tokens per block; default the model's"] = None,
        rows: Annotated[int | None, "rows to read; default all"] = None,
        statistics_rows: Annotated[int, "rows for the attention statistics"] = 8,
        rows_per_batch: Annotated[int, "rows at a time"] = 8,
        split: Annotated[str, "train or valid"] = "valid",
        out: Annotated[Path | None, "result file; default MODEL/evaluation.json"] = None,
        device: Annotated[str, "auto, cpu, cuda"] = "auto",
    ) -> int:
        """Evaluate the model of a run folder or model folder: perplexity in full mode and at each budget, KL(full || sparse),
        AttnSparsity, dropped mass, entropy in bits, and the share of queries that meet Theorem 1's bound."""
        from ssa.evaluate import Plan

        plan = Plan(budgets, block_size, rows, statistics_rows, rows_per_batch)
        return evaluate_run(
            model, data, plan, split, out or model / "evaluation.json", device, shlex.join(["ssa", "eval", *argv])
        )

    return tyro.cli(command, args=argv, prog="ssa eval")


def evaluate_run(model: Path, data: Path, plan, split: str, out: Path, device: str, command: str) -> int:  # type: ignore[no-untyped-def]
    """Load, evaluate with a progress bar, write and print."""
    import json

    from rich.console import Console
    from rich.progress import Progress

    from ssa.data.loader import PackedDataset
    from ssa.environment import default_device
    from ssa.evaluate import evaluate, write_result
    from ssa.model import load_model
    from ssa.report import read_evaluation, render_table

    network = load_model(model, device=default_device(device))
    dataset = PackedDataset(data, split)
    facts_file = model / "run.json"
    facts = json.loads(facts_file.read_text()) if facts_file.is_file() else {}
    rows = len(dataset) if plan.rows is None else min(plan.rows, len(dataset))
    total = -(-rows // plan.rows_per_batch) * len(plan.settings(network))
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=total)
        result = evaluate(
            network,
            dataset,
            plan,
            name=facts.get("name", model.name),
            facts=facts,
            command=command,
            on_batch=lambda: progress.advance(task),
        )
    write_result(result, out)
    console.print(render_table([read_evaluation(out)]))
    console.print(f"written to {out}")
    return 0
