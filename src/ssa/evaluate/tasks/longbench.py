"""LongBench (Bai et al. 2023) from its own files on this machine: lm-eval's prompts and scores, the user's rows.

``FOLDER/longbench/hotpotqa.jsonl`` and so on, as in the archive that LongBench publishes. Only the data is replaced in
lm-eval's definitions; prompts longer than the model's context lose their beginning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ssa.errors import DataError, MissingDependencyError

PREFIX = "longbench_"
PACKAGES = ("jieba", "fuzzywuzzy", "rouge")  # lm-eval's scores of LongBench import all of them


def named(path: Path, name: str) -> str | None:
    """LongBench's name of the data set in a file, ``longbench_hotpotqa``; None if it is none of LongBench's."""
    if name.startswith(PREFIX):
        return name
    return PREFIX + name if path.parent.name.lower() == "longbench" else None


@dataclass(frozen=True)
class LongBench:
    """One data set of LongBench: lm-eval's definition, read where lm-eval has it.

    Attributes:
        name: ``longbench_hotpotqa`` and so on.
        definition: what replaces lm-eval's own.
    """

    name: str
    definition: dict[str, Any] = field(default_factory=dict)

    def check(self, row: object, where: str) -> dict[str, Any]:
        """A row as lm-eval's prompts and scores read it. LongBench's archive calls the question ``input``.

        Raises:
            DataError: not an object, a missing key, a value of another type.
        """
        if not isinstance(row, dict):
            raise DataError(where, f"a {type(row).__name__}", "a JSON object")
        question = row.get("question", row.get("input"))
        answers, classes = row.get("answers"), row.get("all_classes") or []
        for key, value in (("context", row.get("context")), ("input", question)):
            if not isinstance(value, str):
                raise DataError(f"{where}: {key}", f"a {type(value).__name__}", "a text")
        for key, value in (("answers", answers), ("all_classes", classes)):
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise DataError(f"{where}: {key}", f"a {type(value).__name__}", "a list of texts")
        if not answers:
            raise DataError(f"{where}: answers", "none", "at least one")
        return {"context": row["context"], "question": question, "answers": answers, "all_classes": classes}


def definition_of(name: str) -> LongBench:
    """lm-eval's definition of ``longbench_NAME`` without its data.

    Raises:
        MissingDependencyError: lm-eval, or what its scores of LongBench need, is not installed.
        DataError: no data set of LongBench has this name.
    """
    missing = [package for package in ("lm_eval", *PACKAGES) if find_spec(package) is None]
    if missing:
        hint = "pip install 'sparse-sparse-attention[longbench]'"
        raise MissingDependencyError("LongBench", f"no package {missing[0]}", "lm-eval with its scores", hint)
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / "longbench"
    files = {_plain(file.stem): file for file in folder.glob("[!_]*.yaml")}
    file = files.get(_plain(name.removeprefix(PREFIX)))
    if file is None:
        raise DataError(f"task {name}", "no data set of LongBench", f"one of {', '.join(sorted(files))}")
    return LongBench(name, {"include": str(file), "dataset_name": None, "tag": []})


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())
