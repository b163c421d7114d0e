"""What the sparse stream may read: block size, budget, forced blocks and the rule that ranks blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ssa.errors import InputError

SelectionRule = Literal["exact", "official"]
Flavour = Literal["estimated", "certified", "per_block"]
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def is_integer(value: object) -> bool:
    """True for an ``int`` proper: neither a ``bool`` nor a float that happens to be whole."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class SparseSpec:
    """Budget and rule of block selection (paper section 3). Immutable, validated at construction.

    Attributes:
        block_size: tokens per block S, a power of two up to 256 (GPU kernels: 16, 32, 64, 128).
        num_blocks: blocks per query k, the own block included. The receptive field is ``k * S`` tokens.
        first_blocks: blocks at the start of the document that are always selected (attention sinks).
        local_blocks: most recent blocks that are always selected; 1 is the query's own block alone.
        rule: ``"exact"`` is the true top-k. ``"official"`` reproduces the published code's streaming merge,
            which keeps only the best ``S/2`` of all earlier chunks of S blocks beside the best ``S/2`` of the
            newest chunk; for checkpoints trained under it.
        max_dropped_mass: take for every query the fewest blocks, at most ``num_blocks``, whose remainder holds at most
            this share of every head's attention (0 <= share < 1); None takes ``num_blocks`` always. Beyond the paper.
        flavour: how that is known. ``"estimated"``: from the mean keys. ``"certified"``: from bounds that hold for
            every key of a block, so that the limit is never exceeded where ``num_blocks`` suffices. ``"per_block"``:
            the limit is not on the sum but on every block that is dropped, as a mean over the group's heads,
            estimated; of all choices with as many blocks this one drops the least, over heads and queries together.
        safety: factor on the estimate, see ``docs/budgets.md``.
    """

    block_size: int = 16
    num_blocks: int = 16
    first_blocks: int = 0
    local_blocks: int = 1
    rule: SelectionRule = "exact"
    max_dropped_mass: float | None = None
    flavour: Flavour = "estimated"
    safety: float = 1.0

    def __post_init__(self) -> None:
        if not is_integer(self.block_size) or self.block_size not in BLOCK_SIZES:
            raise InputError("SparseSpec.block_size", repr(self.block_size), f"an integer out of {BLOCK_SIZES}")
        if not is_integer(self.num_blocks) or self.num_blocks < 1:
            raise InputError("SparseSpec.num_blocks", repr(self.num_blocks), "an integer of at least 1")
        forced = (self.first_blocks, self.local_blocks)
        if not all(map(is_integer, forced)) or self.first_blocks < 0 or self.local_blocks < 1:
            raise InputError(
                "SparseSpec",
                f"first_blocks {self.first_blocks!r}, local_blocks {self.local_blocks!r}",
                "integers first_blocks >= 0 and local_blocks >= 1 (the own block is always read)",
            )
        if self.first_blocks + self.local_blocks > self.num_blocks:
            raise InputError(
                "SparseSpec",
                f"{self.first_blocks} first + {self.local_blocks} local blocks",
                f"at most num_blocks = {self.num_blocks}",
                "a larger num_blocks",
            )
        if self.rule not in get_args(SelectionRule):
            raise InputError("SparseSpec.rule", repr(self.rule), f"one of {get_args(SelectionRule)}")
        self._check_limit()
        if self.rule == "official":
            if self.block_size < 2:
                raise InputError(
                    "SparseSpec.block_size",
                    self.block_size,
                    "at least 2 under rule 'official' (its merge keeps block_size / 2 old and new blocks)",
                    "rule='exact'",
                )
            if self.num_blocks > self.block_size:
                raise InputError(
                    "SparseSpec.num_blocks",
                    self.num_blocks,
                    f"at most block_size = {self.block_size} under rule 'official' (its merge buffer)",
                    "rule='exact'",
                )
            if forced != (0, 1):
                raise InputError(
                    "SparseSpec",
                    "forced blocks with rule 'official'",
                    "first_blocks 0, local_blocks 1",
                    "rule='exact'",
                )

    def _check_limit(self) -> None:
        if self.flavour not in get_args(Flavour):
            raise InputError("SparseSpec.flavour", repr(self.flavour), f"one of {get_args(Flavour)}")
        if not 0 < self.safety < float("inf"):
            raise InputError("SparseSpec.safety", repr(self.safety), "a positive number")
        if self.max_dropped_mass is None:
            return
        if not 0 <= self.max_dropped_mass < 1:
            raise InputError("SparseSpec.max_dropped_mass", repr(self.max_dropped_mass), "a number in [0, 1)")
        if self.rule == "official":
            raise InputError("SparseSpec", "max_dropped_mass with rule 'official'", "rule='exact'")

    @property
    def receptive_field(self) -> int:
        """Tokens that a query may read, ``k * S``."""
        return self.block_size * self.num_blocks

    def reads_all(self, length: int) -> bool:
        """Whether every query of a document of ``length`` tokens selects every block before it: sparse is full."""
        return self.rule == "exact" and self.max_dropped_mass is None and length <= self.receptive_field
