"""What the table of formats says of each: its names, its files, and how a program in it is opened."""

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
    """Name, in --backend, of what runs it."""
    large_file: Callable[[str], str]
    """Prefix -> name of the file with the weights, which is read whole only where that is asked for."""
    open: Callable[[Manifest, Path, str], LanguageModel]
    """Open the program that a manifest describes, its files checked, given their directory and prefix.

    Raises ProgramError where the files do not fit, BackendMissingError where what runs them is not installed.
    """
