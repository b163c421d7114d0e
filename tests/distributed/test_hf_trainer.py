"""The adapter to transformers' Trainer on two processes: alpha means alpha there too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from many import ranks
from tiny_runs import VOCABULARY, tiny
from torch.utils.data import SequentialSampler, Subset
from transformers import TrainingArguments

from ssa.data import Loader, PackedDataset
from ssa.train.build import build_model
from ssa.train.hf_trainer import PackedRows, SSATrainer

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow


class InOrder(SSATrainer):
    def _get_train_sampler(self, *arguments: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("across", [True, False])
def test_two_processes_give_the_numbers_of_one(across: bool, data: Path, tmp_path: Path) -> None:
    recipe = tiny(data)
    dataset = PackedDataset(data, "train")
    order = [Loader(dataset, 1, 3)._row(i) for i in range(12)]

    def run(size: int) -> list[dict[str, float]]:
        out = tmp_path / f"on-{size}"

        def action(rank: int) -> int:
            model = build_model(recipe.model_config(VOCABULARY), 3)
            model.config.alignment_weight = 100.0
            arguments = TrainingArguments(
                output_dir=str(out),
                seed=3,
                max_steps=3,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=4 // size,
                average_tokens_across_devices=across,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_num_workers=0,
            )
            trainer = InOrder(model, arguments, train_dataset=Subset(PackedRows(dataset), order))
            trainer.train()
            if rank == 0:
                (tmp_path / f"{size}.json").write_text(json.dumps(trainer.state.log_history))
            return 0

        assert ranks(size, action, tmp_path / "log") == [0] * size, (tmp_path / "log").read_text()
        return [entry for entry in json.loads((tmp_path / f"{size}.json").read_text()) if "loss" in entry]

    one, two = run(1), run(2)
    assert len(one) == len(two) == 3
    for single, double in zip(one, two, strict=True):
        assert double["alignment"] == pytest.approx(single["alignment"], rel=1e-4)
        assert double["attention_sparsity"] == pytest.approx(single["attention_sparsity"], rel=1e-5)
        # Without counting over the processes, Trainer weights each process's targets equally.
        assert double["loss"] == pytest.approx(single["loss"], rel=1e-5 if across else 5e-2)
        assert double["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4 if across else 0.2)
