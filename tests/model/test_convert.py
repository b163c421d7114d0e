"""Other checkpoints as ours and back: the same logits, tensor for tensor, and everything hostile or broken refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

import ssa
from ssa.cli import main
from ssa.errors import CheckpointError, ConfigError, DiskError
from ssa.model import convert, load_model
from ssa.model.convert import convert_checkpoint

from .interface.stock import logits, plain, stock, tokens

FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {}),
}


def randomise_small(model: Any) -> Any:
    """Biases and norms too: initial zeros and ones would hide a lost tensor."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(randomise_small(plain()), tmp_path / "source")


def save(model: Any, folder: Path, **keywords: Any) -> Path:
    model.save_pretrained(folder, **keywords)
    return folder


# ---------------------------------------------------------------------- the same function
@pytest.mark.parametrize("family", FAMILIES)
def test_full_mode_is_the_function_that_was(family: str, tmp_path: Path) -> None:
    kind, changes = FAMILIES[family]
    model, ids = randomise_small(plain(kind, **changes)), tokens(2, 40)
    done = convert_checkpoint(save(model, tmp_path / "a"), tmp_path / "b", num_blocks=3, block_size=4)
    assert done.difference is not None
    assert done.difference < 1e-4
    ours = load_model(tmp_path / "b")
    assert (ours.config.inference_mode, ours.config.method, ours.config.gated) == ("full", "ssa", False)
    torch.testing.assert_close(logits(ours, ids), logits(model, ids), atol=5e-5, rtol=1e-5)
    with ours.attention_mode("sparse"):  # the new thing: the same weights run sparse, as the drop-in runs them
        found = logits(ours, ids)
    drop_in = ssa.configure(model, block_size=4, num_blocks=3)
    torch.testing.assert_close(found, logits(drop_in, ids), atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(logits(load_model(tmp_path / "a"), ids), logits(ours, ids), atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_and_back(family: str, tmp_path: Path) -> None:
    kind, changes = FAMILIES[family]
    model = save(randomise_small(plain(kind, **changes)), tmp_path / "a")
    convert_checkpoint(model, tmp_path / "b")
    convert_checkpoint(tmp_path / "b", tmp_path / "c", to="plain")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert before.keys() == after.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    assert not [key for key in again.config.to_dict() if key.startswith("ssa")]
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    torch.testing.assert_close(logits(again, tokens(1, 40)), logits(same, tokens(1, 40)), atol=0, rtol=0)


def test_shards_stay_shards_and_are_hashed(tmp_path: Path) -> None:
    model = save(plain(), tmp_path / "a", max_shard_size="20KB")
    assert len(list(model.glob("*.safetensors"))) > 2
    convert_checkpoint(model, tmp_path / "b")
    record = json.loads((tmp_path / "b" / "conversion.json").read_text())
    assert set(record["sha256"]) == {file.name for file in (tmp_path / "b").glob("*.safetensors")}
    torch.testing.assert_close(logits(load_model(tmp_path / "b"), tokens(1, 9)), logits(plain(), tokens(1, 9)))


def test_stock_keeps_the_architecture(tmp_path: Path) -> None:
    model = save(plain(Phi3Config), tmp_path / "a")
    convert_checkpoint(model, tmp_path / "b", to="stock", block_size=4, num_blocks=3, mode="sparse")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert found.config._attn_implementation == "ssa"
    assert torch.equal(logits(found, tokens(1, 30)), logits(stock(Phi3Config), tokens(1, 30)))


def test_settings_of_a_drop_in_model_are_kept(tmp_path: Path) -> None:
    save(stock(settings={"num_blocks": 2, "alignment_weight": 3.0}), tmp_path / "a")
    config = load_model(tmp_path / "a").config
    assert (config.inference_mode, config.block_size, config.num_blocks) == ("sparse", 4, 2)
    assert config.alignment_weight == 3.0


# ---------------------------------------------------------------------- published checkpoints
H, K, D, C, S, BLOCKS, WINDOW = 4, 2, 8, 32, 4, 4, 6
OFFICIAL = {
    "model_type": "llama-nsa",
    "architectures": ["LlamaNSAForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_llama_nsa.LlamaNSAConfig"},
    "vocab_size": 97,
    "hidden_size": C,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": D,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "block_size": S,
    "block_counts": BLOCKS,
    "window_size": 0,
}


def published(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """A checkpoint in the published form with random weights."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    tensors = {"model.embed_tokens.weight": random(97, C), "model.norm.weight": 1 + random(C)}
    for i in range(2):
        shapes = {"q_proj": (H * D, C), "k_proj": (K * D, C), "v_proj": (K * D, C), "o_proj": (C, H * D)}
        for name, shape in {**shapes, "g_proj": (3 * H, C)}.items():
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = random(*shape)
        for name, shape in {"gate_proj": (48, C), "up_proj": (48, C), "down_proj": (C, 48)}.items():
            tensors[f"model.layers.{i}.mlp.{name}.weight"] = random(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = 1 + random(C)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**OFFICIAL, **changes}))
    return tensors


def forward(w: dict[str, Tensor], ids: Tensor, mode: str) -> Tensor:
    """The published model from its formulas, one token and head at a time; nothing of ours is used.

    ``mode``: full, sparse (with an exact top-k) or nsa.
    """

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    T = len(ids)
    frequencies = 500000.0 ** (-torch.arange(0, D, 2) / D)
    angles = torch.outer(torch.arange(T).float(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [T, 1, D/2]: dimension i turns with i + D/2

    def rope(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(2):
        p = f"model.layers.{i}."
        y = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = ((y @ w[f"{p}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, D)) for n in "qkv")
        q, k = rope(q), rope(k)
        gate = (y @ w[p + "self_attn.g_proj.weight"].T).view(T, H, 3).sigmoid()
        out = torch.zeros(T, H, D)
        for t in range(T):
            for g in range(K):
                heads = range(g * H // K, (g + 1) * H // K)
                chosen = select(q, k, t, g, heads)
                for h in heads:
                    out[t, h] = one_query(q[t, h], k[:, g], v[:, g], t, chosen, gate[t, h], mode)
        x = x + out.flatten(1) @ w[p + "self_attn.o_proj.weight"].T
        y = norm(x, w[p + "post_attention_layernorm.weight"])
        inner = torch.nn.functional.silu(y @ w[p + "mlp.gate_proj.weight"].T) * (y @ w[p + "mlp.up_proj.weight"].T)
        x = x + inner @ w[p + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


def means(x: Tensor, t: int) -> Tensor:
    """Mean of each complete block up to token t, [blocks, D]."""
    return x[: (t + 1) // S * S].view(-1, S, D).mean(1)


def select(q: Tensor, k: Tensor, t: int, g: int, heads: range) -> list[int]:
    """The own block and the best of the earlier ones; their score is a sum over the group's heads."""
    pooled, own = means(k[:, g], t), t // S
    score = torch.zeros(own)
    for h in heads:
        if len(pooled):
            score += (pooled @ q[t, h] * D**-0.5).softmax(0)[:own]
    return [own, *score.topk(min(BLOCKS - 1, own)).indices.tolist()]


def one_query(q: Tensor, k: Tensor, v: Tensor, t: int, chosen: list[int], gate: Tensor, mode: str) -> Tensor:
    def attend(keys: Tensor, values: Tensor) -> Tensor:
        return (keys @ q * D**-0.5).softmax(0) @ values if len(keys) else torch.zeros(D)

    selected = [j for j in range(t + 1) if mode == "full" or j // S in chosen]
    out = gate[1] * attend(k[selected], v[selected])
    if mode == "nsa":
        out = out + gate[0] * attend(means(k, t), means(v, t))
        window = slice(max(0, t - WINDOW + 1), t + 1)
        out = out + gate[2] * attend(k[window], v[window])
    return out


@pytest.mark.parametrize("mode", ["full", "sparse", "nsa"])
def test_a_published_checkpoint_computes_its_formulas(mode: str, tmp_path: Path) -> None:
    changes = {"window_size": WINDOW} if mode == "nsa" else {"inference_mode": mode}
    weights, ids = published(tmp_path / "a", **changes), tokens(1, 30)
    expected = forward(weights, ids[0], mode)
    direct = load_model(tmp_path / "a", selection_rule="exact")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", official=True, selection_rule="exact")
    for model in (direct, load_model(tmp_path / "b")):
        assert model.config.method == ("nsa" if mode == "nsa" else "ssa")
        torch.testing.assert_close(logits(model, ids)[0], expected, atol=2e-4, rtol=1e-4)


def test_published_checkpoints_rank_blocks_as_they_were_trained(tmp_path: Path) -> None:
    published(tmp_path / "a")
    model = load_model(tmp_path / "a")
    assert model.config.sparse_spec().rule == "official"
    long = tokens(1, 200)
    exact = load_model(tmp_path / "a", selection_rule="exact")
    assert not torch.allclose(logits(model, long), logits(exact, long), atol=1e-2)
    assert torch.allclose(logits(model, long[:, :16]), logits(exact, long[:, :16]))  # one chunk sees no merge


@pytest.mark.parametrize("nsa", [False, True])
def test_export_in_the_published_form(nsa: bool, tmp_path: Path) -> None:
    before = published(tmp_path / "a", window_size=WINDOW if nsa else 0)
    convert_checkpoint(tmp_path / "a", tmp_path / "b")
    convert_checkpoint(tmp_path / "b", tmp_path / "c", to="official")
    after = load_file(tmp_path / "c" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if name.endswith("g_proj.weight") and not nsa:  # the columns that SSA does not read come back as zeros
            assert after[name].view(H, 3, C)[:, 1].equal(tensor.view(H, 3, C)[:, 1])
            assert not after[name].view(H, 3, C)[:, [0, 2]].any()
        else:
            assert after[name].equal(tensor)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert {key: config[key] for key in OFFICIAL if key not in ("auto_map", "window_size")} == {
        key: value for key, value in OFFICIAL.items() if key not in ("auto_map", "window_size")
    }
    assert config["window_size"] == (WINDOW if nsa else 0)


# ---------------------------------------------------------------------- the command
def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(tmp_path / "out"), "--num-blocks", "4"]) == 0
    assert "differ by at most" in capsys.readouterr().out
    assert load_model(tmp_path / "out").config.num_blocks == 4
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert "something there already" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "x"), "--from-official"]) == 2
    assert "a published checkpoint" in capsys.readouterr().err
    assert main(["convert", "nobody/nothing", str(tmp_path / "x")]) == 2
    assert "--download" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "x"), "--to", "stock", "--method", "ssa"]) == 2
    assert "--to stock does not have" in capsys.readouterr().err


def test_a_failed_conversion_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(convert, "save_file", broken)
        with pytest.raises(DiskError, match="a full disk"):
            convert_checkpoint(source, tmp_path / "out")
    monkeypatch.setattr(convert, "translate_tensor", lambda name, tensor, *_: tensor * 1.01)
    with pytest.raises(CheckpointError, match="logits that differ"):
        convert_checkpoint(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_bad_disk_is_noticed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flipped(tensors: dict[str, Tensor], file: Path, **keywords: Any) -> None:
        save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, file, **keywords)

    monkeypatch.setattr(convert, "save_file", flipped)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: got other values"):
        convert_checkpoint(source, tmp_path / "out", check=False)


# ---------------------------------------------------------------------- what is refused
def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2'; expected one of"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window: got 64"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal"),
    ],
)
def test_configurations_that_are_refused(source: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(source, **changes)
    with pytest.raises(ConfigError, match=message):
        convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        load_model(source)


def test_forms_that_do_not_exist(tmp_path: Path) -> None:
    published(tmp_path / "gated")
    save(plain(), tmp_path / "stock")
    with pytest.raises(ConfigError, match="a gated model; expected an ungated"):
        convert_checkpoint(tmp_path / "gated", tmp_path / "out", to="plain")
    with pytest.raises(ConfigError, match="a model without a gate"):
        convert_checkpoint(tmp_path / "stock", tmp_path / "out", to="official")
    with pytest.raises(ConfigError, match="expected a stock architecture"):
        convert_checkpoint(tmp_path / "gated", tmp_path / "out", to="stock")


def test_a_tied_head_that_is_another_matrix(source: Path, tmp_path: Path) -> None:
    edit_config(source, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="an lm_head other than the embedding"):
        convert_checkpoint(source, tmp_path / "out")


def test_a_format_of_the_future(tmp_path: Path) -> None:
    convert_checkpoint(save(plain(), tmp_path / "a"), tmp_path / "b", check=False)
    edit_config(tmp_path / "b", ssa_format=2)
    with pytest.raises(ConfigError, match="ssa_format: got 2; expected a format up to 1"):
        load_model(tmp_path / "b")


@pytest.mark.parametrize(
    "name", ["../source/model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "..", "a\\b.safetensors", ""]
)
def test_an_index_that_leaves_the_folder(source: Path, name: str) -> None:
    index = {"weight_map": {"model.norm.weight": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="unsafe shard path"):
        load_model(source)


def test_a_link_that_leaves_the_folder(source: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (source / "model.safetensors").rename(outside)
    (source / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="unsafe shard path"):
        load_model(source)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_of_another_form(source: Path, index: str) -> None:
    (source / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="weight_map"):
        load_model(source)


def test_an_index_that_lies(tmp_path: Path) -> None:
    folder = save(plain(), tmp_path / "a", max_shard_size="20KB")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 tensors: model\.norm\.weight"):
        load_model(folder)
    next(iter(folder.glob("*.safetensors"))).unlink()
    with pytest.raises(CheckpointError, match="no file model-"):
        load_model(folder)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1])
def test_a_header_that_lies(source: Path, length: int) -> None:
    file = source / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=f"a header of {length} bytes"):
        load_model(source)


def test_tensors_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    file = source / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "mlp" not in name}, file)
    with pytest.raises(CheckpointError, match=r"6 missing keys: (model\.layers\.\d\.mlp\.\w+\.weight(, )?){5};"):
        convert_checkpoint(source, tmp_path / "out")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight: got non-finite"):
        convert_checkpoint(source, tmp_path / "out")
