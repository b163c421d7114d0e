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
