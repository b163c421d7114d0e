"""The adapter to transformers' Trainer against our own loop: the same rows, the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import VOCABULARY, metrics, tiny
from torch import Tensor
from torch.utils.data import SequentialSampler, Subset
from transformers import AutoModelForCausalLM, TrainingArguments

import ssa
from ssa.data import Loader, PackedDataset
from ssa.model.convert import convert_checkpoint
from ssa.train.build import build_model
from ssa.train.hf_trainer import PackedRows, SSATrainer
from ssa.train.loop import train
from ssa.train.streams import draw_stream

pytest.importorskip("accelerate")
STEPS = 5
RECIPE: dict[str, Any] = {
    "training__steps": STEPS,
    "training__validate_every": 0,
    "optimizer__schedule": "constant",
    "optimizer__warmup_steps": 0,
    "optimizer__learning_rate": 1e-3,
}


class InOrder(SSATrainer):
    """Takes the rows as they come, and notes each step's streams."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.streams: list[tuple[int, str]] = []

    def _get_train_sampler(self, *arguments: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def step_stream(self) -> Any:
        stream = super().step_stream()
        self.streams.append((self.state.global_step + 1, stream))
        return stream


def trainer(data: Path, out: Path, micro: int, method: str = "ssa", **changes: Any) -> InOrder:
    recipe = tiny(data, method, **RECIPE)
    optimizer = recipe.optimizer
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "seed": recipe.seed,
        "max_steps": STEPS,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": recipe.training.rows_per_step // micro,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.epsilon,
        "max_grad_norm": optimizer.gradient_clip,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    dataset = PackedDataset(data, "train")
    order = [Loader(dataset, 1, recipe.seed)._row(i) for i in range(recipe.training.rows_per_step * STEPS)]
    model = build_model(recipe.model_config(VOCABULARY), recipe.seed)
    return InOrder(model, TrainingArguments(**arguments | changes), train_dataset=Subset(PackedRows(dataset), order))


def test_rows_carry_documents_and_count_their_targets(data: Path) -> None:
    dataset = PackedDataset(data, "train")
    rows = PackedRows(dataset)
    for i in range(len(rows)):
        row, batch = rows[i], dataset.batch([i])
        assert int((row["labels"] != -100).sum()) == batch.targets
        assert int((row["position_ids"] == 0).sum()) == len(batch.layout.lengths)


@pytest.mark.parametrize("method", ["full", "ssa"])
@pytest.mark.parametrize("micro", [4, 2, 1])
def test_the_numbers_are_those_of_our_loop(micro: int, method: str, data: Path, tmp_path: Path) -> None:
    train(tiny(data, method, **RECIPE), tmp_path / "run")
    ours = [record for record in metrics(tmp_path / "run") if record["event"] == "step"]
    theirs = trainer(data, tmp_path / "hf", micro, method)
    theirs.train()
    logs = [entry for entry in theirs.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [record["step"] for record in ours]
    for entry, record in zip(logs, ours, strict=True):
        assert entry["loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(record["gradient_norm"], rel=1e-4)
        for key in ("alignment", "sparsity_loss", "commitment_loss", "attention_sparsity"):
            assert entry.get(key) == (None if record[key] is None else pytest.approx(record[key], rel=1e-4))
    assert {stream for _, stream in theirs.streams} == ({"full"} if method == "full" else {"full", "sparse"})


def test_the_alignment_is_a_visible_part_of_what_is_compared(data: Path, tmp_path: Path) -> None:
    """An alignment that is not divided by the micro-batches changes the gradient more than the test above allows."""

    class Wrong(InOrder):
        def _alignment_scale(self, num_items_in_batch: Tensor | int | None) -> float:
            return 1.0

    norms = []
    for kind in (InOrder, Wrong):
        made = trainer(data, tmp_path / kind.__name__, 1, max_steps=2)
        made.__class__ = kind
        made.model.config.alignment_weight = 1000.0
        made.train()
        norms.append([entry["grad_norm"] for entry in made.state.log_history if "grad_norm" in entry])
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)


def test_every_micro_batch_of_a_step_runs_its_stream_and_a_resume_goes_on(data: Path, tmp_path: Path) -> None:
    whole = trainer(data, tmp_path / "whole", 1, save_strategy="steps", save_steps=2)
    whole.train()
    expected = [(step, draw_stream(3, step, 0.5)) for step in range(1, STEPS + 1) for _ in range(4)]
    assert whole.streams == expected
    resumed = trainer(data, tmp_path / "resumed", 1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.streams == expected[8:]
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e and e["step"] > 2] for t in (whole, resumed)]
    assert losses[0] == losses[1]


def test_evaluation_runs_the_inference_mode(data: Path, tmp_path: Path) -> None:
    made = trainer(data, tmp_path / "run", 2)
    made.eval_dataset = PackedRows(PackedDataset(data, "valid"))
    found = made.evaluate()
    assert not made.streams
    batch = PackedDataset(data, "valid").batch(list(range(6)))
    with torch.no_grad():
        loss = made.model(batch.input_ids, labels=batch.labels, layout=batch.layout).loss
    assert found["eval_loss"] == pytest.approx(float(loss), rel=2e-2)  # Trainer averages over batches, not targets


@pytest.mark.parametrize("micro", [4, 1])
def test_a_stock_model_trains_as_ours(micro: int, data: Path, tmp_path: Path) -> None:
    """The same ungated weights as a Llama with our attention: cross-entropies and gradients are those of our class."""
    ours = trainer(data, tmp_path / "ours", micro)
    ungated = build_model(tiny(data, **RECIPE, model__gated=False).model_config(VOCABULARY), 3)
    ungated.save_pretrained(tmp_path / "model")
    convert_checkpoint(tmp_path / "model", tmp_path / "llama", to="plain", check=False)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    weight = float(ungated.config.alignment_weight or 0)
    ssa.configure(stock, block_size=8, num_blocks=2, alignment_weight=weight)
    logs = []
    for number, model in enumerate((ungated.train(), stock.train())):
        made = InOrder(model, ours.args, train_dataset=ours.train_dataset)
        made.args.output_dir = str(tmp_path / f"run-{number}")
        made.train()
        logs.append([entry for entry in made.state.log_history if "loss" in entry])
    for own, other in zip(*logs, strict=True):
        assert other["grad_norm"] == pytest.approx(own["grad_norm"], rel=1e-3)
        assert other["attention_sparsity"] == pytest.approx(own["attention_sparsity"], rel=1e-4)
        assert other["alignment"] == pytest.approx(own["alignment"], rel=1e-3)
        assert other["loss"] == pytest.approx(own["loss"] - weight * own["alignment"], rel=1e-3)
