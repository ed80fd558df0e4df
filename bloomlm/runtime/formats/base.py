"""A row in the table of formats: the format's names and files, and how a program is opened."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from bloomlm.errors import ProgramError
from bloomlm.generation.language_model import LanguageModel
from bloomlm.runtime.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class ProgramFormat:
    """One format of exported programs."""

    name: str
    """In manifests and in --format."""
    backend: str
    """Name in --backend."""
    large_file: Callable[[str], str]
    """Prefix -> name of the weights file, whose full checksum is compared on request only."""
    open: Callable[[Manifest, Path, str], LanguageModel]
    """Open a program, given its manifest, directory and prefix, after its files have been checked.

    Raises ProgramError where the files do not fit the manifest or cannot be loaded, BackendMissingError where the
    library that runs them is not installed.
    """


class ProgramRows:
    """Base of the rows of programs: what a format does not override, it does not have.

    Args:
        format: the format's name, for messages.
    """

    def __init__(self, format: str) -> None:
        self._format = format

    def truncate(self, row: int, num_tokens: int) -> None:
        """See ModelRows."""
        self._refuse("take back tokens of a row, which --prompt_lookup needs")

    def set_adapter(self, row: int, name: str | None) -> None:
        """See ModelRows; a program holds one model."""
        if name is not None:
            self._refuse(f"choose the adapter {name}: it holds one model, with its adapter merged")

    def read_block(self, row: int, start: int, stop: int) -> Tensor:
        """See ModelRows."""
        self._refuse("give out keys and values, which prefix caching needs")

    def write_blocks(self, row: int, blocks: Sequence[Tensor]) -> None:
        """See ModelRows."""
        self._refuse("take keys and values, which prefix caching needs")

    def _refuse(self, what: str) -> NoReturn:
        raise ProgramError(
            f"a program in the format {self._format} cannot {what}; use the model itself or another format"
        )
