"""Weights, gradients and moments spread over GPUs: FSDP2, replication, and both at once (HSDP).

One mechanism serves all three. ``shard`` ranks share one copy of the weights; ``size / shard`` such copies exist.
``shard = size`` is FSDP2, ``shard = 1`` is plain data parallelism, anything between is HSDP.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ssa.errors import ConfigError
from ssa.model import SSAForCausalLM
from ssa.train.ranks import Ranks


def resolve_shard(shard: int | None, size: int) -> int:
    """Ranks that share one copy of the weights; None means all.

    Raises:
        ConfigError: a number that does not divide the processes.
    """
    count = size if shard is None else shard
    if size % count:
        divisors = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ConfigError("training.shard", count, f"a divisor of the {size} processes: {divisors}")
    return count


def shard_model(
    model: SSAForCausalLM, ranks: Ranks, shard: int, precision: str, reshard: bool, device: torch.device
) -> None:
    """Spread the parameters in place. Every rank must hold the same weights already; nothing is broadcast.

    Layers travel in bfloat16 where the forward pass computes in it. Embedding, head and last norm stay in float32,
    so that the residual stream starts as it does on one GPU. Gradients are summed in float32, not averaged: the
    loss is already divided by the numbers of the whole step.
    """
    mesh = _mesh(ranks, shard, device)
    low = torch.bfloat16 if precision == "bf16" else None
    layers = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    root = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=layers, reshard_after_forward=reshard and shard > 1)
    fully_shard(model, mesh=mesh, mp_policy=root, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _mesh(ranks: Ranks, shard: int, device: torch.device) -> DeviceMesh:
    size = ranks.world.size
    if shard == size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    grid = torch.arange(size).view(-1, shard)
    groups = [_own_group(lines.tolist(), ranks.world.rank, ranks.timeout) for lines in (grid.T, grid)]
    return DeviceMesh.from_group(groups, device.type, mesh=grid, mesh_dim_names=("replicate", "shard"))


def _own_group(lines: list[list[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """Make every group (all ranks must take part in each) with the run's timeout; return this rank's."""
    groups = [dist.new_group(line, timeout=timeout) for line in lines]
    return next(group for line, group in zip(lines, groups, strict=True) if rank in line)


def sync_gradients(model: nn.Module, needed: bool) -> None:
    """Whether the next backward pass sums its gradients over the ranks; only a step's last one has to."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(needed)


def reshard(model: nn.Module) -> None:
    """Give up whole weights that a forward pass without a backward pass left behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; a tensor that is not spread is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor. Every rank must call it, since the parts travel."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, the same whole tensor on every rank, laid out as ``like``. Nothing travels."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
