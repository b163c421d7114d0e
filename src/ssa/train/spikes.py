"""A window of recent losses, to tell a user of spikes. It changes nothing: the step was finite and is applied."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 64  # steps


class Spike(NamedTuple):
    """A step whose loss is far above the median of the window before it."""

    step: int
    loss: float
    median: float


class LossWindow:
    """The last :data:`WINDOW` finite losses. A spike is a loss above ``factor`` times their median once it is full.

    Args:
        factor: of the median; None: no spikes.
        losses: of the last steps, oldest first, as a resumed run has them.
    """

    def __init__(self, factor: float | None, losses: Iterable[float] = ()) -> None:
        self.factor = factor
        self.losses = deque(losses, maxlen=WINDOW)
        self._unread: list[tuple[int, Tensor]] = []

    def add(self, step: int, loss: Tensor) -> None:
        """Take a step's loss from the device without waiting for it."""
        self._unread.append((step, loss))

    def read(self) -> list[Spike]:
        """Spikes since the last reading. Waits for the device."""
        losses = torch.stack([loss for _, loss in self._unread]).tolist() if self._unread else []
        spikes = []
        for (step, _), loss in zip(self._unread, losses, strict=True):
            if loss - loss != 0:  # not finite: the guard's matter
                continue
            if self.factor is not None and len(self.losses) == WINDOW:
                middle = median(self.losses)
                if loss > self.factor * middle:
                    spikes.append(Spike(step, loss, middle))
            self.losses.append(loss)
        self._unread.clear()
        return spikes
