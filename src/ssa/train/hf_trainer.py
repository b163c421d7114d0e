"""SSA with transformers' ``Trainer``: the stream of a step and the scale of the alignment, nothing else.

What :mod:`ssa.train.loop` adds beyond that (skipped steps, agreement of ranks, bit-exact resumption of the data) stays
there. Needs ``accelerate``, as every use of ``Trainer`` does.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer

from ssa.data import PackedDataset
from ssa.documents import IGNORE_INDEX
from ssa.model import SSAConfig, SSAOutput, last_alignment
from ssa.model.interface.settings import Settings, settings_of
from ssa.train.streams import Stream, draw_sample_seed, draw_stream

METRICS = ("cross_entropy", "alignment", "sparsity_loss", "commitment_loss", "attention_sparsity")


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows of prepared data as ``Trainer`` takes them: ``input_ids``, ``labels``, ``position_ids``, each ``[T]``.

    Positions restart at every document, from which the model knows the documents. A document's first token has label
    -100, since nothing predicts it: ``Trainer``'s count of labels is then the count of targets.
    """

    def __init__(self, rows: PackedDataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = self.rows.batch([index])
        positions = batch.layout.positions(torch.device("cpu"))[0]
        labels = batch.labels[0].masked_fill(positions == 0, IGNORE_INDEX)
        return {"input_ids": batch.input_ids[0], "labels": labels, "position_ids": positions}


class SSATrainer(Trainer):
    """``Trainer`` for :class:`ssa.SSAForCausalLM`, and for stock models that :func:`ssa.configure` gave our attention.

    The stream is drawn from ``(args.seed, optimiser step)``, steps counted from 1: the same for all micro-batches and
    processes of a step and after a resume. The alignment is a mean over elements and is divided by the number of
    micro-batches of the step, so alpha means alpha whatever the accumulation and the number of processes. (Micro-
    batches must have equally many rows; set ``dataloader_drop_last`` if the last would be smaller.)

    ``log`` gains ``cross_entropy``, ``alignment`` (unweighted), ``sparsity_loss``, ``commitment_loss`` and
    ``attention_sparsity``: means over micro-batches, layers and processes since the last log. A stock model's loss
    holds the cross-entropy alone; its alignment trains through the gradient (:mod:`ssa.model.interface`).
    """

    _sums: Tensor | None = None  # [len(METRICS) + 1], the last is the number of micro-batches

    @property
    def ssa_config(self) -> SSAConfig | Settings:
        """How the model trains."""
        config = cast("PreTrainedModel", self.model).config
        return config if isinstance(config, SSAConfig) else settings_of(config.get_text_config())

    def step_stream(self) -> Stream:
        """The main stream of the optimiser step that is being computed."""
        probability = float(self.ssa_config.full_probability or 0.0)
        return draw_stream(self.args.seed, self.state.global_step + 1, probability)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """``Trainer``'s loss, in training with the step's stream and the alignment's scale."""
        if model.training:
            scale = self._alignment_scale(num_items_in_batch)
            inputs = {**inputs, "stream": self.step_stream(), "alignment_scale": scale}
            if isinstance(self.ssa_config, SSAConfig):
                inputs["sample_seed"] = draw_sample_seed(self.args.seed, self.state.global_step + 1)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._add(outputs if isinstance(self.ssa_config, SSAConfig) else self._told(loss))
        return (loss, outputs) if return_outputs else loss

    def _alignment_scale(self, num_items_in_batch: Tensor | int | None) -> float:
        """This micro-batch's share of the step, given how ``Trainer`` scales the whole loss afterwards.

        A stock model's alignment is not in the loss that is scaled.

        With a count of items it divides by nothing, but multiplies by the number of processes where the count is
        over all of them, to undo the average over processes. Without a count it divides by the micro-batches itself.
        """
        if isinstance(self.ssa_config, Settings):
            return 1.0 / self.current_gradient_accumulation_steps
        if num_items_in_batch is None:
            return 1.0
        processes = self.args.world_size if self.args.average_tokens_across_devices else 1
        return 1.0 / (self.current_gradient_accumulation_steps * processes)

    def _told(self, loss: Tensor) -> SSAOutput:
        """What a stock model aligned in this pass. Its cross-entropy is ``Trainer``'s own ``loss``."""
        if not self.ssa_config.alignment_weight:
            return SSAOutput(cross_entropy=loss.detach())
        told = last_alignment(cast("nn.Module", self.model))
        return SSAOutput(
            cross_entropy=loss.detach(),
            sparsity_loss=told["sparsity_loss"],
            commitment_loss=told["commitment_loss"],
            attention_sparsity=told["attention_sparsity"],
        )

    def _add(self, outputs: Any) -> None:
        sparsity, commitment = outputs.sparsity_loss, outputs.commitment_loss
        values = [outputs.cross_entropy]
        if sparsity is not None:
            used = {"both": sparsity + commitment, "sparsity": sparsity, "commitment": commitment}
            alignment = used[self.ssa_config.alignment_directions]
            values += [x.mean() for x in (alignment, sparsity, commitment, outputs.attention_sparsity)]
        with torch.no_grad():
            now = torch.stack([*(value.double() for value in values), torch.ones_like(values[0]).double()])
        self._sums = now if self._sums is None else self._sums + now

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """``Trainer``'s log with the metrics of both streams."""
        if self._sums is not None and "loss" in logs:
            *sums, count = self.accelerator.gather(self._sums[None]).sum(0).tolist()
            logs |= {name: total / count for name, total in zip(METRICS, sums, strict=False)}
            self._sums = None
        super().log(logs, *arguments, **keywords)
