"""lm-eval with our model: the right attention runs, figures follow the seeds, bad input is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra [harness]")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from ssa.cli import main
from ssa.errors import ConfigError, DataError
from ssa.evaluate import harness
from ssa.evaluate.harness import SSALM, Attention, HarnessPlan, run_harness

WORDS = ["a", "tin", "can", "be", "opened", "with", "an", "opener", "or", "a", "knife", "but", "never"]
WORDS += ["with", "a", "spoon", "made", "of", "soft", "bread"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PIQA of 12 rows and a text."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"goal": " ".join(WORDS[i:]), "sol1": " ".join(WORDS[: i + 1]), "sol2": WORDS[i], "label": i % 2}
        for i in range(12)
    ]
    (folder / "piqa_valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tale.jsonl").write_text(json.dumps({"text": " ".join(WORDS * 3)}) + "\n")
    return folder


def loglikelihoods(model: SSALM, pairs: list[tuple[str, str]]) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]


def by_hand(model: SSALM, context: str, continuation: str) -> float:
    """Log-probability of the continuation in one unpadded forward pass."""
    tokenizer = model.tokenizer
    bos = [tokenizer.bos_token_id]
    whole = bos + tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    start = 1 + len(tokenizer(context, add_special_tokens=False)["input_ids"])
    ids = torch.tensor([whole])
    with torch.no_grad():
        logs = model.model(ids).logits[0].float().log_softmax(-1)
    return float(sum(logs[i - 1, whole[i]] for i in range(start, len(whole))))


@pytest.mark.parametrize("kind", ["ours", "stock"])
@pytest.mark.parametrize("attention", [{"mode": "full"}, {"mode": "sparse", "num_blocks": 2, "block_size": 4}])
def test_a_padded_batch_scores_as_single_passes_do(
    folders: dict[str, Path], kind: str, attention: dict[str, Any]
) -> None:
    model = SSALM(str(folders[kind]), device="cpu", batch_size=4, **attention)
    pairs = [(" ".join(WORDS[:n]), " " + " ".join(WORDS[n : n + 2])) for n in (1, 3, 8, 14)]
    assert loglikelihoods(model, pairs) == pytest.approx([by_hand(model, *pair) for pair in pairs], abs=1e-4)


def test_mode_and_budget_are_model_arguments(folders: dict[str, Path]) -> None:
    pair = [(" ".join(WORDS), " bread")]
    args = f"pretrained={folders['ours']},device=cpu"
    model = get_model("ssa")
    full = loglikelihoods(model.create_from_arg_string(f"{args},mode=full"), pair)
    sparse = loglikelihoods(model.create_from_arg_string(f"{args},mode=sparse,num_blocks=1"), pair)
    wide = loglikelihoods(model.create_from_arg_string(f"{args},mode=sparse,num_blocks=64"), pair)
    assert wide == pytest.approx(full, abs=1e-4)  # a budget over all blocks is full attention
    assert sparse != pytest.approx(full, abs=1e-2)


def test_a_text_begins_with_one_bos(folders: dict[str, Path]) -> None:
    model = SSALM(str(folders["ours"]), device="cpu", mode="full")
    text = " ".join(WORDS)
    (rolled,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    assert ids[0].eq(model.tokenizer.bos_token_id).sum() == 1
    with torch.no_grad():
        logs = model.model(ids).logits[0].float().log_softmax(-1)
    expected = logs[:-1].gather(1, ids[0, 1:, None]).sum()
    assert rolled == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_generated_texts_use_the_cache_and_the_mode(folders: dict[str, Path], kind: str) -> None:
    """Greedy texts of a left-padded batch are those of single prompts, recomputed token by token."""
    model = SSALM(str(folders[kind]), device="cpu", mode="sparse", num_blocks=2, block_size=4, batch_size=2)
    prompts = [" ".join(WORDS), " ".join(WORDS[:9])]
    asked = [
        Instance("generate_until", {}, (prompt, {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}), i)
        for i, prompt in enumerate(prompts)
    ]
    found = model.generate_until(asked, disable_tqdm=True)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        start = ids.shape[1]
        with torch.no_grad():
            for _ in range(8):
                ids = torch.cat([ids, model.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert text == model.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_figures_of_every_attention_and_seed(folders: dict[str, Path], data: Path) -> None:
    model = SSALM(str(folders["ours"]), device="cpu", batch_size=16)
    ways = (Attention("full"), Attention("sparse", 1), Attention("sparse", 99))
    done: list[int] = []
    plan = HarnessPlan([], data, ways, limit=4, num_fewshot=1, seeds=(0, 1))
    result = run_harness(model, plan, on_run=lambda: done.append(1))
    assert len(done) == 6
    assert [(run["mode"], run["num_blocks"]) for run in result["runs"]] == [
        ("full", None),
        ("sparse", 1),
        ("sparse", 99),
    ]
    full, sparse, wide = (run["tasks"] for run in result["runs"])
    for figures in (full["piqa"]["acc_norm"], sparse["piqa"]["acc"]):
        assert len(figures["values"]) == 2
        assert figures["mean"] == pytest.approx(sum(figures["values"]) / 2)
        assert 0 <= figures["mean"] <= 1
        assert figures["deviation"] >= 0
    assert full["tale"]["bits_per_byte"]["mean"] == pytest.approx(wide["tale"]["bits_per_byte"]["mean"], abs=1e-4)
    assert full["tale"]["bits_per_byte"]["mean"] != pytest.approx(sparse["tale"]["bits_per_byte"]["mean"], abs=1e-3)
    json.dumps(result, allow_nan=False)


def test_the_seed_draws_the_examples(folders: dict[str, Path], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SSALM(str(folders["ours"]), device="cpu", mode="full")
    prompts: list[list[str]] = []

    def record(requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        prompts.append([request.args[0] for request in requests])
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(model, "loglikelihood", record)
    run_harness(model, HarnessPlan(["piqa"], data, (Attention("full"),), limit=3, num_fewshot=2, seeds=(0, 1)))
    run_harness(model, HarnessPlan(["piqa"], data, (Attention("full"),), limit=3, num_fewshot=2, seeds=(0,)))
    assert prompts[0] == prompts[2] != prompts[1]
    assert all(prompt.count("Question:") == 3 for prompt in prompts[0])
    questions = [prompt.rsplit("Question: ", 1)[1].split("\n")[0] for prompt in prompts[0]]
    assert all(
        f"Question: {q}\n" not in p.rsplit("Question: ", 1)[0] for q, p in zip(questions, prompts[0], strict=True)
    )


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tasks": []}, "--tasks: got none"),
    ({"num_fewshot": -1}, "--num-fewshot"),
    ({"limit": 0}, "--limit"),
    ({"limit": math.nan}, "--limit"),
    ({"seeds": (0, 0)}, "--seeds"),
    ({"seeds": (0, 1), "num_fewshot": 0}, "seeds draw the examples"),
    ({"batch_size": 0}, "--batch-size"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_an_impossible_plan_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HarnessPlan(**{"tasks": ["piqa"], **changes})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "dense"}, "dense"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "tpu"}, "--device: got 'tpu'"),
        ({"trust_remote_code": True}, "no code from checkpoints"),
    ],
)
def test_impossible_model_arguments_are_refused(folders: dict[str, Path], arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSALM(str(folders["ours"]), **{"device": "cpu", **arguments})


def test_more_examples_than_rows_is_a_message(folders: dict[str, Path], data: Path) -> None:
    model = SSALM(str(folders["ours"]), device="cpu")
    with pytest.raises(DataError, match="num-fewshot"):
        run_harness(model, HarnessPlan(["piqa"], data, (Attention("full"),), num_fewshot=50))


def test_the_command_writes_a_result_and_a_table(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "harness.json"
    argv = ["eval", str(folders["ours"]), "--tasks", "piqa", "--tasks-from", str(data), "--limit", "2"]
    assert main([*argv, "--num-blocks", "1", "2", "--num-fewshot", "0", "--device", "cpu", "--out", str(out)]) == 0
    assert "sparse, 2 blocks" in capsys.readouterr().out
    assert json.loads(out.read_text())["schema"] == "ssa.harness/1"
    assert main(["eval", "--tasks", "--help"]) == 0
    assert "--tasks-from" in capsys.readouterr().out


def test_an_unknown_task_is_refused_with_what_is_close(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Manager:  # lm-eval's own reads thousands of files
        all_tasks = ("piqa", "arc_easy")

    monkeypatch.setattr(harness, "TaskManager", Manager)
    with pytest.raises(ConfigError, match="such as piqa"):
        run_harness(SSALM(str(folders["ours"]), device="cpu"), HarnessPlan(["piqs"]))


def test_our_model_is_known_to_lm_eval() -> None:
    from importlib.metadata import entry_points

    from ssa.evaluate import lm_eval

    assert get_model("ssa") is SSALM is lm_eval.SSALM
    declared = {entry.value for entry in entry_points(group="lm_eval.models", name="ssa")}
    assert declared <= {"ssa.evaluate.harness:SSALM"}  # empty where the package is not installed


def test_longbench_from_local_files(folders: dict[str, Path], tmp_path: Path) -> None:
    """The generated answer is scored by lm-eval's own measure."""
    for package in ("jieba", "fuzzywuzzy", "rouge"):
        pytest.importorskip(package, reason="needs the extra [longbench]")
    row = {"input": "What opens a tin?", "context": " ".join(WORDS), "answers": ["an opener"]}
    (tmp_path / "longbench").mkdir()
    (tmp_path / "longbench" / "hotpotqa.jsonl").write_text(json.dumps(row) + "\n")
    plan = HarnessPlan([], tmp_path, (Attention("full"), Attention("sparse", 2)))
    result = run_harness(SSALM(str(folders["ours"]), device="cpu"), plan)
    for run in result["runs"]:
        assert 0.0 <= run["tasks"]["longbench_hotpotqa"]["qa_f1_score"]["mean"] <= 1.0
