"""Both streams and their alignment."""
