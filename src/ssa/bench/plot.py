"""Time against the number of tokens, from result files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssa.bench.runner import milliseconds


def lines(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Microseconds per token over T: (shape and direction, kind) to points. The fastest full backend counts."""
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for result in results:
        for case in result["cases"]:
            time, work = milliseconds(case), case["workload"]
            if time is None or work["documents"] != work["batch"] or case["family"] not in ("full", "sparse"):
                continue
            shape = f"{work['heads']}/{work['kv_heads']} heads, D {work['head_dim']}, {case['direction']}"
            kind = "full" if case["family"] == "full" else f"sparse {work['block_size']}x{work['num_blocks']}"
            kind = kind if case["family"] == "full" else f"{kind}, {work['inputs']}"
            tokens = work["tokens"]
            per_token = 1e3 * time / (work["batch"] * tokens)
            points = found[shape, kind]
            points[tokens] = min(per_token, points.get(tokens, per_token))
    return {key: sorted(points.items()) for key, points in found.items()}


def plot(results: Sequence[dict[str, Any]], path: Path) -> bool:
    """Write a figure, one panel per shape and direction; False if fewer than two lengths were timed."""
    found = {key: points for key, points in lines(results).items() if len(points) > 1}
    if not found:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = sorted({shape for shape, _ in found})
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(5 * len(shapes), 4), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for (owner, kind), points in sorted(found.items()):
            if owner == shape:
                axis.plot(*zip(*points, strict=True), marker="o", label=kind)
        axis.set(xscale="log", yscale="log", title=shape, xlabel="tokens of a sequence", ylabel="microseconds a token")
        axis.set_xscale("log", base=2)
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
