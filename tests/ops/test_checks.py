"""Every public operation refuses what it cannot mean, in the form ``where: got X; expected Y``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import all_blocks, qkv
from ssa.documents import DocumentLayout
from ssa.errors import InputError
from ssa.ops import (
    SparseSpec,
    attention_entropy,
    compressed_attention,
    error_bound,
    full_attention,
    select_blocks,
    sparse_attention,
    ssa_attention,
    window_attention,
)

B, T, H, K, D, S = 2, 6, 4, 2, 3, 2
LAYOUT = DocumentLayout.from_lengths([[4, 2], [6]])
Q, KEY, V = qkv(LAYOUT, H, K, D, torch.float32)
SPEC = SparseSpec(S, 2)
INDICES = all_blocks(LAYOUT, K, S)

# name -> call(q, k, v, layout, **keywords)
OPERATIONS: dict[str, Callable[..., Any]] = {
    "select_blocks": lambda q, k, v, layout=None, **kw: select_blocks(q, k, SPEC, layout, **kw),
    "sparse_attention": lambda q, k, v, layout=None, **kw: sparse_attention(q, k, v, INDICES, S, layout, **kw),
    "full_attention": lambda q, k, v, layout=None, **kw: full_attention(q, k, v, layout, **kw),
    "ssa_attention": lambda q, k, v, layout=None, **kw: ssa_attention(q, k, v, spec=SPEC, layout=layout, **kw),
    "attention_entropy": lambda q, k, v, layout=None, **kw: attention_entropy(q, k, layout, **kw),
    "error_bound": lambda q, k, v, layout=None, **kw: error_bound(q, k, v, INDICES, S, layout, **kw),
    "compressed_attention": lambda q, k, v, layout=None, **kw: compressed_attention(q, k, v, S, layout, **kw),
    "window_attention": lambda q, k, v, layout=None, **kw: window_attention(q, k, v, 3, layout, **kw),
}
WITHOUT_V = ("select_blocks", "attention_entropy")

Inputs = tuple[Tensor, Tensor, Tensor]
BAD_TENSORS: dict[str, tuple[Callable[[], Inputs], str, str]] = {
    "q 3-D": (lambda: (Q[0], KEY, V), "q of shape (6, 4, 3)", "[B, T, heads, D]"),
    "k 3-D": (lambda: (Q, KEY[:, :, 0], V), "k of shape (2, 6, 3)", "[B, T, heads, D]"),
    "q 5-D": (lambda: (Q[None], KEY, V), "q of shape (1, 2, 6, 4, 3)", "4 dimensions"),
    "mixed dtypes": (lambda: (Q, KEY.double(), V), "q of dtype torch.float32 and k of torch.float64", "one dtype"),
    "integers": (lambda: (Q.long(), KEY.long(), V.long()), "q of dtype torch.int64", "torch.bfloat16"),
    "complex": (lambda: (Q + 0j, KEY + 0j, V + 0j), "q of dtype torch.complex64", "torch.float32"),
    "mixed devices": (lambda: (Q, KEY.to("meta"), V), "q on cpu and k on meta", "one device"),
    "indivisible heads": (lambda: (Q[:, :, :3], KEY, V), "3 query heads and 2 KV heads", "divisible"),
    "more KV heads": (lambda: (Q[:, :, :1], KEY, V), "1 query heads and 2 KV heads", "divisible"),
    "no rows": (lambda: (Q[:0], KEY[:0], V[:0]), "empty dimension", "no empty dimension"),
    "no tokens": (lambda: (Q[:, :0], KEY[:, :0], V[:, :0]), "q of shape (2, 0, 4, 3) (an empty", "no empty dimension"),
    "no heads": (lambda: (Q[:, :, :0], KEY, V), "q of shape (2, 6, 0, 3)", "no empty dimension"),
    "no KV heads": (lambda: (Q, KEY[:, :, :0], V), "k of shape (2, 6, 0, 3)", "no empty dimension"),
    "no dimension": (lambda: (Q[..., :0], KEY[..., :0], V[..., :0]), "empty dimension", "no empty dimension"),
    "k shorter": (lambda: (Q, KEY[:, :5], V), "q (2, 6, 4, 3) and k (2, 5, 2, 3)", "equal B, T"),
    "k of another batch": (lambda: (Q, KEY[:1], V), "q (2, 6, 4, 3) and k (1, 6, 2, 3)", "equal B, T"),
    "k of another D": (lambda: (Q, KEY[..., :2], V), "k (2, 6, 2, 2)", "head dimension D"),
}
BAD_VALUES: dict[str, tuple[Callable[[], Inputs], str, str]] = {
    "v 3-D": (lambda: (Q, KEY, V[0]), "v of shape (6, 2, 3)", "[B, T, heads, D]"),
    "v of another dtype": (lambda: (Q, KEY, V.bfloat16()), "q of dtype torch.float32 and v of torch.bfloat16", "one"),
    "v of another device": (lambda: (Q, KEY, V.to("meta")), "q on cpu and v on meta", "one device"),
    "v shorter": (lambda: (Q, KEY, V[:, :5]), "v (2, 5, 2, 3)", "equal B, T"),
    "v of another D": (lambda: (Q, KEY, V[..., :1]), "v (2, 6, 2, 1)", "head dimension D"),
    "v of fewer heads": (lambda: (Q, KEY, V[:, :, :1]), "k with 2 heads and v with 1", "equal numbers of KV heads"),
    "v is q": (lambda: (Q, KEY, Q), "k with 2 heads and v with 4", "equal numbers of KV heads"),
}
BAD_KEYWORDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "scale 0": ({"scale": 0.0}, "scale: got 0.0", "positive finite"),
    "scale -1": ({"scale": -1.0}, "scale: got -1.0", "positive finite"),
    "scale nan": ({"scale": float("nan")}, "scale: got nan", "positive finite"),
    "scale inf": ({"scale": float("inf")}, "scale: got inf", "positive finite"),
    "layout of fewer rows": ({"layout": DocumentLayout.single(1, 6)}, "(2, 6) [B, T]", "(1, 6)"),
    "layout of more tokens": ({"layout": DocumentLayout.single(2, 7)}, "(2, 6) [B, T]", "(2, 7)"),
    "layout transposed": ({"layout": DocumentLayout.single(6, 2)}, "(2, 6) [B, T]", "(6, 2)"),
    "offsets as layout": ({"layout": torch.tensor([0, 6, 12])}, "layout: got Tensor", "DocumentLayout"),
}


def refused(call: Callable[[], Any], *fragments: str) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert re.fullmatch(r"\S+: got .+; expected .+", message, re.DOTALL)
    for fragment in fragments:
        assert fragment in message
    return message


def test_the_table_calls_are_right_when_nothing_is_wrong() -> None:
    """Otherwise every refusal below could be for another reason."""
    for call in OPERATIONS.values():
        call(Q, KEY, V, LAYOUT, scale=0.5)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(operation: str, case: str) -> None:
    make, got, expected = BAD_TENSORS[case]
    message = refused(lambda: OPERATIONS[operation](*make()), got, expected)
    assert message.startswith(f"{operation}: ")


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in WITHOUT_V])
@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values(operation: str, case: str) -> None:
    make, got, expected = BAD_VALUES[case]
    message = refused(lambda: OPERATIONS[operation](*make()), got, expected)
    assert message.startswith(f"{operation}: ")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", BAD_KEYWORDS)
def test_bad_keywords(operation: str, case: str) -> None:
    keywords, got, expected = BAD_KEYWORDS[case]
    message = refused(lambda: OPERATIONS[operation](Q, KEY, V, **keywords), got, expected)
    assert message.startswith(operation)


# ---------------------------------------------------------------------- block indices
def index(value: int, *at: int) -> Tensor:
    """Valid indices with one entry replaced."""
    indices = INDICES.clone()
    indices[at] = value
    return indices


BAD_INDICES: dict[str, tuple[Callable[[], Tensor], str, str]] = {
    "float": (lambda: INDICES.float(), "block_indices: got dtype torch.float32", "int32 or int64"),
    "int16": (lambda: INDICES.short(), "dtype torch.int16", "int32 or int64"),
    "3-D": (lambda: INDICES[:, :, 0], "shape (2, 6, 3)", "[B, T, K, num_blocks] = (2, 6, 2, 'n >= 1')"),
    "per query head": (lambda: INDICES.repeat_interleave(2, 2), "shape (2, 6, 4, 3)", "(2, 6, 2"),
    "fewer tokens": (lambda: INDICES[:, :5], "shape (2, 5, 2, 3)", "(2, 6, 2"),
    "no slots": (lambda: INDICES[..., :0], "shape (2, 6, 2, 0)", "n >= 1"),
    "another device": (lambda: INDICES.to("meta"), "device meta", "cpu"),
    "18 below -1": (lambda: index(-2, 1, 3, 0, 2), "index -2 at [B, T, K, slot] [1, 3, 0, 2]", "-1 (nothing)"),
    "18 beyond the row": (lambda: index(99, 1, 5, 1, 0), "index 99 at [B, T, K, slot] [1, 5, 1, 0]", "causality"),
    "19 future": (lambda: index(2, 1, 3, 0, 2), "index 2 at [B, T, K, slot] [1, 3, 0, 2] (own block 1)", "causality"),
    # token 4 of row 0 begins a document: its own block is 0 again
    "19 of the next document": (lambda: index(1, 0, 4, 1, 1), "index 1 at [B, T, K, slot] [0, 4, 1, 1]", "causality"),
    "nothing at all": (lambda: index(-1, 1, 0, 1), "no block at all for [B, T, K] [1, 0, 1]", "at least the own block"),
    "twice": (lambda: index(0, 1, 4, 0, 2), "block 0 more than once at [B, T, K] [1, 4, 0]", "at most once"),
}
TAKE_INDICES: dict[str, Callable[[Tensor], Any]] = {
    "sparse_attention": lambda indices: sparse_attention(Q, KEY, V, indices, S, LAYOUT),
    "error_bound": lambda indices: error_bound(Q, KEY, V, indices, S, LAYOUT),
    "ssa_attention": lambda indices: ssa_attention(Q, KEY, V, spec=SPEC, layout=LAYOUT, block_indices=indices),
}


@pytest.mark.parametrize("operation", TAKE_INDICES)
@pytest.mark.parametrize("case", BAD_INDICES)
def test_bad_indices(operation: str, case: str) -> None:
    make, got, expected = BAD_INDICES[case]
    refused(lambda: TAKE_INDICES[operation](make()), "block_indices: got", got, expected)


@pytest.mark.parametrize("size", [0, -1, 24, 512, 2.0, True, None, "2"])
def test_bad_block_sizes(size: Any) -> None:
    for name, call in (("sparse_attention", sparse_attention), ("error_bound", error_bound)):
        refused(lambda call=call: call(Q, KEY, V, INDICES, size, LAYOUT), f"{name}.block_size: got", "256")


# ---------------------------------------------------------------------- ssa_attention's own arguments
@pytest.mark.parametrize(
    ("gate", "got"),
    [
        (torch.ones(B, T, H, 1), "shape (2, 6, 4, 1)"),
        (torch.ones(B, T, K), "shape (2, 6, 2)"),
        (torch.ones(B, T, H, dtype=torch.bool), "torch.bool"),
        (torch.ones(B, T, H, dtype=torch.long), "torch.int64"),
        (torch.ones(B, T, H, device="meta"), "on meta"),
    ],
)
def test_bad_gates(gate: Tensor, got: str) -> None:
    refused(lambda: ssa_attention(Q, KEY, V, gate), "ssa_attention.gate: got", got, "[B, T, H] = (2, 6, 4) on cpu")


@pytest.mark.parametrize("main", ["both", "", None, "Full"])
def test_bad_main_streams(main: Any) -> None:
    refused(lambda: ssa_attention(Q, KEY, V, main=main), f"ssa_attention.main: got {main!r}", "'full' or 'sparse'")


# ---------------------------------------------------------------------- SSA_CHECK
@pytest.mark.parametrize(
    ("operation", "which"), [(name, i) for name in OPERATIONS for i in range(2 if name in WITHOUT_V else 3)]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_mode_finds_the_first_non_finite_value(
    operation: str, which: int, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [Q.clone(), KEY.clone(), V.clone()]
    inputs[which][1, 2, 1, 2] = bad
    inputs[which][1, 3, 0, 0] = bad  # later in memory
    OPERATIONS[operation](*inputs)  # not read unless asked: it would stop a GPU
    monkeypatch.setenv("SSA_CHECK", "1")
    refused(
        lambda: OPERATIONS[operation](*inputs),
        f"non-finite {'qkv'[which]} at [B, T, head, D] index [1, 2, 1, 2]",
        "finite values",
    )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_check_mode_lets_finite_values_pass(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = OPERATIONS[operation](Q, KEY, V, LAYOUT)
    monkeypatch.setenv("SSA_CHECK", "1")
    checked = OPERATIONS[operation](Q, KEY, V, LAYOUT)
    if isinstance(plain, Tensor):
        assert torch.equal(plain, checked)
