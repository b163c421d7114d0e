"""The pilot's table: what is there of each piece, and nothing where a piece was stopped."""

import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pilot.py"


def load():
    spec = importlib.util.spec_from_file_location("pilot", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_finished_and_stopped_pieces_are_shown(tmp_path):
    pilot = load()
    steps = [{"event": "step", "step": n, "cross_entropy": 9.0 - n, "tokens_per_second": 100.0} for n in range(6)]
    for name, lines in (("full-seed0", steps), ("ssa-seed0", steps[:1])):
        (tmp_path / "pieces" / name).mkdir(parents=True)
        (tmp_path / "pieces" / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = tmp_path / "pieces" / "full-seed0"
    (done / "piece.json").write_text(json.dumps({"status": "finished", "train_seconds": 7.0, "evaluate_seconds": 2.0}))
    runs = [{"receptive_field": None, "perplexity": 50.0}, {"receptive_field": 256, "perplexity": 51.0}]
    (done / "evaluation.json").write_text(json.dumps({"runs": runs}))
    full, ssa = pilot.read(tmp_path, "--set a.b=1")
    assert (full["None"], full["256"], full["cross_entropy"], full["step"]) == (50.0, 51.0, 6.0, 5)
    assert "full 50.00  RF 256 51.00" in pilot.line(full)
    assert ssa["status"] is None
    assert "full -  -  training loss 9.000 at step 0" in pilot.line(ssa)
