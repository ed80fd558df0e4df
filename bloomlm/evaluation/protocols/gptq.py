"""WikiText-2 as GPTQ and the papers after it have it: one run of tokens in disjoint windows, perplexity by token.

The rows of the hub's data set, joined by two line ends, tokenised as they are; windows of seq_length tokens, of which
all but the first are scored; a rest that fills no window is left out.

Source: GPTQ (https://arxiv.org/abs/2210.17323), bloom.py and datautils.py of its repository.
"""

from collections.abc import Sequence

import numpy as np

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, DataError
from bloomlm.evaluation.metrics import Metric, exponential, linear, mean
from bloomlm.evaluation.plan import Plan, Protocol, running_perplexity
from bloomlm.evaluation.scoring.windows import Window, WindowScore
from bloomlm.evaluation.wikitext import notices_about, split_rows

PROTOCOL = Protocol(name="gptq", version="1", source="GPTQ's bloom.py: WikiText-2, windows of 2048")
SEQ_LENGTH = 2048
"""Tokens of a window unless --seq_length says otherwise."""


def wikitext(
    text: str, tokenizer: Tokenizer, *, seq_length: int = SEQ_LENGTH, limit: int | None = None, name: str = "the text"
) -> Plan:
    """Disjoint windows over a whole file.

    Args:
        text: of the file.
        tokenizer: the model's.
        seq_length: tokens of a window, the first of which is context only.
        limit: windows to evaluate, from the first; None: all.
        name: what messages call the text.

    Raises:
        ConfigError: seq_length is below 2.
        DataError: the text does not fill one window.
    """
    if seq_length < 2:
        raise ConfigError(f"--seq_length {seq_length}: expected at least 2, a token and one to be predicted from it")
    ids = np.array(tokenizer.encode("\n\n".join(split_rows(text))), dtype=np.int64)
    num_windows = len(ids) // seq_length
    if num_windows == 0:
        raise DataError(
            f"{name}: {len(ids)} tokens, fewer than one window of {seq_length}; give a smaller --seq_length"
        )
    starts = [number * seq_length for number in range(num_windows)][:limit]
    windows = [Window(ids[start : start + seq_length - 1], ids[start + 1 : start + seq_length]) for start in starts]

    def metrics(scores: Sequence[WindowScore]) -> dict[str, Metric]:
        log_prob = mean([score.log_prob / score.num_scored for score in scores], higher_is_better=True)
        return {"loss": linear(log_prob, -1.0), "perplexity": exponential(log_prob, scale=-1.0)}

    return Plan(
        protocol=PROTOCOL,
        task="wikitext",
        settings={"seq_length": seq_length},
        counts={"tokens": len(ids), "tokens_left_out": len(ids) - num_windows * seq_length},
        windows=windows,
        metrics=metrics,
        running=running_perplexity,
        notices=notices_about(text),
    )
