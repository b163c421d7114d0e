"""Full attention of some query rows: forward and backward through the kernels of the full stream.

A window ``[a, b)`` of a document reads a *rectangle*, all keys before ``a``, and a causal *square*, the keys of
``[a, b)``. cuDNN computes both kinds fast, but its causal mask starts at the first key, so it cannot compute their
union. The two results meet through their log-sum-exps:

    lse = log(exp(lse_1) + exp(lse_2)),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2.

Backward needs nothing of the kind: a flash backward rebuilds probabilities as ``exp(logit - lse)`` and subtracts
``sum(d_out * out)``. Given the *merged* out and lse, each part returns its exact share of the gradients.

A rectangle has no mask, so rows of query heads that share keys are as good as rows of one head: folded into the length
of the queries, they spare the kernels a copy of dk and dv for every query head.

Shapes: N flat rows, R rows of the subset, H query heads, K key-value heads, D head dim; n documents, W rows of a
window, L keys. Gradients are added in float32 (float64 for float64 inputs): to that of q row by row, and to those of k
and v, to which every window adds, in totals of that dtype, which are rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ssa.ops.full.query_rows import QueryRows, Window, ranges

aten = torch.ops.aten
Pair = tuple[Tensor, Tensor]  # of keys and of values
Gradients = tuple[Tensor, Tensor, Tensor]
Finish = Callable[[Sequence[Tensor]], Gradients]


class RowKernel(NamedTuple):
    """``forward(q, k, v, rows, scale)``: out ``[R, H, D]`` and log-sum-exp ``[R, H]`` of flat ``q [N, H, D]``, k, v.
    ``backward(d_out, q, k, v, out, lse, rows, scale)`` computes the gradients but for ``finish(others)``, which gives
    them in the shapes and dtypes of q, k, v, with ``others`` (all three of them, contiguous; overwritten) added unless
    they are empty. These need not exist before."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Finish]


PROGRAMS = 512  # that keep a GPU busy; a backward kernel runs one per head and KEYS keys
KEYS = 64


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------- one rectangle or square, [n, W or L, heads, D]
def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, causal, False, scale=scale)
    return out.transpose(1, 2), lse.view(q.shape[0], q.shape[2], q.shape[1]).transpose(1, 2)


def _cudnn_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # dropout's random state
    lengths, stats = (q.shape[1], k.shape[1]), lse.transpose(1, 2).contiguous()[..., None]
    d_out, q, k, v, out = (x.transpose(1, 2) for x in (d_out, q, k, v, out))
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        d_out, q, k, v, out, stats, unused, unused, None, None, None, *lengths, 0.0, causal, scale=scale
    )
    dq, dk, dv = (g.transpose(1, 2) for g in grads)
    return dq, dk, dv


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    key, value = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), key, value, 0.0, causal, attn_mask=None, scale=scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def _cpu_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    K = k.shape[2]
    key, value = (x.transpose(1, 2).repeat_interleave(q.shape[2] // K, 1) for x in (k, v))
    do_, q_, out_, lse_ = (x.transpose(1, 2).contiguous() for x in (d_out, q, out, lse))
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do_, q_, key, value, out_, lse_, 0.0, causal, attn_mask=None, scale=scale
    )
    dk, dv = (x.unflatten(1, (K, -1)).sum(2) for x in (dk, dv))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


# ---------------------------------------------------------------------- windows as rectangles and squares
def merge(out: Tensor, lse: Tensor, past: Tensor, past_lse: Tensor) -> None:
    """Join ``past`` and ``past_lse``, the results over earlier keys as :func:`fold` orders them, into ``out [n * W, H,
    D]`` and ``lse [n * W, H]``."""
    past, past_lse = (unfold(x, len(out)) for x in (past, past_lse))
    total = torch.logaddexp(lse, past_lse)
    own, before = ((x - total).exp_()[..., None] for x in (lse, past_lse))
    out.copy_((own * out).addcmul_(before, past.to(own.dtype)))
    lse.copy_(total)


def add(target: Tensor, index: Tensor, square: Tensor, past: Tensor | None) -> None:
    """Add ``square [n * W, H, D]`` and ``past``, as large and ordered as by :func:`fold`, to the rows ``index`` of
    ``target [N, H, D]``, rounded once. No row comes twice."""
    total = target.index_select(0, index).to(_wide(target)) + square
    target.index_copy_(0, index, (total if past is None else total + unfold(past, len(square))).to(target.dtype))


def widen(base: Sequence[Tensor], own: Pair, place: Tensor) -> Pair:
    """Wide ``[N, K, D]`` for keys and for values: ``base`` of that shape, zeros if there is none, plus the row of ``own
    [R, K, D]`` that ``place [N]`` names, unless it is -1."""
    outside = (place < 0)[:, None, None]
    key, value = (x.index_select(0, place.clamp(min=0)).to(_wide(x)).masked_fill_(outside, 0) for x in own)
    return (key.add_(base[0]), value.add_(base[1])) if base else (key, value)


def add_keys(totals: Pair, window: Window, parts: Pair) -> None:
    """Add ``[n, L, K, D]`` for keys and for values to the first L rows of each document in ``totals [N, K, D]``."""
    for total, part in zip(totals, parts, strict=True):
        window.keys(total, part.shape[1]).add_(part)


def foldable(documents: int, kv_heads: int, group: int, keys: int) -> int:
    """How many of the ``group`` query heads of a key-value head become rows: all that leave enough programs."""
    most = documents * kv_heads * group * -(-keys // KEYS) // PROGRAMS
    return next((n for n in range(group, 1, -1) if group % n == 0 and n <= most), 1)


def fold(parts: Sequence[Tensor], documents: int, heads: int) -> list[Tensor]:
    """``[n * W, H, ...]`` to ``[n, W * H / heads, heads, ...]``: neighbouring heads become neighbouring rows."""
    split = (x.unflatten(1, (heads, -1)).unflatten(0, (documents, -1)) for x in parts)
    return [x.transpose(2, 3).flatten(1, 2) for x in split]


def unfold(x: Tensor, rows: int) -> Tensor:
    """The inverse of :func:`fold`, with ``rows`` n * W."""
    return x.unflatten(1, (rows // len(x), -1)).transpose(2, 3).flatten(2, 3).flatten(0, 1)


class _Joints(NamedTuple):
    """The functions of these names, or what computes the same."""

    fold: Callable[..., list[Tensor]]
    merge: Callable[..., None]
    add: Callable[..., None]
    widen: Callable[..., Pair]
    add_keys: Callable[..., None]


@cache
def _joints(device: torch.device) -> _Joints:
    if device.type != "cuda" or find_spec("triton") is None:
        return _Joints(fold, merge, add, widen, add_keys)
    from ssa.ops.full import triton_rows

    return _Joints(triton_rows.fold, triton_rows.merge, triton_rows.add, triton_rows.widen, triton_rows.add_keys)


def _queries(others: Sequence[Tensor], q: Tensor) -> Tensor:
    """The gradient of q in ``others``, zeros if they are empty."""
    return others[0] if others else torch.zeros(q.shape, dtype=q.dtype, device=q.device)


def _keys(others: Sequence[Tensor], k: Tensor) -> Pair:
    """The gradients of k and v in ``others``, wide, zeros if they are empty."""
    if others:
        return others[1].to(_wide(k)), others[2].to(_wide(k))
    dk, dv = (torch.zeros(k.shape, dtype=_wide(k), device=k.device) for _ in range(2))
    return dk, dv


def _heads(w: Window, q: Tensor, k: Tensor) -> int:
    """Query heads of a window's rectangle after folding."""
    H, K = q.shape[1], k.shape[1]
    return H // foldable(w.documents, K, H // K, w.begin)


def _rectangles(forward: Callable[..., tuple[Tensor, Tensor]], backward: Callable[..., Gradients]) -> RowKernel:
    """Kernel of windows from one of rectangles. Windows of one size share a call for their squares."""

    def rows_forward(q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, scale: float) -> tuple[Tensor, Tensor]:
        query, key, value = (x.index_select(0, rows.index(q.device)) for x in (q, k, v))
        outs, lses = [], []
        for size, span in rows.squares():
            o, l = forward(*(x[span].unflatten(0, (-1, size)) for x in (query, key, value)), True, scale)
            outs.append(o.flatten(0, 1))
            lses.append(l.flatten(0, 1))
        out, lse = (x[0].contiguous() if len(x) == 1 else torch.cat(x) for x in (outs, lses))
        joints = _joints(q.device)
        for w, span in rows.spans():
            if w.begin:
                (folded,) = joints.fold([query[span]], w.documents, _heads(w, q, k))
                past = forward(folded, w.keys(k, w.begin), w.keys(v, w.begin), False, scale)
                joints.merge(out[span], lse[span], *past)
        return out, lse

    def rows_backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: QueryRows, scale: float
    ) -> Finish:
        index = rows.index(q.device)
        query, key, value = (x.index_select(0, index) for x in (q, k, v))
        squares = []
        for size, span in rows.squares():
            parts = (x[span].unflatten(0, (-1, size)) for x in (d_out, query, key, value, out, lse))
            squares.append([g.flatten(0, 1) for g in backward(*parts, True, scale)])
        square_dq, *own = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*squares, strict=True))
        joints = _joints(q.device)
        past: list[tuple[Window, slice, Tensor | None, Pair | None]] = []
        for w, span in rows.spans():
            past_dq, past_keys = None, None
            if w.begin:
                heads = _heads(w, q, k)
                do_, q_, out_, lse_ = joints.fold([x[span] for x in (d_out, query, out, lse)], w.documents, heads)
                keys, values = w.keys(k, w.begin), w.keys(v, w.begin)
                past_dq, dk, dv = backward(do_, q_, keys, values, out_, lse_, False, scale)
                past_keys = dk, dv
            past.append((w, span, past_dq, past_keys))

        def finish(others: Sequence[Tensor]) -> Gradients:
            dq = _queries(others, q)
            totals = joints.widen(others[1:], own, rows.place(len(q), q.device))
            for w, span, past_dq, past_keys in past:
                joints.add(dq, index[span], square_dq[span], past_dq)
                if past_keys is not None:
                    joints.add_keys(totals, w, past_keys)
            return dq, totals[0].to(k.dtype), totals[1].to(v.dtype)

        return finish

    return RowKernel(rows_forward, rows_backward)


# ---------------------------------------------------------------------- any windows, one call of Flash
class _Varlen(NamedTuple):
    """Offsets of queries and of gathered keys, the keys' flat rows, the longest of each."""

    queries: Tensor
    keys: Tensor
    key_rows: Tensor
    longest: tuple[int, int]


def _varlen(rows: QueryRows, device: torch.device) -> _Varlen:
    single = [(first, w) for w in rows.windows for first in w.documents_first()]

    def offsets(sizes: list[int]) -> Tensor:
        return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)

    queries = rows.on(device, "queries", lambda: offsets([w.size for _, w in single]))
    keys = rows.on(device, "keys", lambda: offsets([w.end for _, w in single]))
    key_rows = rows.on(device, "key rows", lambda: ranges([(first, w.end) for first, w in single]))
    return _Varlen(queries, keys, key_rows, (max(w.size for _, w in single), max(w.end for _, w in single)))


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, scale: float) -> tuple[Tensor, Tensor]:
    """Flash aligns its causal mask with the last key, so that a window and all that it reads are one call."""
    x = _varlen(rows, q.device)
    query, key, value = q.index_select(0, rows.index(q.device)), *(y.index_select(0, x.key_rows) for y in (k, v))
    out, lse, *_ = aten._flash_attention_forward(
        query, key, value, x.queries, x.keys, *x.longest, 0.0, True, False, scale=scale
    )
    return out, lse.t().contiguous()


def _flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: QueryRows, scale: float
) -> Finish:
    x = _varlen(rows, q.device)
    query, key, value = q.index_select(0, rows.index(q.device)), *(y.index_select(0, x.key_rows) for y in (k, v))
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # dropout's random state, unused
    unused = torch.empty(0, device=q.device)
    dq, dk, dv = aten._flash_attention_backward(
        d_out, query, key, value, out, lse.t().contiguous(), x.queries, x.keys, *x.longest, 0.0, True, state, unused,
        scale=scale,
    )  # fmt: skip

    def finish(others: Sequence[Tensor]) -> Gradients:
        total, totals = _queries(others, q), _keys(others, k)
        _joints(q.device).add(total, rows.index(q.device), dq, None)
        for wide, grad in zip(totals, (dk, dv), strict=True):
            wide.index_add_(0, x.key_rows, grad.to(wide.dtype))
        return total, totals[0].to(k.dtype), totals[1].to(v.dtype)

    return finish


# ---------------------------------------------------------------------- plain PyTorch: the specification
def _logits(w: Window, span: slice, query: Tensor, k: Tensor, scale: float) -> Tensor:
    """``[n, K, G, W, end]``, -inf in the future."""
    q = query[span].unflatten(0, (w.documents, -1)).unflatten(2, (k.shape[1], -1))
    logits = torch.einsum("nwkgd,nlkd->nkgwl", q, w.keys(k, w.end)) * scale
    position = torch.arange(w.end, device=k.device)
    return logits.masked_fill(position > position[w.begin :, None], float("-inf"))


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, scale: float) -> tuple[Tensor, Tensor]:
    q_, k_, v_ = (x.to(_wide(q)) for x in (q, k, v))
    query = q_.index_select(0, rows.index(q.device))
    out, lse = torch.empty_like(query), torch.empty(query.shape[:2], dtype=_wide(q), device=q.device)
    for w, span in rows.spans():
        logits = _logits(w, span, query, k_, scale)
        found = torch.einsum("nkgwl,nlkd->nwkgd", logits.softmax(-1), w.keys(v_, w.end))
        out[span] = found.flatten(2, 3).flatten(0, 1)
        lse[span] = logits.logsumexp(-1).permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
    return out.to(q.dtype), lse


def _reference_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: QueryRows, scale: float
) -> Finish:
    q_, k_, v_, do_, out_ = (x.to(_wide(q)) for x in (q, k, v, d_out, out))
    query, K = q_.index_select(0, rows.index(q.device)), k.shape[1]
    found: list[tuple[Window, slice, Tensor, Pair]] = []
    for w, span in rows.spans():
        probability = _logits(w, span, query, k_, scale).softmax(-1)
        grouped = [x[span].unflatten(0, (w.documents, -1)).unflatten(2, (K, -1)) for x in (do_, query, out_)]
        delta = (grouped[0] * grouped[2]).sum(-1).permute(0, 2, 3, 1)[..., None]  # [n, K, G, W, 1]
        d_logits = probability * (torch.einsum("nwkgd,nlkd->nkgwl", grouped[0], w.keys(v_, w.end)) - delta) * scale
        dq = torch.einsum("nkgwl,nlkd->nwkgd", d_logits, w.keys(k_, w.end)).flatten(2, 3).flatten(0, 1)
        dk, dv = (torch.einsum("nkgwl,nwkgd->nlkd", *x) for x in ((d_logits, grouped[1]), (probability, grouped[0])))
        found.append((w, span, dq, (dk, dv)))

    def finish(others: Sequence[Tensor]) -> Gradients:
        total, totals = _queries(others, q), _keys(others, k)
        for w, span, dq, parts in found:
            add(total, rows.index(q.device)[span], dq, None)
            add_keys(totals, w, parts)
        return total, totals[0].to(k.dtype), totals[1].to(v.dtype)

    return finish


CUDNN = _rectangles(_cudnn_forward, _cudnn_backward)
CPU_FLASH = _rectangles(_cpu_forward, _cpu_backward)
FLASH = RowKernel(_flash_forward, _flash_backward)
REFERENCE = RowKernel(_reference_forward, _reference_backward)
