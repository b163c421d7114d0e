"""The suite on prepared text: documents come back whole, every part is measured, the result is readable."""

import json

import pytest
import torch

from ssa.data import PackedDataset, prepare
from ssa.evaluate import Plan, SuitePlan, evaluate
from ssa.evaluate.documents import read_documents, windows
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.report import parse_evaluation

FORMS = ("single", "multi_value")
TEXT = "".join(f"Line {i} of a story about number {i * 7919 % 1000}. " for i in range(160))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("suite")
    (root / "train.txt").write_text("Some text to train on. " * 50)
    for number in range(2):
        (root / f"book{number}.txt").write_text(f"Book {number}. " + TEXT[: 4000 - 1500 * number])
    valid = tuple(str(root / f"book{n}.txt") for n in range(2))
    prepare([str(root / "train.txt")], root / "data", valid_sources=valid, row_length=128, vocab_size=300)
    return PackedDataset(root / "data", "valid")


@pytest.fixture(scope="module")
def model(dataset):
    torch.manual_seed(0)
    return SSAForCausalLM(
        SSAConfig(
            vocab_size=dataset.vocab_size,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            block_size=4,
            num_blocks=4,
            max_position_embeddings=256,
        )
    )


def test_documents_are_joined_over_rows(dataset):
    tokenizer = dataset.tokenizer()
    first, second = read_documents(dataset, tokenizer.bos_token_id)
    assert tokenizer.decode(first, skip_special_tokens=True) == "Book 0. " + TEXT[:4000]
    assert tokenizer.decode(second, skip_special_tokens=True) == "Book 1. " + TEXT[:2500]
    batch = windows([first, second], 100, 3)
    assert torch.equal(batch.input_ids, torch.stack([first[:100], second[:100], first[100:200]]))


def test_every_part_is_measured(dataset, model):
    suite = SuitePlan(
        (256, 512),
        stride=64,
        document_tokens=600,
        needle_forms=FORMS,
        needle_samples=1,
        needle_candidates=3,
        statistics_rows=1,
    )
    before = model.config.to_dict()
    heard = []
    result = evaluate(model, dataset, Plan((2, 4), rows=2, suite=suite, suite_budgets=(4,)), say=heard.append)
    assert model.config.to_dict() == before
    found = json.loads(json.dumps(result))["suite"]
    ways = {(row["mode"], row["length"], row["scaling"]) for row in found["sliding"]}
    lengths = {(256, "none"), (512, "none"), (512, "llama3")}
    assert ways == {(mode, *length) for mode in ("full", "sparse") for length in lengths}
    assert len(found["needle"]) == 3 * 2 * 2 * 5  # (length, scaling), modes, forms, depths
    assert {row["chance"] for row in found["needle"]} == {1 / 3}
    assert [row["mode"] for row in found["words"]] == ["full", "sparse"]
    assert found["words"][0]["word_perplexity"] > found["words"][0]["perplexity"]
    assert {(row["mode"], row["length"]) for row in found["attention"]} >= {("full", 256), ("sparse", 512)}
    assert [row["mode"] for row in found["selection"]] == ["full", "sparse"]
    assert [row["rule"] for row in found["rules"]] == ["exact", "official"]
    assert any("needles" in what for what in heard)
    assert parse_evaluation(result, "here").model.layers == 2
