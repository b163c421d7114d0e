"""Speed of the attention operations: one registry of timed cases, each checked before it is timed."""
