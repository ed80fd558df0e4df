"""The prefix cache against a list of all sequences that were saved."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomlm.serving.prefix_cache import PrefixCache, block_names
from bloomlm.serving.scheduler import BLOCK_TOKENS


def text(number: int, num_blocks: int) -> list[int]:
    draw = random.Random(number)
    return [draw.randrange(250_880) for _ in range(num_blocks * BLOCK_TOKENS)]


def save(cache: PrefixCache[str], names: list[bytes], most: int, label: str) -> list[int]:
    read: list[int] = []

    def block(number: int) -> str:
        read.append(number)
        return f"{label}{number}"

    cache.save(names, 0, block, most=most)
    return read


def test_names_depend_on_all_tokens_before_and_on_the_origin() -> None:
    tokens = text(1, 3)
    names = block_names([*tokens, 7], origin=b"")
    assert len(set(names)) == 3  # the token after the last whole block has no name
    other = [*tokens[:BLOCK_TOKENS], tokens[BLOCK_TOKENS] ^ 1, *tokens[BLOCK_TOKENS + 1 :]]
    assert block_names(other, origin=b"")[:1] == names[:1]
    assert not set(block_names(other, origin=b"")[1:]) & set(names)
    assert not set(block_names(tokens, origin=b"adapter")) & set(names)
    assert block_names(tokens, origin=b"", before=names[:2]) == names


def test_a_sequence_is_found_up_to_its_first_missing_block() -> None:
    cache: PrefixCache[str] = PrefixCache()
    names = block_names(text(1, 4), origin=b"")
    assert cache.find(names) == []
    assert save(cache, names[:2], 9, "a") == [0, 1]
    assert cache.find(names) == ["a0", "a1"]
    assert save(cache, names, 9, "b") == [2, 3]
    assert cache.find(names) == ["a0", "a1", "b2", "b3"]
    assert cache.find(block_names(text(2, 4), origin=b"")) == []


def test_the_end_of_a_sequence_leaves_before_its_beginning() -> None:
    cache: PrefixCache[str] = PrefixCache()
    old, new = (block_names(text(number, 3), origin=b"") for number in (1, 2))
    save(cache, old, 6, "old")
    save(cache, new, 6, "new")
    cache.find(old)
    cache.shrink(4)
    assert len(cache.find(old)) == 3 and len(cache.find(new)) == 1


def test_saving_drops_others_but_not_the_sequence_itself() -> None:
    cache: PrefixCache[str] = PrefixCache()
    old, new = (block_names(text(number, 4), origin=b"") for number in (1, 2))
    save(cache, old, 3, "old")
    assert len(cache.find(old)) == 3
    save(cache, new, 3, "new")
    assert cache.find(new) == ["new0", "new1", "new2"] and cache.find(old) == []
    assert save(cache, new, 0, "new") == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("sf"), st.integers(0, 3), st.integers(1, 5), st.integers(0, 8))))
def test_what_is_found_is_what_was_saved(actions: list[tuple[str, int, int, int]]) -> None:
    """Sequences 0 and 1, and 2 and 3, share their first two blocks."""
    cache: PrefixCache[bytes] = PrefixCache()
    for kind, number, count, most in actions:
        tokens = (text(number // 2, 2) + text(10 + number, 3))[: count * BLOCK_TOKENS]
        names = block_names(tokens, origin=b"")
        if kind == "f":
            found = cache.find(names)
            assert found == names[: len(found)]
        else:
            before = len(cache)
            cache.save(names, 0, lambda index, own=names: own[index], most=most)  # type: ignore[misc]
            assert len(cache) <= max(before, most)
            assert len(cache.find(names)) >= min(len(names), most)


@pytest.mark.parametrize("most", [-3, 0, 2])
def test_shrink(most: int) -> None:
    cache: PrefixCache[str] = PrefixCache()
    save(cache, block_names(text(1, 4), origin=b""), 4, "a")
    cache.shrink(most)
    assert len(cache) == max(0, most)
