"""Navigation of the site: the order of the pages that we know; a page that is not named here comes at the end of its
section, so that a new guide is on the site without a change here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ORDER = {
    "Concepts": ["concepts.md", "math.md", "deviations.md"],
    "Guides": [
        *("guides/drop-in.md", "guides/conversion.md", "guides/official-checkpoints.md", "training.md"),
        *("multi-gpu.md", "context-parallel.md", "alignment.md", "guides/trackers.md", "guides/generation.md"),
        *("budgets.md", "guides/evaluation.md", "guides/benchmarks.md", "guides/reproduce.md", "guides/serving.md"),
    ],
    "Reference": ["reference/ops.md", "reference/model.md", "reference/train.md", "reference/evaluate.md"],
    "Project": [
        "results.md",
        "claims.md",
        "claims-64m.md",
        "experiments.md",
        "kernels.md",
        "full-stream.md",
        "decoding.md",
        "architecture.md",
    ],
}


def on_config(config: Any, **_: Any) -> Any:
    """MkDocs' hook: set ``nav`` from what lies in the folder."""
    folder = Path(config["docs_dir"])
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*.md")} - {"index.md", "faq.md"}
    nav: list[Any] = ["index.md"]
    for section, pages in ORDER.items():
        found = [page for page in pages if page in here]
        here -= set(found)
        rest = {"Guides": "guides/", "Reference": "reference/"}.get(section)
        found += sorted(page for page in here if rest and page.startswith(rest))
        here -= set(found)
        nav.append({section: found})
    nav[-1]["Project"] += sorted(here)
    config["nav"] = [*nav, "faq.md"]
    return config
