"""Benchmark tasks over local files, for lm-eval: the task definitions lie here, the rows come from the user.

A folder of JSON-lines or text files becomes a folder of task definitions, which ``ssa eval --tasks-from`` reads, and
plain ``lm_eval --include_path`` too.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ssa.errors import DataError
from ssa.evaluate.tasks import longbench

PREFIX = "local_"  # apart from lm-eval's own tasks, whose rows or text may differ
FALLBACK = "perplexity"  # template of rows that only have text
SPLITS = {
    **{name: name for name in ("train", "validation", "test")},
    **dict.fromkeys(("val", "valid", "dev"), "validation"),
}
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
_PAGE = re.compile(r"^ = [^=].* = $", re.MULTILINE)  # the title of a page in WikiText


@dataclass(frozen=True)
class Template:
    """A task without its data: ``definition`` in lm-eval's format, and what its rows must have.

    Attributes:
        name: file name; a data set of this name, or whose name begins with it, is an instance.
        texts: keys whose values are texts.
        choices: key of a list of texts, or the keys of single ones; None where the task has no choices.
        answer: key of the index of the right choice.
    """

    name: str
    definition: dict[str, Any]
    texts: tuple[str, ...]
    choices: str | tuple[str, ...] | None = None
    answer: str | None = None

    def check(self, row: object, where: str) -> dict[str, Any]:
        """The part of ``row`` that the task reads.

        Raises:
            DataError: not an object, a missing key, a value of another type, an answer out of range.
        """
        if not isinstance(row, dict):
            raise DataError(where, f"a {type(row).__name__}", "a JSON object")
        single = self.choices if isinstance(self.choices, tuple) else ()
        kept = {key: _value(row, key, str, where) for key in (*self.texts, *single)}
        count = len(single)
        if isinstance(self.choices, str):
            kept[self.choices] = listed = _value(row, self.choices, list, where)
            count = len(listed)
            if not all(isinstance(choice, str) for choice in listed):
                raise DataError(f"{where}: {self.choices}", "a choice that is no text", "a list of texts")
        if self.answer is not None:
            kept[self.answer] = answer = _value(row, self.answer, int, where)
            if not 0 <= answer < count:
                raise DataError(f"{where}: {self.answer}", answer, f"an index of one of {count} choices")
        return kept


@dataclass
class LocalTask:
    """A data set found in a folder: its template, and the files of each split."""

    name: str
    template: Template | longbench.LongBench
    splits: dict[str, Path] = field(default_factory=dict)


def templates() -> dict[str, Template]:
    """The task definitions of this package, by name."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.yaml")):
        definition = yaml.safe_load(file.read_text())
        rows = definition["metadata"].pop("rows")
        choices = rows.get("choices")
        choices = tuple(choices) if isinstance(choices, list) else choices
        found[file.stem] = Template(file.stem, definition, tuple(rows["texts"]), choices, rows.get("answer"))
    return found


def find_tasks(source: Path) -> dict[str, LocalTask]:
    """Data sets in ``source`` and below: files ``NAME_SPLIT.jsonl`` or ``.txt``, perhaps with ``.gz`` or ``.xz``.

    The name chooses the template (``piqa``, ``hellaswag``, ``arc*``, ``lambada*``); any other is measured by its
    perplexity, but for those of a folder ``longbench`` (:mod:`ssa.evaluate.tasks.longbench`). A file that is called
    by its split alone takes the name of its folder. Without a split it is ``test``.

    Raises:
        DataError: no folder, no such file in it, two files for one split.
    """
    if not source.is_dir():
        raise DataError(str(source), "no folder", "a folder of NAME_SPLIT.jsonl files")
    known, tasks = templates(), dict[str, LocalTask]()
    for path in sorted(source.rglob("*")):
        inner = path.with_suffix("") if path.suffix in OPENERS else path
        if not path.is_file() or inner.suffix not in (".jsonl", ".txt"):
            continue
        stem, _, last = inner.stem.rpartition("_")
        name, split = (stem or path.parent.name, SPLITS[last]) if last in SPLITS else (inner.stem, "test")
        name = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        if long := longbench.named(path, name):
            task = tasks.setdefault(long, LocalTask(long, longbench.LongBench(long)))
        else:
            matching = [t for t in known if name == t or name.startswith(f"{t}_")]
            task = tasks.setdefault(name, LocalTask(name, known[max(matching, key=len, default=FALLBACK)]))
        if split in task.splits:
            raise DataError(str(path), f"a second {split} split of {name}", "one file", str(task.splits[split]))
        task.splits[split] = path
    if not tasks:
        raise DataError(str(source), "no .jsonl or .txt file", "NAME_SPLIT.jsonl files, perhaps with .gz or .xz")
    return tasks


def write_tasks(source: Path, folder: Path, names: list[str] | None = None) -> dict[str, str]:
    """Check the rows of data sets in ``source`` and write them with their task definitions into ``folder``.

    Args:
        source: see :func:`find_tasks`.
        folder: receives ``local_NAME.yaml`` and ``local_NAME/SPLIT.jsonl``.
        names: which data sets; None: all.

    Returns:
        lm-eval's task name of each data set.

    Raises:
        DataError: as :func:`find_tasks`, an unknown name, a malformed row (``file:line``).
    """
    tasks = find_tasks(source)
    for name in names or ():
        if name not in tasks:
            raise DataError(f"task {name}", f"no such data set in {source}", f"one of {', '.join(tasks)}")
    return {name: _write(tasks[name], folder) for name in names or tasks}


def _write(task: LocalTask, folder: Path) -> str:
    name = PREFIX + task.name
    template = longbench.definition_of(task.name) if isinstance(task.template, longbench.LongBench) else task.template
    data = folder / name
    data.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, path in task.splits.items():
        file = data / f"{split}.jsonl"
        with file.open("w", encoding="utf-8") as out:
            count = 0
            for where, row in _rows(path, task):
                out.write(json.dumps(template.check(row, where)) + "\n")
                count += 1
        if not count:
            raise DataError(str(path), "no row", "at least one")
        files[split] = str(file.resolve())
    measured = next(split for split in ("test", "validation", "train") if split in files)
    drawn = next(split for split in ("train", "validation", "test") if split in files)
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str((data / "cache").resolve())},
        "test_split": measured,
        "fewshot_split": drawn,  # where it is the measured split, lm-eval leaves the measured row out
        **template.definition,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
    return name


def _rows(path: Path, task: LocalTask) -> Iterator[tuple[str, object]]:
    """Rows of a file with ``file:line``; a text file is one row, WikiText one per page."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            if ".txt" in path.suffixes:
                text = file.read()
                starts = [found.start() for found in _PAGE.finditer(text)] if task.name.startswith("wikitext") else []
                for start, end in zip(starts or [0], [*starts[1:], len(text)], strict=True):
                    yield str(path), {"text": text[start:end]}
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(str(path), str(error), "a readable, complete file") from error
    except UnicodeDecodeError as error:
        raise DataError(str(path), f"bytes that are no UTF-8 ({error.reason})", "UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}", f"malformed JSON ({error.msg})", "one JSON object per line") from error


def _value(row: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        got = "nothing" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{where}: {key}", got, {str: "a text", int: "an integer", list: "a list"}[kind])
    return value
