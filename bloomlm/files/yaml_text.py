"""YAML files that people write, read without running code."""

from pathlib import Path
from typing import Any

MOST_BYTES = 2**18
"""Size of the largest file that is read."""


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; None if it is empty.

    With aliases, a short file may stand for more text than a message or the memory can hold, so callers look at what
    they know and do not print the rest.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or not YAML in UTF-8.
    """
    import yaml  # most commands read none

    with path.open("rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    try:
        return yaml.safe_load(text.decode("utf-8"))
    except (yaml.YAMLError, OverflowError, TypeError, AttributeError) as error:  # odd numbers, dates
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
