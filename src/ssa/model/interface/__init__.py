"""Our attention in stock models of transformers: ``attn_implementation="ssa"`` (docs/guides/drop-in.md)."""

from transformers import AttentionInterface, AttentionMaskInterface

from ssa.model.interface.alignment import last_alignment, set_stream
from ssa.model.interface.attention import attention
from ssa.model.interface.places import causal_mask
from ssa.model.interface.settings import NAME, Settings, attention_mode, configure, restore

__all__ = ["Settings", "attention_mode", "configure", "last_alignment", "register", "restore", "set_stream"]


def register() -> None:
    """Make ``attn_implementation="ssa"`` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, causal_mask)


register()
