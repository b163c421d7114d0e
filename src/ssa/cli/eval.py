"""``ssa eval``: perplexity and attention statistics of a checkpoint in both modes and at several budgets.

With ``--tasks`` or ``--tasks-from`` it runs benchmark tasks instead, see :mod:`ssa.cli.eval_tasks`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import arg

from ssa.cli import eval_tasks

if TYPE_CHECKING:
    from ssa.evaluate import Plan, SuitePlan

Scaling = Literal["none", "linear", "llama3", "yarn"]


def run(argv: list[str]) -> int:
    """Parse flags, evaluate, write ``evaluation.json``, print the table; exit code 0."""
    if any(argument.partition("=")[0] in eval_tasks.FLAGS for argument in argv):
        return eval_tasks.run(argv)

    def command(
        model: Annotated[Path, tyro.conf.Positional],
        data: Annotated[Path, arg(help="folder that `ssa prepare` wrote")],
        budgets: Annotated[tuple[int, ...], arg(help="blocks per query of the sparse runs")] = (4, 8, 16, 32),
        block_size: Annotated[int | None, arg(help="tokens per block; default the model's")] = None,
        rows: Annotated[int | None, arg(help="rows to read; default all")] = None,
        statistics_rows: Annotated[int, arg(help="rows for the attention statistics")] = 8,
        rows_per_batch: Annotated[int, arg(help="rows at a time")] = 8,
        split: Annotated[str, arg(help="train or valid")] = "valid",
        out: Annotated[Path | None, arg(help="result file; default MODEL/evaluation.json")] = None,
        device: Annotated[str, arg(help="auto, cpu, cuda")] = "auto",
        suite: Annotated[bool, arg(help="also whole documents, needles, and attention by length")] = False,
        lengths: Annotated[
            tuple[int, ...], arg(help="suite: context lengths; default 1/4, 1/2, 1 and 2 times the model's")
        ] = (),
        scalings: Annotated[
            tuple[Scaling, ...], arg(help="suite: RoPE beyond the trained length")
        ] = ("none", "llama3"),
        stride: Annotated[int, arg(help="suite: tokens that a sliding window moves on by")] = 256,
        document_tokens: Annotated[
            int | None, arg(help="suite: tokens of each document, from its beginning; default all")
        ] = None,
        haystack: Annotated[Path | None, arg(help="suite: text file to hide needles in; default the split's")] = None,
        samples: Annotated[int, arg(help="suite: needle tasks per form, length and depth; 0 for none")] = 4,
    ) -> int:  # fmt: skip
        """Evaluate the model of a run folder or model folder: perplexity in full mode and at each budget,
        KL(full || sparse), AttnSparsity, dropped mass, entropy in bits, the share of queries that meet Theorem 1.
        With --suite also: sliding-window and word perplexity, needles in a haystack, attention and selection by
        length, beyond the trained length too (docs/guides/evaluation.md).

        With --tasks or --tasks-from it runs benchmark tasks instead: see ssa eval --tasks --help."""
        from rich.console import Console

        from ssa.evaluate import Plan
        from ssa.report import read_evaluation, render_table

        chosen = _suite(model, lengths, scalings, stride, document_tokens, samples) if suite else None
        plan = Plan(budgets, block_size, rows, statistics_rows, rows_per_batch, suite=chosen)
        written = out or model / "evaluation.json"
        text = _read(haystack) if suite and haystack else None
        evaluate_run(model, data, plan, split, written, device, shlex.join(["ssa", "eval", *argv]), text)
        console = Console()
        console.print(render_table([read_evaluation(written)]))
        console.print(f"written to {written}", soft_wrap=True)
        return 0

    return tyro.cli(command, args=argv, prog="ssa eval")


def evaluate_run(
    model: Path, data: Path, plan: Plan, split: str, out: Path, device: str, command: str, haystack: str | None = None
) -> None:
    """Evaluate a run folder or model folder with a progress bar, and write the result file ``out``."""
    from rich.progress import Progress

    from ssa.data.loader import PackedDataset
    from ssa.environment import default_device
    from ssa.evaluate import check_writable, evaluate, run_facts, write_result
    from ssa.model import load_model

    network = load_model(model, device=default_device(device))
    dataset = PackedDataset(data, split)
    check_writable(out)
    rows = len(dataset) if plan.rows is None else min(plan.rows, len(dataset))
    total = -(-rows // plan.rows_per_batch) * len(plan.settings(network))
    with Progress(transient=True) as progress:
        task = progress.add_task("evaluating", total=total)
        result = evaluate(
            network,
            dataset,
            plan,
            facts=run_facts(model),
            command=command,
            on_batch=lambda: progress.advance(task),
            haystack=haystack,
            say=lambda what: progress.update(task, description=what),
        )
    write_result(result, out)


def _suite(
    model: Path,
    lengths: tuple[int, ...],
    scalings: tuple[Scaling, ...],
    stride: int,
    document_tokens: int | None,
    samples: int,
) -> SuitePlan:
    from ssa.evaluate import SuitePlan
    from ssa.evaluate.needle import FORMS
    from ssa.model.loading import read_config

    if not lengths:
        trained = int(read_config(model).max_position_embeddings)
        lengths = (trained // 4, trained // 2, trained, 2 * trained)
    return SuitePlan(
        lengths,
        scalings,
        stride=stride,
        document_tokens=document_tokens,
        needle_forms=FORMS if samples else (),
        needle_samples=max(samples, 1),
    )


def _read(path: Path) -> str:
    from ssa.errors import DataSourceError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataSourceError(str(path), str(error), "a readable text file in UTF-8") from error
