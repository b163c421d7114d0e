"""Sliding-window and word perplexity against brute force over single tokens."""

import math

import pytest
import torch

from ssa import DocumentLayout
from ssa.errors import ConfigError
from ssa.evaluate import Setting, sliding_perplexity, word_perplexity
from ssa.evaluate.rolling import disjoint_windows, sliding_windows

from .test_statistics import model  # noqa: F401  (a fixture)

DOCUMENTS = [torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(n)) for n in (23, 9, 16)]
SPARSE = Setting("sparse", 4, 2)


def log_p(model, context, token):  # noqa: F811
    with torch.no_grad(), model.attention_mode("sparse", num_blocks=2):
        logits = model(context[None], layout=DocumentLayout.single(1, len(context))).logits[0, -1]
    return float(logits.log_softmax(-1)[token])


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_sliding_window_equals_brute_force(model, stride):  # noqa: F811
    length, total, count = 8, 0.0, 0
    for document in DOCUMENTS:
        for t in range(1, len(document)):
            # the window in which t is scored: the first that holds it
            end = length if t < length else length + stride * math.ceil((t + 1 - length) / stride)
            end = min(end, len(document))
            total -= log_p(model, document[max(0, end - length) : t], document[t])
            count += 1
    row = sliding_perplexity(model, DOCUMENTS, SPARSE, length, stride=stride)
    assert row["tokens"] == count == 22 + 8 + 15
    assert row["nll"] == pytest.approx(total / count, rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
    assert (row["mode"], row["receptive_field"], row["scaling"]) == ("sparse", 8, "none")


def test_word_perplexity_equals_lm_eval_by_hand(model):  # noqa: F811
    length, total = 8, 0.0
    for document in DOCUMENTS:
        for first in range(1, len(document), length):  # rolling windows of `length` predictions
            end = min(first + length, len(document))
            begin = max(0, end - length - 1)
            total -= sum(log_p(model, document[begin:t], document[t]) for t in range(first, end))
    row = word_perplexity(model, DOCUMENTS, 30, SPARSE, length)
    assert row["word_perplexity"] == pytest.approx(math.exp(total / 30), rel=1e-4)


@pytest.mark.parametrize("lengths", [[1], [2], [8], [9], [40, 3]])
def test_every_token_but_the_first_is_scored_once(lengths):
    for windows in (sliding_windows(lengths, 8, 3), disjoint_windows(lengths, 8)):
        seen = [(w.document, t) for w in windows for t in range(w.end - w.scored, w.end)]
        assert sorted(seen) == [(d, t) for d, n in enumerate(lengths) for t in range(1, n)]


@pytest.mark.parametrize("stride", [0, 8])
def test_a_stride_that_skips_tokens_is_refused(stride):
    with pytest.raises(ConfigError, match="stride"):
        sliding_windows([20], 8, stride)
