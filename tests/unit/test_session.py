"""DecodeSession: whatever arrives and leaves beside it, a sequence has the tokens that it has alone."""

import random
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import load
from bloomlm.errors import GenerationError
from bloomlm.evaluation.scoring.scorers import window_scorer
from bloomlm.evaluation.scoring.windows import continuation_window
from bloomlm.export.program import export_program
from bloomlm.generation import reading
from bloomlm.generation.config import BeamSearch, GenerationConfig, Greedy, Sampling
from bloomlm.generation.generate import generate
from bloomlm.generation.language_model import LanguageModel
from bloomlm.generation.log_probs import PromptScores
from bloomlm.generation.sequences import Event
from bloomlm.generation.session import DecodeSession
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.runtime import Program

MAX_ROWS, MAX_TOKENS, BLOCK = 6, 40, 4
STRATEGIES = (
    Greedy(),
    Greedy(),
    Sampling(seed=3, temperature=0.4),  # flat distributions would magnify the rounding of logits
    Sampling(seed=9, top_k=20, top_p=0.9, temperature=1.5),
    Sampling(seed=5, min_p=0.05),
    BeamSearch(),
)
KINDS = ["eager", "eager with a prefix", "program", "program with a prefix"]


def text_of(ids: list[int]) -> str:
    return "".join(f"<{token}>" for token in ids)


def eager_model(vocab_size: int, *, with_prefix: bool) -> BloomForCausalLM:
    """A random model that ends now and then, whose attention reaches far back."""
    config = BloomConfig(vocab_size=vocab_size, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.5)
    model = BloomForCausalLM(config)
    model.init_weights(torch.Generator().manual_seed(4))
    with torch.no_grad():
        model.transformer.word_embeddings.weight[2] *= 1.6
    if with_prefix:
        apply_adapter(model, PrefixConfig(num_prefix_tokens=4), torch.Generator().manual_seed(1))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "prefix" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(2))
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanguageModel]:
    kind, _, prefix = request.param.partition(" with a ")
    if kind == "eager":
        yield eager_model(101, with_prefix=bool(prefix))
        return
    request.getfixturevalue("no_compiler")
    tokenizer = load("builtin:tiny").tokenizer
    path: Path = tmp_path_factory.mktemp("program") / "bloom"
    eager = eager_model(tokenizer.vocab_size, with_prefix=bool(prefix))
    export_program(eager, tokenizer, path, source="small", verify=False)
    yield Program(path).model


def random_config(draw: random.Random) -> GenerationConfig:
    strategy = draw.choice(STRATEGIES)
    count = 1
    if isinstance(strategy, BeamSearch):
        strategy = BeamSearch(num_beams=draw.choice((2, 3)), length_penalty=draw.choice((0.5, 1.0)))
        count = draw.choice((1, 2))
    elif isinstance(strategy, Sampling):
        count = draw.choice((1, 1, 3))
    return GenerationConfig(
        strategy=strategy,
        max_new_tokens=draw.randint(1, 14),
        min_new_tokens=draw.choice((0, 0, 1)),
        repetition_penalty=draw.choice((1.0, 1.0, 1.3)),
        no_repeat_ngram_size=draw.choice((0, 0, 2)),
        num_return_sequences=count,
        stop=draw.choice(((), (), ("25>", "<17><"))),
        stop_token_ids=draw.choice(((), (), (33, 8, 71))),
        ignore_eos=draw.choice((False, False, True)),
        logit_bias=draw.choice(((), (), ((9, -100.0), (50, 3.0)))),
        frequency_penalty=draw.choice((0.0, 0.0, 1.5)),
        presence_penalty=draw.choice((0.0, 0.0, -2.0)),
        num_log_probs=None if isinstance(strategy, BeamSearch) else draw.choice((None, 0, 3)),
    )


class Request:
    """A prompt, and what comes of it."""

    def __init__(self, draw: random.Random, vocab_size: int, number: int) -> None:
        self.prompt = [draw.randrange(4, vocab_size) for _ in range(draw.choice((1, 2, 5, 9, 20)))]
        if draw.random() < 0.6:  # share a beginning with others
            self.prompt = list(range(10, 10 + draw.choice((8, 11, 16)))) + self.prompt[:9]
        self.config = random_config(draw)
        self.number = number
        self.prompt_log_probs = draw.choice((None, None, 0, 2))
        self.prompt_scores: PromptScores = []
        self.handles: list[int] = []
        self.events: dict[int, list[Event]] = {}
        self.steps_left = draw.choice((3, 1000, 1000))
        """Steps after which it is cancelled."""


def run(model: LanguageModel, requests: list[Request], draw: random.Random) -> None:
    """Let requests arrive at random, several at once, and leave by themselves or cancelled."""
    can_guess = model.features.scores_chunks and model.features.truncates
    session = DecodeSession(
        model,
        max_rows=MAX_ROWS,
        max_tokens=MAX_TOKENS,
        decode_text=text_of,
        prompt_lookup=draw.choice((0, 3)) if can_guess else 0,
    )
    owners: dict[int, Request] = {}
    saved: dict[tuple[int, ...], Tensor] = {}
    """Tokens from the first one on -> the block of the last BLOCK of them."""
    num_filled = 0
    waiting = list(requests)
    while waiting or not session.is_empty:
        while waiting and waiting[0].config.num_rows <= session.num_free_rows and draw.random() < 0.6:
            request = waiting.pop(0)
            blocks = []
            if request.prompt_log_probs is None and model.features.blocks:
                stops = range(BLOCK, len(request.prompt), BLOCK)
                found = (saved.get(tuple(request.prompt[:stop])) for stop in stops)
                blocks = list(takewhile(lambda block: block is not None, found))
            num_filled += len(blocks)
            request.handles = session.open(
                request.prompt,
                request.config,
                first_sequence=request.number,
                prompt_log_probs=request.prompt_log_probs,
                blocks=blocks,
            )
            assert session.num_read(request.handles[0]) == BLOCK * len(blocks)
            owners |= dict.fromkeys(request.handles, request)
        unread = {handle: count for handle in owners if (count := session.num_unread(handle))}
        reads = {handle: draw.choice((0, 1, 3, count)) for handle, count in unread.items()}
        for event in session.step(draw.choice((reads, reads, None))):
            owners[event.handle].events.setdefault(event.handle, []).append(event)
        every = list({id(owner): owner for owner in owners.values()}.values())
        for request in every:
            first = request.handles[0]
            if request.steps_left > 0 and first in unread and model.features.blocks:
                for stop in range(BLOCK, min(session.num_read(first), len(request.prompt)) + 1, BLOCK):
                    saved[tuple(request.prompt[:stop])] = session.read_block(first, stop - BLOCK, stop)
        for request in every:
            first = request.handles[0]
            if first in unread and not session.num_unread(first) and request.prompt_log_probs is not None:
                request.prompt_scores = session.prompt_scores(first)
            request.steps_left -= 1
            if request.steps_left == 0:
                session.evict(request.handles)
    assert session.num_free_rows == MAX_ROWS
    assert num_filled > 0 or not model.features.blocks


@pytest.mark.parametrize("seed", range(4))
def test_sequences_have_the_tokens_that_they_have_alone(model: LanguageModel, seed: int) -> None:
    draw = random.Random(seed)
    requests = [Request(draw, min(model.vocab_size, 101), number) for number in range(16)]
    run(model, requests, draw)
    num_whole = num_tokens = 0
    for request in requests:
        alone = generate(model, [request.prompt], request.config, decode_text=text_of, first_sequence=request.number)
        assert len(alone) == len(request.handles)
        for handle, expected in zip(request.handles, alone, strict=True):
            events = request.events.get(handle, [])
            tokens = [event.token for event in events]
            if events and events[-1].finish_reason is not None:
                assert (tokens, events[-1].finish_reason) == (expected.tokens, expected.finish_reason)
                num_whole += 1
            else:  # cancelled
                assert request.steps_left <= 0 and tokens == expected.tokens[: len(tokens)]
            assert all(event.finish_reason is None for event in events[:-1])
            for event, score in zip(events, expected.scores, strict=False):
                assert event.log_prob == pytest.approx(score.log_prob, abs=1e-4)
            num_tokens += len(tokens)
    assert num_whole > 10 and num_tokens > 60


def log_probs_of(model: BloomForCausalLM, tokens: list[int]) -> Tensor:
    """[T - 1, V] log-probabilities of each token but the first, by the whole sequence without a cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0, :-1].log_softmax(-1)


def check_score(log_prob: float | None, top: Any, expected: Tensor, token: int, num_top: int) -> None:
    """Compare with the log-probabilities [V] of all tokens at one place."""
    assert log_prob == pytest.approx(expected[token].item(), abs=1e-4)
    values, ids = expected.topk(num_top)
    assert [id_ for id_, _ in top] == ids.tolist()
    assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("with_prefix", [False, True])
def test_log_probabilities_are_those_of_the_whole_sequence(with_prefix: bool) -> None:
    model = eager_model(101, with_prefix=with_prefix)
    draw = random.Random(7)
    requests = [Request(draw, 101, number) for number in range(24)]
    run(model, requests, draw)
    num_prompt_tokens = num_new_tokens = 0
    for request in requests:
        if request.prompt_scores:
            num_top = request.prompt_log_probs or 0
            assert request.prompt_scores[0] is None and len(request.prompt_scores) == len(request.prompt)
            places = log_probs_of(model, request.prompt)
            for score, expected, token in zip(request.prompt_scores[1:], places, request.prompt[1:], strict=True):
                assert score is not None
                check_score(*score, expected, token, num_top)
                num_prompt_tokens += 1
        for events in request.events.values():
            tokens = [event.token for event in events]
            places = log_probs_of(model, request.prompt + tokens)[len(request.prompt) - 1 :]
            for event, expected, token in zip(events, places, tokens, strict=True):
                if request.config.num_log_probs is None:
                    assert event.log_prob is None and event.top_log_probs is None
                else:
                    check_score(event.log_prob, event.top_log_probs, expected, token, request.config.num_log_probs)
                    num_new_tokens += 1
    assert num_prompt_tokens > 30 and num_new_tokens > 60


def test_log_probabilities_are_those_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_SCORED", 7)  # several passes for a prompt
    loaded = load("builtin:tiny", dtype="float32")
    texts = ("The ancient Greek scientists thought that light comes from the eyes.", "A second text, scored beside it")
    prompts = [loaded.tokenizer.encode(text) for text in texts]
    session = DecodeSession(loaded.model, max_rows=2, max_tokens=80)
    config = GenerationConfig(max_new_tokens=5, ignore_eos=True, num_log_probs=0)
    handles = [session.open(prompt, config, prompt_log_probs=1)[0] for prompt in prompts]
    tokens = {handle: list(prompt) for handle, prompt in zip(handles, prompts, strict=True)}
    new: dict[int, list[float | None]] = {handle: [] for handle in handles}
    events = session.step({handles[0]: 9, handles[1]: 3})
    while events or not session.is_empty:
        for event in events:
            tokens[event.handle].append(event.token)
            new[event.handle].append(event.log_prob)
        events = [] if session.is_empty else session.step()
    scorer = window_scorer(loaded.model, max_batch_tokens=512)
    for handle in handles:
        found = [score and score.log_prob for score in session.prompt_scores(handle)][1:] + new[handle]
        places = range(1, len(tokens[handle]))
        windows = [continuation_window(tokens[handle][:stop], tokens[handle][stop : stop + 1])[0] for stop in places]
        expected = [score.log_prob for score in scorer.score_all(windows)]
        assert found == pytest.approx(expected, abs=1e-5)


def test_prompt_scores_are_handed_over_once() -> None:
    session = DecodeSession(eager_model(101, with_prefix=False), max_rows=2, max_tokens=10)
    config = GenerationConfig(max_new_tokens=1)
    (scored,) = session.open([5, 6, 7], config, prompt_log_probs=0)
    (plain,) = session.open([5, 6, 7], config)
    session.step({scored: 2, plain: 3})
    with pytest.raises(GenerationError, match="no prompt scores for handle 0"):
        session.prompt_scores(scored)
    assert [event.handle for event in session.step()] == [scored] and session.is_empty
    assert len(session.prompt_scores(scored)) == 3  # though the sequence has ended
    for handle in (scored, plain):
        with pytest.raises(GenerationError, match=f"no prompt scores for handle {handle}"):
            session.prompt_scores(handle)


def test_reading_in_chunks_continues_the_sequences_that_are_read() -> None:
    session = DecodeSession(eager_model(101, with_prefix=False), max_rows=2, max_tokens=20)
    config = GenerationConfig(max_new_tokens=8, ignore_eos=True)
    (first,) = session.open([5, 6], config)
    assert [event.handle for event in session.step()] == [first]
    (second,) = session.open([9, 10, 11, 12, 13], config)
    assert session.num_unread(second) == 5
    assert [event.handle for event in session.step({})] == [first] and session.num_unread(second) == 5
    assert [event.handle for event in session.step({second: 4})] == [first] and session.num_unread(second) == 1
    assert [event.handle for event in session.step({second: 99})] == [first, second]
    with pytest.raises(GenerationError, match="reads names handle 1"):
        session.step({second: 1})
    assert [event.handle for event in session.step()] == [first, second]
    session.evict([first])
    (third,) = session.open([9, 10, 11], config)
    session.step({third: 2})
    session.evict([third])  # while it is being read
    assert session.num_free_rows == 1 and [event.handle for event in session.step()] == [second]


def test_a_sequence_that_ended_is_known_until_the_next_change() -> None:
    session = DecodeSession(eager_model(101, with_prefix=False), max_rows=1, max_tokens=20)
    config = GenerationConfig(max_new_tokens=2, ignore_eos=True)
    (handle,) = session.open([5, 6, 7], config)
    assert session.num_read(handle) == 0
    session.step({handle: 2})
    assert session.num_read(handle) == 2
    session.step()
    assert session.num_read(handle) == 3
    (event,) = session.step()
    assert event.finish_reason == "length" and session.num_read(handle) == 4
    assert session.num_free_rows == 1 and session.is_empty
    session.open([9], config)
    with pytest.raises(GenerationError, match="handle 0 names no sequence"):
        session.num_read(handle)


def test_a_failed_step_ends_the_session() -> None:
    session = DecodeSession(eager_model(101, with_prefix=False), max_rows=2, max_tokens=20)
    session.open([5, 6], GenerationConfig(max_new_tokens=8, ignore_eos=True))
    rows: Any = session._rows.model

    def fail(*_: Any) -> None:
        raise MemoryError

    rows.decode_step = fail
    session.step()
    with pytest.raises(MemoryError):
        session.step()
    with pytest.raises(GenerationError, match="its sequences are lost"):
        session.step()


def test_prompts_opened_together_are_read_in_one_pass() -> None:
    model = eager_model(101, with_prefix=False)
    sizes: list[int] = []
    model.transformer.h[0].register_forward_hook(lambda _, __, out: sizes.append(len(out)))
    session = DecodeSession(model, max_rows=4, max_tokens=20)
    samples = GenerationConfig(strategy=Sampling(), num_return_sequences=2, max_new_tokens=3, min_new_tokens=3)
    for prompt in ([5, 6, 7], [8]):
        session.open(prompt, samples)
    assert len(session.step()) == 4 and sizes == [4]  # the first tokens need no more than the prompts
    session.step()
    assert sizes == [4, 4]  # and a token that ends a sequence is never read
    session.step()
    assert session.is_empty and sizes == [4, 4, 4] and session.step() == []


def test_neither_admission_nor_leaving_touches_other_rows(model: LanguageModel) -> None:
    session = DecodeSession(model, max_rows=4, max_tokens=20)
    plain = GenerationConfig(max_new_tokens=9, min_new_tokens=9)
    rows: Any = session._rows.model
    parts: list[Tensor] = (
        rows.cache if isinstance(rows.cache, list) else list(rows.cache.keys) + list(rows.cache.values)
    )
    with torch.inference_mode():
        for part in parts:
            part[3] = 0.0  # a row that is not used may hold NaN, which equals nothing
    _, (second,), _ = (session.open(prompt, plain) for prompt in ([5, 6, 7], [8], [9, 10]))
    session.step()
    session.step()
    before = [(part.data_ptr(), part.clone()) for part in parts]
    session.evict([second])
    (other,) = session.open([11, 12, 13, 14], plain)
    with torch.inference_mode():
        session._read({other: 4})  # a step without the other rows' next tokens
    for part, (address, old) in zip(parts, before, strict=True):
        assert part.data_ptr() == address
        assert torch.equal(part[[0, 2, 3]], old[[0, 2, 3]]) and not torch.equal(part[1], old[1])


def test_a_beam_search_copies_only_rows_of_beams_that_died() -> None:
    model = eager_model(101, with_prefix=False)
    session = DecodeSession(model, max_rows=4, max_tokens=40)
    rows: Any = session._rows.model
    copies: list[tuple[int, int]] = []
    copy_row = rows.copy_row
    rows.copy_row = lambda source, target: (copies.append((source, target)), copy_row(source, target))
    session.open([5, 6, 7], GenerationConfig(strategy=BeamSearch(num_beams=4), max_new_tokens=12))
    session.step()
    assert len(copies) <= 3 + 3
    steps = 0
    while not session.is_empty:
        copies.clear()
        session.step()
        steps += 1
        assert len(copies) <= 3
        assert {source for source, _ in copies}.isdisjoint(target for _, target in copies)
    assert steps > 4


def test_refusals_leave_the_session_as_it_was() -> None:
    session = DecodeSession(eager_model(101, with_prefix=False), max_rows=2, max_tokens=10)
    plain = GenerationConfig(max_new_tokens=5)
    with pytest.raises(GenerationError, match="needs 3 rows, and 2 are free"):
        session.open([5], GenerationConfig(strategy=BeamSearch(num_beams=3), max_new_tokens=5))
    with pytest.raises(GenerationError, match=r"the prompt has 6 tokens and may get 5 new ones.*room for 10 tokens"):
        session.open([6] * 6, plain)
    with pytest.raises(GenerationError, match="decode_text"):
        session.open([5], GenerationConfig(max_new_tokens=5, stop=("x",)))
    for scored, num_tokens, most in ((None, 2, 1), (0, 1, 0)):
        with pytest.raises(GenerationError, match=f"blocks hold {num_tokens} tokens; at most {most} tokens"):
            session.open([5, 6], plain, prompt_log_probs=scored, blocks=[torch.zeros(2, 2, 2, num_tokens, 8)])
    for options in ({"stop_token_ids": (101,)}, {"logit_bias": ((-1, 2.0),)}):
        with pytest.raises(GenerationError, match=r"contains id (101|-1), but the model has ids 0 to 100"):
            session.open([5], GenerationConfig(max_new_tokens=5, **options))
    assert session.is_empty and session.num_free_rows == 2
    (handle,) = session.open([5], plain)
    session.evict([handle, 77])
    assert session.num_free_rows == 2 and session.step() == []


class CountedHashes(tuple[tuple[int, float], ...]):
    """Biases that count how often they are hashed."""

    count = 0

    def __hash__(self) -> int:
        CountedHashes.count += 1
        return super().__hash__()


def test_options_are_not_hashed_at_every_step() -> None:
    """A request may bias a thousand tokens."""
    session = DecodeSession(eager_model(101, with_prefix=False), max_rows=1, max_tokens=MAX_TOKENS)
    session.open([5], GenerationConfig(max_new_tokens=9, ignore_eos=True, logit_bias=CountedHashes(((9, 2.0),))))
    for _ in range(9):
        session.step()
    assert session.is_empty and CountedHashes.count == 1
