"""The contracts of the whole model: isolation, causality, equal modes at full budget, both streams trained."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from ssa import DocumentLayout
from ssa.errors import ConfigError, InputError
from ssa.model import METHODS, SSAConfig, SSAForCausalLM
from ssa.ops.dual import api

from .tiny import VOCABULARY, tiny_model, tokens

MODES = [("ssa", "full"), ("ssa", "sparse"), ("nsa", "sparse")]
LAYOUT = DocumentLayout.from_lengths([[13, 1, 16], [5, 25]])


def logits(model, ids, **given):
    with torch.no_grad():
        return model(ids, **given).logits


@pytest.mark.parametrize(("method", "mode"), MODES)
def test_another_document_changes_no_bit(method, mode):
    model, ids = tiny_model(method=method, inference_mode=mode), tokens(2, 30)
    before = logits(model, ids, layout=LAYOUT)
    changed = ids.clone()
    changed[0, :13] = tokens(13, seed=5)
    after = logits(model, changed, layout=LAYOUT)
    assert torch.equal(before[0, 13:], after[0, 13:])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, :13], after[0, :13])


@pytest.mark.parametrize(("method", "mode"), MODES)
def test_the_future_changes_no_bit_of_the_past(method, mode):
    model, ids = tiny_model(method=method, inference_mode=mode), tokens(1, 30)
    before = logits(model, ids)
    for t in range(1, 30):  # every position, so inside the query's own block too
        changed = ids.clone()
        changed[0, t] = ids[0, t] % (VOCABULARY - 1) + 1
        assert torch.equal(before[0, :t], logits(model, changed)[0, :t]), t


@pytest.mark.parametrize(("method", "mode"), MODES)
def test_packed_documents_equal_separate_ones(method, mode):
    model, ids = tiny_model(method=method, inference_mode=mode), tokens(2, 30)
    packed = logits(model, ids, layout=LAYOUT)
    for row, start, length in ((0, 0, 13), (0, 14, 16), (1, 5, 25)):
        alone = logits(model, ids[row : row + 1, start : start + length])
        torch.testing.assert_close(packed[row, start : start + length], alone[0], atol=1e-5, rtol=1e-5)


def test_left_padding_changes_nothing():
    model, ids = tiny_model(), tokens(1, 22)
    padded = F.pad(ids, (7, 0))
    mask = (torch.arange(29) >= 7).long()[None]
    torch.testing.assert_close(
        logits(model, padded, attention_mask=mask)[:, 7:], logits(model, ids), atol=1e-5, rtol=1e-5
    )


def test_a_budget_over_all_blocks_makes_sparse_equal_full():
    model, ids = tiny_model(), tokens(2, 30)
    with model.attention_mode("full"):
        full = logits(model, ids)
    with model.attention_mode("sparse", num_blocks=8):
        torch.testing.assert_close(logits(model, ids), full, atol=1e-5, rtol=1e-5)
    out = tiny_model(num_blocks=8)(ids, labels=ids, stream="full")
    assert float(out.alignment) < 1e-9
    assert out.attention_sparsity.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_both_streams_give_the_loss_of_their_own_mode():
    model, ids = tiny_model(alignment_weight=0.0), tokens(2, 30)
    for stream in ("full", "sparse"):
        with model.attention_mode(stream), torch.no_grad():
            assert model(ids, labels=ids, stream=stream).loss == model(ids, labels=ids).loss


@pytest.mark.parametrize("stream", ["full", "sparse"])
def test_loss_is_cross_entropy_plus_weighted_mean_over_layers(stream):
    model, ids = tiny_model(alignment_weight=7.0), tokens(2, 30)
    out = model(ids, labels=ids, layout=LAYOUT, stream=stream, alignment_scale=0.5)
    aligned = 7.0 * 0.5 * (out.sparsity_loss + out.commitment_loss).mean()
    torch.testing.assert_close(out.loss.detach(), out.cross_entropy + aligned)
    torch.testing.assert_close(out.alignment, aligned)
    assert out.sparsity_loss.shape == (2,)


def test_a_sparse_step_aligns_rows_sampled_by_seed_and_layer(monkeypatch):
    seeds, sample = [], api.sample_rows
    monkeypatch.setattr(api, "sample_rows", lambda *x: seeds.append(x[2]) or sample(*x))
    model, ids = tiny_model(align_query_fraction=0.25).train(), tokens(2, 30)
    results = [model(ids, labels=ids, layout=LAYOUT, stream="sparse", sample_seed=seed) for seed in (5, 5, 6)]
    assert seeds == [5, 6, 5, 6, 6, 7], "every layer adds its number"
    assert torch.equal(results[0].loss, results[1].loss)
    assert not torch.equal(results[0].alignment, results[2].alignment)
    results[0].loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    exact = tiny_model().train()(ids, labels=ids, layout=LAYOUT, stream="full")
    assert torch.equal(model(ids, labels=ids, layout=LAYOUT, stream="full").loss, exact.loss), "full steps are exact"
    with pytest.raises(InputError, match="seed"):
        model(ids, labels=ids, stream="sparse")


def test_labels_stop_at_documents_and_minus_100():
    model, ids = tiny_model(), tokens(2, 30)
    labels = ids.clone()
    labels[1, 20:] = -100
    targets = LAYOUT.next_token_labels(labels)
    assert (targets[0, [12, 13, 29]] == -100).all()
    out = model(ids, labels=labels, layout=LAYOUT)
    expected = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(out.loss, expected)
    summed = model(ids, labels=labels, layout=LAYOUT, num_items_in_batch=10).loss
    torch.testing.assert_close(summed, expected * (targets != -100).sum() / 10)


def test_no_target_at_all_gives_zero_loss():
    model, ids = tiny_model(), tokens(1, 10)
    out = model(ids, labels=torch.full_like(ids, -100))
    assert float(out.loss.detach()) == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_learns(method):
    model, ids = tiny_model(method=method).train(), tokens(2, 30)
    model(ids, labels=ids, layout=LAYOUT, stream="full" if method == "full" else "sparse").loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_auxiliary_stream_reaches_the_weights():
    """With labels that count nowhere only the alignment is left, and it must reach q, k, v and the gate."""
    for stream in ("full", "sparse"):
        model, ids = tiny_model().train(), tokens(2, 30)
        model(ids, labels=torch.full_like(ids, -100), stream=stream).loss.backward()
        attention = model.model.layers[0].self_attn
        for name in ("q_proj", "k_proj", "v_proj", "g_proj"):
            assert getattr(attention, name).weight.grad.abs().sum() > 0, (stream, name)


@pytest.mark.parametrize("stream", ["full", "sparse"])
def test_activation_checkpointing_gives_equal_gradients(stream):
    ids, gradients = tokens(2, 30), []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, layout=LAYOUT, stream=stream).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-6)


def test_nsa_is_the_gated_sum_of_three_branches():
    from ssa.ops import SparseSpec, compressed_attention, select_blocks, sparse_attention, window_attention

    model = tiny_model(method="nsa", num_hidden_layers=1, window_size=6)
    attention, seen = model.model.layers[0].self_attn, {}
    attention.register_forward_hook(lambda _, given, out: seen.update(out=out[0]))
    attention.g_proj.register_forward_hook(lambda _, given, out: seen.update(gate=torch.sigmoid(out)))
    with model.observe_attention(lambda layer, q, k, v, layout: seen.update(q=q, k=k, v=v)):
        logits(model, tokens(2, 30), layout=LAYOUT)
    q, k, v = seen["q"], seen["k"], seen["v"]
    gate = seen["gate"].view(2, 30, 4, 3, 1)
    indices = select_blocks(q, k, SparseSpec(4, 3), LAYOUT)
    expected = gate[..., 0, :] * compressed_attention(q, k, v, 4, LAYOUT)
    expected = expected + gate[..., 1, :] * sparse_attention(q, k, v, indices, 4, LAYOUT)
    expected = expected + gate[..., 2, :] * window_attention(q, k, v, 6, LAYOUT)
    torch.testing.assert_close(seen["out"], expected)


def test_mode_and_budget_change_at_run_time_and_come_back():
    model, ids = tiny_model(), tokens(1, 30)
    sparse = logits(model, ids)
    with model.attention_mode("full"):
        full = logits(model, ids)
    with model.attention_mode(num_blocks=1):
        one = logits(model, ids)
    assert not torch.allclose(sparse, full, atol=1e-3)
    assert not torch.allclose(sparse, one, atol=1e-3)
    assert torch.equal(logits(model, ids), sparse)
    model.config.inference_mode = "full"
    assert torch.equal(logits(model, ids), full)
    with pytest.raises(ConfigError, match="inference_mode"), model.attention_mode("dense"):
        pass
    assert model.config.inference_mode == "full"


@pytest.mark.parametrize("method", METHODS)
def test_saved_models_come_back_through_auto_classes(method, tmp_path):
    model, ids = tiny_model(method=method), tokens(2, 30)
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is SSAForCausalLM
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SSAConfig)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_generate_is_greedy_continuation_in_both_modes():
    model, ids = tiny_model(), tokens(2, 9)
    for mode in ("full", "sparse"):
        with model.attention_mode(mode):
            out = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False, pad_token_id=0)
            expected = ids
            for _ in range(12):
                expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
        assert torch.equal(out, expected), mode


def test_logits_to_keep():
    model, ids = tiny_model(), tokens(1, 12)
    kept = logits(model, ids, logits_to_keep=3)  # a product of another shape may add in another order
    torch.testing.assert_close(kept, logits(model, ids)[:, -3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": tokens(1, 5) + VOCABULARY}, "input_ids: got id"),
        ({"input_ids": tokens(5)}, "input_ids: got torch.int64"),
        ({"input_ids": tokens(1, 5).float()}, "input_ids: got torch.float32"),
        ({}, "both or neither"),
        ({"input_ids": tokens(1, 5), "labels": tokens(1, 4)}, "labels: got shape"),
        ({"input_ids": tokens(1, 5), "stream": "dense"}, "stream: got 'dense'"),
        ({"input_ids": tokens(1, 200)}, "a document of 200 tokens"),
        ({"input_ids": tokens(1, 5), "use_cache": True, "labels": tokens(1, 5)}, "labels: got a value together with a"),
        ({"input_ids": tokens(1, 5), "output_attentions": True}, "keyword output_attentions"),
        ({"input_ids": tokens(1, 5), "layout": DocumentLayout.single(1, 6)}, "layout: got"),
    ],
)
def test_bad_input_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        tiny_model()(**given)


def test_nsa_refuses_the_full_stream():
    with pytest.raises(InputError, match="'full' with method 'nsa'"):
        tiny_model(method="nsa")(tokens(1, 5), labels=tokens(1, 5), stream="full")
    with pytest.raises(ConfigError, match="nsa"), tiny_model(method="nsa").attention_mode("full"):
        pass
