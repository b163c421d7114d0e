"""Measuring a model in both modes at every budget: perplexity, needles, and what its attention does."""

from ssa.evaluate.matrix import Plan, RunFacts, check_writable, evaluate, run_facts, write_result
from ssa.evaluate.needle import Task, make_task
from ssa.evaluate.perplexity import perplexity
from ssa.evaluate.retrieval import make_tasks, needle_results
from ssa.evaluate.rolling import sliding_perplexity, word_perplexity
from ssa.evaluate.running import Setting, running, stretched
from ssa.evaluate.selection import selection_statistics
from ssa.evaluate.statistics import attention_statistics, selection_map
from ssa.evaluate.suite import SuitePlan, run_suite

__all__ = [
    "Plan",
    "RunFacts",
    "Setting",
    "SuitePlan",
    "Task",
    "attention_statistics",
    "check_writable",
    "evaluate",
    "make_task",
    "make_tasks",
    "needle_results",
    "perplexity",
    "run_facts",
    "run_suite",
    "running",
    "selection_map",
    "selection_statistics",
    "sliding_perplexity",
    "stretched",
    "word_perplexity",
    "write_result",
]
