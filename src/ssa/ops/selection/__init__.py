"""Choosing: pooled keys to block indices."""
