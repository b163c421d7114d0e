"""The ablation that draws the main stream for each layer."""

import torch

from ssa.model.modeling import SSAAttention

from .tiny import tiny_model, tokens


def streams(model, seed, monkeypatch):
    """The main stream of each layer in one training forward pass, and its loss."""
    seen = []
    own = SSAAttention._main
    with monkeypatch.context() as patch:
        patch.setattr(SSAAttention, "_main", lambda self, call: seen.append(own(self, call)) or seen[-1])
        ids = tokens(1, 24)
        with torch.no_grad():
            loss = model(ids, labels=ids, stream="full", sample_seed=seed).loss
    return tuple(seen), float(loss)


def test_layers_draw_their_own_stream(monkeypatch):
    model = tiny_model(stream_per_layer=True)
    found = {seed: streams(model, seed, monkeypatch) for seed in range(12)}
    assert {drawn for drawn, _ in found.values()} == {(a, b) for a in ("full", "sparse") for b in ("full", "sparse")}
    assert found == {seed: streams(model, seed, monkeypatch) for seed in range(12)}  # a pure function of the seed
    assert len({loss for _, loss in found.values()}) == 4


def test_off_by_default(monkeypatch):
    assert {streams(tiny_model(), seed, monkeypatch)[0] for seed in range(6)} == {("full", "full")}
