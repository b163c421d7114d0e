"""Figures: that they are drawn, what they need, and that the palette keeps its promise."""

import itertools
import math
import warnings

import numpy as np
import pytest

from ssa.report.curves import training_curve
from ssa.report.plots import all_figures, budget_figure, layer_figure, selection_figure, training_figure, visible_shares
from ssa.report.results import Metrics, SelectionMap, Step, parse_evaluation
from ssa.report.runs import METHODS, Run, discover, group_runs
from ssa.report.style import COLOURS, MARKERS, SCALE, _spread


def _groups(*documents):
    return group_runs(Run(parse_evaluation(document, str(i))) for i, document in enumerate(documents))


def _size(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


@pytest.fixture(autouse=True)
def _no_warnings():
    """A layout that collapses or a glyph that is missing only warns; here it fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_all_figures_of_three_methods_with_two_seeds(runs):
    figures = all_figures(group_runs(discover([runs])))
    assert [figure.name for figure in figures] == ["budget", "training", "layers", "selection"]
    for figure in figures:
        width, height = _size(figure.png)
        assert abs(width - SCALE * figure.width) <= SCALE
        assert abs(height - SCALE * figure.height) <= SCALE
        assert figure.caption
    assert "bands span the seeds" in figures[0].caption


def test_a_figure_without_data_is_not_drawn(evaluation):
    bare = evaluation("ssa", 0)
    bare.update(runs=[], attention=[], selection_map=None)
    assert all_figures(_groups(bare)) == []


def test_hard_cases_are_drawn(evaluation):
    hostile = evaluation("ssa", 0, name=r"$\frac{$ [x] \undefined " + "long " * 40)
    hostile["runs"][0]["perplexity"] = 4000.0  # a range that wants a logarithmic axis
    hostile["runs"].append({**hostile["runs"][1], "block_size": 32, "num_blocks": 2})
    hostile["runs"][2]["perplexity"] = math.inf
    hostile["selection_map"]["picked_share"] = [[1.0]]
    hostile["attention"][0]["layers"] = hostile["attention"][0]["layers"][:1]
    single = evaluation("moba", 0)
    single["runs"] = single["runs"][1:2]
    groups = _groups(hostile, evaluation("ssa", 0), single, evaluation("nsa", 0))
    for draw in (budget_figure, layer_figure, selection_figure):
        assert draw(groups)


def test_the_future_is_no_block_that_was_never_picked():
    shown = visible_shares(SelectionMap(0, 0, 16, ((1.0, 0.0), (0.0, 1.0))))
    np.testing.assert_array_equal(shown, [[1.0, np.nan], [0.0, 1.0]])


def _metrics(values, stream="full", every=10):
    steps = tuple(Step(i, i * every, stream, value, math.nan, math.nan) for i, value in enumerate(values, 1))
    return Metrics("x", "x", "full", 0, 1, steps)


def test_a_curve_follows_its_stream_and_leaves_out_what_is_not_finite():
    curve = training_curve([_metrics([2.0] * 50 + [math.nan, math.inf] + [2.0] * 50)], "cross_entropy", "full")
    np.testing.assert_allclose(curve.mean, 2.0)
    assert len(curve.raw) == 100
    assert training_curve([_metrics([1.0] * 9)], "cross_entropy", "sparse") is None
    assert training_curve([_metrics([1.0] * 9)], "alignment") is None
    assert training_curve([_metrics([1.0])], "cross_entropy") is None


def test_a_straight_line_stays_straight_and_noise_is_smoothed():
    ramp = np.arange(1.0, 401.0)
    curve = training_curve([_metrics(ramp)], "cross_entropy")
    np.testing.assert_allclose(curve.mean[20:-20], curve.tokens[20:-20] / 10, rtol=1e-9)
    noise = np.where(np.arange(400) % 2, 1.0, -1.0)
    assert np.abs(training_curve([_metrics(noise)], "cross_entropy").mean).max() < 0.15


def test_seeds_make_a_mean_and_a_band_where_they_overlap():
    curve = training_curve([_metrics([1.0] * 100), _metrics([3.0] * 50)], "cross_entropy")
    np.testing.assert_allclose([curve.low, curve.mean, curve.high], [[1.0] * 240, [2.0] * 240, [3.0] * 240])
    assert curve.tokens[-1] == 500


def test_a_training_of_one_stream_only_is_drawn(metrics, write_run, tmp_path):
    write_run(tmp_path / "run", None, metrics("full", 0, steps=40))
    figure = training_figure(group_runs(discover([tmp_path])))
    assert "On the right" not in figure.caption


def test_labels_are_moved_apart_and_keep_their_order():
    places = [0.10, 0.11, 0.12, 0.60, 0.95]
    moved = _spread(list(places), gap=0.05)
    assert min(b - a for a, b in itertools.pairwise(moved)) >= 0.05 - 1e-9
    assert moved[3:] == places[3:], "labels with room stay where they are"
    assert sum(moved[:3]) == pytest.approx(sum(places[:3]))
    assert _spread([], 0.1) == []


#: Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def _linear(colour):
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _lab(linear):
    xyz = XYZ @ np.clip(linear, 0, 1) / XYZ.sum(1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_stay_apart_for_every_eye(deficiency):
    seen = {name: _lab(np.array(DEFICIENCIES[deficiency]) @ _linear(value)) for name, value in COLOURS.items()}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 25, f"{a} and {b} look alike"


def test_colours_are_legible_on_white_and_every_method_has_its_own():
    assert set(COLOURS) == set(MARKERS) == set(METHODS)
    assert len(set(COLOURS.values())) == len(set(MARKERS.values())) == len(METHODS)
    for value in COLOURS.values():
        assert 1.05 / (float(XYZ[1] @ _linear(value)) + 0.05) >= 3, "WCAG's contrast for graphics"
