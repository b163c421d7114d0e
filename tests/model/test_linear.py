"""Products of few tokens on a CPU: the module's own result, and whatever is not a plain linear layer is called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssa.model.linear import MAX_ROWS, linear

from .tiny import tiny_model, tokens

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that ``nn.Linear`` itself multiplied."""
    called, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: called.append(self.weight.shape) or forward(self, x))
    return called


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 96), (3, 7, 96), (32, 96)], ids=str)
@torch.no_grad()
def test_equals_the_module(shape: tuple[int, ...], bias: bool, own: list[tuple[int, ...]]) -> None:
    module, x = nn.Linear(96, 40, bias=bias), torch.randn(*shape)
    mine = linear(module, x)
    assert not own
    torch.testing.assert_close(mine, module(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_last_token_of_longer_rows() -> None:
    module, x = nn.Linear(96, 40), torch.randn(4, 9, 96)[:, -1:]
    assert not x.is_contiguous()
    torch.testing.assert_close(linear(module, x), module(x), atol=1e-5, rtol=1e-5)


class Halved(nn.Linear):
    """As an adapter or a quantised layer: a linear layer, but not the plain one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


@torch.no_grad()
def test_what_is_called(own: list[tuple[int, ...]]) -> None:
    x, module = torch.randn(2, 1, 96), nn.Linear(96, 40)
    with torch.enable_grad():
        assert linear(module, x).requires_grad
    linear(module, torch.randn(1, MAX_ROWS + 1, 96))
    linear(nn.Linear(96, 40).bfloat16(), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(module, x).dtype == torch.bfloat16
    assert linear(module, torch.randn(0, 1, 96)).shape == (0, 1, 40)
    transposed = nn.Linear(40, 96, bias=False)
    transposed.weight = nn.Parameter(transposed.weight.T)
    linear(transposed, x)
    halved = Halved(96, 40)
    assert torch.equal(linear(halved, x), halved(x))
    assert len(own) == 8
    module.register_forward_hook(lambda module, given, out: out * 0)
    assert not linear(module, x).any()


@torch.no_grad()
def test_a_step_of_the_model_multiplies_here_and_hooks_still_run(own: list[tuple[int, ...]]) -> None:
    model, ids, hooked = tiny_model(), tokens(2, 30), []
    cache = model(ids, use_cache=True).cache  # 60 rows: by the modules
    per_layer = 4 + 1 + 3
    assert len(own) == 2 * per_layer + 1
    own.clear()
    model(ids[:, :1], past_key_values=cache)
    assert not own
    layer = model.model.layers[0]
    layer.self_attn.q_proj.register_forward_hook(lambda *x: hooked.append("q_proj"))
    layer.mlp.register_forward_hook(lambda *x: hooked.append("mlp"))
    model(ids[:, :1], past_key_values=cache)
    assert hooked == ["q_proj", "mlp"]
    assert len(own) == 1 + 3  # q_proj, and the three of the module that was called
