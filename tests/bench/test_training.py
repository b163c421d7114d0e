"""The benchmark of training steps: its arithmetic, and all of it on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssa.bench import training
from ssa.bench.training import SUITES, TARGETS, by_kind, sized_recipe
from ssa.cli import main


def case(size: str, method: str, stream: str, ms: float, **more: Any) -> dict[str, Any]:
    return {"workload": {"name": size}, "method": method, "stream": stream, "ms": ms, "peak_bytes": None, **more}


def test_figures_average_over_streams_and_compare_with_full_attention() -> None:
    records = [
        case("8k", "full", "full", 100.0, mfu=0.5, peak_bytes=10),
        case("8k", "ssa", "full", 110.0, peak_bytes=11),
        case("8k", "ssa", "sparse", 90.0, peak_bytes=12),
        case("8k", "ssa 1/8", "sparse", 50.0),
    ]
    found = {target.id: target.figure(records) for target in TARGETS}
    assert found == {
        "train_tps_exact_8k": 1.0,
        "train_tps_exact_32k": None,
        "train_tps_sub8_8k": 1.25,
        "train_tps_sub8_32k": None,
        "mfu_full_8k": 0.5,
        "memory_ratio_8k": 1.2,
    }
    assert all(target.figure([]) is None for target in TARGETS)
    assert TARGETS[0].figure(records[:2]) is None, "one stream alone is no mean"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("union_forward_kernel", "attention"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3", "rest"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "rest"),
    ],
)
def test_kernels_have_kinds(name: str, kind: str) -> None:
    assert by_kind([{"name": name, "ms": 1.5}]) == {kind: 1.5}


def test_the_suite_is_the_1b_recipe_at_8k_and_32k() -> None:
    recipes = [sized_recipe(SUITES["training"], size) for size in SUITES["training"].sizes]
    assert [(r.data.row_length, r.training.micro_batch_rows) for r in recipes] == [(8192, 2), (32768, 1)]
    assert all((r.model.hidden_size, r.model.vocab_size) == (2048, 128256) for r in recipes)


def test_a_tiny_model_is_checked_timed_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", "training-smoke", "--out", str(tmp_path), "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "bench-training-smoke.json").read_text())
    assert all(record["ok"] for record in result["check"])
    assert {(c["workload"]["name"], c["method"]) for c in result["cases"]} >= {
        (size, method) for size in ("8k", "32k") for method in ("full", "ssa")
    }
    assert all(case["ms"] > 0 for case in result["cases"])
    assert not (tmp_path / "targets.json").exists()
    assert "check ssa, sparse step" in capsys.readouterr().out


def test_a_wrong_model_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [{"variant": "full", "errors": {"loss": (1.0, 0.1)}, "ok": False}]
    monkeypatch.setattr(training, "check", lambda suite, device: wrong)
    assert main(["bench", "--suite", "training-smoke", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert json.loads((tmp_path / "bench-training-smoke.json").read_text())["cases"] == []
