"""Perplexity of whole documents: a sliding window (the PG-19 protocol), and per word as lm-eval defines it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import ConfigError
from ssa.evaluate.documents import grouped
from ssa.evaluate.running import Scaling, Setting, running, stretched
from ssa.model import SSAForCausalLM

TOKENS_PER_BATCH = 1 << 17


class Window(NamedTuple):
    """A stretch of a document, ``tokens[start:end]``, of which the last ``scored`` tokens count."""

    document: int
    start: int
    end: int
    scored: int


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood in nats, summed over ``tokens`` predicted tokens."""

    nll: float
    tokens: int

    def row(self) -> dict[str, Any]:
        """For a result file: nll per token, and perplexity."""
        nll = self.nll / max(self.tokens, 1)
        return {"nll": nll, "perplexity": math.exp(min(nll, 700.0)), "tokens": self.tokens}


def sliding_windows(lengths: Sequence[int], length: int, stride: int) -> list[Window]:
    """Windows of ``length`` tokens that move on by ``stride``: every token but a document's first counts once.

    A document's first window counts whole; each later one only its last ``stride`` tokens, which so have at least
    ``length - stride`` tokens of context (PG-19's protocol with stride 256).
    """
    if not 1 <= stride < length:
        raise ConfigError("stride", stride, f"at least 1 and below the window's length {length}")
    found = []
    for document, total in enumerate(lengths):
        done = 1  # nothing predicts the first token
        end = min(length, total)
        while done < total:
            found.append(Window(document, max(0, end - length), end, end - done))
            done, end = end, min(end + stride, total)
    return found


def disjoint_windows(lengths: Sequence[int], length: int) -> list[Window]:
    """lm-eval's rolling windows: the model reads ``length`` tokens and each of them predicts the next one.

    A window is therefore one token longer than what the model reads; its first token is the context of the others.
    """
    if length < 1:
        raise ConfigError("length", length, "at least 1 token")
    found = []
    for document, total in enumerate(lengths):
        for first in range(1, total, length):
            end = min(first + length, total)
            # as in lm-eval, a shorter last window is filled with earlier tokens as context
            found.append(Window(document, max(0, end - length - 1), end, end - first))
    return found


def score_windows(model: SSAForCausalLM, documents: Sequence[Tensor], given: Sequence[Window]) -> Likelihood:
    """Negative log-likelihood of the scored tokens of all windows, as the model runs now; equal shapes are batched."""
    shapes: dict[tuple[int, int], list[Window]] = {}
    for window in given:
        shapes.setdefault((window.end - window.start, window.scored), []).append(window)
    nll, tokens = 0.0, 0
    for (length, scored), same in shapes.items():
        for part in grouped(same, length, TOKENS_PER_BATCH):
            ids = torch.stack([documents[w.document][w.start : w.end] for w in part]).to(model.device)
            layout = DocumentLayout.single(len(part), length - 1)
            logits = model(ids[:, :-1], layout=layout, logits_to_keep=scored).logits.float()
            nll += float(F.cross_entropy(logits.flatten(0, 1), ids[:, -scored:].flatten(), reduction="sum").double())
            tokens += len(part) * scored
    return Likelihood(nll, tokens)


def sliding_perplexity(
    model: SSAForCausalLM,
    documents: Sequence[Tensor],
    setting: Setting,
    length: int,
    *,
    stride: int = 256,
    scaling: Scaling = "none",
) -> dict[str, Any]:
    """Sliding-window perplexity at one context length, beyond the trained one with RoPE ``scaling``.

    Args:
        documents: int64 ``[tokens]`` each.
        length: window in tokens; stride: tokens that each further window scores.

    Returns:
        A ``suite.sliding`` entry of ``ssa.evaluation/1``.
    """
    given = sliding_windows([len(d) for d in documents], length, stride)
    with stretched(model, length, scaling) as applied, running(model, setting):
        measured = score_windows(model, documents, given)
    return {**setting.facts(), "length": length, "stride": stride, "scaling": applied, **measured.row()}


def word_perplexity(
    model: SSAForCausalLM, documents: Sequence[Tensor], words: int, setting: Setting, length: int
) -> dict[str, Any]:
    """Word perplexity as lm-eval defines it: exp(total nll of rolling windows / number of words).

    Args:
        documents: with their beginning-of-text token first, which stands for lm-eval's prefix token.
        words: white-space separated words in the text of ``documents``.
        length: longest window.

    Returns:
        A ``suite.words`` entry of ``ssa.evaluation/1``.
    """
    with running(model, setting):
        measured = score_windows(model, documents, disjoint_windows([len(d) for d in documents], length))
    value = math.exp(min(measured.nll / max(words, 1), 700.0))
    return {**setting.facts(), "length": length, "words": words, "word_perplexity": value, **measured.row()}
