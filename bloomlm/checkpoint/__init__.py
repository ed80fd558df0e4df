"""Bytes to weights and back: Hugging Face directories, PEFT adapters, training state."""
