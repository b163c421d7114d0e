import json
import shutil

import pytest
import torch

from ssa.data import Loader, PackedDataset, prepare, train_tokenizer
from ssa.data.loader import _order
from ssa.errors import ConfigError, DataError, DataSourceError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i} " * (i % 5 + 1)}) + "\n" for i in range(90)))
    prepare([str(folder / "a.jsonl")], folder / "out", row_length=24, vocab_size=290, valid_fraction=0.1)
    return folder / "out"


def take(loader, count):
    return torch.cat([next(loader).input_ids for _ in range(count)])


def test_a_batch_knows_its_documents_padding_and_targets(data):
    dataset = PackedDataset(data)
    last = dataset.batch([0, len(dataset) - 1])
    text = int((last.labels[1] >= 0).sum())
    assert 0 < text < 24
    assert torch.equal(last.labels[1, :text], last.input_ids[1, :text])
    targets = last.layout.next_token_labels(last.labels)
    assert last.targets == int((targets >= 0).sum())
    assert last.layout.lengths[-1] == 24 - text
    assert last.rows == 2


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(data):
    dataset = PackedDataset(data)
    rows = {tuple(dataset.batch([i]).input_ids[0].tolist()) for i in range(len(dataset))}
    loader = Loader(dataset, 1, seed=3)
    epochs = [[tuple(next(loader).input_ids[0].tolist()) for _ in range(len(dataset))] for _ in range(2)]
    assert set(epochs[0]) == set(epochs[1]) == rows
    assert epochs[0] != epochs[1]
    assert Loader(dataset, 1, seed=4).dataset is dataset
    assert tuple(next(Loader(dataset, 1, seed=4)).input_ids[0].tolist()) in rows


def test_resuming_is_exact_in_the_second_epoch_too(data):
    dataset = PackedDataset(data)
    steps = 3 * len(dataset) // 4
    straight = Loader(dataset, 2, seed=1)
    for _ in range(steps):
        next(straight)
    state = json.loads(json.dumps(straight.state()))
    assert state["position"] > len(dataset)
    resumed = Loader(dataset, 2, seed=1)
    resumed.load_state(state)
    assert torch.equal(take(straight, 5), take(resumed, 5))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_stream_of_one(data, world):
    dataset = PackedDataset(data)
    whole = Loader(dataset, 4, seed=1)
    parts = [Loader(dataset, 4 // world, seed=1, rank=rank, world_size=world) for rank in range(world)]
    for _ in range(6):
        assert torch.equal(next(whole).input_ids, torch.cat([next(part).input_ids for part in parts]))
    resumed = Loader(dataset, 4, seed=1)
    resumed.load_state(parts[0].state())
    assert torch.equal(next(resumed).input_ids, next(whole).input_ids)


def test_evaluation_reads_each_row_once_and_may_end_early(data):
    dataset = PackedDataset(data)
    sizes = [batch.rows for batch in Loader(dataset, 4, shuffle=False, epochs=1)]
    assert sum(sizes) == len(dataset)
    assert [b.rows for b in Loader(dataset, 4, shuffle=False, epochs=1, limit=6)] == [4, 2]
    first = next(Loader(dataset, 4, shuffle=False))
    assert torch.equal(first.input_ids, dataset.batch(range(4)).input_ids)


def test_a_state_of_other_data_or_another_seed_is_refused(data):
    loader = Loader(PackedDataset(data), 2, seed=1)
    for change in ({"fingerprint": "other"}, {"seed": 2}):
        with pytest.raises(DataSourceError, match=next(iter(change))):
            loader.load_state({**loader.state(), **change})


def test_broken_folders_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"no manifest\.json"):
        PackedDataset(tmp_path)
    with pytest.raises(ConfigError, match="split"):
        PackedDataset(data, "test")
    manifest = json.loads((data / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "schema": "ssa.data/9"}))
    with pytest.raises(DataError, match=r"ssa\.data/9"):
        PackedDataset(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataSourceError):
        PackedDataset(tmp_path)


def test_ids_outside_the_vocabulary_are_refused(data):
    dataset = PackedDataset(data)
    dataset.vocab_size = int(dataset.batch([0]).input_ids.max())
    with pytest.raises(DataError, match="token id"):
        dataset.batch([0])


@pytest.mark.parametrize("bad", [{"rows_per_batch": 0}, {"rank": 2, "world_size": 2}, {"start": -1}])
def test_bad_arguments(data, bad):
    with pytest.raises(ConfigError, match="Loader"):
        Loader(PackedDataset(data), **{"rows_per_batch": 1, **bad})


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "copy")


def test_the_order_is_the_same_for_ever():
    """A change here breaks the resumption of every run: these numbers were computed once and written down."""
    assert [_order(seed, epoch, 8).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))] == [
        [1, 7, 0, 4, 5, 6, 2, 3],
        [2, 0, 4, 5, 1, 6, 3, 7],
        [7, 0, 2, 5, 6, 4, 3, 1],
    ]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (4, 2), (3, 4)])
def test_resuming_in_the_second_epoch_with_other_processes(data, before, after):
    dataset = PackedDataset(data)
    steps = len(dataset) // (2 * before) * 3 // 2
    for rank in range(before):
        saved = Loader(dataset, 2, seed=5, rank=rank, world_size=before)
        for _ in range(steps):
            next(saved)
    assert len(dataset) < saved.position < 2 * len(dataset)
    straight = take(Loader(dataset, 1, seed=5), saved.position + 12 * after)[saved.position :]
    resumed = [Loader(dataset, 3, seed=5, rank=rank, world_size=after) for rank in range(after)]
    for loader in resumed:
        loader.load_state(saved.state())
    found = torch.cat([next(loader).input_ids for _ in range(4) for loader in resumed])
    assert torch.equal(found, straight)


@pytest.mark.parametrize("position", [None, -1, "3", 1.5])
def test_a_state_without_a_position_is_refused(data, position):
    loader = Loader(PackedDataset(data), 2, seed=1)
    with pytest.raises(DataSourceError, match="position"):
        loader.load_state({**loader.state(), "position": position})


def test_changed_rows_are_found(copy):
    PackedDataset(copy).verify()
    file = next((copy / "train").glob("*.arrow"))
    content = bytearray(file.read_bytes())
    ids = PackedDataset(copy).batch([0]).input_ids[0, :8].int().numpy().tobytes()
    content[content.index(ids)] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataSourceError, match="fingerprint"):
        PackedDataset(copy).verify()


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_cut_file_is_refused(copy, part):
    file = next((copy / "train").glob("*.arrow"))
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    with pytest.raises((DataSourceError, DataError), match="train"):
        PackedDataset(copy).verify()


@pytest.mark.parametrize(
    ("name", "content"), [("state.json", c) for c in ("", "{}", "[]")] + [("dataset_info.json", c) for c in ("", "[]")]
)
def test_broken_descriptions_of_the_rows_are_refused(copy, name, content):
    (copy / "train" / name).write_text(content)
    with pytest.raises(DataSourceError, match="train"):
        PackedDataset(copy)


@pytest.mark.parametrize(
    "content", ["", "[]", "7", '{"schema": "ssa.data/1"}', '{"schema": "ssa.data/1", "splits": 3}']
)
def test_a_broken_manifest_is_refused(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="copy"):
        PackedDataset(copy)


def test_the_tokenizer_must_be_the_one_that_made_the_rows(copy):
    assert PackedDataset(copy).tokenizer().eos_token == "<|eos|>"
    other = train_tokenizer(["entirely different words"] * 9, 290)
    other.save_pretrained(copy / "tokenizer")
    with pytest.raises(DataError, match=r"got hash \w{64}; expected \w{64}"):
        PackedDataset(copy).tokenizer()
