"""Perplexity per token on WikiText-2 as GPTQ and later papers define it: one sequence of tokens in disjoint windows.

The rows of the hub's data set are joined by two line ends and encoded as they are. In each window of seq_length tokens
all tokens but the first are scored; tokens at the end that fill no window are left out.

Source: GPTQ (https://arxiv.org/abs/2210.17323), bloom.py and datautils.py of its repository.
"""

from collections.abc import Sequence

import numpy as np

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, DataError
from bloomlm.evaluation.data_sources import notices_about, read_text, split_rows
from bloomlm.evaluation.metrics import Metric, exponential, linear, mean
from bloomlm.evaluation.protocol import Definition, Protocol, Task, WindowPlan, running_perplexity
from bloomlm.evaluation.scoring.windows import Window, WindowScore

DEFINITION = Definition(name="gptq", version="1", source="GPTQ's bloom.py: WikiText-2, windows of 2048")
SEQ_LENGTH = 2048
"""Tokens of a window unless --seq_length says otherwise."""


def wikitext(text: str, tokenizer: Tokenizer, *, seq_length: int = SEQ_LENGTH, limit: int | None = None) -> WindowPlan:
    """Disjoint windows over a whole file; the first token of a window is only context. The limit counts windows.

    Raises:
        ConfigError: seq_length is below 2.
        DataError: the text does not fill one window.
    """
    if seq_length < 2:
        raise ConfigError(f"--seq_length {seq_length}: expected at least 2: a token, and one that is predicted from it")
    ids = np.array(tokenizer.encode("\n\n".join(split_rows(text))), dtype=np.int64)
    num_windows = len(ids) // seq_length
    if num_windows == 0:
        raise DataError(
            f"--eval_path: {len(ids)} tokens, fewer than one window of {seq_length}; give a smaller --seq_length"
        )
    starts = [number * seq_length for number in range(num_windows)][:limit]
    windows = [Window(ids[start : start + seq_length - 1], ids[start + 1 : start + seq_length]) for start in starts]

    def metrics(scores: Sequence[WindowScore]) -> dict[str, Metric]:
        log_prob = mean([score.log_prob / score.num_scored for score in scores], higher_is_better=True)
        return {"loss": linear(log_prob, -1.0), "perplexity": exponential(log_prob, scale=-1.0)}

    return WindowPlan(
        definition=DEFINITION,
        task="wikitext",
        settings={"seq_length": seq_length},
        counts={"tokens": len(ids), "tokens_left_out": len(ids) - num_windows * seq_length},
        windows=windows,
        metrics=metrics,
        running=running_perplexity,
        notices=notices_about(text),
    )


PROTOCOL = Protocol(
    name="gptq", help="GPTQ's perplexity", tasks=(Task(name="wikitext", read=read_text, make_plan=wikitext),)
)
