"""Recipes: shipped files parse, bad values are refused with the key's name, flags override files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ssa.cli.train import parse
from ssa.errors import ConfigError
from ssa.train.recipe import flatten
from ssa.train.recipe_file import dump_recipe, load_recipe, shipped_recipes

SCALES, METHODS = ("quickstart", "tiny", "small", "64m", "300m", "1b", "1b-32k"), ("full", "moba", "nsa", "ssa")
ABLATIONS = [name for name in shipped_recipes() if name.startswith("ablations/")]

# Sizes that the messages below name; the shipped values may be tuned.
SIZES = {
    "data.row_length": 512,
    "training.steps": 300,
    "training.tokens": None,
    "training.rows_per_step": 8,
    "training.micro_batch_rows": 8,
}


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------------- shipped recipes
def test_every_scale_has_every_method() -> None:
    rest = sorted(set(shipped_recipes()) - set(ABLATIONS))
    assert rest == sorted(f"{scale}/{method}" for scale in SCALES for method in METHODS)


@pytest.mark.parametrize("name", [f"{scale}/{method}" for scale in SCALES for method in METHODS])
def test_shipped_recipe_parses_and_survives_a_dump(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.model.method == name.split("/")[1]
    assert recipe.name == name.replace("/", "-")
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_what_its_name_says_and_nothing_else(name: str, tmp_path: Path) -> None:
    recipe, base = load_recipe(name), load_recipe("64m/ssa")
    assert recipe.name == name.replace("/", "-")
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe
    changed = {key: value for key, value in flatten(recipe.to_dict()).items() if value != flatten(base.to_dict())[key]}
    assert set(changed) - {"name"} == {f"model.{key}" for key in ABLATED[name.split("/")[1]]}
    recipe.model_config().sparse_spec()


ABLATED: dict[str, tuple[str, ...]] = {
    **{f"alpha-{weight}": ("alignment_weight",) for weight in (1, 5, 20, 40, 160)},
    **{f"p-{p}": ("full_probability",) for p in ("0", "025", "075", "1")},
    "no-alignment": ("alignment_weight",),
    "sparsity-only": ("alignment_directions",),
    "commitment-only": ("alignment_directions",),
    "layer-streams": ("stream_per_layer",),
    "raw": ("align_on",),
    "l2": ("alignment_distance", "alignment_weight"),
    "blocks-8x16": ("num_blocks",),
    "blocks-16x32": ("block_size",),
    "blocks-16x64": ("block_size",),
    "blocks-8x32": ("block_size", "num_blocks"),
    "official-top-k": ("selection_rule",),
    **{f"sampled-{n}": ("align_query_fraction",) for n in (4, 8, 16)},
}


def test_every_ablation_of_the_paper_is_there() -> None:
    """Paper, section 2 of the ablations: weights, probabilities, directions, distance, block counts and sizes."""
    assert {name.split("/")[1] for name in ABLATIONS} == set(ABLATED)
    values = {name: load_recipe(name).model for name in ABLATIONS}
    assert sorted(values[f"ablations/p-{p}"].full_probability for p in ("0", "025", "075", "1")) == [0, 0.25, 0.75, 1]
    for count, size in ((8, 16), (16, 32), (16, 64), (8, 32)):
        model = values[f"ablations/blocks-{count}x{size}"]
        assert (model.num_blocks, model.block_size) == (count, size)


# hidden, intermediate, layers, query heads, KV heads, head dim, vocabulary (the paper's table of models)
PAPER = {"1b": (2048, 8192, 16, 32, 2, 64, 128256), "300m": (1024, 4096, 16, 16, 1, 64, 128256)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("scale", "tokens"), [("1b", 100e9), ("300m", 50e9)])
def test_the_paper_s_shapes_and_training(scale: str, tokens: float, method: str) -> None:
    recipe = load_recipe(f"{scale}/{method}")
    model, optimizer = recipe.model, recipe.optimizer
    shape = (model.hidden_size, model.intermediate_size, model.num_hidden_layers, model.num_attention_heads)
    assert (*shape, model.num_key_value_heads, model.head_dim, model.vocab_size) == PAPER[scale]
    assert (model.rope_theta, model.rms_norm_eps, model.initializer_range) == (500000.0, 1e-5, 0.02)
    assert (model.block_size, model.num_blocks, model.window_size) == (16, 16, 128)
    assert (model.gated, model.tie_word_embeddings) == (True, True)
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (1e-3, (0.9, 0.95), 0.1)
    assert (optimizer.gradient_clip, optimizer.warmup_fraction) == (1.0, 0.01)
    assert (optimizer.schedule, optimizer.final_fraction) == ("cosine", 0.0)
    assert (recipe.data.row_length, recipe.training.tokens, recipe.tokens_per_step) == (8192, tokens, 3_145_728)


@pytest.mark.parametrize("method", METHODS)
def test_continued_training_stretches_rope_and_starts_from_the_8k_model(method: str) -> None:
    recipe, before = load_recipe(f"1b-32k/{method}"), load_recipe(f"1b/{method}")
    assert (recipe.data.row_length, recipe.training.tokens, recipe.optimizer.learning_rate) == (32768, 10e9, 1e-5)
    assert recipe.tokens_per_step == before.tokens_per_step
    assert recipe.model.weights == f"runs/{before.name}"
    config = recipe.model_config()
    assert config.max_position_embeddings == 32768
    assert config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert before.model_config().rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}


def test_the_paper_s_1b_recipe() -> None:
    recipe = load_recipe("1b/ssa")
    assert (recipe.tokens_per_step, recipe.steps, recipe.warmup_steps) == (3_145_728, 31790, 318)
    config = recipe.model_config()
    assert (config.full_probability, config.alignment_weight, config.max_position_embeddings) == (0.5, 10.0, 8192)
    assert recipe.optimizer.betas == (0.9, 0.95)


def test_recipes_of_one_scale_differ_in_the_method_only() -> None:
    for scale in SCALES:
        recipes = [load_recipe(f"{scale}/{method}").to_dict() for method in METHODS]
        for recipe in recipes:
            for key in ("method", "full_probability", "alignment_weight", "weights"):
                del recipe["model"][key]
            del recipe["name"]
        assert all(recipe == recipes[0] for recipe in recipes)


def test_rope_theta_reaches_the_configuration() -> None:
    config = load_recipe("quickstart/ssa", {"model.rope_theta": 1e4}).model_config()
    assert config.rope_parameters["rope_theta"] == 1e4


# ---------------------------------------------------------------------- refusals: (override, key, words)
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"optimizer.learing_rate": 1e-3}, "optimizer.learing_rate", "optimizer.learning_rate (did you mean"),
    ({"learning_rate": 1e-3}, "learning_rate", "optimizer.learning_rate (did you mean"),
    ({"optimiser.learning_rate": 1e-3}, "optimiser", "an unknown key"),
    ({"optimizer.learning_rate": "1e-3"}, "optimizer.learning_rate", "a number"),
    ({"optimizer.learning_rate": math.nan}, "optimizer.learning_rate", "nan"),
    ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate", "above 0"),
    ({"optimizer.learning_rate": None}, "optimizer.learning_rate", "null"),
    ({"optimizer.betas": [0.9]}, "optimizer.betas", "a list of 2 numbers"),
    ({"optimizer.betas": [0.9, 1.0]}, "optimizer.betas", "[0, 1)"),
    ({"optimizer.weight_decay": math.inf}, "optimizer.weight_decay", "finite"),
    ({"optimizer.schedule": "linear"}, "optimizer.schedule", "cosine, constant"),
    ({"optimizer.warmup_steps": 301}, "optimizer.warmup_steps", "300 steps"),
    ({"optimizer.warmup_fraction": 1.5}, "optimizer.warmup_fraction", "[0, 1]"),
    ({"model.method": "dense"}, "model.method", "full, moba, nsa, ssa"),
    ({"model.alignment_weight": math.nan}, "model.alignment_weight", "finite"),
    ({"model.alignment_weight": -1}, "model.alignment_weight", "at least 0"),
    ({"model.full_probability": 1.2}, "model.full_probability", "[0, 1]"),
    ({"model.method": "moba"}, "model.full_probability", "method 'moba'"),
    ({"model.block_size": 24}, "model.block_size", "16"),
    ({"model.num_blocks": 0}, "model.num_blocks", "at least 1"),
    ({"model.num_blocks": True}, "model.num_blocks", "an integer"),
    ({"model.num_blocks": 2.5}, "model.num_blocks", "an integer"),
    ({"model.num_key_value_heads": 3}, "model", "divisible"),
    ({"model.hidden_size": -1}, "model.hidden_size", "at least 1"),
    ({"model.head_dim": 31}, "model.head_dim", "even"),
    ({"model.gated": "yes"}, "model.gated", "true or false"),
    ({"model.rope_factor": 0.5, "model.rope_original_length": 512}, "model.rope_factor", "at least 1"),
    ({"model.rope_factor": 4}, "model.rope_original_length", "a length if rope_factor is given"),
    ({"model.rope_original_length": 512}, "model.rope_original_length", "else null"),
    ({"model.weights": ""}, "model.weights", "a path"),
    ({"training.shard": 0}, "training.shard", "at least 1"),
    ({"training.timeout_seconds": 0}, "training.timeout_seconds", "between 1 and 86400"),
    ({"training.spike_factor": 1}, "training.spike_factor", "above 1"),
    ({"training.micro_batch_rows": 3}, "training.micro_batch_rows", "1, 2, 4, 8"),
    ({"training.tokens": 1e6}, "training", "steps 300 and tokens 1000000"),
    ({"training.steps": None}, "training", "one of steps and tokens"),
    ({"training.steps": 0}, "training.steps", "at least 1"),
    ({"training.keep_checkpoints": 0}, "training.keep_checkpoints", "at least 1"),
    ({"training.device": "tpu"}, "training.device", "cuda:N"),
    ({"data.row_length": 0}, "data.row_length", "at least 1"),
    ({"name": "a/b"}, "name", "letters"),
    ({"name": "a\nb"}, "name", "letters"),
    ({"name": "a\0b"}, "name", "letters"),
    ({"name": 7}, "name", "a text"),
    ({"seed": -1}, "seed", "2^63"),
    ({"training": 3}, "training", "a section"),
    ({"data.path.deeper": 3}, "data.path.deeper", "an unknown key"),
]


@pytest.mark.parametrize(("override", "key", "word"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_value_is_refused_with_its_key(override: dict[str, Any], key: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("quickstart/ssa", SIZES | override)
    assert caught.value.where == key
    assert word in str(caught.value)


def test_overrides_are_applied() -> None:
    changes = {"optimizer.learning_rate": 1, "training.steps": None, "training.tokens": 5e3}
    recipe = load_recipe("quickstart/ssa", SIZES | changes)
    assert recipe.optimizer.learning_rate == 1.0
    assert recipe.steps == 2  # 4096 tokens a step: the second is begun


# ---------------------------------------------------------------------- YAML
FILES: list[tuple[str, str]] = [
    ("", "an empty recipe; expected values for name, data.path"),
    ("- a\n", "a mapping of sections"),
    ("extends: quickstart/ssa\nseed: 1\nseed: 2\n", "recipe.yaml:3: got key 'seed' a second time (first in line 2)"),
    ("extends: quickstart/ssa\nmodel:\n  gated: true\n  gated: true\n", "recipe.yaml:4"),
    ("name: !!python/object/apply:os.system ['true']\n", "recipe.yaml:1: got unsafe or unknown tag"),
    ("name: [\n", "malformed YAML"),
    ("extends: nowhere\n", "recipe.yaml: extends"),
    ("extends: recipe\n", "a circle of files"),
    ("extends: quickstart/base\nname: x\n", "got no value; expected values for model.method"),
    ("extends: quickstart/ssa\nmodel: [1]\n", "model: got [1] (list); expected a section"),
    ("extends: quickstart/ssa\noptimizer: {learning_rate: '1e-3'}\n", "optimizer.learning_rate: got '1e-3' (str)"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=[message[:30] for _, message in FILES])
def test_bad_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", ".1e-2", "0.001"])
def test_floats_are_read_as_people_write_them(number: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"extends: quickstart/ssa\noptimizer:\n  learning_rate: {number}\n")
    assert load_recipe(path).optimizer.learning_rate == 1e-3


def test_whole_numbers_may_be_written_as_powers(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: quickstart/ssa\ntraining: {steps: null, tokens: 1e9}\n")
    assert load_recipe(path).training.tokens == 10**9


def test_extends_merges_sections_and_the_top_file_wins(tmp_path: Path) -> None:
    write(tmp_path, "extends: quickstart/ssa\nseed: 1\ntraining: {steps: 7}\n", "mine.yaml")
    recipe = load_recipe(write(tmp_path, "extends: mine\nname: other\ntraining: {log_every: 3}\n"))
    assert (recipe.name, recipe.seed, recipe.training.steps, recipe.training.log_every) == ("other", 1, 7, 3)
    assert recipe.training.rows_per_step == load_recipe("quickstart/ssa").training.rows_per_step


@pytest.mark.parametrize("name", ["quickstart/sssa", "no/such.yaml", ".", "a\0b"])
def test_missing_recipe_names_what_there_is(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(name)
    assert "quickstart/ssa" in str(caught.value) or "NUL" in str(caught.value)


# ---------------------------------------------------------------------- flags
def test_flags_override_the_file() -> None:
    argv = ["quickstart/ssa", "--optimizer.learning-rate", "3e-4", "--out", "run", "--model.gated", "--seed", "5"]
    command = parse(argv)
    assert command.settings.optimizer.learning_rate == 3e-4
    assert (command.settings.output, command.settings.seed, command.resume, command.dry_run) == ("run", 5, "", False)
    untouched = load_recipe("quickstart/ssa", {"optimizer.learning_rate": 3e-4, "output": "run", "seed": 5})
    assert command.settings == untouched


def test_flags_can_replace_steps_by_tokens() -> None:
    command = parse(["quickstart/ssa", "--training.steps", "None", "--training.tokens", "8192"])
    assert (command.settings.training.steps, command.settings.training.tokens) == (None, 8192)


@pytest.mark.parametrize(
    ("argv", "resume"),
    [(["--resume"], "latest"), (["--resume", "--out", "x"], "latest"), (["--resume", "a/b"], "a/b"), ([], "")],
)
def test_resume_with_and_without_a_path(argv: list[str], resume: str) -> None:
    assert parse(["quickstart/ssa", *argv]).resume == resume


def test_resume_path_none_is_a_path_and_not_a_fresh_start() -> None:
    assert parse(["quickstart/ssa", "--resume", "None"]).resume == "None"


def test_a_misspelt_flag_exits_2_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["quickstart/ssa", "--optimizer.learing-rate", "1"])
    assert caught.value.code == 2
    assert "--optimizer.learning-rate" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--model.alignment-weight", "--optimizer.learning-rate"])
@pytest.mark.parametrize("value", ["-1", "nan"])
def test_flags_are_checked_like_the_file(flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=flag.strip("-").replace("-", "_")):
        parse(["quickstart/ssa", flag, value])


@pytest.mark.parametrize("argv", [[], ["--seed", "1"]])
def test_a_recipe_comes_first(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="quickstart/ssa"):
        parse(argv)
