"""``ssa generate`` and ``ssa.generate`` on a tiny model folder."""

import io
import sys

import pytest
import torch

import ssa
from ssa.cli import main
from ssa.data.tokenizer import begin_with_bos, train_tokenizer
from ssa.errors import ConfigError

from ..model.tiny import tiny_model

PROMPT = "a quick brown fox jumps over the lazy dog " * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([PROMPT], 270)
    tokenizer.save_pretrained(path)
    tiny_model(vocab_size=270).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def opened(folder):
    return ssa.load_model(folder), begin_with_bos(train_tokenizer([PROMPT], 270))


def expected(opened, mode, new=12, **options):
    """Greedy continuation without a cache."""
    model, tokenizer = opened
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad(), model.attention_mode(mode, **options):
        for _ in range(new):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, -new:], skip_special_tokens=True)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_prompt_from_argument_file_and_standard_input(mode, folder, opened, tmp_path, capsys, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    for source in (["--prompt", PROMPT], ["--prompt-file", str(file)], ["--prompt", "-"]):
        assert main(["generate", str(folder), *source, "--mode", mode, "--max-new-tokens", "12"]) == 0
        out, err = capsys.readouterr()
        assert out == expected(opened, mode) + "\n"
        assert "12 new tokens" in err
        assert ("full attention" if mode == "full" else "sparse attention, 3 blocks of 4 tokens") in err


def test_budget_mass_and_chunks(folder, opened, capsys):
    flags = ["--num-blocks", "2", "--report-mass", "--prefill-chunk-size", "7", "--max-new-tokens", "12"]
    assert main(["generate", str(folder), "--prompt", PROMPT, *flags]) == 0
    out, err = capsys.readouterr()
    assert out == expected(opened, "sparse", num_blocks=2) + "\n"
    assert "2 blocks of 4 tokens" in err
    assert 0 < float(err.split("mean dropped mass ")[1].split()[0]) < 1
    assert "with 2.0 blocks a query" in err


@pytest.mark.parametrize("flavour", ["estimated", "certified"])
def test_adaptive_budget(flavour, folder, capsys):
    flags = ["--max-dropped-mass", "0.2", "--flavour", flavour, "--report-mass", "--max-new-tokens", "12"]
    assert main(["generate", str(folder), "--prompt", PROMPT, *flags]) == 0
    err = capsys.readouterr().err
    assert f"dropped mass 0.2 at most ({flavour})" in err
    assert float(err.split("mean dropped mass ")[1].split()[0]) < (0.2 if flavour == "certified" else 0.4)
    assert main(["generate", str(folder), "--prompt", "x", "--flavour", flavour]) == 2
    assert "--max-dropped-mass beside it" in capsys.readouterr().err


def test_in_python(folder, opened):
    pieces = []
    done = ssa.generate(folder, PROMPT, mode="sparse", max_new_tokens=12, on_text=pieces.append)
    assert str(done) == "".join(pieces) == expected(opened, "sparse")
    assert (done.new_tokens, done.dropped_mass) == (12, None)
    assert done.prefill_speed > 0
    assert done.decode_speed > 0
    model, tokenizer = opened
    assert str(ssa.generate(model, PROMPT, tokenizer=tokenizer, mode="sparse", max_new_tokens=12)) == str(done)
    one = ssa.generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=1)
    assert (one.new_tokens, one.decode_speed) == (1, None)


def test_sampling_repeats_with_its_seed(folder):
    texts = [ssa.generate(folder, PROMPT, temperature=1.5, seed=seed, max_new_tokens=15).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stop_text_ends_it(folder):
    whole = ssa.generate(folder, PROMPT, max_new_tokens=12)
    middle = whole.text[1:3]
    short = ssa.generate(folder, PROMPT, max_new_tokens=12, stop=middle)
    assert short.new_tokens < whole.new_tokens
    assert middle in short.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 500}, "at most 128 in all"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"prefill_chunk_size": 0}, "--prefill-chunk-size: got 0"),
        ({"num_blocks": 0}, "num_blocks"),
    ],
)
def test_bad_values_are_refused(folder, given, message):
    with pytest.raises(ConfigError, match=message):
        ssa.generate(folder, PROMPT, **given)


def test_an_opened_model_needs_its_tokenizer(opened):
    with pytest.raises(ConfigError, match="tokenizer: got None"):
        ssa.generate(opened[0], PROMPT)


def test_a_stock_model(folder, opened, tmp_path):
    from ..model.interface.stock import stock

    model, tokenizer = stock(vocab_size=270), opened[1]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = ssa.generate(tmp_path, PROMPT, mode="sparse", num_blocks=2, max_new_tokens=8)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    ssa.configure(model, num_blocks=2)
    fixed = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, use_cache=False, **fixed)
    assert done.text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    for refused in ({"report_mass": True}, {"max_dropped_mass": 0.1}):
        with pytest.raises(ConfigError, match="a model of type llama"):
            ssa.generate(tmp_path, PROMPT, max_new_tokens=8, **refused)
