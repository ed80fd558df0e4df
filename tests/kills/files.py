"""What lies in a directory, without the numbers that a clock or the system measured."""

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

Snapshot = dict[str, bytes]
"""Path -> content; a directory ends in a slash."""

_MEASURED = re.compile(r".*(seconds|per_second|runtime|utilisation|memory_bytes)|padding_avoided")
"""Numbers of the machine, or of the part of a run that one process did."""


def snapshot(directory: Path) -> Snapshot:
    """Everything below a directory, hidden files included."""
    found: Snapshot = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        found.update({f"{name}/": b""} if path.is_dir() else {name: _unmeasured(path)})
    return found


def below(found: Snapshot, prefix: str) -> Snapshot:
    """The part of a snapshot in a directory, or the file of that name."""
    return {name: content for name, content in found.items() if name == prefix or name.startswith(f"{prefix}/")}


def is_hidden(name: str) -> bool:
    """Whether a name of a snapshot is that of a hidden file, or of one in a hidden directory."""
    return any(part.startswith(".") for part in name.split("/"))


def differences(found: Snapshot, expected: Snapshot) -> list[str]:
    """One line for every path that is missing, unexpected or different."""
    lines = [f"{name} is missing" for name in expected.keys() - found.keys()]
    lines += [f"{name} is left over" for name in found.keys() - expected.keys()]
    lines += [f"{name} differs" for name in found.keys() & expected.keys() if found[name] != expected[name]]
    return sorted(lines)


def _unmeasured(path: Path) -> bytes:
    content = path.read_bytes()
    try:
        if path.name == ".metadata":  # of torch's distributed checkpoints; it holds the temporary name and a random id
            return pickle.dumps(dataclasses.replace(pickle.loads(content), storage_meta=None))
        if path.suffix == ".jsonl":
            lines = content.split(b"\n")
            return b"\n".join(_plain(json.loads(line)) if line else line for line in lines)
        if path.name == "checkpoint_manifest.json":
            manifest = json.loads(content)
            del manifest["files"]["trainer_state.json"]  # its size depends on the digits of measured numbers
            return _plain(manifest)
        if path.suffix == ".json":
            values = json.loads(content)
            if "bloomlm_report" in values:
                del values["run"]
            return _plain(values)
    except (ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
        return content  # not what its name says, so nothing is left out
    if path.suffix == ".md":
        return b"\n".join(line for line in content.split(b"\n") if not line.startswith(b"| run "))
    return content


def _plain(values: Any) -> bytes:
    return json.dumps(_without_measured(values), sort_keys=True).encode()


def _without_measured(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _without_measured(item) for name, item in values.items() if not _MEASURED.fullmatch(name)}
    return [_without_measured(item) for item in values] if isinstance(values, list) else values
