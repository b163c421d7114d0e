"""Pieces: their order, and that each of them can be trained and evaluated as planned."""

import pytest

from ssa.errors import ConfigError
from ssa.reproduce import SCALES, pieces
from ssa.train.recipe_file import load_recipe


def test_core_methods_come_first_seed_by_seed():
    found = pieces(SCALES["small"])
    assert [(p.variant, p.seed) for p in found[:5]] == [("ssa", 0), ("full", 0), ("moba", 0), ("nsa", 0), ("ssa", 1)]
    roles = [p.role for p in found]
    assert roles == sorted(roles, key=["core", "fraction", "ablation"].index)
    assert (roles.count("core"), roles.count("fraction")) == (12, 9)
    assert len({p.name for p in found}) == len(found)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_piece_has_a_valid_recipe_and_plan(scale):
    for piece in pieces(scale, seeds=(3,)):
        recipe = piece.load("somewhere", "cpu")
        assert (recipe.name, recipe.seed, recipe.data.path) == (piece.name, 3, "somewhere")
        plan = piece.plan(scale)
        assert recipe.model.num_blocks in plan.budgets
        assert plan.suite.needle_forms == (scale.forms if piece.role == "core" else ())


def test_ablations_change_what_their_recipes_change():
    found = {p.variant: p for p in pieces(SCALES["small"], (0,))}
    base = load_recipe("small/ssa").model
    for name in (
        "alpha-160",
        "official-top-k",
        "sparsity-only",
        "blocks-8x32",
        "l2",
        "p-0",
        "sampled-8",
        "layer-streams",
    ):
        ablation, own = load_recipe(f"ablations/{name}").model, found[name].load("x", "cpu").model
        keys = ("alignment_weight", "selection_rule", "alignment_directions", "align_query_fraction")
        for key in (*keys, "stream_per_layer", "block_size", "num_blocks"):
            assert getattr(own, key) == getattr(ablation, key), (name, key)
        assert own.hidden_size == base.hidden_size


def test_variants_can_be_chosen():
    assert [p.name for p in pieces(SCALES["tiny"], (5,), ("nsa", "raw"))] == ["nsa-seed5", "raw-seed5"]
    with pytest.raises(ConfigError, match="got sssa"):
        pieces(SCALES["tiny"], only=("sssa",))
