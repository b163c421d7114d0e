"""Needle tasks are deterministic and say what they ask; a model that knows the answer scores 1, a blind one chance."""

import re
from types import SimpleNamespace

import pytest
import torch

from ssa.errors import ConfigError, DataError
from ssa.evaluate.needle import FORMS, make_task, sentences
from ssa.evaluate.retrieval import make_tasks, score_tasks

TEXT = "It was a dark night. Nobody spoke, for nobody dared! Was it over? The rain fell on. " * 12


class Letters:
    """A tokenizer of one token per character."""

    bos_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        if isinstance(text, list):
            return {"input_ids": [self(t)["input_ids"] for t in text]}
        return {"input_ids": [ord(c) % 128 for c in text]}

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i)


HAYSTACK = [Letters()(s)["input_ids"] for s in sentences(TEXT)]


def task(form, length=700, depth=0.5, seed=0, **more):
    return make_task(form, HAYSTACK, Letters(), length, depth, seed=seed, **more)


def test_sentences_lose_nothing():
    assert "".join(sentences(TEXT)).rstrip() == TEXT.rstrip()
    assert len(sentences(TEXT)) == 48


@pytest.mark.parametrize("form", FORMS)
def test_deterministic_and_of_the_length_asked(form):
    one = task(form)
    assert one == task(form)
    assert one != task(form, seed=1)
    assert len(one.prompt) + max(map(len, one.candidates)) == 700
    assert len(set(one.candidates)) == 8


@pytest.mark.parametrize("form", FORMS)
def test_the_prompt_holds_the_answer(form):
    for seed in range(5):
        one = task(form, seed=seed)
        prompt, answer = Letters().decode(one.prompt), Letters().decode(one.candidates[one.gold])
        parts = [part.strip(" .") for part in answer.split(",")]
        if form == "variable_tracking":
            value = re.search(r"The variables that equal (\d+) are$", prompt)[1]
            held = {value}
            for name, source in re.findall(r"Let (\w+) equal (\w+)\.", prompt):
                held |= {name} if source in held else set()
            assert held - {value} == set(parts)
        else:
            key = re.search(r"The secret numbers? of the (\w+) (?:is|are)$", prompt)[1]
            assert re.findall(rf"The secret number of the {key} is (\d+)\.", prompt) == parts


def test_rival_keys_are_candidates():
    one = task("multi_key")
    hidden = re.findall(r"is (\d{7})\.", Letters().decode(one.prompt))
    candidates = [Letters().decode(c).strip() for c in one.candidates]
    assert len(hidden) == 4
    assert set(hidden) <= set(candidates)


def test_depth_moves_the_needle():
    places = [Letters().decode(task("single", depth=d).prompt).index("secret") for d in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert places == sorted(places)
    assert places[0] < 100
    assert places[-1] > 500


REFUSED = [
    ({"depth": 1.5}, ConfigError),
    ({"form": "double"}, ConfigError),
    ({"length": 60}, DataError),
    ({"length": 10**5}, DataError),
]


@pytest.mark.parametrize(("change", "error"), REFUSED)
def test_refusals(change, error):
    with pytest.raises(error):
        task(**{"form": "single", **change})


class Reader:
    """A model that looks the key up: it writes the digits that follow the needle, whatever is being scored."""

    device = torch.device("cpu")

    def __init__(self, knows):
        self.knows = knows

    def __call__(self, ids, layout, logits_to_keep):
        rows = []
        for row in ids.tolist():
            text = Letters().decode(row)
            key = re.findall(r"The secret number of the (\w+) is", text)[-1]
            found = re.search(rf"The secret number of the {key} is( \d+)\.", text)[1]
            following = (found if self.knows else found[::-1])[:logits_to_keep]
            logits = torch.zeros(logits_to_keep, 128)
            logits[range(len(following)), [ord(c) for c in following]] = 9.0
            rows.append(logits)
        return SimpleNamespace(logits=torch.stack(rows))


def test_a_model_that_knows_scores_one_and_a_blind_one_does_not():
    tasks = make_tasks(TEXT, Letters(), [600], forms=("single", "multi_key"), depths=(0.0, 0.9), samples=3)[600]
    assert len(tasks) == 12
    assert all(score == (1.0, 1.0) for score in score_tasks(Reader(True), tasks))
    assert all(score.greedy == 0.0 for score in score_tasks(Reader(False), tasks))


def test_gold_is_spread_over_the_candidates():
    golds = {task("single", seed=seed).gold for seed in range(40)}
    assert golds == set(range(8))
