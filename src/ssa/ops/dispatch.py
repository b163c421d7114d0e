"""Which backend serves a call, and why.

Each operation lists its backends in order of preference. ``"auto"`` takes the first that can serve the call; a
backend asked for by name either serves it or raises :class:`~ssa.errors.BackendError`. Nothing else falls back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import BackendError, InputError

F = TypeVar("F", bound=Callable[..., Any])


def constant_when_compiled(function: F) -> F:
    """``torch.compile`` calls the function while it traces and takes the result (a bool or a string) as a constant.

    What ``torch.compiler.assume_constant_result`` does, without importing the compiler, and Triton with it, now.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Request:
    """The facts of a call that decide whether a backend can serve it."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int | None = None
    num_blocks: int | None = None
    layout: DocumentLayout | None = None
    rows: Any = None  # a QueryRows, where only some query rows are computed

    @classmethod
    def of(cls, q: Tensor, k: Tensor, **facts: Any) -> Request:
        """From query ``[B, T, H, D]`` and key ``[B, T, K, D]``."""
        return cls(q.device, q.dtype, q.shape[2], k.shape[2], q.shape[3], **facts)


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        name: what a user writes as ``backend=``.
        target: ``"module:function"``, imported when first chosen.
        refusal: the reason why it cannot serve a request, or None if it can.
        detail: how it would serve a request that it can serve, for :func:`explain`.
    """

    name: str
    target: str
    refusal: Callable[[Request], str | None]
    detail: Callable[[Request], str] | None = None

    def load(self) -> Callable[..., Any]:
        """The function behind the name."""
        _import(self.target)
        return IMPORTED[self.target]["function"]

    def __post_init__(self) -> None:
        IMPORTED.setdefault(self.target, {})


# torch.compile cannot trace an import, but it can read what was imported; one dictionary per target, because it looks
# at a dictionary only once and would not see a second backend that is imported during the same trace
IMPORTED: dict[str, dict[str, Callable[..., Any]]] = {}


@constant_when_compiled
def _import(target: str) -> bool:
    if not IMPORTED[target]:
        module, function = target.split(":")
        IMPORTED[target]["function"] = getattr(import_module(module), function)
    return True


def always(request: Request) -> None:
    """Refusal of a backend that serves everything."""


OPERATIONS: dict[str, tuple[Backend, ...]] = {}


def register(operation: str, *backends: Backend) -> None:
    """Declare the backends of an operation, best first. Called once per operation by its ``api`` module."""
    OPERATIONS[operation] = backends


def find(operation: str, request: Request, backend: str = "auto") -> Backend:
    """The backend that serves ``request``.

    Raises:
        InputError: unknown backend name.
        BackendError: the named backend cannot serve the request, or none can.
    """
    backends = OPERATIONS[operation]
    if backend == "auto":
        for candidate in backends:
            if candidate.refusal(request) is None:
                return candidate
        raise BackendError(
            operation, f"no backend for {replace(request, layout=None, rows=None)}", "a supported call", "explain()"
        )
    for candidate in backends:
        if candidate.name == backend:
            if reason := candidate.refusal(request):
                raise BackendError(
                    f"{operation}(backend={backend!r})",
                    reason,
                    "a call that this backend can serve",
                    "backend='auto'",
                )
            return candidate
    raise InputError(f"{operation}.backend", repr(backend), f"'auto' or one of {[b.name for b in backends]}")


def choose(operation: str, request: Request, backend: str = "auto") -> Callable[..., Any]:
    """The function of :func:`find`'s backend."""
    return find(operation, request, backend).load()


@dataclass(frozen=True)
class Explanation:
    """Outcome of :func:`explain`: the chosen backend and the reason against every other."""

    operation: str
    chosen: str
    reasons: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.operation}: {self.chosen}"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.reasons])


def explain(
    operation: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    heads: int = 32,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    num_blocks: int = 16,
    layout: DocumentLayout | None = None,
) -> Explanation:
    """Which backend ``auto`` takes for such a call, and why not the others.

    ``operation`` is one of ``"select_blocks"``, ``"sparse_attention"``, ``"full_attention"`` and
    ``"full_attention_rows"``.
    """
    if operation not in OPERATIONS:
        raise InputError("explain.operation", repr(operation), f"one of {sorted(OPERATIONS)}")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise InputError("explain.device", repr(device), "a torch device such as 'cpu' or 'cuda'") from error
    request = Request(where, dtype, heads, kv_heads, head_dim, block_size, num_blocks, layout)
    chosen, reasons = "none", []
    for candidate in OPERATIONS[operation]:
        reason = candidate.refusal(request)
        if reason is None and chosen == "none":
            chosen = candidate.name
            reasons.append((candidate.name, f"chosen, {candidate.detail(request)}" if candidate.detail else "chosen"))
        else:
            reasons.append((candidate.name, reason or f"can serve it, but {chosen} comes first"))
    return Explanation(operation, chosen, tuple(reasons))


def first_reason(reasons: Sequence[tuple[bool, str]]) -> str | None:
    """The text of the first true condition: the usual body of a refusal."""
    return next((text for broken, text in reasons if broken), None)
