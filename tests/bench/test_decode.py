"""The benchmark of decoding: its arithmetic, its check, and all of it on a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ssa.bench import decode
from ssa.bench.decode import SUITES, TARGETS, draw, run_case
from ssa.cli import main

TINY = SUITES["decode-smoke"][0]


def case(kind: str, ms: float, name: str = "1b_128k_b1") -> dict[str, Any]:
    return {"workload": {"name": name}, "kind": kind, "ms": ms}


def test_figures_compare_with_the_fastest_full_attention() -> None:
    records = [case("full", 9.0), case("full", 6.0), case("sparse", 2.0), case("full", 1.0, "8b_128k_b1")]
    records += [case("sparse, pooled keys up to date", 1.0), {"workload": {"name": "1b_128k_b1"}, "kind": "full"}]
    found = {target.id: target.figure(records) for target in TARGETS}
    assert found.pop("decode_1b_128k_b1") == 3.0
    assert set(found.values()) == {None}
    assert set(found) == {"decode_1b_128k_b32", "decode_8b_128k_b1", "decode_8b_128k_b16"}


def test_least_bytes() -> None:
    work = SUITES["decode"][0]
    assert work.cache_bytes == 2 * 131072 * 2 * 64 * 2
    assert work.sparse_bytes == 8192 * 2 * 64 * 2 + 2 * 256 * 2 * 64 * 2


@pytest.mark.parametrize("kind", ["full", "sparse"])
def test_a_wrong_result_has_no_time(kind: str) -> None:
    right = decode.full if kind == "full" else decode.sparse
    layers = draw(TINY, torch.device("cpu"))
    assert run_case(kind, "ssa", right, TINY, layers)["ms"] > 0
    for wrong in (1.001, float("nan")):
        record = run_case(kind, "ssa", lambda w, x, f=wrong: right(w, x) * f, TINY, layers)
        assert record["status"] == "wrong"
        assert "ms" not in record


def test_designs_change_constants_that_exist_and_put_them_back() -> None:
    launches = pytest.importorskip("ssa.ops.decode.triton")
    for constants in decode.DESIGNS.values():
        before = {name: getattr(launches, name) for name in constants}
        assert before != constants
        with decode.design(constants):
            assert {name: getattr(launches, name) for name in constants} == constants
        assert {name: getattr(launches, name) for name in constants} == before


def test_smoke_suite(tmp_path: Path) -> None:
    assert main(["bench", "--suite", "decode-smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench-decode-smoke.json").read_text())
    assert {c["status"] for c in found["cases"]} == {"ok"}
    assert next(c for c in found["cases"] if c["kind"] == "sparse")["over_fastest_full"] > 0
    assert not (tmp_path / "targets.json").exists()
