"""The paper's claims, each with our figure, its interval and a verdict by one rule.

The rule. A claim says that a difference has a sign. It is *reproduced* if the 95 % t interval of the difference,
paired by seed, lies wholly on the claimed side of zero (for a chain of methods: every neighbouring pair), *refuted* if
one lies wholly on the other side, and *not resolved at this scale* otherwise, so always with a single seed. "No worse"
is the same with a margin in place of zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from ssa.report import formats, measures
from ssa.report.intervals import Interval, interval, paired
from ssa.report.results import Budget, Evaluation
from ssa.report.runs import METHODS
from ssa.report.study import Measure, Study

NO_WORSE_PERCENT = 2.0  # "as good as full attention": the paper's SSA is 1 % behind
RISE_PERCENT = 0.1  # a rise in perplexity from one budget to the next that is called rounding


class Verdict(Enum):
    """What a claim has come to."""

    REPRODUCED = "reproduced"
    UNRESOLVED = "not resolved at this scale"
    REFUTED = "refuted"
    MISSING = "not measured"


@dataclass(frozen=True)
class Claim:
    """One line of the table.

    Attributes:
        subject: what it is about; claim: what the paper says; paper: its figures.
        measured: our means.
        differences: what was judged, with intervals.
        verdict: by the rule above.
    """

    subject: str
    claim: str
    paper: str
    measured: tuple[str, ...]
    differences: tuple[str, ...]
    verdict: Verdict


def judge(difference: Interval, margin: float = 0.0) -> Verdict:
    """The verdict on "the difference is below ``margin``"."""
    if not difference.count:
        return Verdict.MISSING
    if difference.high < margin:
        return Verdict.REPRODUCED
    return Verdict.REFUTED if difference.low > margin else Verdict.UNRESOLVED


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several parts: missing and refuted weigh most, and only all of them reproduce the whole."""
    for verdict in (Verdict.MISSING, Verdict.REFUTED, Verdict.UNRESOLVED):
        if verdict in verdicts:
            return verdict
    return Verdict.REPRODUCED if verdicts else Verdict.MISSING


def all_claims(study: Study) -> list[Claim]:
    """Every claim, in the order of the table."""
    budget = _training_budget(study)
    sparse = measures.perplexity_at(budget) if budget else _nothing
    full = measures.perplexity_at(None)
    return [
        _order(study, "AttnSparsity, full inference", "SSA > FullAttn > MoBA", ("ssa", "full", "moba"),
               measures.attention_sparsity, formats.share, "0.705 > 0.641 > 0.527", falls=True),
        _order(study, "Entropy of attention, full inference", "SSA < FullAttn < MoBA", ("ssa", "full", "moba"),
               measures.entropy_bits, formats.bits, "7.63 < 8.89 < 9.01 bits"),
        _below_all(study, "KL(full ‖ sparse)", "smallest for SSA", measures.kl_nats, formats.nats,
                   "0.0661 against 0.1486 (FullAttn), 0.1024 (MoBA)"),
        _order(study, "Attention gap", "SSA smaller than FullAttn", ("ssa", "full"), measures.gap_percent,
               formats.signed_percent, "+4.5 % < +12.7 %"),
        _order(study, "Perplexity, sparse inference", "SSA < MoBA < FullAttn", ("ssa", "moba", "full"), sparse,
               formats.perplexity, "15.96 < 16.54 < 17.05", relative=True),
        _order(study, "Perplexity, sparse inference", "SSA < NSA", ("ssa", "nsa"), sparse, formats.perplexity,
               "15.96 < 16.02", relative=True),
        _order(study, "Perplexity, full inference", "SSA < MoBA", ("ssa", "moba"), full, formats.perplexity,
               "15.28 < 16.68", relative=True),
        _no_worse_full(study, full),
        _monotone(study),
        *_long(study),
        *_unstable(study),
        _theorem(study),
    ]  # fmt: skip


# ---------------------------------------------------------------------- comparisons
def _nothing(evaluation: Evaluation) -> float:
    return math.nan


def _training_budget(study: Study) -> Budget | None:
    return next((group.training_budget for group in study.core if group.training_budget), None)


def label(variant: str) -> str:
    """How a variant is written."""
    return METHODS.get(variant, variant)


def shown(value: Interval, show: formats.Format) -> str:
    """A mean with its interval."""
    if not value.count:
        return formats.MISSING
    if value.count == 1:
        return f"{show(value.mean)} (one seed)"
    return f"{show(value.mean)} [{show(value.low)}, {show(value.high)}]".replace("-", "−")


def signed(show: formats.Format) -> formats.Format:
    """The same format with a sign."""
    return lambda value: value_sign(value) + show(abs(value))


def value_sign(value: float) -> str:
    """``+`` or a true minus."""
    return "−" if value < 0 else "+"


def relative_percent(study: Study, first: str, second: str, measure: Measure) -> Interval:
    """How much higher ``first`` is than ``second`` in percent, paired by seed."""
    a, b = study.values(first, measure), study.values(second, measure)
    both = sorted(a.keys() & b.keys())
    return interval([100 * (a[seed] / b[seed] - 1) for seed in both if b[seed]])


def _order(
    study: Study,
    subject: str,
    claim: str,
    variants: Sequence[str],
    measure: Measure,
    show: formats.Format,
    paper: str,
    *,
    falls: bool = False,
    relative: bool = False,
) -> Claim:
    """A chain of methods, rising from the first on (or falling)."""
    pairs = list(pairwise(variants))
    verdicts, differences = [], []
    for first, second in pairs:
        low, high = (second, first) if falls else (first, second)
        unit = formats.signed_percent if relative or show is formats.signed_percent else signed(show)
        if relative:
            found = relative_percent(study, low, high, measure)
        else:
            found = paired(study.values(low, measure), study.values(high, measure))
        verdicts.append(judge(found))
        differences.append(f"{label(low)} − {label(high)}: {shown(found, unit)}")
    return Claim(subject, claim, paper, _means(study, variants, measure, show), tuple(differences), together(verdicts))


def _means(study: Study, variants: Sequence[str], measure: Measure, show: formats.Format) -> tuple[str, ...]:
    found = [(name, interval([*study.values(name, measure).values()])) for name in variants]
    return tuple(f"{label(name)} {show(value.mean) if value.count else formats.MISSING}" for name, value in found)


def _below_all(study: Study, subject: str, claim: str, measure: Measure, show: formats.Format, paper: str) -> Claim:
    others = ("full", "moba")
    found = [(name, paired(study.values("ssa", measure), study.values(name, measure))) for name in others]
    differences = tuple(f"SSA − {label(name)}: {shown(value, signed(show))}" for name, value in found)
    verdict = together([judge(value) for _, value in found])
    return Claim(subject, claim, paper, _means(study, ("ssa", *others), measure, show), differences, verdict)


def _no_worse_full(study: Study, full: Measure) -> Claim:
    found = relative_percent(study, "ssa", "full", full)
    claim = f"SSA no worse than FullAttn (by less than {NO_WORSE_PERCENT:g} %)"
    means = _means(study, ("ssa", "full"), full, formats.perplexity)
    differences = (f"SSA − FullAttn: {shown(found, formats.signed_percent)}",)
    verdict = judge(found, NO_WORSE_PERCENT)
    return Claim("Perplexity, full inference", claim, "15.28 against 15.13 (+1.0 %)", means, differences, verdict)


def _monotone(study: Study) -> Claim:
    """Every step to a larger budget of the trained block size lowers SSA's perplexity, or leaves it."""
    group = next((group for group in study.core if group.method == "ssa"), None)
    budgets: list[Budget] = []
    if group is not None and group.training_budget is not None:
        size = group.training_budget.block_size
        found = {run.budget for item in group.evaluations for run in item.runs if run.budget}
        budgets = sorted(budget for budget in found if budget.block_size == size)
    measured, verdicts, differences = [], [], []
    for budget in budgets:
        mean = interval([*study.values("ssa", measures.perplexity_at(budget)).values()]).mean
        measured.append(f"{budget.receptive_field:,} tokens {formats.perplexity(mean)}")
    for small, large in pairwise(budgets):
        before = study.values("ssa", measures.perplexity_at(small))
        after = study.values("ssa", measures.perplexity_at(large))
        step = interval([100 * (after[seed] / before[seed] - 1) for seed in sorted(before.keys() & after.keys())])
        verdicts.append(judge(step, RISE_PERCENT))
        differences.append(f"to {large.receptive_field:,}: {shown(step, formats.signed_percent)}")
    return Claim(
        "Perplexity of SSA by budget",
        f"falls with every step (rises of {RISE_PERCENT:g} % count as rounding)",
        "15.62, 15.44, 15.39, 15.26 at 512 to 4,096 tokens",
        tuple(measured),
        tuple(differences),
        together(verdicts),
    )


# ---------------------------------------------------------------------- long context
def _long(study: Study) -> list[Claim]:
    lengths = sorted(
        {x.length for g in study.core for e in g.evaluations for x in e.suite.sliding if x.scaling == "none"}
    )
    if not lengths:
        return [Claim("Long context", "SSA extrapolates best", "", (), (), Verdict.MISSING)]
    trained = _trained_length(study) or lengths[-1]
    beyond = [length for length in lengths if length > trained]
    needle_paper = "RULER single-2 at 4k, 8k, 16k, 32k: 100, 100, 83, 35 %"
    claims = [
        _order(study, f"Needles within the trained length ({trained:,})", "SSA finds more than FullAttn",
               ("full", "ssa"), measures.needle(lambda n: n <= trained, "none"), formats.percent, needle_paper),
    ]  # fmt: skip
    if not beyond:
        return claims
    longest = beyond[-1]
    show = formats.signed_percent
    claims += [
        _order(study, f"Needles beyond it ({longest:,})", "SSA finds more than FullAttn", ("full", "ssa"),
               measures.needle(lambda n: n > trained, "none"), formats.percent, needle_paper),
        _order(study, f"Perplexity from {trained:,} to {longest:,}, RoPE as trained", "SSA rises less than FullAttn",
               ("ssa", "full"), measures.rise(trained, longest, "none"), show, "SSA extrapolates furthest"),
    ]  # fmt: skip
    if any(x.scaling == "llama3" for g in study.core for e in g.evaluations for x in e.suite.sliding):
        claims.append(
            _order(study, f"Perplexity from {trained:,} to {longest:,}, RoPE scaled", "SSA rises less than FullAttn",
                   ("ssa", "full"), measures.rise(trained, longest, "llama3"), show, "robust to RoPE scaling")
        )  # fmt: skip
    shortest = lengths[0]
    if shortest == trained:
        return claims
    loss = measures.sparsity_loss(shortest, trained)
    claims.append(
        _order(study, f"AttnSparsity lost from {shortest:,} to {trained:,}", "SSA < FullAttn < MoBA",
               ("ssa", "full", "moba"), loss, formats.share, "4k to 32k: 0.075 < 0.101 < 0.183")
    )  # fmt: skip
    return claims


def _trained_length(study: Study) -> int | None:
    return next((item.data.row_length for group in study.core for item in group.evaluations), None)


# ---------------------------------------------------------------------- stability, theorem
def _unstable(study: Study) -> list[Claim]:
    """Variants that the paper reports as NaN. A short run that stays finite cannot refute that."""
    variants = {
        "sparsity-only": "Full towards sparse alone",
        "commitment-only": "Sparse towards full alone",
        "layer-streams": "Random stream per layer",
    }
    claims = []
    for variant, subject in variants.items():
        pieces = study.of(variant)
        diverged = sum(piece.status == "diverged" for piece in pieces)
        measured = (f"{diverged} of {len(pieces)} runs diverged",) if pieces else ()
        differences: list[str] = []
        if any(piece.run for piece in pieces):
            for name, measure, show in (
                ("AttnSparsity", measures.attention_sparsity, formats.share),
                ("full PPL", measures.full_perplexity, formats.perplexity),
            ):
                own, exact = study.values(variant, measure), study.values("ssa", measure)
                same = interval([exact[seed] for seed in own if seed in exact])  # of the same seeds
                here = show(interval([*own.values()]).mean)
                differences.append(f"{name} {here}" + (f", SSA {show(same.mean)}" if same.count else ""))
        verdict = Verdict.MISSING if not pieces else Verdict.UNRESOLVED
        if pieces and diverged == len(pieces):
            verdict = Verdict.REPRODUCED
        claims.append(Claim(subject, "unstable", "NaN", measured, tuple(differences), verdict))
    return claims


def _theorem(study: Study) -> Claim:
    values = [v for name in study.variants("core") for v in study.values(name, measures.bound_share).values()]
    measured = (f"{formats.percent_met(min(values))} in the worst of {len(values)} evaluations",) if values else ()
    verdict = Verdict.MISSING if not values else Verdict.REPRODUCED if min(values) >= 1 else Verdict.REFUTED
    return Claim("Theorem 1", "the bound holds for every query", "proven", measured, (), verdict)
