"""Which backend serves a call: "auto" takes the first that can, a named one serves or says why not."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from oracles import all_blocks, qkv
from ssa.documents import DocumentLayout
from ssa.errors import BackendError, InputError
from ssa.ops import SparseSpec, dispatch, explain, full_attention, select_blocks, sparse_attention, ssa_attention
from ssa.ops.dispatch import OPERATIONS, Backend, Request, always, choose, first_reason, register

OPERATION_NAMES = ["select_blocks", "sparse_attention", "full_attention"]
REQUEST = Request(torch.device("cpu"), torch.float32, heads=4, kv_heads=2, head_dim=8, block_size=16, num_blocks=4)


def only_wide(request: Request) -> str | None:
    return first_reason([(request.head_dim < 64, f"needs head_dim 64, not {request.head_dim}")])


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch) -> str:
    """An operation with a picky backend (whose module does not exist) before two that serve everything."""
    monkeypatch.setattr(dispatch, "OPERATIONS", {})
    register(
        "toy",
        Backend("picky", "ssa.no_such_module:nothing", only_wide),
        Backend("plain", "math:floor", always),
        Backend("other", "math:ceil", always),
    )
    return "toy"


def test_auto_takes_the_first_that_can_serve(operation: str) -> None:
    assert choose(operation, REQUEST)(1.5) == 1


def test_a_name_is_taken_at_its_word(operation: str) -> None:
    assert choose(operation, REQUEST, "other")(1.5) == 2


def test_a_refused_backend_is_not_imported_and_not_replaced(operation: str) -> None:
    with pytest.raises(BackendError) as caught:
        choose(operation, REQUEST, "picky")
    assert str(caught.value) == (
        "toy(backend='picky'): got needs head_dim 64, not 8; expected a call that this backend can serve; "
        "try backend='auto'"
    )
    assert isinstance(caught.value, RuntimeError)
    assert "ssa.no_such_module" not in sys.modules


def test_an_unknown_name_lists_the_known_ones(operation: str) -> None:
    with pytest.raises(InputError, match=r"toy.backend: got 'fast'; .*'auto' or one of \['picky', 'plain', 'other'\]"):
        choose(operation, REQUEST, "fast")


def test_auto_without_any_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "OPERATIONS", {"toy": (Backend("picky", "math:floor", only_wide),)})
    with pytest.raises(BackendError, match=r"toy: got no backend for .*head_dim=8"):
        choose("toy", REQUEST)
    assert explain("toy", head_dim=8).chosen == "none"


def test_explain_says_why_not(operation: str) -> None:
    explanation = explain(operation, head_dim=8)
    assert explanation.chosen == "plain"
    assert str(explanation) == (
        "toy: plain\n  picky: needs head_dim 64, not 8\n  plain: chosen\n  other: can serve it, but plain comes first"
    )
    assert explain(operation, head_dim=64).chosen == "picky"


def test_explain_refuses_an_unknown_operation() -> None:
    with pytest.raises(InputError, match=r"explain.operation: got 'attention'; expected one of \[.*'full_attention'"):
        explain("attention")


def test_first_reason() -> None:
    assert first_reason([(False, "a"), (True, "b"), (True, "c")]) == "b"
    assert first_reason([(False, "a")]) is None
    assert first_reason([]) is None


def test_request_reads_the_tensors() -> None:
    layout = DocumentLayout.single(2, 6)
    q, k, _ = qkv(layout, 6, 2, 5, torch.bfloat16)
    request = Request.of(q, k, block_size=16, layout=layout)
    assert request == Request(torch.device("cpu"), torch.bfloat16, 6, 2, 5, block_size=16, layout=layout)


# ---------------------------------------------------------------------- the operations that ship
@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_the_reference_comes_last_and_serves_everything(name: str) -> None:
    *faster, reference = OPERATIONS[name]
    assert reference.name == "reference"
    assert "reference" not in [backend.name for backend in faster]
    for device in ("cpu", "cuda", "meta"):
        odd = Request(torch.device(device), torch.float64, heads=7, kv_heads=7, head_dim=3, block_size=1, num_blocks=1)
        assert reference.refusal(odd) is None
    assert callable(reference.load())


@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_every_backend_can_judge_every_request(name: str) -> None:
    for device in ("cpu", "cuda", "meta"):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            explanation = explain(name, device=device, dtype=dtype, heads=3, kv_heads=3, head_dim=1, block_size=1)
            assert explanation.chosen != "none"
            assert len(explanation.reasons) == len(OPERATIONS[name])
            assert all(text for _, text in explanation.reasons)


def test_the_cpu_prefers_its_flash_kernel() -> None:
    text = str(explain("full_attention"))
    assert text.startswith("full_attention: cpu_flash\n")
    assert "  cpu_flash: chosen" in text
    assert "  reference: can serve it, but cpu_flash comes first" in text


def test_a_backend_error_names_the_reason() -> None:
    q, k, v = (x.to("meta") for x in qkv(DocumentLayout.single(1, 4)))
    with pytest.raises(BackendError, match=r"full_attention\(backend='cpu_flash'\): got runs on the CPU, not on meta"):
        full_attention(q, k, v, backend="cpu_flash")


def calls(backend: str) -> dict[str, Any]:
    q, k, v = qkv(DocumentLayout.single(1, 4))
    spec = SparseSpec(2, 2)
    return {
        "select_blocks": lambda: select_blocks(q, k, spec, backend=backend),
        "sparse_attention": lambda: sparse_attention(
            q, k, v, all_blocks(DocumentLayout.single(1, 4), 1, 2), 2, backend=backend
        ),
        "full_attention": lambda: full_attention(q, k, v, backend=backend),
        "ssa_attention": lambda: ssa_attention(q, k, v, spec=spec, backend=backend),
    }


@pytest.mark.parametrize("name", [*OPERATION_NAMES, "ssa_attention"])
def test_operations_pass_the_backend_on(name: str) -> None:
    calls("reference")[name]()
    with pytest.raises(InputError, match=r"backend: got 'warp'; expected 'auto' or one of \[.*'reference'\]"):
        calls("warp")[name]()
