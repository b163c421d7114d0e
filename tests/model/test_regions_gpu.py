"""Compiled layers on a GPU: as eager ones, and compiled once for all layers, documents and streams."""

from __future__ import annotations

import pytest
import torch

from ssa import DocumentLayout
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.train.build import compile_layers, recompute_activations

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPE = {
    "vocab_size": 500, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64, "num_blocks": 4,
}  # fmt: skip


@pytest.mark.parametrize("recomputes", [False, True])
def test_compiled_bf16_gradients_are_as_near_to_float32_as_eager_ones(recomputes: bool) -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        eager = SSAForCausalLM(SSAConfig(**SHAPE)).train()
        compiled = SSAForCausalLM(SSAConfig(**SHAPE)).train()
    compiled.load_state_dict(eager.state_dict())
    compile_layers(compiled)
    if recomputes:
        recompute_activations(compiled)
    ids = torch.randint(500, (2, 256), device="cuda")

    def gradient(model: SSAForCausalLM, layout: DocumentLayout, low: bool) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            loss = model(ids, labels=ids, layout=layout, stream="full").loss
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    for layout in (DocumentLayout.single(2, 256), DocumentLayout.from_lengths([[100, 156], [256]])):
        exact = gradient(eager, layout, low=False)
        rounded, ours = gradient(eager, layout, low=True), gradient(compiled, layout, low=True)
        assert (ours - exact).norm() <= 1.5 * (rounded - exact).norm()
