"""Adapters on disk: reading and writing PEFT's files, and loading an adapter of any format into a model."""
