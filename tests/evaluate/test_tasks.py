"""Local data as tasks of lm-eval: what is found, what is written, what is refused."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssa.errors import DataError, MissingDependencyError
from ssa.evaluate.tasks import find_tasks, longbench, templates, write_tasks
from ssa.evaluate.tasks.__main__ import main

PIQA = {"goal": "open a tin", "sol1": "use an opener", "sol2": "use a spoon", "label": 0, "source": "ours"}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_template_parses_and_names_its_rows() -> None:
    assert set(templates()) == {"piqa", "hellaswag", "arc", "lambada", "perplexity"}
    shots = {name: template.definition["num_fewshot"] for name, template in templates().items()}
    assert (shots["piqa"], shots["hellaswag"], shots["arc"]) == (3, 10, 25)  # the paper's


def test_names_splits_and_compression(tmp_path: Path) -> None:
    write(tmp_path / "arc" / "arc_easy_test.jsonl", [])
    write(tmp_path / "arc" / "arc_easy_validation.jsonl", [])
    write(tmp_path / "hellaswag_val.jsonl", [])
    write(tmp_path / "My notes.jsonl", [])
    (tmp_path / "wikitext-2").mkdir()
    with lzma.open(tmp_path / "wikitext-2" / "test.txt.xz", "wt") as file:
        file.write("x")
    found = {name: (task.template.name, sorted(task.splits)) for name, task in find_tasks(tmp_path).items()}
    assert found == {
        "arc_easy": ("arc", ["test", "validation"]),
        "hellaswag": ("hellaswag", ["validation"]),
        "my_notes": ("perplexity", ["test"]),
        "wikitext_2": ("perplexity", ["test"]),
    }


def test_what_is_written_is_a_task_of_lm_eval(tmp_path: Path) -> None:
    write(tmp_path / "in" / "piqa_valid.jsonl", [PIQA, PIQA])
    assert write_tasks(tmp_path / "in", tmp_path / "out") == {"piqa": "local_piqa"}
    definition = yaml.safe_load((tmp_path / "out" / "local_piqa.yaml").read_text())
    assert (definition["task"], definition["test_split"], definition["fewshot_split"]) == (
        "local_piqa",
        *["validation"] * 2,
    )
    rows = Path(definition["dataset_kwargs"]["data_files"]["validation"]).read_text().splitlines()
    assert [json.loads(row) for row in rows] == [{key: PIQA[key] for key in ("goal", "sol1", "sol2", "label")}] * 2


def test_pages_of_wikitext_are_documents(tmp_path: Path) -> None:
    (tmp_path / "wikitext_test.txt").write_text(" \n = One = \n \n a b \n = = Part = = \n c \n \n = Two = \n d \n")
    write_tasks(tmp_path, tmp_path / "out")
    rows = (tmp_path / "out" / "local_wikitext" / "test.jsonl").read_text().splitlines()
    assert [json.loads(row)["text"].split()[:3] for row in rows] == [["=", "One", "="], ["=", "Two", "="]]


BAD: list[tuple[Any, str]] = [
    ([1], "piqa_valid.jsonl:1: got a list; expected a JSON object"),
    ({**PIQA, "goal": None}, "piqa_valid.jsonl:1: goal: got nothing; expected a text"),
    ({**PIQA, "label": "0"}, "label: got a str; expected an integer"),
    ({**PIQA, "label": True}, "label: got a bool; expected an integer"),
    ({**PIQA, "label": 2}, "label: got 2; expected an index of one of 2 choices"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message[-30:] for _, message in BAD])
def test_a_malformed_row_is_refused_with_its_line(row: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "piqa_valid.jsonl", [row])
    with pytest.raises(DataError) as caught:
        write_tasks(tmp_path, tmp_path / "out")
    assert message in str(caught.value)


def test_choices_must_be_texts(tmp_path: Path) -> None:
    write(tmp_path / "arc_easy.jsonl", [{"question": "?", "choices": ["a", 1], "gold": 0}])
    with pytest.raises(DataError, match="a choice that is no text"):
        write_tasks(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no row"),
        ("a.jsonl", b'{"text": "x"}\n{"tex', "a.jsonl:2: got malformed JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "UTF-8"),
        ("a.jsonl.xz", b"plain", "a readable, complete file"),
        ("a.csv", b"x", "no .jsonl or .txt file"),
    ],
)
def test_a_malformed_file_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        write_tasks(tmp_path, tmp_path / "out")
    assert message in str(caught.value)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "piqa_valid.jsonl", [PIQA])
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "local_piqa\n"
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert main([]) == 2


LONG = {"input": "Who sold the boat?", "context": "Anna sold the boat to Ben.", "answers": ["Anna"], "length": 6}


def test_longbench_keeps_lm_evals_definition_with_the_users_rows(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra [longbench]")
    for package in longbench.PACKAGES:
        pytest.importorskip(package, reason="needs the extra [longbench]")
    write(tmp_path / "longbench" / "hotpotqa.jsonl", [LONG])
    write(tmp_path / "longbench" / "repobench-p.jsonl", [{**LONG, "all_classes": None}])
    names = write_tasks(tmp_path, tmp_path / "out")
    assert names == {f"longbench_{x}": f"local_longbench_{x}" for x in ("hotpotqa", "repobench_p")}
    definition = yaml.safe_load((tmp_path / "out" / "local_longbench_hotpotqa.yaml").read_text())
    assert Path(definition["include"]).name == "hotpotqa.yaml"
    row = json.loads((tmp_path / "out" / "local_longbench_hotpotqa" / "test.jsonl").read_text())
    assert row == {
        "context": LONG["context"],
        "question": LONG["input"],
        "answers": ["Anna"],
        "all_classes": [],
    }
    write(tmp_path / "other" / "longbench_tales.jsonl", [LONG])
    with pytest.raises(DataError, match="no data set of LongBench; expected one of 2wikimqa"):
        write_tasks(tmp_path / "other", tmp_path / "out")


def test_longbench_without_its_packages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longbench, "find_spec", lambda name: None if name == "rouge" else object())
    write(tmp_path / "longbench" / "hotpotqa.jsonl", [LONG])
    with pytest.raises(MissingDependencyError, match=r"no package rouge.*\[longbench\]"):
        write_tasks(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": None}, "context"),
        ({"answers": "Anna"}, "answers: got a str"),
        ({"answers": []}, "answers: got none"),
    ],
)
def test_a_malformed_row_of_longbench_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        longbench.LongBench("longbench_hotpotqa").check({**LONG, **change}, "file:1")
