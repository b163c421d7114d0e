"""The parts of a layer before and after attention: compiled, recomputed, and the loss without logits."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from ssa import DocumentLayout
from ssa.errors import InputError
from ssa.model import SSAForCausalLM, regions
from ssa.train.build import compile_layers, recompute_activations

from .tiny import tiny_model, tokens

LAYOUTS = [DocumentLayout.from_lengths([[13, 1, 16], [5, 25]]), DocumentLayout.single(2, 30)]


def gradients(model: SSAForCausalLM, layout: DocumentLayout, stream: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ids = tokens(2, 30)
    model(ids, labels=ids, layout=layout, stream=stream).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Compiles regions without a C++ compiler, and counts the graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiler = cache(lambda region: torch.compile(region, backend=counter, dynamic=False, fullgraph=True))
    monkeypatch.setattr(regions, "_compiled", compiler)
    return counter


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("method", ["full", "ssa"])
def test_one_graph_before_and_one_after_attention_serve_all_layers_documents_and_streams(
    method: str, recomputes: bool, counter: CompileCounterWithBackend
) -> None:
    eager, model = (tiny_model(method=method, num_hidden_layers=10).train() for _ in range(2))
    for layer in model.model.layers:
        layer.compiled = True
    if recomputes:
        recompute_activations(model)
    for layout in LAYOUTS:
        for stream in ("full",) if method == "full" else ("full", "sparse"):
            found, expected = gradients(model, layout, stream), gradients(eager, layout, stream)
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.parametrize(("narrow", "products"), [(1 << 20, 2), (0, 4)])
def test_small_projections_are_one_product_of_a_compiled_step_without_gradients(
    narrow: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(regions, "NARROW", narrow)
    model = tiny_model().eval()
    attention = model.model.layers[0].self_attn
    modules, x = [attention.q_proj, attention.k_proj, attention.v_proj, attention.g_proj], torch.randn(2, 1, 32)
    seen = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.append(sum(node.target is F.linear or node.target is torch._C._nn.linear for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(lambda y: regions.project_all(modules, y), backend=backend, fullgraph=True)
    with torch.no_grad():
        for part, module in zip(compiled(x), modules, strict=True):
            torch.testing.assert_close(part, module(x))
    assert seen == [products]


def test_recomputation_leaves_attention_alone() -> None:
    model = tiny_model().train()
    recompute_activations(model)
    calls = {"attention": 0, "mlp": 0}
    for layer in model.model.layers:
        for name, module in (("attention", layer.self_attn), ("mlp", layer.mlp)):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    gradients(model, LAYOUTS[0], "sparse")
    assert calls == {"attention": 2, "mlp": 4}


def test_compiling_reaches_every_layer_and_the_loss() -> None:
    model = tiny_model()
    compile_layers(model)
    assert model.compiled
    assert all(layer.compiled for layer in model.model.layers)


# ---------------------------------------------------------------------- the loss without logits
def test_training_steps_hold_no_logits_and_everything_else_does() -> None:
    model, ids = tiny_model(), tokens(2, 30)
    evaluated = model(ids, labels=ids)
    assert evaluated.logits.shape == (2, 30, 97)
    assert model(ids, labels=ids, skip_logits=True).logits is None
    trained = model.train()(ids, labels=ids, num_items_in_batch=50)
    assert trained.logits is None
    assert model(ids).logits is not None
    assert model(ids, labels=ids, skip_logits=False).logits is not None
    torch.testing.assert_close(trained.cross_entropy, evaluated.cross_entropy)
    torch.testing.assert_close(trained.loss, evaluated.loss * 58 / 50)


def test_an_adapted_head_is_called_and_not_looked_through() -> None:
    class Adapted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model, ids = tiny_model().train(), tokens(2, 30)
    plain = model(ids, labels=ids).loss
    head = Adapted(32, 97, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    logits = model(ids, skip_logits=False).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)
    assert not torch.allclose(plain, expected, rtol=1e-2)


def test_labels_of_another_shape_are_refused_in_both_modes() -> None:
    for model in (tiny_model(), tiny_model().train()):
        with pytest.raises(InputError, match=r"labels: got shape \(2, 29\)"):
            model(tokens(2, 30), labels=tokens(2, 29))
