"""The page: what it shows, and that nothing in a result file becomes markup."""

import base64
import hashlib
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from ssa.report.page import render_page
from ssa.report.results import parse_evaluation
from ssa.report.runs import Run, discover, group_runs

WRAPPERS = [
    "{}",
    '">{}',
    "'>{}",
    "</title>{}",
    "</style>{}",
    "-->{}",
    "{{{{ {} }}}}",
    "</td></table>{}",
    "\x00{}",
    "&lt;{}",
]
ATTACKS = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '<svg/onload="alert(1)">',
    '" onmouseover="alert(1)" x="',
    "<meta http-equiv=refresh content=0;url=//evil>",
    "<a href=javascript:alert(1)>x</a>",
]
PAYLOADS = [wrapper.format(attack) for wrapper in WRAPPERS for attack in ATTACKS]


class Elements(HTMLParser):
    """Collects elements with the names of their attributes, and all text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self.attributes = Counter(), [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements[tag, tuple(name for name, _ in attrs)] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.texts.append(data)


def _page(*documents, figures=()):
    groups = group_runs(Run(parse_evaluation(document, str(i))) for i, document in enumerate(documents))
    return render_page(groups, figures)


def _poisoned(document, payload):
    """The payload in every free text of a document."""
    document.update(created=payload, command=payload, commit=payload, machine={payload: payload, "x": [payload]})
    document["model"].update(name=payload)
    document["data"].update(name=payload, split=payload)
    return document


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_hostile_text_stays_text(evaluation, payload):
    calm = Elements(_page(_poisoned(evaluation("ssa", 0), "calm"), _poisoned(evaluation("ssa", 0), "still")))
    page = _page(_poisoned(evaluation("ssa", 0), payload), _poisoned(evaluation("ssa", 0), f"{payload}2"))
    poisoned = Elements(page)
    assert poisoned.elements == calm.elements, "no element or attribute may appear"
    assert payload.replace("\x00", "\\x00") in poisoned.texts, "and it is shown as it is"


def test_a_hostile_method_stays_text(evaluation):
    document = evaluation("ssa", 0)
    document["model"]["method"] = '"><script>alert(1)</script>'
    found = Elements(_page(document))
    assert not any(tag == "script" for tag, _ in found.elements)
    assert ("span", "class", "swatch m-other") in found.attributes
    assert any(document["model"]["method"] in text for text in found.texts)


@pytest.fixture(scope="module")
def report(runs):
    from ssa.report.plots import all_figures

    groups = group_runs(discover([runs]))
    return render_page(groups, all_figures(groups))


def test_the_policy_admits_this_style_sheet_and_nothing_else(report):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', report)[1].replace("&#39;", "'")
    css = re.search(r"<style>(.*?)</style>", report, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["style-src"] == f"'sha256-{digest}'"
    assert "script-src" not in rules
    assert "style=" not in report.replace(css, ""), "an inline style would be blocked"


def test_nothing_is_loaded_from_elsewhere(report):
    found = Elements(report)
    links = [value for _, name, value in found.attributes if name in ("src", "href", "srcset", "action")]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in links)
    assert not re.search(r"@import|url\(", report)
    assert {tag for tag, _ in found.elements}.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})


def test_the_page_shows_numbers_verdicts_figures_and_provenance(report):
    found = Elements(report)
    text = " ".join(" ".join(found.texts).split())
    images = [value for tag, name, value in found.attributes if (tag, name) == ("img", "src")]
    assert len(images) == 4
    assert all(base64.b64decode(image.split(",", 1)[1])[:8] == b"\x89PNG\r\n\x1a\n" for image in images)
    for words in (
        "Of 6 predictions taken from the paper, 6 hold here.",
        "2 of 2 seeds",
        "ssa eval runs/moba-seed2 --budgets 2 4 8 16",
        "14,234,880",
        "d8a8c3b5f0e1",
        "cpu AMD EPYC 9654",
        "ssa.evaluation/1, ssa.metrics/1",
        "Glossary",
    ):
        assert words in text


def test_failed_and_missing_predictions_are_marked(evaluation):
    document = evaluation("ssa", 0)
    document["attention"][0]["mean"]["bound_share"] = 0.5
    page = _page(document)
    assert page.count('class="verdict open"') == 4
    assert page.count('class="verdict no"') == 1
    assert "1 hold here, 1 does not and 4 could not be checked" in page


@pytest.mark.parametrize("method", ["full", "moba", "nsa", "ssa"])
def test_one_method_alone_makes_a_page(evaluation, method):
    assert "Provenance" in _page(evaluation(method, 0))


def test_a_bare_evaluation_makes_a_page(evaluation):
    document = evaluation("ssa", 0)
    document.update(runs=[], attention=[], selection_map=None, machine=None, commit=None, command=None, created=None)
    assert "without any perplexity measured" in _page(document)


def test_training_alone_makes_a_page(metrics, write_run, tmp_path):
    write_run(tmp_path / "run", None, metrics("ssa", 0, steps=30))
    page = render_page(group_runs(discover([tmp_path])), [])
    assert "no evaluation is there yet" in page
    assert "What the paper predicts" not in page
    assert "not evaluated" in page


def test_seven_seeds_of_variants_with_long_names_make_a_page(evaluation):
    documents = [evaluation("ssa", seed, name="n" * 300 + str(index)) for index in range(3) for seed in (1, 2)]
    assert "There are several variants" in _page(*documents)
