"""``ssa bench``: checks come before times, ratios and targets follow from the records, the smoke suite runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ssa.bench import operations, plot, result, runner, suites, targets, workloads
from ssa.bench.operations import Operation, check, differentiated, failures
from ssa.bench.runner import Options, add_ratios, interpolate, run_entry
from ssa.bench.suites import Entry
from ssa.bench.workloads import Workload
from ssa.cli.bench import run
from ssa.documents import DocumentLayout
from ssa.errors import DataError, InputError
from ssa.ops import select_blocks, sparse_attention

TINY = Workload("tiny", ((96,), (96,)), 4, 2, 8, block_size=8, num_blocks=3, dtype=torch.float32)
CPU = torch.device("cpu")
SILENT = Options(CPU, 0.1, lambda line: None)


# ---------------------------------------------------------------------- inputs
def test_correlated_inputs_are_an_ar1_series() -> None:
    noise = torch.randn(1, 4096, 64, dtype=torch.float64)
    x = workloads.autoregressive(noise, 0.9)
    expected, last = torch.empty_like(x), torch.zeros(1, 64, dtype=torch.float64)
    for t in range(4096):
        last = 0.9 * last + (1 - 0.81) ** 0.5 * noise[:, t]
        expected[:, t] = last
    torch.testing.assert_close(x, expected, atol=1e-3, rtol=0)  # powers of rho below 1e-4 are left out


def test_correlated_inputs_have_unit_variance_and_rho() -> None:
    work = replace(TINY, rows=((4096,),), heads=32, head_dim=64)
    q = workloads.draw(work, CPU).q.detach()
    assert float(q.std()) == pytest.approx(1, abs=0.1)
    neighbours = (q[:, 1:] * q[:, :-1]).mean() / q.square().mean()
    assert float(neighbours) == pytest.approx(workloads.RHO, abs=0.01)
    random = workloads.draw(replace(work, inputs="random"), CPU).q.detach()
    assert float((random[:, 1:] * random[:, :-1]).mean()) == pytest.approx(0, abs=0.01)


def test_inputs_repeat() -> None:
    a, b = (workloads.draw(TINY, CPU, seed=3) for _ in range(2))
    assert torch.equal(a.q, b.q)
    assert not torch.equal(a.q, workloads.draw(TINY, CPU, seed=4).q)


@pytest.mark.parametrize("seed", range(5))
def test_realistic_rows_fill_their_rows(seed: int) -> None:
    rows = workloads.realistic_rows(4, 8192, seed)
    assert [sum(row) for row in rows] == [8192] * 4
    DocumentLayout.from_lengths(rows)


@pytest.mark.parametrize("name", sorted(suites.SUITES))
def test_every_workload_has_a_small_valid_counterpart(name: str) -> None:
    entries = suites.suite(name, {})
    ids = [(e.workload.name, e.workload.inputs, o.name) for e in entries for o in e.operations]
    assert len(ids) == len(set(ids))
    for entry in entries:
        small = entry.workload.small()
        assert small.layout.total <= 1024
        assert small.packed == entry.workload.packed
        assert (small.heads, small.head_dim, small.spec) == (
            entry.workload.heads, entry.workload.head_dim, entry.workload.spec,
        )  # fmt: skip


def test_an_unknown_suite_is_named() -> None:
    with pytest.raises(InputError, match="smoke"):
        suites.suite("fast", {})


# ---------------------------------------------------------------------- checks
def _wrong(kind: str) -> Operation:
    def forward(workload: Workload, x: workloads.Tensors) -> Any:
        def attend() -> torch.Tensor:
            indices = select_blocks(x.q, x.k, workload.spec, workload.layout)
            value = x.v * 1.001 if kind == "value" else x.v
            out = sparse_attention(x.q, x.k, value, indices, workload.block_size, workload.layout)
            return out + (float("nan") if kind == "nan" else 0)

        return attend

    return Operation("sparse", "forward+backward", f"ssa wrong {kind}", differentiated(forward, "forward+backward"))


@pytest.mark.parametrize("kind", ["value", "nan"])
def test_a_wrong_result_has_no_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "measure", lambda *_: pytest.fail("timed in spite of a failed check"))
    lines: list[str] = []
    (record,) = run_entry(Entry(TINY, (_wrong(kind),)), Options(CPU, 0.1, lines.append))
    assert record["status"] == "wrong"
    assert "timing" not in record
    assert "out: error" in record["reason"]
    assert "WRONG" in lines[0]
    assert " ms" not in lines[0]


def test_wrong_blocks_are_found() -> None:
    def build(workload: Workload, x: workloads.Tensors) -> Any:
        recent = replace(workload.spec, local_blocks=workload.num_blocks)
        return lambda: {"indices": select_blocks(x.q, x.k, recent, workload.layout)}

    errors = check(Operation("selection", "forward", "ssa recent", build), TINY, workloads.draw(TINY, CPU))
    assert errors["indices"][0] > 0.1
    assert failures(errors)


def test_repeated_blocks_are_found() -> None:
    exact = torch.tensor([[0, 1, -1]])
    assert operations._lost(exact, exact) == 0
    assert operations._lost(torch.tensor([[1, 0, -1]]), exact) == 0
    assert operations._lost(torch.tensor([[0, 2, -1]]), exact) == 0.5
    assert operations._lost(torch.tensor([[0, 1, 1]]), exact) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [((96,), (96,)), ((40, 56), (90, 6))], ids=str)
def test_right_results_pass(dtype: torch.dtype, rows: tuple) -> None:
    work = replace(TINY, rows=rows, dtype=dtype)
    x = workloads.draw(work, CPU)
    for direction in operations.DIRECTIONS:
        for operation in (operations.full("auto", direction), operations.sparse("auto", direction)):
            assert not failures(check(operation, work, x))
    assert not failures(check(operations.selection("auto"), work, x))


def test_a_failing_case_does_not_stop_the_others() -> None:
    def broken(workload: Workload, x: workloads.Tensors) -> Any:
        raise RuntimeError("CUDA out of memory")

    operations_ = (Operation("full", "forward", "broken", broken), operations.full("cuda", "forward"))
    records = run_entry(Entry(TINY, (*operations_, operations.full("auto", "forward"))), SILENT)
    assert [r["status"] for r in records] == ["failed", "unavailable", "ok"]
    assert "out of memory" in records[0]["reason"]


# ---------------------------------------------------------------------- records
def record(workload: str, family: str, direction: str, backend: str, ms: float, **more: Any) -> dict[str, Any]:
    work = replace(TINY, name=workload, inputs=more.pop("inputs", "correlated")).describe()
    timing = {"median": ms, "low": ms, "high": ms, "repeats": 5, "wall": more.pop("wall", ms), "host": 0.01}
    name = f"{workload}: {family} {direction} [{backend}]"
    return {
        "id": name, "workload": work, "family": family, "direction": direction, "backend": backend, "status": "ok",
        "timing": timing, **more,
    }  # fmt: skip


def test_ratios_are_against_the_fastest_full_attention() -> None:
    cases = [
        record("1B 4x8K", "full", "forward", "sdpa cudnn_attention", 2.0),
        record("1B 4x8K", "full", "forward", "ssa flash", 3.0),
        record("1B 4x8K", "full", "forward+backward", "ssa flash", 0.1),
        record("1B 4x8K", "sparse", "forward", "ssa auto", 0.5, inputs="random"),
        {**record("1B 4x8K", "sparse", "forward", "peer x", 0.5), "status": "wrong"},
    ]
    add_ratios(cases)
    assert [case.get("ratio", {}).get("value") for case in cases] == [1.0, 2 / 3, 1.0, 4.0, None]
    assert cases[3]["ratio"]["baseline"] == cases[0]["id"]


def test_interpolation() -> None:
    points = [(100, 1.0), (400, 3.0), (1600, 4.0)]
    assert [interpolate(points, n) for n in (50, 100, 200, 400, 800, 9000)] == pytest.approx([1, 1, 2, 3, 3.5, 4])


RESULT = {"command": "ssa bench --suite targets", "commit": "abc", "created": "2026-11-24T10:00:00+00:00"}


def run_of(*cases: dict[str, Any]) -> dict[str, Any]:
    return {**RESULT, "machine": {"label": "H200"}, "cases": list(cases)}


def figures(*cases: dict[str, Any]) -> dict[str, float]:
    found = {t.id: t.figure(cases) for t in targets.TARGETS}
    return {name: value for name, value in found.items() if value is not None}


def test_figures_of_targets() -> None:
    both, full = "forward+backward", "sdpa cudnn_attention"
    assert figures(
        record("1B 32K", "full", "forward", full, 10.0),
        record("1B 32K", "sparse", "forward", "ssa auto", 2.0),
        record("1B 32K", "sparse", "forward", "ssa auto", 2.5, inputs="random"),
        record("1B 32K", "sparse", both, "peer peer_official:attention", 28.0),
        record("1B 32K", "sparse", both, "peer peer_fla:attention", 20.0),
        record("1B 32K", "sparse", both, "ssa auto", 4.0),
    ) == {"sparse_fwd_32k": 5.0, "sparse_fwd_32k_random": 4.0, "vs_official_fwdbwd_32k": 7.0}
    packed = "1B packed 32x1K"
    assert figures(
        record(packed, "full", "forward", full, 0.40),
        record(packed, "full", both, full, 2.0),
        record(packed, "full", "forward", "ssa cuda", 0.42, wall=0.5),
        record(packed, "full", both, "ssa cuda", 2.1),
    ) == {"full_packed_32x1k": pytest.approx(1.25)}
    assert figures(
        record("1B 128K", "sparse", both, "ssa auto", 20.0, peak_bytes=120),
        record("1B 128K", "full", both, "sdpa flash_attention", 500.0, peak_bytes=100),
    ) == {"sparse_fwdbwd_128k": 25.0, "memory_128k": 1.2}


def test_issue_ids_are_there() -> None:
    ids = {t.id for t in targets.TARGETS}
    for prefix in ("sparse_fwd", "sparse_fwdbwd"):
        assert {f"{prefix}_{n}{s}" for n in ("8k", "32k", "128k") for s in ("", "_random")} <= ids
    assert {f"vs_official_fwdbwd_{n}" for n in ("8k", "32k", "128k")} <= ids
    assert {"full_packed_32x1k", "memory_128k", "8b_fwd_8k", "8b_fwd_32k", "8b_fwdbwd_8k", "8b_fwdbwd_32k"} <= ids


def test_the_record_keeps_what_a_run_does_not_measure(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "targets.json"
    full = record("8B 8K", "full", "forward", "ssa cuda", 1.0)
    rows = targets.update(path, run_of(full, record("8B 8K", "sparse", "forward", "ssa auto", 0.5)))
    assert [r["id"] for r in rows] == [t.id for t in targets.TARGETS]
    row = {r["id"]: r for r in rows}["8b_fwd_8k"]
    assert (row["measured"], row["met"], row["target"], row["machine"]) == (2.0, True, 1.8, "H200")
    assert (row["date"], row["commit"], row["command"]) == ("2026-11-24", "abc", "ssa bench --suite targets")

    other = {**run_of(record("1B 4x8K", "full", "forward", "ssa cuda", 1.0)), "commit": "later"}
    assert {r["id"]: r for r in targets.update(path, other)}["8b_fwd_8k"] == row

    worse = run_of(full, record("8B 8K", "sparse", "forward", "ssa auto", 1.0))
    row = {r["id"]: r for r in targets.update(path, worse)}["8b_fwd_8k"]
    assert (row["measured"], row["met"]) == (1.0, False)  # a miss replaces a better figure of an earlier run


def test_rows_of_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    decode = {"id": "decode_128k", "target": 10, "measured": 9}
    path.write_text(json.dumps({"schema": targets.SCHEMA, "rows": [decode]}))
    assert targets.update(path, run_of())[-1] == decode


@pytest.mark.parametrize("text", ["[", "{}", '{"schema": "other", "rows": []}', "[]"])
def test_a_broken_record_is_not_overwritten(text: str, tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    path.write_text(text)
    with pytest.raises(DataError):
        targets.update(path, run_of())
    assert path.read_text() == text


# ---------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench")
    assert run(["--suite", "smoke", "--out", str(out), "--device", "cpu", "--budget", "0.1"]) == 0
    return out


def test_smoke_suite(smoke: Path) -> None:
    found = json.loads((smoke / "bench-smoke.json").read_text())
    assert found["schema"] == "ssa.bench/1"
    assert found["command"].startswith("ssa bench --suite smoke")
    assert {"gpu", "driver", "label", "packages", "cudnn"} <= set(found["machine"])
    assert {"created", "commit", "suite", "skipped"} <= set(found)
    assert {case["status"] for case in found["cases"]} == {"ok", "estimate"}
    for case in found["cases"]:
        assert case["ratio"]["value"] > 0
        if case["status"] == "ok":
            assert case["timing"]["median"] > 0
            assert all(error <= limit for error, limit in case["check"]["errors"].values())
    assert not (smoke / "targets.json").exists()


def test_exit_code_of_a_wrong_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.SUITES, "smoke", lambda peers: [Entry(TINY, (_wrong("value"),))])
    assert run(["--suite", "smoke", "--out", str(tmp_path), "--device", "cpu"]) == 1


def test_peers_are_timed_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_peer.py").write_text(
        "def attend(q, k, v, block_size, num_blocks):\n"
        "    return q + k.mean(2, keepdim=True) * v.mean(2, keepdim=True) * block_size\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    function = result.load_peers(["some_peer:attend"])
    entry = Entry(TINY, tuple(operations.peer(n, f, d) for n, f in function.items() for d in operations.DIRECTIONS))
    assert [r["status"] for r in run_entry(entry, SILENT)] == ["ok", "ok"]
    with pytest.raises(InputError, match="importable"):
        result.load_peers(["some_peer:nothing"])
    with pytest.raises(InputError, match="importable"):
        result.load_peers(["no_such_module:x"])


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cases = []
    for tokens in (96, 192):
        for family, backend in (("full", "ssa cuda"), ("full", "ssa flash"), ("sparse", "ssa auto")):
            case = record("any", family, "forward", backend, tokens / (2 if backend == "ssa cuda" else 1))
            case["workload"] |= {"tokens": tokens}
            cases.append(case)
    found = {kind: points for (_, kind), points in plot.lines([{"cases": cases}]).items()}
    assert found["full"] == [(96, 250.0), (192, 250.0)]  # the fastest backend
    assert plot.plot([{"cases": cases}], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert not plot.plot([{"cases": cases[:1]}], tmp_path / "y.png")
