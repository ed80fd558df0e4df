"""From a file and a protocol's name to a plan."""

import hashlib
from pathlib import Path

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError
from bloomlm.evaluation.lambada import read_passages
from bloomlm.evaluation.plan import Plan
from bloomlm.evaluation.protocols import gptq, lm_eval, reference
from bloomlm.evaluation.wikitext import read_text

PROTOCOLS = {"reference": reference, "lm_eval": lm_eval, "gptq": gptq}
DEFAULT_OVERLAP = 32


def make_plan(
    path: Path,
    tokenizer: Tokenizer,
    *,
    protocol: str,
    is_lambada: bool,
    seq_length: int | None = None,
    overlapping_eval: int | None = None,
    limit: int | None = None,
) -> Plan:
    """Read a file and cut it into the windows of a protocol.

    Args:
        path: WikiText's text, or LAMBADA's passages.
        tokenizer: the model's.
        protocol: a key of PROTOCOLS.
        is_lambada: what the file is.
        seq_length: most tokens the model sees; None: the protocol's own.
        overlapping_eval: of the reference protocol's WikiText; None: 32.
        limit: examples, documents or windows to evaluate, from the first; None: all.

    Raises:
        ConfigError: lengths that cannot be used.
        DataError: the file cannot be read, or holds nothing to evaluate.
    """
    length = seq_length or PROTOCOLS[protocol].SEQ_LENGTH
    if is_lambada:
        passages = read_passages(path)
        if protocol == "reference":
            return reference.lambada(passages, tokenizer, seq_length=length, limit=limit)
        if protocol == "lm_eval":
            return lm_eval.lambada(passages, tokenizer, seq_length=length, limit=limit)
        raise ConfigError(f"protocol {protocol} has no LAMBADA; use reference or lm_eval")
    text = read_text(path)
    if protocol == "reference":
        overlap = overlapping_eval or min(DEFAULT_OVERLAP, length)
        return reference.wikitext(
            text, tokenizer, seq_length=length, overlapping_eval=overlap, limit=limit, name=str(path)
        )
    make = lm_eval.wikitext if protocol == "lm_eval" else gptq.wikitext
    return make(text, tokenizer, seq_length=length, limit=limit, name=str(path))


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
