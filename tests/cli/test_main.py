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


@pytest.mark.parametrize("command", sorted(SUMMARIES))
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
        (["eval", "nowhere", "--tasks", "piqa", "--mode", "dense"], "--mode"),
        (["convert", "nowhere", "/tmp/ssa-never"], "nowhere: got no such folder"),
        (["bench", "--suite", "nowhere"], "--suite"),
        (["doctor", "nowhere"], "recipe 'nowhere'"),
        (["quickstart", "--seeds", "-1", "--out", "/tmp/ssa-never"], "seed: got -1"),
        (["quickstart", "--steps", "0", "--out", "/tmp/ssa-never"], "training.steps: got 0"),
        (["quickstart", "--rows", "0", "--out", "/tmp/ssa-never"], "rows: got 0"),
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


# ---------------------------------------------------------------------- reliability.md, section 3: items 30 to 48
# Most are checks of the recipe, tested in tests/train/test_recipe.py; here is what a process adds.
@pytest.mark.parametrize("command", ["eval --data x", "generate --prompt x", "bench"])
@pytest.mark.parametrize("device", ["cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(command, device, capsys, tmp_path):
    import torch

    from ssa.data.tokenizer import train_tokenizer
    from ssa.model import SSAConfig, SSAForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    SSAForCausalLM(SSAConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(tmp_path)
    train_tokenizer(["x"], 260).save_pretrained(tmp_path)
    name, *rest = command.split()
    where = [] if name == "bench" else [str(tmp_path)]
    assert main([name, *where, *rest, "--device", device]) == 2
    message = capsys.readouterr().err
    assert f"--device: got {device!r}; expected auto or one of this machine's: cpu" in message


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    from ssa.errors import DiskError
    from ssa.evaluate import check_writable, write_result

    (tmp_path / "file").write_text("")
    for bad in (tmp_path, tmp_path / "file" / "x.json"):
        for write in (check_writable, lambda path: write_result({}, path)):
            with pytest.raises(DiskError, match="try"):
                write(bad)
    check_writable(tmp_path / "new" / "x.json")
    assert not list((tmp_path / "new").iterdir())


RECIPE_ITEMS = {
    31: ("extends: quickstart/ssa\nseed: 1\nseed: 2\n", "recipe.yaml:3: got key 'seed' a second time"),
    32: ("extends: quickstart/ssa\noptimizer: {learning_rate: 'fast'}\n", "optimizer.learning_rate: got 'fast'"),
    36: (None, "got no such file"),
    37: ("name: !!python/object/apply:os.system ['true']\n", "unsafe or unknown tag"),
    38: ("", "an empty recipe; expected values for name"),
}


@pytest.mark.parametrize("item", RECIPE_ITEMS)
def test_a_bad_recipe_file_is_a_message(item, tmp_path, capsys):
    text, message = RECIPE_ITEMS[item]
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environ", "message"),
    [({"WORLD_SIZE": "2"}, "WORLD_SIZE without RANK"), ({"RANK": "0", "WORLD_SIZE": "2"}, "without MASTER_ADDR")],
)
def test_a_half_set_environment_of_processes_is_a_message(environ, message, monkeypatch, capsys):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    assert main(["train", "quickstart/ssa", "--out", "/tmp/ssa-never"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", ["None", "nowhere/checkpoints/step-00000100"])
def test_a_checkpoint_that_is_not_there_never_starts_anew(path, tmp_path, capsys):
    out = tmp_path / "run"
    data = tmp_path / "data"
    (tmp_path / "a.txt").write_text("some words " * 900)
    (tmp_path / "b.txt").write_text("other words " * 900)
    sources = [str(tmp_path / "a.txt"), "--valid", str(tmp_path / "b.txt")]
    assert main(["prepare", *sources, "--out", str(data), "--row-length", "512", "--vocab-size", "260"]) == 0
    assert main(["train", "quickstart/ssa", "--data.path", str(data), "--out", str(out), "--resume", path]) in (2, 4)
    assert "no such folder" in capsys.readouterr().err
    assert not out.exists()
