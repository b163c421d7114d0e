"""The recipe of a training run: typed, documented field by field, checked before anything is built.

One section per concern. A value is named ``section.key`` in YAML files, in flags and in errors.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from ssa.errors import ConfigError
from ssa.model.configuration import METHODS, Method, Mode, SSAConfig
from ssa.ops.dual.alignment import AlignOn, Directions, Distance
from ssa.ops.spec import SelectionRule
from ssa.train.trackers import Tracker

Precision = Literal["fp32", "bf16"]
Schedule = Literal["cosine", "constant"]
Trainable = Literal["all", "attention", "lora"]

#: Which wavelengths Llama 3's RoPE scaling stretches, as shares of the original length.
LLAMA3_FREQUENCIES = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

# A name becomes a folder and a label in reports.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """What to read.

    Attributes:
        path: folder that `ssa prepare` wrote.
        row_length: tokens per packed row, the training context; the folder must hold rows of this length.
    """

    path: str
    row_length: int


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model; names and meanings as in :class:`ssa.model.SSAConfig`.

    Attributes:
        method: what is trained: full attention, MoBA, NSA or SSA.
        vocab_size: rows of the embedding; None: the vocabulary of the data's tokenizer.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the SwiGLU.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads; divides the query heads.
        head_dim: width of one head.
        max_position_embeddings: longest document in tokens; None: data.row_length.
        rms_norm_eps: epsilon of the norms.
        initializer_range: standard deviation of the initial weights.
        rope_theta: base of the rotary embedding.
        rope_factor: stretch positions by this factor with Llama 3's scaling, to train on longer documents; None: none.
        rope_original_length: with rope_factor, the longest document that the model was trained on before.
        weights: model folder, or run folder, whose weights training starts from; None: random ones.
        trainable: what of it trains: all weights, those of attention (q, k, v, o, gate), or LoRA matrices beside them.
        lora_rank: rank of LoRA's matrices.
        lora_alpha: LoRA's scale times its rank.
        qkv_bias: biases on the projections to q, k and v (as in Qwen2).
        qk_norm: norm over each head of q and k (as in Qwen3).
        tie_word_embeddings: share input and output embeddings.
        gated: multiply each head's output by a learnt sigmoid gate.
        block_size: tokens per block, a power of two.
        num_blocks: blocks that a query reads in the sparse stream, its own included.
        selection_rule: exact top-k, or the published code's streaming merge.
        first_blocks: blocks at the start of a document that are always read.
        local_blocks: most recent blocks that are always read.
        window_size: tokens of NSA's sliding window.
        full_probability: chance in [0, 1] that a step's main stream is full attention; None: the method's.
        stream_per_layer: draw the main stream for each layer instead of each step (an ablation).
        alignment_weight: alpha, factor on the alignment loss; None: the method's.
        alignment_distance: distance between the two streams' outputs.
        align_on: compare outputs after (gated) or before (raw) the gate.
        alignment_directions: both, or one direction alone (an ablation).
        align_query_fraction: share 1/n of the query rows whose alignment a sparse step computes, drawn anew in every
            step and layer; an unbiased estimate at that share of the full stream's cost. 1: exact.
        inference_mode: mode written to the final model; None: full for method full, sparse otherwise.
    """

    method: Method
    vocab_size: int | None = None
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int | None = None
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_theta: float = 500000.0
    rope_factor: float | None = None
    rope_original_length: int | None = None
    weights: str | None = None
    trainable: Trainable = "all"
    lora_rank: int = 16
    lora_alpha: int = 32
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = True
    gated: bool = True
    block_size: int = 16
    num_blocks: int = 16
    selection_rule: SelectionRule = "exact"
    first_blocks: int = 0
    local_blocks: int = 1
    window_size: int = 128
    full_probability: float | None = None
    stream_per_layer: bool = False
    alignment_weight: float | None = None
    alignment_distance: Distance = "smooth_l1"
    align_on: AlignOn = "gated"
    alignment_directions: Directions = "both"
    align_query_fraction: float = 1.0
    inference_mode: Mode | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """AdamW and its schedule.

    Attributes:
        learning_rate: peak learning rate.
        betas: decay of AdamW's two moments.
        epsilon: AdamW's epsilon.
        weight_decay: decoupled decay, on matrices only (norms are exempt).
        gradient_clip: largest global gradient norm.
        warmup_fraction: share of the steps with linearly rising rate.
        warmup_steps: the same as a number of steps; None: from warmup_fraction.
        schedule: what follows the warm-up.
        final_fraction: cosine falls to this share of the peak.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    warmup_fraction: float = 0.01
    warmup_steps: int | None = None
    schedule: Schedule = "cosine"
    final_fraction: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """How long, how large a step, and what is written on the way.

    Attributes:
        steps: optimiser steps; give this or tokens.
        tokens: tokens to train on, rounded up to whole steps; give this or steps.
        rows_per_step: rows in one optimiser step over all processes (the global batch).
        micro_batch_rows: rows in one forward pass of a process; divides its share of rows_per_step. Changes memory,
            not the result.
        precision: bf16 runs autocast with weights and optimiser in fp32.
        activation_checkpointing: recompute activations in the backward pass, all but attention's; less memory, more
            time. None: where the estimate says that a GPU of this run has too little memory.
        compile: torch.compile everything but attention, which follows each batch's documents; None: on a GPU.
        device: auto, cpu, cuda or cuda:N (one process only).
        shard: processes that share one copy of weights, gradients and moments; divides their number. None: all of
            them (FSDP2); 1: each has its own copy (data parallel); between: HSDP. Changes memory, not the result.
        reshard: give up gathered layers after the forward pass and gather them again in the backward pass; less memory,
            more communication. None: where all layers together would take more than 4 GiB.
        spike_factor: tell of a loss above this many times the median of the last 64 steps; None: never.
        timeout_seconds: a process that keeps the others waiting longer ends the run.
        log_every: steps between metrics.
        validate_every: steps between validations; 0: never.
        validate_rows: rows of the valid split in one validation.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: newest checkpoints to keep.
        trackers: send metrics also to these: tensorboard, wandb (offline unless WANDB_MODE is set), trackio.
    """

    steps: int | None = None
    tokens: int | None = None
    rows_per_step: int
    micro_batch_rows: int
    precision: Precision = "bf16"
    activation_checkpointing: bool | None = None
    compile: bool | None = None
    device: str = "auto"
    shard: int | None = None
    reshard: bool | None = None
    spike_factor: float | None = 2.0
    timeout_seconds: float = 50.0
    log_every: int = 10
    validate_every: int = 500
    validate_rows: int = 32
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    trackers: tuple[Tracker, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run. Construction raises :class:`ConfigError` naming ``section.key`` if a value is out of range.

    Attributes:
        name: name of the run in metrics and reports.
        seed: seed of initial weights, data order and stream schedule.
        output: folder of the run; None: runs/NAME.
    """

    name: str
    seed: int = 0
    output: Annotated[str | None, tyro.conf.arg(aliases=["--out"])] = None
    data: DataSection
    model: ModelSection
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    training: TrainingSection

    def __post_init__(self) -> None:
        _check_name_and_seed(self)
        _check_model(self.model)
        _check_training(self.training)
        _require_positive("data", self.data, ("row_length",))
        _check_optimizer(self.optimizer, self.steps)
        self.model_config()

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimiser step, padding included."""
        return self.training.rows_per_step * self.data.row_length

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        if self.training.steps is not None:
            return self.training.steps
        return math.ceil((self.training.tokens or 0) / self.tokens_per_step)

    @property
    def warmup_steps(self) -> int:
        """Steps with rising learning rate."""
        if self.optimizer.warmup_steps is not None:
            return self.optimizer.warmup_steps
        return round(self.optimizer.warmup_fraction * self.steps)

    def model_config(self, vocab_size: int | None = None) -> SSAConfig:
        """The model's configuration. ``vocab_size``: the data's, used where the recipe gives none.

        Raises:
            ConfigError: values of ``model`` that do not fit together.
        """
        values: dict[str, Any] = dataclasses.asdict(self.model)
        values["vocab_size"] = self.model.vocab_size or vocab_size or 1
        values["max_position_embeddings"] = self.model.max_position_embeddings or self.data.row_length
        for key in ("weights", "trainable", "lora_rank", "lora_alpha"):
            del values[key]
        theta, factor = values.pop("rope_theta"), values.pop("rope_factor")
        original = values.pop("rope_original_length")
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        if factor is not None:
            scaling = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original}
            values["rope_parameters"] |= scaling | LLAMA3_FREQUENCIES
        values["inference_mode"] = self.model.inference_mode or ("full" if self.model.method == "full" else "sparse")
        try:
            return SSAConfig(**values)
        except ConfigError as error:
            key = error.where.rpartition(".")[2] if "." in error.where else ""
            where = f"model.{key}" if key else "model"
            raise ConfigError(where, error.got, error.expected, error.hint) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values (lists, no tuples), as YAML and JSON hold them."""
        values = dataclasses.asdict(self)
        for section, key in (("optimizer", "betas"), ("training", "trackers")):
            values[section][key] = list(values[section][key])
        return values


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` to ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# ---------------------------------------------------------------------- checks
def _require(ok: bool, key: str, got: object, expected: object, hint: str | None = None) -> None:
    if not ok:
        raise ConfigError(key, got, expected, hint)


def _require_positive(section: str, values: object, keys: tuple[str, ...]) -> None:
    for key in keys:
        value = getattr(values, key)
        _require(value is None or value >= 1, f"{section}.{key}", value, "an integer of at least 1")


def _check_name_and_seed(recipe: Recipe) -> None:
    allowed = "1 to 100 letters, digits, '.', '_' or '-', the first a letter or digit"
    _require(bool(_NAME.fullmatch(recipe.name)), "name", repr(recipe.name), allowed)
    _require(0 <= recipe.seed < 2**63, "seed", recipe.seed, "an integer in [0, 2^63)")
    _require(recipe.output is None or "\0" not in recipe.output, "output", repr(recipe.output), "a path without NUL")
    _require(bool(recipe.data.path) and "\0" not in recipe.data.path, "data.path", repr(recipe.data.path), "a path")


def _check_model(model: ModelSection) -> None:
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    lengths = (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rope_original_length",
        "window_size",
        "lora_rank",
    )
    _require_positive("model", model, (*shape, *lengths))
    _require(model.head_dim % 2 == 0, "model.head_dim", model.head_dim, "an even number (rotary pairs)")
    for key in ("rms_norm_eps", "initializer_range", "rope_theta"):
        value = getattr(model, key)
        _require(0 < value < math.inf, f"model.{key}", value, "a finite number above 0")
    factor, original = model.rope_factor, model.rope_original_length
    _require(factor is None or 1 <= factor < math.inf, "model.rope_factor", factor, "a finite number of at least 1")
    given = (factor is not None, original is not None)
    _require(
        given[0] == given[1], "model.rope_original_length", original, "a length if rope_factor is given, else null"
    )
    _require(
        model.weights is None or (bool(model.weights) and "\0" not in model.weights),
        "model.weights",
        repr(model.weights),
        "a path",
    )
    p, weight = model.full_probability, model.alignment_weight
    _require(p is None or 0 <= p <= 1, "model.full_probability", p, "a number in [0, 1]")
    _require(weight is None or 0 <= weight < math.inf, "model.alignment_weight", weight, "a finite number, at least 0")
    if model.method != "ssa":
        # The other methods are these two values; anything else would be another method under their name.
        fixed_p, fixed_weight = METHODS[model.method]
        for key, got, fixed in (("full_probability", p, fixed_p), ("alignment_weight", weight, fixed_weight)):
            _require(got in (None, fixed), f"model.{key}", got, f"{fixed} with method {model.method!r}", "method: ssa")


def _check_training(training: TrainingSection) -> None:
    once = len(set(training.trackers)) == len(training.trackers)
    _require(once, "training.trackers", list(training.trackers), "each tracker once")
    counts = ("steps", "tokens", "rows_per_step", "micro_batch_rows", "log_every", "validate_rows")
    _require_positive("training", training, (*counts, "checkpoint_every", "keep_checkpoints", "shard"))
    seconds = training.timeout_seconds
    _require(1 <= seconds < 86400, "training.timeout_seconds", seconds, "between 1 and 86400 seconds")
    _require(training.validate_every >= 0, "training.validate_every", training.validate_every, "at least 0 (0: never)")
    factor = training.spike_factor
    _require(factor is None or 1 < factor < math.inf, "training.spike_factor", factor, "a finite number above 1")
    given = [f"{key} {value}" for key in ("steps", "tokens") if (value := getattr(training, key)) is not None]
    hint = "setting the other to null (as a flag: --training.steps None)" if given else None
    _require(len(given) == 1, "training", " and ".join(given) or "neither", "one of steps and tokens", hint)
    rows, micro = training.rows_per_step, training.micro_batch_rows
    if rows % micro:
        factors = [n for n in range(1, rows + 1) if rows % n == 0]
        expected = f"a divisor of training.rows_per_step = {rows}: {', '.join(map(str, factors))}"
        raise ConfigError("training.micro_batch_rows", micro, expected)
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", training.device)
    _require(bool(known), "training.device", repr(training.device), "auto, cpu, cuda or cuda:N")


def _check_optimizer(optimizer: OptimizerSection, steps: int) -> None:
    for key in ("learning_rate", "epsilon", "gradient_clip"):
        value = getattr(optimizer, key)
        _require(0 < value < math.inf, f"optimizer.{key}", value, "a finite number above 0")
    _require(
        0 <= optimizer.weight_decay < math.inf,
        "optimizer.weight_decay",
        optimizer.weight_decay,
        "a finite number of at least 0",
    )
    _require(all(0 <= b < 1 for b in optimizer.betas), "optimizer.betas", optimizer.betas, "two numbers in [0, 1)")
    for key in ("warmup_fraction", "final_fraction"):
        value = getattr(optimizer, key)
        _require(0 <= value <= 1, f"optimizer.{key}", value, "a number in [0, 1]")
    warmup = optimizer.warmup_steps
    expected = f"between 0 and the run's {steps} steps"
    _require(warmup is None or 0 <= warmup <= steps, "optimizer.warmup_steps", warmup, expected)
