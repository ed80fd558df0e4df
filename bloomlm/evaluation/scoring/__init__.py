"""Scores of windows and answers: what each protocol is computed from, with a model or a program."""
