"""Adapters on disk: PEFT's files, and the way from any files to a model."""
