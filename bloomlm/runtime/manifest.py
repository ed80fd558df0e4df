"""The manifest of an exported program, PREFIX.json: its sizes, files and checksums. bloomlm.export writes it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bloomlm.errors import ProgramError
from bloomlm.files.json_text import read_json

KIND = "bloomlm program"
VERSION = 6
"""Programs of version 5 have other groups in int4; in version 4, prefill gives the logits after each prompt only;
earlier functions take left-padded rows of one length."""

CACHE_BYTES = {"float32": 4, "bfloat16": 2}
"""Precision of keys and values -> bytes of a number."""
VIRTUAL = "virtual_tokens"
"""Name of the tensor with the keys and values that a prefix adapter puts before every prompt."""

_CHUNK_BYTES = 1 << 18
_HEAD_BYTES = 1 << 24
"""Beginning of a large file that is checked at every start; GGUF keeps its tables there."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of PREFIX.json."""

    format: str
    """One of runtime.formats.FORMATS."""
    bloomlm_version: str
    """Version of the package that exported it."""
    library_versions: Mapping[str, str]
    """Versions of the libraries that exported it, torch among them."""
    source: str
    """Name or path of the model, as the user gave it."""
    fingerprint: str
    """Fingerprint of the model's configuration, adapter and weights."""
    vocab_size: int
    """Size of the vocabulary (V)."""
    hidden_size: int
    """Width of the hidden states (D)."""
    n_layer: int
    """Number of blocks (L)."""
    n_head: int
    """Number of heads of a block (H)."""
    num_virtual_tokens: int = 0
    """Number of virtual tokens of a prefix adapter (P)."""
    dtype: str
    """Precision of the matrices without quantisation."""
    quantization: str
    """none, int8 or int4."""
    special_tokens: Mapping[str, int | None]
    """Ids by name: bos_token_id, eos_token_id, pad_token_id, unk_token_id."""
    tokenizer: str
    """Fingerprint of its tokenizer, which programs in one directory share."""
    max_new_tokens: int
    """Default number of tokens to generate."""
    weights: Mapping[str, Any] = field(default_factory=dict)
    """pt2: name -> [dtype, shape] of every tensor in the weights file, in the order of the program's inputs."""
    cache_dtype: str = "float32"
    """Precision of keys and values: float32, or in pt2 bfloat16."""
    instruction_set: str | None = None
    """pt2: the instruction set that the compiled functions need; None where nothing is compiled."""
    files: Mapping[str, Mapping[str, Any]]
    """Name -> what describe_file returns, for every file except this one and the tokenizer's."""
    parity: Mapping[str, float] = field(default_factory=dict)
    """Result of the comparison with the PyTorch model during export; empty without one."""

    @property
    def head_dim(self) -> int:
        """Width of a head (K)."""
        return self.hidden_size // self.n_head

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all blocks."""
        return 2 * self.n_layer * self.hidden_size * CACHE_BYTES[self.cache_dtype]

    def to_json(self) -> str:
        """The text of the file, which includes a checksum of the values."""
        values = {"kind": KIND, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps({**values, "checksum": manifest_checksum(values)}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a PREFIX.json.

        Raises:
            ProgramError: it is missing, damaged, not a manifest, or of another version.
        """
        try:
            values = read_json(path)
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
        # with wrong sizes, compiled code would write outside its memory
        if values.pop("checksum", None) != manifest_checksum(values):
            raise ProgramError(f"{path} is damaged or was edited: its checksum does not match; copy it again")
        del values["kind"], values["version"]
        try:
            manifest = cls(**values)
            counts = (manifest.vocab_size, manifest.hidden_size, manifest.n_layer, manifest.n_head)
            if not all(isinstance(n, int) and n > 0 for n in counts) or manifest.cache_dtype not in CACHE_BYTES:
                raise ValueError(f"sizes {counts}, keys and values in {manifest.cache_dtype}")
            for entry in manifest.files.values():
                int(entry["bytes"]), str(entry["sha256"]), str(entry["head_sha256"])
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ProgramError(f"{path} is damaged: {error}; export the program again") from error
        return manifest

    def check_files(self, directory: Path, *, hash_file: Callable[[str], bool]) -> None:
        """Compare the files with what was written.

        Args:
            directory: the directory of the files.
            hash_file: from a file's name, whether the checksum of the whole file is compared, or only the size and the
                checksum of the beginning.

        Raises:
            ProgramError: a file is missing, cut short or changed.
        """
        for name, entry in self.files.items():
            path = directory / name
            try:
                size = path.stat().st_size
                if size != entry["bytes"]:
                    raise ProgramError(
                        f"{path} holds {size} bytes, {entry['bytes']} were written: cut short, or from another export; "
                        "copy all files of the program again"
                    )
                whole = hash_file(name)
                if sha256(path, None if whole else _HEAD_BYTES) != entry["sha256" if whole else "head_sha256"]:
                    raise ProgramError(f"{path} is damaged: its checksum has changed; copy it again")
            except OSError as error:
                raise ProgramError(
                    f"{path} cannot be read ({error.strerror}); copy all files of the program"
                ) from error


def describe_file(path: Path) -> dict[str, Any]:
    """The size of a file in bytes, its checksum and the checksum of its beginning."""
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
    """Hex digest of a manifest's values without the checksum."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path.parent} is no directory; expected one that bloomlm export wrote into"
    files = (other for other in path.parent.glob("*.json") if other.is_file())
    others = sorted(other.stem for other in files if f'"{KIND}"' in other.read_text(errors="replace")[:100])
    hint = f"it holds {', '.join(others)}: give one as the prefix" if others else "it holds no exported program"
    return f"{path} cannot be read; {hint}"
