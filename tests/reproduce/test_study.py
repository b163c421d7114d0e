"""A tiny study from text to report: pieces are claimed once, kept, not done again; failures are told apart."""

import json
import random
import re
import subprocess
import sys
import time

import pytest

from ssa.cli import main
from ssa.data import prepare
from ssa.errors import ConfigError, DataError, NumericError
from ssa.report import read_study
from ssa.reproduce import Study, run_study, worker
from ssa.reproduce import piece as piece_module
from ssa.reproduce import study as study_module
from ssa.reproduce.piece import read_result, run_piece
from ssa.reproduce.plan import SCALES
from ssa.reproduce.worker import Job, claim, work


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("study"), random.Random(0)
    words = re.findall(r"\w+", "the river of stone house walked spoke under light garden never letter window woman")
    for number in range(3):
        lines = (" ".join(draw.choices(words, k=draw.randrange(5, 14))).capitalize() + ". " for _ in range(400))
        (root / f"book{number}.txt").write_text("".join(lines))
    sources = [str(root / f"book{number}.txt") for number in range(3)]
    prepare(sources[:1], root / "data", valid_sources=sources[1:], row_length=256, vocab_size=300)
    return root / "data"


def job(data, out, **more):
    made = Job("tiny", str(data), str(out), (0,), ("ssa", "full"), **more)
    for name in ("claims", "pieces"):
        (out / name).mkdir(parents=True, exist_ok=True)
    return made


def test_from_the_command_line_to_the_report_and_no_piece_twice(data, tmp_path, capsys):
    out, claims = tmp_path / "study", tmp_path / "claims.md"
    argv = ["reproduce", "--scale", "tiny", "--data", str(data), "--out", str(out), "--gpus", "0"]
    argv += ["--seeds", "0", "--only", "ssa", "full", "commitment-only"]
    assert main(argv) == 0
    assert "3 pieces to do on 1 workers" in capsys.readouterr().out
    kept = {path.name for path in (out / "pieces" / "ssa-seed0").iterdir()}
    assert {"piece.json", "evaluation.json", "metrics.jsonl", "recipe.yaml", "model"} <= kept
    assert "checkpoints" not in kept
    assert not (out / "pieces" / "commitment-only-seed0" / "model").exists()
    suite = json.loads((out / "pieces" / "ssa-seed0" / "evaluation.json").read_text())["suite"]
    assert {x["length"] for x in suite["sliding"]} == {256, 512}
    page = (out / "report.html").read_text()
    assert "The paper’s claims" in page
    assert page.count("<img") >= 5
    before = {path: path.stat().st_mtime_ns for path in out.glob("pieces/*/piece.json")}
    assert main([*argv, "--claims", str(claims)]) == 0
    assert "0 pieces to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "not resolved at this scale" in claims.read_text()  # one seed resolves nothing
    record = tmp_path / "record.json"
    assert main(["reproduce", "--report", "--out", str(out), "--record", str(record)]) == 0
    found = json.loads(record.read_text())
    assert (len(found["pieces"]), len(found["data"]), found["job"]["scale"]) == (3, 1, "tiny")
    assert sum(call["pieces"] for call in found["calls"]) == 3
    ssa = next(piece for piece in found["pieces"] if piece["variant"] == "ssa")["evaluation"]
    assert len(ssa["runs"]) == 4
    assert {x["length"] for x in ssa["needle"]} == {256, 512}
    assert record.stat().st_size < 60_000
    # The study goes on from that file elsewhere: nothing is trained again, and the report says the same.
    elsewhere, again = tmp_path / "elsewhere", tmp_path / "again.json"
    argv[argv.index(str(out))] = str(elsewhere)
    capsys.readouterr()
    assert main([*argv, "--known", str(record), "--record", str(again)]) == 0
    assert "3 pieces from" in (told := capsys.readouterr().out)
    assert "0 pieces to do" in told
    assert json.loads(again.read_text())["pieces"] == found["pieces"]
    for line in (elsewhere / "claims.md").read_text().splitlines():
        assert line in claims.read_text() or ", 0 pieces" in line


def test_a_file_that_is_no_record_of_these_pieces_is_refused(tmp_path, capsys):
    record, out = tmp_path / "record.json", tmp_path / "study"
    good = {
        "schema": "ssa.study-record/1",
        "job": {"scale": "tiny", "changes": {}, "brief": False},
        "calls": [],
        "pieces": [{"variant": "ssa", "seed": 0}],
    }
    bad = [
        {"schema": "other/1"},
        {"schema": "ssa.study-record/1"},
        {**good, "pieces": [{"variant": "../away", "seed": 0}]},
        {**good, "pieces": [{"variant": "ssa", "seed": 0, "evaluation": {"model": {}}}]},
        {**good, "pieces": 3},
    ]
    for content in bad:
        record.write_text(json.dumps(content))
        assert main(["reproduce", "--report", "--out", str(out), "--known", str(record)]) == 2
        assert str(record) in capsys.readouterr().err
        assert not out.exists()
    out.mkdir()
    (out / "job.json").write_text('{"scale": "small", "changes": {}, "brief": false}')
    record.write_text(json.dumps(good))
    assert main(["reproduce", "--report", "--out", str(out), "--known", str(record)]) == 2
    assert "another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_two_workers_share_the_pieces(data, tmp_path):
    class TwoWorkers(Study):
        devices = property(lambda self: ["cpu", "cpu"])

    told = []
    results = run_study(TwoWorkers(job(data, tmp_path), 0), told.append)
    assert sorted(r.variant for r in results) == ["full", "ssa"]
    assert [progress.done for progress in told] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "claims").iterdir()) == ["full-seed0", "ssa-seed0"]


def test_a_piece_is_claimed_once_and_a_failed_one_again(data, tmp_path, monkeypatch):
    given = job(data, tmp_path)
    ssa = given.pieces()[0]
    assert claim(given, ssa)
    assert not claim(given, ssa)

    def fail(*args):
        raise DataError("rows", "none", "some")

    monkeypatch.setattr(piece_module, "_train", fail)
    result = run_piece(ssa, SCALES["tiny"], data, given.folder(ssa), "cpu")
    assert (result.status, result.message) == ("failed", "rows: got none; expected some")
    (tmp_path / "claims" / ssa.name).unlink()  # as the next call does
    assert claim(given, ssa)


def test_divergence_is_a_result(data, tmp_path, monkeypatch):
    def diverge(*args):
        raise NumericError("step 7", "a non-finite loss", "finite numbers")

    monkeypatch.setattr(piece_module, "_train", diverge)
    given = job(data, tmp_path)
    work(given, "cpu")
    assert {r.status for r in given.results()} == {"diverged"}
    assert Study(given, 0).estimate()[0] == 0
    assert read_study(tmp_path).of("ssa")[0].run is None


def test_a_process_whose_gpu_is_broken_takes_no_further_piece(data, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(piece_module, "_train", fail)
    monkeypatch.setattr(worker, "_usable", lambda device: False)
    given = job(data, tmp_path)
    assert not work(given, "cpu")
    assert [r.status for r in given.results()] == ["failed"]
    given.write(tmp_path / "job.json")
    assert worker.main([str(tmp_path / "job.json"), "cpu"]) == worker.UNUSABLE
    assert [r.status for r in given.results()] == ["failed", "failed"]


@pytest.mark.slow
def test_a_broken_process_is_replaced_and_the_others_go_on(data, tmp_path, monkeypatch):
    class TwoWorkers(Study):
        devices = property(lambda self: ["cpu", "cpu"])

    real, codes = subprocess.Popen, [worker.UNUSABLE]

    def popen(command, **more):
        return (
            real([sys.executable, "-c", f"raise SystemExit({codes.pop()})"], **more) if codes else real(command, **more)
        )

    monkeypatch.setattr(study_module.subprocess, "Popen", popen)
    assert {r.status for r in run_study(TwoWorkers(job(data, tmp_path), 0))} == {"finished"}


def test_nothing_is_started_that_would_end_too_late(data, tmp_path):
    given = job(data, tmp_path, deadline=time.time() + 1)
    work(given, "cpu")
    assert given.results() == []
    assert read_result(given.folder(given.pieces()[0])) is None
    given.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == given


def test_a_study_holds_one_kind_of_pieces(data, tmp_path, capsys):
    argv = ["reproduce", "--scale", "tiny", "--data", str(data), "--out", str(tmp_path), "--gpus", "0", "--brief"]
    argv += ["--only", "full", "--seeds", "0", "--set", "training.steps=2", "optimizer.learning_rate=1e-3"]
    assert main(argv) == 0
    recipe = (tmp_path / "pieces" / "full-seed0" / "recipe.yaml").read_text()
    assert "learning_rate: 0.001" in recipe
    result = json.loads((tmp_path / "pieces" / "full-seed0" / "evaluation.json").read_text())
    assert len(result["runs"]) == 2
    assert result["command"].endswith("--only full --brief --set training.steps=2 optimizer.learning_rate=0.001")
    assert not (tmp_path / "report.html").exists()
    record = tmp_path / "kept" / "record.json"
    assert main([*argv, "--record", str(record)]) == 0  # nothing is left to train
    assert [piece["variant"] for piece in json.loads(record.read_text())["pieces"]] == ["full"]
    capsys.readouterr()
    assert main([*argv, "--claims", str(tmp_path / "claims.md")]) == 2
    assert "--claims: got --brief" in capsys.readouterr().err
    assert main([*argv[:-1], "optimizer.learning_rate=2e-3"]) == 2
    assert "one kind of pieces" in capsys.readouterr().err
    assert main([*argv[:-1], "nonsense"]) == 2


def test_bad_calls_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="gpus"):
        Study(job(data, tmp_path), 99)
    with pytest.raises(ConfigError, match="manifest"):
        Study(job(tmp_path / "nothing", tmp_path), 0)
    assert main(["reproduce", "--out", str(tmp_path)]) == 2
    assert main(["reproduce", "--report", "--out", str(tmp_path / "nowhere")]) == 2
