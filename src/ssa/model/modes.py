"""Switching a model's mode and budget at run time, and watching its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor

from ssa.documents import DocumentLayout

Observer = Callable[[int, Tensor, Tensor, Tensor, DocumentLayout], None]


class AttentionModes:
    """The part of :class:`SSAForCausalLM` that says how it runs."""

    config: Any
    model: Any

    @contextmanager
    def attention_mode(
        self,
        mode: str | None = None,
        *,
        num_blocks: int | None = None,
        block_size: int | None = None,
        budgets: list[int | list[int]] | None = None,
        max_dropped_mass: float | None = None,
        flavour: str | None = None,
    ) -> Iterator[Self]:
        """Run in another mode or at another budget inside a ``with``; the same as setting the config's keys.

        Args:
            mode: ``"full"`` or ``"sparse"``.
            num_blocks: blocks per query of the sparse mode, in every layer; block_size: tokens per block.
            budgets: blocks per query of each layer, see :class:`SSAConfig`.
            max_dropped_mass: an adaptive budget, see :class:`ssa.ops.SparseSpec`, of at most ``num_blocks`` blocks if
                that is given too, else without a cap; flavour: "estimated", "certified" or "per_block".

        Raises:
            ConfigError: unknown mode, impossible budget, full mode of an NSA model.
        """
        wanted = {
            "inference_mode": mode, "num_blocks": num_blocks, "block_size": block_size, "budgets": budgets,
            "max_dropped_mass": max_dropped_mass, "budget_flavour": flavour,
        }  # fmt: skip
        before = {key: getattr(self.config, key) for key in wanted}
        try:
            for key, value in wanted.items():
                if value is not None:
                    setattr(self.config, key, value)
            if budgets is None and (num_blocks is not None or max_dropped_mass is not None):
                self.config.budgets = None
            if max_dropped_mass is not None and num_blocks is None:
                self.config.num_blocks = self.config.all_blocks()
            self.config.check()
            yield self
        finally:
            for key, value in before.items():
                setattr(self.config, key, value)

    @contextmanager
    def observe_attention(self, observer: Observer) -> Iterator[None]:
        """Call ``observer(layer, q, k, v, layout)`` for every attention layer, with q and k after RoPE."""
        layers = [layer.self_attn for layer in self.model.layers]
        try:
            for attention in layers:
                attention.observer = observer
            yield
        finally:
            for attention in layers:
                attention.observer = None
