"""Training stock models: the alignment that travels through the outputs' gradient, compared with an explicit loss."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssa
from ssa.errors import InputError

from .stock import logits, ours, plain, stock, tokens

WEIGHT = 50.0  # so that a lost or doubled alignment is most of the gradient


def trained(**settings: Any) -> Any:
    return stock(settings={"alignment_weight": WEIGHT, **settings}, num_hidden_layers=3).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error of a gradient."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - g).norm() / g.norm().clamp(min=1e-12)) for n, g in expected.items())


def explicit(model: Any, ids: Tensor, stream: str) -> tuple[dict[str, Tensor], Any]:
    """Gradients of our own class, which adds the alignment to its loss, with the same weights."""
    twin = ours(model, alignment_weight=WEIGHT).train()
    output = twin(ids, labels=ids, stream=stream)
    output.loss.backward()
    return gradients(twin), output


@pytest.mark.parametrize("stream", ["full", "sparse"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_are_those_of_an_explicit_loss(stream: str, checkpointing: bool | None) -> None:
    model, ids = trained(), tokens(2, 30)
    if checkpointing is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers renames it for version 6
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    expected, output = explicit(model, ids, stream)
    loss = model(ids, labels=ids, stream=stream, use_cache=False).loss
    loss.backward()
    assert error(gradients(model), expected) < 2e-5
    assert loss.item() == pytest.approx(float(output.cross_entropy), rel=1e-5)
    told = ssa.last_alignment(model)
    for name in ("sparsity_loss", "commitment_loss", "attention_sparsity"):
        torch.testing.assert_close(told[name], getattr(output, name), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(told["alignment"], output.alignment, rtol=1e-5, atol=1e-8)


def test_sampled_alignment_draws_the_rows_of_our_own_class() -> None:
    model, ids = trained(align_query_fraction=0.25), tokens(2, 30)
    twin = ours(model, alignment_weight=WEIGHT, align_query_fraction=0.25).train()
    twin(ids, labels=ids, stream="sparse", sample_seed=5).loss.backward()
    model(ids, labels=ids, stream="sparse", sample_seed=5, use_cache=False).loss.backward()
    assert error(gradients(model), gradients(twin)) < 2e-5
    model.zero_grad()
    ssa.set_stream(model, "sparse", sample_seed=5)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert error(gradients(model), gradients(twin)) < 2e-5
    with pytest.raises(InputError, match="seed"):
        model(ids, labels=ids, stream="sparse", use_cache=False)


def test_the_alignment_is_most_of_that_gradient() -> None:
    """Else the test above could not fail."""
    model, ids = trained(), tokens(2, 30)
    expected, _ = explicit(model, ids, "full")
    ssa.configure(model, alignment_weight=0, mode="full")
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert error(gradients(model), expected) > 0.5


def test_micro_batches_add_up_with_their_scale() -> None:
    model, ids = trained(), tokens(4, 30)
    expected, _ = explicit(model, ids, "sparse")
    for row in ids.split(1):
        scales = {"alignment_scale": 0.25, "num_items_in_batch": 4 * 29}
        model(row, labels=row, stream="sparse", use_cache=False, **scales).loss.backward()
    assert error(gradients(model), expected) < 2e-5


def test_a_stream_that_was_set_is_the_keyword() -> None:
    model, ids = trained(), tokens(2, 30)
    expected, _ = explicit(model, ids, "sparse")
    ssa.set_stream(model, "sparse")
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert error(gradients(model), expected) < 2e-5
    model.eval()  # inference does not know the stream
    with ssa.attention_mode(model, "full"):
        torch.testing.assert_close(logits(model, ids), logits(ours(model, inference_mode="full"), ids))


def test_autocast_trains() -> None:
    model, ids = trained(), tokens(2, 30)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, stream="full", use_cache=False).loss
    loss.backward()
    expected, _ = explicit(model, ids, "full")
    assert error(gradients(model), expected) < 0.3  # bfloat16


def test_compiled_code_has_the_same_gradients() -> None:
    model, ids = trained(), tokens(2, 30)
    expected, _ = explicit(model, ids, "full")
    torch.compile(model, backend="aot_eager")(ids, labels=ids, stream="full", use_cache=False).loss.backward()
    assert error(gradients(model), expected) < 2e-5


def test_packed_rows_train_as_documents_alone() -> None:
    model, lengths = trained(), [12, 18]
    ids = tokens(1, 30)
    for document in ids.split(lengths, 1):
        share = document.shape[1] / 30
        model(document, stream="full", alignment_scale=share, use_cache=False).logits.square().sum().backward()
    alone = gradients(model)
    model.zero_grad()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model(ids, position_ids=positions, stream="full", use_cache=False).logits.square().sum().backward()
    assert error(gradients(model), alone) < 2e-5


@pytest.mark.parametrize("family", ["Qwen3Config", "Phi3Config"])
def test_other_families_train_and_their_layers_are_found(family: str) -> None:
    import transformers

    model, ids = stock(getattr(transformers, family)).train(), tokens(1, 30)
    model(ids, labels=ids, stream="sparse", use_cache=False).loss.backward()
    assert ssa.last_alignment(model)["sparsity_loss"].shape == (2,)


# ---------------------------------------------------------------------- what is refused
def test_training_without_a_stream_is_refused() -> None:
    with pytest.raises(InputError, match=r"training without a stream; .* ssa\.set_stream"):
        trained()(tokens(1, 8), use_cache=False)


def test_a_float16_alignment_is_refused() -> None:
    with pytest.raises(InputError, match="float16"), torch.autocast("cpu", torch.float16):
        trained()(tokens(1, 8), stream="full", use_cache=False)


def test_dropout_of_attention_is_refused() -> None:
    model = trained()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(InputError, match=r"attention dropout 0\.1"):
        model(tokens(1, 8), stream="full", use_cache=False)


def test_asking_for_an_alignment_before_there_is_one() -> None:
    with pytest.raises(InputError, match="aligned nothing"):
        ssa.last_alignment(ssa.configure(plain()))
