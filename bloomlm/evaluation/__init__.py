"""How good a model is: WikiText and LAMBADA under stated protocols, lm-eval's tasks, answers to held-out rows."""
