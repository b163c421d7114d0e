"""The training loop: plain PyTorch on any number of processes, resumable to the bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from signal import Signals

import torch
from torch import Tensor

from ssa._version import __version__
from ssa.data import Batch, Loader, PackedDataset
from ssa.environment import commit, machine
from ssa.errors import NumericError, OutOfMemoryError, SSAError
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.train import checkpoint
from ssa.train.build import (
    build_model,
    check_split,
    compile_layers,
    configure,
    open_dataset,
    read_validation_rows,
    recompute_activations,
)
from ssa.train.continued import check_vocabulary, choose_trainable, merge_adapters
from ssa.train.cost import advise, must_recompute, must_reshard, step_flops, step_pairs
from ssa.train.disk import disk_errors
from ssa.train.faults import fault_point
from ssa.train.interrupt import Interrupt
from ssa.train.optimizer import (
    MAX_SKIPS_IN_ROW,
    StepGuard,
    apply_gradients,
    build_optimizer,
    gradient_norm,
    learning_rate,
)
from ssa.train.ranks import Ranks, open_ranks
from ssa.train.recipe import Recipe
from ssa.train.recipe_file import dump_recipe
from ssa.train.run_folder import RunFolder, clear_way, export_model, open_run
from ssa.train.sharding import resolve_shard, shard_model
from ssa.train.spikes import LossWindow
from ssa.train.state import STATE, TrainingState, check_resumable, read_state
from ssa.train.step import StepSize, StepSums, accumulate_gradients, alignment_fields, sum_over_ranks
from ssa.train.streams import Stream, draw_sample_seed, draw_stream
from ssa.train.telemetry import Telemetry, say, truncate_metrics
from ssa.train.tensors import gather, load_model_tensors, load_optimizer_tensors, model_tensors, optimizer_tensors
from ssa.train.timing import Meter
from ssa.train.trackers import open_trackers
from ssa.train.validation import validate
from ssa.train.world import autocast, check_precision, read_world, resolve_device

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
    world = read_world()
    device = resolve_device(recipe.training.device, world)
    check_precision(recipe.training.precision, device)
    check_split(recipe, world.size)
    resolve_shard(recipe.training.shard, world.size)
    dataset = open_dataset(recipe, "train")
    validation = read_validation_rows(recipe)
    config = configure(recipe, dataset)
    path = Path(out or recipe.output or f"runs/{recipe.name}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with open_ranks(world, device, recipe.training.timeout_seconds) as ranks, ExitStack() as stack:
        with ranks.watch(lambda: "start"):
            folder = _open_folder(ranks, path, resume, recipe, dataset, stack)
            weights = recipe.model.weights if folder.start is None else None
            if weights is not None:
                check_vocabulary(weights, dataset.tokenizer().get_vocab(), recipe.data.path)
            model = build_model(config, recipe.seed, weights)
            choose_trainable(model, recipe.model, recipe.seed)
            trainer = Trainer(recipe, model, dataset, validation, folder, device, ranks)
            ranks.lead(lambda: None)  # weights may take a while to make or read; wait for the last rank
        with ranks.watch(lambda: f"step {trainer.step + 1}"):
            return trainer.run()


def _open_folder(
    ranks: Ranks, path: Path, resume: str | Path | None, recipe: Recipe, dataset: PackedDataset, stack: ExitStack
) -> RunFolder:
    """Rank 0 locks the folder until ``stack`` closes, and checks what is resumed; the others hear the result."""

    def open_and_check() -> list[str]:
        folder = stack.enter_context(open_run(path, resume))
        if folder.start is not None:
            dataset.verify()  # the manifest's fingerprint says what the rows were, not what they are
            check_resumable(read_state(folder.start), recipe, dataset.fingerprint, folder.start)
        for note in (*folder.notes, *clear_way(folder)):
            say(f"ssa train: {note}")
        return [] if folder.start is None else [str(folder.start)]

    start = ranks.lead(open_and_check)
    return RunFolder(path, Path(start[0]) if start else None)


@contextmanager
def _memory_errors(where: str, recipe: Recipe, config: SSAConfig, processes: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        used, hint = str(error).partition(".")[0], advise(recipe, config, processes)
        raise OutOfMemoryError(where, used, "memory for a micro-batch", hint) from error


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
        ranks: Ranks,
    ) -> None:
        self.recipe, self.dataset, self.folder, self.device, self.ranks = recipe, dataset, folder, device, ranks
        training, size = recipe.training, ranks.world.size
        state = None if folder.start is None else read_state(folder.start)
        self.validation = validation
        self.context = partial(autocast, training.precision, device)
        self.parameters = model.num_parameters()
        if folder.start is not None:
            load_model_tensors(model, checkpoint.read_tensors(folder.start, MODEL), f"{folder.start / MODEL}")
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        if must_recompute(recipe, model.config, size, memory):
            recompute_activations(model)
            if ranks.leads and training.activation_checkpointing is None:
                say("ssa train: activations are recomputed, since they would not fit (ssa doctor RECIPE)")
        if training.compile or (training.compile is None and device.type == "cuda"):
            compile_layers(model)
        self.copies = 1  # ranks that hold each part of the gradients
        if size > 1:
            shard = resolve_shard(training.shard, size)
            self.copies = size // shard
            shard_model(model, ranks, shard, training.precision, must_reshard(recipe, model.config), device)
        self.model = model.train()
        self.optimizer = build_optimizer(model, recipe.optimizer)
        if folder.start is not None:
            moments = checkpoint.read_tensors(folder.start, OPTIMIZER)
            load_optimizer_tensors(model, self.optimizer, moments, f"{folder.start / OPTIMIZER}")
        self.step, self.tokens = (state.step, state.tokens) if state else (0, 0)
        self.guard = StepGuard(device, *((state.skipped, state.skipped_in_row) if state else (0, 0)))
        self.losses = LossWindow(training.spike_factor, state.losses if state else ())
        self.meter = Meter(model, device, size)
        self.loader = Loader(dataset, training.micro_batch_rows, recipe.seed, rank=ranks.world.rank, world_size=size)
        if state:
            self.loader.load_state(state.data)
        self._recipe_text = f"{__version__} {dump_recipe(recipe)}"
        self._saved_step = self.step
        self._seconds_before = state.seconds if state else 0.0

    # ------------------------------------------------------------------ the run
    def run(self) -> Outcome:
        """Train to the last step, or to the first signal."""
        self._begin = time.monotonic()
        self.meter.restart()
        self.telemetry = self._open_telemetry()
        try:
            reason = self._train()
            if reason == "finished":
                self._export()
            self.telemetry.record("end", step=self.step, seconds=self._seconds(), reason=reason)
            return Outcome(self.step, reason, self.folder.path)
        except SSAError as error:
            self.telemetry.record("end", step=self.step, seconds=self._seconds(), reason=type(error).__name__)
            raise
        finally:
            self.telemetry.close()

    def _train(self) -> str:
        """Do steps until all are done or a rank got a signal; what ended it."""
        with Interrupt() as interrupt:
            while self.step < self.recipe.steps:
                step, position = self.step + 1, self.loader.position
                stream = draw_stream(self.recipe.seed, step, float(self.model.config.full_probability or 0.0))
                with _memory_errors(f"step {step}", self.recipe, self.model.config, self.ranks.world.size):
                    batches = list(islice(self.loader, self._micro_batches()))
                    size, signal = self._agree(step, stream, position, batches, interrupt)
                    if signal:
                        self.loader.position = position  # these rows come again
                        self._settle()
                        self._save()
                        return Signals(signal).name
                    fault_point("step", step)
                    self._do_step(step, stream, batches, size)
        return "finished"

    def _micro_batches(self) -> int:
        training = self.recipe.training
        return training.rows_per_step // (training.micro_batch_rows * self.ranks.world.size)

    def _agree(
        self, step: int, stream: Stream, position: int, batches: list[Batch], interrupt: Interrupt
    ) -> tuple[StepSize, int]:
        """Before anything is computed: do all ranks mean the same step? Its size, and a signal that any of them got."""
        equal = {
            "step": step,
            "stream": stream,
            "loader position": position,
            "data": self.dataset.fingerprint,
            "recipe": self._recipe_text,
        }
        own = StepSize.of(batches)
        pairs = sum(step_pairs(batch.layout, self.model.config, stream) for batch in batches)
        numbers = [interrupt.received or 0, own.targets, own.rows, pairs]
        signals, targets, rows, all_pairs = zip(*self.ranks.agree(f"step {step}", equal, numbers), strict=True)
        tokens = self.recipe.tokens_per_step
        self.meter.add(tokens, step_flops(self.model.config, tokens, sum(all_pairs)))
        return StepSize(sum(targets), sum(rows)), max(signals)

    def _do_step(self, step: int, stream: Stream, batches: list[Batch], size: StepSize) -> None:
        training, last = self.recipe.training, step == self.recipe.steps
        is_logged = step % training.log_every == 0 or step == 1 or last
        if is_logged:
            self.meter.sample()
        seed = draw_sample_seed(self.recipe.seed, step)
        sums = accumulate_gradients(self.model, batches, stream, self.device, self.context, size, seed)
        sums, norm = sum_over_ranks(sums, gradient_norm(self.optimizer), self.copies, self.ranks)
        apply_gradients(self.optimizer, self.guard, self.recipe, step, sums.loss, norm)
        self.step, self.tokens = step, self.tokens + self.recipe.tokens_per_step
        self.losses.add(step, sums.loss)
        self.telemetry.advance(step)
        if is_logged:
            self._settle()
            self._log(stream, sums, norm)
        if training.validate_every and (step % training.validate_every == 0 or last):
            self._validate()
        if step % training.checkpoint_every == 0 or last:
            self._settle()
            self._save()

    def _settle(self) -> None:
        """Hear which steps since the last time were left out, or had a spike; stop if too many were left out."""
        for spike in self.losses.read():
            self.telemetry.record("spike", **spike._asdict())
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
        if not self.ranks.leads:
            return Telemetry(None, recipe.steps, self.step)
        if self.folder.continues:
            truncate_metrics(path, self.step)
        with disk_errors(self.folder.path):
            (self.folder.path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        anew = not path.exists() or path.stat().st_size == 0
        trackers = open_trackers(recipe.training.trackers, self.folder.path, recipe.name, self.step)
        telemetry = Telemetry(path, recipe.steps, self.step, trackers)
        if anew:
            telemetry.start(
                name=recipe.name,
                method=recipe.model.method,
                seed=recipe.seed,
                parameters=self.parameters,
                machine=machine() | {"device": str(self.device)},
                commit=commit(),
                version=__version__,
                steps=recipe.steps,
                tokens_per_step=recipe.tokens_per_step,
                processes=self.ranks.world.size,
            )
        if self.folder.start is not None:
            telemetry.record("resume", step=self.step, processes=self.ranks.world.size)
        return telemetry

    def _log(self, stream: str, sums: StepSums, norm: Tensor) -> None:
        loss = float(sums.loss)  # waits for the device, so that the meter counts finished work
        self.telemetry.record(
            "step",
            step=self.step,
            tokens=self.tokens,
            stream=stream,
            learning_rate=learning_rate(self.recipe, self.step),
            loss=loss,
            cross_entropy=float(sums.cross_entropy),
            **alignment_fields(sums, self.recipe.model.alignment_directions),
            gradient_norm=float(norm),
            skipped=self.guard.total,
            **self.meter.read(),
            seconds=self._seconds(),
        )

    def _validate(self) -> None:
        for mode, value in self._validation().items():
            self.telemetry.record("validation", step=self.step, mode=mode, cross_entropy=value)
        self.meter.restart()  # saving and validation are no training

    def _validation(self) -> dict[str, float]:
        return validate(self.model, self.validation, self.device, self.context, self.ranks)

    def _save(self) -> None:
        if self.step == self._saved_step:
            return
        state = TrainingState(
            step=self.step,
            tokens=self.tokens,
            seconds=self._seconds(),
            skipped=self.guard.total,
            skipped_in_row=self.guard.in_row,
            losses=list(self.losses.losses),
            data=self.loader.state(),
            data_fingerprint=self.dataset.fingerprint,
            recipe=self.recipe.to_dict(),
        )
        self.telemetry.sync()
        files = {MODEL: model_tensors(self.model), OPTIMIZER: optimizer_tensors(self.model, self.optimizer)}
        tensors = {name: gather(values, self.ranks.leads) for name, values in files.items()}
        documents = {CONFIG: self.model.config.to_dict(), STATE: state.to_dict()}

        def write() -> None:
            checkpoint.write_checkpoint(self.folder.checkpoints, self.step, tensors, documents)
            checkpoint.retain(self.folder.checkpoints, self.recipe.training.keep_checkpoints)

        self.ranks.lead(write)
        self._saved_step = self.step
        self.meter.restart()  # saving and validation are no training

    def _export(self) -> None:
        tensors = gather(model_tensors(self.model), self.ranks.leads)
        config, data, section = self.model.config, Path(self.recipe.data.path), self.recipe.model
        self.ranks.lead(lambda: export_model(config, merge_adapters(tensors, section), data, self.folder))

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._begin
