"""The processes of a run and what they tell each other: step facts, sums, results of rank 0, and failures.

Two channels exist. Tensors on the device go through the default group (NCCL on GPUs, gloo on CPUs). Facts of the
host go through gloo, which never waits for a GPU, and failures through the store, which outlives a broken group.
Everything that travels is integers, JSON or tensors; nothing is pickled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from hashlib import blake2b
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssa import errors
from ssa.errors import DistributedError, SSAError
from ssa.train.lifeline import Lifeline
from ssa.train.world import World

GRACE_SECONDS = 3.0  # for a failing rank to say why, and for the others to say that they are alive
PATIENCE = timedelta(hours=2)  # while rank 0 saves, verifies or exports
_FAILURE = "failure"
_opened = count()  # runs of this process; every process of a job makes the same ones
_BROKEN = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


class Ranks:
    """All processes of the run, seen from one. With one process every method is trivial and nothing is set up.

    Attributes:
        world: this process's place.
        timeout: how long the others wait for a rank before they give it up.
    """

    def __init__(self, world: World | None = None, store: dist.Store | None = None, timeout: float = 50.0) -> None:
        self.world, self.timeout = world or World(), timedelta(seconds=timeout)
        self._store, self._patient, self._lifeline = store, None, None
        self._where: Callable[[], str] = lambda: "start"
        if self.world.size > 1:
            self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)
            rank, size = self.world.rank, self.world.size
            self._lifeline = Lifeline(rank, size, timeout, lambda e: self._diagnose(self._where(), e))

    def close(self) -> None:
        """End the run in good order; every rank must have got here."""
        if self._lifeline is not None:
            self._lifeline.close()

    @property
    def leads(self) -> bool:
        """True on rank 0, which writes files and talks to the user."""
        return self.world.rank == 0

    # ------------------------------------------------------------------ agreement
    def agree(self, where: str, equal: Mapping[str, object], numbers: list[int]) -> list[list[int]]:
        """Compare facts that must be equal, and gather integers, in one exchange between the hosts.

        Args:
            where: of the error, such as ``"step 7"``.
            equal: facts by name; compared as text.
            numbers: this rank's integers (int64).

        Returns:
            The integers of every rank, by rank.

        Raises:
            DistributedError: a fact differs; it names the fact and the ranks. Raised on every rank.
        """
        if self.world.size == 1:
            return [numbers]
        mine = torch.tensor([*(_digest(value) for value in equal.values()), *numbers])
        gathered = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(gathered, mine)
        rows = torch.stack(gathered)
        for column, name in enumerate(equal):
            odd = (rows[:, column] != rows[0, column]).nonzero().flatten().tolist()
            if odd:
                raise DistributedError(
                    where,
                    f"another {name} on rank {', '.join(map(str, odd))} than on rank 0",
                    "the same on every rank",
                    "the same recipe, data and version of ssa everywhere",
                )
        return rows[:, len(equal) :].tolist()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks; the same bits on each. Queued on the device like any other operation."""
        if self.world.size > 1:
            dist.all_reduce(values)
        return values

    def lead(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` on rank 0 while the others wait; its result (as JSON holds it), or its error, on every rank.

        Raises:
            SSAError: what ``action`` raised.
        """
        if self.world.size == 1:
            return action()
        message: dict[str, Any] = {}
        if self.leads:
            try:
                message = {"value": action()}
            except SSAError as error:
                self._broadcast({"error": _to_dict(error)})
                raise
        message = self._broadcast(message)
        if "error" in message:
            raise _from_dict(message["error"])
        return message["value"]

    def _broadcast(self, message: dict[str, Any]) -> dict[str, Any]:
        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        length = torch.tensor([len(text)])
        dist.broadcast(length, 0, group=self._patient)
        if not self.leads:
            text = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, 0, group=self._patient)
        found: dict[str, Any] = json.loads(bytes(text.tolist()))
        return found

    # ------------------------------------------------------------------ failures
    @contextmanager
    def watch(self, where: Callable[[], str]) -> Iterator[None]:
        """Tell the other ranks of an error inside, and turn a broken group into an error that names the cause.

        Args:
            where: of the error, such as ``"step 7"``; asked when something fails.

        Raises:
            SSAError: another rank's error, with its rank before it.
            DistributedError: a rank that is gone, or does not answer.
        """
        self._where = where
        try:
            yield
        except SSAError as error:
            self._tell(error)
            raise
        except Exception as error:
            if self.world.size > 1 and _is_broken_group(error):
                raise self._diagnose(where(), error) from error
            self._tell(DistributedError(where(), f"{type(error).__name__}: {error}", "no error"))
            raise

    def _tell(self, error: SSAError) -> None:
        if self._store is None:
            return
        told = _to_dict(error) | {"where": f"rank {self.world.rank}, {error.where}"}
        with suppress(dist.DistError):  # a store that is gone went with its rank, whose error is the one to be heard
            self._store.compare_set(_FAILURE, "", json.dumps(told))

    def _diagnose(self, where: str, error: Exception) -> SSAError:
        """Why the group broke: what a rank told before it ended, or which ranks no longer answer."""
        hint = "the output of that rank, then --resume"
        try:
            assert self._store is not None
            told, missing = self._ask_around(self._store)
        except dist.DistError:
            return DistributedError(where, "no contact to the other ranks", "a running rank 0", hint)
        if told is not None:
            return _from_dict(told)
        if not missing:
            line = str(error).partition("\n")[0]
            return DistributedError(where, f"a broken connection ({line})", "a network that holds", "--resume")
        names = ", ".join(map(str, missing))
        waited = f"an answer within {self.timeout.total_seconds():.0f} s"
        return DistributedError(where, f"no answer from rank {names} of {self.world.size}", waited, hint)

    def _ask_around(self, store: dist.Store) -> tuple[dict[str, str] | None, list[int]]:
        store.set(f"alive/{self.world.rank}", "1")
        end = time.monotonic() + GRACE_SECONDS
        while True:
            if store.check([_FAILURE]):
                told: dict[str, str] = json.loads(store.get(_FAILURE))
                return told, []
            missing = [rank for rank in range(self.world.size) if not store.check([f"alive/{rank}"])]
            if time.monotonic() > end:
                return None, missing
            time.sleep(0.05)


@contextmanager
def open_ranks(world: World, device: torch.device, timeout: float) -> Iterator[Ranks]:
    """The processes of the run, joined into process groups if there are several.

    Args:
        world: this process's place.
        device: of this process.
        timeout: seconds that a rank may keep the others waiting in one collective.

    Raises:
        DistributedError: the processes do not find each other.
    """
    if world.size == 1:
        yield Ranks(world, timeout=timeout)
        return
    limit = timedelta(seconds=timeout)
    try:
        store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=limit))
        store = dist.PrefixStore(f"ssa/{next(_opened)}", store)  # a launcher's store keeps the last run's keys
        gpu = device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=dist.PrefixStore("group", store),
            rank=world.rank,
            world_size=world.size,
            timeout=limit,
            device_id=device if gpu else None,
        )
        ranks = Ranks(world, store, timeout)
    except (dist.DistError, RuntimeError) as error:
        line = str(error).partition("\n")[0]
        where = f"rank {world.rank} of {world.size}"
        raise DistributedError(where, line, "every process to join", "torchrun, with a free port") from error
    yield ranks
    ranks.close()
    dist.destroy_process_group()  # not after an error: a group with a dead member can hang here


def _digest(value: object) -> int:
    """A value as int64, equal for equal text."""
    return int.from_bytes(blake2b(str(value).encode(), digest_size=8).digest(), "big", signed=True)


def _is_broken_group(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _BROKEN)
    )


def _to_dict(error: SSAError) -> dict[str, str]:
    texts = {"where": error.where, "got": str(error.got), "expected": str(error.expected), "hint": error.hint or ""}
    return {"class": type(error).__name__} | texts


def _from_dict(told: Mapping[str, str]) -> SSAError:
    kind = getattr(errors, told["class"], DistributedError)
    error: SSAError = kind(told["where"], told["got"], told["expected"], told["hint"] or None)
    return error
