"""Trackers: the same numbers everywhere, offline; a missing package is a message with the line that installs it."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny

from ssa.errors import ConfigError, MissingDependencyError
from ssa.train.loop import train
from ssa.train.recipe_file import load_recipe
from ssa.train.trackers import open_trackers, scalars

STEP: dict[str, Any] = {"event": "step", "step": 3, "stream": "full", "loss": 2.5, "alignment": None, "skipped": 0}
VALIDATION: dict[str, Any] = {"event": "validation", "step": 3, "mode": "full", "cross_entropy": 2.0}
EXPECTED = {"train/loss": [(3, 2.5)], "valid/cross_entropy/full": [(3, 2.0)]}


def feed(name: Any, folder: Path) -> None:
    (sink,) = open_trackers([name], folder, "tin")
    for record in ({"event": "start", "name": "tin"}, STEP, VALIDATION, {"event": "skip", "step": 4}):
        sink.write(record)
    sink.close()


def test_scalars_are_the_numbers_of_steps_and_validations() -> None:
    assert scalars(STEP) == {"train/loss": 2.5}
    assert scalars(VALIDATION) == {"valid/cross_entropy/full": 2.0}
    assert scalars({"event": "start", "loss": 1.0}) == {}


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    feed("tensorboard", tmp_path)
    assert tensorboard_scalars(tmp_path / "tensorboard") == EXPECTED


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {key: [(e.step, e.value) for e in events.Scalars(key)] for key in events.Tags()["scalars"]}


def test_trackio_writes_its_local_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when trackio is imported
    pytest.importorskip("trackio")
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path)
    feed("trackio", tmp_path)
    rows = sqlite_storage.SQLiteStorage.get_logs("ssa", "tin")
    assert {key: [(row["step"], row[key]) for row in rows if key in row] for key in EXPECTED} == EXPECTED


def test_wandb_writes_offline_into_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    logged: list[Any] = []
    original = wandb.sdk.wandb_run.Run.log

    def log(run: Any, values: Any, step: int) -> None:
        assert run.settings._offline
        logged.append((step, values))
        original(run, values, step=step)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", log)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    feed("wandb", tmp_path)
    assert logged == [(3, {"train/loss": 2.5}), (3, {"valid/cross_entropy/full": 2.0})]
    assert [file.stat().st_size > 0 for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb")] == [True]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_says_how_to_install_it(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def fail(wanted: str, *rest: Any) -> Any:
        if name in wanted:
            raise ImportError(f"No module named {wanted!r}")
        return original(wanted, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(MissingDependencyError) as caught:
        open_trackers([name], tmp_path, "tin")
    assert str(caught.value).endswith(f"try pip install {name}")
    assert caught.value.exit_code == 2


def test_a_run_sends_its_metrics(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = tiny(data, output=str(tmp_path / "run"), training__steps=3, training__trackers=["tensorboard"])
    train(recipe)
    found = tensorboard_scalars(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in found["train/cross_entropy"]] == [1, 2, 3]
    assert all(math.isfinite(value) for _, value in found["train/loss"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["aim"], "training.trackers[0]: got 'aim' (str); expected one of tensorboard, wandb, trackio"),
        ("wandb", "training.trackers: got 'wandb' (str); expected a list; try [wandb]"),
        (["wandb", "wandb"], "expected each tracker once"),
        (None, "training.trackers: got null"),
    ],
)
def test_unknown_trackers_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("quickstart/ssa", {"training.trackers": value})
    assert message in str(caught.value)
