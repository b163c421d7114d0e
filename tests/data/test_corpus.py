"""Every source kind, and every malformed input named with file and line."""

import gzip
import json
import lzma
import os

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ssa.data import iter_documents
from ssa.data.corpus import Problems, split_of
from ssa.data.files import read_documents
from ssa.errors import DataError, DataSourceError

LINES = [{"text": "first"}, {"text": "second\nline", "id": 3}, {"text": ""}]
JSONL = "".join(json.dumps(row) + "\n" for row in LINES).encode()


def texts(*sources, **options):
    return [document.text for document in iter_documents([str(s) for s in sources], **options)]


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.xz", lzma.compress),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_json_lines_compressed_or_not(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(JSONL))
    assert texts(tmp_path / name) == ["first", "second\nline", ""]


def test_text_parquet_folders_and_patterns(tmp_path):
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    table = pyarrow.table({"text": ["one", "two"], "other": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert texts(tmp_path) == ["plain", "one", "two", "packed"]
    assert texts(tmp_path / "*.txt") == ["plain"]
    assert texts(tmp_path / "d.parquet", tmp_path / "b.txt") == ["one", "two", "plain"]


def test_byte_order_mark_line_ends_and_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\r\n  \n{"text": "y"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert texts(tmp_path) == ["x", "y", "a\r\nb"]


def test_another_text_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    assert texts(tmp_path / "a.jsonl", text_key="content") == ["x"]


def test_the_standard_library_is_there_whole_and_in_order():
    documents = list(iter_documents(["builtin:stdlib"]))
    names = [document.source for document in documents]
    assert names == sorted(names)
    assert "stdlib/json/decoder.py" in names
    assert not [name for name in names if "/test/" in name or "/idlelib/" in name]
    source = json.decoder.__file__
    with open(source) as file:
        assert documents[names.index("stdlib/json/decoder.py")].text == file.read()


def test_a_hub_name_streams_through_datasets(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "train.parquet")
    documents = list(iter_documents([f"hub:{tmp_path}@train"]))
    assert [d.text for d in documents] == ["one", "two"]
    assert documents[1].source.endswith("@train:row 1")
    with pytest.raises(DataSourceError, match="hub:"):
        list(iter_documents([f"hub:{tmp_path}@nosuchsplit"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"', r"a\.jsonl:2: got a truncated line"),
        (b'{"text": "a"}\n{text}\n{"text": "c"}\n', r"a\.jsonl:2: got invalid JSON"),
        (b"[1]\n", r"a\.jsonl:1: got a list; expected a JSON object"),
        (b"7\n", r"a\.jsonl:1: got a int"),
        (b'{"txt": "a"}\n', r"a\.jsonl:1: got keys \['txt'\]"),
        (b'{"text": null}\n', r"a\.jsonl:1: got text null"),
        (b'{"text": 5}\n', r"a\.jsonl:1: got text of type int"),
        (b'{"text": "a\\u0000b"}\n', r"a\.jsonl:1: got character U\+0000 at 1"),
        (b'{"text": "\\ud800"}\n', r"a\.jsonl:1: got character U\+D800 at 0"),
        (b'{"text": "\xff"}\n', r"a\.jsonl:1: got byte 0xff at 10"),
    ],
)
def test_malformed_records_are_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "a.jsonl")


def test_malformed_records_can_be_skipped_up_to_a_cap(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n[]\n{"text": "b"}\n7\n{"text": "c"}\n')
    problems = Problems(max_skips=2)
    assert texts(tmp_path / "a.jsonl", problems=problems) == ["a", "b", "c"]
    assert len(problems.skipped) == 2
    with pytest.raises(DataError, match=r"a\.jsonl:4"):
        texts(tmp_path / "a.jsonl", problems=Problems(max_skips=1))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", gzip.compress(JSONL), "got gz data"),
        ("a.txt", b"PAR1" + bytes(8), "got parquet data"),
        ("a.jsonl.gz", JSONL, "got uncompressed data"),
        ("a.parquet", b"PAR1 and no more", "broken parquet"),
        ("a.txt", b"abc\xff\xfe", "byte 0xff at 3"),
    ],
)
def test_content_that_contradicts_the_suffix(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


def test_a_cut_archive_a_bomb_and_a_pipe_are_refused(tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(JSONL * 1000)[:-20])
    with pytest.raises(DataSourceError, match=r"cut\.jsonl\.gz"):
        texts(tmp_path / "cut.jsonl.gz")
    for name in ("bomb.txt.gz", "bomb.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"\n" * 100_000))
        with pytest.raises(DataError, match="more than 5000 bytes"):
            list(read_documents(tmp_path / name, "text", max_bytes=5000))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="expected a regular file"):
        texts(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="no text, jsonl or parquet file"):
        texts(tmp_path / "nowhere.txt")


def test_the_split_is_a_stable_share():
    names = [f"file-{i}" for i in range(4000)]
    share = sum(split_of(name, 0.1) == "valid" for name in names) / len(names)
    assert 0.08 < share < 0.12
    assert {split_of(name, 0.0) for name in names} == {"train"}
    # a document that is in a small validation split is in every larger one
    assert all(split_of(n, 0.2) == "valid" for n in names if split_of(n, 0.1) == "valid")
