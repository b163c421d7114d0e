"""The verdicts: each must turn when the numbers turn."""

import math

import pytest

from ssa.report.checks import Verdict, run_checks
from ssa.report.results import parse_evaluation
from ssa.report.runs import Run, group_runs
from ssa.report.wording import notes, outcome, statement

SPARSITY, GAP, ENTROPY, KL, BUDGET, THEOREM = range(6)


def _groups(documents):
    return group_runs(Run(parse_evaluation(document, str(index))) for index, document in enumerate(documents))


def _all(evaluation, seeds=(0,), methods=("full", "moba", "ssa")):
    return [evaluation(method, seed) for method in methods for seed in seeds]


def _of(documents, method, seed=0):
    return next(d for d in documents if d["model"]["method"] == method and d["model"]["seed"] == seed)


def test_everything_holds_on_data_like_the_papers(evaluation):
    checks = run_checks(_groups(_all(evaluation)))
    assert [check.verdict for check in checks] == [Verdict.HOLDS] * 6
    assert outcome(checks) == "Of 6 predictions taken from the paper, 6 hold here."
    assert checks[GAP].measured[0].startswith("SSA +9.")


def _set_statistic(key, value):
    def change(document):
        document["attention"][0]["mean"][key] = value

    return change


def _set_run(index, key, value):
    def change(document):
        document["runs"][index][key] = value

    return change


@pytest.mark.parametrize(
    ("check", "method", "change"),
    [
        (SPARSITY, "moba", _set_statistic("attention_sparsity", 0.65)),
        (SPARSITY, "full", _set_statistic("attention_sparsity", 0.75)),
        (GAP, "ssa", _set_run(2, "perplexity", 40.0)),
        (ENTROPY, "ssa", _set_statistic("entropy_bits", 6.2)),
        (ENTROPY, "moba", _set_statistic("entropy_bits", 5.8)),
        (KL, "moba", _set_run(2, "kl_full_sparse", 0.0659)),
        (BUDGET, "ssa", _set_run(4, "perplexity", 25.9)),
        (THEOREM, "moba", _set_statistic("bound_share", 0.99999)),
    ],
)
def test_a_verdict_turns_with_the_numbers(evaluation, check, method, change):
    documents = _all(evaluation)
    change(_of(documents, method))
    verdicts = [item.verdict for item in run_checks(_groups(documents))]
    assert verdicts[check] is Verdict.FAILS
    if check in (SPARSITY, ENTROPY, KL, THEOREM):
        assert verdicts.count(Verdict.FAILS) == 1


def test_a_tie_is_no_order(evaluation):
    documents = _all(evaluation)
    for document in documents:
        _set_statistic("attention_sparsity", 0.5)(document)
        _set_statistic("entropy_bits", 5.0)(document)
        _set_run(2, "kl_full_sparse", 0.1)(document)
    verdicts = [check.verdict for check in run_checks(_groups(documents))]
    assert [verdicts[index] for index in (SPARSITY, ENTROPY, KL)] == [Verdict.FAILS] * 3


def test_variants_are_not_what_is_checked(evaluation):
    ablation = evaluation("ssa", 0, name="ssa-no-alignment")
    _set_statistic("attention_sparsity", 0.1)(ablation)
    groups = _groups([ablation, *_all(evaluation)])
    assert run_checks(groups)[SPARSITY].verdict is Verdict.HOLDS
    assert "checked on FullAttn, MoBA and SSA · ssa." in notes(groups)[0]


def test_equal_perplexities_of_saturated_budgets_are_no_rise(evaluation):
    documents = _all(evaluation)
    last = _of(documents, "ssa")["runs"][3]["perplexity"]
    _set_run(4, "perplexity", last * (1 + 1e-6))(_of(documents, "ssa"))
    assert run_checks(_groups(documents))[BUDGET].verdict is Verdict.HOLDS
    for index in range(1, 5):
        _set_run(index, "perplexity", 20.0)(_of(documents, "ssa"))
    assert run_checks(_groups(documents))[BUDGET].verdict is Verdict.FAILS, "constant is not falling"


def test_a_check_holds_only_if_it_holds_in_every_seed(evaluation):
    documents = _all(evaluation, seeds=(1, 2, 3))
    _set_statistic("attention_sparsity", 0.3)(_of(documents, "ssa", 2))
    checks = run_checks(_groups(documents))
    assert (checks[SPARSITY].verdict, checks[SPARSITY].count) == (Verdict.FAILS, "2 of 3 seeds")
    assert (checks[ENTROPY].verdict, checks[ENTROPY].count) == (Verdict.HOLDS, "3 of 3 seeds")
    assert checks[THEOREM].count == "9 of 9 evaluations"
    assert outcome(checks) == "Of 6 predictions taken from the paper, 5 hold here and 1 does not."


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_seed_that_was_not_measured_is_counted_out_loud(evaluation, value):
    documents = _all(evaluation, seeds=(1, 2))
    _set_run(2, "kl_full_sparse", value)(_of(documents, "full", 1))
    check = run_checks(_groups(documents))[KL]
    assert (check.verdict, check.count) == (Verdict.HOLDS, "1 of 1 seeds, 1 not measured")


def test_seeds_are_compared_pairwise_and_means_only_without_common_seeds(evaluation):
    documents = [evaluation("ssa", 1), evaluation("ssa", 2), evaluation("full", 2), evaluation("full", 3)]
    assert run_checks(_groups(documents))[SPARSITY].count == ""
    _set_statistic("attention_sparsity", 0.1)(documents[0])  # seed 1 has no counterpart
    assert run_checks(_groups(documents))[SPARSITY].verdict is Verdict.HOLDS
    apart = [documents[0], evaluation("full", 3)]
    assert run_checks(_groups(apart))[SPARSITY].verdict is Verdict.FAILS


def test_what_is_missing_is_said(evaluation):
    checks = run_checks(_groups([evaluation("ssa", 0)]))
    assert [check.verdict for check in checks] == [Verdict.MISSING] * 4 + [Verdict.HOLDS] * 2
    assert checks[SPARSITY].measured[1:] == ("FullAttn not measured", "MoBA not measured")
    without_ssa = run_checks(_groups([evaluation("full", 0), evaluation("moba", 0)]))
    assert [check.verdict for check in without_ssa] == [Verdict.MISSING] * 5 + [Verdict.HOLDS]
    part = run_checks(_groups([evaluation("ssa", 0), evaluation("moba", 0)]))[SPARSITY]
    assert part.verdict is Verdict.HOLDS
    assert "FullAttn not measured" in part.measured
    bare = evaluation("ssa", 0)
    bare.update(runs=[], attention=[], selection_map=None)
    assert {check.verdict for check in run_checks(_groups([bare]))} == {Verdict.MISSING}


def test_the_sentences_follow_the_data(evaluation):
    documents = _all(evaluation, seeds=(1, 2))
    groups = _groups(documents)
    assert statement(groups) == (
        "Language models were trained with FullAttn, MoBA and SSA (14.2 M parameters, 26.2 M training tokens, "
        "seeds 1 and 2) and run on tiny-stories, valid (1.05 M tokens in rows of 512), with full attention and with "
        "block-sparse attention in which a query reads at most 32, 64, 128 or 256 tokens."
    )
    assert notes(groups) == []
    documents[0]["data"]["name"] = "other"
    documents[1]["model"]["trained_tokens"] = 1
    documents[2]["model"]["num_blocks"] = 8
    found = " ".join(notes(_groups(documents)))
    for words in ("different data", "different numbers of tokens", "different budgets", "several variants"):
        assert words in found
