"""The evaluation suite: long documents, needles, and what attention does at every length."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ssa.data.loader import PackedDataset
from ssa.errors import ConfigError
from ssa.evaluate.documents import read_documents, windows
from ssa.evaluate.needle import FORMS, Form
from ssa.evaluate.perplexity import perplexity
from ssa.evaluate.retrieval import DEPTHS, make_tasks, needle_results
from ssa.evaluate.rolling import sliding_perplexity, word_perplexity
from ssa.evaluate.running import Scaling, Setting, stretched
from ssa.evaluate.selection import selection_statistics
from ssa.evaluate.statistics import attention_statistics
from ssa.model import SSAForCausalLM
from ssa.ops import SparseSpec

Say = Callable[[str], None]


@dataclass(frozen=True)
class SuitePlan:
    """What the suite measures.

    Attributes:
        lengths: context lengths in tokens; those beyond the trained one run with each of ``scalings``.
        scalings: how RoPE is stretched beyond the trained length.
        sliding: whether sliding-window perplexity is measured.
        stride: tokens that a sliding window moves on by.
        document_tokens: tokens of each document for the sliding window, from its beginning; None takes all.
        word_documents: whether word perplexity is measured, on the same tokens.
        needle_forms: forms of needle tasks; none leaves them out.
        needle_samples: tasks per form, length and depth.
        needle_candidates: possible answers per task; one over this is chance.
        statistics_rows: windows per length for the attention statistics.
        seed: of the needle tasks.
    """

    lengths: Sequence[int]
    scalings: Sequence[Scaling] = ("none", "llama3")
    sliding: bool = True
    stride: int = 256
    document_tokens: int | None = None
    word_documents: bool = True
    needle_forms: Sequence[Form] = FORMS
    needle_samples: int = 4
    needle_candidates: int = 8
    statistics_rows: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 2:
            raise ConfigError("lengths", list(self.lengths), "context lengths of at least 2 tokens")
        for name in ("stride", "statistics_rows", "needle_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")
        if self.needle_candidates < 2:
            raise ConfigError("needle_candidates", self.needle_candidates, "at least 2")

    def ways(self, length: int, trained: int) -> Sequence[Scaling]:
        """The scalings that apply at a length."""
        return self.scalings if length > trained else ("none",)


def run_suite(
    model: SSAForCausalLM,
    dataset: PackedDataset,
    plan: SuitePlan,
    settings: Sequence[Setting],
    haystack: str | None = None,
    say: Say = lambda what: None,
) -> dict[str, Any]:
    """Measure everything of ``plan`` in all ``settings``.

    Args:
        dataset: a split whose documents are read whole.
        settings: full first, see :meth:`ssa.evaluate.Plan.settings`.
        haystack: text to hide needles in; None takes the split's own documents.
        say: told what is measured next.

    Returns:
        The ``suite`` object of ``ssa.evaluation/1`` (docs/architecture.md).
    """
    tokenizer = dataset.tokenizer()
    documents = read_documents(dataset, tokenizer.bos_token_id, plan.document_tokens)
    trained = int(model.config.max_position_embeddings)
    found: dict[str, Any] = {"sliding": [], "words": [], "needle": [], "attention": [], "selection": []}
    tasks: dict[int, Any] = {}
    if plan.needle_forms:
        text = haystack if haystack is not None else _decoded(tokenizer, documents)
        tasks = _tasks(plan, text, tokenizer)
    places = [(length, scaling) for length in plan.lengths for scaling in plan.ways(length, trained)]
    for length, scaling in places:
        say(f"sliding window of {length}")
        usable = [d for d in documents if len(d) > plan.stride]
        if plan.sliding and plan.stride < length:
            found["sliding"] += [
                sliding_perplexity(model, usable, s, length, stride=plan.stride, scaling=scaling) for s in settings
            ]
        if plan.needle_forms:
            say(f"needles in {length}")
            found["needle"] += needle_results(model, {length: tasks[length]}, settings, scaling)
        if any(len(d) >= length for d in documents):
            say(f"attention at {length}")
            found["attention"] += _attention(model, documents, plan, length, scaling)
    if plan.word_documents:
        say("word perplexity")
        words = sum(len(re.split(r"\s+", _text(tokenizer, d))) for d in documents)
        found["words"] = [word_perplexity(model, documents, words, s, trained) for s in settings]
    if any(len(d) >= trained for d in documents):
        say("selection")
        batch = windows(documents, trained, plan.statistics_rows)
        found["selection"] = [selection_statistics(model, [batch], s) for s in _native(model)]
        found["rules"] = selection_rules(model, [windows(documents, trained, 4 * plan.statistics_rows)])
    return found


def selection_rules(model: SSAForCausalLM, batches: Sequence[Any]) -> list[dict[str, Any]]:
    """Perplexity at the training budget under the exact top-k and under the published code's, on the same batches."""
    config = model.config
    if config.num_blocks > config.block_size or config.block_size < 2:
        return []  # the published merge is not defined there
    rules = ("exact", "official")
    settings = [Setting("sparse", config.block_size, config.num_blocks, rule) for rule in rules]
    measured = perplexity(model, lambda: batches, settings)
    return [{"rule": rule, **m.row()} for rule, m in zip(rules, measured, strict=True)]


def _native(model: SSAForCausalLM) -> list[Setting]:
    """Full attention, where the model has it, and the training budget."""
    size, count = model.config.block_size, model.config.num_blocks
    full = [] if model.config.method == "nsa" else [Setting("full", size)]
    return [*full, Setting("sparse", size, count, "exact")]


def _attention(
    model: SSAForCausalLM, documents: Sequence[Tensor], plan: SuitePlan, length: int, scaling: Scaling
) -> list[dict[str, Any]]:
    """Means over layers of the attention statistics at one length, at the training budget."""
    batch = windows(documents, length, plan.statistics_rows)
    spec = SparseSpec(model.config.block_size, model.config.num_blocks)
    found = []
    with stretched(model, length, scaling) as applied:
        for setting in _native(model):
            mean = attention_statistics(model, [batch], spec, setting.mode).mean()
            found.append({"mode": setting.mode, "length": length, "scaling": applied, "rows": batch.rows, **mean})
    return found


def _tasks(plan: SuitePlan, text: str, tokenizer: Any) -> dict[int, Any]:
    return make_tasks(
        text,
        tokenizer,
        plan.lengths,
        forms=plan.needle_forms,
        depths=DEPTHS,
        samples=plan.needle_samples,
        candidates=plan.needle_candidates,
        seed=plan.seed,
    )


def _decoded(tokenizer: Any, documents: Sequence[Tensor]) -> str:
    return "\n\n".join(_text(tokenizer, d) for d in documents)


def _text(tokenizer: Any, document: Tensor) -> str:
    return str(tokenizer.decode(document, skip_special_tokens=True))
