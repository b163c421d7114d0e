"""Reading result files: what is accepted, and what an error says."""

import json
import math
import re
from pathlib import Path

import pytest

from ssa.errors import ConfigError, DataError
from ssa.report.results import Budget, parse_evaluation, read_evaluation, read_metrics

ROOT = Path(__file__).parents[2]


def test_the_documented_example_is_readable():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    example = re.search(r"### `ssa\.evaluation/1`\n```json\n(.*?)```", text, re.DOTALL)
    assert example, "docs/architecture.md shows an evaluation"
    evaluation = parse_evaluation(json.loads(example[1]), "example")
    assert evaluation.training_budget == Budget(64, 16, 4)
    assert evaluation.attention[0].mean.bound_share == 1.0


def test_an_evaluation_is_read_as_written(evaluation, write_run, tmp_path):
    document = evaluation("ssa", 3)
    read = read_evaluation(write_run(tmp_path / "run", document) / "evaluation.json")
    assert (read.model.method, read.model.seed, read.data.name) == ("ssa", 3, "tiny-stories")
    assert read.perplexity(None) == document["runs"][0]["perplexity"]
    assert read.perplexity(Budget(64, 16, 4)) == document["runs"][2]["perplexity"]
    assert math.isnan(read.perplexity(Budget(48, 16, 3)))
    assert read.attention_in("sparse").mean.entropy_bits == document["attention"][1]["mean"]["entropy_bits"]
    assert read.selection_map.picked_share[2][1] == document["selection_map"]["picked_share"][2][1]
    assert ("cpu", "AMD EPYC 9654") in read.machine
    assert "gpu" not in dict(read.machine)


def test_statistics_at_the_training_budget_come_first(evaluation):
    document = evaluation("ssa", 0)
    other = {**document["attention"][0], "num_blocks": 9, "mean": {"attention_sparsity": 0.99}}
    document["attention"].insert(0, other)
    assert parse_evaluation(document, "x").attention_in("full").num_blocks == 4
    document["model"]["num_blocks"] = 77
    assert parse_evaluation(document, "x").attention_in("full").num_blocks == 9


@pytest.mark.parametrize("version", ["ssa.evaluation/1", "ssa.evaluation/1.7"])
def test_minor_versions_and_unknown_keys_are_accepted(evaluation, version):
    document = {**evaluation("full", 0), "schema": version, "invented_later": {"x": 1}}
    assert parse_evaluation(document, "x").model.method == "full"


@pytest.mark.parametrize("version", ["ssa.evaluation/2", "ssa.evaluation/11", "ssa.evaluation/", "ssa.data/1", 1, None])
def test_other_schemas_are_refused_by_name(evaluation, version):
    with pytest.raises(ConfigError, match=r"run/evaluation\.json.*ssa\.evaluation/1"):
        parse_evaluation({**evaluation("full", 0), "schema": version}, "run/evaluation.json")


@pytest.mark.parametrize("cut", [0, 1, 40, 900, -3])
def test_a_truncated_file_is_named_with_its_line(evaluation, tmp_path, cut):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(evaluation("ssa", 0), indent=1)[:cut])
    where = r"evaluation\.json:\d+" if cut in (40, 900, -3) else r"evaluation\.json"
    with pytest.raises(DataError, match=where):
        read_evaluation(path)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b"[" * 100_000, b"9" * 5000, b"[]", b"7", b'"text"'], ids=lambda content: content[:6]
)
def test_what_is_no_object_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "evaluation.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"evaluation\.json"):
        read_evaluation(path)


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    for path in (tmp_path, tmp_path / "evaluation.json"):
        with pytest.raises(DataError, match="no regular file"):
            read_evaluation(path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("model", "seed"), "one", "model: seed: got a text"),
        (("model", "seed"), True, "model: seed: got a boolean"),
        (("model", "parameters"), -1, "parameters: got the number -1"),
        (("model", "name"), None, "name: got null"),
        (("model",), [], "model: got a list"),
        (("data", "tokens"), 1.5, "tokens: got the number 1.5"),
        (("runs",), {}, "runs: got an object"),
        (("runs", 0), 3, r"runs\[0\]: got the number 3"),
        (("runs", 1, "mode"), "dense", r"runs\[1\]: mode: got 'dense'; expected 'full' or 'sparse'"),
        (("runs", 1, "perplexity"), "12", r"runs\[1\]: perplexity: got a text"),
        (("runs", 1, "num_blocks"), None, r"runs\[1\]: num_blocks: got null"),
        (("runs", 1, "num_blocks"), 0, r"runs\[1\]: got 0 blocks"),
        (("attention", 0, "layers", 2, "layer"), None, r"layers\[2\]: layer"),
        (("attention", 0, "mean", "entropy_bits"), [], "entropy_bits: got a list"),
        (("attention", 0, "mean", "bound_share"), True, "bound_share: got a boolean"),
        (("selection_map", "picked_share"), [[1.0, 2.0]], r"picked_share\[0\]: got 2 entries; expected 1"),
        (("selection_map", "picked_share"), [1.0], "picked_share: got a list; expected a list of lists"),
    ],
)
def test_a_wrong_field_is_named(evaluation, place, value, message):
    document = evaluation("ssa", 0)
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with pytest.raises(DataError, match=message):
        parse_evaluation(document, "file")


def test_measurements_may_be_nan_infinite_null_or_missing(evaluation, tmp_path):
    document = evaluation("ssa", 0)
    document["runs"][0]["perplexity"] = math.inf
    document["runs"][1]["perplexity"] = math.nan
    document["runs"][2]["perplexity"] = None
    document["runs"][3]["perplexity"] = 10**400
    del document["runs"][4]["perplexity"], document["selection_map"], document["attention"]
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(document))
    values = [run.perplexity for run in read_evaluation(path).runs]
    assert values[0] == values[3] == math.inf
    assert all(math.isnan(values[index]) for index in (1, 2, 4))


def test_invisible_characters_become_visible_and_long_texts_short(evaluation):
    document = evaluation("ssa", 0, name="a\x1b[31m\u202eb\ud800\nc\u00a0d")
    document["command"] = "x" * 5000
    read = parse_evaluation(document, "x")
    assert read.model.name == "a\\x1b[31m\\u202eb\\ud800\\nc d"
    assert len(read.command) < 1100


def _write(path, events):
    path.write_text("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events), encoding="utf-8")
    return path


def test_metrics_are_read_as_written(metrics, tmp_path):
    events = metrics("ssa", 5, steps=20)
    events[0]["name"] = "line\u2028separator"  # valid inside JSON, and no line break of JSON lines
    read = read_metrics(_write(tmp_path / "metrics.jsonl", [*events, {"event": "of a later minor version"}]))
    assert (read.method, read.seed, len(read.steps)) == ("ssa", 5, 20)
    assert read.steps[6].cross_entropy == events[7]["cross_entropy"]
    assert math.isnan(read_metrics(_write(tmp_path / "m.jsonl", metrics("full", 0, steps=2))).steps[0].alignment)


def test_steps_done_again_after_a_resume_count_once(metrics, tmp_path):
    events = metrics("full", 0, steps=30)[:31]
    again = [{**event, "cross_entropy": 1.25} for event in events[11:16]]
    read = read_metrics(_write(tmp_path / "m.jsonl", [*events, {"event": "resume", "step": 10}, *again]))
    assert [step.step for step in read.steps] == list(range(1, 16))
    assert [step.cross_entropy == 1.25 for step in read.steps] == [False] * 10 + [True] * 5


def test_a_truncated_last_line_is_named(metrics, tmp_path):
    path = _write(tmp_path / "metrics.jsonl", metrics("full", 0, steps=9)[:10])
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"metrics\.jsonl:10: got malformed JSON"):
        read_metrics(path)


def test_bad_metrics_are_refused(metrics, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="empty file"):
        read_metrics(path)
    with pytest.raises(ConfigError, match=r"jsonl:1.*ssa\.metrics/9.*ssa\.metrics/1"):
        read_metrics(_write(path, [{**metrics("full", 0)[0], "schema": "ssa.metrics/9"}]))
    events = metrics("full", 0, steps=3)
    events[2]["stream"] = "both"
    with pytest.raises(DataError, match=r"jsonl:3: stream: got 'both'"):
        read_metrics(_write(path, events))
