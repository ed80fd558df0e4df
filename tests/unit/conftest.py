"""Fixtures that several files use."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import bloomlm.export.formats.pt2
from tests.tiny_checkpoint import write_random_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a random model, in a directory that has room beside them."""
    directory = tmp_path_factory.mktemp("base") / "model"
    write_random_model(directory)
    return directory


@pytest.fixture(scope="module")
def no_compiler() -> Iterator[None]:
    """Exports are not compiled, which takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bloomlm.export.formats.pt2, "find_compiler", lambda: None)
        yield
