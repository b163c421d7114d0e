"""A decoder layer for a few new tokens against a cache, on a GPU in six launches or seven: see :mod:`ssa.ops.few`.

A step would otherwise be dozens of small kernels, and products that leave much of the memory's speed unused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ssa.model.cached import attend
from ssa.ops.few import HEAD_DIMS, Product, Projections, few_linear, few_project, is_few, serves

if TYPE_CHECKING:
    from ssa.model.modeling import AttentionCall, SSADecoderLayer


ENABLED = True  # for measurements


def fused_layer(layer: SSADecoderLayer, x: Tensor, rope: tuple[Tensor, Tensor], call: AttentionCall) -> Tensor | None:
    """The layer's output ``[B, N, C]`` for new tokens ``x [B, N, C]``, or None where the layer has to do it: without a
    past, for many tokens, and where its modules are not the plain ones (adapters, quantisation, hooks)."""
    attention, mlp, cache = layer.self_attn, layer.mlp, call.cache
    if (
        not ENABLED
        or cache is None
        or call.layout is not None
        or not is_few(x)
        or attention.branches != 1
        or attention.config.qk_norm
    ):
        return None
    modules: list[Any] = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    modules += [mlp.gate_proj, mlp.up_proj, mlp.down_proj, *([attention.g_proj] if attention.config.gated else [])]
    norms: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
    usual = all(_plain(m) and type(m) is nn.Linear and m.bias is None for m in modules) and all(map(_plain, norms))
    if not usual or attention.config.hidden_act != "silu" or attention.head_dim not in HEAD_DIMS:
        return None
    if not serves(x, (m.weight for m in (*modules, *norms))):
        return None
    before, after = norms
    index, config = attention.layer_index, attention.config
    weights = Projections(
        before.weight,
        before.variance_epsilon,
        attention.q_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
        attention.g_proj.weight if config.gated else None,
    )
    held = cache.held[index]
    lengths = held.positions.lengths
    assert lengths is not None
    q, gate = few_project(x, weights, rope, held.room(), lengths)
    out = attend(q, cache, index, call.main, config.sparse_spec(index), config.head_budgets(index))
    x = few_linear(out.flatten(2), attention.o_proj.weight, Product(gate=gate, add=x))
    wide = few_linear(
        x, mlp.gate_proj.weight, Product(norm=after.weight, eps=after.variance_epsilon, up=mlp.up_proj.weight)
    )
    return few_linear(wide, mlp.down_proj.weight, Product(add=x))


def few_logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """``head(hidden)``, for few tokens on a CPU by :func:`few_linear` (on a GPU the vendor's product is as fast)."""
    usual = hidden.device.type == "cpu" and type(head) is nn.Linear and head.bias is None and _plain(head)
    weight = cast("Tensor", head.weight) if usual else hidden
    if usual and ENABLED and hidden.dim() == 3 and is_few(hidden) and serves(hidden, [weight]):
        return few_linear(hidden, weight)
    return cast("Tensor", head(hidden))


def _plain(module: nn.Module) -> bool:
    """Whether calling the module does what its class says: nobody hooked it or replaced its forward."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
