"""The errors a user of bloomlm can meet. Each message says what was found, what was expected, what to do.

    BloomlmError
    +-- ConfigError        a config.json, a run file or a flag that cannot be used
    +-- CheckpointError    a model's files: not found, damaged, missing or misshapen tensors
    |   +-- AdapterError   the same of a LoRA or a prefix adapter
    +-- DataError          a row of examples, with its file and line
    +-- GenerationError    prompts or decoding options that cannot be served
    +-- ProgramError       an exported program that cannot be written, opened or run here
    |   +-- BackendMissingError  the library that would run it is not installed
    +-- TrainingError      a run that cannot go on (ten losses in a row that are not finite, ...)
    +-- ServingError       a request that a server cannot finish
        +-- QueueFullError      too many requests wait already
        +-- ClosingError        the server is closing

Programming mistakes inside bloomlm stay `assert`s and ordinary exceptions.
"""

import collections.abc


class BloomlmError(Exception):
    """Base of every error that bloomlm raises on purpose."""

    def __str__(self) -> str:
        """The message; of a very long one, which repeats what a damaged file holds, the beginning and the end."""
        text = super().__str__()
        return text if len(text) <= 4000 else f"{text[:3000]} [...] {text[-900:]}"


class ConfigError(BloomlmError, ValueError):
    """A config.json, a run file or a flag that cannot be used."""


class CheckpointError(BloomlmError):
    """A model's files cannot be read or written."""


class AdapterError(CheckpointError):
    """A LoRA or prefix adapter's files do not fit the model or cannot be read."""


class DataError(BloomlmError, ValueError):
    """A file of examples holds something that cannot be learned from."""


class GenerationError(BloomlmError, ValueError):
    """Prompts or decoding options that cannot be served."""


class ProgramError(BloomlmError):
    """An exported program cannot be written, opened or run here."""


class BackendMissingError(ProgramError):
    """The library that would run an exported program is not installed."""


class TrainingError(BloomlmError, RuntimeError):
    """A training run that cannot go on."""


class ServingError(BloomlmError, RuntimeError):
    """A request that a server cannot finish, through no fault of the request."""


class QueueFullError(ServingError):
    """Too many requests wait already.

    Args:
        message: what was found and what to do.
        retry_after_s: seconds after which there is probably room.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClosingError(ServingError):
    """The server is closing and takes no more requests."""


def name_some(names: collections.abc.Iterable[str], limit: int = 5) -> str:
    """The first names of a list, in order, and how many more there are, for a message."""
    ordered = list(names)
    more = f", and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def first_line(error: Exception) -> str:
    """The first line of an error's message; the name of its class where it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def counted(count: int, units: str) -> str:
    """A number of things for a message: 2, "pairs" -> "2 pairs"; 1 -> "1 pair"."""
    return f"{count:,} {units.removesuffix('s') if count == 1 else units}"


def format_bytes(num_bytes: float) -> str:
    """A number of bytes in its natural unit, for a message: 1.2 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"
