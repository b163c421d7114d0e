"""Runs of several gloo processes, forked so that torch is imported once."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiny_runs import tiny

from ssa.errors import SSAError
from ssa.train.loop import train

LIMIT = 60.0  # seconds in which every rank must have ended


def ranks(
    size: int,
    action: Callable[[int], int],
    log: Path,
    *,
    environs: Mapping[int, Mapping[str, str]] | None = None,
    meanwhile: Callable[[list[int]], None] | None = None,
) -> list[int]:
    """Run ``action(rank)`` in ``size`` processes; their exit codes, as the command's: an SSAError gives its own.

    Args:
        log: file that takes what the ranks print.
        environs: more environment variables, by rank.
        meanwhile: called with the process ids once all run.
    """
    port = _free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    children = [_fork(rank, size, port, action, log, (environs or {}).get(rank, {})) for rank in range(size)]
    if meanwhile is not None:
        meanwhile(children)
    return _collect(children, log)


def _fork(rank: int, size: int, port: int, action: Callable[[int], int], log: Path, more: Mapping[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **more)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1)
        faulthandler.register(signal.SIGUSR1, file=2)
        try:
            code = action(rank)
        except SSAError as error:
            print(f"[{rank}] {type(error).__name__}: {error}", file=sys.stderr)
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
    finally:
        os._exit(code)


def _collect(children: list[int], log: Path) -> list[int]:
    codes: dict[int, int] = {}
    end = time.monotonic() + LIMIT
    while len(codes) < len(children) and time.monotonic() < end:
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    late = [child for child in children if child not in codes]
    for child in late:
        os.kill(child, signal.SIGUSR1)  # where it is, into the log
        time.sleep(0.5)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not late, f"ranks {[children.index(child) for child in late]} did not end\n{log.read_text()}"
    return [codes[child] for child in children]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def train_on(
    size: int,
    data: Path,
    run: Path,
    method: str = "ssa",
    resume: str | None = None,
    prepare: Callable[[int], None] | None = None,
    environs: Mapping[int, Mapping[str, str]] | None = None,
    meanwhile: Callable[[list[int]], None] | None = None,
    **changes: Any,
) -> list[int]:
    """Train a tiny recipe on ``size`` processes; ``prepare(rank)`` may break things before. Exit codes by rank."""
    values: dict[str, Any] = {"training__micro_batch_rows": 1, "optimizer__learning_rate": 1e-3, **changes}

    def action(rank: int) -> int:
        if prepare is not None:
            prepare(rank)
        return train(tiny(data, method, **values), run, resume).exit_code

    log = run.with_name(f"{run.name}.log")
    return ranks(size, action, log, environs=environs, meanwhile=meanwhile)
