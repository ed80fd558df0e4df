"""From a checkpoint to a program that runs without the model's code: trace, quantise, compile, compare."""
