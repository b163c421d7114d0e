"""Pieces: their order, and that each of them can be trained and evaluated as planned."""

from collections import Counter

import pytest

from ssa.errors import ConfigError
from ssa.reproduce import SCALES, pieces
from ssa.train.recipe_file import load_recipe


def test_pieces_come_in_order_of_importance():
    found = pieces(SCALES["small"])
    assert [(p.variant, p.seed) for p in found[:4]] == [("ssa", 0), ("full", 0), ("moba", 0), ("ssa", 1)]
    first = {p.variant: number for number, p in reversed([*enumerate(found)])}
    order = ["ssa", "sampled-8", "sparsity-only", "nsa", "sampled-4", "alpha-1"]
    assert sorted(order, key=first.get) == order
    assert len({p.name for p in found}) == len(found)
    counts = Counter(p.variant for p in found)
    assert [counts[name] for name in ("ssa", "sampled-8", "nsa", "sampled-4", "raw")] == [5, 5, 3, 3, 1]


def test_changes_reach_every_recipe_and_a_brief_piece_measures_its_own_budget_alone():
    found = pieces(SCALES["small"], (1,), ("ssa", "alpha-160"), {"optimizer.learning_rate": 3e-4}, brief=True)
    assert {p.load("x", "cpu").optimizer.learning_rate for p in found} == {3e-4}
    assert found[1].load("x", "cpu").model.alignment_weight == 160
    plan = found[0].plan(SCALES["small"])
    assert (plan.budgets, plan.suite) == ((16,), None)
    with pytest.raises(ConfigError, match="learning_rat"):
        pieces(SCALES["small"], changes={"optimizer.learning_rat": 1})


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
