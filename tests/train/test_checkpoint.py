"""Checkpoints: atomic under kills, every damaged byte found, retention, full disks."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssa.errors import CheckpointError, DiskError
from ssa.train import checkpoint, faults

FILES = ("model.safetensors", "optimizer.safetensors", "config.json", "state.json", "manifest.json")


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    values = torch.arange(12.0).view(3, 4) + step
    return {"model.safetensors": {"a": values, "b": values.t()}, "optimizer.safetensors": {"m.a": -values}}


def save(root: Path, step: int, keep: int = 2) -> Path:
    documents = {"config.json": {"width": 4}, "state.json": {"step": step}}
    path = checkpoint.write_checkpoint(root, step, tensors(step), documents)
    checkpoint.retain(root, keep)
    return path


def names(root: Path) -> list[str]:
    return [path.name for path in checkpoint.list_checkpoints(root)]


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    assert path.name == "step-00000100"
    assert sorted(item.name for item in path.iterdir()) == sorted(FILES)
    assert checkpoint.verify_checkpoint(path) == 100
    for name, values in tensors(100).items():
        read = checkpoint.read_tensors(path, name)
        assert read.keys() == values.keys()
        assert all(torch.equal(read[key], values[key]) for key in values)
    assert checkpoint.read_document(path, "state.json") == {"step": 100}


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000, 15):
        save(tmp_path, step, keep=10)
    assert names(tmp_path) == ["step-00000005", "step-00000010", "step-00000015", "step-100000000"]
    checkpoint.retain(tmp_path, 2)
    assert names(tmp_path) == ["step-00000015", "step-100000000"]
    checkpoint.retain(tmp_path, 0)
    assert names(tmp_path) == ["step-100000000"]


# ---------------------------------------------------------------------- kills
def killed(action: Callable[[], object], point: str) -> bool:
    """Run ``action`` in a forked process that dies at ``point``; True if it did."""
    child = os.fork()
    if child == 0:
        os.environ[faults.VARIABLE] = point
        action()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def save_points(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every fault point that a save with retention passes, in order."""
    points: list[str] = []
    monkeypatch.setattr(checkpoint, "fault_point", lambda name, step=None: points.append(name))
    for step in (1, 2, 3):
        points.clear()
        save(folder / "probe", step)
    monkeypatch.undo()
    return points


def test_a_kill_at_any_point_of_a_save_leaves_a_valid_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = save_points(tmp_path, monkeypatch)
    assert len(points) == len(set(points)) >= 14
    renamed = points.index("save: renamed")
    for i, point in enumerate(points):
        root = tmp_path / f"kill-{i}"
        save(root, 1)
        save(root, 2)
        assert killed(lambda root=root: save(root, 3), point), point
        latest, errors = checkpoint.find_latest(root)
        assert latest is not None
        assert not errors, point
        assert latest.name == f"step-{3 if i >= renamed else 2:08d}", point
        save(root, 3 if i < renamed else 4)  # a resumed run saves again over whatever was left
        assert len(names(root)) == 2
        assert not list(root.glob(".*")), point


def test_a_fault_may_name_its_step(tmp_path: Path) -> None:
    assert not killed(lambda: save(tmp_path, 1), "save: folder@2")
    assert killed(lambda: save(tmp_path, 2), "save: folder@2")


@pytest.mark.slow
def test_two_hundred_kills_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points, rng = save_points(tmp_path, monkeypatch), random.Random(0)
    root = tmp_path / "run"
    save(root, 1)
    for _ in range(200):
        latest = checkpoint.find_latest(root)[0]
        assert latest is not None
        step = checkpoint.verify_checkpoint(latest)
        killed(lambda step=step: save(root, step + 1), rng.choice(points))
        assert checkpoint.find_latest(root)[1] == []
    save(root, step + 2)
    assert len(list(root.iterdir())) == 2


# ---------------------------------------------------------------------- damage
@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_flip_is_found_and_the_file_named(name: str, tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    file, rng = path / name, random.Random(0)
    whole = file.read_bytes()
    damaged = [whole[: len(whole) * i // 64] for i in range(64)]
    for _ in range(150):
        at = rng.randrange(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
    tail = whole.rstrip(b"\0")
    damaged.append(tail[:-8] + bytes(len(whole) - len(tail) + 8))
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"step-00000007") as caught:
            checkpoint.verify_checkpoint(path)
        assert name in str(caught.value) or name == "manifest.json"
    file.write_bytes(whole)
    assert checkpoint.verify_checkpoint(path) == 7


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(name: str, tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify_checkpoint(path)


def test_files_of_two_steps_do_not_mix(tmp_path: Path) -> None:
    old, new = save(tmp_path, 10), save(tmp_path, 20)
    shutil.copy(old / "model.safetensors", new / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.verify_checkpoint(new)
    renamed = old.rename(tmp_path / "step-00000030")
    with pytest.raises(CheckpointError, match="step 10; expected step 30"):
        checkpoint.verify_checkpoint(renamed)


def test_a_manifest_cannot_point_outside_or_forward(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    for change in ({"files": {"../x": {"bytes": 1, "sha256": ""}}}, {"schema": "ssa.checkpoint/2"}, {"files": {}}):
        text = json.dumps(manifest | change, indent=1, sort_keys=True) + "\n"
        (path / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match="manifest"):
            checkpoint.verify_checkpoint(path)


def test_latest_falls_back_to_the_newest_valid_one_and_says_so(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"")
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    latest, errors = checkpoint.find_latest(tmp_path)
    assert latest == tmp_path / "step-00000001"
    assert ["step-00000003" in str(errors[0]), "step-00000002" in str(errors[1])] == [True, True]


# ---------------------------------------------------------------------- disks
def test_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match="0 MiB free") as caught:
        save(tmp_path, 2)
    assert caught.value.exit_code == 8
    assert [item.name for item in tmp_path.iterdir()] == ["step-00000001"]


def test_a_disk_that_fills_up_midway_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        save(tmp_path, 2)
    assert [item.name for item in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.find_latest(tmp_path)[0] == tmp_path / "step-00000001"


def test_set_aside_deletes_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        checkpoint.set_aside(save(tmp_path, 3), "damaged")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["step-00000003.damaged", "step-00000003.damaged-2"]
