"""Imports point down only (docs/architecture.md), and nothing unpickles. Read from the sources, so lazy imports count.

To allow a new arrow, change docs/architecture.md first and then the tables here.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import ssa

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "ssa"
FILES = sorted(SOURCE.rglob("*.py"))

# part of ssa -> parts that it may import; a part is the first name below `ssa`
BASE = {"errors", "_version"}
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "_version": set(),
    "documents": {"errors"},
    "__init__": {"documents", "generation", "model", *BASE},  # the names of `import ssa`, loaded on first use
    "__main__": {"cli"},
    "environment": BASE,
    "ops": {"documents", "errors"},
    "nn": {"ops", "documents", "errors"},  # the layer as a module, for users of torch alone
    "model": {"ops", "documents", *BASE},
    "data": {"documents", *BASE},
    "train": {"model", "data", "ops", "documents", "environment", *BASE},
    "bench": {"train", "model", "data", "ops", "documents", "environment", *BASE},
    "evaluate": {"model", "data", "ops", "documents", "environment", *BASE},
    "report": {"errors"},
    "serve": {"model", "data", *BASE},
    "reproduce": {"train", "evaluate", "model", "data", *BASE},
    "generation": {"model", "data", "environment", *BASE},
    "cli": {
        *("reproduce", "train", "evaluate", "report", "serve", "generation", "bench"),
        *("model", "data", "ops", "documents", "environment", *BASE),
    },
}

# third-party package -> patterns of the files that may import it (others are free)
HOMES: dict[str, str] = {
    "triton": r"ops/(.+/)?triton[^/]*\.py|environment\.py|bench/offline\.py|cli/doctor\.py",
    "transformers": r"(model|data|train|evaluate|cli)/.+|(serve|generation)\.py",
    "datasets": r"(data|cli)/.+",
    "matplotlib": r"report/.+|bench/plot\.py",
    "jinja2": r"report/.+",
}
REPORT_MAY_NOT_IMPORT = {"torch", "transformers", "datasets"}  # it reads result files only
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING_CALLS = {"torch.load", "torch.save", "torch.package", "numpy.load", "np.load", "pandas.read_pickle"}


class Import(NamedTuple):
    """One dotted name that a file may load; ``line`` for the message."""

    file: Path
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


def module_of(file: Path) -> list[str]:
    """Dotted parts of a file's package, e.g. ``ssa/ops/spec.py`` -> ``[ssa, ops]``."""
    return ["ssa", *file.relative_to(SOURCE).parts[:-1]]


def imports(file: Path) -> list[Import]:
    """Everything that a file imports anywhere, relative imports resolved, backend targets ``"ssa.x:f"`` included."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module_of(file)[: len(module_of(file)) - node.level + 1] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]  # `from ssa import ops` is an arrow to ops
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            target = re.fullmatch(r"(ssa(?:\.\w+)+):\w+", node.value)
            names = [target[1]] if target else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            argument = node.args[0]
            names = [argument.value] if isinstance(argument, ast.Constant) else []
        found += [Import(file, node.lineno, name) for name in names]
    return found


IMPORTS = [found for file in FILES for found in imports(file)]


def part_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def target_part(name: str) -> str | None:
    """The part of ssa that a dotted name lies in; None for other packages."""
    names = name.split(".")
    if names[0] != "ssa":
        return None
    if len(names) == 1:
        return "__init__"
    if names[1] in ssa._HOMES:  # a public name that is loaded on first use: an arrow to where it lives
        return ssa._HOMES[names[1]].split(".")[1]
    known = {part_of(file) for file in FILES}
    return names[1] if names[1] in known else "__init__"


def is_allowed(found: Import) -> bool:
    part, target = part_of(found.file), target_part(found.name)
    if target is None or target == part:
        return True
    if target == "__init__":  # what is left there is at the bottom: SSAError and the version
        return part not in ("errors", "_version", "documents", "ops", "report")
    return target in ARROWS[part]


def listed(found: list[Import]) -> str:
    return "\n".join(map(str, found))


# ---------------------------------------------------------------------- the walker itself
def test_the_walker_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    file = tmp_path / "ops" / "deep" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import a.b, c as d\nfrom e import f\nfrom . import g\nfrom ..h import i\nfrom ssa import train\n"
        "def lazy():\n    import j\n    import_module('k.l')\ntry:\n    import m\nexcept ImportError: ...\n"
        "TARGET = 'ssa.n.o:p'\nSCHEMA = 'ssa.q/1'\n"
    )
    assert sorted(found.name for found in imports(file)) == sorted(
        ["a.b", "c", "e.f", "ssa.ops.deep.g", "ssa.ops.h.i", "ssa.train", "j", "k.l", "m", "ssa.n.o"]
    )


def test_every_part_has_rules() -> None:
    """A new package must be put on the map before it can import anything."""
    assert {part_of(file) for file in FILES} <= set(ARROWS)


def test_the_rules_are_a_hierarchy() -> None:
    """No cycle, and train and evaluate do not know each other."""
    order: list[str] = []
    while len(order) < len(ARROWS):
        ready = [part for part in ARROWS if part not in order and ARROWS[part] <= set(order)]
        assert ready, f"a cycle among {set(ARROWS) - set(order)}"
        order += ready
    assert "evaluate" not in ARROWS["train"]
    assert "train" not in ARROWS["evaluate"]
    assert "report" not in {target for part in ARROWS if part != "cli" for target in ARROWS[part]}


@pytest.mark.parametrize(
    ("file", "name", "allowed"),
    [
        ("train/loop.py", "ssa.model.SSAForCausalLM", True),
        ("train/loop.py", "ssa.train.recipe", True),
        ("train/loop.py", "ssa.evaluate.perplexity", False),
        ("evaluate/matrix.py", "ssa.train.recipe", False),
        ("report/page.py", "ssa.ops.spec", False),
        ("report/page.py", "ssa.DocumentLayout", False),  # through the package's public names
        ("ops/bound.py", "ssa.model.configuration", False),
        ("ops/bound.py", "ssa.documents.DocumentLayout", True),
        ("data/loader.py", "ssa.model", False),
        ("data/loader.py", "ssa.load_model", False),
        ("train/loop.py", "ssa.SSAForCausalLM", True),
        ("model/modeling.py", "ssa.data.loader", False),
        ("documents.py", "ssa.ops.spec", False),
        ("errors.py", "ssa.documents", False),
        ("model/modeling.py", "ssa.cli", False),
        ("cli/train.py", "ssa.train.loop", True),
        ("ops/spec.py", "torch.nn", True),
    ],
)
def test_the_rules_decide(file: str, name: str, allowed: bool) -> None:
    assert is_allowed(Import(SOURCE / file, 1, name)) == allowed


# ---------------------------------------------------------------------- the arrows
def test_arrows_point_down() -> None:
    assert not (bad := [found for found in IMPORTS if not is_allowed(found)]), listed(bad)


@pytest.mark.parametrize("package", HOMES)
def test_third_party_packages_stay_home(package: str) -> None:
    bad = [
        found
        for found in IMPORTS
        if found.name.split(".")[0] == package
        and not re.fullmatch(HOMES[package], found.file.relative_to(SOURCE).as_posix())
    ]
    assert not bad, listed(bad)


def test_report_reads_files_only() -> None:
    bad = [
        found
        for found in IMPORTS
        if part_of(found.file) == "report" and found.name.split(".")[0] in REPORT_MAY_NOT_IMPORT
    ]
    assert not bad, listed(bad)


def test_operations_need_torch_only() -> None:
    """``ssa.ops``, ``ssa.documents`` and ``ssa.errors``: the standard library, torch, and triton in its own files."""
    free = {*sys.stdlib_module_names, "torch", "ssa"}
    bad = [
        found
        for found in IMPORTS
        if part_of(found.file) in ("ops", "documents", "errors")
        and (top := found.name.split(".")[0]) not in free
        and not (top == "triton" and found.file.name.startswith("triton"))
        and not (top == "cudnn" and found.file.name == "packed.py")  # optional: nvidia-cudnn-frontend
    ]
    assert not bad, listed(bad)


def test_kernels_and_references_do_not_know_each_other() -> None:
    """A kernel that borrows from the specification would be compared with itself."""

    def kind(file: Path) -> str | None:
        return next((k for k in ("triton", "reference") if file.name.startswith(k)), None)

    other = {"triton": "reference", "reference": "triton"}
    bad = [
        found
        for found in IMPORTS
        if part_of(found.file) == "ops"
        and kind(found.file)
        and any(name.startswith(other[kind(found.file)]) for name in found.name.split(".") if found.name[:3] == "ssa")
    ]
    assert not bad, listed(bad)


# ---------------------------------------------------------------------- what an import really loads
HEAVY = ["transformers", "datasets", "triton", "matplotlib", "jinja2", "tyro", "numpy.testing"]


@pytest.mark.parametrize("module", ["ssa", "ssa.ops"])
def test_importing_loads_torch_only(module: str) -> None:
    code = f"import torch, sys; before = set(sys.modules); import {module}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "ssa" in loaded
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}


# ---------------------------------------------------------------------- nothing unpickles (reliability.md, "No pickle")
def dotted_uses(file: Path) -> list[Import]:
    """Dotted expressions such as ``torch.load``, wherever they appear."""
    return [
        Import(file, node.lineno, ast.unparse(node))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute)
    ]


def test_no_source_pickles() -> None:
    bad = [found for found in IMPORTS if found.name.split(".")[0] in PICKLES or found.name in PICKLING_CALLS]
    bad += [found for file in FILES for found in dotted_uses(file) if found.name in PICKLING_CALLS]
    assert not bad, listed(bad)


def test_no_source_runs_remote_code_or_weakens_loading() -> None:
    """No call passes ``trust_remote_code=True``, ``weights_only=False`` or ``allow_pickle=True``, nor a variable."""
    forbidden = {"trust_remote_code": True, "weights_only": False, "allow_pickle": True}
    bad = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg in forbidden:
                literal = node.value.value if isinstance(node.value, ast.Constant) else forbidden[node.arg]
                if literal == forbidden[node.arg]:  # anything that is not the safe literal
                    bad.append(f"{file.relative_to(ROOT)}:{node.value.lineno} passes {ast.unparse(node)}")
    assert not bad, "\n".join(bad)
