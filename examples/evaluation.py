"""Perplexity and attention of a model in both modes, two budgets: ``python examples/evaluation.py RUN DATA``."""

import sys

from ssa.data import PackedDataset
from ssa.evaluate import Plan, evaluate
from ssa.model import load_model

model, data = load_model(sys.argv[1]), PackedDataset(sys.argv[2], "valid")
result = evaluate(model, data, Plan(budgets=(1, 4), rows=8, statistics_rows=2))
for run in result["runs"]:
    budget = "all tokens" if run["num_blocks"] is None else f"{run['receptive_field']} tokens"
    print(f"{run['mode']:<6} {budget:<10} perplexity {run['perplexity']:.2f}")
for attention in result["attention"]:
    print(f"{attention['mode']} inference: AttnSparsity {attention['mean']['attention_sparsity']:.3f}")
