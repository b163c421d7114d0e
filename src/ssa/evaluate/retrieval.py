"""Scoring of needle tasks: by the likelihood of the right answer among candidates, and by greedy decoding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ssa.documents import DocumentLayout
from ssa.evaluate.documents import grouped
from ssa.evaluate.needle import FORMS, Form, Task, make_task, sentences
from ssa.evaluate.running import Scaling, Setting, running, stretched
from ssa.model import SSAForCausalLM

TOKENS_PER_BATCH = 1 << 17
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Score(NamedTuple):
    """Of one task: 1.0 where the answer is right, else 0.0."""

    likelihood: float
    greedy: float


def make_tasks(
    text: str,
    tokenizer: Any,
    lengths: Sequence[int],
    *,
    forms: Sequence[Form] = FORMS,
    depths: Sequence[float] = DEPTHS,
    samples: int = 1,
    candidates: int = 8,
    seed: int = 0,
) -> dict[int, list[Task]]:
    """Tasks by length: every form at every depth, ``samples`` times, hidden in the sentences of ``text``."""
    haystack = tokenizer(sentences(text), add_special_tokens=False)["input_ids"]
    haystack = [ids for ids in haystack if ids]
    return {
        length: [
            make_task(form, haystack, tokenizer, length, depth, seed=seed + n, number_of_candidates=candidates)
            for form in forms
            for depth in depths
            for n in range(samples)
        ]
        for length in lengths
    }


def score_tasks(model: SSAForCausalLM, tasks: Sequence[Task]) -> list[Score]:
    """Score each task, as the model runs now.

    Likelihood: the right candidate has the highest log-probability, summed over its tokens. Greedy: greedy decoding
    would give the right answer. Under teacher forcing that is the same as every token of the answer being the most
    likely next one, so no decoding is needed.
    """
    rows = [(number, c) for number, task in enumerate(tasks) for c in range(len(task.candidates))]
    totals: dict[int, dict[int, float]] = defaultdict(dict)
    greedy: dict[int, float] = {}
    if not rows:
        return []
    longest = max(len(tasks[n].prompt) + len(tasks[n].candidates[c]) for n, c in rows)
    for part in grouped(rows, longest, TOKENS_PER_BATCH):
        for (n, c), (log_p, hit) in zip(part, _answers(model, tasks, part, longest), strict=True):
            totals[n][c] = log_p
            if c == tasks[n].gold:
                greedy[n] = hit
    best = [max(totals[n], key=lambda c, n=n: totals[n][c]) for n in range(len(tasks))]  # type: ignore[misc]
    return [Score(float(best[n] == task.gold), greedy[n]) for n, task in enumerate(tasks)]


def _answers(
    model: SSAForCausalLM, tasks: Sequence[Task], rows: Sequence[tuple[int, int]], longest: int
) -> list[tuple[float, float]]:
    """Of each (task, candidate): its log-probability, and whether all of its tokens are the most likely ones.

    Rows are filled up at their ends, which causal attention never looks at: all have one shape, for which kernels are
    planned once.
    """
    prompts = [tasks[n].prompt for n, _ in rows]
    answers = [tasks[n].candidates[c] for n, c in rows]
    kept = longest - min(map(len, prompts))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    counts = torch.zeros(len(rows), kept, dtype=torch.bool)  # which of the last predictions are of the answer
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        first = kept - (longest - len(prompt))
        counts[row, first : first + len(answer)] = True
    ids, counts = ids.to(model.device), counts.to(model.device)
    layout = DocumentLayout.single(len(rows), longest - 1)
    logits = model(ids[:, :-1], layout=layout, logits_to_keep=kept).logits.float()
    targets = ids[:, -kept:]
    log_p = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    sums = (log_p.double() * counts).sum(-1).tolist()
    hits = ((logits.argmax(-1) == targets) | ~counts).all(-1).double().tolist()
    return list(zip(sums, hits, strict=True))


def needle_results(
    model: SSAForCausalLM, tasks: dict[int, list[Task]], settings: Sequence[Setting], scaling: Scaling = "none"
) -> list[dict[str, Any]]:
    """Scores by setting, form, length and depth.

    Returns:
        ``suite.needle`` entries of ``ssa.evaluation/1``.
    """
    found = []
    for length, given in tasks.items():
        with stretched(model, length, scaling) as applied:
            for setting in settings:
                with running(model, setting):
                    scores = score_tasks(model, given)
                cells: dict[tuple[str, float], list[int]] = defaultdict(list)
                for number, task in enumerate(given):
                    cells[task.form, task.depth].append(number)
                for (form, depth), members in cells.items():
                    likelihood, exact = (sum(scores[n][i] for n in members) / len(members) for i in (0, 1))
                    place = {"form": form, "length": length, "scaling": applied, "depth": depth}
                    chance = 1 / len(given[members[0]].candidates)
                    result = {"likelihood": likelihood, "greedy": exact, "chance": chance, "samples": len(members)}
                    found.append({**setting.facts(), **place, **result})
    return found
