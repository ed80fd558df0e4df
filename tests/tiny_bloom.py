"""A tiny random model with a tokenizer beside it, on disk: what users of bloomlm.load have."""

from collections.abc import Mapping
from pathlib import Path

import torch

from bloomlm.adapters.base import Adapter, apply_adapter
from bloomlm.checkpoint.adapters.peft import save_adapter
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.writer import write_model
from bloomlm.files.atomic import atomic_directory
from bloomlm.model.config import BloomConfig
from tests.bloom_tokenizer import make_tokenizer
from tests.tiny_checkpoint import learned_tensors, random_model


def write_bloom(directory: Path, eos_scale: float = 1.0, hidden_size: int = 32) -> Path:
    """Write one; eos_scale above 1 makes it end now and then."""
    tokenizer = make_tokenizer()
    config = BloomConfig(vocab_size=tokenizer.vocab_size + 6, hidden_size=hidden_size, n_layer=2, n_head=4)
    model = random_model(config)
    with torch.no_grad():
        model.transformer.word_embeddings.weight[2] *= eos_scale
    directory.mkdir(parents=True, exist_ok=True)
    write_model(directory, model.config, model.named_parameters())
    tokenizer.save(directory)
    return directory


def write_adapter(directory: Path, base: Path, adapter: Adapter) -> Path:
    """Write a random adapter of that base model."""
    model = load_model(base)
    generator = torch.Generator().manual_seed(5)
    apply_adapter(model, adapter, generator)
    for tensor in learned_tensors(model).values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    with atomic_directory(directory) as temporary:
        save_adapter(model, temporary, str(base))
    return directory


def write_adapters(base: Path, adapters: Mapping[str, Adapter]) -> dict[str, Path]:
    """Write random adapters of that base model beside it; returns name -> directory."""
    return {name: write_adapter(base.parent / name, base, adapter) for name, adapter in adapters.items()}
