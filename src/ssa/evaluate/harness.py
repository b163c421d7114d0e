"""Benchmark tasks through lm-evaluation-harness, in either mode and at any budget, over several seeds.

``SSALM`` is lm-eval's model ``ssa``: the entry point in pyproject.toml names it, for the releases that read entry
points (later than 0.4.13); for the others ``python -m ssa.evaluate.lm_eval`` registers it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ssa.data.tokenizer import begin_with_bos, load_tokenizer
from ssa.environment import commit, default_device, machine, package_version
from ssa.errors import ConfigError, DataError, SSAError
from ssa.evaluate.tasks import PREFIX, write_tasks
from ssa.model.opening import model_folder, open_model, set_attention

SCHEMA = "ssa.harness/1"


@register_model("ssa")
class SSALM(HFLM):
    """A local model with our attention, for lm-eval.

    Args:
        pretrained: model folder or run folder: ours, or a stock model of transformers.
        mode: ``"full"`` or ``"sparse"``; num_blocks: blocks per query of the sparse mode; block_size: tokens per block;
            None: the model's.
        device: auto, cpu, cuda, cuda:N.
        dtype: ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        tokenizer: folder of another tokenizer.
        kwargs: ``batch_size``, ``max_length`` and the like, see lm-eval's ``HFLM``.

    Raises:
        ConfigError: an unknown mode or dtype, an impossible budget, or code from the checkpoint asked for.
        CheckpointError: weights that cannot be read.
    """

    add_bos_token: Any  # the base class sets it

    def __init__(
        self,
        pretrained: str,
        mode: str | None = None,
        num_blocks: int | None = None,
        block_size: int | None = None,
        device: str | None = "auto",
        dtype: str | None = "auto",
        tokenizer: str | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("trust_remote_code", False):
            raise ConfigError("model_args: trust_remote_code", "True", "no code from checkpoints")
        if dtype not in (None, "auto", "float32", "bfloat16", "float16"):
            raise ConfigError("model_args: dtype", repr(dtype), "auto, float32, bfloat16 or float16")
        where = default_device(device or "auto")
        model = open_model(
            pretrained,
            mode=mode,
            num_blocks=num_blocks,
            block_size=block_size,
            device=where,
            dtype=None if dtype in (None, "auto") else getattr(torch, str(dtype)),
        )
        words = begin_with_bos(load_tokenizer(tokenizer or str(model_folder(pretrained))))
        super().__init__(pretrained=model, tokenizer=words, backend="causal", **kwargs)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As the base class, which puts the BOS before each text itself: the tokenizer must not add another."""
        before, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = before


@dataclass(frozen=True)
class Attention:
    """One way to run the model: full, or sparse at a budget (``num_blocks`` None: the model's)."""

    mode: str
    num_blocks: int | None = None


@dataclass(frozen=True)
class HarnessPlan:
    """What to run.

    Attributes:
        tasks: names of lm-eval's tasks, or of data sets in ``tasks_from``.
        tasks_from: folder of local data, see :mod:`ssa.evaluate.tasks`; None: tasks that lm-eval ships.
        attentions: the ways to run the model.
        num_fewshot: examples before each question; None: each task's own number (local tasks: the paper's).
        limit: rows of each task, or a share of them below 1; None: all.
        seeds: one run each; a seed draws the examples.
        batch_size: sequences at a time.
    """

    tasks: Sequence[str]
    tasks_from: Path | None = None
    attentions: Sequence[Attention] = (Attention("full"), Attention("sparse"))
    num_fewshot: int | None = None
    limit: float | None = None
    seeds: Sequence[int] = (0,)
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.tasks and self.tasks_from is None:
            raise ConfigError("--tasks", "none", "names of tasks, or --tasks-from FOLDER")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError("--num-fewshot", self.num_fewshot, "at least 0")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ConfigError("--limit", self.limit, "a number of rows, or a share of them below 1")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("--seeds", list(self.seeds), "different numbers of at least 0")
        if self.batch_size < 1:
            raise ConfigError("--batch-size", self.batch_size, "at least 1")
        if self.num_fewshot == 0 and len(self.seeds) > 1:
            raise ConfigError("--seeds", f"{len(self.seeds)} with --num-fewshot 0", "one: seeds draw the examples")


def run_harness(
    model: SSALM, plan: HarnessPlan, *, command: str = "", on_run: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Every task in every mode and seed.

    Args:
        model: the opened model.
        plan: what to run.
        command: what produced this, for the record.
        on_run: progress callback, called ``attentions * seeds`` times.

    Returns:
        A JSON-able object of schema ``ssa.harness/1``: per attention and task the mean over seeds, the sample standard
        deviation (None for one seed) and the values, for each metric.

    Raises:
        ConfigError: an unknown task, an impossible budget.
        DataError: malformed local rows, or data that is not there.
    """
    runs = []
    with TemporaryDirectory(prefix="ssa-tasks-") as folder:
        names, manager = _tasks(plan, Path(folder))
        for attention in plan.attentions:
            set_attention(model.model, mode=attention.mode, num_blocks=attention.num_blocks)
            by_seed = []
            for seed in plan.seeds:
                by_seed.append(_evaluate(model, names, manager, plan, seed))
                on_run()
            runs.append({**asdict(attention), "tasks": _summarise(by_seed)})
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(),
        "commit": commit(),
        "lm_eval": package_version("lm_eval"),
        "num_fewshot": plan.num_fewshot,
        "limit": plan.limit,
        "seeds": list(plan.seeds),
        "runs": runs,
    }


def _tasks(plan: HarnessPlan, folder: Path) -> tuple[list[str], TaskManager]:
    if plan.tasks_from is not None:
        names = write_tasks(plan.tasks_from, folder, list(plan.tasks) or None)
        return list(names.values()), TaskManager(include_path=str(folder), include_defaults=False)
    manager = TaskManager()
    known = list(manager.all_tasks)
    for name in plan.tasks:
        if name not in known:
            close = get_close_matches(name, known, n=3) or ["piqa", "arc_easy", "hellaswag"]
            hint = f"--tasks-from FOLDER, if {name!r} is local data"
            raise ConfigError("--tasks", repr(name), f"a task of lm-eval, such as {', '.join(close)}", hint)
    return list(plan.tasks), manager


def _evaluate(
    model: SSALM, names: list[str], manager: TaskManager, plan: HarnessPlan, seed: int
) -> dict[str, dict[str, float]]:
    """Metrics of one run, without lm-eval's standard errors (of rows; ours are deviations over seeds)."""
    try:
        found = simple_evaluate(
            model=model,
            tasks=list(names),
            num_fewshot=plan.num_fewshot,
            limit=plan.limit if plan.limit is None or plan.limit < 1 else int(plan.limit),
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except SSAError:
        raise
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        hint = "--download, --tasks-from FOLDER, or fewer examples (--num-fewshot)"
        raise DataError(f"lm-eval, {', '.join(names)}", reason, "tasks whose data is on this machine", hint) from error
    assert found is not None  # only other ranks get None
    return {
        task.removeprefix(PREFIX): {
            key.removesuffix(",none"): value
            for key, value in metrics.items()
            if isinstance(value, float) and "stderr" not in key
        }
        for task, metrics in found["results"].items()
    }


def _summarise(by_seed: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """``task -> metric -> {mean, deviation, values}``."""
    summary: dict[str, Any] = {}
    for task, metrics in by_seed[0].items():
        summary[task] = {}
        for metric in metrics:
            values = [run[task][metric] for run in by_seed]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            summary[task][metric] = {"mean": statistics.fmean(values), "deviation": deviation, "values": values}
    return summary
