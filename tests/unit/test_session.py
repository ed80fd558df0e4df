"""DecodeSession: whatever arrives and leaves beside it, a sequence has the tokens that it has alone."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import load
from bloomlm.errors import GenerationError
from bloomlm.export.program import export_program
from bloomlm.generation.config import BeamSearch, GenerationConfig, Greedy, Sampling
from bloomlm.generation.generate import generate
from bloomlm.generation.language_model import LanguageModel
from bloomlm.generation.session import DecodeSession, Event
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.runtime import Program

MAX_ROWS, MAX_TOKENS = 6, 40
STRATEGIES = (
    Greedy(),
    Greedy(),
    Sampling(seed=3),
    Sampling(seed=9, top_k=20, top_p=0.9, temperature=1.5),
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
    )


class Request:
    """A prompt, and what comes of it."""

    def __init__(self, draw: random.Random, vocab_size: int, number: int) -> None:
        self.prompt = [draw.randrange(4, vocab_size) for _ in range(draw.choice((1, 2, 5, 9, 20)))]
        self.config = random_config(draw)
        self.number = number
        self.handles: list[int] = []
        self.events: dict[int, list[Event]] = {}
        self.steps_left = draw.choice((3, 1000, 1000))
        """Steps after which it is cancelled."""


def run(model: LanguageModel, requests: list[Request], draw: random.Random) -> None:
    """Let requests arrive at random, several at once, and leave by themselves or cancelled."""
    session = DecodeSession(model, max_rows=MAX_ROWS, max_tokens=MAX_TOKENS, decode_text=text_of)
    owners: dict[int, Request] = {}
    waiting = list(requests)
    while waiting or not session.is_empty:
        arriving: list[Request] = []
        while waiting and draw.random() < 0.6:
            if sum(r.config.num_rows for r in [*arriving, waiting[0]]) > session.num_free_rows:
                break
            arriving.append(waiting.pop(0))
        for request in arriving:
            request.handles = session.admit([request.prompt], [request.config], first_sequence=request.number)
            owners |= dict.fromkeys(request.handles, request)
        for event in session.step():
            owners[event.handle].events.setdefault(event.handle, []).append(event)
        for request in {id(owner): owner for owner in owners.values()}.values():
            request.steps_left -= 1
            if request.steps_left == 0:
                session.evict(request.handles)
    assert session.num_free_rows == MAX_ROWS


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
            num_tokens += len(tokens)
    assert num_whole > 10 and num_tokens > 60


def test_prompts_admitted_together_are_read_in_one_pass() -> None:
    model = eager_model(101, with_prefix=False)
    sizes: list[int] = []
    model.transformer.h[0].register_forward_hook(lambda _, __, out: sizes.append(len(out)))
    session = DecodeSession(model, max_rows=4, max_tokens=20)
    samples = GenerationConfig(strategy=Sampling(), num_return_sequences=2, max_new_tokens=3, min_new_tokens=3)
    session.admit([[5, 6, 7], [8]], [samples, samples])
    assert sizes == [4]
    assert len(session.step()) == 4 and sizes == [4]  # the first tokens need no more than the prompts
    session.step()
    assert sizes == [4, 4]  # and a token that ends a sequence is never read
    session.step()
    assert session.is_empty and sizes == [4, 4, 4] and session.step() == []


def test_neither_admission_nor_leaving_touches_other_rows(model: LanguageModel) -> None:
    session = DecodeSession(model, max_rows=4, max_tokens=20)
    plain = GenerationConfig(max_new_tokens=9, min_new_tokens=9)
    rows: Any = session._rows
    parts: list[Tensor] = (
        rows.cache if isinstance(rows.cache, list) else list(rows.cache.keys) + list(rows.cache.values)
    )
    with torch.inference_mode():
        for part in parts:
            part[3] = 0.0  # a row that is not used may hold NaN, which equals nothing
    _, second, _ = session.admit([[5, 6, 7], [8], [9, 10]], [plain] * 3)
    session.step()
    before = [(part.data_ptr(), part.clone()) for part in parts]
    session.evict([second])
    session.admit([[11, 12, 13, 14]], [plain])
    for part, (address, old) in zip(parts, before, strict=True):
        assert part.data_ptr() == address
        assert torch.equal(part[[0, 2, 3]], old[[0, 2, 3]]) and not torch.equal(part[1], old[1])


def test_a_beam_search_copies_only_rows_of_beams_that_died() -> None:
    model = eager_model(101, with_prefix=False)
    session = DecodeSession(model, max_rows=4, max_tokens=40)
    rows: Any = session._rows
    copies: list[tuple[int, int]] = []
    copy_row = rows.copy_row
    rows.copy_row = lambda source, target: (copies.append((source, target)), copy_row(source, target))
    session.admit([[5, 6, 7]], [GenerationConfig(strategy=BeamSearch(num_beams=4), max_new_tokens=12)])
    assert len(copies) == 3
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
    with pytest.raises(GenerationError, match="need 3 rows, and this session has 2 free"):
        session.admit([[5]], [GenerationConfig(strategy=BeamSearch(num_beams=3), max_new_tokens=5)])
    with pytest.raises(GenerationError, match=r"prompt 1 has 6 tokens and may get 5 new ones.*room for 10 tokens"):
        session.admit([[5], [6] * 6], [plain, plain])
    with pytest.raises(GenerationError, match="decode_text"):
        session.admit([[5]], [GenerationConfig(max_new_tokens=5, stop=("x",))])
    assert session.is_empty and session.num_free_rows == 2
    (handle,) = session.admit([[5]], [plain])
    session.evict([handle, 77])
    assert session.num_free_rows == 2 and session.step() == []
