"""The full stream's plans, its custom operations, and its CUDA kernels' row handling with the kernels emulated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from oracles import causal_mask, dense_attention, fuzz, layouts, leaves, qkv
from ssa.documents import DocumentLayout
from ssa.errors import BackendError
from ssa.ops import explain, full_attention
from ssa.ops.dispatch import Request
from ssa.ops.full import backends, kernels, ops, packed, reference
from ssa.ops.full.plan import (
    Plan,
    Rate,
    Shape,
    batch_sizes,
    padded_length,
    partition,
    plan,
)

SHAPE = Shape(4, 2, 8)
UNCACHED = backends._cached_usable.__wrapped__
RATE = Rate(call=20.0, square=0.3, linear=100.0, copied=40.0, copy=0.4, empty=1.0)
CHEAP_CALLS = Rate(call=0.01, square=0.3, linear=100.0, copied=0.01, copy=0.4, empty=1.0)
DEAR_CALLS = Rate(call=1e9, square=0.3, linear=100.0, copied=1e9, copy=0.4, empty=1.0)
document_lengths = st.lists(st.integers(1, 5000), min_size=1, max_size=60).map(tuple)


def make(kernel: str, lengths: tuple[int, ...], rate: Rate = RATE, shape: Shape = SHAPE) -> Plan:
    return plan(tuple(lengths), shape, "forward", ((kernel, rate),))


# ---------------------------------------------------------------------- ladders
@given(st.integers(1, 1 << 21))
def test_padding_is_small(length: int) -> None:
    padded = padded_length(length)
    assert length <= padded < length + 64 or padded - length <= length / 8
    assert padded % 64 == 0
    assert padded_length(padded) == padded


def test_the_ladder_is_short() -> None:
    assert len({padded_length(n) for n in range(1, 8193)}) == 16 + 3 * 8


@given(st.integers(1, 4096))
def test_batch_sizes_add_up(count: int) -> None:
    sizes = batch_sizes(count)
    assert sum(sizes) == count
    assert len(sizes) <= 1 + count.bit_length() // 2
    allowed = {1 << i for i in range(13)} | {3 << i for i in range(12)}
    assert set(sizes) <= allowed


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(0, 100))
def test_partition_is_optimal(sizes: list[int], call: int) -> None:
    sizes.sort(reverse=True)
    cost = lambda a, b: call + sizes[a] ** 2 * (b - a)  # noqa: E731
    found = partition(len(sizes), cost)
    assert [i for a, b in found for i in range(a, b)] == list(range(len(sizes)))
    every = []
    for cuts in itertools.product([False, True], repeat=len(sizes) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(sizes)]
        every.append(sum(cost(a, b) for a, b in itertools.pairwise(edges)))
    assert sum(cost(a, b) for a, b in found) == min(every)


# ---------------------------------------------------------------------- plans
@fuzz(150)
@given(document_lengths, st.sampled_from(["cudnn", "packed", "flash"]), st.sampled_from([RATE, CHEAP_CALLS]))
def test_every_document_is_served_once(lengths: tuple[int, ...], kernel: str, rate: Rate) -> None:
    chosen = make(kernel, lengths, rate)
    starts = list(itertools.accumulate(lengths, initial=0))[:-1]
    served = [d for call in chosen.calls for d in zip(call.starts, call.lengths, strict=True)]
    assert sorted(served) == list(zip(starts, lengths, strict=True))
    for call in chosen.calls:
        assert max(call.lengths) <= call.length
        if kernel == "cudnn" and not call.copied:  # a view: equally long neighbours
            assert set(call.lengths) == {call.length}
            assert [s - call.starts[0] for s in call.starts] == [i * call.length for i in range(len(call.starts))]


@fuzz(100)
@given(document_lengths)
def test_padded_area_is_bounded_where_calls_are_cheap(lengths: tuple[int, ...]) -> None:
    """Every document alone on its rung is among the choices, so the best padding is no worse."""
    chosen = make("cudnn", lengths, CHEAP_CALLS)
    area = sum(len(call.lengths) * call.length**2 for call in chosen.calls)
    assert area <= 1.3 * sum(padded_length(n) ** 2 for n in lengths)


def test_dear_calls_merge_documents() -> None:
    lengths = tuple(range(101, 1000, 60))
    assert len(make("cudnn", lengths, CHEAP_CALLS).calls) > 10
    assert len(make("cudnn", lengths, DEAR_CALLS).calls) == len(batch_sizes(len(lengths)))
    assert len(make("packed", lengths, DEAR_CALLS).calls) == 1


def test_equally_long_documents_keep_their_exact_shape() -> None:
    assert [(c.length, len(c.starts), c.copied) for c in make("cudnn", (101,) * 5).calls] == [(101, 5, False)]


def test_packed_rows_meet_few_shapes() -> None:
    """A shape that was not seen before costs cuDNN tens of milliseconds, and packed training never repeats its cuts."""
    shapes = set()
    for cut in range(37, 4096, 41):
        plan = make("cudnn", (4096,) * 7 + (cut, 4096 - cut) + (4096,) * 8)
        shapes |= {(call.length, len(call.starts)) for call in plan.calls}
    assert len(shapes) < 100  # 99 batches of 3 or 4 shapes each; every rung with one or two documents, at most


def test_single_tokens_are_padded() -> None:
    """cuDNN refuses batches of length 1."""
    calls = make("cudnn", (1, 1, 1, 5)).calls
    assert all(call.length > 1 for call in calls)


def test_long_documents_on_a_rung_are_not_copied() -> None:
    lengths = (8192, 8192, 100, 200, 300, 401, 500, 7191)
    calls = make("cudnn", lengths).calls
    assert (8192, 2, False) in [(c.length, len(c.starts), c.copied) for c in calls]


def test_the_cheapest_kernel_is_chosen() -> None:
    """By the measured rates."""
    shape, mixed = Shape(32, 2, 64), tuple(range(10, 1000, 10))
    choose = lambda lengths, *kernels: backends.choose_plan(lengths, shape, "forward", "+".join(kernels)).kernel  # noqa: E731
    assert choose((1024,) * 32, "cudnn", "packed", "flash") == "cudnn"
    assert choose((8192,), "cudnn", "packed", "flash") == "cudnn"
    assert choose(mixed, "cudnn", "packed", "flash") == "packed"
    assert choose(mixed, "cudnn", "flash") == "flash"
    assert choose((40000, 25536), "cudnn", "flash") == "cudnn"


def test_more_squared_tokens_cost_more() -> None:
    for kernel in ("cudnn", "packed", "flash"):
        assert make(kernel, (4096, 4096)).microseconds < make(kernel, (8192,)).microseconds


def test_deterministic_mode_leaves_out_the_batched_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(32, 2, 64)
    assert backends.choose_plan((1024,) * 32, shape, "backward", "cudnn+flash").kernel == "cudnn"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert backends.choose_plan((1024,) * 32, shape, "backward", "cudnn+flash").kernel == "flash"
    assert backends.choose_plan((1024,) * 32, shape, "forward", "cudnn+flash").kernel == "cudnn"


# ---------------------------------------------------------------------- kernels, emulated
def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``[n, heads, P, D]`` each; causal."""
    group = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(group, 1).mT * scale
    logits = logits.masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), float("-inf"))
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp() @ v.repeat_interleave(group, 1), lse


def _gradients(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> list[Tensor]:
    """From the given log-sum-exp, as the kernels do."""
    group = q.shape[1] // k.shape[1]
    key, value = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = (q @ key.mT * scale).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), float("-inf"))
    p = (logits - lse[..., None]).exp()
    ds = p * (d_out @ value.mT - (d_out * out).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (ds.mT @ q, p.mT @ d_out))
    return [ds @ key, dk, dv]


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float) -> tuple:
    out, lse = _attend(q, k, v, scale)
    return out, lse[..., None].to(torch.float32), None, None


def _cudnn_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *_: Any, scale: float
) -> list[Tensor]:
    assert lse.is_contiguous()
    return _gradients(d_out, q, k, v, out, lse[..., 0].to(q.dtype), scale)


def _documents(cu: Tensor) -> Iterator[slice]:
    for a, b in itertools.pairwise(cu.tolist()):
        yield slice(a, b)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, *_: Any, scale: float) -> tuple:
    parts = [_attend(*(x[d].transpose(0, 1)[None] for x in (q, k, v)), scale) for d in _documents(cu)]
    out = torch.cat([o[0].transpose(0, 1) for o, _ in parts])
    return out, torch.cat([lse[0] for _, lse in parts], 1).float(), None, None, None


def _flash_backward(d_out: Tensor, *rest: Any, scale: float) -> tuple:
    q, k, v, out, lse, cu, *_ = rest
    parts = []
    for d in _documents(cu):
        rows = [x[d].transpose(0, 1)[None] for x in (d_out, q, k, v, out)]
        parts.append([g[0].transpose(0, 1) for g in _gradients(*rows, lse[None, :, d].to(q.dtype), scale)])
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernels,
        "aten",
        SimpleNamespace(
            _scaled_dot_product_cudnn_attention=_cudnn_forward,
            _scaled_dot_product_cudnn_attention_backward=_cudnn_backward,
            _flash_attention_forward=_flash_forward,
            _flash_attention_backward=_flash_backward,
        ),
    )


MIXES = [[5], [3, 3, 3], [130, 1, 64, 3, 70, 64, 64, 129], [1] * 9, [7, 7, 2, 9, 1, 128, 128, 200]]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("lengths", MIXES, ids=str)
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_rows_go_where_they_belong(kernel: str, lengths: list[int]) -> None:
    """Padding, copies and views, with the CUDA kernels replaced by their mathematics."""
    layout = DocumentLayout.from_lengths(lengths)
    q, k, v = leaves(*qkv(layout, 4, 2, 8))
    d_out = torch.randn_like(q)
    out, lse = torch.ops.ssa.full_forward(q, k, v, layout.lengths, 0.3, kernel)
    exact_out, exact_lse = reference.full_attention(q, k, v, layout, 0.3)
    torch.testing.assert_close(out, exact_out, rtol=1e-6, atol=1e-6)  # the log-sum-exp passes through float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    mine = torch.autograd.grad(out, (q, k, v), d_out)
    for x, y in zip(mine, torch.autograd.grad(exact_out, (q, k, v), d_out), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("emulated")
def test_another_documents_nan_stays_there() -> None:
    layout = DocumentLayout.from_lengths([130, 1, 64, 3, 70])
    q, k, v = leaves(*qkv(layout, 4, 2, 8))
    with torch.no_grad():
        for x in (q, k, v):
            x[:, 131:195] = float("nan")
    out, _ = torch.ops.ssa.full_forward(q, k, v, layout.lengths, 0.3, "cudnn")
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    clean = torch.ones(268, dtype=torch.bool)
    clean[131:195] = False
    for x in (out, *grads):
        assert x[0, clean].isfinite().all()


def test_packed_metadata_lists_the_call_and_nothing_else() -> None:
    chosen = make("packed", (100, 3000, 50))
    for number, call in enumerate(chosen.calls):
        key = packed.Key(0, torch.bfloat16, 4, 4096, 3200, 4, 2, 8, 0.3, False)
        data = packed._metadata(chosen, number, key, torch.device("cpu"))
        n = len(call.starts)
        assert data[packed.LENGTHS].tolist() == [*call.lengths, *[0] * (4 - n)]
        assert data[packed.OFFSETS_Q].tolist() == [32 * s for s in [*call.starts, *[3150] * (5 - n)]]
        assert data[packed.OFFSETS_K].tolist() == [16 * s for s in [*call.starts, *[3150] * (5 - n)]]
        assert data[packed.OFFSETS_STATS].tolist() == [4 * s for s in [*call.starts, *[3150] * (5 - n)]]


# ---------------------------------------------------------------------- custom operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    layout = DocumentLayout.from_lengths([[5, 11], [16]])
    q, k, v = (x.requires_grad_() for x in qkv(layout, 4, 2, 8, dtype))
    arguments = (list(layout.lengths), 0.3, "cpu_flash")
    torch.library.opcheck(torch.ops.ssa.full_forward.default, (q, k, v, *arguments))
    out, lse = torch.ops.ssa.full_forward(q.detach(), k.detach(), v.detach(), *arguments)
    detached = tuple(x.detach() for x in (q, k, v))
    torch.library.opcheck(torch.ops.ssa.full_backward.default, (torch.ones_like(out), *detached, out, lse, *arguments))


def test_compiles_as_one_graph() -> None:
    layout = DocumentLayout.from_lengths([[5, 11], [16]])
    inputs = leaves(*qkv(layout, 4, 2, 8))
    compiled = torch.compile(full_attention, fullgraph=True, backend="aot_eager")
    out = compiled(*inputs, layout)
    mine = torch.autograd.grad(out.square().sum(), inputs)
    eager = full_attention(*inputs, layout)
    assert torch.equal(out, eager)
    for x, y in zip(mine, torch.autograd.grad(eager.square().sum(), inputs), strict=True):
        assert torch.equal(x, y)


def test_checkpointing_recomputes_the_same() -> None:
    layout = DocumentLayout.from_lengths([9, 3, 4])
    inputs = leaves(*qkv(layout, 4, 2, 8))
    plain = torch.autograd.grad(full_attention(*inputs, layout).square().sum(), inputs)
    out = torch.utils.checkpoint.checkpoint(full_attention, *inputs, layout, use_reentrant=False)
    for x, y in zip(torch.autograd.grad(out.square().sum(), inputs), plain, strict=True):
        assert torch.equal(x, y)


@fuzz(40)
@given(layouts(8))
def test_equals_the_oracle_through_the_operation(layout: DocumentLayout) -> None:
    q, k, v = qkv(layout, 2, 1, 4)
    dense = dense_attention(q, k, v, causal_mask(layout), 0.5)
    out, lse = full_attention(q, k, v, layout, scale=0.5, return_lse=True)
    torch.testing.assert_close(out, dense.out)
    torch.testing.assert_close(lse, dense.lse)


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize("name", ["cuda", "cudnn", "packed", "flash"])
def test_gpu_backends_refuse_the_cpu(name: str) -> None:
    q = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="NVIDIA GPU"):
        full_attention(q, q, q, backend=name)


def _request(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), **facts: Any) -> Request:
    facts_ = backends.Device(True, capability, True, facts.pop("frontend", True))
    monkeypatch.setattr(backends, "device_facts", lambda device: facts_)
    monkeypatch.setattr(backends, "_cached_usable", UNCACHED)
    values = {"dtype": torch.bfloat16, "heads": 32, "kv_heads": 2, "head_dim": 64, **facts}
    return Request(torch.device("cuda"), **values)


@pytest.mark.parametrize(
    ("kernel", "facts", "reason"),
    [
        ("cudnn", {"dtype": torch.float32}, "float16 and bfloat16"),
        ("flash", {"dtype": torch.float64}, "float16 and bfloat16"),
        ("flash", {"head_dim": 60}, "multiples of 8"),
        ("flash", {"head_dim": 264}, "up to 256"),
        ("flash", {"capability": (7, 5)}, "compute capability"),
        ("cudnn", {"head_dim": 256, "capability": (10, 0)}, "up to 128"),
        ("cudnn", {"head_dim": 256}, None),
        ("cudnn", {}, None),
        ("flash", {}, None),
        ("packed", {}, None),
        ("packed", {"frontend": False}, "nvidia-cudnn-frontend"),
    ],
)
def test_refusals(kernel: str, facts: dict, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    told = backends.refuse(kernel, _request(monkeypatch, **facts))
    assert told is None if reason is None else reason in str(told)


def test_ampere_uses_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.usable(_request(monkeypatch, (8, 0))) == "flash"
    assert backends.usable(_request(monkeypatch, (9, 0))) == "cudnn+packed+flash"
    assert backends.usable(_request(monkeypatch, (9, 0), dtype=torch.float32)) == ""


def test_the_choice_is_a_constant_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what asks the device must not be traced."""
    request = _request(monkeypatch)
    ask = lambda x: x * len(backends.usable(request)) + (backends.refuse_planned(request) is None)  # noqa: E731
    compiled = torch.compile(ask, fullgraph=True, backend="eager")
    assert compiled(torch.ones(())) == len("cudnn+packed+flash") + 1


def test_explain_shows_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    _request(monkeypatch)
    layout = DocumentLayout.from_lengths([1024] * 32)
    text = str(explain("full_attention", device="cuda", dtype=torch.bfloat16, layout=layout))
    assert "full_attention: cuda" in text
    assert "forward " in text
    assert "about" in text
    assert set(ops.FORWARD) == set(ops.BACKWARD) == set(backends.KERNELS)
