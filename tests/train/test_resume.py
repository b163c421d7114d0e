"""Kill it anywhere, resume it, and get the uninterrupted run to the bit; or hear why not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import KILLED, checkpoints, make_data, metrics, poison, results, run_forked, same_bits, tiny

from ssa.errors import CheckpointError, ConfigError, DataSourceError, DiskError, NumericError
from ssa.train import loop
from ssa.train.loop import train
from ssa.train.recipe_file import dump_recipe

# 22 training rows and 4 a step: epoch 2 begins inside step 6, epoch 3 inside step 12.


@pytest.fixture(scope="module")
def twin(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    run = tmp_path_factory.mktemp("twin") / "run"
    train(tiny(data), run)
    return run


def assert_equals_twin(run: Path, twin: Path) -> None:
    assert results(run) == results(twin)
    assert same_bits(run, twin, 12)


@pytest.mark.parametrize(
    ("faults", "resumed_from"),
    [
        (["step@5"], [4]),  # just after a checkpoint
        (["step@8"], [4]),  # in epoch 2, steps 5 to 7 are done again
        (["step@11", "step@12"], [8, 8]),  # twice
        (["save: written model.safetensors@8"], [4]),
        (["save: renamed@8"], [8]),
        (["retain: half deleted"], [12]),  # two checkpoints are kept: the first deletion follows the third save
    ],
    ids=lambda value: str(value),
)
def test_killed_runs_resume_to_the_bit(
    faults: list[str], resumed_from: list[int], data: Path, twin: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for i, fault in enumerate(faults):
        assert run_forked(lambda i=i: train(tiny(data), run, "latest" if i else None).exit_code, fault) == KILLED
    assert train(tiny(data), run, "latest").exit_code == 0
    assert_equals_twin(run, twin)
    assert [r["step"] for r in metrics(run) if r["event"] == "resume"] == resumed_from
    assert checkpoints(run) == ["step-00000008", "step-00000012"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_resumes_to_the_bit(
    number: signal.Signals, code: int, data: Path, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(loop, "fault_point", lambda name, step: os.kill(os.getpid(), number) if step == 7 else None)
    outcome = train(tiny(data), run)
    monkeypatch.undo()
    assert (outcome.step, outcome.exit_code) == (7, code)
    assert checkpoints(run) == ["step-00000004", "step-00000007"]
    assert not (run / "model").exists()
    assert metrics(run)[-1] == {"event": "end", "step": 7, "reason": number.name}
    train(tiny(data), run, "latest")
    assert_equals_twin(run, twin)


def test_a_finished_run_can_be_resumed_and_made_longer(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(data, training__steps=4), run)
    assert train(tiny(data, training__steps=4), run, "latest").step == 4
    outcome = train(tiny(data, training__steps=6, training__log_every=2, name="longer"), run, "latest")
    assert outcome.step == 6
    assert [r["step"] for r in results(run) if r["event"] == "step"] == [1, 2, 3, 4, 6]


def test_skips_in_a_row_are_remembered(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3, 4, 5}, "loss")
    train(tiny(data, training__steps=4), tmp_path / "run")
    state = loop.read_state(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert (state.step, state.tokens, state.skipped, state.skipped_in_row) == (4, 1024, 2, 2)
    with pytest.raises(NumericError, match="step 5"):
        train(tiny(data, training__steps=12), tmp_path / "run", "latest")


# ---------------------------------------------------------------------- damaged and chosen checkpoints
def damage(run: Path, step: int) -> Path:
    path = run / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    return path


def test_latest_falls_back_loudly_and_an_explicit_path_never_does(
    data: Path, twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny(data), run)
    path = damage(run, 12)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors") as caught:
        train(tiny(data), run, path.parent)
    assert caught.value.exit_code == 4
    capsys.readouterr()
    train(tiny(data), run, "latest")
    shown = capsys.readouterr().err
    assert str(path) in shown
    assert "step-00000012.damaged" in shown
    assert_equals_twin(run, twin)
    assert "step-00000012.damaged" in checkpoints(run)


def test_nothing_valid_to_resume_from_is_an_error_and_not_a_fresh_start(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(data, training__steps=4), run)
    damage(run, 4)
    (tmp_path / "empty").mkdir()
    for out, resume in ((run, "latest"), (tmp_path / "empty", "latest"), (tmp_path / "absent", "latest")):
        with pytest.raises(CheckpointError):
            train(tiny(data), out, resume)
    for resume in ("None", str(tmp_path / "nowhere"), str(run)):
        with pytest.raises(CheckpointError):
            train(tiny(data), tmp_path / "new", resume)
        assert not (tmp_path / "new").exists()
    assert not (tmp_path / "absent").exists()


def test_going_back_in_a_run_sets_the_newer_checkpoints_aside(data: Path, twin: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(data), run)
    train(tiny(data), run, run / "checkpoints" / "step-00000008")
    assert_equals_twin(run, twin)
    assert checkpoints(run) == ["step-00000008", "step-00000012", "step-00000012.superseded"]


def test_a_checkpoint_can_start_another_run(data: Path, twin: Path, tmp_path: Path) -> None:
    train(tiny(data), tmp_path / "branch", twin / "checkpoints" / "step-00000008")
    assert same_bits(tmp_path / "branch", twin, 12)
    events = [record["event"] for record in metrics(tmp_path / "branch")]
    assert events[:3] == ["start", "resume", "step"]
    with pytest.raises(ConfigError, match="another run's folder"):
        train(tiny(data), tmp_path / "branch", twin / "checkpoints" / "step-00000008")


# ---------------------------------------------------------------------- refusals
def test_another_recipe_is_refused_with_the_fields(data: Path, twin: Path) -> None:
    other = tiny(data, model__num_blocks=3, optimizer__learning_rate=1e-4, seed=4, training__log_every=7)
    with pytest.raises(CheckpointError) as caught:
        train(other, twin, "latest")
    for field in ("model.num_blocks = 3", "optimizer.learning_rate = 0.0001", "seed = 4", "model.num_blocks = 2"):
        assert field in str(caught.value)
    assert "log_every" not in str(caught.value)
    with pytest.raises(ConfigError, match="at least the 12"):
        train(tiny(data, training__steps=11), twin, "latest")


def test_other_data_is_refused(data: Path, twin: Path, tmp_path: Path) -> None:
    before = checkpoints(twin)
    with pytest.raises(DataSourceError, match=r"resuming from .*fingerprint") as caught:
        train(tiny(make_data(tmp_path / "other", seed=1)), twin, twin / "checkpoints" / before[0])
    assert checkpoints(twin) == before  # refused before anything was set aside
    assert caught.value.exit_code == 3


def test_a_used_folder_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        train(tiny(data), tmp_path / "run")


def test_two_processes_cannot_share_a_folder(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with loop.open_run(run, None):
        assert run_forked(lambda: _exit_code_of_training(data, run)) == 2
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            train(tiny(data), run)
    train(tiny(data, training__steps=1), run)  # the lock is gone with its holder


def _exit_code_of_training(data: Path, run: Path) -> int:
    try:
        return train(tiny(data), run).exit_code
    except ConfigError as error:
        return error.exit_code


def test_an_unwritable_folder_is_refused_before_the_first_step(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DiskError) as caught:
        train(tiny(data), tmp_path / "file" / "run")
    assert caught.value.exit_code == 8


# ---------------------------------------------------------------------- the command
def command(arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-c", "import sys; from ssa.cli import main; sys.exit(main())", "train"]
    return subprocess.Popen([*launcher, *arguments], cwd=cwd, env=environ, text=True, stderr=subprocess.PIPE)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if (run / "metrics.jsonl").exists() and any(r.get("step", 0) >= step for r in metrics(run)):
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    raise AssertionError("the run did not get there within a minute")


@pytest.mark.slow
def test_the_command_survives_a_kill_from_outside(data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(tiny(data, training__steps=60, training__checkpoint_every=10)))
    process = command([str(recipe), "--out", "killed"], tmp_path)
    wait_for_step(tmp_path / "killed", 25, process)
    process.kill()
    process.communicate()
    process = command([str(recipe), "--out", "killed", "--resume"], tmp_path)
    wait_for_step(tmp_path / "killed", 40, process)
    process.terminate()
    assert (process.communicate(), process.returncode)[1] == 143
    assert command([str(recipe), "--out", "killed", "--resume"], tmp_path).wait() == 0
    assert command([str(recipe), "--out", "whole"], tmp_path).wait() == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert same_bits(tmp_path / "killed", tmp_path / "whole", 60)
