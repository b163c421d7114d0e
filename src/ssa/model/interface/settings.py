"""What our attention does in a stock transformers model: flat ``ssa_*`` config keys, set by :func:`configure`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, cast, get_args

from transformers import PretrainedConfig, PreTrainedModel

from ssa.errors import ConfigError, InputError
from ssa.model.configuration import Mode
from ssa.ops import AlignmentSpec, SparseSpec
from ssa.ops.dual.alignment import Directions, Distance
from ssa.ops.spec import SelectionRule

NAME = "ssa"
PREFIX = "ssa_"
SAVED_KEY = "attn_implementation"  # read by from_pretrained, but written by no save of transformers


@dataclass(frozen=True)
class Settings:
    """Attention of one stock model; every field is the config key ``ssa_<field>``.

    Attributes:
        mode: ``"full"`` or ``"sparse"``: what runs unless a training stream is given.
        block_size, num_blocks, first_blocks, local_blocks, selection_rule: see :class:`ssa.ops.SparseSpec`.
        alignment_weight, alignment_distance, alignment_directions: see :class:`ssa.ops.AlignmentSpec`. Weight 0 trains
            one stream alone.
        align_query_fraction: its ``query_fraction``; below 1, sparse steps need a ``sample_seed``.
        full_probability: chance that a training step's main stream is full attention, for whoever draws it.
    """

    mode: str = "sparse"
    block_size: int = 16
    num_blocks: int = 16
    first_blocks: int = 0
    local_blocks: int = 1
    selection_rule: str = "exact"
    alignment_weight: float = 10.0
    alignment_distance: str = "smooth_l1"
    alignment_directions: str = "both"
    align_query_fraction: float = 1.0
    full_probability: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError("ssa_mode", repr(self.mode), f"one of {get_args(Mode)}")
        if not isinstance(self.full_probability, int | float) or not 0 <= self.full_probability <= 1:
            raise ConfigError("ssa_full_probability", repr(self.full_probability), "a number in [0, 1]")
        try:
            self.sparse_spec()
            self.alignment_spec()
        except InputError as error:
            raise ConfigError(f"config, {error.where}", error.got, error.expected, error.hint) from None

    def sparse_spec(self) -> SparseSpec:
        """The selection of the sparse stream."""
        rule = cast("SelectionRule", self.selection_rule)
        return SparseSpec(self.block_size, self.num_blocks, self.first_blocks, self.local_blocks, rule)

    def alignment_spec(self) -> AlignmentSpec:
        """How training aligns the streams; a stock model has no gate, so gated and raw outputs are the same."""
        distance, directions = cast("Distance", self.alignment_distance), cast("Directions", self.alignment_directions)
        return AlignmentSpec(self.alignment_weight, distance, "raw", directions, self.align_query_fraction)


FIELDS = tuple(field.name for field in fields(Settings))


def settings_of(config: PretrainedConfig) -> Settings:
    """The settings that a config's keys say; defaults where it says nothing.

    Raises:
        ConfigError: an unknown ``ssa_*`` key or an impossible value.
    """
    values = {key.removeprefix(PREFIX): value for key, value in vars(config).items() if key.startswith(PREFIX)}
    if unknown := sorted(values.keys() - set(FIELDS)):
        known = ", ".join(PREFIX + name for name in FIELDS)
        raise ConfigError(f"config.{PREFIX}{unknown[0]}", "an unknown key", f"one of {known}")
    return Settings(**values)


def configure(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """Give a stock model our attention, or change how it runs: ``ssa.configure(model, mode="sparse", num_blocks=32)``.

    The settings are config keys and are saved with the model, as is the name of the attention: ``from_pretrained``
    finds both again, and fails where this package is not imported instead of quietly running full attention.

    Args:
        model: any model whose attention goes through ``transformers.AttentionInterface`` and is a causal softmax.
        changes: fields of :class:`Settings`; what is not named keeps its value.

    Returns:
        The same model.

    Raises:
        ConfigError: an unknown field or an impossible value.
    """
    from ssa.model.interface import register

    register()
    config = model.config.get_text_config()
    before = asdict(settings_of(config))
    if unknown := sorted(changes.keys() - before.keys()):
        raise ConfigError(f"ssa.configure.{unknown[0]}", "an unknown setting", f"one of {', '.join(FIELDS)}")
    for name, value in asdict(Settings(**{**before, **changes})).items():
        setattr(config, PREFIX + name, value)
    model.set_attn_implementation(NAME)
    remember(model.config)
    return model


def restore(model: PreTrainedModel, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """Undo :func:`configure`: another attention, and no key of ours in the config. Full-mode weights run anywhere."""
    config = model.config.get_text_config()
    for key in [key for key in vars(config) if key.startswith(PREFIX)]:
        delattr(config, key)
    vars(model.config).pop(SAVED_KEY, None)
    model.set_attn_implementation(attn_implementation)
    return model


def remember(config: PretrainedConfig) -> None:
    """Write the name of our attention where ``save_pretrained`` finds it; transformers itself forgets it."""
    setattr(config, SAVED_KEY, NAME)


@contextmanager
def attention_mode(
    model: PreTrainedModel, mode: str | None = None, *, num_blocks: int | None = None, block_size: int | None = None
) -> Iterator[PreTrainedModel]:
    """Run a stock model in another mode or at another budget inside a ``with``.

    Args:
        model: a model with our attention.
        mode: ``"full"`` or ``"sparse"``; num_blocks: blocks per query; block_size: tokens per block.

    Raises:
        ConfigError: unknown mode or impossible budget.
    """
    wanted = {"mode": mode, "num_blocks": num_blocks, "block_size": block_size}
    config = model.config.get_text_config()
    before = asdict(settings_of(config))
    after = Settings(**{**before, **{name: value for name, value in wanted.items() if value is not None}})
    missing = [name for name in FIELDS if not hasattr(config, PREFIX + name)]
    try:
        for name in wanted:
            setattr(config, PREFIX + name, getattr(after, name))
        yield model
    finally:
        for name in wanted:
            if name in missing:
                delattr(config, PREFIX + name)
            else:
                setattr(config, PREFIX + name, before[name])
