"""What a recipe costs: floating-point operations of a step, and memory on each GPU. Arithmetic only; nothing is run.

Letters: C hidden size, I intermediate size, W query width (heads times head dim), N key-value width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ssa.documents import DocumentLayout
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.ops.cross_entropy import CHUNK_LOGITS
from ssa.train.build import check_split
from ssa.train.recipe import Recipe
from ssa.train.sharding import resolve_shard
from ssa.train.streams import Stream

GIB = 2**30
GATHERED_BYTES = 4 * GIB  # of all layers, gathered, that may stay for the backward pass
MEMORY_SHARE = 0.9  # of a GPU that an estimate may take; the rest is for fragments and the libraries

#: Dense bfloat16 TFLOP/s by a part of the device's name, the first that fits. H200: what large matrix products reach
#: on it; the others: the vendor's figure without sparsity.
PEAK_TFLOPS = {
    "H200": 790.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "MI300X": 1307.0,
    "RTX 4090": 165.0,
}


def peak_flops(name: str | None) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name; None if it is not in the table."""
    found = (tera for part, tera in PEAK_TFLOPS.items() if name is not None and part in name)
    return next((tera * 1e12 for tera in found), None)


# ---------------------------------------------------------------------- operations
def matrix_parameters(config: SSAConfig) -> int:
    """Weights that multiply every token: all matrices but the embedding, and the head (tied or not)."""
    parts = _Widths.of(config)
    layer = parts.hidden * (2 * parts.queries + 2 * parts.keys + parts.gates) + 3 * parts.hidden * parts.inner
    return int(config.num_hidden_layers * layer + config.vocab_size * parts.hidden)


def attended_pairs(layout: DocumentLayout, config: SSAConfig, stream: Stream) -> int:
    """Query-key pairs of one head and layer in one stream: causal, and at most the budget where it is sparse."""
    return _pairs(layout, None if stream == "full" else config.block_size * config.num_blocks)


def step_pairs(layout: DocumentLayout, config: SSAConfig, stream: Stream) -> int:
    """Query-key pairs of one head and layer that a training step computes: of the drawn stream and, where the method
    aligns, of its counterpart; for NSA of the selection, window and compression branches."""
    if config.alignment_weight:
        share = float(config.align_query_fraction) if stream == "sparse" else 1.0  # of a sample: on average
        return round(share * attended_pairs(layout, config, "full")) + attended_pairs(layout, config, "sparse")
    pairs = attended_pairs(layout, config, stream)
    if config.method == "nsa":
        pairs += _pairs(layout, config.window_size)
        pairs += attended_pairs(layout, config, "full") // config.block_size
    return pairs


def _pairs(layout: DocumentLayout, budget: int | None) -> int:
    """Pairs of a causal attention in which a query reads at most ``budget`` keys."""
    limits = (n if budget is None else min(n, budget) for n in layout.lengths)
    return sum(limit * (limit + 1) // 2 + (n - limit) * limit for n, limit in zip(layout.lengths, limits, strict=True))


def step_flops(config: SSAConfig, tokens: int, pairs: int) -> float:
    """Operations of a step's forward and backward passes: ``6 * matrix weights * tokens + 12 * layers * W * pairs``.

    A product costs 2 operations a weight in the forward pass and 4 in the backward pass; a query-key pair costs 4 a
    channel forward (scores and values) and 8 backward. Block selection, norms and recomputation count for nothing.
    Divided by time, GPUs and :func:`peak_flops` this is the step's model FLOP/s utilisation (MFU).

    Args:
        tokens: tokens of the step.
        pairs: of the step, see :func:`step_pairs`.
    """
    attention = 12.0 * config.num_hidden_layers * _Widths.of(config).queries * pairs
    return 6.0 * matrix_parameters(config) * tokens + attention


# ---------------------------------------------------------------------- memory
@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one GPU at the peak of a training step.

    Attributes:
        weights: float32 master weights.
        moments: AdamW's two, float32.
        gradients: float32.
        compute: low-precision and gathered copies of weights, and buffers of their gradients' reduction.
        activations: what the backward pass needs of the layers.
        logits: a chunk of logits, and the head's gradient (see :mod:`ssa.ops.cross_entropy`).
    """

    weights: float
    moments: float
    gradients: float
    compute: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(dataclasses.asdict(self).values())


def count_parameters(config: SSAConfig) -> int:
    """Parameters of the model, tied ones once. Builds no weights."""
    with torch.device("meta"):
        return SSAForCausalLM(config).num_parameters()


def estimate_memory(recipe: Recipe, config: SSAConfig, processes: int = 1) -> Memory:
    """The memory of a training step on each of ``processes`` GPUs.

    Raises:
        ConfigError: the recipe cannot be split over so many.
    """
    check_split(recipe, processes)
    training = recipe.training
    shard = resolve_shard(training.shard, processes)
    parameters = count_parameters(config)
    layer = _layer_parameters(config)
    low = 2 if training.precision == "bf16" else 4
    accumulates = training.rows_per_step > training.micro_batch_rows * processes
    if processes == 1:
        gradients, compute = 4.0 * parameters, 2.0 * parameters if training.precision == "bf16" else 0.0
    else:
        gathered = parameters - layer * config.num_hidden_layers  # embedding, head and last norm, in float32
        kept = shard == 1 or not must_reshard(recipe, config)
        layers_whole = config.num_hidden_layers if kept else 2  # the one at work and the next
        gradients = 4.0 * parameters / (1 if accumulates else shard)
        compute = (4.0 + low) * gathered + low * layers_whole * layer + 2 * (low + 4.0) * layer
    tokens = training.micro_batch_rows * recipe.data.row_length
    compiled = training.compile is not False
    return Memory(
        weights=4.0 * parameters / shard,
        moments=8.0 * parameters / shard,
        gradients=gradients,
        compute=compute,
        activations=tokens * _activation_bytes(config, low, bool(training.activation_checkpointing), compiled),
        logits=_logit_bytes(config, tokens, low, compiled),
    )


def must_recompute(recipe: Recipe, config: SSAConfig, processes: int, memory: int | None) -> bool:
    """Whether to recompute activations: as the recipe says, or where the estimate does not fit a GPU without.

    Args:
        memory: bytes of each GPU; None: of a CPU, which is not asked.
    """
    if recipe.training.activation_checkpointing is not None:
        return recipe.training.activation_checkpointing
    return memory is not None and estimate_memory(recipe, config, processes).total > MEMORY_SHARE * memory


def must_reshard(recipe: Recipe, config: SSAConfig) -> bool:
    """Whether gathered layers are given up after the forward pass: as the recipe says, or where they are large."""
    if recipe.training.reshard is not None:
        return recipe.training.reshard
    low = 2 if recipe.training.precision == "bf16" else 4
    return low * _layer_parameters(config) * config.num_hidden_layers > GATHERED_BYTES


def _activation_bytes(config: SSAConfig, low: int, recomputes: bool, compiled: bool) -> float:
    """Bytes a token that the layers keep for the backward pass, and what the largest of them adds at its peak.

    Within 5 % of what `ssa bench --suite training` measured for compiled layers of the 1B model.
    """
    parts = _Widths.of(config)
    # Residual stream in float32 twice, each product's input in low precision; eager norms keep what they compute from.
    stream = (8 + 2 * low if compiled else 16 + 6 * low) * parts.hidden
    attention = low * (3 * parts.queries + 2 * parts.keys) + 4 * config.num_attention_heads
    if config.alignment_weight:  # the counterpart's output and log-sum-exp
        attention += low * parts.queries + 4 * config.num_attention_heads
    if config.method == "nsa":
        attention += 2 * low * parts.queries
    inner = (3 if compiled else 4) * low * parts.inner
    layer = stream + attention + inner
    if recomputes:  # attention's inputs and results stay
        return float((4 * parts.hidden + attention) * config.num_hidden_layers + layer)
    return float(layer * config.num_hidden_layers)


def _logit_bytes(config: SSAConfig, tokens: int, low: int, compiled: bool) -> float:
    """A chunk's logits, their float32 softmax where nothing fuses it, and the head's gradient with its last summand."""
    chunk = min(tokens * config.vocab_size, CHUNK_LOGITS)
    return chunk * (low + (0.0 if compiled else 12.0)) + 8.0 * config.vocab_size * config.hidden_size


@dataclass(frozen=True)
class _Widths:
    hidden: int
    inner: int
    queries: int
    keys: int
    gates: int

    @classmethod
    def of(cls, config: SSAConfig) -> _Widths:
        head = int(config.head_dim or config.hidden_size // config.num_attention_heads)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        gates = heads * (3 if config.method == "nsa" else 1) if config.gated else 0
        return cls(config.hidden_size, config.intermediate_size, heads * head, kv_heads * head, gates)


def _layer_parameters(config: SSAConfig) -> int:
    matrices = matrix_parameters(config) - config.vocab_size * config.hidden_size
    return matrices // config.num_hidden_layers + 2 * config.hidden_size


# ---------------------------------------------------------------------- advice
def advise(recipe: Recipe, config: SSAConfig, processes: int) -> str:
    """What to lower if the memory does not suffice, with estimates."""
    now = estimate_memory(recipe, config, processes).total
    training = recipe.training
    changes: list[tuple[str, dict[str, Any]]] = []
    if not training.activation_checkpointing:
        changes.append(("training.activation_checkpointing: true", {"activation_checkpointing": True}))
    if training.micro_batch_rows > 1:
        rows = next(n for n in range(training.micro_batch_rows // 2, 0, -1) if training.micro_batch_rows % n == 0)
        changes.append((f"training.micro_batch_rows: {rows}", {"micro_batch_rows": rows}))
    if resolve_shard(training.shard, processes) > 1 and not must_reshard(recipe, config):
        changes.append(("training.reshard: true", {"reshard": True}))
    if training.shard is not None and training.shard < processes:
        changes.append(("training.shard: null", {"shard": None}))
    if not changes:
        return f"more GPUs or a smaller data.row_length or model (estimate for this recipe: {now / GIB:.1f} GiB a GPU)"
    options = []
    for text, values in changes:
        other = dataclasses.replace(recipe, training=dataclasses.replace(training, **values))
        options.append(f"{text} (estimate {estimate_memory(other, config, processes).total / GIB:.1f} GiB)")
    return f"{', or '.join(options)}, instead of {now / GIB:.1f} GiB a GPU"
