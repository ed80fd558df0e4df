"""Fixtures that several files use."""

from collections.abc import Iterator

import pytest

import bloomlm.export.formats.pt2


@pytest.fixture(scope="module")
def no_compiler() -> Iterator[None]:
    """Exports are not compiled, which takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bloomlm.export.formats.pt2, "find_compiler", lambda: None)
        yield
