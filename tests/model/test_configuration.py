import pytest

from ssa.errors import ConfigError
from ssa.model import METHODS, SSAConfig

from .tiny import tiny_config


@pytest.mark.parametrize(("method", "expected"), METHODS.items())
def test_a_method_sets_stream_probability_and_alignment_weight(method, expected):
    config = tiny_config(method=method)
    assert (config.full_probability, config.alignment_weight) == expected


def test_values_given_outright_win_over_the_method():
    config = tiny_config(method="ssa", full_probability=0.25, alignment_weight=40.0)
    assert (config.full_probability, config.alignment_weight) == (0.25, 40.0)


def test_paper_defaults():
    config = SSAConfig()
    assert (config.block_size, config.num_blocks, config.selection_rule) == (16, 16, "exact")
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert config.tie_word_embeddings
    assert config.gated


def test_a_saved_configuration_comes_back_equal(tmp_path):
    config = tiny_config(method="nsa", inference_mode="sparse", window_size=7, selection_rule="official", num_blocks=2)
    config.save_pretrained(tmp_path)
    assert SSAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "mobo"}, "SSAConfig.method: got 'mobo'; expected one of"),
        ({"inference_mode": "dense"}, "SSAConfig.inference_mode: got 'dense'"),
        ({"full_probability": 1.2}, r"SSAConfig.full_probability: got 1.2; expected a number in \[0, 1\]"),
        ({"full_probability": float("nan")}, "SSAConfig.full_probability: got nan"),
        ({"alignment_weight": -1.0}, "AlignmentSpec.weight: got -1.0"),
        ({"alignment_distance": "l1"}, "AlignmentSpec.distance: got 'l1'"),
        ({"block_size": 24}, "SparseSpec.block_size: got 24"),
        ({"num_blocks": 0}, "SparseSpec.num_blocks: got 0"),
        ({"num_key_value_heads": 3}, "4 query heads and 3 KV heads"),
        ({"method": "nsa", "inference_mode": "full"}, "method 'nsa'"),
        ({"method": "nsa", "gated": False}, "SSAConfig.gated: got False"),
    ],
)
def test_values_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)
