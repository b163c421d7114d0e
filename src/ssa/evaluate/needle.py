"""Needle-in-a-haystack tasks in RULER's forms, generated offline from the user's own text.

A task hides short statements among the sentences of a haystack and ends with the beginning of such a statement; the
model has to complete it. Four forms: one needle; several keys of which one is asked; several values of one key, all
asked; variables assigned to one another, all of one value asked. Everything is a pure function of the seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ssa.errors import ConfigError, DataError

Form = Literal["single", "multi_key", "multi_value", "variable_tracking"]
FORMS: tuple[Form, ...] = get_args(Form)

KEYS = (
    "anchor", "basket", "candle", "desert", "engine", "feather", "garden", "hammer", "island", "jacket",
    "kettle", "ladder", "mirror", "needle", "orchard", "pencil", "quarry", "ribbon", "saddle", "tunnel",
    "violin", "window", "barrel", "copper", "dragon", "fiddle", "goblet", "harbor", "lantern", "marble",
)  # fmt: skip
RIVALS = 3  # other keys, or other chains
VALUES = 3  # values of one key, or variables of one chain


@dataclass(frozen=True)
class Task:
    """One question.

    Attributes:
        form: which kind.
        prompt: token ids; the statements hidden in the haystack, then the beginning of the answer's sentence.
        candidates: token ids of possible answers, all drawn alike.
        gold: which candidate is right.
        depth: where the (first) needle that matters lies, 0 the beginning, 1 the end.
    """

    form: Form
    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    gold: int
    depth: float


@dataclass(frozen=True)
class Wording:
    """A task before it is hidden: statements with their place in [0, 1], the question, and possible answers."""

    needles: tuple[tuple[float, str], ...]
    question: str
    candidates: tuple[str, ...]  # the right one first


def sentences(text: str) -> list[str]:
    """The sentences of a haystack, each with the white space before it."""
    return re.findall(r"\s*\S.*?(?:[.!?][\"'”’)]*(?=\s)|$)", text, re.DOTALL)


def make_task(
    form: Form,
    haystack: Sequence[Sequence[int]],
    tokenizer: Any,
    length: int,
    depth: float,
    *,
    seed: int = 0,
    number_of_candidates: int = 8,
) -> Task:
    """A task of exactly ``length`` tokens, the longest candidate included.

    Args:
        form: one of ``FORMS``.
        haystack: token ids of sentences, in order; see :func:`sentences`.
        tokenizer: a Hugging Face tokenizer, for the statements.
        length: of prompt and answer together.
        depth: place of the needle, in [0, 1].
        seed: of everything random.

    Raises:
        ConfigError: an unknown form, a depth outside [0, 1].
        DataError: a haystack that is too small, or a length that the statements alone exceed.
    """
    if form not in FORMS or not 0.0 <= depth <= 1.0:
        raise ConfigError("needle task", f"form {form!r}, depth {depth}", f"one of {FORMS}, a depth in [0, 1]")
    draw = random.Random(f"{form} {length} {depth} {seed}")
    wording = _WORDINGS[form](draw, depth, number_of_candidates)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    answers = [encode(answer) for answer in wording.candidates]
    order = draw.sample(range(len(answers)), len(answers))
    question = encode(wording.question)
    needles = sorted((place, encode(text)) for place, text in wording.needles)
    room = length - max(map(len, answers)) - len(question)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    hidden = _hide(haystack, needles, room - len(begin), draw)
    prompt = (*begin, *hidden, *question)
    return Task(form, prompt, tuple(tuple(answers[i]) for i in order), order.index(0), depth)


def _hide(
    haystack: Sequence[Sequence[int]], needles: list[tuple[float, list[int]]], room: int, draw: random.Random
) -> list[int]:
    """``room`` tokens: haystack from a random sentence on, with needles between sentences at their places."""
    fill = room - sum(len(ids) for _, ids in needles)
    if fill < 0:
        raise DataError("needle task", f"{room} tokens of room", "room for the statements", "a larger length")
    taken: list[Sequence[int]] = []
    size, at = 0, draw.randrange(len(haystack)) if haystack else 0
    while size < fill and haystack and len(taken) <= len(haystack):
        taken.append(haystack[at % len(haystack)])
        size, at = size + len(taken[-1]), at + 1
    if size < fill:
        raise DataError("haystack", f"{size} tokens", f"at least {fill}", "more text, or a smaller length")
    if size > fill:  # the first sentence gives way, so that the end joins the question cleanly
        surplus = size - fill
        while surplus >= len(taken[0]):
            surplus -= len(taken.pop(0))
        taken[0] = taken[0][surplus:]
    out: list[int] = []
    waiting, passed = list(needles), 0
    for sentence in taken:
        while waiting and waiting[0][0] * fill <= passed + len(sentence) / 2:
            out += waiting.pop(0)[1]
        out += sentence
        passed += len(sentence)
    for _, ids in waiting:
        out += ids
    return out


# ---------------------------------------------------------------------- the forms
def _number(draw: random.Random) -> str:
    return str(draw.randrange(1_000_000, 10_000_000))


def _statement(key: str, value: str) -> str:
    return f" The secret number of the {key} is {value}."


def _single(draw: random.Random, depth: float, count: int) -> Wording:
    key = draw.choice(KEYS)
    values = [_number(draw) for _ in range(count)]
    answers = tuple(f" {value}" for value in values)
    return Wording(((depth, _statement(key, values[0])),), f" The secret number of the {key} is", answers)


def _multi_key(draw: random.Random, depth: float, count: int) -> Wording:
    """The values of the rival keys are among the candidates."""
    keys = draw.sample(KEYS, RIVALS + 1)
    values = [_number(draw) for _ in range(max(count, RIVALS + 1))]
    needles = [(depth, _statement(keys[0], values[0]))]
    needles += [(draw.random(), _statement(key, value)) for key, value in zip(keys[1:], values[1:], strict=False)]
    answers = tuple(f" {value}" for value in values[:count])
    return Wording(tuple(needles), f" The secret number of the {keys[0]} is", answers)


def _multi_value(draw: random.Random, depth: float, count: int) -> Wording:
    """All values of one key, in the order in which they were said."""
    key = draw.choice(KEYS)
    lists = [[_number(draw) for _ in range(VALUES)] for _ in range(count)]
    places = [depth, *sorted(draw.uniform(depth, 1.0) for _ in range(VALUES - 1))]
    needles = tuple((place, _statement(key, value)) for place, value in zip(places, lists[0], strict=True))
    return Wording(needles, f" The secret numbers of the {key} are", tuple(f" {', '.join(items)}." for items in lists))


def _variable_tracking(draw: random.Random, depth: float, count: int) -> Wording:
    """A chain of assignments among rival chains; asked: all variables that hold the value."""
    names = draw.sample([f"X{a}{b}" for a in "ABCDEFGHJK" for b in "LMNPQRSTUV"], VALUES * max(count, RIVALS + 1))
    chains = [names[i : i + VALUES] for i in range(0, len(names), VALUES)]
    needles: list[tuple[float, str]] = []
    values = [_number(draw) for _ in chains]
    for number, chain in enumerate(chains[: RIVALS + 1]):
        first = depth if number == 0 else draw.random()
        places = [first, *sorted(draw.uniform(first, 1.0) for _ in chain[1:])]
        sources = [values[number], *chain[:-1]]
        needles += [
            (place, f" Let {name} equal {source}.") for place, name, source in zip(places, chain, sources, strict=True)
        ]
    answers = tuple(f" {', '.join(chain)}." for chain in chains[:count])
    return Wording(tuple(needles), f" The variables that equal {values[0]} are", answers)


_WORDINGS = {
    "single": _single,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "variable_tracking": _variable_tracking,
}
