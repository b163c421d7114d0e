"""Run by test_few.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import torch
from torch import Tensor

from ssa.ops.few import Product, Projections, few_linear, few_project
from ssa.ops.few.reference import few_linear as linear_reference
from ssa.ops.few.reference import few_project as project_reference


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.3


def linear(B: int, N: int, C: int, O: int, H: int) -> None:
    x, weight = normal(B, N, C), normal(O, C)
    products = (
        Product(),
        Product(norm=1 + normal(C), eps=1e-5, up=normal(O, C)),
        Product(gate=torch.rand(B, N, H), add=normal(B, N, O)),
        Product(norm=1 + normal(C), eps=1e-5),
    )
    for product in products:
        mine, wanted = few_linear(x, weight, product), linear_reference(x, weight, product)
        torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=2e-5)


def project(B: int, N: int, C: int, H: int, K: int, D: int, gated: bool) -> None:
    layer = Projections(
        1 + normal(C), 1e-5, normal(H * D, C), normal(K * D, C), normal(K * D, C), normal(H, C) if gated else None
    )
    angle = normal(B, N, D // 2) * 9
    rope = tuple(torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
    lengths = torch.arange(B, dtype=torch.int32) * 2 + N
    caches = [tuple(torch.full((B, 9 + 2 * B, K, D), float("nan")) for _ in "kv") for _ in "ab"]
    x = normal(B, N, C)
    mine = few_project(x, layer, rope, caches[0], lengths)
    wanted = project_reference(x, layer, rope, caches[1], lengths)
    for a, b in zip((*mine, *caches[0]), (*wanted, *caches[1]), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5, equal_nan=True)


def layers() -> None:
    """A model's cached steps, by fused layers, equal its uncached pass, by modules; hooked modules are called."""
    import ssa.model.few as fused
    from ssa.model import SSAConfig, SSAForCausalLM
    from ssa.model.cache import BlockCache

    config = SSAConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=64, num_blocks=2,
    )  # fmt: skip
    model = SSAForCausalLM(config).eval()
    ids, calls = torch.randint(64, (2, 40)), []
    linear = fused.few_linear
    fused.few_linear = lambda *x: calls.append(0) or linear(*x)
    with torch.no_grad(), model.attention_mode("sparse"):
        expected = model(ids).logits
        for capacity in (None, 48):
            cache = BlockCache.from_config(config, capacity)
            model(ids[:, :29], past_key_values=cache)
            for begin, end in ((29, 32), (32, 33), (33, 34), (34, 40)):
                got = model(ids[:, begin:end], past_key_values=cache).logits
                torch.testing.assert_close(got, expected[:, begin:end], atol=1e-4, rtol=1e-4)
        assert len(calls) == 2 * 4 * (2 * 3 + 1)  # the last: logits
        calls.clear()
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *x: None)
        cache.crop(-1)
        model(ids[:, -1:], past_key_values=cache)
        assert len(calls) == 3 + 1


if __name__ == "__main__":
    torch.manual_seed(0)
    linear(3, 1, 256, 40, 4)
    linear(5, 4, 128, 16, 2)
    project(3, 1, 256, 4, 2, 32, True)
    project(2, 3, 128, 3, 1, 64, False)
    layers()
