"""Train a tiny SSA model on text: ``python examples/tiny_training.py FOLDER`` writes FOLDER/data and FOLDER/run."""

import email
import sys
from pathlib import Path

from ssa.data import prepare
from ssa.train.loop import train
from ssa.train.recipe_file import load_recipe

folder = Path(sys.argv[1])
text = [str(path) for path in sorted(Path(email.__file__).parent.glob("*.py"))]  # any text files
prepare(text, folder / "data", row_length=128, vocab_size=512, valid_fraction=0.2)

recipe = load_recipe(
    "quickstart/ssa",  # a shipped recipe; every key can be replaced
    {
        "data.path": str(folder / "data"),
        "data.row_length": 128,
        "model.hidden_size": 32,
        "model.intermediate_size": 64,
        "model.num_hidden_layers": 2,
        "model.head_dim": 8,
        "model.max_position_embeddings": 512,
        "training.steps": 10,
        "training.device": "cpu",
        "training.validate_rows": 4,
    },
)
outcome = train(recipe, folder / "run")
print(f"{outcome.folder / 'model'} is a transformers folder; metrics are in {outcome.folder / 'metrics.jsonl'}")
