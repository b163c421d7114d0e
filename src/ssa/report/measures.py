"""What is read off one evaluation: the measures that tables, checks and figures share."""

from __future__ import annotations

import math
from collections.abc import Callable

from ssa.report.results import Budget, Evaluation

Measure = Callable[[Evaluation], float]


def perplexity_at(budget: Budget | None) -> Measure:
    """The measure "perplexity at this budget"; ``None`` is full attention."""
    return lambda evaluation: evaluation.perplexity(budget)


def gap_percent(evaluation: Evaluation) -> float:
    """The attention gap: how much higher perplexity is when the same model runs sparse at its training budget."""
    full = evaluation.perplexity(None)
    if evaluation.training_budget is None or not full:
        return math.nan
    return 100 * (evaluation.perplexity(evaluation.training_budget) / full - 1)


def kl_nats(evaluation: Evaluation) -> float:
    """KL(p_full || p_sparse) in nats a token at the training budget."""
    run = evaluation.run(evaluation.training_budget) if evaluation.training_budget else None
    return run.kl if run else math.nan


def attention_sparsity(evaluation: Evaluation, mode: str = "full") -> float:
    """Mean AttnSparsity over layers, under an inference mode."""
    run = evaluation.attention_in(mode)
    return run.mean.attention_sparsity if run else math.nan


def sparse_attention_sparsity(evaluation: Evaluation) -> float:
    """Mean AttnSparsity over layers, under sparse inference."""
    return attention_sparsity(evaluation, "sparse")


def entropy_bits(evaluation: Evaluation) -> float:
    """Mean entropy of the full attention distribution, under full inference."""
    run = evaluation.attention_in("full")
    return run.mean.entropy_bits if run else math.nan


def bound_share(evaluation: Evaluation) -> float:
    """Share of queries that meet Theorem 1's bound: the worst of all inference modes and budgets measured."""
    shares = [run.mean.bound_share for run in evaluation.attention]
    known = [value for value in shares if not math.isnan(value)]
    return min(known, default=math.nan)


def full_perplexity(evaluation: Evaluation) -> float:
    """Perplexity under full inference."""
    return evaluation.perplexity(None)


def native_perplexity(evaluation: Evaluation) -> float:
    """Perplexity of sparse inference at the training budget."""
    return evaluation.perplexity(evaluation.training_budget) if evaluation.training_budget else math.nan


def needle(wanted: Callable[[int], bool], scaling: str, mode: str = "full") -> Measure:
    """Share of needle tasks whose right answer is the likeliest candidate, at the lengths wanted, mean over forms."""

    def measure(evaluation: Evaluation) -> float:
        found = [
            x.likelihood
            for x in evaluation.suite.needle
            if x.mode == mode and x.scaling == scaling and wanted(x.length)
        ]
        return math.fsum(found) / len(found) if found else math.nan

    return measure


def sliding(length: int, scaling: str, mode: str = "full") -> Measure:
    """Sliding-window perplexity at a context length."""

    def measure(evaluation: Evaluation) -> float:
        found = (
            x.perplexity for x in evaluation.suite.sliding if (x.mode, x.length, x.scaling) == (mode, length, scaling)
        )
        return next(found, math.nan)

    return measure


def rise(trained: int, longest: int, scaling: str) -> Measure:
    """How much sliding-window perplexity rises from the trained length to a longer one, in percent."""
    return lambda e: 100 * (sliding(longest, scaling)(e) / sliding(trained, "none")(e) - 1)


def sparsity_at(length: int, mode: str = "full") -> Measure:
    """AttnSparsity at a context length, RoPE as trained."""

    def measure(evaluation: Evaluation) -> float:
        found = (
            x.attention_sparsity
            for x in evaluation.suite.attention
            if (x.mode, x.length, x.scaling) == (mode, length, "none")
        )
        return next(found, math.nan)

    return measure


def sparsity_loss(shortest: int, longest: int) -> Measure:
    """How much AttnSparsity falls from a short context to a long one."""
    return lambda e: sparsity_at(shortest)(e) - sparsity_at(longest)(e)


def rule_percent(evaluation: Evaluation) -> float:
    """How much higher perplexity is when the same weights select by the published code's merge, in percent."""
    rules = dict(evaluation.suite.rules)
    exact, official = rules.get("exact", math.nan), rules.get("official", math.nan)
    return 100 * (official / exact - 1) if exact else math.nan
