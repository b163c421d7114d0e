"""A model and its AdamW as named tensors, the form in which checkpoints hold them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssa.errors import CheckpointError
from ssa.train.sharding import spread_like, whole

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; tied parameters once, under their first name."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    known = {parameter for _, parameter in model.named_parameters(remove_duplicate=False)}
    buffers = dict(model.named_buffers())
    persistent = model.state_dict(keep_vars=True)
    return tensors | {name: b for name, b in buffers.items() if name in persistent and b not in known}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts as ``NAME_OF_MOMENT.NAME_OF_PARAMETER``; empty before the first step."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{moment}.{names[parameter]}": state[moment]
        for parameter, state in optimizer.state.items()
        for moment in MOMENTS
    }


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole tensors. All ranks must call it with the same names; ``keep`` says which of them want the result.

    Sharded tensors are gathered one by one and kept on the CPU, so that no GPU holds more than one of them whole.
    """
    kept = {}
    for name, value in tensors.items():
        full = whole(value)
        if keep:
            kept[name] = full if full is value else full.cpu()
    return kept


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy ``tensors`` into the model in place.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors (the first five are named).
    """
    own = model_tensors(model)
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    wrong += [
        f"{name} {tuple(value.shape)} {value.dtype}, model {tuple(own[name].shape)} {own[name].dtype}"
        for name, value in tensors.items()
        if name in own and (value.shape, value.dtype) != (own[name].shape, own[name].dtype)
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(where, "; ".join(wrong[:5]) + more, "the tensors of this model")
    for name, value in own.items():
        value.copy_(tensors[name])


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Give the optimiser the moments and step counts of ``tensors``.

    Raises:
        CheckpointError: a moment of an unknown parameter, a parameter with some moments only, a wrong shape.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        moment, _, name = full_name.partition(".")
        expected = () if moment == "step" else tuple(parameters[name].shape) if name in parameters else None
        if name not in parameters or moment not in MOMENTS or tuple(value.shape) != expected:
            raise CheckpointError(where, f"{full_name} {tuple(value.shape)}", "moments of this model's parameters")
        like = parameters[name]
        states.setdefault(name, {})[moment] = value.to(like.device) if moment == "step" else spread_like(value, like)
    for name, state in states.items():
        if len(state) != len(MOMENTS):
            raise CheckpointError(where, f"{', '.join(state)} of {name}", f"all of {', '.join(MOMENTS)}")
        optimizer.state[parameters[name]] = dict(state)
