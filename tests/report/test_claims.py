"""Verdicts follow the rule, from synthetic pieces; what they print is safe."""

import json
import math

import pytest

from ssa.errors import ConfigError, DataError
from ssa.report import claims_markdown, read_study, write_study
from ssa.report.claims import Verdict, all_claims, judge, together
from ssa.report.findings import all_tables
from ssa.report.interval_plot import PANELS, difference, interval_figure
from ssa.report.intervals import Interval, interval, paired
from ssa.report.own_claims import own_claims
from ssa.report.study import Study
from ssa.report.study_text import effort

NOT_THERE = Interval(math.nan, math.nan, math.nan, 0)


def suite(method, seed):
    """Long-context figures in the paper's order."""
    worse = {"ssa": 0.0, "full": 1.0, "moba": 2.0, "nsa": 1.5}[method]
    shake = 0.01 * seed
    sliding = [
        {"mode": mode, "length": n, "scaling": scaling, "perplexity": 20 + rise + shake}
        for mode in ("full", "sparse")
        for n, scaling, rise in (
            (256, "none", 1.0),
            (512, "none", 0.0),
            (1024, "none", 2.0 + worse),
            (1024, "llama3", 0.5 + worse),
        )
    ]
    needle = [
        {"mode": "full", "form": "single", "length": n, "scaling": "none", "depth": 0.5,
         "likelihood": 0.9 - 0.2 * worse + shake, "greedy": 0.0, "chance": 0.25, "samples": 5}
        for n in (512, 1024)
    ]  # fmt: skip
    attention = [
        {"mode": "full", "length": n, "scaling": "none", "attention_sparsity": 0.8 - (0.1 + worse / 10) * loss + shake}
        for n, loss in ((256, 0.0), (512, 1.0))
    ]
    layers = [{"layer": i, "union": {"2": 5.0, "4": 7.0 + shake}, "first_token_mass": 0.1} for i in range(2)]
    selection = [{"mode": "sparse", "num_blocks": 4, "layers": layers}]
    rules = [{"rule": "exact", "perplexity": 20.0}, {"rule": "official", "perplexity": 21.0 + shake}]
    return {
        "sliding": sliding, "needle": needle, "attention": attention, "selection": selection, "rules": rules,
        "words": [{"mode": "full", "word_perplexity": 99.0}],
    }  # fmt: skip


@pytest.fixture
def add(tmp_path, evaluation):
    """Write one piece into the study's folder."""

    def write(variant, seed, role="core", status="finished", change=lambda document: None, **more):
        folder = tmp_path / "pieces" / f"{variant}-seed{seed}"
        folder.mkdir(parents=True)
        piece = {"schema": "ssa.piece/1", "variant": variant, "seed": seed, "role": role, "status": status}
        piece |= {"overrides": {}, "message": None, "train_seconds": 20.0 + seed, "evaluate_seconds": 3.0, **more}
        (folder / "piece.json").write_text(json.dumps(piece))
        if status == "finished":
            method = variant if role == "core" else "ssa"
            document = evaluation(method, seed, name=f"{variant}-seed{seed}")
            document["suite"] = suite(method, seed)
            factor = {"ssa": 1.0, "full": 1.08, "moba": 1.04, "nsa": 1.01}[method] if role == "core" else 1.0
            for run in document["runs"]:  # the same for every method, so that seeds pair up
                blocks = run["num_blocks"] or 64
                full = {"ssa": 1.0, "full": 0.995, "moba": 1.05}.get(method, 1.0)
                level = full if run["mode"] == "full" else factor * (1 + 0.2 / blocks)
                run["perplexity"] = 20 * level * (1 + 0.01 * seed) + 0.001 * seed * level
            change(document)
            (folder / "evaluation.json").write_text(json.dumps(document))

    return write


@pytest.fixture
def study(tmp_path, add):
    for seed in (0, 1, 2):
        for method in ("ssa", "full", "moba", "nsa"):
            add(method, seed)
        add("sampled-8", seed, "fraction")
    add("alpha-160", 0, "ablation", overrides={"model.alignment_weight": 160.0})
    add("sparsity-only", 0, "ablation", "diverged", message="step 9: got NaN")
    add("raw", 0, "ablation", "failed", message="out of memory")
    return read_study(tmp_path)


def verdicts(study):
    return {f"{c.subject}: {c.claim}": c.verdict for c in all_claims(study)}


# ---------------------------------------------------------------------- the rule
def test_intervals_are_students_t():
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.high == pytest.approx(2.0 + 4.303 / math.sqrt(3))
    assert interval([5.0]).low == -math.inf
    assert interval([math.nan]).count == 0
    # seeds that shift both variants alike do not widen the interval of the difference
    pair = paired({0: 10.0, 1: 20.0, 2: 30.0, 7: 0.0}, {0: 11.0, 1: 21.0, 2: 31.0})
    assert (pair.mean, pair.low, pair.high) == pytest.approx((-1.0, -1.0, -1.0))


@pytest.mark.parametrize(
    ("low", "high", "sign", "no_worse"),
    [
        (-3, -2.5, Verdict.REPRODUCED, Verdict.REPRODUCED),
        (2.5, 3, Verdict.REFUTED, Verdict.REFUTED),
        (-1, 1, Verdict.UNRESOLVED, Verdict.REPRODUCED),
        (1, 3, Verdict.REFUTED, Verdict.UNRESOLVED),
    ],
)
def test_the_rule(low, high, sign, no_worse):
    found = Interval((low + high) / 2, low, high, 3)
    assert judge(found) is sign
    assert judge(found, 2.0) is no_worse
    assert judge(NOT_THERE) is judge(NOT_THERE, 2.0) is Verdict.MISSING


def test_a_chain_holds_only_as_a_whole():
    yes, no, open_ = Verdict.REPRODUCED, Verdict.REFUTED, Verdict.UNRESOLVED
    assert together([yes, yes]) is yes
    assert together([yes, open_]) is open_
    assert together([no, open_]) is no
    assert together([]) is Verdict.MISSING


# ---------------------------------------------------------------------- the table
def test_figures_in_the_papers_order_are_reproduced(study):
    found = verdicts(study)
    missing = [name for name, verdict in found.items() if verdict is Verdict.MISSING]
    assert missing == ["Sparse towards full alone: unstable", "Random stream per layer: unstable"]
    assert {v for name, v in found.items() if name not in missing} == {Verdict.REPRODUCED}
    assert len(found) == 18


def test_one_seed_resolves_nothing(tmp_path, add):
    for method in ("ssa", "full", "moba"):
        add(method, 0)
    found = verdicts(read_study(tmp_path))
    assert found.pop("Theorem 1: the bound holds for every query") is Verdict.REPRODUCED
    assert set(found.values()) == {Verdict.UNRESOLVED, Verdict.MISSING}


def test_the_other_order_is_refuted(tmp_path, add):
    def swap(document):
        for run in document["attention"]:
            run["mean"]["attention_sparsity"] = 0.3

    for seed in (0, 1, 2):
        add("ssa", seed, change=swap)
        add("full", seed)
        add("moba", seed)
    assert verdicts(read_study(tmp_path))["AttnSparsity, full inference: SSA > FullAttn > MoBA"] is Verdict.REFUTED


def test_a_study_of_variants_alone_has_a_report(tmp_path, add):
    add("sampled-8", 0, "fraction")
    add("alpha-1", 0, "ablation")
    write_study(read_study(tmp_path), tmp_path / "out")
    assert "None of the four methods was trained." in (tmp_path / "out" / "claims.md").read_text()


def test_a_fraction_is_no_worse_only_if_the_whole_interval_says_so(tmp_path, add):
    def worse(factor):
        return lambda document: [run.update(perplexity=run["perplexity"] * factor) for run in document["runs"]]

    for seed in (0, 1, 2):
        add("ssa", seed)
        add("sampled-4", seed, "fraction", change=worse(1.004 + 0.001 * seed))
        add("sampled-8", seed, "fraction", change=worse(1.0 + 0.02 * seed))
        add("sampled-16", seed, "fraction", change=worse(1.05))
    found = {c.subject: c for c in own_claims(read_study(tmp_path))}
    verdicts = [found[f"SSA aligned on {x} of the queries"].verdict for x in ("1/4", "1/8", "1/16")]
    assert verdicts == [Verdict.REPRODUCED, Verdict.UNRESOLVED, Verdict.REFUTED]
    assert found["SSA aligned on 1/16 of the queries"].differences[0].startswith("full: +5.0 % [")
    assert found["Exact top-k instead of the published merge, same weights"].verdict is Verdict.REPRODUCED


def test_calls_say_what_the_study_cost(study, tmp_path):
    assert "GPU minutes" not in effort(study)
    call = {"began": "2026-01-01T00:00:00+00:00", "seconds": 90.0, "gpus": 2, "workers": 6, "pieces": 14}
    (tmp_path / "calls.jsonl").write_text(f"{json.dumps(call)}\n{json.dumps({**call, 'pieces': 0, 'seconds': 30.0})}\n")
    assert "in 6 processes on 2 GPUs: 4.0 GPU minutes (1 pieces failed" in effort(read_study(tmp_path))
    (tmp_path / "calls.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match=r"calls\.jsonl:1"):
        read_study(tmp_path)


def test_the_summary_goes_between_its_marks(study, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- claims -->\nold\n<!-- /claims -->\nrest\n")
    for _ in range(2):
        write_study(study, tmp_path / "out", summary=readme)
    text = readme.read_text()
    assert text.startswith("# Title\n<!-- claims -->\nLanguage models were trained")
    assert text.endswith("|\n<!-- /claims -->\nrest\n")
    assert "\nold\n" not in text
    assert "| AttnSparsity, full inference: SSA > FullAttn > MoBA |" in text
    readme.write_text("# Title\n")
    with pytest.raises(ConfigError, match="no place for the claims"):
        write_study(study, tmp_path / "other", summary=readme)
    assert not (tmp_path / "other").exists()


def test_the_figure_of_intervals_pairs_seeds(study):
    first = difference(study, "moba", *PANELS["Perplexity, full, %"])
    assert (first.mean, first.count) == (pytest.approx(100 * (1.05 / 0.995 - 1)), 3)
    assert first.high - first.low < 1e-6
    sparsity = difference(study, "ssa", *PANELS["AttnSparsity"])
    assert sparsity.low > 0
    assert interval_figure(study) is not None
    assert interval_figure(Study(())) is None


def test_tables(study):
    fractions, rules, ablations = all_tables(study)
    assert [row[0] for row in fractions.rows] == ["1 (exact)", "1/8"]
    assert rules.rows[-1][0] == "SSA"
    assert rules.rows[-1][1].startswith("+5.0 % [")
    assert [row[0] for row in ablations.rows] == ["SSA", "alpha-160", "sparsity-only"]
    assert ablations.rows[1][1] == "alignment_weight 160.0"
    assert ablations.rows[2][2] == "diverged"


def test_page_and_markdown(study, tmp_path):
    written = write_study(study, tmp_path / "out", tmp_path / "docs" / "claims.md")
    assert [path.name for path in written] == ["report.html", "claims.md", "claims.md"]
    page, text = (path.read_text() for path in written[:2])
    assert page.count("<figure>") == 8  # no training curves here
    assert "1 pieces failed and are left out" in text
    assert text == written[2].read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(line.endswith(" |") for line in rows)
    assert "**reproduced**" in text


def test_result_files_cannot_break_the_tables(tmp_path, add):
    def attack(document):
        document["data"]["name"] = "<script>|`x`\n# y"

    add("ssa", 0, change=attack)
    add("alpha-1", 0, "ablation", overrides={"model.<b>|": "<img src=x>|"})
    text = claims_markdown(read_study(tmp_path))
    assert "<script" not in text
    assert "<img" not in text
    assert "\n# y" not in text
    assert "\\|" in text


def test_bad_folders_are_refused(tmp_path, add):
    with pytest.raises(ConfigError, match="no finished piece"):
        read_study(tmp_path)
    add("ssa", 0, status="sleeping")
    with pytest.raises(DataError, match="sleeping"):
        read_study(tmp_path)
