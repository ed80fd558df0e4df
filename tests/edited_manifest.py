"""Changes to an exported program's manifest, for the tests that open what does not fit."""

import json
from pathlib import Path

from bloomlm.runtime.manifest import manifest_checksum


def tamper(path: Path, **changes: object) -> None:
    """Change the manifest of the program at a path, and leave its checksum."""
    manifest = path.with_suffix(".json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


def edit(path: Path, **changes: object) -> None:
    """Change it, its checksum with it."""
    values = json.loads(path.with_suffix(".json").read_text()) | changes
    del values["checksum"]
    tamper(path, **changes, checksum=manifest_checksum(values))
