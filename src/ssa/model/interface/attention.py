"""The attention function that transformers calls in every layer of a stock model.

Shapes: B sequences, Q new tokens, C rows of keys, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ssa.errors import InputError
from ssa.model.cache import BlockLayer
from ssa.model.interface.alignment import STREAM, StepStream, attach, check_stream
from ssa.model.interface.places import CacheRows, Memo, cache_rows, documents
from ssa.model.interface.settings import Settings, settings_of
from ssa.ops import full_attention, select_blocks, sparse_attention, ssa_attention
from ssa.ops.decode import decode_attention, full_decode_attention, update_pooled
from ssa.ops.dual.api import Stream

WHERE = 'attn_implementation="ssa"'
# keywords that models pass along and that change nothing in attention
HARMLESS = {
    "cache_position",
    "cu_seq_lens_k",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "position_embeddings",
    "return_dict",
    "tokenizer",  # `generate(tokenizer=...)`, as for stop strings, lets it through
    "use_cache",
}
_documents, _cache_rows = Memo(), Memo()


@torch.compiler.disable  # the graph follows the documents of a batch: compiled code is cut here and goes on after it
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    stream: str | None = None,
    alignment_scale: float = 1.0,
    sample_seed: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Full, sparse or both, as the config's ``ssa_*`` keys and the training stream say.

    Args:
        module: the layer's attention module; its ``config`` holds the settings.
        query: ``[B, H, Q, D]`` after RoPE.
        key, value: ``[B, K, C, D]``; more rows than Q when there is a cache.
        attention_mask: bool ``[B, C]`` from :func:`ssa.model.interface.places.causal_mask`, or None.
        dropout: must be 0.
        scaling: logit scale, default ``D ** -0.5``.
        position_ids, cu_seq_lens_q: see :func:`ssa.model.interface.places.documents`.
        stream, alignment_scale, sample_seed: of a training step; see :func:`ssa.model.interface.set_stream`.

    Returns:
        Output ``[B, Q, H, D]`` and None: there are no attention weights.

    Raises:
        InputError: a feature that is not computed here, or training without a stream.
    """
    _refuse(module, attention_mask, dropout, kwargs)
    settings = settings_of(cast("Any", module).config)
    step = _step(module, settings, StepStream(stream, alignment_scale, sample_seed))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast RoPE widens them
    B, Q, C = q.shape[0], q.shape[1], k.shape[1]
    if Q < C:
        key_ = (B, Q, C, k.device)
        past = _cache_rows.get((attention_mask,), key_, lambda: cache_rows(*key_[:3], attention_mask, k.device))
        if not past.is_empty:
            return _with_past(q, k, v, past, settings, scaling, getattr(key, "ssa_layer", None)), None
        k, v = k[:, :Q], v[:, :Q]  # a static cache hands out its unused rows too
    mask = None if attention_mask is None else attention_mask[:, :Q]
    layout = _documents.get(
        (attention_mask, position_ids, cu_seq_lens_q),
        (B, Q),
        lambda: documents(B, Q, mask, position_ids, cu_seq_lens_q),
    )
    main = cast("Stream", step.stream or settings.mode)
    spec = settings.sparse_spec()
    if step.stream is not None and settings.alignment_weight and torch.is_grad_enabled():
        seed = None if step.sample_seed is None else step.sample_seed + int(getattr(module, "layer_idx", None) or 0)
        out, alignment = ssa_attention(
            q, k, v, None, main, spec=spec, alignment=settings.alignment_spec(), layout=layout, scale=scaling, seed=seed
        )
        layers = cast("Any", module).config.num_hidden_layers
        return attach(module, out, alignment, step.alignment_scale, layers), None
    if main == "full":
        return full_attention(q, k, v, layout, scale=scaling), None
    indices = select_blocks(q, k, spec, layout, scale=scaling)
    return sparse_attention(q, k, v, indices, spec.block_size, layout, scale=scaling), None


def _with_past(
    q: Tensor, k: Tensor, v: Tensor, past: CacheRows, settings: Settings, scale: float | None, held: BlockLayer | None
) -> Tensor:
    """New tokens against a cache: a layer of a :class:`BlockCache` keeps block means; for another cache, which holds
    none, they are computed anew at every step."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise InputError(
            WHERE, "gradients through a key-value cache", "use_cache=False in training, or torch.no_grad()"
        )
    lengths, starts = past.lengths, past.starts
    if settings.mode == "full":
        return full_decode_attention(q, k, v, lengths, starts=starts, scale=scale)
    spec = settings.sparse_spec()
    if held is None:
        pooled = k.new_empty(k.shape[0], -(-k.shape[1] // spec.block_size), *k.shape[2:])
        update_pooled(pooled, k, lengths, k.shape[1], starts, spec.block_size)
    else:
        held.positions.starts = starts
        held.set_block_size(spec.block_size)
        pooled = held.pooled()[0]
    return decode_attention(q, k, v, pooled, lengths, spec, starts=starts, scale=scale)


def _step(module: nn.Module, settings: Settings, given: StepStream) -> StepStream:
    """The stream of this pass: the call's, else the one that was set, else none."""
    check_stream(given.stream)
    if given.stream is not None:
        return given
    if not module.training:
        return StepStream()
    step: StepStream = getattr(module, STREAM, StepStream())
    if step.stream is None and settings.alignment_weight:
        raise InputError(
            WHERE,
            "training without a stream",
            "stream='full' or 'sparse', drawn for each optimiser step",
            "model(..., stream=...), ssa.set_stream, or ssa.configure(model, alignment_weight=0) for one stream alone",
        )
    return step


def _refuse(module: nn.Module, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise :class:`InputError` for what plain causal softmax attention does not have."""
    if kwargs.get("sliding_window") is not None:
        raise InputError(
            WHERE,
            f"sliding_window={kwargs['sliding_window']}",
            "attention over the whole context",
            "a config without a window, if the window spans the context anyway",
        )
    kinds, layer = getattr(cast("Any", module).config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and layer is not None and layer < len(kinds) and kinds[layer] != "full_attention":
        raise InputError(WHERE, f"layer {layer} of type {kinds[layer]!r}", "layers of type 'full_attention'")
    if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise InputError(WHERE, "attention that is not causal (an encoder or cross attention)", "a decoder")
    if dropout:
        raise InputError(WHERE, f"attention dropout {dropout}", "0", "config.attention_dropout = 0.0")
    if mask is not None and (mask.dim() != 2 or mask.dtype != torch.bool):
        raise InputError("attention_mask", f"{mask.dtype} {tuple(mask.shape)}", "[B, T], 1 for tokens, 0 for padding")
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in HARMLESS and name != "is_causal":
            what = given if isinstance(given, int | float | str) else type(given).__name__
            raise InputError(WHERE, f"keyword {name}={what}", "plain causal softmax attention")
