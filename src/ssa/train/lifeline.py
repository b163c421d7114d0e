"""Ends a process that waits for a GPU which waits for a dead rank.

A collective on a GPU whose other side is gone never ends. The host notices at its next exchange, unless it waits for
that very GPU: then no exception reaches it. So a thread of every rank waits for a word from the next rank, through
gloo, whose connection breaks at once when a process dies. The ranks say that word at the end of the run.

No Python thread runs if the one that waits for the GPU holds the interpreter's lock, as a driver call inside some
extension may; NCCL's watchdog waits for that lock too. So a second thread winds up a timer of C, which needs no lock:
when nobody has wound it up for the run's timeout, it prints where every thread is and ends the process with code 1.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from ssa.errors import SSAError

GRACE_SECONDS = 6.0  # for the main thread to end by itself, as it does unless the GPU holds it
LEAST_SECONDS = 20.0  # of a held lock before the process is given up, however short the run's timeout
WIND_SECONDS = 1.0
_FOREVER = timedelta(days=365)


class Lifeline:
    """Watches the next of ``size`` ranks; every rank must make one.

    Args:
        seconds: for which the interpreter's lock may be held, at least LEAST_SECONDS.
        explain: the error of a broken connection, which ends this process with the error's exit code.
    """

    def __init__(self, rank: int, size: int, seconds: float, explain: Callable[[Exception], SSAError]) -> None:
        self._rank, self._size, self._explain = rank, size, explain
        self._seconds, self._closed = max(seconds, LEAST_SECONDS), threading.Event()
        self._group = dist.new_group(backend="gloo", timeout=_FOREVER)
        self._thread = threading.Thread(target=self._listen, name="ssa-lifeline", daemon=True)
        self._thread.start()
        self._timer = threading.Thread(target=self._wind, name="ssa-lifeline-timer", daemon=True)
        self._timer.start()

    def _listen(self) -> None:
        try:
            dist.recv(torch.empty(1), (self._rank + 1) % self._size, group=self._group)
        except RuntimeError as error:  # dist.DistError is one, and gloo raises plain ones
            found = self._explain(error)
            time.sleep(GRACE_SECONDS)
            print(f"ssa train: rank {self._rank}: {found}", file=sys.stderr, flush=True)
            os._exit(found.exit_code)

    def _wind(self) -> None:
        while not self._closed.is_set():
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)  # 2: whatever sys.stderr is now
            self._closed.wait(WIND_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """All ranks are at the end: stop watching."""
        dist.send(torch.zeros(1), (self._rank - 1) % self._size, group=self._group)
        self._thread.join()
        self._closed.set()
        self._timer.join()
