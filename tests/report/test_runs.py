"""Finding runs and putting seeds together."""

import pytest

from ssa.errors import ConfigError, DataError
from ssa.report import build_report
from ssa.report.page import render_page
from ssa.report.results import parse_evaluation
from ssa.report.runs import Run, discover, group_runs
from ssa.report.wording import statement


def _labels(groups):
    return [(group.label, [run.head.seed for run in group.runs]) for group in groups]


def _runs(*documents):
    return [Run(parse_evaluation(document, f"file{index}")) for index, document in enumerate(documents)]


def test_seeds_are_grouped_in_the_papers_order(runs):
    groups = group_runs(discover([runs]))
    assert _labels(groups) == [("FullAttn", [1, 2]), ("MoBA", [1, 2]), ("SSA", [1, 2])]


def test_runs_are_found_as_folders_files_and_nested_and_once_each(evaluation, write_run, tmp_path):
    one = write_run(tmp_path / "a" / "b" / "one", evaluation("ssa", 0))
    found = discover([tmp_path, one, one / "evaluation.json", tmp_path / "a" / ".." / "a"])
    assert [run.head.name for run in found] == ["ssa-seed0"]


def test_an_evaluation_beside_the_weights_belongs_to_the_run(evaluation, metrics, write_run, tmp_path):
    folder = write_run(tmp_path / "run", None, metrics("ssa", 7, steps=3))
    document = evaluation("ssa", 7, name="model")
    document["model"].update(seed=None, trained_tokens=None)  # all that a bare model folder knows
    write_run(folder / "model", document)
    (run,) = discover([folder])
    assert run.metrics
    model = run.evaluation.model
    assert (model.name, model.seed, model.trained_tokens) == ("ssa-seed7", 7, 3 * 65536)


def test_a_folder_without_results_and_a_missing_one_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"no evaluation\.json or metrics\.jsonl"):
        discover([tmp_path])
    with pytest.raises(ConfigError, match="no such folder"):
        build_report([tmp_path / "nowhere"], tmp_path / "x.html")


def test_a_file_of_another_run_is_noticed(evaluation, metrics, write_run, tmp_path):
    folder = write_run(tmp_path / "run", evaluation("ssa", 0), metrics("moba", 0, steps=3))
    with pytest.raises(
        DataError, match=r"evaluation\.json: got an evaluation of method 'ssa', seed 0; expected method 'moba'"
    ):
        discover([folder])


def test_the_same_seed_twice_would_count_double(evaluation):
    with pytest.raises(ConfigError, match=r"file0: got seed 1 of 'ssa-seed1' twice, also in file1"):
        group_runs(_runs(evaluation("ssa", 1), evaluation("ssa", 1)))


def test_unknown_seeds_are_shown_but_not_pooled(evaluation):
    documents = [evaluation("ssa", 0, name=name) for name in ("one", "two")]
    for document in documents:
        document["model"].update(seed=None, trained_tokens=None)
    groups = group_runs(_runs(*documents, evaluation("full", 1)))
    assert [group.label for group in groups] == ["FullAttn", "SSA · one", "SSA · two"]
    assert "26.2 M training tokens, seed 1)" in statement(groups)
    assert render_page(groups, []).count("<td>n/a</td>") >= 2
    with pytest.raises(ConfigError, match="an unknown seed of 'one' twice"):
        group_runs(_runs(documents[0], documents[0]))


def test_other_names_or_sizes_are_variants_and_are_told_apart(evaluation):
    large = evaluation("ssa", 1)
    large["model"]["parameters"] = 64_000_000
    groups = group_runs(_runs(evaluation("ssa", 1, name="ssa-alpha20"), evaluation("ssa", 1), large))
    assert [(group.label, group.variant) for group in groups] == [
        ("SSA · ssa · 14,234,880 parameters, 26,214,400 tokens, 4×16", 0),
        ("SSA · ssa · 64,000,000 parameters, 26,214,400 tokens, 4×16", 1),
        ("SSA · ssa-alpha20", 2),
    ]


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (("ssa-seed1", "ssa-seed2"), 1),
        (("ssa_s1", "ssa_s2"), 1),
        (("ssa-1", "ssa-2"), 1),
        (("same", "same"), 1),
        (("alpha-10", "alpha-20"), 2),
        (("a", "b"), 2),
    ],
)
def test_only_the_seed_in_a_name_is_ignored(evaluation, names, groups):
    documents = [evaluation("ssa", seed, name=name) for seed, name in zip((1, 2), names, strict=True)]
    assert len(group_runs(_runs(*documents))) == groups


def test_a_seed_in_training_joins_the_evaluated_seeds(evaluation, metrics, write_run, tmp_path):
    write_run(tmp_path / "1", evaluation("ssa", 1))
    write_run(tmp_path / "2", None, metrics("ssa", 2, steps=3))
    (group,) = group_runs(discover([tmp_path]))
    assert (len(group.evaluations), len(group.metrics)) == (1, 1)


def test_an_unknown_method_comes_last_under_its_own_name(evaluation):
    other = evaluation("ssa", 0, name="x")
    other["model"]["method"] = "<new>"
    assert [group.label for group in group_runs(_runs(other, evaluation("ssa", 0)))] == ["SSA", "<new>"]
