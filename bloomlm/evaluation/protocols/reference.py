"""PaddleNLP's run_eval.py, number for number.

WikiText: the whole file, its tokenisation undone, as one run of n tokens. Window k begins at token k * overlapping_eval
and sees seq_length tokens; the first one scores them all, every other its last overlapping_eval. The loss is the sum
over n - 1; the adjusted perplexity spreads it over the words of the original text. Two quirks belong to the numbers:
in a window that the text ends in, the last token must predict a pad, and exponents stop at 20.

LAMBADA: right if every token of " " + last word is the likeliest one after the text before it.

Source: PaddleNLP, examples/language_model/bloom/run_eval.py of May to July 2023, after Megatron-LM's zero-shot
evaluation. The script crashed before its first batch; its numbers are those of its own functions.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, DataError
from bloomlm.evaluation.lambada import Passage
from bloomlm.evaluation.metrics import Metric, exponential, linear, mean, ratio
from bloomlm.evaluation.plan import Plan, Protocol, running_accuracy, running_perplexity
from bloomlm.evaluation.scoring.windows import Tokens, Window, WindowScore, continuation_window
from bloomlm.evaluation.wikitext import detokenize
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX

PROTOCOL = Protocol(
    name="reference",
    version="1",
    source="PaddleNLP examples/language_model/bloom/run_eval.py, May to July 2023",
)
SEQ_LENGTH = 512
"""Tokens of a window unless --seq_length says otherwise."""
LARGEST_EXPONENT = 20.0


def wikitext(
    text: str,
    tokenizer: Tokenizer,
    *,
    seq_length: int = SEQ_LENGTH,
    overlapping_eval: int = 32,
    limit: int | None = None,
    name: str = "the text",
) -> Plan:
    """Sliding windows over a whole file.

    Args:
        text: of the file.
        tokenizer: the model's.
        seq_length: tokens of a window.
        overlapping_eval: tokens from one window's begin to the next one's, and scored in each but the first.
        limit: windows to evaluate, from the first; None: all.
        name: what messages call the text.

    Raises:
        ConfigError: lengths that leave tokens out.
        DataError: fewer than two tokens or words.
    """
    if not 1 <= overlapping_eval <= seq_length:
        raise ConfigError(
            f"--overlapping_eval {overlapping_eval} and --seq_length {seq_length}: expected from 1 to seq_length, "
            "or tokens between the windows would go unscored"
        )
    num_words = len(text.strip().split(" "))
    ids = np.array(tokenizer.encode(detokenize(text)), dtype=np.int64)
    if len(ids) < 2 or num_words < 2:
        raise DataError(f"{name}: {len(ids)} tokens, {num_words} words; expected at least two of each")
    windows = sliding_windows(ids, seq_length, overlapping_eval, tokenizer.pad_token_id)
    num_targets = len(ids) - 1
    if limit is not None and limit < len(windows):
        windows = windows[:limit]
        num_targets = min(num_targets, seq_length + (limit - 1) * overlapping_eval)
    token_ratio = (len(ids) - 1) / (num_words - 1)

    def metrics(scores: Sequence[WindowScore]) -> dict[str, Metric]:
        # every scored position has the same share of n - 1
        share = num_targets / sum(score.num_scored for score in scores)
        shares = [share * score.num_scored for score in scores]
        loss = linear(ratio([score.log_prob for score in scores], shares, higher_is_better=True), -1.0)
        return {
            "avg_loss": loss,
            "ppl": exponential(loss, limit=LARGEST_EXPONENT),
            "adjusted_ppl": exponential(loss, scale=token_ratio, limit=LARGEST_EXPONENT),
        }

    def line(results: Mapping[str, Metric]) -> str:
        loss, ppl, adjusted = (results[key].value for key in ("avg_loss", "ppl", "adjusted_ppl"))
        return f"avg loss: {loss:.4E} | ppl: {ppl:.4E} | adjusted ppl: {adjusted:.4E} | token ratio: {token_ratio} |"

    return Plan(
        protocol=PROTOCOL,
        task="wikitext",
        settings={"seq_length": seq_length, "overlapping_eval": overlapping_eval},
        counts={"original_words": num_words, "tokens": len(ids), "token_ratio": token_ratio},
        windows=windows,
        metrics=metrics,
        running=running_perplexity,
        line=line,
    )


def sliding_windows(ids: Tokens, seq_length: int, overlapping_eval: int, pad_token_id: int) -> list[Window]:
    """The windows of WikiText; those at the end, in which only pads would be scored, are left out.

    Args:
        ids: [n] at least two tokens.
        seq_length, overlapping_eval: as in wikitext.
        pad_token_id: what the last token must predict where a window reaches beyond the text; where it is in the
            text it predicts nothing.
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
) -> Plan:
    """Last words of passages.

    Args:
        passages: at least one.
        tokenizer: the model's.
        seq_length: tokens the model sees; a longer context loses its beginning.
        limit: passages to evaluate, from the first; None: all.

    Raises:
        DataError: a passage without a context, or whose last word has no token.
    """
    passages = passages[:limit]
    words = [passage.text.split()[-1] for passage in passages]
    contexts = [passage.text[: passage.text.rfind(word)].strip() for passage, word in zip(passages, words, strict=True)]
    encoded_contexts = tokenizer.encode_batch(contexts)
    encoded_words = tokenizer.encode_batch([f" {word}" for word in words])
    windows, num_cut = [], 0
    for passage, context, word in zip(passages, encoded_contexts, encoded_words, strict=True):
        if not context or not word:
            missing = "context before the last word" if not context else "token in the last word"
            raise DataError(f"{passage.where}: no {missing}; expected a passage whose last word is to be guessed")
        window, is_cut = continuation_window(context, word, seq_length)
        windows.append(window)
        num_cut += is_cut

    def metrics(scores: Sequence[WindowScore]) -> dict[str, Metric]:
        return {"accuracy": mean([float(score.is_greedy) for score in scores], higher_is_better=True)}

    def line(results: Mapping[str, Metric]) -> str:
        accuracy = results["accuracy"].value
        return (
            f"number correct: {accuracy * len(windows):.4E} | total examples: {len(windows):.4E} | "
            f"avg accuracy: {accuracy:.4E}"
        )

    return Plan(
        protocol=PROTOCOL,
        task="lambada",
        settings={"seq_length": seq_length},
        counts={"examples": len(windows), "contexts_cut": num_cut},
        windows=windows,
        metrics=metrics,
        running=running_accuracy,
        line=line,
    )
