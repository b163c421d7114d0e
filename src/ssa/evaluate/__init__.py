"""Measuring a model: perplexity in both modes at every budget, and what its attention does."""

from ssa.evaluate.matrix import Plan, evaluate, write_result
from ssa.evaluate.perplexity import Setting, perplexity
from ssa.evaluate.statistics import attention_statistics, selection_map

__all__ = ["Plan", "Setting", "attention_statistics", "evaluate", "perplexity", "selection_map", "write_result"]
