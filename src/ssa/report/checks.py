"""What the paper predicts, set against what was measured. Every verdict is computed from the evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from ssa.report import formats, measures
from ssa.report.measures import Measure
from ssa.report.results import Budget
from ssa.report.runs import METHODS, Group, seed_order

ROUNDING = 1e-4  # two budgets that both cover the whole document give the same perplexity but for rounding

Case = tuple[float, ...]
Test = Callable[[Case], bool]


class Verdict(Enum):
    """The outcome of a check."""

    HOLDS = "holds"
    FAILS = "does not hold here"
    MISSING = "not measured"


@dataclass(frozen=True)
class Check:
    """One prediction and its outcome. ``count`` says in how many of several seeds it holds."""

    subject: str
    claim: str
    paper: str
    measured: tuple[str, ...]
    verdict: Verdict
    count: str


@dataclass(frozen=True)
class _Comparison:
    """A prediction about one measure of several methods, SSA first; ``paper`` quotes the paper's 1B figures."""

    subject: str
    claim: str
    methods: tuple[str, ...]
    measure: Measure
    show: formats.Format
    test: Test
    paper: str


def _falling(case: Case) -> bool:
    return all(a > b for a, b in pairwise(case))


def _rising(case: Case) -> bool:
    return all(a < b for a, b in pairwise(case))


_SPARSITY = _Comparison(
    subject="AttnSparsity, full inference",
    claim="SSA > FullAttn > MoBA",
    methods=("ssa", "full", "moba"),
    measure=measures.attention_sparsity,
    show=formats.share,
    test=_falling,
    paper="0.705 > 0.641 > 0.527",
)
_GAP = _Comparison(
    subject="Attention gap",
    claim="SSA smaller than FullAttn",
    methods=("ssa", "full"),
    measure=measures.gap_percent,
    show=formats.signed_percent,
    test=_rising,
    paper="+4.5 % < +12.7 %",
)
_ENTROPY = _Comparison(
    subject="Entropy, full inference",
    claim="SSA < FullAttn < MoBA",
    methods=("ssa", "full", "moba"),
    measure=measures.entropy_bits,
    show=formats.bits,
    test=_rising,
    paper="7.63 < 8.89 < 9.01 bits",
)
_KL = _Comparison(
    subject="KL(full ‖ sparse)",
    claim="smallest for SSA",
    methods=("ssa", "full", "moba"),
    measure=measures.kl_nats,
    show=formats.nats,
    test=lambda case: case[0] < min(case[1:]),
    paper="0.0661 against 0.1486 and 0.1024",
)


def run_checks(groups: Sequence[Group]) -> list[Check]:
    """All checks, over the first variant of each method. A check holds when it holds in every seed."""
    main = {group.method: group for group in groups if group.variant == 0 and group.evaluations}
    return [
        _compared(_SPARSITY, main),
        _compared(_GAP, main),
        _compared(_ENTROPY, main),
        _compared(_KL, main),
        _falls_with_budget(main.get("ssa")),
        _theorem(list(main.values())),
    ]


def _judge(cases: Sequence[Case], test: Test, unit: str = "seeds") -> tuple[Verdict, str]:
    """The verdict over all cases whose values are finite, and how many of them pass."""
    usable = [case for case in cases if all(map(math.isfinite, case))]
    if not usable:
        return Verdict.MISSING, ""
    passed = sum(map(test, usable))
    count = f"{passed} of {len(usable)} {unit}" if len(cases) > 1 else ""
    if len(usable) < len(cases):
        count += f", {len(cases) - len(usable)} not measured"
    return Verdict.HOLDS if passed == len(usable) else Verdict.FAILS, count


def _compared(what: _Comparison, main: dict[str, Group]) -> Check:
    """SSA and whichever of the other methods were measured, seed by seed."""
    present = [main[m] for m in what.methods if m in main and main[m].spread(what.measure).finite]
    absent = [METHODS[m] for m in what.methods if m not in {group.method for group in present}]
    measured = [f"{group.label} {what.show(group.spread(what.measure).mean)}" for group in present]
    measured += [f"{name} not measured" for name in absent]
    comparable = len(present) > 1 and present[0].method == "ssa"
    verdict, count = _judge(_cases(present, what.measure) if comparable else [], what.test)
    return Check(what.subject, what.claim, what.paper, tuple(measured), verdict, count)


def _cases(groups: Sequence[Group], measure: Measure) -> list[Case]:
    """The values of all groups, in order, for each seed they share; the means where they share none."""
    by_seed = [{item.model.seed: measure(item) for item in group.evaluations} for group in groups]
    shared = sorted(set.intersection(*(set(values) for values in by_seed)), key=seed_order)
    if not shared:
        return [tuple(group.spread(measure).mean for group in groups)]
    return [tuple(values[seed] for values in by_seed) for seed in shared]


def _falls_with_budget(ssa: Group | None) -> Check:
    steps = _budgets_of_trained_size(ssa) if ssa else []
    measured: list[str] = []
    verdict, count = Verdict.MISSING, ""
    if ssa is not None and len(steps) > 1:
        cases = [tuple(item.perplexity(budget) for budget in steps) for item in ssa.evaluations]
        verdict, count = _judge(cases, _never_rises)
        for budget in steps:
            mean = ssa.spread(measures.perplexity_at(budget)).mean
            measured.append(f"{budget.receptive_field:,} tokens {formats.perplexity(mean)}")
    paper = "15.62, 15.44, 15.39, 15.26 at 512 to 4,096 tokens"
    return Check("Perplexity of SSA", "falls as the budget grows", paper, tuple(measured), verdict, count)


def _never_rises(case: Case) -> bool:
    return case[-1] < case[0] and all(b <= a * (1 + ROUNDING) for a, b in pairwise(case))


def _budgets_of_trained_size(group: Group) -> list[Budget]:
    """The budgets run with the block size of training: those differ in the number of blocks alone."""
    found = {run.budget for item in group.evaluations for run in item.runs if run.budget}
    return sorted(budget for budget in found if budget.block_size == group.evaluations[0].model.block_size)


def _theorem(groups: Sequence[Group]) -> Check:
    shares = {group.label: group.spread(measures.bound_share) for group in groups}
    known = {label: spread for label, spread in shares.items() if spread.finite}
    measured = tuple(f"{label} {formats.percent_met(spread.low)}" for label, spread in known.items())
    verdict, count = _judge([(v,) for spread in known.values() for v in spread.values], _every_query, "evaluations")
    return Check("Theorem 1", "the bound holds for every query", "100 % (it is proven)", measured, verdict, count)


def _every_query(case: Case) -> bool:
    return case[0] >= 1
