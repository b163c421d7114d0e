"""What happens to all ranks when one of them differs, fails, dies or is told to stop (two gloo processes)."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from many import train_on
from tiny_runs import KILLED, checkpoints, metrics, results, same_bits, tiny

from ssa.errors import DataSourceError
from ssa.train import checkpoint, lifeline, loop
from ssa.train.faults import VARIABLE
from ssa.train.recipe_file import dump_recipe

pytestmark = pytest.mark.slow
RECIPE: dict[str, Any] = {"training__validate_every": 0, "training__steps": 8}


def log_of(run: Path) -> str:
    return run.with_name(f"{run.name}.log").read_text()


def steps_of(run: Path) -> list[int]:
    return [record["step"] for record in metrics(run) if record["event"] == "step"]


def spoil(rank: int, step: int, change: Callable[..., Any]) -> Callable[[int], None]:
    """On one rank, pass the result of one step's forward and backward passes through ``change(model, sums)``."""

    def prepare(me: int) -> None:
        original, count = loop.accumulate_gradients, 0

        def spoilt(model: Any, *arguments: Any) -> Any:
            nonlocal count
            count += 1
            sums = original(model, *arguments)
            return change(model, sums) if (me, count) == (rank, step) else sums

        loop.accumulate_gradients = spoilt  # type: ignore[assignment]  # the process ends with the test

    return prepare


def nan_loss(model: Any, sums: Any) -> Any:
    sums.loss = sums.loss * math.nan
    return sums


def infinite_gradient(model: Any, sums: Any) -> Any:
    next(p.grad for p in model.parameters() if p.grad is not None).to_local()[0] = math.inf
    return sums


# ---------------------------------------------------------------------- cases 12 and 13: non-finite on one rank
@pytest.mark.parametrize("change", [nan_loss, infinite_gradient])
def test_one_bad_rank_is_one_skip_on_all(change: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = RECIPE | {"training__checkpoint_every": 1, "training__keep_checkpoints": 9}
    assert train_on(2, data, run, prepare=spoil(1, 5, change), **recipe) == [0, 0]
    assert [record["step"] for record in metrics(run) if record["event"] == "skip"] == [5]
    tensors = [
        {name: checkpoint.read_tensors(run / "checkpoints" / f"step-{step:08d}", name) for name in FILES}
        for step in (4, 5, 6)
    ]
    for name in FILES:
        before, skipped, after = (step[name] for step in tensors)
        assert all(before[key].equal(skipped[key]) for key in before)
        assert not all(before[key].equal(after[key]) for key in before)


FILES = ("model.safetensors", "optimizer.safetensors")


def test_three_bad_steps_stop_every_rank(data: Path, tmp_path: Path) -> None:
    def prepare(me: int) -> None:
        original = loop.accumulate_gradients

        def spoilt(*arguments: Any) -> Any:
            sums = original(*arguments)
            return nan_loss(None, sums) if me == 1 else sums

        loop.accumulate_gradients = spoilt  # type: ignore[assignment]

    assert train_on(2, data, tmp_path / "run", prepare=prepare, **RECIPE) == [5, 5]
    assert "for the 3rd time in a row" in log_of(tmp_path / "run")


# ---------------------------------------------------------------------- cases 18 to 20: ranks that differ
def opposite_stream(me: int) -> None:
    if me == 1:
        original = loop.draw_stream
        swap = {"full": "sparse", "sparse": "full"}
        loop.draw_stream = lambda *a: swap[original(*a)] if a[1] == 3 else original(*a)  # type: ignore[assignment]


def other_position(me: int) -> None:
    if me == 1:
        original = loop.Trainer._agree
        loop.Trainer._agree = (  # type: ignore[method-assign]
            lambda self, step, stream, position, *rest: original(self, step, stream, position + (step == 3), *rest)
        )


def other_recipe(me: int) -> None:
    if me == 1:
        original = loop.dump_recipe
        loop.dump_recipe = lambda recipe: original(recipe) + "more: 1\n"


@pytest.mark.parametrize(
    ("prepare", "message", "done"),
    [
        (opposite_stream, "step 3: got another stream on rank 1 than on rank 0", [1, 2]),
        (other_position, "step 3: got another loader position on rank 1", [1, 2]),
        (other_recipe, "step 1: got another recipe on rank 1", []),
    ],
)
def test_ranks_that_differ_stop_before_anything_is_computed(
    prepare: Callable[[int], None], message: str, done: list[int], data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train_on(2, data, run, prepare=prepare, **RECIPE) == [7, 7]
    assert log_of(run).count(message) == 2
    assert steps_of(run) == done
    assert (metrics(run)[-1]["event"], metrics(run)[-1]["reason"]) == ("end", "DistributedError")


def test_the_generators_state_of_a_rank_does_not_matter(data: Path, tmp_path: Path) -> None:
    def reseed(me: int) -> None:
        torch.manual_seed(1000 + me)

    for name, prepare in (("plain", None), ("reseeded", reseed)):
        assert train_on(2, data, tmp_path / name, prepare=prepare, **RECIPE) == [0, 0]
    assert results(tmp_path / "plain") == results(tmp_path / "reseeded")


# ---------------------------------------------------------------------- cases 15 to 17: ranks that fail
def test_a_failure_of_one_rank_is_told_to_all(data: Path, tmp_path: Path) -> None:
    def exhausted(model: Any, sums: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And so on.")

    def unreadable(model: Any, sums: Any) -> Any:
        raise DataSourceError("books", "an error of the disk", "rows")

    def wrong(model: Any, sums: Any) -> Any:
        raise TypeError("a bug")

    for name, change, codes in (("memory", exhausted, [6, 6]), ("data", unreadable, [3, 3]), ("bug", wrong, [7, 99])):
        run = tmp_path / name
        assert train_on(2, data, run, prepare=spoil(1, 3, change), **RECIPE) == codes, log_of(run)
        assert "rank 1, step 3" in log_of(run) or name == "data"
        assert steps_of(run) == [1, 2]


@pytest.mark.parametrize(("point", "rank"), [("step@6", 0), ("step@6", 1), ("save: written model.safetensors@4", 0)])
def test_a_killed_rank_ends_all_and_the_run_resumes(point: str, rank: int, data: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    begin = time.monotonic()
    codes = train_on(2, data, run, environs={rank: {VARIABLE: point}}, training__checkpoint_every=2, **RECIPE)
    assert time.monotonic() - begin < 30
    assert (codes[rank], codes[1 - rank]) == (KILLED, 7), log_of(run)
    if rank == 1:
        assert "step 6: got no answer from rank 1 of 2" in log_of(run)
    assert train_on(2, data, run, resume="latest", training__checkpoint_every=2, **RECIPE) == [0, 0]
    assert train_on(2, data, whole, training__checkpoint_every=2, **RECIPE) == [0, 0]
    assert same_bits(run, whole, 8)
    assert results(run) == results(whole)


def test_a_rank_that_waits_for_its_device_ends_when_another_is_killed(data: Path, tmp_path: Path) -> None:
    def wait(me: int) -> None:
        original = loop.accumulate_gradients
        lifeline.GRACE_SECONDS = 1.0

        def waiting(*arguments: Any) -> Any:
            time.sleep(50)  # as in a collective on a GPU that never ends: no exception comes through
            return original(*arguments)

        if me == 0:
            loop.accumulate_gradients = waiting

    run, begin = tmp_path / "run", time.monotonic()
    codes = train_on(2, data, run, prepare=wait, environs={1: {VARIABLE: "step@1"}}, **RECIPE)
    assert codes == [7, KILLED], log_of(run)
    assert time.monotonic() - begin < 40
    assert "ssa train: rank 0: step 1: got no answer from rank 1 of 2" in log_of(run)


def test_a_rank_that_holds_the_lock_ends_when_another_is_killed(data: Path, tmp_path: Path) -> None:
    def wait(me: int) -> None:
        lifeline.LEAST_SECONDS = 2.0

        def waiting(*arguments: Any) -> Any:
            ctypes.PyDLL(None).sleep(50)  # unlike time.sleep with the interpreter's lock: no thread of Python runs

        if me == 0:
            loop.accumulate_gradients = waiting

    run, begin = tmp_path / "run", time.monotonic()
    environs = {1: {VARIABLE: "step@1"}}
    codes = train_on(2, data, run, prepare=wait, environs=environs, training__timeout_seconds=2, **RECIPE)
    assert codes == [1, KILLED], log_of(run)
    assert time.monotonic() - begin < 40
    assert "in waiting" in log_of(run)


def test_a_stopped_rank_is_given_up_and_named(data: Path, tmp_path: Path) -> None:
    def stop(me: int) -> None:
        original = loop.fault_point

        def point(name: str, step: int | None = None) -> None:
            if (me, step) == (1, 3):
                os.kill(os.getpid(), signal.SIGSTOP)
            original(name, step)

        loop.fault_point = point

    def watch(children: list[int]) -> None:
        os.waitpid(children[1], os.WUNTRACED)
        time.sleep(6)  # the other rank waits three seconds for an answer, and three for an explanation
        os.kill(children[1], signal.SIGKILL)
        os.kill(children[1], signal.SIGCONT)

    run = tmp_path / "run"
    codes = train_on(2, data, run, prepare=stop, meanwhile=watch, training__timeout_seconds=2, **RECIPE)
    assert codes == [7, KILLED], log_of(run)
    assert "step 3: got no answer from rank 1 of 2; expected an answer within 2 s" in log_of(run)


# ---------------------------------------------------------------------- case 3: signals
@pytest.mark.parametrize("who", [(0, 1), (1,)], ids=["all", "one"])
def test_a_signal_saves_once_and_ends_every_rank(who: tuple[int, ...], data: Path, tmp_path: Path) -> None:
    def tell(me: int) -> None:
        original = loop.fault_point

        def point(name: str, step: int | None = None) -> None:
            if step == 5 and me in who:
                os.kill(os.getpid(), signal.SIGTERM)
            original(name, step)

        loop.fault_point = point

    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train_on(2, data, run, prepare=tell, **RECIPE) == [143, 143]
    assert checkpoints(run) == ["step-00000004", "step-00000005"]
    assert metrics(run)[-1] == {"event": "end", "step": 5, "reason": "SIGTERM"}
    assert train_on(2, data, run, resume="latest", **RECIPE) == [0, 0]
    assert train_on(2, data, whole, **RECIPE) == [0, 0]
    assert same_bits(run, whole, 8)


# ---------------------------------------------------------------------- the command
def torchrun(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, "-m", "ssa", "train", *arguments], cwd=cwd, env=environ, text=True, capture_output=True, timeout=120
    )


def test_torchrun_starts_the_command(data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(tiny(data, training__micro_batch_rows=1, training__steps=4)))
    done = torchrun([str(recipe), "--out", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained for 4 steps") == 1  # rank 0 alone talks
    assert done.stderr.count("step 4/4  full") + done.stderr.count("step 4/4  sparse") == 1
    assert metrics(tmp_path / "run")[0]["processes"] == 2
    again = torchrun([str(recipe), "--out", "run"], tmp_path)
    assert again.returncode != 0
    assert "ssa train: rank 0: run: got a folder that is not empty" in again.stderr


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__micro_batch_rows": 4}, "training.micro_batch_rows: got 4; expected a divisor of the 2 rows"),
        ({"training__rows_per_step": 3}, "training.rows_per_step: got 3; expected a multiple of the 2 processes"),
        ({"training__shard": 3}, "training.shard: got 3; expected a divisor of the 2 processes: 1, 2"),
    ],
)
def test_a_step_that_cannot_be_dealt_out_is_refused(
    changes: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train_on(2, data, run, **RECIPE, **changes) == [2, 2]
    assert message in log_of(run)
    assert not run.exists()


def test_an_error_of_rank_0_before_the_first_step_reaches_all(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("precious")
    assert train_on(2, data, run, **RECIPE) == [2, 2]
    assert log_of(run).count("a folder that is not empty") == 2
    assert train_on(2, data, tmp_path / "absent", resume="latest", **RECIPE) == [4, 4]
