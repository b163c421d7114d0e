"""Training of stock models: the stream of a step, and the alignment carried through the output's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssa.errors import InputError
from ssa.ops import Alignment

STREAM, LAST = "_ssa_stream", "_ssa_alignment"  # attributes of an attention module, never saved
REFUSED_DTYPE = torch.float16


class StepStream(NamedTuple):
    """Main stream of a training step, the factor on its alignment, and the seed of the rows that it samples."""

    stream: str | None = None
    alignment_scale: float = 1.0
    sample_seed: int | None = None


class AddLoss(torch.autograd.Function):
    """Identity on ``x`` whose backward pass also gives ``loss`` the gradient 1.

    The loss then trains the model although nobody adds it to the model's own: no model code changes, and what
    recomputes, shards or averages gradients (checkpointing, FSDP, DDP) treats it like any other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.loss
        return gradients[0], torch.ones((), dtype=dtype, device=device)


def attach(module: nn.Module, out: Tensor, alignment: Alignment, scale: float, layers: int) -> Tensor:
    """``out`` with this layer's share of the alignment: mean over ``layers``, times ``scale``.

    Raises:
        InputError: float16, whose loss scaling would not reach the alignment.
    """
    if out.dtype == REFUSED_DTYPE:
        raise InputError("alignment", "float16 (its loss scaling does not reach the alignment)", "bfloat16 or float32")
    detached = Alignment(alignment.loss.detach(), *alignment[1:])
    setattr(module, LAST, detached)
    return AddLoss.apply(out, alignment.loss * (scale / layers))


def attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that call an attention function, in layer order."""
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal"):
            yield module


def set_stream(
    model: nn.Module, stream: str | None, alignment_scale: float = 1.0, sample_seed: int | None = None
) -> None:
    """Choose the main stream of the training steps from here on; the backward pass must come before the next change.

    The same as the keywords ``stream`` and ``alignment_scale`` of a forward call, for training loops that are not
    yours. All ranks must choose alike: draw from seed and step, see :func:`ssa.train.streams.draw_stream`.

    Args:
        model: a model with our attention, wrapped or not.
        stream: ``"full"``, ``"sparse"``, or None for no choice.
        alignment_scale: 1 / micro-batches of the step: gradients add up, and the alignment is a mean.
        sample_seed: where ``align_query_fraction`` is below 1, another one for every step:
            :func:`ssa.train.streams.draw_sample_seed`. Layers draw by themselves.

    Raises:
        InputError: another stream.
    """
    check_stream(stream)
    for module in attention_modules(model):
        setattr(module, STREAM, StepStream(stream, alignment_scale, sample_seed))


def check_stream(stream: object) -> None:
    """Raise :class:`InputError` unless ``stream`` is a stream or None."""
    if stream not in (None, "full", "sparse"):
        raise InputError("stream", repr(stream), "'full', 'sparse' or None")


def last_alignment(model: nn.Module) -> dict[str, Tensor]:
    """What the last training pass aligned: ``sparsity_loss``, ``commitment_loss``, ``attention_sparsity``, each
    ``[layers]``, detached, and ``alignment``, the weighted mean that is trained but not part of ``output.loss``.

    Raises:
        InputError: nothing was aligned yet.
    """
    found: list[Alignment] = [getattr(m, LAST) for m in attention_modules(model) if hasattr(m, LAST)]
    if not found:
        raise InputError("last_alignment", "a model that has aligned nothing", "a training pass with a stream before")
    names = ("alignment", "sparsity_loss", "commitment_loss", "attention_sparsity")
    values = {name: torch.stack([a[i] for a in found]) for i, name in enumerate(names)}
    return {**values, "alignment": values["alignment"].mean()}
