"""A row in the table of formats: the format's names and files, and how a program is opened."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
