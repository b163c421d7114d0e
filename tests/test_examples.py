"""Every example runs, in this process: short programs that a user copies from."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {
    "one_function": ["a query reads 128 of up to 512 tokens", "attention on the chosen blocks 0."],
    "drop_in": ["logits of the two modes differ", "step 3, "],
    "conversion": ["logits in full mode differ by at most", "sparse logits"],
    "generation": ["[full attention, ", "[sparse attention, 2 blocks of 16 tokens, "],
    "evaluation": ["full   all tokens perplexity", "sparse 64 tokens  perplexity", "sparse inference: AttnSparsity 0."],
}


def run(name: str, *argv: str) -> None:
    before = sys.argv
    sys.argv = [f"{name}.py", *argv]
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example of training writes."""
    folder = tmp_path_factory.mktemp("trained")
    run("tiny_training", str(folder))
    return folder


def test_training_leaves_a_run(trained: Path) -> None:
    assert (trained / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    argv = {"conversion": [str(tmp_path)]}.get(name, [])
    if name in ("generation", "evaluation"):
        trained: Path = request.getfixturevalue("trained")
        argv = [str(trained / "run"), str(trained / "data")][: 2 if name == "evaluation" else 1]
    run(name, *argv)
    said = capsys.readouterr().out
    assert all(words in said for words in SAYS[name]), said


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAYS, "tiny_training"}
