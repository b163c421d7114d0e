"""The language model: Llama blocks with gated attention that runs full, sparse, or both (paper section 4).

Shapes: B batch, T tokens, H query heads, K key-value heads, D head dim, C hidden size.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.utils import ModelOutput

from ssa.documents import IGNORE_INDEX, DocumentLayout
from ssa.errors import InputError
from ssa.model.cache import BlockCache
from ssa.model.cached import advance, attend, attend_nsa, open_cache, prefill
from ssa.model.configuration import SSAConfig
from ssa.model.generation import SSAGenerationMixin
from ssa.model.inputs import resolve_documents
from ssa.model.linear import linear
from ssa.model.modes import AttentionModes, Observer
from ssa.model.regions import LayerOfRegions, after_attention, before_attention, project_all
from ssa.ops import (
    Alignment,
    AlignmentSpec,
    SparseSpec,
    compressed_attention,
    full_attention,
    linear_cross_entropy,
    ssa_attention,
    window_attention,
)
from ssa.ops.dual.api import Stream


@dataclass(frozen=True)
class AttentionCall:
    """What every layer does in this forward pass: the main stream, its documents, and the alignment if training.

    With a ``cache`` every layer appends its keys and values to it; where it held tokens before, ``layout`` is None and
    attention reads the cache (:mod:`ssa.model.cached`).
    """

    main: Stream
    layout: DocumentLayout | None
    spec: SparseSpec
    alignment: AlignmentSpec | None
    cache: BlockCache | None = None
    seed: int | None = None  # of the sampled alignment; a layer adds its number

    def positions(self, x: Tensor) -> Tensor:
        """RoPE position of each token of ``x [B, T, C]``, from 0 at its document's or sequence's first."""
        if self.layout is not None:
            return self.layout.positions(x.device)
        assert self.cache is not None
        return self.cache.positions.places(x.shape[1])


@dataclass
class SSAOutput(ModelOutput):
    """Output of :class:`SSAForCausalLM`.

    Attributes:
        loss: cross-entropy + weighted alignment, with gradient; None without labels.
        logits: ``[B, T, vocabulary]``; None where ``skip_logits``.
        cross_entropy: mean over the targets of this call in nats, detached.
        alignment: the alignment term of ``loss``, detached; None where the method does not align.
        sparsity_loss, commitment_loss, attention_sparsity: ``[layers]``, detached; None likewise.
        cache: the key-value cache if there is one.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cross_entropy: Tensor | None = None
    alignment: Tensor | None = None
    sparsity_loss: Tensor | None = None
    commitment_loss: Tensor | None = None
    attention_sparsity: Tensor | None = None
    cache: BlockCache | None = field(default=None, repr=False)

    @property
    def past_key_values(self) -> BlockCache | None:
        """``cache`` under the name that transformers uses before 5.24."""
        return self.cache


class SSAAttention(nn.Module):
    """Grouped-query attention with RoPE, a sigmoid gate per head, and both streams on the same q, k, v."""

    def __init__(self, config: SSAConfig, layer_index: int) -> None:
        super().__init__()
        self.config, self.layer_index = config, layer_index
        self.head_dim = int(config.head_dim or config.hidden_size // config.num_attention_heads)
        self.branches = 3 if config.method == "nsa" else 1
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        wide, narrow = config.num_attention_heads * self.head_dim, kv_heads * self.head_dim
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)
        if config.gated:
            self.g_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.branches, bias=False)
        self.observer: Observer | None = None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``x [B, T, C]`` -> q ``[B, T, H, D]`` and k, v ``[B, T, K, D]`` after RoPE, gate ``[B, T, H * branches]``."""
        modules = (self.q_proj, self.k_proj, self.v_proj, *([self.g_proj] if self.config.gated else []))
        parts = project_all(modules, x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in parts[:3])
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast cos and sin are wider than the projections
        return q, k, v.contiguous(), torch.sigmoid(parts[3]) if self.config.gated else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None, Alignment | None]:
        """What follows a batch's documents: output ``[B, T, H, D]``, the gate that it still lacks, the alignment."""
        if call.cache is not None:
            call.cache.held[self.layer_index].append(k, v)
        if self.observer is not None and call.layout is not None:
            self.observer(self.layer_index, q, k, v, call.layout)
        if self.branches == 3 and gate is not None:
            return self._nsa(q, k, v, gate, call), None, None
        if call.alignment is None or call.layout is None:
            return self._single_stream(q, k, v, call), gate, None
        out, alignment = ssa_attention(
            q,
            k,
            v,
            gate,
            self._main(call),
            spec=self.config.sparse_spec(self.layer_index),
            alignment=call.alignment,
            layout=call.layout,
            seed=None if call.seed is None else call.seed + self.layer_index,
        )
        return out, None, alignment

    def _main(self, call: AttentionCall) -> Stream:
        """The step's main stream, or this layer's own (an ablation); a pure function of the seed, so recomputable."""
        if not self.config.stream_per_layer or call.seed is None:
            return call.main
        draw = random.Random(f"stream {call.seed} {self.layer_index}").random()
        return "full" if draw < float(self.config.full_probability or 0.0) else "sparse"

    def _single_stream(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        spec, heads = self.config.sparse_spec(self.layer_index), self.config.head_budgets(self.layer_index)
        if call.layout is None and call.cache is not None:
            return attend(q, call.cache, self.layer_index, call.main, spec, heads)
        if call.main == "full":
            return full_attention(q, k, v, call.layout)
        return prefill(q, k, v, spec, heads, cast("DocumentLayout", call.layout))

    def _nsa(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, call: AttentionCall) -> Tensor:
        """Sum of three gated branches: compression, selection, sliding window (in the gate's column order)."""
        if call.layout is None and call.cache is not None:
            spec, heads = self.config.sparse_spec(self.layer_index), self.config.head_budgets(self.layer_index)
            branches = attend_nsa(q, call.cache, self.layer_index, spec, heads, self.config.window_size)
        else:
            branches = (
                compressed_attention(q, k, v, call.spec.block_size, call.layout),
                self._single_stream(q, k, v, call),
                window_attention(q, k, v, self.config.window_size, call.layout),
            )
        weights = gate.unflatten(-1, (-1, 3)).to(q.dtype)  # [B, T, H, 3]
        return sum((out * weights[..., i, None] for i, out in enumerate(branches)), torch.zeros_like(q))


class SSADecoderLayer(LayerOfRegions):
    """Pre-norm attention and SwiGLU, each with a residual."""

    def __init__(self, config: SSAConfig, layer_index: int) -> None:
        super().__init__()
        self.self_attn = SSAAttention(config, layer_index)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], call: AttentionCall) -> tuple[Tensor, Alignment | None]:
        """``x [B, T, C]`` -> ``[B, T, C]`` and the alignment, which a checkpointed layer returns exactly too."""
        q, k, v, gate = self.run(before_attention, x, *rope)
        out, gate, alignment = self.self_attn(q, k, v, gate, call)
        return self.run(after_attention, x, out, gate), alignment


class SSAPreTrainedModel(PreTrainedModel):
    """Glue to transformers: configuration class, initialisation, saving and loading."""

    config: SSAConfig
    config_class = SSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SSADecoderLayer"]  # noqa: RUF012  (transformers reads a list)


class SSAModel(SSAPreTrainedModel):
    """Embeddings, decoder layers and the last norm."""

    def __init__(self, config: SSAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SSADecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, x: Tensor, call: AttentionCall) -> tuple[Tensor, list[Alignment]]:
        """``x [B, T, C]`` embeddings -> last hidden states ``[B, T, C]`` and the alignment of each aligned layer."""
        rope = self.rotary_emb(x, call.positions(x))
        alignments = []
        for layer in self.layers:
            x, alignment = layer(x, rope, call)
            if alignment is not None:
                alignments.append(alignment)
        return self.norm(x), alignments


class SSAForCausalLM(SSAGenerationMixin, SSAPreTrainedModel, AttentionModes):
    """The language model. See :meth:`forward` for training and :meth:`attention_mode` for inference."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    compiled = False

    def __init__(self, config: SSAConfig) -> None:
        super().__init__(config)
        self.model = SSAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        layout: DocumentLayout | None = None,
        cu_seqlens: Tensor | None = None,
        stream: str | None = None,
        num_items_in_batch: int | Tensor | None = None,
        alignment_scale: float = 1.0,
        sample_seed: int | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SSAOutput:
        """Next-token logits, and the loss if labels are given.

        Args:
            input_ids: ``[B, T]``, or ``inputs_embeds [B, T, C]``.
            attention_mask: ``[B, T]`` padding mask; position_ids: ``[B, T]``, which may mark packed documents;
                layout, cu_seqlens: documents said outright. See :func:`ssa.model.inputs.resolve_documents`.
            labels: ``[B, T]`` aligned with ``input_ids`` (the shift happens here), -100 to skip. A document's last
                token has no target.
            stream: training only: this step's main stream, ``"full"`` or ``"sparse"``. Where the method aligns, the
                counterpart is computed too. None: run ``config.inference_mode``.
            num_items_in_batch: divide the summed cross-entropy by this instead of the number of targets here.
            alignment_scale: factor on the alignment term, for example this micro-batch's share of the step's rows.
            sample_seed: of the query rows that a sparse step aligns where ``config.align_query_fraction`` is below 1;
                another one for every micro-batch (layers draw by themselves).
            logits_to_keep: only the last so many positions' logits (0: all).
            skip_logits: give the loss without ever holding all logits, whose memory a training step cannot spare.
                None: where labels are given to a model in training mode. Needs labels.
            past_key_values: a :class:`ssa.model.cache.BlockCache`; the tokens go on after what it holds, and
                ``attention_mask``, if any, spans both. ``cache`` is its name in newer transformers.
            use_cache: make a cache if none is given.

        Raises:
            InputError: shapes, ids or documents that do not fit, an unknown stream.
        """
        held = open_cache(
            cache if past_key_values is None else past_key_values,
            use_cache,
            self.config,
            {"layout": layout, "cu_seqlens": cu_seqlens, "labels": labels, "stream": stream},
        )
        self._refuse_unknown(kwargs)
        x = self._embed(input_ids, inputs_embeds)
        call = replace(self._call(stream, held), seed=sample_seed)
        if held is None or not held.get_seq_length():
            layout = resolve_documents(x.shape[0], x.shape[1], layout, cu_seqlens, attention_mask, position_ids)
            self._check_layout(layout, held, attention_mask)
            call = replace(call, layout=layout)
        if held is not None:
            advance(held, x, attention_mask, position_ids, self.config)
        hidden, alignments = self.model(x, call)
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        if labels is not None and labels.shape != hidden.shape[:2]:
            raise InputError("labels", f"shape {tuple(labels.shape)}", f"the logits' {tuple(hidden.shape[:2])}")
        skips = labels is not None and (self.training if skip_logits is None else skip_logits)
        output = SSAOutput(logits=None if skips else linear(self.lm_head, hidden), cache=held)
        if labels is not None and layout is not None:
            targets = layout.next_token_labels(labels)
            self._cross_entropy(output, hidden, targets, num_items_in_batch)
        if alignments:
            self._add_alignment(output, alignments, alignment_scale)
        return output

    @staticmethod
    def _refuse_unknown(kwargs: dict[str, Any]) -> None:
        """transformers passes a few keywords that change nothing here; any other is a mistake or asks for a feature."""
        for name, value in kwargs.items():
            if name not in ("return_dict", "cache_position", "tokenizer") and value:
                raise InputError("SSAForCausalLM", f"keyword {name}={value!r}", "keywords that its docstring lists")

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if inputs_embeds is not None and input_ids is None:
            return inputs_embeds
        if input_ids is None or inputs_embeds is not None:
            raise InputError("SSAForCausalLM", "both or neither of input_ids and inputs_embeds", "one of them")
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise InputError("input_ids", f"{input_ids.dtype} {tuple(input_ids.shape)}", "integers [B, T]")
        if input_ids.device.type == "cpu" and input_ids.numel():
            bad = (input_ids < 0) | (input_ids >= self.config.vocab_size)
            if bool(bad.any()):
                at = bad.nonzero()[0].tolist()
                raise InputError(
                    "input_ids", f"id {int(input_ids[tuple(at)])} at [B, T] {at}", f"0 <= id < {self.config.vocab_size}"
                )
        return self.model.embed_tokens(input_ids)

    def _check_layout(self, layout: DocumentLayout, held: BlockCache | None, mask: Tensor | None) -> None:
        if layout.max_length > self.config.max_position_embeddings:
            raise InputError(
                "SSAForCausalLM",
                f"a document of {layout.max_length} tokens",
                f"at most max_position_embeddings = {self.config.max_position_embeddings}",
                "RoPE scaling (rope_parameters) with a larger max_position_embeddings",
            )
        if held is not None and not layout.is_single and (mask is None or bool(mask.all())):
            raise InputError("SSAForCausalLM", "packed documents with a key-value cache", "one sequence per row")

    def _call(self, stream: str | None, held: BlockCache | None) -> AttentionCall:
        self.config.check()  # the mode and the budget may have been changed since construction
        if stream not in (None, "full", "sparse"):
            raise InputError("SSAForCausalLM.stream", repr(stream), "'full', 'sparse' or None")
        if stream == "full" and self.config.method == "nsa":
            raise InputError("SSAForCausalLM.stream", "'full' with method 'nsa'", "'sparse'")
        aligns = stream is not None and bool(self.config.alignment_weight)
        alignment = self.config.alignment_spec() if aligns else None
        main = cast("Stream", stream or self.config.inference_mode)
        if stream is not None and any(map(self.config.head_budgets, range(self.config.num_hidden_layers))):
            raise InputError("SSAConfig.budgets", "budgets per head in training", "one budget per layer or for all")
        return AttentionCall(main, None, self.config.sparse_spec(), alignment, held)

    def _cross_entropy(self, output: SSAOutput, hidden: Tensor, targets: Tensor, items: int | Tensor | None) -> None:
        logits = output.logits
        if logits is None and type(self.lm_head) is not nn.Linear:  # quantised, adapted or sharded by itself
            logits = self.lm_head(hidden)
        if logits is None:
            total = linear_cross_entropy(hidden, self.lm_head.weight, targets, compiled=self.compiled)
        else:
            wide = logits if logits.dtype == torch.float64 else logits.float()
            total = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        count = (targets != IGNORE_INDEX).sum().clamp(min=1)  # no target at all gives 0, not NaN
        output.loss = total / (count if items is None else items)
        output.cross_entropy = (total / count).detach()

    @staticmethod
    def _add_alignment(output: SSAOutput, alignments: list[Alignment], scale: float) -> None:
        """Mean over layers of alpha * (sparsity + commitment), as the paper's L_align."""
        term = torch.stack([a.loss for a in alignments]).mean() * scale
        output.loss = term if output.loss is None else output.loss + term
        output.alignment = term.detach()
        output.sparsity_loss = torch.stack([a.sparsity for a in alignments])
        output.commitment_loss = torch.stack([a.commitment for a in alignments])
        output.attention_sparsity = torch.stack([a.attention_sparsity for a in alignments])


AutoConfig.register("ssa", SSAConfig)
AutoModelForCausalLM.register(SSAConfig, SSAForCausalLM)
