"""Full causal attention over documents."""
