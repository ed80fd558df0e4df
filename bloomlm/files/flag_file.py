"""Files of flags in YAML: run.yaml, and whatever --config names."""

from datetime import date
from pathlib import Path
from typing import Any

import yaml

_MOST_BYTES = 2**18
_SCALARS = (str, int, float, date, type(None))


def read_flag_file(path: Path) -> dict[Any, Any]:
    """Names of flags and their values, which are scalars or lists of scalars; no code in the file is run.

    Args:
        path: lines of `name: value`; an empty file has none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file.
    """
    with path.open("rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    try:
        content = yaml.safe_load(text.decode("utf-8"))
    except (
        yaml.YAMLError,
        OverflowError,
        TypeError,
        AttributeError,
    ) as error:  # odd numbers, dates
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"expected lines of `name: value`, found a {type(content).__name__}")
    num_characters = 0  # with aliases, a short file may stand for more text than a message or the memory can hold
    for name, value in content.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, _SCALARS) for item in items):
            raise ValueError(f"the value of {name!r} is of another kind; expected a number, a text, or a list of them")
        num_characters += sum(len(item) for item in items if isinstance(item, str))
    if num_characters > _MOST_BYTES:
        raise ValueError(f"its values have more than {_MOST_BYTES} characters")
    return content
