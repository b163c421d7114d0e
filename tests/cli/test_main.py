"""The command line as a user meets it: overview, wrong words, exit codes, no tracebacks."""

import subprocess
import sys
import time

import pytest

from ssa.cli import SUMMARIES, commands, main


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_overview_names_every_command_and_needs_no_torch(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in commands())
    assert set(commands()) <= set(SUMMARIES)
    code = "import sys; from ssa.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert in_a_process(code).returncode == 0


def test_the_overview_is_instant():
    started = time.perf_counter()
    assert in_a_process("from ssa.cli import main; main(['--help'])").returncode == 0
    assert time.perf_counter() - started < 2


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ssa 0.")


@pytest.mark.parametrize("command", ["quickstart", "prepare", "train", "eval", "generate", "report", "doctor"])
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"ssa {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "got command 'trian'"),
        (["train"], "got no recipe"),
        (["train", "quickstart/sssa"], "quickstart/sssa"),
        (["train", "quickstart/ssa", "--optimizer.learning-rat", "1"], "learning-rat"),
        (["train", "quickstart/ssa", "--optimizer.learning-rate", "-1"], "optimizer.learning_rate"),
        (["eval", "nowhere", "--data", "nowhere"], "nowhere: got no config.json"),
        (["eval", "nowhere", "--data", "nowhere", "--budgets", "0"], "budgets: got [0]"),
        (["generate", "nowhere"], "neither of --prompt and --prompt-file"),
        (["generate", "nowhere", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens: got 0"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere: got no config.json"),
        (["report", "nowhere"], "nowhere"),
        (["prepare", "nowhere.txt", "--out", "/tmp/ssa-never"], "nowhere.txt"),
    ],
)
def test_bad_input_exits_2_and_says_what_is_wrong(argv, message, capsys):
    assert main(argv) == 2  # an exception that main does not turn into a message would fail the test
    printed = capsys.readouterr()
    assert message in printed.err + printed.out


def test_the_process_exits_with_the_code_and_prints_no_traceback():
    done = in_a_process(
        "import sys; from ssa.cli import main; sys.exit(main(['generate', 'nowhere', '--prompt', 'x']))"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ssa generate: nowhere: got no config.json; expected")
    assert "Traceback" not in done.stderr


def test_doctor_explains_every_operation(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("select_blocks", "sparse_attention", "full_attention", "torch"):
        assert name in out
