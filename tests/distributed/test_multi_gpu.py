"""The script that proves several GPUs: its arithmetic, and its timed steps on two gloo processes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from many import ranks

from ssa.train.recipe_file import dump_recipe, load_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import multi_gpu
import multi_gpu_worker
from multi_gpu_jobs import STEPS, Job, Setting


def test_overlapping_spans_count_once_and_exposed_is_what_is_left() -> None:
    nccl, others = [(0.0, 4.0), (10.0, 12.0)], [(3.0, 6.0), (5.0, 9.0), (11.0, 11.5)]
    union = multi_gpu_worker._union
    assert union(others) == [(3.0, 9.0), (11.0, 11.5)]
    length = multi_gpu_worker._length
    assert length(union([*nccl, *others])) - length(union(others)) == 3.0 + 1.5


def write_run(folder: Path, losses: list[float], stream: str = "full", norm: float = 1.0) -> None:
    folder.mkdir(parents=True)
    same = {"event": "step", "stream": stream, "gradient_norm": norm}
    steps = [{**same, "step": n, "loss": x} for n, x in enumerate(losses, 1)]
    text = "".join(json.dumps(record) + "\n" for record in [{"event": "start"}, *steps])
    (folder / "metrics.jsonl").write_text(text + '{"event": "st')  # a line that is being written


@pytest.mark.parametrize(
    ("sharded", "stream", "norm", "equal"),
    [(1.001, "full", 1.0, True), (1.01, "full", 1.0, False), (1.001, "sparse", 1.0, False), (1.0, "full", 2.0, False)],
)
def test_losses_and_norms_are_equal_within_a_limit_and_streams_exactly(
    sharded: float, stream: str, norm: float, equal: bool, tmp_path: Path
) -> None:
    setting = Setting(tmp_path, tmp_path, True, 0.0)
    for number in range(3):
        write_run(tmp_path / "runs" / f"1b-ssa-{number}", [4.0] * STEPS)
    write_run(tmp_path / "runs" / "1b-ssa-3", [4.0 * sharded] * STEPS, stream, norm)
    found = multi_gpu.compare(setting, "1b", "ssa")
    assert (found["complete"], found["equal"]) == (True, equal)
    assert multi_gpu._equal([found]) == (None if equal else 0.0)  # one of six pieces
    pieces = [found | {"recipe": base, "method": method} for base, method in multi_gpu.PIECES]
    assert multi_gpu._equal(pieces) == float(equal)


@pytest.mark.parametrize(("end", "equal"), [(0.0, None), (float("inf"), False)], ids=["cut", "failed"])
def test_a_missing_run_is_not_equal_but_a_cut_one_proves_nothing(
    end: float, equal: bool | None, tmp_path: Path
) -> None:
    found = multi_gpu.compare(Setting(tmp_path, tmp_path, True, end), "1b", "ssa")
    assert (found["complete"], found["equal"]) == (False, equal)


def test_what_was_found_is_written_before_a_part_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(setting: Setting, add: multi_gpu.Add) -> None:
        add({"part": "resume", "processes": 2, "equal": True, "apart": 0.0})
        assert len(json.loads((tmp_path / "multi-gpu.json").read_text())["cases"]) == 1
        raise ValueError("no such file")

    monkeypatch.setitem(multi_gpu.PARTS, "resuming", breaks)
    setting = Setting(tmp_path, tmp_path, True, float("inf"))
    report = multi_gpu.Report(setting, {"suite": "multi-gpu"})
    multi_gpu.run_parts(setting, ["resuming"], report.add)
    assert [r["equal"] for r in report.records] == [True, False]


def test_a_killed_rank_without_time_to_end_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Running:
        whole, processes = True, ()

        def __init__(self, *_: Any) -> None: ...

        def kill(self) -> None: ...

    monkeypatch.setattr(multi_gpu, "Job", Running)
    records: list[dict[str, Any]] = []
    multi_gpu.killing(Setting(tmp_path, tmp_path, True, time.monotonic() + multi_gpu.END_LIMIT - 1.0), records.append)
    assert [(r["ended"], r["resumed"]) for r in records] == [(None, None)]
    assert list(multi_gpu.lines(records)) == ["kill      resumed None: not enough time left"]


@pytest.mark.parametrize(("left", "equal"), [(-1.0, None), (60.0, False)], ids=["cut", "failed"])
def test_a_checkpoint_that_time_did_not_allow_proves_nothing(
    left: float, equal: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failed:
        def __init__(self, *_: Any) -> None: ...

        def wait(self, limit: float) -> bool:
            return False

    monkeypatch.setattr(multi_gpu, "Job", Failed)
    records: list[dict[str, Any]] = []
    multi_gpu.resuming(Setting(tmp_path, tmp_path, True, time.monotonic() + left), records.append)
    assert [r["equal"] for r in records] == [equal, equal]


def test_a_stopped_job_leaves_no_process(tmp_path: Path) -> None:
    setting = Setting(tmp_path, tmp_path, True, float("inf"))
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    job = Job(setting, "stubborn", [([sys.executable, "-c", stubborn], {})])
    setting.stop()
    assert not job.runs
    assert not job.wait(1.0)


def test_scaling_is_tokens_per_second_over_those_of_one_gpu() -> None:
    cases: list[dict[str, Any]] = [
        {"part": "scaling", "processes": n, "tokens_per_second": x} for n, x in ((1, 11.0), (1, 9.0), (2, 19.5))
    ]
    assert multi_gpu._speed_up(cases) == 1.95
    assert multi_gpu._speed_up(cases[:2]) is None
    assert multi_gpu._speed_up(cases[1:]) is None


def test_timed_steps_run_on_sharded_weights(tmp_path: Path) -> None:
    changes = {"data.row_length": 64, "training.precision": "fp32", "training.device": "cpu"}
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "result.json"
    rows = {"training.micro_batch_rows": 2, "training.rows_per_step": 4}
    recipe.write_text(dump_recipe(load_recipe("quickstart/full", changes | rows)))

    def action(rank: int) -> int:
        multi_gpu_worker.scaling(str(recipe), str(out), rounds=1, steps=1)
        return 0

    assert ranks(2, action, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    result = json.loads(out.read_text())
    assert result["processes"] == 2
    assert result["tokens_per_second"] == pytest.approx(4 * 64 / (1e-3 * result["step_ms"]))
