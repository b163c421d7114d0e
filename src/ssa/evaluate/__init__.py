"""Measuring a model: perplexity in both modes at every budget, and what its attention does."""

from ssa.evaluate.matrix import Plan, RunFacts, evaluate, run_facts, write_result
from ssa.evaluate.perplexity import Setting, perplexity
from ssa.evaluate.statistics import attention_statistics, selection_map

__all__ = [
    "Plan",
    "RunFacts",
    "Setting",
    "attention_statistics",
    "evaluate",
    "perplexity",
    "run_facts",
    "selection_map",
    "write_result",
]
