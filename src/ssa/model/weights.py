"""The safetensors files of a model folder, read one shard at a time. No other kind of weights is ever opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ssa.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Weights:
    """Tensors of a model folder.

    Attributes:
        folder: where they are.
        shards: names of the tensors in each file.
        shapes: shape of each tensor.
    """

    folder: Path
    shards: dict[Path, list[str]]
    shapes: dict[str, tuple[int, ...]]

    @contextmanager
    def open(self, file: Path) -> Iterator[Any]:
        """A shard, as ``safetensors.safe_open`` gives it: ``get_tensor(name)``.

        Raises:
            CheckpointError: not a whole safetensors file.
        """
        with _readable(file), safe_open(str(file), framework="pt") as opened:
            yield opened

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return next(file for file, names in self.shards.items() if name in names)


def open_weights(folder: Path) -> Weights:
    """Find the weights of a model folder and read their headers.

    Raises:
        CheckpointError: no safetensors weights, an index that names a file outside the folder or a tensor that is not
            there, a header that lies.
    """
    index = folder / INDEX
    if index.is_file():
        listed = _read_index(index)
        files = sorted({_inside(folder, name, index) for name in listed.values()})
    elif (folder / SINGLE).is_file():
        listed, files = None, [_inside(folder, SINGLE, folder / SINGLE)]
    else:
        pickled = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLED)
        got = f"only {pickled[0]}, which may hold code" if pickled else "no weights"
        raise CheckpointError(str(folder), got, "safetensors weights", "saving the model anew with save_pretrained")
    shards: dict[Path, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        _check_header(file)
        with _readable(file), safe_open(str(file), framework="pt") as opened:
            shards[file] = sorted(opened.keys())
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in shards[file]}
    if listed is not None:
        found = {name: file.name for file, names in shards.items() for name in names}
        if wrong := sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name)):
            raise CheckpointError(str(index), describe(wrong, "tensors"), "each tensor in the file that it names")
    return Weights(folder, shards, shapes)


def describe(names: list[str], what: str) -> str:
    """``"7 missing keys: a, b, c, d, e"``: a count and the first five."""
    return f"{len(names)} {what}: {', '.join(names[:5])}"


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(str(file), str(error).splitlines()[0], "a whole safetensors file") from error


def _read_index(index: Path) -> dict[str, str]:
    try:
        listed = json.loads(index.read_text())["weight_map"]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(str(index), f"unreadable ({error!r})", "JSON with a weight_map") from error
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(str(index), "a weight_map of another form", "file names by tensor name")
    return listed


def _inside(folder: Path, name: str, where: Path) -> Path:
    """The file ``name`` of ``folder``; the cache of the hub keeps it beside the folder, behind a link."""
    plain = name == Path(name).name and "\\" not in name and "\0" not in name and name.endswith(".safetensors")
    file = folder / name
    root = folder.resolve()
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        root = root.parent.parent
    if not plain or not file.resolve().is_relative_to(root):
        raise CheckpointError(str(where), f"unsafe shard path {name!r}", "the name of a *.safetensors file beside it")
    if not file.is_file():
        raise CheckpointError(str(where), f"no file {name}", "every shard of the model")
    return file


def _check_header(file: Path) -> None:
    """The length that a header claims, before anything believes it."""
    with _readable(file), file.open("rb") as stream:
        start = stream.read(8)
        length, size = int.from_bytes(start, "little"), file.stat().st_size
    if len(start) < 8 or length > min(MAX_HEADER, size - 8):
        raise CheckpointError(str(file), f"a header of {length} bytes in {size}", "a safetensors file with its header")
