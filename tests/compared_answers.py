"""Random answers that are compared, and the loss of each objective from its formula, one answer at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.data.answer_batch import ComparedExample
from bloomlm.data.example import Example
from bloomlm.model.bloom import BloomForCausalLM

LENGTHS = [(3, 9, 4), (5, 2, 6), (1, 4, 4), (6, 12, 1), (2, 2, 3), (4, 7, 8)]
"""Lengths of the prompt, the chosen answer and the rejected one."""

AnswerLogProb = Callable[[Example], Tensor]


def compared_answers(vocab_size: int, lengths: Sequence[tuple[int, int, int]] = LENGTHS) -> list[ComparedExample]:
    """Random pairs, each with a random judgement of the first answer and no reference."""
    generator = np.random.default_rng(7)
    found = []
    for prompt_length, *answer_lengths in lengths:
        prompt = generator.integers(4, vocab_size, prompt_length)
        chosen, rejected = (
            Example.pair(
                np.concatenate([prompt, generator.integers(4, vocab_size, length)]).astype(np.int32), prompt_length
            )
            for length in answer_lengths
        )
        found.append(
            ComparedExample(
                **vars(chosen),
                other=rejected,
                is_desirable=bool(generator.integers(2)),
                reference=(float("nan"), float("nan")),
            )
        )
    return found


def log_probs_of(model: BloomForCausalLM, example: Example) -> Tensor:
    """[tokens - 1]: the log-probability of each token but the first, from whole logits of this sequence alone."""
    tokens = torch.from_numpy(example.tokens.astype(np.int64))
    logits = model(tokens[None])[0].double()
    return torch.log_softmax(logits[:-1], dim=1).gather(1, tokens[1:, None])[:, 0]


def answer_log_prob(model: BloomForCausalLM, example: Example) -> Tensor:
    """The log-probability of an answer."""
    return log_probs_of(model, example)[example.num_source_tokens - 1 :].sum()


def with_references(examples: Sequence[ComparedExample], reference: BloomForCausalLM) -> list[ComparedExample]:
    """The same answers with log-probabilities under a model."""
    with torch.no_grad():
        return [
            replace(
                example,
                reference=(
                    float(answer_log_prob(reference, example)),
                    float(answer_log_prob(reference, example.other)),
                ),
            )
            for example in examples
        ]


def dpo_loss(model: BloomForCausalLM, pairs: Sequence[ComparedExample], beta: float, smoothing: float = 0.0) -> Tensor:
    """The mean over pairs, by the formula of the paper."""
    losses = []
    for pair in pairs:
        chosen, rejected = answer_log_prob(model, pair), answer_log_prob(model, pair.other)
        margin = beta * (chosen - pair.reference[0]) - beta * (rejected - pair.reference[1])
        losses.append(-(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin))
    return torch.stack(losses).mean()


def orpo_loss(model: BloomForCausalLM, pairs: Sequence[ComparedExample], beta: float) -> Tensor:
    """The cross entropy of all chosen tokens, and the mean term of the odds over pairs."""
    ratios = []
    for pair in pairs:
        means = [
            answer_log_prob(model, answer) / (len(answer.tokens) - answer.num_source_tokens)
            for answer in (pair, pair.other)
        ]
        odds = [mean.exp() / (1 - mean.exp()) for mean in means]
        ratios.append(F.logsigmoid(torch.log(odds[0] / odds[1])))
    nll = -torch.cat([log_probs_of(model, pair) for pair in pairs]).mean()
    return nll - beta * torch.stack(ratios).mean()


def kto_loss(
    model: BloomForCausalLM, answers: Sequence[ComparedExample], beta: float, desirable: float, undesirable: float
) -> Tensor:
    """The mean over answers, with the divergence from the other answers of all of them."""
    with torch.no_grad():
        gains = [answer_log_prob(model, answer.other) - answer.reference[1] for answer in answers]
        divergence = torch.stack(gains).mean().clamp(min=0)
    losses = []
    for answer in answers:
        gain = answer_log_prob(model, answer) - answer.reference[0]
        if answer.is_desirable:
            losses.append(desirable * (1 - torch.sigmoid(beta * (gain - divergence))))
        else:
            losses.append(undesirable * (1 - torch.sigmoid(beta * (divergence - gain))))
    return torch.stack(losses).mean()
