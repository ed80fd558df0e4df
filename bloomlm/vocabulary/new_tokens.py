"""The record beside an extended model of which tokens were added; fine-tuning reads it to train just their rows."""

from pathlib import Path

from bloomlm.checkpoint.writer import write_json
from bloomlm.errors import CheckpointError
from bloomlm.files.json_text import read_json

NEW_TOKENS_FILE = "new_tokens.json"


def write_new_tokens(directory: Path, tokens: range) -> None:
    """Record the tokens that were added to a model.

    Args:
        directory: the model's.
        tokens: their ids.
    """
    write_json(directory / NEW_TOKENS_FILE, {"first_token": tokens.start, "num_tokens": len(tokens)})


def read_new_tokens(directory: Path) -> range | None:
    """The ids of the tokens that were added to a model; None: it has no record of any.

    Args:
        directory: the model's.

    Raises:
        CheckpointError: the record is damaged.
    """
    path = directory / NEW_TOKENS_FILE
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        first, count = values["first_token"], values["num_tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    if type(first) is not int or type(count) is not int or first < 0 or count < 1:
        raise CheckpointError(f"{path} says first_token {first!r} and num_tokens {count!r}; expected whole numbers")
    return range(first, first + count)
