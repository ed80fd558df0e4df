"""A tiny random checkpoint on disk, for the tests of everything that reads one."""

from pathlib import Path

import torch
from torch import Tensor

from bloomlm.checkpoint.merge import merged_parameters
from bloomlm.checkpoint.writer import write_model
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig

TINY = BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4)


def random_model(config: BloomConfig = TINY, dtype: torch.dtype = torch.float32, seed: int = 0) -> BloomForCausalLM:
    """A model with every bias and norm away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    model = BloomForCausalLM(config)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def write_random_model(directory: Path, dtype: torch.dtype = torch.float32, **options: int) -> BloomForCausalLM:
    """Write one and return it."""
    model = random_model(dtype=dtype)
    directory.mkdir(parents=True, exist_ok=True)
    write_model(directory, model.config, model.named_parameters(), **options)
    return model


def learned_tensors(model: BloomForCausalLM) -> dict[str, Tensor]:
    """Name -> every parameter that learns, detached and sharing the model's memory."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def merged_model(model: BloomForCausalLM) -> BloomForCausalLM:
    """A plain model of the same weights with the adapter added in."""
    with torch.device("meta"):
        plain = BloomForCausalLM(model.config)
    plain.load_state_dict(dict(merged_parameters(model)), assign=True)
    return plain.eval()


def assert_equal_models(found: BloomForCausalLM, expected: BloomForCausalLM) -> None:
    """Every parameter bit for bit, dtype included."""
    expected_parameters = dict(expected.named_parameters())
    found_parameters = dict(found.named_parameters())
    assert found_parameters.keys() == expected_parameters.keys()
    for name, parameter in expected_parameters.items():
        assert found_parameters[name].dtype == parameter.dtype, name
        assert torch.equal(found_parameters[name], parameter), name
