"""From a model to a program that runs without the model's code: trace, quantise, compile, compare."""
