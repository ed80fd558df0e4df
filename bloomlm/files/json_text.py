"""JSON that others wrote: every way in which it can be wrong is one kind of error with a short message."""

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The escape of half of a surrogate pair, which alone is no character.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; bytes are UTF-8.

    Raises:
        json.JSONDecodeError: it is not UTF-8 or not JSON, is nested too deeply, or has a number or a character that
            Python cannot hold.
    """
    with _one_kind_of_error():
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text)
        _check_characters(value, text)
    return value


def parse_json_at(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at a place in a text, and the place where it ends.

    Raises:
        json.JSONDecodeError: as parse_json.
    """
    with _one_kind_of_error():
        value, stop = json.JSONDecoder().raw_decode(text, start)
        _check_characters(value, text[start:stop])
    return value, stop


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: it cannot be read, or is a device or a pipe.
        json.JSONDecodeError: as parse_json.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is a pipe or a device", str(path))
    return parse_json(path.read_bytes())


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: as read_json.
        ValueError: as read_json, or the file holds another value.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}; expected a JSON object")
    return value


def _check_characters(value: Any, text: str) -> None:
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")


@contextmanager
def _one_kind_of_error() -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from error
    except UnicodeEncodeError as error:
        raise json.JSONDecodeError("it has half of a surrogate pair", "", 0) from error
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError(f"byte {error.start + 1} is not UTF-8", "", 0) from error
    except ValueError as error:  # a number of thousands of digits
        raise json.JSONDecodeError(str(error), "", 0) from error
