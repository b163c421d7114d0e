"""Perplexity of one model in several modes on the same batches, and KL between the modes' predictions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ssa.documents import IGNORE_INDEX
from ssa.evaluate.running import Setting, running
from ssa.model import SSAForCausalLM


@dataclass
class Measured:
    """One setting: negative log-likelihood and KL(full || this) summed over ``tokens`` targets, in nats."""

    setting: Setting
    nll: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    kl: float | None = None

    def row(self) -> dict[str, Any]:
        """The ``runs`` entry of ``ssa.evaluation/1``: nll in nats per token."""
        nll = self.nll / max(self.tokens, 1)
        return {
            "mode": self.setting.mode,
            "block_size": self.setting.block_size,
            "num_blocks": self.setting.num_blocks,
            "receptive_field": self.setting.receptive_field,
            "nll": nll,
            "perplexity": math.exp(min(nll, 700.0)),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "kl_full_sparse": None if self.kl is None else self.kl / max(self.tokens, 1),
        }


def perplexity(
    model: SSAForCausalLM,
    batches: Callable[[], Iterable[Any]],
    settings: Sequence[Setting],
    on_batch: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Run every setting on every batch.

    Batch by batch, so that KL(full || sparse) of the next-token distributions needs one batch of logits at a time; it
    is measured where ``settings`` has a full run first.

    Args:
        model: the language model; its config is left as it was.
        batches: gives the batches (``ssa.data.loader.Batch``).
        settings: what to run; full first for KL.
        on_batch: called after each batch and setting, for progress.
    """
    results = [Measured(s) for s in settings]
    for batch in batches():
        ids, layout = batch.input_ids.to(model.device), batch.layout
        targets = layout.next_token_labels(batch.labels).to(model.device)
        counted = targets != IGNORE_INDEX
        reference: Tensor | None = None
        for result in results:
            s = result.setting
            started = time.perf_counter()
            with running(model, s):
                log_p = model(ids, layout=layout).logits[counted].float().log_softmax(-1)  # [targets, vocabulary]
            result.nll += float(F.nll_loss(log_p, targets[counted], reduction="sum"))
            result.seconds += time.perf_counter() - started
            result.tokens += int(counted.sum())
            if s.mode == "full":
                reference = log_p
            elif reference is not None:
                divergence = (reference.exp() * (reference - log_p)).sum(-1)
                result.kl = (result.kl or 0.0) + float(divergence.double().sum())
            on_batch()
    return results
