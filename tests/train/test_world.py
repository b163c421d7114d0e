"""Ranks, devices and precision."""

from __future__ import annotations

import pytest
import torch

from ssa.errors import ConfigError
from ssa.train.world import World, autocast, check_precision, read_world, resolve_device

TORCHRUN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_one_process_with_and_without_torchrun() -> None:
    assert read_world({}) == World(0, 1)
    assert read_world({"RANK": "0", "WORLD_SIZE": "1"}) == World(0, 1)


def test_many_processes_on_two_machines() -> None:
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **TORCHRUN}
    assert read_world(environ) == World(5, 8, 1)
    assert read_world({name: value for name, value in environ.items() if name != "LOCAL_RANK"}) == World(5, 8, 5)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE without RANK"),
        ({"RANK": "0"}, "RANK without WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "two integers"),
        ({"RANK": "2", "WORLD_SIZE": "2", **TORCHRUN}, "rank 2 of 2 processes"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "2 processes without MASTER_ADDR"),
    ],
)
def test_unusable_worlds_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_world(environ)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_what_is() -> None:
    assert resolve_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:3"):
        with pytest.raises(ConfigError, match="this machine's: cpu"):
            resolve_device(name)


def test_bf16_computes_in_bf16_and_fp32_in_fp32() -> None:
    cpu, x = torch.device("cpu"), torch.ones(2, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        check_precision(precision, cpu)
        with autocast(precision, cpu):
            assert (x @ x).dtype == dtype
