"""The headline table: numbers, ranges, and literal text in the terminal."""

import io
import math

import pytest
from rich.console import Console

from ssa.report import formats, render_table
from ssa.report.results import parse_evaluation
from ssa.report.runs import Run, Spread, group_runs
from ssa.report.table import headline


def _printed(documents, width=100):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(render_table(parse_evaluation(document, str(i)) for i, document in enumerate(documents)))
    return console.file.getvalue()


def _lines(documents):
    groups = group_runs(Run(parse_evaluation(document, str(i))) for i, document in enumerate(documents))
    return {line.label: cells for section in headline(groups).sections for line, cells in section}


def _with(document, full, sparse, kl=0.05):
    document["runs"] = document["runs"][:3]
    document["runs"][0]["perplexity"] = full
    document["runs"][2].update(perplexity=sparse, kl_full_sparse=kl)
    return document


def test_values_gap_and_best(evaluation):
    lines = _lines([_with(evaluation("full", 0), 20.0, 25.0), _with(evaluation("ssa", 0), 21.0, 21.42, 0.01)])
    assert [cell.text for cell in lines["Perplexity, full attention"]] == ["20.00", "21.00"]
    assert [cell.best for cell in lines["Perplexity, full attention"]] == [True, False]
    assert [cell.text for cell in lines["Perplexity, 64 tokens (trained)"]] == ["25.00", "21.42"]
    assert [cell.text for cell in lines["Attention gap"]] == ["+25.0 %", "+2.0 %"]
    assert [cell.best for cell in lines["KL(full ‖ sparse)"]] == [False, True]
    assert not any(cell.best for cell in lines["AttnSparsity, full inference"]), "no direction is claimed there"


def test_seeds_are_averaged_with_their_range(evaluation):
    lines = _lines([_with(evaluation("ssa", 1), 20.0, 21.0), _with(evaluation("ssa", 2), 22.0, 24.2)])
    cell = lines["Perplexity, full attention"][0]
    assert (cell.text, cell.detail) == ("21.00", "20.00–22.00")
    assert lines["Attention gap"][0].detail == "+5.0 to +10.0"


def test_a_seed_that_diverged_does_not_vanish(evaluation):
    lines = _lines([_with(evaluation("ssa", 1), 20.0, 21.0), _with(evaluation("ssa", 2), math.inf, math.nan)])
    cell = lines["Perplexity, full attention"][0]
    assert (cell.text, cell.detail) == ("20.00", "1 of 2 seeds")


def test_nsa_has_no_full_inference_and_unmeasured_lines_are_left_out(evaluation):
    lines = _lines([evaluation("nsa", 0), evaluation("ssa", 0)])
    assert lines["Perplexity, full attention"][0].text == "n/a"
    assert lines["Attention gap"][0].text == "n/a"
    assert "KL(full ‖ sparse)" not in _lines([evaluation("nsa", 0)])


def test_budgets_of_equal_size_stay_apart(evaluation):
    document = evaluation("ssa", 0)
    document["runs"].append({**document["runs"][4], "block_size": 32, "num_blocks": 2, "perplexity": 9.0})
    groups = group_runs([Run(parse_evaluation(document, "x"))])
    found = [(line.label, line.detail) for line, _ in headline(groups).sections[0]]
    assert ("Perplexity, 64 tokens (trained)", "4 blocks of 16") in found
    assert ("Perplexity, 64 tokens", "2 blocks of 32") in found


@pytest.mark.parametrize("name", ["[red]x[/red]", "[link=http://a]b[/link]", "[/]", "\x1b[31mred", "a\nb"])
def test_names_are_printed_literally(evaluation, name):
    documents = [evaluation("ssa", 0, name=name), evaluation("ssa", 1, name="other")]
    printed = _printed(documents, width=200)
    assert "\x1b" not in printed
    assert name.replace("\x1b", "\\x1b").replace("\n", "\\n") in printed


def test_three_methods_and_two_seeds_fit_eighty_columns(evaluation):
    printed = _printed([evaluation(m, s) for m in ("full", "moba", "ssa") for s in (1, 2)], width=80)
    assert "Perplexity, 64 tokens (trained)" in printed
    assert "…" not in printed


def test_nothing_evaluated_gives_an_empty_table():
    assert render_table([]).row_count == 0


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (formats.perplexity, 15.276, "15.28"),
        (formats.perplexity, 191.26, "191.3"),
        (formats.perplexity, 128256.4, "128,256"),
        (formats.perplexity, 2.5e9, "2.50e+09"),
        (formats.perplexity, math.inf, "n/a"),
        (formats.share, math.nan, "n/a"),
        (formats.signed_percent, -1.26, "−1.3 %"),
        (formats.percent_met, 1.0, "100 %"),
        (formats.percent_met, 0.999999, "99.99 %"),
        (formats.large, 999, "999"),
        (formats.large, 26_214_400, "26.2 M"),
        (formats.large, 3 * 10**15, "3,000 T"),
    ],
)
def test_numbers_as_text(show, value, text):
    assert show(value) == text


def test_a_spread_without_values_is_not_a_number():
    spread = Spread((math.nan, math.inf))
    assert math.isnan(spread.mean)
    assert math.isnan(spread.low)
    assert formats.spread_text(spread, formats.share) == ("n/a", "")
