import hashlib
import json
import os
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssa.data import PackedDataset, load_tokenizer, prepare, tokenizer_fingerprint, train_tokenizer
from ssa.data.files import Limits
from ssa.data.lock import LOCK, folder_lock
from ssa.data.tokenizer import begin_with_bos
from ssa.data.writing import SplitWriter
from ssa.errors import ConfigError, DataError, DataSourceError, DiskError

MODULE = sys.modules["ssa.data.prepare"]  # the package has a function of that name
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
    prepare(
        [str(corpus)],
        tmp_path / "out",
        valid_sources=[str(held_out)],
        row_length=16,
        vocab_size=300,
        valid_fraction=0.5,
    )
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
        ({"max_skips": -1}, "max_skips: got -1"),
        ({"limits": Limits(0, 1)}, "limits"),
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


def test_no_text_leaves_no_folder(tmp_path):
    with pytest.raises(DataError, match="no text, jsonl or parquet file"):
        prepare([str(tmp_path / "nowhere.txt")], tmp_path / "deep" / "out")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n[]\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", vocab_size=280)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_text_that_spells_a_special_token_stays_text(tmp_path):
    spelled = "before <|eos|> between <|bos|><|pad|> after"
    (tmp_path / "a.txt").write_text(spelled)
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "out", row_length=16, vocab_size=280, valid_fraction=0)
    dataset = PackedDataset(tmp_path / "out")
    ids = [i for row in range(len(dataset)) for i in dataset.batch([row]).input_ids.flatten().tolist()]
    account = manifest["splits"]["train"]
    ids = ids[: len(ids) - account["padding"]]
    assert [ids[0], ids[-1]] == [0, 1]
    assert min(ids[1:-1]) > 2  # bos, eos and pad are 0, 1, 2
    assert dataset.tokenizer().decode(ids[1:-1]) == spelled


def test_a_vocabulary_with_holes_keeps_its_ids(corpus, tmp_path):
    tokenizer = train_tokenizer(TEXTS, 270)
    tokenizer.save_pretrained(tmp_path / "tok")
    file = tmp_path / "tok" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {token: i + 1000 for token, i in content["model"]["vocab"].items() if i > 2}
    file.write_text(json.dumps(content))
    manifest = prepare([str(corpus)], tmp_path / "out", tokenizer=str(tmp_path / "tok"), row_length=16)
    assert manifest["vocab_size"] == 1270
    assert int(PackedDataset(tmp_path / "out").batch([0]).input_ids.max()) >= 1000


def test_a_document_without_tokens_counts_as_empty(tmp_path):
    words = Tokenizer(models.WordLevel({"word": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "tok")
    (tmp_path / "a.jsonl").write_text('{"text": "word word"}\n{"text": "   "}\n{"text": ""}\n')
    manifest = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer=str(tmp_path / "tok"), row_length=4)
    account = manifest["splits"]["train"]
    assert (account["documents"], account["empty_documents"], account["text_tokens"]) == (1, 2, 2)
    assert (account["special_tokens"], account["padding"], account["rows"]) == (0, 2, 1)


def test_the_manifest_names_every_input(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    contents = {"a.txt": b"one text", "sub/a.txt": b"another"}
    for name, content in contents.items():
        (tmp_path / "in" / name).write_bytes(content)
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", row_length=16, vocab_size=280, valid_fraction=0)
    assert manifest["sources"] == [
        {"source": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    ]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == json.loads(json.dumps(manifest))


def test_the_same_text_elsewhere_gives_the_same_rows(tmp_path):
    fingerprints = set()
    for place in ("a", "b/c"):
        folder = tmp_path / place / "in"
        folder.mkdir(parents=True)
        for i in range(40):
            (folder / f"{i}.txt").write_text(f"text {i} " * 9)
        manifest = prepare([str(folder)], tmp_path / place / "out", row_length=16, vocab_size=280, valid_fraction=0.3)
        fingerprints.add(tuple(account["fingerprint"] for account in manifest["splits"].values()))
    assert len(fingerprints) == 1


def test_training_text_cannot_be_validation_text(corpus, tmp_path):
    for valid in (corpus, tmp_path / "*.jsonl"):
        with pytest.raises(ConfigError, match="which is training text too"):
            prepare([str(tmp_path)], tmp_path / "out", valid_sources=[str(valid)])
    with pytest.raises(ConfigError, match="hub:owner/name"):
        prepare(["hub:owner/name"], tmp_path / "out", valid_sources=["hub:owner/name"])


def test_everything_in_the_validation_split_is_an_error_that_helps(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"no document with text for training.*--valid-fraction 0"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", vocab_size=280, valid_fraction=1 - 1e-9)
    (tmp_path / "v.txt").write_text("")
    with pytest.raises(DataError, match=r"v\.txt: got no document with text for validation"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", vocab_size=280, valid_sources=[str(tmp_path / "v.txt")])


def test_sources_that_change_meanwhile_are_refused(corpus, tmp_path, monkeypatch):
    def touch_and_train(texts, vocab_size):
        tokenizer = train_tokenizer(texts, vocab_size)
        with corpus.open("a") as file:
            file.write('{"text": "late"}\n')
        return tokenizer

    monkeypatch.setattr(MODULE, "train_tokenizer", touch_and_train)
    with pytest.raises(DataSourceError, match=r"corpus\.jsonl: got a file that changed"):
        prepare([str(corpus)], tmp_path / "out", vocab_size=280)


def test_old_data_survive_a_failed_replacement(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare([str(corpus)], out, row_length=16, vocab_size=280, valid_fraction=0.2)
    with pytest.raises(DataError, match="nowhere"):
        prepare([str(tmp_path / "nowhere.txt")], out, overwrite=True)

    def full(self, texts):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "add", full)
        with pytest.raises(DiskError, match=r"No space left.*try freeing space"):
            prepare([str(corpus)], out, vocab_size=280, valid_fraction=0.2, overwrite=True)
    PackedDataset(out).verify()
    assert {path.name for path in out.iterdir()} - {LOCK} == {"manifest.json", "tokenizer", "train", "valid"}


@pytest.mark.parametrize("survived", range(4))
def test_a_kill_at_any_step_of_the_replacement_leaves_no_wrong_data(corpus, tmp_path, monkeypatch, survived):
    out, calls, replace = tmp_path / "out", [], os.replace
    prepare([str(corpus)], out, row_length=16, vocab_size=280, valid_fraction=0.2)

    def killed(source, target):
        calls.append(target)
        if len(calls) > survived:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare([str(corpus)], out, row_length=24, vocab_size=280, valid_fraction=0.2, overwrite=True)
    with pytest.raises(ConfigError, match=r"no manifest\.json"):
        PackedDataset(out)
    prepare([str(corpus)], out, row_length=24, vocab_size=280, valid_fraction=0.2)
    PackedDataset(out).verify()


def test_a_place_that_cannot_be_written(corpus, tmp_path):
    with pytest.raises(DiskError, match="out"):
        prepare([str(corpus)], corpus / "out", row_length=16, vocab_size=280)
    with pytest.raises(ConfigError, match="got a file"):
        prepare([str(corpus)], corpus, row_length=16, vocab_size=280)


def test_long_documents_go_to_the_tokenizer_in_small_groups(tmp_path, monkeypatch):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("word " * 100)
    groups, add = [], SplitWriter.add
    monkeypatch.setattr(MODULE, "TOKENIZE_CHARACTERS", 1000)
    monkeypatch.setattr(SplitWriter, "add", lambda self, texts: (groups.append(len(texts)), add(self, texts))[1])
    manifest = prepare([str(tmp_path / "*.txt")], tmp_path / "out", row_length=16, vocab_size=280, valid_fraction=0)
    assert [n for n in groups if n] == [2, 2, 2]
    assert manifest["splits"]["train"]["documents"] == 6


@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[]", '{"added_tokens": []}', '{"added_tokens": [], "model": {"type": "Nope"}}']
)
def test_a_broken_tokenizer_is_refused(tmp_path, content):
    train_tokenizer(TEXTS, 270).save_pretrained(tmp_path / "tok")
    (tmp_path / "tok" / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match="expected a Hugging Face tokenizer"):
        load_tokenizer(str(tmp_path / "tok"))


def test_two_processes_cannot_prepare_one_folder(corpus, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with folder_lock(out), pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        prepare([str(corpus)], out, row_length=16, vocab_size=280)
    prepare([str(corpus)], out, row_length=16, vocab_size=280)  # the lock is gone with its holder
    assert len(PackedDataset(out, "train"))


def test_a_text_begins_with_one_bos_however_often_it_is_asked_for():
    tokenizer = train_tokenizer(["some text"], 260)
    plain = tokenizer("text")["input_ids"]
    for _ in range(2):
        begun = begin_with_bos(tokenizer)
        assert begun("text")["input_ids"] == [tokenizer.bos_token_id, *plain]
        assert begun("text", add_special_tokens=False)["input_ids"] == plain
