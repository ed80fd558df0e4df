"""Find the local directory of builtin:NAME, of a directory, or of a name on the Hugging Face hub.

The hub client reads HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE itself.
"""

import importlib.resources
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from bloomlm.errors import CheckpointError

BUILTIN_PREFIX = "builtin:"
# Configuration, indices, tokenizer; the model card and the weights of other frameworks are not downloaded.
SMALL_FILES = ("*.json", "merges.txt", "vocab.txt")
# Only the first kind that the repository has is fetched.
WEIGHT_FILES = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Source:
    """A model or an adapter on this machine."""

    directory: Path
    """The directory of its files."""
    name: str
    """The name that the user gave."""


def resolve_source(name: str, revision: str | None = None) -> Source:
    """Find a model or an adapter, downloading it from the hub when it is neither builtin nor a directory.

    Args:
        name: builtin:NAME, a directory, or a hub name such as bigscience/bloom-560m.
        revision: branch, tag or commit of a hub repository; None: its main branch.

    Raises:
        CheckpointError: nothing of that name was found; the message says where it was looked for.
    """
    directory = Path(name).expanduser()
    if name.startswith(BUILTIN_PREFIX):
        directory = _builtin_directory(name.removeprefix(BUILTIN_PREFIX))
    elif directory.is_file():
        raise CheckpointError(f"{name} is a file; expected the directory that holds config.json and the weights")
    elif not directory.is_dir():
        return Source(_download(name, revision), name)
    if revision is not None:
        raise CheckpointError(
            f"revision {revision!r} selects a version on the hub, but {name} is on this machine; leave it out"
        )
    return Source(directory, name)


def _builtin_directory(asset: str) -> Path:
    assets = Path(str(importlib.resources.files("bloomlm.assets")))
    available = sorted(p.name for p in assets.iterdir() if (p / "config.json").is_file())
    if asset not in available:
        names = ", ".join(BUILTIN_PREFIX + a for a in available) or "none"
        raise CheckpointError(f"{BUILTIN_PREFIX}{asset} does not exist; the built-in models are: {names}")
    return assets / asset


def _download(name: str, revision: str | None) -> Path:
    version = "" if revision is None else f" at revision {revision!r}"
    try:
        for weights in WEIGHT_FILES:
            directory = Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=[*SMALL_FILES, weights], ignore_patterns=["*/*"]
                )
            )
            if any(directory.glob(weights)):
                break
        return directory
    except HFValidationError as error:
        raise CheckpointError(
            f"{name} is not a directory, and cannot be a hub name, which looks like owner/model; "
            "check the path, or use builtin:tiny"
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} on the hub is gated: ask for access on its page, then run 'hf auth login' or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a directory here nor a repository on the hub that you may read; "
            "check the spelling, and for a private one run 'hf auth login' or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"the hub has {name}, but no revision {revision!r} of it") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is not a directory here, and the hub's files{version} are not (all) in this machine's cache "
            "and the hub cannot be reached (offline mode, or no connection); connect once, unset HF_HUB_OFFLINE, "
            f"or give a directory. The hub client said: {_first_line(error)}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{name}{version} could not be fetched from the hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
