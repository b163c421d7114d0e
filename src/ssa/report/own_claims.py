"""What this project claims beyond the paper: what subsampled alignment costs, and what the exact top-k changes.

The rule is that of :mod:`ssa.report.claims`. "No worse" means that the interval ends below ``NO_WORSE_PERCENT``.
"""

from __future__ import annotations

from ssa.report import formats, measures
from ssa.report.claims import Claim, Verdict, judge, label, relative_percent, shown, together
from ssa.report.intervals import Interval, interval
from ssa.report.study import Study

NO_WORSE_PERCENT = 1.0  # of perplexity
FRACTIONS = {"ssa": "1 (exact)", "sampled-4": "1/4", "sampled-8": "1/8", "sampled-16": "1/16"}


def own_claims(study: Study) -> list[Claim]:
    """Every claim for which a piece is there."""
    found = [_no_worse(study, name) for name in FRACTIONS if name != "ssa" and study.of(name)]
    return [*found, *_exact_is_better(study)]


def _no_worse(study: Study, variant: str) -> Claim:
    """Perplexity in both modes against exact SSA, paired by seed."""
    modes = {"full": measures.full_perplexity, "sparse": measures.native_perplexity}
    measured, differences, verdicts = [], [], []
    for mode, measure in modes.items():
        both = [interval([*study.values(name, measure).values()]).mean for name in (variant, "ssa")]
        measured.append(f"{mode} {formats.perplexity(both[0])} against {formats.perplexity(both[1])}")
        difference = relative_percent(study, variant, "ssa", measure)
        differences.append(f"{mode}: {shown(difference, formats.signed_percent)}")
        verdicts.append(judge(difference, NO_WORSE_PERCENT))
    return Claim(
        f"SSA aligned on {FRACTIONS[variant]} of the queries",
        f"perplexity no worse than exact SSA in either mode (by less than {NO_WORSE_PERCENT:g} %)",
        "",
        tuple(measured),
        tuple(differences),
        together(verdicts),
    )


def _exact_is_better(study: Study) -> list[Claim]:
    """The same weights under the exact top-k and under the published code's merge."""
    changes = {name: interval([*study.values(name, measures.rule_percent).values()]) for name in study.variants("core")}
    changes = {name: change for name, change in changes.items() if change.count}
    if not changes:
        return []
    return [
        Claim(
            "Exact top-k instead of the published merge, same weights",
            "perplexity of sparse inference is lower for every method",
            "",
            (),
            tuple(f"{label(name)}: merge {shown(x, formats.signed_percent)}" for name, x in changes.items()),
            together([judge(_negative(x)) for x in changes.values()]),
        )
    ]


def _negative(x: Interval) -> Interval:
    return Interval(-x.mean, -x.high, -x.low, x.count)


def verdict_text(verdict: Verdict) -> str:
    """Of a claim of ours: there is nothing to reproduce."""
    return "holds" if verdict is Verdict.REPRODUCED else verdict.value
