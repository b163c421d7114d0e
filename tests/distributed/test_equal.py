"""One run on 1, 2 and 4 processes, however the weights are spread: the same numbers, the same checkpoints."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from many import train_on
from safetensors.torch import load_file
from tiny_runs import checkpoints, metrics, results, same_bits

from ssa.model import SSAForCausalLM

pytestmark = pytest.mark.slow
STEPS = 20
RECIPE: dict[str, Any] = {"training__steps": STEPS, "training__validate_every": 10, "training__checkpoint_every": 10}


def numbers(run: Path, key: str = "loss") -> list[float]:
    found = [record[key] for record in results(run) if record["event"] == "step"]
    assert len(found) == STEPS
    return found


@pytest.fixture(scope="module", params=["full", "ssa"])
def single(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The run of one process, four micro-batches a step."""
    run = tmp_path_factory.mktemp("single") / "run"
    assert train_on(1, data, run, request.param, **RECIPE) == [0]
    return request.param, run


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),  # two micro-batches on each rank: gradients travel after the second
        (2, {"training__shard": 1}),
        (4, {}),
        (4, {"training__shard": 2}),
        (2, {"training__reshard": True}),
        (2, {"training__activation_checkpointing": True}),
    ],
    ids=["fsdp-2", "replicated-2", "fsdp-4", "hsdp-2x2", "fsdp-2-resharded", "fsdp-2-recomputed"],
)
def test_the_number_of_processes_does_not_matter(
    size: int, changes: dict[str, Any], single: tuple[str, Path], data: Path, tmp_path: Path
) -> None:
    method, alone = single
    run = tmp_path / "run"
    assert train_on(size, data, run, method, **RECIPE, **changes) == [0] * size
    for key in ("loss", "cross_entropy", "gradient_norm", *(["alignment"] if method == "ssa" else [])):
        assert numbers(run, key) == pytest.approx(numbers(alone, key), rel=1e-6 if "loss" in key else 1e-5), key
    for ours, theirs in zip(results(run), results(alone), strict=True):
        for key in ("event", "step", "tokens", "stream", "mode"):
            assert ours.get(key) == theirs.get(key)
        assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-6)
    assert checkpoints(run) == checkpoints(alone)
    ours, theirs = (SSAForCausalLM.from_pretrained(folder / "model").state_dict() for folder in (run, alone))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-4)
    if method == "ssa":
        assert {record["stream"] for record in results(run) if record["event"] == "step"} == {"full", "sparse"}
    assert metrics(run)[0]["processes"] == size


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_a_run_goes_on_at_another_number_of_processes(before: int, after: int, data: Path, tmp_path: Path) -> None:
    """As if nothing had changed: the same rows in the same order, the same streams, the same numbers."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train_on(before, data, whole, **RECIPE) == [0] * before
    start = str(whole / "checkpoints" / "step-00000010")
    assert train_on(after, data, again, resume=start, **RECIPE) == [0] * after
    steps = [record["loss"] for record in results(again) if record["event"] == "step"]
    assert steps == pytest.approx(numbers(whole)[10:], rel=1e-6)
    state = json.loads((again / "checkpoints" / "step-00000020" / "state.json").read_text())
    assert state == json.loads((whole / "checkpoints" / "step-00000020" / "state.json").read_text()) | {
        key: state[key] for key in ("seconds", "recipe", "losses")
    }


def test_the_same_number_of_processes_resumes_to_the_bit(data: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    recipe = RECIPE | {"training__steps": 8, "training__checkpoint_every": 4, "training__validate_every": 4}
    assert train_on(2, data, whole, **recipe) == [0, 0]
    start = whole / "checkpoints" / "step-00000004"
    assert train_on(2, data, run, resume=str(start), **recipe) == [0, 0]
    assert same_bits(run, whole, 8)


def test_an_untouched_checkpoint_comes_back_from_four_ranks_to_the_bit(data: Path, tmp_path: Path) -> None:
    """Saving what was just loaded, on another number of processes, writes the same tensors."""
    one, four = tmp_path / "one", tmp_path / "four"
    recipe = RECIPE | {"training__steps": 3, "training__checkpoint_every": 3, "training__validate_every": 0}
    assert train_on(1, data, one, **recipe) == [0]
    assert train_on(4, data, four, resume=str(one / "checkpoints" / "step-00000003"), **recipe) == [0] * 4
    before, after = (load_file(run / "model" / "model.safetensors") for run in (one, four))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_compiled_layers_train_alike_when_their_weights_are_spread(data: Path, tmp_path: Path) -> None:
    """The compiler's own backend is left out: what is proven is that its graphs take sharded, recomputed layers."""
    recipe = RECIPE | {"training__steps": 4, "training__checkpoint_every": 4, "training__validate_every": 0}
    recipe |= {"model__num_hidden_layers": 10}  # more than the compiler compiles anew before it gives up

    def without_code_generation(rank: int) -> None:
        torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]

    losses = []
    for size, changes in ((1, {}), (2, {"training__compile": True, "training__activation_checkpointing": True})):
        run = tmp_path / f"run-{size}"
        codes = train_on(size, data, run, prepare=without_code_generation, **recipe, **changes)
        assert codes == [0] * size, run.with_name(f"{run.name}.log").read_text()
        losses.append([record["loss"] for record in results(run) if record["event"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
