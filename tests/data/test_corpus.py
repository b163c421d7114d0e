"""Every source kind, and every malformed input named with file and line."""

import gzip
import io
import json
import lzma
import os
import zlib

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ssa.data import Limits, iter_documents
from ssa.data.corpus import Problems, split_of
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
    assert documents[1].source.endswith("@train:row 2")
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
        (b"[" * 200_000 + b"\n", r"a\.jsonl:1: got JSON beyond the parser's limits"),
        (b'{"n": ' + b"1" * 5000 + b"}\n", r"a\.jsonl:1: got JSON beyond the parser's limits"),
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
        ("a.jsonl", gzip.compress(JSONL, mtime=0), "got gz data"),
        ("a.txt", b"PAR1" + bytes(8), "got parquet data"),
        ("a.jsonl.gz", JSONL, "got uncompressed data"),
        ("a.parquet", b"PAR1 and no more", "broken parquet"),
        ("a.txt", b"abc\xff\xfe", "byte 0xff at 3"),
        ("a.txt", b"\xef\xbb\xbfabc\xff", "byte 0xff at 6"),
        ("a.json", b'[{"text": "x"}]', r"got a \.json file.*renaming it to \.jsonl"),
        ("a.json.gz", gzip.compress(JSONL, mtime=0), r"got a \.json file"),
    ],
)
def test_content_that_contradicts_the_suffix(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


def test_a_cut_archive_a_pipe_and_nothing_are_refused(tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(JSONL * 1000)[:-20])
    with pytest.raises(DataSourceError, match=r"cut\.jsonl\.gz"):
        texts(tmp_path / "cut.jsonl.gz")
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


def in_frames(content):
    return zstandard.ZstdCompressor().compress(content) * 2


def test_archives_of_several_members_are_read_to_the_end(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSONL) * 2)
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(JSONL) * 2)
    (tmp_path / "c.jsonl.zst").write_bytes(in_frames(JSONL))
    assert texts(tmp_path) == ["first", "second\nline", ""] * 6


@pytest.mark.parametrize("cut", [3, 40, 400])
@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("xz", lzma.compress), ("zst", in_frames)])
def test_a_cut_archive_loses_nothing_silently(tmp_path, suffix, pack, cut):
    noise = "".join(json.dumps({"text": os.urandom(20).hex()}) + "\n" for _ in range(200)).encode()
    for name in (f"a.jsonl.{suffix}", f"a.txt.{suffix}"):
        (tmp_path / name).write_bytes(pack(noise)[:-cut])
        with pytest.raises(DataSourceError, match=name):
            texts(tmp_path / name)


def test_a_damaged_deflate_stream_is_named(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 30)
    with pytest.raises(DataSourceError, match=r"a\.txt\.gz") as caught:
        texts(tmp_path / "a.txt.gz")
    assert isinstance(caught.value.__cause__, zlib.error)


@pytest.mark.parametrize("name", ["bomb.txt.gz", "bomb.jsonl.gz"])
def test_what_reading_may_cost_is_limited(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"\n" * 100_000))
    with pytest.raises(DataError, match="expands to more than 5000 bytes"):
        texts(tmp_path / name, limits=Limits(expanded_bytes=5000))
    (tmp_path / name).write_bytes(gzip.compress(b"x" * 100_000))
    with pytest.raises(DataError, match="a document of more than 5000 bytes"):
        texts(tmp_path / name, limits=Limits(document_bytes=5000))


def test_a_line_without_end_is_not_gathered_first(tmp_path, monkeypatch):
    class Endless(io.RawIOBase):
        given = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            self.given += len(buffer)
            assert self.given < 100_000, "read far beyond the limit"
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    (tmp_path / "a.jsonl").write_text("x")
    monkeypatch.setattr("ssa.data.files._open", lambda path: io.BufferedReader(Endless()))
    with pytest.raises(DataError, match="a document of more than 5000 bytes"):
        texts(tmp_path / "a.jsonl", limits=Limits(document_bytes=5000))


def test_the_limits_are_of_archives_and_documents_not_of_large_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(JSONL * 100)
    assert len(texts(tmp_path / "a.jsonl", limits=Limits(document_bytes=60, expanded_bytes=100))) == 300
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "x" * 61]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a document of 61 characters"):
        texts(tmp_path / "a.parquet", limits=Limits(document_bytes=60))


def test_parquet_is_not_trusted(tmp_path):
    file = tmp_path / "a.parquet"
    broken = pyarrow.array([b"ok", b"\xff", None], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), file)
    problems = Problems(max_skips=2)
    assert texts(file, problems=problems) == ["ok"]
    assert "a.parquet:row 2: got byte 0xff at 0" in problems.skipped[0]
    assert "a.parquet:row 3: got text null" in problems.skipped[1]
    with pytest.raises(DataError, match=r"columns \['text'\]; expected a column 'content'"):
        texts(file, text_key="content")
    for column in (pyarrow.array(["a", "b", "a"]).dictionary_encode(), pyarrow.array(["a", "b", "a"], "large_string")):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
        assert texts(file) == ["a", "b", "a"]
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), file)
    with pytest.raises(DataError, match=r"a\.parquet:row 1: got text of type int"):
        texts(file)


def test_links_and_pipes_are_refused_in_folders_too(tmp_path):
    (tmp_path / "real.bin").write_text("x")
    for make in (lambda path: path.symlink_to("real.bin"), lambda path: path.symlink_to("gone"), os.mkfifo):
        make(tmp_path / "a.txt")
        for source in (tmp_path, tmp_path / "a.txt", tmp_path / "*.txt"):
            with pytest.raises(DataError, match="expected a regular file"):
                texts(source)
        (tmp_path / "a.txt").unlink()


def test_a_folder_that_cannot_be_listed_is_not_skipped(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataSourceError, match="Permission denied"):
        texts(tmp_path)


def test_names_do_not_depend_on_where_the_folder_is(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text('\n{"text": "y"}\n')
    monkeypatch.chdir(tmp_path)
    for sources in (["."], [str(tmp_path)], ["**/*"], [str(tmp_path / "**/*.*")]):
        assert [d.source for d in iter_documents(sources)] == ["b.jsonl:2", "sub/a.txt"]
    assert [d.source for d in iter_documents(["sub/a.txt"])] == ["a.txt"]
    assert split_of("caf\udce9.txt", 0.5) in ("train", "valid")  # a file name that is not UTF-8


def test_a_hub_stream_leaves_nothing_behind_and_may_break(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "data" / "train.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert texts(f"hub:{tmp_path}/data") == ["one", "two"]
    assert not (tmp_path / "cache").exists()

    def breaking(*_args, **options):
        assert options["streaming"] is True
        yield {"text": "one"}
        raise ConnectionError("the network is gone")

    monkeypatch.setattr(datasets, "load_dataset", breaking)
    stream = iter_documents(["hub:owner/name:config@test"])
    assert next(stream).source == "hub:owner/name:config@test:row 1"
    with pytest.raises(DataSourceError, match="the network is gone"):
        next(stream)
