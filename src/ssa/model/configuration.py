"""Configuration of the one model class. FullAttn, MoBA, NSA and SSA are values of it (paper sections 4 and 5)."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

from transformers import LlamaConfig

from ssa.errors import ConfigError, InputError
from ssa.ops import AlignmentSpec, SparseSpec
from ssa.ops.dual.alignment import AlignOn, Directions, Distance
from ssa.ops.spec import Flavour, SelectionRule

Method = Literal["full", "moba", "nsa", "ssa"]
Mode = Literal["full", "sparse"]
FORMAT = 1

METHODS: dict[str, tuple[float, float]] = {
    # probability that a training step's main stream is full attention, alignment weight alpha
    "full": (1.0, 0.0),
    "moba": (0.0, 0.0),
    "nsa": (0.0, 0.0),
    "ssa": (0.5, 10.0),
}


class SSAConfig(LlamaConfig):
    """A Llama configuration with a gate on attention, a sparse stream and a training method. Flat keys.

    Attributes beside Llama's:
        method: ``"full"``, ``"moba"`` and ``"ssa"`` differ only in training; ``"nsa"`` has three branches and no
            full mode. Sets ``full_probability`` and ``alignment_weight`` where those are None.
        gated: multiply each head's attention output by ``sigmoid(W_g x)`` (all methods of the paper do).
        qkv_bias: biases on the projections to q, k, v (as in Qwen2); ``attention_bias`` has one on the output too.
        qk_norm: RMSNorm over each head of q and k before RoPE (as in Qwen3).
        ssa_format: version of this configuration's format.
        block_size, num_blocks, first_blocks, local_blocks, selection_rule: see :class:`ssa.ops.SparseSpec`.
        budgets: blocks per query of each layer in the place of ``num_blocks``: an integer, or one for each KV head.
        window_size: tokens of NSA's sliding window.
        full_probability: chance that a training step's main stream is full attention (p_FA).
        stream_per_layer: draw the main stream for each layer instead of each step: an ablation, which needs
            ``sample_seed`` in training.
        alignment_weight, alignment_distance, align_on, alignment_directions: see :class:`ssa.ops.AlignmentSpec`.
        align_query_fraction: its ``query_fraction``.
        inference_mode: ``"full"`` or ``"sparse"``; may be changed at any time, as may ``num_blocks``.
        max_dropped_mass, budget_flavour, budget_safety: an adaptive budget, see :class:`ssa.ops.SparseSpec`; then
            ``num_blocks`` is the most that a query takes.
    """

    model_type = "ssa"

    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    method: str = "ssa"
    gated: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    block_size: int = 16
    num_blocks: int = 16
    budgets: list[int | list[int]] | None = None
    first_blocks: int = 0
    local_blocks: int = 1
    selection_rule: str = "exact"
    window_size: int = 128
    full_probability: float | None = None
    stream_per_layer: bool = False
    alignment_weight: float | None = None
    alignment_distance: str = "smooth_l1"
    align_on: str = "gated"
    alignment_directions: str = "both"
    align_query_fraction: float = 1.0
    inference_mode: str = "sparse"
    max_dropped_mass: float | None = None
    budget_flavour: str = "estimated"
    budget_safety: float = 1.0
    ssa_format: int = FORMAT

    def __post_init__(self, **kwargs: Any) -> None:
        if self.method not in METHODS:
            raise ConfigError("SSAConfig.method", repr(self.method), f"one of {get_args(Method)}")
        probability, weight = METHODS[self.method]
        if self.full_probability is None:
            self.full_probability = probability
        if self.alignment_weight is None:
            self.alignment_weight = weight
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": float(kwargs.pop("rope_theta", 500000.0))}
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise :class:`ConfigError` if values do not fit together. Called at construction and at each mode change."""
        if self.ssa_format not in range(1, FORMAT + 1):
            raise ConfigError("SSAConfig.ssa_format", repr(self.ssa_format), f"a format up to {FORMAT}", "a newer ssa")
        if not 0.0 <= float(self.full_probability or 0.0) <= 1.0:
            raise ConfigError("SSAConfig.full_probability", self.full_probability, "a number in [0, 1]")
        if self.num_attention_heads % (self.num_key_value_heads or self.num_attention_heads):
            raise ConfigError(
                "SSAConfig",
                f"{self.num_attention_heads} query heads and {self.num_key_value_heads} KV heads",
                "query heads divisible by KV heads",
            )
        if self.inference_mode not in get_args(Mode):
            raise ConfigError("SSAConfig.inference_mode", repr(self.inference_mode), f"one of {get_args(Mode)}")
        if self.method == "nsa" and (self.inference_mode == "full" or self.full_probability or self.alignment_weight):
            raise ConfigError("SSAConfig", "full attention or alignment with method 'nsa'", "its three sparse branches")
        if self.method == "nsa" and not self.gated:
            raise ConfigError("SSAConfig.gated", "False with method 'nsa'", "True: its three branches are gated")
        self._check_budgets()
        try:
            for layer in (None, *range(self.num_hidden_layers if self.budgets else 0)):
                self.sparse_spec(layer)
            self.alignment_spec()
        except InputError as error:
            raise ConfigError(error.where, error.got, error.expected, error.hint) from None

    def _check_budgets(self) -> None:
        if self.budgets is None:
            return
        if self.max_dropped_mass is not None:
            raise ConfigError("SSAConfig", "budgets and max_dropped_mass", "one of them")
        heads = self.num_key_value_heads or self.num_attention_heads
        if len(self.budgets) != self.num_hidden_layers:
            raise ConfigError(
                "SSAConfig.budgets", f"{len(self.budgets)} entries", f"one for each of {self.num_hidden_layers} layers"
            )
        for i, entry in enumerate(self.budgets):
            counts = entry if isinstance(entry, list | tuple) else [entry]
            least = self.first_blocks + self.local_blocks
            good = all(isinstance(n, int) and not isinstance(n, bool) and n >= least for n in counts)
            if not good or len(counts) not in (1, heads):
                raise ConfigError(
                    f"SSAConfig.budgets[{i}]", repr(entry), f"an integer of at least {least}, or {heads} (KV heads)"
                )

    def all_blocks(self) -> int:
        """A budget that covers every context of this model."""
        return -(-self.max_position_embeddings // self.block_size)

    def head_budgets(self, layer: int) -> tuple[int, ...]:
        """Blocks per query of each KV head of a layer; empty where all heads have the same."""
        entry = self.budgets[layer] if self.budgets else 0
        return tuple(entry) if isinstance(entry, list | tuple) and len(set(entry)) > 1 else ()

    def sparse_spec(self, layer: int | None = None) -> SparseSpec:
        """The selection that the sparse stream uses now, of one layer if ``budgets`` tell layers apart.

        Where its heads differ, ``num_blocks`` is their largest (see :meth:`head_budgets`).
        """
        blocks = self.num_blocks
        if layer is not None and self.budgets:
            entry = self.budgets[layer]
            blocks = max(entry) if isinstance(entry, list | tuple) else entry
        rule = cast("SelectionRule", self.selection_rule)
        adaptive = self.max_dropped_mass, cast("Flavour", self.budget_flavour), self.budget_safety
        return SparseSpec(self.block_size, blocks, self.first_blocks, self.local_blocks, rule, *adaptive)

    def alignment_spec(self) -> AlignmentSpec:
        """How training aligns the streams."""
        return AlignmentSpec(
            float(self.alignment_weight or 0.0),
            cast("Distance", self.alignment_distance),
            cast("AlignOn", self.align_on),
            cast("Directions", self.alignment_directions),
            float(self.align_query_fraction),
        )
