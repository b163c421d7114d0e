"""Computing: attention given block indices."""
