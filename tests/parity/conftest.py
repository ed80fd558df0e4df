"""Pairs of the same tiny random model: transformers' (the oracle) and ours."""

import pytest
import torch
from transformers import BloomConfig as HFConfig
from transformers import BloomForCausalLM as HFBloom

from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig


def make_pair(
    n_head: int = 4, post_layernorm: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[HFBloom, BloomForCausalLM]:
    """The same weights in both, every bias and norm away from its initial value."""
    torch.manual_seed(seed)
    config = HFConfig(
        vocab_size=101,
        hidden_size=8 * n_head,
        n_layer=3,
        n_head=n_head,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        apply_residual_connection_post_layernorm=post_layernorm,
        pad_token_id=3,
    )
    theirs = HFBloom(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs = theirs.to(dtype)
    ours = BloomForCausalLM(BloomConfig.from_dict(config.to_dict())).to(dtype).eval()
    state = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    ours.load_state_dict(state)
    return theirs, ours


@pytest.fixture
def pair() -> tuple[HFBloom, BloomForCausalLM]:
    return make_pair()
