"""The loss over 250,880 tokens, with bloom-560m's width: by value, and in bounded memory beside the whole logits."""

import torch
import torch.nn.functional as F

from bloomlm.parallel.vocabulary_head import Head
from bloomlm.parallel.vocabulary_loss import MAX_CHUNK_BYTES, linear_cross_entropy
from bloomlm.parallel.vocabulary_scores import score_labels
from tests.gpu.models import GPU, relative_error

V, D, N = 250_880, 1024, 2048


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(GPU).manual_seed(0)
    hidden = torch.randn(N, D, device=GPU, generator=generator)
    weight = torch.randn(V, D, device=GPU, generator=generator) * 0.02
    labels = torch.randint(0, V, (N,), device=GPU, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def test_loss_and_gradients_equal_those_of_whole_logits_in_a_fraction_of_the_memory() -> None:
    hidden, weight, labels = inputs()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    found = linear_cross_entropy(hidden, Head(weight), labels, scale=1 / N)
    found.backward()
    gradients = hidden.grad, weight.grad
    ours = torch.cuda.max_memory_allocated() - start
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    expected = F.cross_entropy(hidden @ weight.t(), labels)
    expected.backward()
    theirs = torch.cuda.max_memory_allocated() - start
    assert relative_error(found, expected) < 1e-5
    assert relative_error(gradients[0], hidden.grad) < 1e-5
    assert relative_error(gradients[1], weight.grad) < 1e-5
    # the weight's gradient, a chunk of logits with its copies; and not N x V logits with theirs
    assert ours < 4 * V * D + 3 * MAX_CHUNK_BYTES, ours
    assert theirs > 4 * V * D + 2 * 4 * N * V - 2**20, theirs


def test_in_bf16_it_is_as_exact_as_torchs() -> None:
    hidden, weight, labels = inputs()
    exact = linear_cross_entropy(hidden, Head(weight), labels, scale=1 / N)
    exact.backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = linear_cross_entropy(hidden, Head(weight), labels, scale=1 / N)
    found.backward()
    assert relative_error(found, exact) < 1e-3
    assert relative_error(hidden.grad, gradients[0]) < 1e-2
    assert relative_error(weight.grad, gradients[1]) < 1e-2


def test_scores_equal_those_of_whole_logits() -> None:
    hidden, weight, labels = inputs()
    found = score_labels(hidden, Head(weight), labels)
    with torch.no_grad():
        logits = hidden @ weight.t()
        expected = logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.likeliest, logits.argmax(1))
