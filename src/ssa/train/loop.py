"""The training loop: plain PyTorch, one process, resumable to the bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ssa._version import __version__
from ssa.data import Batch, Loader, PackedDataset
from ssa.environment import commit, machine
from ssa.errors import ConfigError, NumericError, OutOfMemoryError, SSAError
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.train import checkpoint
from ssa.train.disk import disk_errors
from ssa.train.faults import fault_point
from ssa.train.interrupt import Interrupt
from ssa.train.optimizer import MAX_SKIPS_IN_ROW, StepGuard, apply_gradients, build_optimizer, learning_rate
from ssa.train.recipe import Recipe
from ssa.train.recipe_file import dump_recipe
from ssa.train.run_folder import RunFolder, clear_way, export_model, open_run
from ssa.train.state import STATE, TrainingState, check_resumable, read_state
from ssa.train.step import StepSums, accumulate_gradients
from ssa.train.streams import draw_stream
from ssa.train.telemetry import Telemetry, say, truncate_metrics
from ssa.train.tensors import load_model_tensors, load_optimizer_tensors, model_tensors, optimizer_tensors
from ssa.train.validation import validate
from ssa.train.world import World, autocast, check_precision, read_world, resolve_device

MODEL, OPTIMIZER, CONFIG = "model.safetensors", "optimizer.safetensors", "config.json"
EXIT_CODES = {"finished": 0, "SIGINT": 130, "SIGTERM": 143}


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: optimiser steps done.
        reason: ``"finished"``, ``"SIGTERM"`` or ``"SIGINT"``.
        folder: folder of the run; it holds ``model/`` if the run finished.
    """

    step: int
    reason: str
    folder: Path

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0, 143 or 130."""
        return EXIT_CODES[self.reason]


def train(recipe: Recipe, out: str | Path | None = None, resume: str | Path | None = None) -> Outcome:
    """Train a recipe, or go on with a run of it.

    Args:
        recipe: what to train.
        out: folder of the run; None: the recipe's output, or ``runs/NAME``.
        resume: None for a new run; ``"latest"``, or the path of one checkpoint (see :func:`open_run`).

    Raises:
        SSAError: of the kind that says what is wrong (recipe, data, checkpoint, numbers, memory, disk).
    """
    world, device = read_world(), resolve_device(recipe.training.device)
    check_precision(recipe.training.precision, device)
    dataset = open_dataset(recipe, "train")
    validation = read_validation_rows(recipe)
    config = configure(recipe, dataset)
    with open_run(Path(out or recipe.output or f"runs/{recipe.name}"), resume) as folder:
        state = None
        if folder.start is not None:
            state = read_state(folder.start)
            dataset.verify()  # the manifest's fingerprint says what the rows were, not what they are
            check_resumable(state, recipe, dataset.fingerprint, folder.start)
        for note in (*folder.notes, *clear_way(folder)):
            say(f"ssa train: {note}")
        model = build_model(config, recipe.seed)
        return Trainer(recipe, model, dataset, validation, folder, device, world, state).run()


def open_dataset(recipe: Recipe, split: str) -> PackedDataset:
    """Open a split of the recipe's data.

    Raises:
        ConfigError: rows of another length, or a larger vocabulary, than the recipe says.
        DataError: no prepared data there.
    """
    dataset = PackedDataset(recipe.data.path, split)
    if dataset.row_length != recipe.data.row_length:
        raise ConfigError("data.row_length", recipe.data.row_length, f"{dataset.row_length}, as in {recipe.data.path}")
    if recipe.model.vocab_size is not None and dataset.vocab_size > recipe.model.vocab_size:
        expected = f"at least the {dataset.vocab_size} ids of {recipe.data.path}"
        raise ConfigError("model.vocab_size", recipe.model.vocab_size, expected)
    return dataset


def read_validation_rows(recipe: Recipe) -> list[Batch]:
    """The first rows of the valid split, as micro-batches; none if the recipe does not validate."""
    training = recipe.training
    if not training.validate_every:
        return []
    dataset = open_dataset(recipe, "valid")
    return list(Loader(dataset, training.micro_batch_rows, shuffle=False, epochs=1, limit=training.validate_rows))


def configure(recipe: Recipe, dataset: PackedDataset) -> SSAConfig:
    """The model's configuration, with the special tokens of the data's tokenizer, which generation needs."""
    config = recipe.model_config(dataset.vocab_size)
    tokenizer = dataset.tokenizer()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    return config


def build_model(config: SSAConfig, seed: int) -> SSAForCausalLM:
    """A model with the initial weights of ``seed``, on the CPU so that they are the same for any device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SSAForCausalLM(config)


def compile_layers(model: SSAForCausalLM) -> None:
    """Compile, in place, the layers whose graph is the same for every batch.

    Attention is not among them: its graph follows the documents of a batch, so it would be compiled again and again.
    """
    for module in model.modules():
        if isinstance(module, LlamaMLP | LlamaRMSNorm):
            module.compile()


@contextmanager
def _memory_errors(step: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        used = str(error).partition(".")[0]
        hint = "a smaller training.micro_batch_rows, or training.activation_checkpointing"
        raise OutOfMemoryError(f"step {step}", used, "memory for a micro-batch", hint) from error


class Trainer:
    """One run. Construction loads everything; :meth:`run` trains until the end or a signal."""

    def __init__(
        self,
        recipe: Recipe,
        model: SSAForCausalLM,
        dataset: PackedDataset,
        validation: list[Batch],
        folder: RunFolder,
        device: torch.device,
        world: World,
        state: TrainingState | None = None,
    ) -> None:
        self.recipe, self.dataset, self.folder, self.device = recipe, dataset, folder, device
        self.validation = validation
        self.context = partial(autocast, recipe.training.precision, device)
        if folder.start is not None:
            load_model_tensors(model, checkpoint.read_tensors(folder.start, MODEL), f"{folder.start / MODEL}")
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types
        self.model = model.train()
        self.optimizer = build_optimizer(model, recipe.optimizer)
        if folder.start is not None:
            moments = checkpoint.read_tensors(folder.start, OPTIMIZER)
            load_optimizer_tensors(model, self.optimizer, moments, f"{folder.start / OPTIMIZER}")
        self.step, self.tokens = (state.step, state.tokens) if state else (0, 0)
        self.guard = StepGuard(device, *((state.skipped, state.skipped_in_row) if state else (0, 0)))
        rows = recipe.training.micro_batch_rows
        self.loader = Loader(dataset, rows, recipe.seed, rank=world.rank, world_size=world.size)
        if state:
            self.loader.load_state(state.data)
        self._seconds_before = state.seconds if state else 0.0
        if recipe.training.activation_checkpointing:
            # The first is the name since transformers 5.24; the second goes with v6.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        if recipe.training.compile:
            compile_layers(model)

    # ------------------------------------------------------------------ the run
    def run(self) -> Outcome:
        """Train to the last step, or to the first signal."""
        self._begin = self._mark = time.monotonic()
        self._tokens_at_mark = self.tokens
        self.telemetry = self._open_telemetry()
        try:
            with Interrupt() as interrupt:
                while self.step < self.recipe.steps and interrupt.received is None:
                    with _memory_errors(self.step + 1):
                        self._do_step(interrupt)
            finished = interrupt.received is None
            reason = "finished" if interrupt.received is None else interrupt.received.name
            if finished:
                export_model(self.model, Path(self.recipe.data.path), self.folder)
            self.telemetry.record("end", step=self.step, seconds=self._seconds(), reason=reason)
            return Outcome(self.step, reason, self.folder.path)
        except SSAError as error:
            self.telemetry.record("end", step=self.step, seconds=self._seconds(), reason=type(error).__name__)
            raise
        finally:
            self.telemetry.close()

    def _do_step(self, interrupt: Interrupt) -> None:
        training, step = self.recipe.training, self.step + 1
        last = step == self.recipe.steps
        fault_point("step", step)
        stream = draw_stream(self.recipe.seed, step, float(self.model.config.full_probability or 0.0))
        batches = list(islice(self.loader, training.rows_per_step // training.micro_batch_rows))
        sums = accumulate_gradients(self.model, batches, stream, self.device, self.context)
        norm = apply_gradients(self.optimizer, self.guard, self.recipe, step, sums.loss)
        self.step, self.tokens = step, self.tokens + sum(batch.input_ids.numel() for batch in batches)
        self.telemetry.advance(step)
        if step % training.log_every == 0 or step == 1 or last:
            self._settle()
            self._log(stream, sums, norm)
        if training.validate_every and (step % training.validate_every == 0 or last):
            self._validate()
        if step % training.checkpoint_every == 0 or last or interrupt.received is not None:
            self._settle()
            self._save()

    def _settle(self) -> None:
        """Hear from the guard, which steps since the last time were left out; stop if there were too many."""
        skips = self.guard.read()
        for step in skips.steps:
            self.telemetry.record("skip", step=step)
        if skips.stop:
            raise NumericError(
                f"step {skips.steps[-1] if skips.steps else self.step}",
                f"a non-finite loss or gradient for the {MAX_SKIPS_IN_ROW}rd time in a row",
                "finite numbers",
                "a lower optimizer.learning_rate in a new run",
            )

    # ------------------------------------------------------------------ what is written
    def _open_telemetry(self) -> Telemetry:
        recipe, path = self.recipe, self.folder.metrics
        if self.folder.continues:
            truncate_metrics(path, self.step)
        with disk_errors(self.folder.path):
            (self.folder.path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        anew = not path.exists() or path.stat().st_size == 0
        board = self.folder.path / "tensorboard" if recipe.training.tensorboard else None
        telemetry = Telemetry(path, recipe.steps, self.step, board)
        if anew:
            telemetry.start(
                name=recipe.name,
                method=recipe.model.method,
                seed=recipe.seed,
                parameters=self.model.num_parameters(),
                machine=machine() | {"device": str(self.device)},
                commit=commit(),
                version=__version__,
                steps=recipe.steps,
                tokens_per_step=recipe.tokens_per_step,
            )
        if self.folder.start is not None:
            telemetry.record("resume", step=self.step)
        return telemetry

    def _log(self, stream: str, sums: StepSums, norm: Tensor) -> None:
        loss = float(sums.loss)  # waits for the device, so that the clock below counts finished work
        now = time.monotonic()
        speed = (self.tokens - self._tokens_at_mark) / max(now - self._mark, 1e-9)
        self._mark, self._tokens_at_mark = now, self.tokens
        self.telemetry.record(
            "step",
            step=self.step,
            tokens=self.tokens,
            stream=stream,
            learning_rate=learning_rate(self.recipe, self.step),
            loss=loss,
            cross_entropy=float(sums.cross_entropy),
            **self._alignment(sums),
            gradient_norm=float(norm),
            skipped=self.guard.total,
            tokens_per_second=speed,
            seconds=self._seconds(),
        )

    def _alignment(self, sums: StepSums) -> dict[str, Any]:
        """The alignment fields of a step record; null where the method does not align."""
        used = {"sparsity": (1, 0), "commitment": (0, 1), "both": (1, 1)}[self.recipe.model.alignment_directions]
        layers: dict[str, Tensor | None] = {
            "alignment": None,
            "sparsity_loss": sums.sparsity_loss,
            "commitment_loss": sums.commitment_loss,
            "attention_sparsity": sums.attention_sparsity,
        }
        if sums.sparsity_loss is not None and sums.commitment_loss is not None:
            layers["alignment"] = used[0] * sums.sparsity_loss + used[1] * sums.commitment_loss
        record: dict[str, Any] = {name: None if x is None else float(x.mean()) for name, x in layers.items()}
        for name in ("alignment", "attention_sparsity"):
            values = layers[name]
            record[f"{name}_per_layer"] = None if values is None else values.tolist()
        return record

    def _validate(self) -> None:
        for mode, value in validate(self.model, self.validation, self.device, self.context).items():
            self.telemetry.record("validation", step=self.step, mode=mode, cross_entropy=value)
        self._restart_clock()

    def _save(self) -> None:
        state = TrainingState(
            step=self.step,
            tokens=self.tokens,
            seconds=self._seconds(),
            skipped=self.guard.total,
            skipped_in_row=self.guard.in_row,
            data=self.loader.state(),
            data_fingerprint=self.dataset.fingerprint,
            recipe=self.recipe.to_dict(),
        )
        self.telemetry.sync()
        tensors = {MODEL: model_tensors(self.model), OPTIMIZER: optimizer_tensors(self.model, self.optimizer)}
        documents = {CONFIG: self.model.config.to_dict(), STATE: state.to_dict()}
        checkpoint.write_checkpoint(self.folder.checkpoints, self.step, tensors, documents)
        checkpoint.retain(self.folder.checkpoints, self.recipe.training.keep_checkpoints)
        self._restart_clock()

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._begin

    def _restart_clock(self) -> None:
        """Leave validation and saving out of the tokens per second."""
        self._mark, self._tokens_at_mark = time.monotonic(), self.tokens
