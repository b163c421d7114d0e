"""New tokens against a key-value cache that also holds each completed block's mean key."""

from ssa.ops.decode.api import (
    attend_blocks_cached,
    decode_attention,
    full_decode_attention,
    select_blocks_cached,
    update_pooled,
)

__all__ = [
    "attend_blocks_cached",
    "decode_attention",
    "full_decode_attention",
    "select_blocks_cached",
    "update_pooled",
]
