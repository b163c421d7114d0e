"""Close the attention gap of a finished full-attention model with a small part of its tokens.

Trains an ungated full-attention model by a shipped recipe, writes it as a plain Llama checkpoint (`ssa convert --to
plain`), continues that checkpoint with SSA and, as the control, with full attention on the same rows, and measures the
gap (sparse minus full cross-entropy at the training budget) against the tokens of the continuation.

    python benchmarks/close_gap.py --out runs/close-gap                       # minutes on a CPU
    python benchmarks/close_gap.py --recipe small --steps 300 --more 60 --rows 32 --out runs/close-gap   # one GPU
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ssa.data import PackedDataset, prepare
from ssa.environment import commit, default_device, machine
from ssa.evaluate import Plan, evaluate
from ssa.model import load_model
from ssa.model.convert import convert_checkpoint
from ssa.train.continued import shape_of
from ssa.train.loop import train
from ssa.train.recipe_file import load_recipe

POINTS = 10  # of the curve


def main() -> None:
    """Do the whole; finished runs in the folder are not repeated."""
    options = parse()
    out = options.out
    base = load_recipe(f"{options.recipe}/full")
    data = out / "data"
    if not (data / "manifest.json").is_file():
        prepare(["builtin:stdlib"], data, row_length=base.data.row_length, vocab_size=2048, valid_fraction=0.05)
    common = {"data.path": str(data), "training.tokens": None, "training.validate_rows": options.rows}
    first = common | {"model.gated": False, "training.steps": options.steps, "training.validate_every": 0}
    run(f"{options.recipe}/full", first, out / "full")
    if not (out / "llama").exists():
        convert_checkpoint(out / "full", out / "llama", to="plain")
    every = max(options.more // POINTS, 1)
    more = common | {"training.steps": options.more, "training.validate_every": every}
    more |= {"optimizer.learning_rate": base.optimizer.learning_rate * options.rate}
    result: dict[str, Any] = {"machine": machine(), "commit": commit(), "options": vars(options) | {"out": str(out)}}
    result["before"] = measure(out / "llama", data, options.rows)
    for method in ("ssa", "full"):
        folder = out / f"continued-{method}"
        shape = shape_of(out / "llama")
        run(f"{options.recipe}/{method}", shape | more, folder)
        result[method] = {"curve": curve(folder), "after": measure(folder, data, options.rows)}
    result["tokens_before"] = options.steps * base.tokens_per_step
    (out / "close_gap.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    show(result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart", help="shipped scale: quickstart, tiny, small, ...")
    parser.add_argument("--steps", type=int, default=400, help="of the full-attention model")
    parser.add_argument("--more", type=int, default=80, help="steps of the continuation")
    parser.add_argument("--rate", type=float, default=0.3, help="its peak learning rate as a share of the recipe's")
    parser.add_argument("--rows", type=int, default=64, help="validation rows")
    parser.add_argument("--out", type=Path, default=Path("runs/close-gap"))
    return parser.parse_args()


def run(recipe: str, changes: dict[str, Any], folder: Path) -> None:
    """Train unless it is done."""
    if not (folder / "model" / "config.json").is_file():
        train(load_recipe(recipe, changes), folder)


def measure(folder: Path, data: Path, rows: int) -> dict[str, Any]:
    """Cross-entropy in both modes at the training budget, KL, and AttnSparsity of each layer in full mode."""
    recipe = json.loads((folder.parent / "full" / "model" / "config.json").read_text())
    settings = {key: recipe[key] for key in ("block_size", "num_blocks")}
    model = load_model(folder, device=default_device("auto"), **settings)
    plan = Plan((settings["num_blocks"],), rows=rows, statistics_rows=min(rows, 8), rows_per_batch=4)
    found = evaluate(model, PackedDataset(data, "valid"), plan)
    full, sparse = found["runs"]
    layers = next(entry for entry in found["attention"] if entry["mode"] == "full")["layers"]
    return {
        "full": full["nll"],
        "sparse": sparse["nll"],
        "gap": sparse["nll"] - full["nll"],
        "kl": sparse["kl_full_sparse"],
        "attention_sparsity": [layer["attention_sparsity"] for layer in layers],
    }


def curve(folder: Path) -> list[dict[str, float]]:
    """Gap against tokens, from the validations of a run."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    per_step = next(record for record in records if record["event"] == "start")["tokens_per_step"]
    losses: dict[int, dict[str, float]] = {}
    for record in records:
        if record["event"] == "validation":
            losses.setdefault(record["step"], {})[record["mode"]] = record["cross_entropy"]
    return [{"tokens": step * per_step, **both, "gap": both["sparse"] - both["full"]} for step, both in losses.items()]


def show(result: dict[str, Any]) -> None:
    """The curve as a table, then before and after."""
    before = result["before"]
    print(f"{'tokens':>10} {'share':>6} {'SSA full':>9} {'SSA sparse':>11} {'SSA gap':>8} {'control gap':>12}")
    print(
        f"{0:>10} {'0%':>6} {before['full']:9.4f} {before['sparse']:11.4f} {before['gap']:8.4f} {before['gap']:12.4f}"
    )
    for ours, control in zip(result["ssa"]["curve"], result["full"]["curve"], strict=True):
        share = f"{100 * ours['tokens'] / result['tokens_before']:.0f}%"
        both = f"{ours['full']:9.4f} {ours['sparse']:11.4f} {ours['gap']:8.4f} {control['gap']:12.4f}"
        print(f"{ours['tokens']:>10} {share:>6} {both}")
    for name, found in (("before", before), *((m, result[m]["after"]) for m in ("ssa", "full"))):
        layers = " ".join(f"{x:.3f}" for x in found["attention_sparsity"])
        print(f"{name:<7} gap {found['gap']:.4f}  KL {found['kl']:.4f}  AttnSparsity of each layer {layers}")


if __name__ == "__main__":
    main()
