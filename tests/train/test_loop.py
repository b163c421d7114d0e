"""A whole run: what it writes, what it learns, what it refuses, and how it treats non-finite numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import checkpoints, metrics, poison, results, same_bits, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from ssa.cli.train import run
from ssa.errors import CheckpointError, ConfigError, NumericError, OutOfMemoryError
from ssa.model import SSAForCausalLM
from ssa.train import loop
from ssa.train.build import build_model
from ssa.train.loop import train
from ssa.train.optimizer import StepGuard, apply_gradients, build_optimizer, gradient_norm
from ssa.train.recipe_file import load_recipe
from ssa.train.streams import draw_stream

STEP_KEYS = {
    *("event", "step", "tokens", "stream", "learning_rate", "loss", "cross_entropy", "alignment", "sparsity_loss"),
    *("commitment_loss", "alignment_per_layer", "attention_sparsity", "attention_sparsity_per_layer", "gradient_norm"),
    *("dropped_mass", "skipped", "tokens_per_second", "mfu", "attention_share", "peak_memory_gib", "seconds"),
}


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps."""
    run = tmp_path_factory.mktemp("finished") / "run"
    outcome = train(tiny(data), run)
    assert (outcome.step, outcome.reason, outcome.exit_code, outcome.folder) == (12, "finished", 0, run)
    return run


def test_metrics_follow_the_schema(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    start, end = records[0], records[-1]
    alpha = load_recipe(str(finished / "recipe.yaml")).model.alignment_weight
    assert (start["schema"], start["event"], start["name"], start["method"]) == (
        "ssa.metrics/1",
        "start",
        "tiny",
        "ssa",
    )
    assert start["parameters"] == sum(
        p.numel() for p in SSAForCausalLM.from_pretrained(finished / "model").parameters()
    )
    assert (end["event"], end["reason"], end["step"]) == ("end", "finished", 12)
    steps = [record for record in records if record["event"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 13))
    for record in steps:
        assert set(record) == STEP_KEYS
        assert record["stream"] == draw_stream(3, record["step"], 0.5)
        assert record["tokens"] == record["step"] * 4 * 64
        assert record["alignment"] == pytest.approx(record["sparsity_loss"] + record["commitment_loss"])
        assert record["loss"] == pytest.approx(record["cross_entropy"] + alpha * record["alignment"], rel=1e-5)
        assert len(record["alignment_per_layer"]) == len(record["attention_sparsity_per_layer"]) == 2
        assert 0 < record["attention_sparsity"] <= 1
        assert record["dropped_mass"] == pytest.approx(1 - record["attention_sparsity"])
        assert record["mfu"] is record["attention_share"] is record["peak_memory_gib"] is None  # on a CPU
    validations = [(r["step"], r["mode"]) for r in records if r["event"] == "validation"]
    assert validations == [(step, mode) for step in (5, 10, 12) for mode in ("full", "sparse")]


def test_the_run_leaves_a_model_that_transformers_loads_and_a_recipe_that_repeats_it(
    finished: Path, data: Path
) -> None:
    model = SSAForCausalLM.from_pretrained(finished / "model")
    last = SSAForCausalLM.from_pretrained(finished / "checkpoints" / "step-00000012")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), last.parameters(), strict=True))
    assert model.config.inference_mode == "sparse"
    assert not [path for path in finished.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert {item.name for item in (data / "tokenizer").iterdir()} <= {
        item.name for item in (finished / "model").iterdir()
    }
    assert load_recipe(finished / "recipe.yaml") == tiny(data)
    assert checkpoints(finished) == ["step-00000008", "step-00000012"]


def test_the_same_recipe_gives_the_same_bits(finished: Path, data: Path, tmp_path: Path) -> None:
    train(tiny(data), tmp_path / "twin")
    assert results(tmp_path / "twin") == results(finished)
    assert same_bits(finished, tmp_path / "twin", 12)


@pytest.mark.parametrize("method", ["full", "moba", "nsa", "ssa"])
def test_every_method_learns_and_runs_its_streams(method: str, data: Path, tmp_path: Path) -> None:
    recipe = tiny(data, method, training__steps=30, training__micro_batch_rows=4, training__validate_every=0)
    train(recipe, tmp_path / "run")
    steps = [record for record in metrics(tmp_path / "run") if record["event"] == "step"]
    assert steps[-1]["cross_entropy"] < steps[0]["cross_entropy"] - 0.5
    streams = {"full": {"full"}, "moba": {"sparse"}, "nsa": {"sparse"}, "ssa": {"full", "sparse"}}
    assert {record["stream"] for record in steps} == streams[method]
    assert all((record["alignment"] is None) == (method != "ssa") for record in steps)


def test_micro_batches_and_recomputation_change_the_run_by_rounding_only(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    recipe = tiny(data, training__micro_batch_rows=1, training__activation_checkpointing=True, training__steps=6)
    reference = tiny(data, training__steps=6)
    train(recipe, tmp_path / "split")
    train(reference, tmp_path / "whole")
    for one, other in zip(results(tmp_path / "split"), results(tmp_path / "whole"), strict=True):
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=1e-4)


def test_bf16_keeps_weights_in_fp32(data: Path, tmp_path: Path) -> None:
    train(tiny(data, training__precision="bf16", training__steps=3), tmp_path / "run")
    model = SSAForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(math.isfinite(record["loss"]) for record in results(tmp_path / "run") if "loss" in record)


def test_steps_that_are_not_logged_are_not_written(data: Path, tmp_path: Path) -> None:
    train(tiny(data, training__log_every=5, training__validate_every=0), tmp_path / "run")
    assert [record["step"] for record in results(tmp_path / "run")] == [1, 5, 10, 12]


class _Waits(TorchDispatchMode):
    """Counts how often the host asks for a value, which on a GPU waits for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_an_update_never_waits_for_the_device(data: Path) -> None:
    recipe, model = tiny(data), torch.nn.Linear(4, 4)
    optimizer, guard = build_optimizer(model, recipe.optimizer), StepGuard(torch.device("cpu"))
    with _Waits() as waits:
        for step in range(1, 6):
            loss = model(torch.ones(2, 4)).square().mean()
            loss.backward()
            apply_gradients(optimizer, guard, recipe, step, loss.detach(), gradient_norm(optimizer))
        assert waits.count == 0
        float(loss.detach())
        assert waits.count == 1  # the counter counts


# ---------------------------------------------------------------------- non-finite numbers
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_one_bad_step_is_one_skip(what: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3, 5, 6}, what)
    assert train(tiny(data), tmp_path / "run").reason == "finished"
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in records if r["event"] == "skip"] == [3, 5, 6]
    assert [r["skipped"] for r in records if r["event"] == "step"] == [0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert (state["skipped"], state["skipped_in_row"]) == (3, 0)


@pytest.mark.parametrize("log_every", [1, 100])
def test_three_bad_steps_in_a_row_stop_and_save_nothing_bad(
    log_every: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {6, 7, 8}, "loss")
    with pytest.raises(NumericError, match="step 8") as caught:
        train(tiny(data, training__log_every=log_every, training__validate_every=0), tmp_path / "run")
    assert caught.value.exit_code == 5
    assert checkpoints(tmp_path / "run") == ["step-00000004"]
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in records if r["event"] == "skip"] == [6, 7, 8]
    assert (records[-1]["event"], records[-1]["reason"]) == ("end", "NumericError")


def test_exhausted_memory_gives_advice(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And so on.")

    monkeypatch.setattr(loop, "accumulate_gradients", exhausted)
    with pytest.raises(OutOfMemoryError, match=r"step 1: .*micro_batch_rows") as caught:
        train(tiny(data), tmp_path / "run")
    assert caught.value.exit_code == 6


# ---------------------------------------------------------------------- weights of an earlier run
def test_a_run_can_start_from_the_weights_of_another(finished: Path, data: Path, tmp_path: Path) -> None:
    changes = {"model__weights": str(finished), "model__rope_factor": 2, "model__rope_original_length": 64}
    recipe = tiny(data, **changes, training__steps=1, training__validate_every=0, optimizer__warmup_steps=0)
    model = build_model(recipe.model_config(259), 99, recipe.model.weights)
    before = SSAForCausalLM.from_pretrained(finished / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert model.config.rope_parameters["factor"] == 2
    train(recipe, tmp_path / "run")
    first = results(tmp_path / "run")[0]["cross_entropy"]
    assert first < results(finished)[0]["cross_entropy"] - 1
    # A resumed run needs them no more.
    longer = tiny(data, **(changes | {"model__weights": "gone"}), training__steps=1, optimizer__warmup_steps=0)
    assert train(longer, tmp_path / "run", "latest").step == 1


def test_weights_of_another_shape_are_refused(finished: Path, data: Path, tmp_path: Path) -> None:
    for changes, error in (
        ({"model__hidden_size": 16, "model__weights": str(finished)}, CheckpointError),
        ({"model__weights": str(tmp_path / "nowhere")}, ConfigError),
    ):
        with pytest.raises(error):
            train(tiny(data, **changes), tmp_path / "run")


# ---------------------------------------------------------------------- data that does not fit the recipe
@pytest.mark.parametrize(
    ("change", "key"),
    [({"data__row_length": 128}, "data.row_length"), ({"model__vocab_size": 258}, "model.vocab_size")],
)
def test_data_must_fit_the_recipe(change: dict[str, int], key: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=key):
        train(tiny(data, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- the dry run
def test_a_dry_run_tells_the_size_and_writes_nothing(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])["parameters"]
    arguments = [str(finished / "recipe.yaml"), "--dry-run", "--out", str(tmp_path / "run")]
    assert run([*arguments, "--training.steps", "100"]) == 0
    shown = capsys.readouterr().out
    for line in (f"parameters       {parameters:,}", "steps            100 (1 of them", "tokens           25,600"):
        assert line in shown
    assert run([*arguments, "--data.path", str(tmp_path / "absent")]) == 0
    shown = capsys.readouterr().out
    assert "unknown until the data is prepared" in shown
    assert "not there yet" in shown
    assert not list(tmp_path.iterdir())
