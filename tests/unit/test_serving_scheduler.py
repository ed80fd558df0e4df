"""The scheduler under random arrivals, cancels and endings: order, budget, no request left behind."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomlm.serving.scheduler import BLOCK_TOKENS, Scheduler, Slot, num_blocks_of

MAX_ROWS, MAX_STEP_TOKENS, NUM_BLOCKS, MAX_GUESSES = 4, 11, 12, 5


@dataclass(eq=False, kw_only=True)
class Simulated(Slot):
    """A request with everything that will happen to it."""

    number: int
    prompt: int
    lengths: list[int]
    """New tokens of each sequence."""
    cancelled_after: int | None
    first_held: int = 0
    """Steps during which it waits for another one's prefix."""
    events: list[str] = field(default_factory=list)


def simulated(
    number: int, prompt: int, lengths: list[int], cancelled_after: int | None, held: int, lookup: int
) -> Simulated:
    return Simulated(
        number=number,
        prompt=prompt,
        lengths=list(lengths),
        cancelled_after=cancelled_after,
        first_held=held,
        num_rows=len(lengths),
        blocks_per_row=num_blocks_of(prompt + max(lengths)),
        guesses_per_row=lookup,
        num_unread=prompt,
    )


requests = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt
        st.lists(st.integers(1, 12), min_size=1, max_size=MAX_ROWS),
        st.one_of(st.none(), st.none(), st.integers(0, 6)),
        st.sampled_from([0, 0, 0, 2]),
        st.integers(0, 2),
        st.integers(0, 3),  # steps before the next one arrives
    ),
    max_size=14,
)


@settings(max_examples=300, deadline=None)
@given(requests)
def test_order_budget_and_no_starvation(drawn: list[tuple[int, list[int], int | None, int, int, int]]) -> None:
    scheduler: Scheduler[Simulated] = Scheduler(
        max_rows=MAX_ROWS, max_step_tokens=MAX_STEP_TOKENS, num_blocks=NUM_BLOCKS, max_guesses=MAX_GUESSES
    )
    arriving = [
        (gap, simulated(number, prompt, lengths, cancel, held, lookup))
        for number, (prompt, lengths, cancel, held, lookup, gap) in enumerate(drawn)
        if num_blocks_of(prompt + max(lengths)) * len(lengths) <= NUM_BLOCKS
    ]
    present: list[Simulated] = []
    admitted: list[int] = []
    num_steps = 0
    while arriving or not scheduler.is_empty:
        while arriving and arriving[0][0] <= 0:
            _, slot = arriving.pop(0)
            scheduler.add(slot)
            present.append(slot)
        if arriving:
            gap, slot = arriving[0]
            arriving[0] = (gap - 1, slot)
        for slot in list(present):
            if slot.cancelled_after is not None and slot.events.count("present") == slot.cancelled_after:
                scheduler.remove(slot)
                present.remove(slot)
        waiting = [slot for slot in present if "admitted" not in slot.events]
        new = scheduler.admit()
        assert new == waiting[: len(new)], "admitted in the order of arrival"
        for slot in new:
            slot.events.append("admitted")
            admitted.append(slot.number)
        running = [slot for slot in present if "admitted" in slot.events]
        assert sum(slot.num_rows for slot in running) <= MAX_ROWS
        assert sum(slot.num_blocks for slot in running) == scheduler.num_reserved <= NUM_BLOCKS
        assert scheduler.num_running == len(running) and scheduler.num_waiting == len(waiting) - len(new)
        if len(new) < len(waiting):  # the first that waits did not fit
            first = waiting[len(new)]
            rows, blocks = sum(s.num_rows for s in running), scheduler.num_reserved
            assert rows + first.num_rows > MAX_ROWS or blocks + first.num_blocks > NUM_BLOCKS

        def readable(slot: Simulated) -> int:
            if slot.first_held:
                slot.first_held -= 1
                return 0
            return slot.num_unread

        held = {slot.number for slot in running if slot.first_held}
        reads = scheduler.plan(readable)
        rows = [slot for slot in running if not slot.num_unread for _ in slot.lengths]
        decoding = len(rows) + min(MAX_GUESSES, sum(slot.guesses_per_row for slot in rows))
        assert decoding + sum(reads.values()) <= MAX_STEP_TOKENS
        left = MAX_STEP_TOKENS - decoding
        for slot in running:  # the rest of the step goes to prompts in order, each as much as it can take
            if slot.num_unread and slot.number not in held:
                expected = min(left, slot.num_unread)
                assert reads.get(slot, 0) == expected
                left -= expected
        for slot in running:
            if not slot.num_unread:
                slot.lengths = [length - 1 for length in slot.lengths]
            slot.num_unread -= reads.get(slot, 0)
            ended = slot.lengths.count(0)
            slot.lengths = [length for length in slot.lengths if length]
            if ended:
                scheduler.release(slot, ended)
            if not slot.lengths:
                present.remove(slot)
        for slot in present:
            slot.events.append("present")
        num_steps += 1
        assert num_steps < 1000, "a request never ends"
    assert scheduler.num_reserved == 0


def test_a_request_that_does_not_fit_keeps_its_turn() -> None:
    """A large request is not overtaken by small ones for which there would be room."""
    scheduler: Scheduler[Slot] = Scheduler(max_rows=2, max_step_tokens=8, num_blocks=8)
    first, large, small = (Slot(num_rows=rows, blocks_per_row=1) for rows in (1, 2, 1))
    for slot in (first, large, small):
        scheduler.add(slot)
    assert scheduler.admit() == [first]
    assert scheduler.admit() == []
    scheduler.remove(first)
    assert scheduler.admit() == [large]


def test_a_long_prompt_leaves_what_it_does_not_need_to_the_next() -> None:
    scheduler: Scheduler[Slot] = Scheduler(max_rows=3, max_step_tokens=10, num_blocks=9)
    decoding, long, next_one = (Slot(num_rows=1, blocks_per_row=1, num_unread=count) for count in (0, 12, 9))
    for slot in (decoding, long, next_one):
        scheduler.add(slot)
    scheduler.admit()
    assert scheduler.plan(lambda slot: slot.num_unread) == {long: 9}
    long.num_unread = 3
    assert scheduler.plan(lambda slot: slot.num_unread) == {long: 3, next_one: 6}


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (BLOCK_TOKENS, 1), (BLOCK_TOKENS + 1, 2)])
def test_blocks_of_tokens(tokens: int, blocks: int) -> None:
    assert num_blocks_of(tokens) == blocks
