"""The script that proves several GPUs: its arithmetic, and its timed steps on two gloo processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from many import ranks

from ssa.train.recipe_file import dump_recipe, load_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import multi_gpu
import multi_gpu_worker


def test_overlapping_spans_count_once_and_exposed_is_what_is_left() -> None:
    nccl, others = [(0.0, 4.0), (10.0, 12.0)], [(3.0, 6.0), (5.0, 9.0), (11.0, 11.5)]
    union = multi_gpu_worker._union
    assert union(others) == [(3.0, 9.0), (11.0, 11.5)]
    length = multi_gpu_worker._length
    assert length(union([*nccl, *others])) - length(union(others)) == 3.0 + 1.5


def write_run(folder: Path, losses: list[float], stream: str = "full") -> None:
    folder.mkdir(parents=True)
    steps = [{"event": "step", "step": n, "stream": stream, "loss": x} for n, x in enumerate(losses, 1)]
    text = "".join(json.dumps(record) + "\n" for record in [{"event": "start"}, *steps])
    (folder / "metrics.jsonl").write_text(text + '{"event": "st')  # a line that is being written


@pytest.mark.parametrize(
    ("sharded", "stream", "equal"), [(1.001, "full", True), (1.01, "full", False), (1.001, "sparse", False)]
)
def test_losses_are_equal_within_a_limit_and_streams_exactly(
    sharded: float, stream: str, equal: bool, tmp_path: Path
) -> None:
    setting = multi_gpu.Setting(tmp_path, tmp_path, True, 0.0)
    for number in range(3):
        write_run(tmp_path / "runs" / f"ssa-{number}", [4.0] * multi_gpu.STEPS)
    write_run(tmp_path / "runs" / "ssa-3", [4.0 * sharded] * multi_gpu.STEPS, stream)
    found = multi_gpu.compare(setting, "ssa")
    assert (found["complete"], found["equal"]) == (True, equal)
    assert multi_gpu._equal([found]) == float(equal)


def test_a_missing_run_is_not_equal(tmp_path: Path) -> None:
    setting = multi_gpu.Setting(tmp_path, tmp_path, True, 0.0)
    assert multi_gpu.compare(setting, "ssa") | {"losses": 0} == {
        "part": "equality", "method": "ssa", "losses": 0, "complete": False, "equal": False,
    }  # fmt: skip


def test_scaling_is_tokens_per_second_over_one_process() -> None:
    cases: list[dict[str, Any]] = [
        {"part": "scaling", "processes": n, "tokens_per_second": x} for n, x in ((1, 10.0), (2, 19.5))
    ]
    assert multi_gpu._speed_up(cases) == 1.95
    assert multi_gpu._speed_up(cases[:1]) is None


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
