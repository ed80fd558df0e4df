"""Files that PaddleNLP itself wrote: those of this repository, and more where ../shared/fixtures is present."""

import tarfile
import tempfile
from pathlib import Path

import pytest

COMMITTED = Path(__file__).parent / "fixtures"
ARCHIVE = COMMITTED / "paddlenlp.tar.xz"
CHECKSUMS = COMMITTED / "paddlenlp.sha256"
SHARED = Path(__file__).parents[2] / "shared" / "fixtures" / "paddlenlp"

_directory = tempfile.TemporaryDirectory(prefix="bloomlm-fixtures-")
FIXTURES = Path(_directory.name)
"""The archive's files, with links to those of ../shared that it lacks; removed when the process ends."""

with tarfile.open(ARCHIVE) as archive:
    archive.extractall(FIXTURES, filter="data")
for path in SHARED.rglob("*"):
    link = FIXTURES / path.relative_to(SHARED)
    if path.is_dir():
        link.mkdir(exist_ok=True)
    elif not link.exists():
        link.symlink_to(path)

FULL_CHECKPOINT = FIXTURES / "checkpoints" / "ft_A"
needs_full_checkpoint = pytest.mark.skipif(
    not FULL_CHECKPOINT.is_dir(), reason="the full model's checkpoint of 3 MB is in ../shared/fixtures only"
)


def present(*names: str) -> list[str]:
    """Of some files and directories, those that the archive or ../shared has."""
    return [name for name in names if (FIXTURES / name).exists()]
