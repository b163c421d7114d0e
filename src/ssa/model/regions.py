"""The parts of a decoder layer before and after attention.

Attention is all that depends on the documents of a batch. What stands before and after it has one graph for every batch
of a shape: it can be compiled, and recomputed in the backward pass while attention's results are kept.

Shapes: B batch, T tokens, H query heads, K key-value heads, D head dim, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ssa.model.linear import linear, swiglu

if TYPE_CHECKING:
    from ssa.model.modeling import SSADecoderLayer

Region = Callable[..., Any]
NARROW = 1 << 20  # elements of weights that are copied for one product sooner than read by several


def before_attention(
    layer: SSADecoderLayer, x: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Norm, projections, RoPE, gate: ``x [B, T, C]`` -> q ``[B, T, H, D]``, k and v ``[B, T, K, D]``, gate."""
    return layer.self_attn.project(layer.input_layernorm(x), cos, sin)


def after_attention(layer: SSADecoderLayer, x: Tensor, out: Tensor, gate: Tensor | None) -> Tensor:
    """Gate (where ``out [B, T, H, D]`` still lacks it), output projection, SwiGLU, both residuals: ``[B, T, C]``."""
    if gate is not None:
        out = out * gate[..., None].to(out.dtype)
    x = x + linear(layer.self_attn.o_proj, out.flatten(2))
    return x + swiglu(layer.mlp, layer.post_attention_layernorm(x))


def project_all(modules: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """``module(x)`` of each. Compiled, one product: keys, values and gates are too narrow for a GPU. Without gradients,
    where a step may be as short as reading the weights, it is all but the first module's, and only if they are small.

    Only of plain linear layers; adapted or quantised ones are called.
    """
    plain = all(type(module) is nn.Linear and module.bias is None for module in modules)
    if not (plain and torch.compiler.is_compiling()):
        return [linear(module, x) for module in modules]
    weights, apart = [cast("Tensor", module.weight) for module in modules], 0
    if not torch.is_grad_enabled():
        apart = 1 if sum(weight.numel() for weight in weights[1:]) <= NARROW else len(weights)
    found = [linear(module, x) for module in modules[:apart]]
    if together := weights[apart:]:
        found += F.linear(x, torch.cat(together)).split([len(weight) for weight in together], -1)
    return found


@cache
def _compiled(region: Region) -> Region:
    """One compiled function for the layers of all models: weights are inputs of its graph, shapes are constants."""
    return torch.compile(region, dynamic=False, fullgraph=True)


class LayerOfRegions(GradientCheckpointingLayer):
    """A layer that runs its regions as it was told.

    Attributes:
        compiled: through ``torch.compile``.
        recomputes: keeping no activations inside them.
    """

    compiled = False
    recomputes = False

    def run(self, region: Region, *tensors: Tensor | None) -> Any:
        """Call ``region(self, *tensors)``."""
        function = _compiled(region) if self.compiled else region
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(function, self, *tensors, use_reentrant=False, preserve_rng_state=False)
        return function(self, *tensors)
