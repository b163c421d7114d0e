"""Linear layers of a few tokens on a CPU in float32: oneDNN reads their weights faster than ``F.linear``."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

MAX_ROWS = 32  # more are bound by arithmetic, not by reading weights


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``; where that is the plain product of few rows ``[..., C]``, by the operation that compiled code
    calls too."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu" or not _serves(module, x):
        return cast("Tensor", module(x))
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, "none", [], ""))


def swiglu(mlp: LlamaMLP, x: Tensor) -> Tensor:
    """``mlp(x)``, its products by :func:`linear`."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(mlp) is not LlamaMLP or not _untouched(mlp):
        return cast("Tensor", mlp(x))
    return linear(mlp.down_proj, mlp.act_fn(linear(mlp.gate_proj, x)) * linear(mlp.up_proj, x))


def _untouched(module: nn.Module) -> bool:
    """Whether calling the module does what its class says: nobody hooked it or replaced its forward."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _serves(module: nn.Module, x: Tensor) -> bool:
    if type(module) is not nn.Linear or not _untouched(module) or not 0 < x.numel() <= MAX_ROWS * x.shape[-1]:
        return False
    usual = all(
        type(w.data) is Tensor and w.dtype == x.dtype and w.device == x.device and w.is_contiguous()
        for w in module.parameters()
    )
    autocast = torch.is_autocast_enabled("cpu")
    return usual and x.dtype == torch.float32 and not autocast and torch.backends.mkldnn.is_available()
