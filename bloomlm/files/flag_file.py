"""Files of flags in YAML: run.yaml, and whatever --config names."""

from datetime import date
from pathlib import Path
from typing import Any

from bloomlm.files.yaml_text import MOST_BYTES, read_yaml

_SCALARS = (str, int, float, date, type(None))


def read_flag_file(path: Path) -> dict[Any, Any]:
    """Names of flags and their values, which are scalars or lists of scalars; no code in the file is run.

    Args:
        path: lines of `name: value`; an empty file has none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file.
    """
    content = read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"expected lines of `name: value`, found a {type(content).__name__}")
    num_characters = 0  # see read_yaml
    for name, value in content.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, _SCALARS) for item in items):
            raise ValueError(f"the value of {name!r} is of another kind; expected a number, a text, or a list of them")
        num_characters += sum(len(item) for item in items if isinstance(item, str))
    if num_characters > MOST_BYTES:
        raise ValueError(f"its values have more than {MOST_BYTES} characters")
    return content
