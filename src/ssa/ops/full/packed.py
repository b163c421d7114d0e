"""cuDNN on packed documents through the optional package ``nvidia-cudnn-frontend``.

PyTorch's own packed entry (``aten._cudnn_attention_forward``) builds its execution plan anew in every call up to
torch 2.11 at least, 40 to 55 ms of host time. Here plans are kept. A plan depends on the shapes alone; which
rows form a document is data, so documents are read where they lie and in any grouping.

Flat tensors: N rows, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssa.ops.full.kernels import Gradients, upload
from ssa.ops.full.plan import Call, Plan, power_of_two

# names of a graph's tensors, by which a call passes pointers
Q, K, V, O, STATS, DO, DQ, DK, DV, LENGTHS, OFFSETS_Q, OFFSETS_K, OFFSETS_STATS = range(1, 14)


class Key(NamedTuple):
    """What a plan of cuDNN depends on. ``documents`` and ``length`` are upper limits."""

    device: int
    dtype: torch.dtype
    documents: int
    length: int
    total: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    deterministic: bool


class Graph(NamedTuple):
    """An executable plan, the handle that it runs on and its workspace in bytes."""

    graph: Any
    handle: Any
    workspace: int


@lru_cache(maxsize=8)
def _handle(device: int) -> Any:
    with torch.cuda.device(device):
        return import_module("cudnn").create_handle()


def _begin(key: Key) -> tuple[Any, Any, dict[int, Any]]:
    """A graph with q, k, v, document lengths and offsets declared."""
    cudnn = import_module("cudnn")
    handle = _handle(key.device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(key.device).cuda_stream)
    io = cudnn.data_type.BFLOAT16 if key.dtype == torch.bfloat16 else cudnn.data_type.HALF
    wide = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=io, intermediate_data_type=wide, compute_data_type=wide, handle=handle)
    B = key.documents
    column = {"stride": (1, 1, 1, 1)}
    names = {
        LENGTHS: graph.tensor(uid=LENGTHS, dim=(B, 1, 1, 1), data_type=cudnn.data_type.INT32, **column),
        **{
            uid: graph.tensor(uid=uid, dim=(B + 1, 1, 1, 1), data_type=cudnn.data_type.INT64, **column)
            for uid in (OFFSETS_Q, OFFSETS_K, OFFSETS_STATS)
        },
    }
    for uid in (Q, K, V):
        names[uid] = _rows(graph, key, uid, io, names)
    return cudnn, graph, names


def _layout(key: Key, uid: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Dimensions, strides and offsets of a tensor whose rows are ``[heads, width]``."""
    heads = key.kv_heads if uid in (K, V, DK, DV) else key.heads
    width = 1 if uid == STATS else key.head_dim
    offsets = OFFSETS_STATS if uid == STATS else OFFSETS_K if heads == key.kv_heads else OFFSETS_Q
    dim = (key.documents, heads, key.length, width)
    return dim, (key.length * heads * width, width, heads * width, 1), offsets


def _rows(graph: Any, key: Key, uid: int, dtype: Any, names: dict[int, Any]) -> Any:
    dim, stride, offsets = _layout(key, uid)
    tensor = graph.tensor(uid=uid, dim=dim, stride=stride, data_type=dtype)
    tensor.set_ragged_offset(names[offsets])
    return tensor


def _output(tensor: Any, key: Key, uid: int, names: dict[int, Any]) -> Any:
    dim, stride, offsets = _layout(key, uid)
    tensor.set_uid(uid).set_output(True).set_dim(dim).set_stride(stride)
    tensor.set_ragged_offset(names[offsets])
    return tensor


def _finish(cudnn: Any, graph: Any, key: Key) -> Graph:
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    return Graph(graph, _handle(key.device), graph.get_workspace_size())


@lru_cache(maxsize=512)
def _forward_graph(key: Key) -> Graph:
    cudnn, graph, names = _begin(key)
    out, stats = graph.sdpa(
        name="forward", q=names[Q], k=names[K], v=names[V], generate_stats=True, attn_scale=key.scale,
        use_causal_mask=True, use_padding_mask=True, seq_len_q=names[LENGTHS], seq_len_kv=names[LENGTHS],
    )  # fmt: skip
    _output(out, key, O, names)
    _output(stats, key, STATS, names).set_data_type(cudnn.data_type.FLOAT)
    return _finish(cudnn, graph, key)


@lru_cache(maxsize=512)
def _backward_graph(key: Key) -> Graph:
    cudnn, graph, names = _begin(key)
    io = cudnn.data_type.BFLOAT16 if key.dtype == torch.bfloat16 else cudnn.data_type.HALF
    out, d_out = (_rows(graph, key, uid, io, names) for uid in (O, DO))
    stats = _rows(graph, key, STATS, cudnn.data_type.FLOAT, names)
    gradients = graph.sdpa_backward(
        name="backward", q=names[Q], k=names[K], v=names[V], o=out, dO=d_out, stats=stats, attn_scale=key.scale,
        use_causal_mask=True, use_padding_mask=True, seq_len_q=names[LENGTHS], seq_len_kv=names[LENGTHS],
        max_total_seq_len_q=key.total, max_total_seq_len_kv=key.total,
        use_deterministic_algorithm=key.deterministic,
    )  # fmt: skip
    for uid, gradient in zip((DQ, DK, DV), gradients, strict=True):
        _output(gradient, key, uid, names)
    return _finish(cudnn, graph, key)


def _key(q: Tensor, k: Tensor, call: Call, total: int, scale: float) -> Key:
    """Limits rounded up to powers of two, so that packed training meets few plans."""
    index = q.device.index if q.device.index is not None else torch.cuda.current_device()
    deterministic = torch.are_deterministic_algorithms_enabled()
    sizes = (q.shape[1], k.shape[1], q.shape[2])
    return Key(
        index, q.dtype, power_of_two(len(call.starts)), power_of_two(call.length), -(-total // 64) * 64, *sizes, scale,
        deterministic,
    )  # fmt: skip


def _metadata(plan: Plan, number: int, key: Key, device: torch.device) -> dict[int, Tensor]:
    """Lengths and offsets of a call; documents up to the limit have length 0 and lie at the end."""
    name = ("packed", number, key.heads, key.kv_heads, key.head_dim, device)
    if name not in plan.cache:
        call = plan.calls[number]
        spare = key.documents - len(call.starts)
        lengths = torch.tensor([*call.lengths, *[0] * spare], dtype=torch.int32)
        starts = torch.tensor([*call.starts, *[plan.total] * (spare + 1)], dtype=torch.int64)
        offsets = {
            OFFSETS_Q: starts * (key.heads * key.head_dim),
            OFFSETS_K: starts * (key.kv_heads * key.head_dim),
            OFFSETS_STATS: starts * key.heads,
        }
        plan.cache[name] = {uid: upload(x, device) for uid, x in ((LENGTHS, lengths), *offsets.items())}
    return plan.cache[name]


def _run(built: Graph, tensors: dict[int, Tensor], device: torch.device) -> None:
    cudnn = import_module("cudnn")
    cudnn.set_stream(handle=built.handle, stream=torch.cuda.current_stream(device).cuda_stream)
    workspace = torch.empty(max(1, built.workspace), dtype=torch.uint8, device=device)
    built.graph.execute(tensors, workspace, handle=built.handle)


def packed_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """As :func:`ssa.ops.full.kernels.cudnn_forward`."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for number, call in enumerate(plan.calls):
        key = _key(q, k, call, plan.total, scale)
        tensors = {Q: q, K: k, V: v, O: out, STATS: lse, **_metadata(plan, number, key, q.device)}
        _run(_forward_graph(key), tensors, q.device)
    return out, lse


def packed_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float
) -> Gradients:
    """As :func:`ssa.ops.full.kernels.cudnn_backward`."""
    d_out, q, k, v, out, lse = (x.contiguous() for x in (d_out, q, k, v, out, lse))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for number, call in enumerate(plan.calls):
        key = _key(q, k, call, plan.total, scale)
        tensors = {Q: q, K: k, V: v, O: out, STATS: lse, DO: d_out, DQ: dq, DK: dk, DV: dv}
        _run(_backward_graph(key), {**tensors, **_metadata(plan, number, key, q.device)}, q.device)
    return dq, dk, dv
