"""The benchmark of a training step's attention: figures, checks that can fail, all of it on a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ssa.bench import layer
from ssa.bench.layer import CHECKS, EXACT, FULL, SAMPLED, SUITES, TARGETS, draw_inputs
from ssa.bench.operations import failures
from ssa.cli import main
from ssa.ops.full import row_kernels

CPU = torch.device("cpu")
TINY = SUITES["layer-smoke"][1][0]


def record(name: str, ms: float, workload: str = "8k") -> dict[str, Any]:
    return {"workload": {"name": workload}, "name": name, "status": "ok", "timing": {"median": ms}}


def test_figures_are_means_over_streams_against_the_faster_full_step() -> None:
    records = [record(FULL[0].name, 12.0), record(FULL[1].name, 10.0), record(EXACT[0].name, 11.0)]
    records += [record(EXACT[1].name, 13.0), record(SAMPLED.name, 4.0), record(FULL[0].name, 1.0, "32k")]
    found = {target.id: target.figure(records) for target in TARGETS}
    assert found == {
        "ssa_layer_8k": 1.2, "ssa_layer_32k": None, "ssa_layer_sub8_8k": 0.75, "ssa_layer_sub8_32k": None,
    }  # fmt: skip
    assert not next(t for t in TARGETS if t.id == "ssa_layer_8k").met(1.21)


@pytest.mark.parametrize("case", [*EXACT, SAMPLED], ids=lambda case: case.name)
def test_the_check_accepts_what_is_right_and_nothing_else(case: layer.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw_inputs(TINY, CPU)
    assert not failures(layer.check(case, TINY, inputs))
    build = layer.build

    def spoilt(*arguments: Any) -> Any:
        run = build(*arguments)
        return lambda: {name: x * (1.001 if name == "dgate" else 1) for name, x in run().items()}

    monkeypatch.setattr(layer, "build", spoilt)
    assert [text.split(":")[0] for text in failures(layer.check(case, TINY, inputs))] == ["dgate"]


def test_the_checks_see_a_wrong_merge_of_rectangles_and_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = row_kernels._cpu_backward
    monkeypatch.setattr(
        row_kernels, "CPU_FLASH",
        row_kernels._rectangles(row_kernels._cpu_forward, lambda *x: backward(*x[:5], x[5] + 1, *x[6:])),
    )  # fmt: skip
    from ssa.ops import dispatch

    monkeypatch.setitem(dispatch.IMPORTED, "ssa.ops.full.row_kernels:CPU_FLASH", {"function": row_kernels.CPU_FLASH})
    assert failures(layer.check(SAMPLED, TINY, draw_inputs(TINY, CPU)))


def test_checked_layouts_reach_both_kernels_of_sampled_rows() -> None:
    from ssa.ops.dual.sampling import sample_rows
    from ssa.ops.full.rows import MOST_WINDOWS, SHORTEST

    regular, packed = (sample_rows(w.layout, 1 / 8, 0) for w in (CHECKS[0][0], CHECKS[-1][0]))
    assert len(regular.windows) <= MOST_WINDOWS
    assert all(w.size >= SHORTEST for w in regular.windows)
    assert packed.windows, "sampled from many documents"
    assert len(list(CHECKS[-1][0].layout.runs())) > 4


def test_smoke_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "SEEDS", 2)
    assert main(["bench", "--suite", "layer-smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench-layer-smoke.json").read_text())
    assert {c["status"] for c in found["cases"]} == {"ok"}
    assert all(c["ok"] for c in found["check"])
    assert len(found["cases"]) == 6
    assert not (tmp_path / "targets.json").exists()
