"""PaddleNLP's run_eval.py, number for number.

WikiText: the whole file is detokenised and encoded as one sequence of n tokens. Window k begins at token k *
overlapping_eval and holds seq_length tokens; the first window scores all of them, every other window its last
overlapping_eval. The loss is the sum divided by n - 1; the adjusted perplexity is per word of the original text. Two
quirks are part of the numbers: where the text ends inside a window, the last token must predict a pad, and exponents
are limited to 20.

LAMBADA: an answer is right if every token of " " + last word is the likeliest one after the text before it.

Source: PaddleNLP, examples/language_model/bloom/run_eval.py of May to July 2023, after Megatron-LM's zero-shot
evaluation. The script crashed before its first batch; the numbers here are what its functions compute.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, DataError
from bloomlm.evaluation.data_sources import Passage, detokenize, read_passages, read_text
from bloomlm.evaluation.metrics import Metric, exponential, linear, mean, ratio
from bloomlm.evaluation.protocol import (
    Definition,
    Protocol,
    Task,
    WindowOptions,
    WindowPlan,
    last_word_plan,
    running_perplexity,
)
from bloomlm.evaluation.scoring.windows import Tokens, Window, WindowScore
from bloomlm.flags import flag, same_flag
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX

DEFINITION = Definition(
    name="reference",
    version="1",
    source="PaddleNLP examples/language_model/bloom/run_eval.py, May to July 2023",
)
SEQ_LENGTH = 512
OVERLAP = 32
LARGEST_EXPONENT = 20.0


@dataclass(frozen=True, kw_only=True)
class LambadaOptions(WindowOptions):
    """The option of LAMBADA, with the script's default."""

    seq_length: int = same_flag(WindowOptions, "seq_length", default=SEQ_LENGTH)


@dataclass(frozen=True, kw_only=True)
class WikitextOptions(LambadaOptions):
    """The options of WikiText, with the script's defaults."""

    overlapping_eval: int | None = flag(
        "protocol",
        None,
        f"WikiText under reference: tokens from one window to the next  [default: {OVERLAP}, at most seq_length]",
    )


def wikitext(
    text: str,
    tokenizer: Tokenizer,
    *,
    seq_length: int = SEQ_LENGTH,
    overlapping_eval: int | None = None,
    limit: int | None = None,
) -> WindowPlan:
    """Sliding windows over a whole file.

    Args:
        text: content of the file.
        tokenizer: that of the model.
        seq_length: tokens of a window.
        overlapping_eval: tokens from the start of one window to the start of the next; None: 32, or seq_length if that
            is less.
        limit: number of windows to evaluate, from the first; None: all.

    Raises:
        ConfigError: lengths that leave tokens out.
        DataError: fewer than two tokens or words.
    """
    step = min(OVERLAP, seq_length) if overlapping_eval is None else overlapping_eval
    if not 1 <= step <= seq_length:
        raise ConfigError(
            f"--overlapping_eval {step} and --seq_length {seq_length}: expected from 1 to seq_length, or tokens "
            "between the windows would not be scored"
        )
    num_words = len(text.strip().split(" "))
    ids = np.array(tokenizer.encode(detokenize(text)), dtype=np.int64)
    if len(ids) < 2 or num_words < 2:
        raise DataError(f"--eval_path: {len(ids)} tokens, {num_words} words; expected at least two of each")
    windows = sliding_windows(ids, seq_length, step, tokenizer.pad_token_id)
    num_targets = len(ids) - 1
    if limit is not None and limit < len(windows):
        windows = windows[:limit]
        num_targets = min(num_targets, seq_length + (limit - 1) * step)
    token_ratio = (len(ids) - 1) / (num_words - 1)
    return WindowPlan(
        definition=DEFINITION,
        task="wikitext",
        settings={"seq_length": seq_length, "overlapping_eval": step},
        counts={"original_words": num_words, "tokens": len(ids), "token_ratio": token_ratio},
        windows=windows,
        metrics=partial(_losses, num_targets=num_targets, token_ratio=token_ratio),
        running=running_perplexity,
    )


def _losses(scores: Sequence[WindowScore], *, num_targets: int, token_ratio: float) -> dict[str, Metric]:
    # every scored position has the same share of the n - 1 targets
    share = num_targets / sum(score.num_scored for score in scores)
    shares = [share * score.num_scored for score in scores]
    loss = linear(ratio([score.log_prob for score in scores], shares, higher_is_better=True), -1.0)
    return {
        "avg_loss": loss,
        "ppl": exponential(loss, limit=LARGEST_EXPONENT),
        "adjusted_ppl": exponential(loss, scale=token_ratio, limit=LARGEST_EXPONENT),
    }


def wikitext_line(metrics: Mapping[str, Metric], counts: Mapping[str, float]) -> str:
    """What the script prints for WikiText."""
    loss, ppl, adjusted = (metrics[key].value for key in ("avg_loss", "ppl", "adjusted_ppl"))
    ratio = counts["token_ratio"]
    return f"avg loss: {loss:.4E} | ppl: {ppl:.4E} | adjusted ppl: {adjusted:.4E} | token ratio: {ratio} |"


def sliding_windows(ids: Tokens, seq_length: int, overlapping_eval: int, pad_token_id: int) -> list[Window]:
    """The windows of WikiText, without those at the end in which only pads would be scored.

    Args:
        ids: [n] at least two tokens.
        seq_length, overlapping_eval: see wikitext.
        pad_token_id: label of the last token where a window reaches beyond the text. A pad in the text has no label.
    """
    num_windows = max(math.ceil((len(ids) - 1 - overlapping_eval) / overlapping_eval) + 1, 1)
    targets = np.where(ids == pad_token_id, IGNORE_INDEX, np.append(ids[1:], pad_token_id))
    windows = []
    for number in range(num_windows):
        start = number * overlapping_eval
        stop = min(start + seq_length, len(ids))
        first_scored = start if number == 0 else start + seq_length - overlapping_eval
        if first_scored < stop:
            windows.append(Window(ids[start:stop], targets[first_scored:stop]))
    return windows


def lambada(
    passages: Sequence[Passage], tokenizer: Tokenizer, *, seq_length: int = SEQ_LENGTH, limit: int | None = None
) -> WindowPlan:
    """Last words of passages; a context that is too long is cut at its beginning.

    Raises:
        DataError: a passage without a context, or whose last word has no token.
    """
    passages = passages[:limit]
    words = [passage.text.split()[-1] for passage in passages]
    contexts = [passage.text[: passage.text.rfind(word)].strip() for passage, word in zip(passages, words, strict=True)]
    encoded_words = tokenizer.encode_batch([f" {word}" for word in words])
    pairs = list(zip(tokenizer.encode_batch(contexts), encoded_words, strict=True))
    for passage, (context, word) in zip(passages, pairs, strict=True):
        if not context or not word:
            missing = "context before the last word" if not context else "token in the last word"
            raise DataError(f"{passage.where}: no {missing}; expected a passage whose last word is to be guessed")
    return last_word_plan(DEFINITION, pairs, seq_length, _accuracy)


def _accuracy(scores: Sequence[WindowScore]) -> dict[str, Metric]:
    return {"accuracy": mean([float(score.is_greedy) for score in scores], higher_is_better=True)}


def lambada_line(metrics: Mapping[str, Metric], counts: Mapping[str, float]) -> str:
    """What the script prints for LAMBADA."""
    accuracy, total = metrics["accuracy"].value, counts["examples"]
    return f"number correct: {accuracy * total:.4E} | total examples: {total:.4E} | avg accuracy: {accuracy:.4E}"


PROTOCOL = Protocol(
    name="reference",
    help="PaddleNLP's run_eval.py",
    uses_raw_text=False,
    tasks=(
        Task(name="wikitext", read=read_text, make_plan=wikitext, options=WikitextOptions, line=wikitext_line),
        Task(name="lambada", read=read_passages, make_plan=lambada, options=LambadaOptions, line=lambada_line),
    ),
)
