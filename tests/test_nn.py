"""``ssa.nn.SSAAttention``: compared with the model's own layer; usable without transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ssa.documents import DocumentLayout
from ssa.errors import InputError
from ssa.model import SSAConfig
from ssa.model.modeling import SSAForCausalLM
from ssa.nn import SSAAttention
from ssa.ops import AlignmentSpec, SparseSpec

SPEC = SparseSpec(4, 3)


def layer(**changes: object) -> SSAAttention:
    torch.manual_seed(0)
    made = SSAAttention(32, 4, 2, spec=SPEC, **changes)  # type: ignore[arg-type]
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def tokens_in(length: int = 30) -> torch.Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("gated", [True, False])
def test_it_is_the_models_layer(mode: str, gated: bool) -> None:
    """A model of one layer with an identity around it would be this; here its attention alone is run."""
    made = layer(mode=mode, gated=gated)
    sizes = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "block_size": 4, "num_blocks": 3, "vocab_size": 8}
    model = SSAForCausalLM(SSAConfig(**sizes, **heads, gated=gated, inference_mode=mode)).eval()
    attention = model.model.layers[0].self_attn
    attention.load_state_dict(made.state_dict())
    found: list[torch.Tensor] = []
    attention.o_proj.register_forward_hook(lambda _, __, out: found.append(out))
    x, norm = tokens_in(), model.model.layers[0].input_layernorm
    with torch.no_grad():
        model(inputs_embeds=x)
        torch.testing.assert_close(made(norm(x)), found[0], atol=1e-5, rtol=1e-5)


def test_training_gives_the_alignment_and_both_streams_learn() -> None:
    made, x = layer(alignment=AlignmentSpec(100.0)), tokens_in()
    for stream in ("full", "sparse"):
        made.mode = stream
        out, alignment = made(x, stream=stream)
        torch.testing.assert_close(out, made(x), atol=1e-5, rtol=1e-5)  # the main stream is what comes out
        assert 0 < float(alignment.attention_sparsity) < 1
        alignment.loss.backward()
        assert made.q_proj.weight.grad is not None
        assert made.q_proj.weight.grad.abs().sum() > 0
        made.zero_grad()


def test_documents_do_not_see_each_other() -> None:
    made, x = layer(), tokens_in()[:1]
    packed = made(x, DocumentLayout.from_lengths([11, 19]))
    for part, document in zip(packed.split([11, 19], 1), x.split([11, 19], 1), strict=True):
        torch.testing.assert_close(part, made(document), atol=1e-5, rtol=1e-5)


def test_a_budget_over_all_blocks_is_full_attention() -> None:
    made, x = layer(mode="full", bias=True), tokens_in()
    full = made(x)
    made.mode, made.spec = "sparse", SparseSpec(4, 8)
    torch.testing.assert_close(made(x), full, atol=1e-5, rtol=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="a multiple of KV heads"):
        SSAAttention(32, 4, 3)
    with pytest.raises(InputError, match="even with RoPE"):
        SSAAttention(36, 4)
    with pytest.raises(InputError, match="'dense'; expected 'full' or 'sparse'"):
        layer(mode="dense")
    with pytest.raises(InputError, match="'both'"):
        layer()(tokens_in(), stream="both")  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"expected \[B, T, 32\]"):
        layer()(torch.zeros(2, 32))
    with pytest.raises(InputError, match="the layout's"):
        layer()(tokens_in(), DocumentLayout.single(2, 31))


def test_it_needs_torch_only() -> None:
    code = "import ssa.nn, sys; assert not {'transformers', 'datasets', 'tyro'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
