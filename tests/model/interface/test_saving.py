"""The name of our attention: known after `import ssa`, saved with the model, missed where the package is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

import ssa

from .stock import logits, plain, stock, tokens


def saved(model: torch.nn.Module, folder: Path) -> dict[str, object]:
    model.save_pretrained(folder)  # type: ignore[operator]
    return json.loads((folder / "config.json").read_text())


def test_the_setting_survives_saving(tmp_path: Path) -> None:
    model, ids = stock(settings={"num_blocks": 2}), tokens(2, 30)
    assert saved(model, tmp_path / "a")["attn_implementation"] == "ssa"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert again.config._attn_implementation == "ssa"
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert saved(again, tmp_path / "b")["ssa_num_blocks"] == 2  # and the second time, after it ran
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), ids), logits(model, ids))


def test_the_argument_of_from_pretrained(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path / "a")
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="ssa"), tokens(1, 300)
    with ssa.attention_mode(model, "sparse", num_blocks=16, block_size=16):
        expected = logits(model, ids)
    assert torch.equal(logits(model, ids), expected)  # the defaults
    assert saved(model, tmp_path / "b")["attn_implementation"] == "ssa"


def test_without_the_package_loading_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(stock(), tmp_path)
    monkeypatch.delitem(AttentionInterface._global_mapping, "ssa")
    with pytest.raises(ValueError, match='attn_implementation="ssa"` is not supported'):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_restore_leaves_a_plain_checkpoint(tmp_path: Path) -> None:
    model = ssa.restore(stock())
    assert not [key for key in saved(model, tmp_path) if key.startswith("ssa_") or key == "attn_implementation"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, tokens(1, 9)), logits(plain(), tokens(1, 9)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lines", ["import transformers, ssa", "import ssa; ssa.register()"])
def test_importing_is_registering(lines: str) -> None:
    code = f"{lines}\nfrom transformers import AttentionInterface, AttentionMaskInterface\n"
    code += "assert 'ssa' in AttentionInterface() and 'ssa' in AttentionMaskInterface()"
    subprocess.run([sys.executable, "-c", code], check=True)
