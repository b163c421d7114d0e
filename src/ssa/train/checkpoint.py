"""Checkpoints on disk: atomic, hashed, pickle-free.

A checkpoint is a folder ``step-00000100`` of safetensors and JSON files, and ``manifest.json`` with the size and
SHA-256 of each. It is written under a temporary name, files first, manifest last, every one flushed to the disk;
then the folder is renamed. A folder of that name is therefore complete, and what the hashes do not confirm is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ssa.errors import CheckpointError, DiskError
from ssa.train.disk import disk_errors
from ssa.train.faults import fault_point

SCHEMA = "ssa.checkpoint/1"
MANIFEST = "manifest.json"
_FOLDER = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".temporary-"
_SPARE_BYTES = 1 << 20  # headers, JSON files and the file system's own rounding


def folder_name(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders in ``root``, oldest first. Says nothing about their contents."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


# ---------------------------------------------------------------------- writing
def write_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Write one checkpoint; afterwards it is complete on the disk, and before that the folder's name is not there.

    Args:
        root: folder of the checkpoints, created if needed.
        step: optimiser step.
        tensors: safetensors files to write, by file name.
        documents: JSON files to write, by file name.

    Raises:
        DiskError: too little space, or the disk cannot be written. Older checkpoints are untouched.
    """
    target, temporary = root / folder_name(step), root / f"{_TEMPORARY}{folder_name(step)}"
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        _preflight(root, sum(value.nbytes for file in tensors.values() for value in file.values()))
        temporary.mkdir()
    try:
        with disk_errors(root):
            _write_files(temporary, step, tensors, documents)
            os.rename(temporary, target)
            fault_point("save: renamed", step)
            _flush(root)
    except DiskError:
        shutil.rmtree(temporary, ignore_errors=True)  # make room again; the error being raised matters more
        raise
    fault_point("save: done", step)
    return target


def _write_files(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Mapping[str, Any]]
) -> None:
    fault_point("save: folder", step)
    writers: dict[str, Callable[[Path], None]] = {}
    for name, values in tensors.items():
        writers[name] = _tensor_writer(values)
    for name, document in documents.items():
        writers[name] = _text_writer(json.dumps(document, indent=1, sort_keys=True))
    files = {}
    for name, write in writers.items():
        write(folder / name)
        fault_point(f"save: written {name}", step)
        _flush(folder / name)
        files[name] = _fingerprint(folder / name)
        fault_point(f"save: flushed {name}", step)
    manifest = {"schema": SCHEMA, "step": step, "files": files}
    _text_writer(json.dumps(manifest, indent=1, sort_keys=True))(folder / MANIFEST)
    fault_point("save: written manifest", step)
    _flush(folder / MANIFEST)
    _flush(folder)
    fault_point("save: flushed manifest", step)


def _tensor_writer(values: Mapping[str, Tensor]) -> Callable[[Path], None]:
    return lambda path: save_file({k: v.contiguous() for k, v in values.items()}, path, metadata={"format": "pt"})


def _text_writer(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def _preflight(root: Path, needed: int) -> None:
    free, wanted = shutil.disk_usage(root).free, int(needed * 1.01) + _SPARE_BYTES
    if free < wanted:
        got = f"{free / 2**20:.0f} MiB free"
        raise DiskError(str(root), got, f"{wanted / 2**20:.0f} MiB for a checkpoint", "a smaller keep_checkpoints")


def _flush(path: Path) -> None:
    """fsync a file or folder: after a power cut, what a later name refers to must be there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- retention
def retain(root: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints. A half-deleted one never bears a checkpoint's name."""
    for path in list_checkpoints(root)[: -max(keep, 1)]:
        condemned = root / f"{_TEMPORARY}deleted-{path.name}"
        with disk_errors(root):
            os.rename(path, condemned)
            fault_point("retain: renamed")
            (condemned / MANIFEST).unlink(missing_ok=True)
            fault_point("retain: half deleted")
            shutil.rmtree(condemned)


def remove_leftovers(root: Path) -> None:
    """Delete what a killed process left half-written or half-deleted. Only the owner of the run's lock may call it."""
    for path in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint to ``NAME.WHY`` so that its step can be saved again; nothing is deleted."""
    target = path.with_name(f"{path.name}.{why}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{why}-{number}")
    with disk_errors(path.parent):
        return path.rename(target)


# ---------------------------------------------------------------------- reading
def verify_checkpoint(path: Path) -> int:
    """Read every file and compare with the manifest; returns the step.

    Raises:
        CheckpointError: no such folder, or a file that is missing, of another size or of another hash; it is named.
    """
    if not path.is_dir():
        raise CheckpointError(str(path), "no such folder", "a checkpoint folder such as RUN/checkpoints/step-00000100")
    manifest = _read_manifest(path)
    for name, (size, digest) in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(str(file), "a missing file", "what the manifest lists")
        if file.stat().st_size != size:
            raise CheckpointError(str(file), f"{file.stat().st_size} bytes", f"{size} bytes (manifest)")
        if _fingerprint(file) != {"bytes": size, "sha256": digest}:
            raise CheckpointError(str(file), "another SHA-256 than the manifest's", f"{digest[:16]}...")
    return int(manifest["step"])


def find_latest(root: Path) -> tuple[Path | None, list[CheckpointError]]:
    """The newest checkpoint that verifies, and the errors of the newer ones that did not."""
    errors = []
    for path in reversed(list_checkpoints(root)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            errors.append(error)
        else:
            return path, errors
    return None, errors


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one safetensors file, on the CPU. Verify the checkpoint first."""
    return load_file(path / name)


def read_document(path: Path, name: str) -> dict[str, Any]:
    """One JSON file. Verify the checkpoint first."""
    document: dict[str, Any] = json.loads((path / name).read_text(encoding="utf-8"))
    return document


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest with ``files`` as ``{name: (bytes, sha256)}``."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        schema, step = manifest["schema"], manifest["step"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(str(file), "a missing file", "the manifest that is written last") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(file), f"a damaged manifest ({error})", "the manifest as it was written") from None
    if schema != SCHEMA:
        raise CheckpointError(str(file), f"schema {schema!r}", repr(SCHEMA), "the version of ssa that wrote it")
    unsafe = [name for name in files if Path(name).name != name]
    if not files or unsafe:
        raise CheckpointError(str(file), "a damaged manifest", "the manifest as it was written")
    named = _FOLDER.fullmatch(path.name)
    if named and int(named[1]) != step:
        raise CheckpointError(str(file), f"step {step}", f"step {int(named[1])}, as the folder says")
    return {"step": step, "files": files}


def _fingerprint(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
