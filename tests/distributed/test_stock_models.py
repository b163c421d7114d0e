"""Stock models with our attention on two gloo processes: alignment under DDP and FSDP2, with recomputation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from many import ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ssa

sys.path.insert(0, str(Path(__file__).parents[1] / "model" / "interface"))
from stock import stock, tokens

pytestmark = pytest.mark.slow


def model(alignment_scale: float = 1.0) -> torch.nn.Module:
    made = stock(settings={"alignment_weight": 50.0}).train()
    made.gradient_checkpointing_enable({"use_reentrant": False})
    ssa.set_stream(made, "sparse", alignment_scale)
    return made


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_have_the_gradients_of_one(kind: str, tmp_path: Path) -> None:
    ids = tokens(4, 24)
    single = model(alignment_scale=0.5)
    for half in ids.split(2):
        (single(half, labels=half, use_cache=False).loss / 2).backward()
    expected = {name: p.grad for name, p in single.named_parameters()}

    # Freed in the child, the wrapper would wait for gloo's threads with the interpreter's lock, which they may want.
    kept = []

    def action(rank: int) -> int:
        dist.init_process_group("gloo")
        made, mine = model(), ids.split(2)[rank]
        if kind == "ddp":
            wrapped = DistributedDataParallel(made)
        else:
            mesh = init_device_mesh("cpu", (2,))
            for layer in made.model.layers:
                fully_shard(layer, mesh=mesh)
            wrapped = fully_shard(made, mesh=mesh)
        kept.append(wrapped)
        wrapped(mine, labels=mine, use_cache=False).loss.backward()
        for name, parameter in made.named_parameters():
            found = parameter.grad if kind == "ddp" else parameter.grad.full_tensor()
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)
        dist.destroy_process_group()
        return 0

    assert ranks(2, action, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
