import json

import pytest

from ssa.data import PackedDataset, load_tokenizer, prepare, tokenizer_fingerprint, train_tokenizer
from ssa.errors import ConfigError, DataError

TEXTS = [f"Document number {i}: the quick brown fox, déjà vu, {'again ' * (i % 7)}end." for i in range(60)] + ["", "x"]


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return file


def written_text(path, split):
    """Decode a split back: rows without padding, joined, cut at bos and eos."""
    dataset, tokenizer = PackedDataset(path, split), load_tokenizer(str(path / "tokenizer"))
    tokens = []
    for i in range(len(dataset)):
        batch = dataset.batch([i])
        tokens += batch.input_ids[batch.labels >= 0].tolist()
    text = tokenizer.decode(tokens)
    return [part.removesuffix("<|eos|>") for part in text.split("<|bos|>")[1:]]


def test_every_document_comes_back_in_exactly_one_split(corpus, tmp_path):
    manifest = prepare([str(corpus)], tmp_path / "out", row_length=32, vocab_size=300, valid_fraction=0.2)
    train, valid = (written_text(tmp_path / "out", split) for split in ("train", "valid"))
    assert sorted(train + valid) == sorted(t for t in TEXTS if t)
    assert min(len(train), len(valid)) > 3
    for split, found in (("train", train), ("valid", valid)):
        account = manifest["splits"][split]
        assert account["documents"] == len(found)
        assert account["characters"] == sum(map(len, found))
        used = account["text_tokens"] + account["special_tokens"] + account["padding"]
        assert account["rows"] * 32 == used
        assert account["special_tokens"] == 2 * len(found)
    assert sum(a["empty_documents"] for a in manifest["splits"].values()) == 1


def test_equal_input_gives_equal_output(corpus, tmp_path):
    first, second = (prepare([str(corpus)], tmp_path / name, row_length=16, vocab_size=280) for name in "ab")
    assert first == second
    other = prepare([str(corpus)], tmp_path / "c", row_length=17, vocab_size=280)
    assert other["splits"]["train"]["fingerprint"] != first["splits"]["train"]["fingerprint"]


def test_validation_sources_of_their_own(corpus, tmp_path):
    held_out = tmp_path / "held.txt"
    held_out.write_text("only for validation")
    prepare([str(corpus)], tmp_path / "out", valid_sources=[str(held_out)], row_length=16, vocab_size=300)
    assert written_text(tmp_path / "out", "valid") == ["only for validation"]
    assert len(written_text(tmp_path / "out", "train")) == len(TEXTS) - 1


def test_a_given_tokenizer_is_used_and_stored(corpus, tmp_path):
    tokenizer = train_tokenizer(TEXTS, 270)
    tokenizer.save_pretrained(tmp_path / "tok")
    manifest = prepare([str(corpus)], tmp_path / "out", tokenizer=str(tmp_path / "tok"), row_length=16)
    assert manifest["tokenizer"] == tokenizer_fingerprint(load_tokenizer(str(tmp_path / "out" / "tokenizer")))
    assert manifest["vocab_size"] == 270


def test_finished_data_is_only_replaced_on_demand(corpus, tmp_path):
    out = tmp_path / "out"
    prepare([str(corpus)], out, row_length=16, vocab_size=280)
    with pytest.raises(ConfigError, match="finished data"):
        prepare([str(corpus)], out, row_length=16, vocab_size=280)
    prepare([str(corpus)], out, row_length=24, vocab_size=280, overwrite=True)
    assert PackedDataset(out).row_length == 24


def test_a_half_written_folder_is_no_data_and_is_replaced(corpus, tmp_path):
    out = tmp_path / "out"
    prepare([str(corpus)], out, row_length=16, vocab_size=280)
    (out / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"no manifest\.json"):
        PackedDataset(out)
    prepare([str(corpus)], out, row_length=16, vocab_size=280)
    assert len(PackedDataset(out)) > 0


def test_a_folder_with_other_things_is_left_alone(corpus, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        prepare([str(corpus)], out, row_length=16, vocab_size=280)
    assert (out / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid_fraction": 1.0}, "valid_fraction: got 1.0"),
        ({"row_length": 1}, "row_length: got 1"),
        ({"vocab_size": 100}, "vocab_size: got 100"),
        ({"tokenizer": "/nowhere"}, "tokenizer /nowhere"),
        ({"sources": []}, "sources: got none"),
    ],
)
def test_values_out_of_range(corpus, tmp_path, options, message):
    given = {"sources": [str(corpus)], "row_length": 16, "vocab_size": 280, **options}
    with pytest.raises(ConfigError, match=message):
        prepare(given.pop("sources"), tmp_path / "out", **given)


def test_no_text_at_all(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no document with text"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", row_length=16, vocab_size=280)
