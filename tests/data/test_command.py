"""``ssa prepare`` as a user meets it."""

import inspect
import json
import os
import subprocess
import sys

import pytest

from ssa.cli import main
from ssa.cli.prepare import command


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": f"text number {i} " * 5}) + "\n" for i in range(50)) + "[]\n")
    return str(file)


def flags(out, *more):
    return ["--out", str(out), "--row-length", "16", "--vocab-size", "280", *more]


def test_the_account_is_printed(corpus, tmp_path, capsys):
    assert main(["prepare", corpus, *flags(tmp_path / "out", "--max-skips", "1", "--valid-fraction", "0.2")]) == 0
    printed = capsys.readouterr().out
    account = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]
    for name in ("documents", "text_tokens", "special_tokens", "padding", "rows"):
        assert f"{account[name]:,}" in printed
    assert "1 malformed records skipped" in printed
    assert main(["prepare", corpus, *flags(tmp_path / "none", "--max-skips", "1", "--valid-fraction", "0")]) == 0
    assert "No document fell into the validation split" in capsys.readouterr().out


def test_help_explains_every_flag(capsys):
    assert main(["prepare", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for flag in inspect.signature(command).parameters:
        assert f"{flag}: " in command.__doc__
    for words in ("folder to write", "tokens per row", "replace finished data", "allow fetching a tokenizer"):
        assert words in printed


def test_limits_are_flags(corpus, tmp_path, capsys):
    assert main(["prepare", corpus, *flags(tmp_path / "out", "--max-document-mib", "0")]) == 2
    assert "limits" in capsys.readouterr().err


def test_nothing_is_written_outside_the_output_folder(corpus, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    code = "import sys; from ssa.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "prepare", corpus, *flags(tmp_path / "out")],
        env={**environment, "HOME": str(home), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"ssa prepare: {corpus}:51: got a list; expected a JSON object")
    done = subprocess.run(
        [sys.executable, "-c", code, "prepare", corpus, *flags(tmp_path / "out", "--max-skips", "1")],
        env={**environment, "HOME": str(home), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(home.rglob("*")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "home", "out"]
