"""The sentences of the report that are computed from the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ssa.report import formats
from ssa.report.checks import Check, Verdict
from ssa.report.results import Evaluation
from ssa.report.runs import Group
from ssa.report.table import budgets


def statement(groups: Sequence[Group]) -> str:
    """What was measured, in one sentence."""
    evaluations = all_evaluations(groups)
    if not groups:
        return "None of the four methods was trained."
    if not evaluations:
        return f"The training of {formats.listed(group.label for group in groups)}; no evaluation is there yet."
    evaluated = [group for group in groups if group.evaluations]
    models = [evaluation.model for evaluation in evaluations]
    details = [model_sizes(groups)]
    if trained := [model.trained_tokens for model in models if model.trained_tokens is not None]:
        details.append(f"{_range(trained)} training tokens")
    if seeds := sorted({model.seed for model in models if model.seed is not None}):
        details.append(f"seed{'s' if len(seeds) > 1 else ''} {formats.listed(map(str, seeds))}")
    subject = "Language models were" if len(models) > 1 else "A language model was"
    labels = formats.listed(group.label for group in evaluated)
    return (
        f"{subject} trained with {labels} ({', '.join(details)}) and run on "
        f"{formats.listed(distinct(evaluations, data_line))}, {_ways(evaluated)}."
    )


def model_sizes(groups: Sequence[Group]) -> str:
    """How many parameters the evaluated models have, such as ``12.9 M parameters``."""
    return f"{_range(evaluation.model.parameters for evaluation in all_evaluations(groups))} parameters"


def _ways(groups: Sequence[Group]) -> str:
    ways = []
    if any(run.mode == "full" for evaluation in all_evaluations(groups) for run in evaluation.runs):
        ways.append("with full attention")
    if fields := sorted({budget.receptive_field for budget in budgets(groups)}):
        sizes = formats.listed((f"{field:,}" for field in fields), "or")
        ways.append(f"with block-sparse attention in which a query reads at most {sizes} tokens")
    return " and ".join(ways) or "without any perplexity measured"


def outcome(checks: Sequence[Check]) -> str:
    """How many of the paper's predictions hold."""
    count = {verdict: sum(check.verdict is verdict for check in checks) for verdict in Verdict}
    parts = [f"{count[Verdict.HOLDS]} hold here"]
    if count[Verdict.FAILS]:
        parts.append(f"{count[Verdict.FAILS]} do{'es' if count[Verdict.FAILS] == 1 else ''} not")
    if count[Verdict.MISSING]:
        parts.append(f"{count[Verdict.MISSING]} could not be checked")
    return f"Of {len(checks)} predictions taken from the paper, {formats.listed(parts)}."


def notes(groups: Sequence[Group]) -> list[str]:
    """What a reader must know before comparing the numbers."""
    evaluations = all_evaluations(groups)
    found = []
    if len(distinct(evaluations, data_line)) > 1:
        found.append("The models were evaluated on different data, so that their perplexities do not compare.")
    if len({evaluation.model.trained_tokens for evaluation in evaluations}) > 1:
        found.append("The models were trained on different numbers of tokens.")
    if len({evaluation.training_budget for evaluation in evaluations}) > 1:
        found.append("The models were trained with different budgets; gap, KL and AttnSparsity are each at their own.")
    if any(group.variant for group in groups):
        main = formats.listed(group.label for group in groups if not group.variant and group.evaluations)
        found.append(f"There are several variants of a method. The predictions are checked on {main}.")
    absent = [group.label for group in groups if not group.evaluations]
    if absent and evaluations:
        found.append(f"{formats.listed(absent)}: trained, but not evaluated yet.")
    return found


def all_evaluations(groups: Iterable[Group]) -> list[Evaluation]:
    """The evaluations of all groups."""
    return [evaluation for group in groups for evaluation in group.evaluations]


def distinct(evaluations: Iterable[Evaluation], describe: Callable[[Evaluation], str]) -> list[str]:
    """Descriptions in order of appearance, each once; empty ones are left out."""
    return list(dict.fromkeys(text for evaluation in evaluations if (text := describe(evaluation))))


def data_line(evaluation: Evaluation) -> str:
    """The evaluation data in a few words."""
    data = evaluation.data
    return f"{data.name}, {data.split} ({formats.large(data.tokens)} tokens in rows of {data.row_length:,})"


def machine_line(evaluation: Evaluation) -> str:
    """The machine in one line."""
    return ", ".join(f"{key} {value}" for key, value in evaluation.machine)


def _range(counts: Iterable[int]) -> str:
    ordered = sorted(counts)
    low, high = formats.large(ordered[0]), formats.large(ordered[-1])
    return low if low == high else f"{low} to {high}"
