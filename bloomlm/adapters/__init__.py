"""What learns: all weights, low-rank updates, or virtual tokens. The model knows nothing of its adapter's kind."""
