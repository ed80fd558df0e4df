"""What an exported program says of itself: PREFIX.json beside its files. Written by bloomlm.export, read here."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bloomlm.errors import ProgramError

KIND = "bloomlm program"
VERSION = 3
"""Before, int8 had one scale or two for a row; now it has four."""

VIRTUAL = "virtual_tokens"
"""Name, in a weights file, of the keys and values that a prefix adapter puts before every prompt."""

_CHUNK_BYTES = 1 << 24
_HEAD_BYTES = 1 << 24
"""The beginning of a large file, where GGUF keeps its tables: compared at every start."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of PREFIX.json."""

    format: str
    """One of runtime.formats.FORMATS."""
    bloomlm_version: str
    """Of the package that exported it."""
    library_versions: Mapping[str, str]
    """Of the libraries that made it, torch among them."""
    source: str
    """What was exported, as the user named it."""
    fingerprint: str
    """Of the model's configuration, adapter and weights."""
    vocab_size: int
    """Ids it knows (V)."""
    hidden_size: int
    """Width (D)."""
    n_layer: int
    """Blocks (L)."""
    n_head: int
    """Heads of a block (H)."""
    num_virtual_tokens: int = 0
    """Of a prefix adapter (P)."""
    dtype: str
    """Precision that matrices are kept in, without quantisation."""
    quantization: str
    """none, int8 or int4."""
    special_tokens: Mapping[str, int | None]
    """Ids by name: bos_token_id, eos_token_id, pad_token_id, unk_token_id."""
    tokenizer: str
    """Fingerprint of its tokenizer, which programs in one directory share."""
    max_new_tokens: int
    """Tokens to generate where nothing else is said."""
    weights: Mapping[str, Any] = field(default_factory=dict)
    """pt2: name -> [dtype, shape] of every tensor in the weights file, in the order that programs take them."""
    instruction_set: str | None = None
    """pt2: what the compiled programs need of the processor; None where nothing is compiled."""
    files: Mapping[str, Mapping[str, Any]]
    """Name -> what describe_file says, of every file but this one and the tokenizer's."""
    parity: Mapping[str, float] = field(default_factory=dict)
    """What the comparison with the PyTorch model gave when it was exported."""

    @property
    def head_dim(self) -> int:
        """Width of a head (K)."""
        return self.hidden_size // self.n_head

    def to_json(self) -> str:
        """The file's text, which carries a checksum of itself."""
        values = {"kind": KIND, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps({**values, "checksum": manifest_checksum(values)}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a PREFIX.json.

        Raises:
            ProgramError: it is missing, damaged, something else, or of a newer bloomlm.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ProgramError(_missing(path)) from error
        except ValueError as error:
            raise ProgramError(f"{path} is damaged: it is no JSON ({error}); export the program again") from error
        if not isinstance(values, dict) or values.get("kind") != KIND:
            raise ProgramError(f"{path} does not describe an exported program; expected what bloomlm export writes")
        if values.get("version") != VERSION:
            raise ProgramError(
                f"{path} is of version {values.get('version')}, this bloomlm runs version {VERSION}; export the "
                "program again with this bloomlm, or run it with the one that made it"
            )
        # sizes that are not the program's would make compiled code write outside of its memory
        if values.pop("checksum", None) != manifest_checksum(values):
            raise ProgramError(f"{path} is damaged or was edited: its checksum is not its own; copy it again")
        del values["kind"], values["version"]
        try:
            manifest = cls(**values)
            counts = (manifest.vocab_size, manifest.hidden_size, manifest.n_layer, manifest.n_head)
            if not all(isinstance(n, int) and n > 0 for n in counts):
                raise ValueError(f"sizes {counts}")
            for entry in manifest.files.values():
                int(entry["bytes"]), str(entry["sha256"]), str(entry["head_sha256"])
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ProgramError(f"{path} is damaged: {error}; export the program again") from error
        return manifest

    def check_files(self, directory: Path, *, hash_file: Callable[[str], bool]) -> None:
        """Hold the files against what was written.

        Args:
            directory: where they lie.
            hash_file: whether a file, by its name, is read whole and its checksum compared; of the others, the size
                and the beginning.

        Raises:
            ProgramError: a file is missing, cut short or changed.
        """
        for name, entry in self.files.items():
            path = directory / name
            try:
                size = path.stat().st_size
                if size != entry["bytes"]:
                    raise ProgramError(
                        f"{path} holds {size} bytes, {entry['bytes']} were written: cut short, or of another export; "
                        "copy all files of the program again"
                    )
                whole = hash_file(name)
                if sha256(path, None if whole else _HEAD_BYTES) != entry["sha256" if whole else "head_sha256"]:
                    raise ProgramError(f"{path} is damaged: its checksum is not the one written; copy it again")
            except OSError as error:
                raise ProgramError(
                    f"{path} cannot be read ({error.strerror}); copy all files of the program"
                ) from error


def describe_file(path: Path) -> dict[str, Any]:
    """A file's size in bytes, its checksum, and that of its beginning."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path), "head_sha256": sha256(path, _HEAD_BYTES)}


def sha256(path: Path, num_bytes: int | None = None) -> str:
    """Hex digest of a file, or of its first num_bytes."""
    digest = hashlib.sha256()
    left = path.stat().st_size if num_bytes is None else num_bytes
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def manifest_checksum(values: Mapping[str, Any]) -> str:
    """Hex digest of a manifest's values, the checksum not among them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path.parent} is no directory; expected one that bloomlm export wrote into"
    others = sorted(
        other.stem for other in path.parent.glob("*.json") if f'"{KIND}"' in other.read_text(errors="replace")[:100]
    )
    hint = f"it holds {', '.join(others)}: give one as the prefix" if others else "it holds no exported program"
    return f"{path} cannot be read; {hint}"
