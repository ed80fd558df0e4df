"""Noise on the embeddings of training (NEFTune).

Source: Jain et al., https://arxiv.org/abs/2310.05914. Each document has noise of the size that transformers'
neftune_noise_alpha gives it in a batch of its own, so packing changes nothing.

Shapes: N packed tokens, D hidden, T tokens of a document.
"""

import torch
from torch import Tensor

from bloomlm.model.documents import Documents


def embedding_noise(x: Tensor, documents: Documents, alpha: float) -> Tensor:
    """Uniform noise [N, D] for embeddings x [N, D], within alpha / sqrt(T D) in a document of T tokens.

    It comes from torch's default generator, so ranks that have seeded it equally draw the same noise.
    """
    lengths = torch.tensor(documents.lengths, device=x.device)
    bounds = (alpha / (lengths * x.shape[1]).sqrt()).repeat_interleave(lengths, output_size=len(x))
    return torch.empty_like(x).uniform_(-1.0, 1.0) * bounds[:, None].to(x.dtype)
