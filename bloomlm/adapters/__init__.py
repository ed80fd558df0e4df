"""What learns: all weights, low-rank updates, or virtual tokens. Adapters wrap the model from outside."""
