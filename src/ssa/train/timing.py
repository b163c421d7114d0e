"""Speed, utilisation and memory of the device, measured without making it wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ssa.model import SSAForCausalLM
from ssa.train.cost import GIB, peak_flops


class Event(Protocol):
    """A mark on a device's time line, as ``torch.cuda.Event``."""

    def record(self) -> None:
        """Set the mark behind what is queued."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds up to ``end_event``. The device must have passed both."""


class AttentionClock:
    """Times the attention operations (selection, both streams, alignment) and the whole forward pass of sampled steps.

    Nothing waits: events are queued with the work, and :meth:`read` is called after the host has waited for the step's
    loss anyway. The backward pass is not timed. Nothing is timed on a CPU, nor where whole layers are compiled, whose
    graphs the hooks would break.

    Args:
        model: whose layers are timed.
        event: makes an event; None: ``torch.cuda.Event`` on a GPU.
    """

    def __init__(self, model: SSAForCausalLM, event: Callable[[], Event] | None = None) -> None:
        on_gpu = next(model.parameters()).device.type == "cuda"
        self._event = event or ((lambda: torch.cuda.Event(enable_timing=True)) if on_gpu else None)
        compiled = any(layer._compiled_call_impl is not None for layer in model.model.layers)
        self._modules = [model, *(layer.self_attn for layer in model.model.layers)]
        self._hooks: list[Any] = []
        self._open: list[Event] = []
        self._spans: list[list[tuple[Event, Event]]] = [[], []]  # the model's, the attention modules'
        self._inside = False
        if compiled:
            self._event = None

    def start(self) -> None:
        """Time the forward passes from here to :meth:`read`."""
        if self._event is None or self._hooks:
            return
        for module in self._modules:
            self._hooks.append(module.register_forward_pre_hook(self._enter))
            self._hooks.append(module.register_forward_hook(self._leave))

    def read(self) -> float | None:
        """Attention's share of the forward pass since :meth:`start`, in [0, 1]; None if nothing was timed."""
        for hook in self._hooks:
            hook.remove()
        whole, attention = (sum(begin.elapsed_time(end) for begin, end in spans) for spans in self._spans)
        self._hooks, self._open, self._spans = [], [], [[], []]
        return attention / whole if whole > 0 else None

    def _enter(self, module: torch.nn.Module, arguments: Any) -> None:
        if module is self._modules[0]:
            self._inside = True
        if self._inside and self._event is not None:
            begin = self._event()
            begin.record()
            self._open.append(begin)

    def _leave(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        if not self._inside or self._event is None:
            return
        end, is_model = self._event(), module is self._modules[0]
        end.record()
        self._spans[0 if is_model else 1].append((self._open.pop(), end))
        self._inside = not is_model


class Meter:
    """Work done since a mark, per second.

    Args:
        model: whose attention is timed in sampled steps.
        device: of this process; processes: of the run, each with a device like it.
    """

    def __init__(self, model: SSAForCausalLM, device: torch.device, processes: int) -> None:
        self._device, self._processes = device, processes
        self._clock = AttentionClock(model)
        self.restart()

    def restart(self) -> None:
        """Count from here."""
        self._mark, self._tokens, self._flops = time.monotonic(), 0, 0.0

    def add(self, tokens: int, flops: float) -> None:
        """Count a step's work."""
        self._tokens += tokens
        self._flops += flops

    def sample(self) -> None:
        """Time attention in the step that comes."""
        self._clock.start()

    def read(self) -> dict[str, float | None]:
        """``tokens_per_second`` and ``mfu`` (see :func:`ssa.train.cost.step_flops`) since the mark, ``attention_share``
        of the sampled forward pass, ``peak_memory_gib`` of this device; None where it cannot be known. Counts anew.

        Call it after the host has waited for the device, so that the clock counts finished work.
        """
        seconds = max(time.monotonic() - self._mark, 1e-9)
        memory, name = None, None
        if self._device.type == "cuda":
            memory, name = torch.cuda.max_memory_allocated(self._device) / GIB, torch.cuda.get_device_name(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        peak = peak_flops(name)
        found = {
            "tokens_per_second": self._tokens / seconds,
            "mfu": None if peak is None else self._flops / (seconds * peak * self._processes),
            "attention_share": self._clock.read(),
            "peak_memory_gib": memory,
        }
        self.restart()
        return found
