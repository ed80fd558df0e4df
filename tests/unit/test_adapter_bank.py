"""Named adapters: beside rows with other adapters, every row has the logits of the model with its adapter alone."""

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import LayerNorm

from bloomlm.adapters.bank import AdapterBank
from bloomlm.adapters.base import Adapter, AdapterModule, apply_adapter, set_parameter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.adapters.load import load_adapter, load_named_adapter
from bloomlm.checkpoint.reader import load_model
from bloomlm.errors import AdapterError
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.generate import generate
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.quantized import INT8
from tests.tiny_bloom import write_adapters
from tests.tiny_checkpoint import TINY, random_model

ADAPTERS: dict[str, Adapter] = {
    "lora": LoraConfig(r=3),
    "all": LoraConfig(
        r=2,
        target_modules=BLOCK_LINEARS,
        use_rslora=True,
        rank_pattern={"dense": 5},
        alpha_pattern={r"h\.1\.mlp\.dense_h_to_4h": 7.0},
    ),
    "dora": DoraConfig(r=4, target_modules=BLOCK_LINEARS),
    "dora of one layer": DoraConfig(r=1, target_modules=("dense_4h_to_h",)),
    "rows": LoraConfig(r=2, trained_tokens=(100, 5, 47, 20, 9, 41)),
    "other rows": LoraConfig(r=1, target_modules=("dense",), trained_tokens=(5, 6, 7, 8)),
    "prefix": PrefixConfig(num_prefix_tokens=5),
    "projected prefix": PrefixConfig(num_prefix_tokens=3, prefix_projection=True),
    "biases": LoraConfig(
        r=2,
        replaced_names=(
            "transformer.word_embeddings_layernorm.bias",
            "transformer.h.0.input_layernorm.bias",
            "transformer.h.0.self_attention.query_key_value.bias",
            "transformer.h.1.self_attention.dense.bias",
            "transformer.h.1.post_attention_layernorm.bias",
            "transformer.h.1.mlp.dense_4h_to_h.bias",
            "transformer.ln_f.bias",
        ),
    ),
}
NUM_ROWS, MAX_TOKENS = 6, 60
Models = dict[str | None, BloomForCausalLM]


@pytest.fixture(scope="module")
def paths(base: Path) -> dict[str, Path]:
    return write_adapters(base, ADAPTERS)


def models_alone(base: Path, paths: dict[str, Path], **options: Any) -> Models:
    """The base model, and for each adapter a model with this one only."""
    models: Models = {None: load_model(base, **options).eval()}
    for name, path in paths.items():
        model = load_model(base, **options)
        load_adapter(model, path)
        models[name] = model.eval()
    return models


def model_of_all(base: Path, paths: dict[str, Path], **options: Any) -> BloomForCausalLM:
    """One model with all the adapters."""
    model = load_model(base, **options).eval()
    bank = AdapterBank(model)
    for name, path in paths.items():
        load_named_adapter(bank, name, path)
    return model


class MixedRows:
    """Rows of one model that are read in chunks and continued at random, each compared with its model alone."""

    def __init__(self, model: BloomForCausalLM, alone: Models, draw: random.Random) -> None:
        self.rows = model.open_rows(NUM_ROWS, MAX_TOKENS)
        self.alone, self.draw = alone, draw
        self.errors: list[float] = []
        self.names: dict[int, str | None] = {}
        self.texts: dict[int, list[int]] = {}
        self.num_read: dict[int, int] = {}

    def arrive(self) -> None:
        for row in set(range(NUM_ROWS)) - set(self.names):
            if self.draw.random() < 0.7:
                self.names[row] = self.draw.choice(list(self.alone))
                self.texts[row] = [self.draw.randrange(TINY.vocab_size) for _ in range(self.draw.choice((1, 5, 40)))]
                self.num_read[row] = 0
                self.rows.set_adapter(row, self.names[row])

    def read(self) -> None:
        """Read a part of some rows' texts."""
        rows = [row for row in self.names if self.num_read[row] < len(self.texts[row]) and self.draw.random() < 0.8]
        self.draw.shuffle(rows)
        if not rows:
            return
        chunks = []
        for row in rows:
            start = self.num_read[row]
            chunks.append(self.texts[row][start : start + self.draw.randint(1, len(self.texts[row]) - start)])
        counts = [self.draw.randint(0, len(chunk)) for chunk in chunks]
        counts[0] = counts[0] or 1
        logits = self.rows.prefill(rows, chunks, num_logits=counts)
        for row, chunk in zip(rows, chunks, strict=True):
            self.num_read[row] += len(chunk)
        self.compare(rows, counts, logits)

    def step(self) -> None:
        """Continue the rows that are read, with any token."""
        rows = [row for row in self.names if self.num_read[row] == len(self.texts[row]) < MAX_TOKENS]
        if not rows:
            return
        self.draw.shuffle(rows)
        tokens = [self.draw.randrange(TINY.vocab_size) for _ in rows]
        logits = self.rows.decode_step(rows, torch.tensor(tokens))
        for row, token in zip(rows, tokens, strict=True):
            self.texts[row].append(token)
            self.num_read[row] += 1
        self.compare(rows, [1] * len(rows), logits)

    def leave(self) -> None:
        for row in list(self.names):
            if self.draw.random() < 0.15:
                self.rows.free(row)
                del self.names[row]

    def copy(self) -> None:
        """Let a free row go on from where another one is."""
        free = sorted(set(range(NUM_ROWS)) - set(self.names))
        sources = [row for row in self.names if self.num_read[row]]
        if free and sources and self.draw.random() < 0.3:
            source, target = self.draw.choice(sources), free[0]
            self.rows.copy_row(source, target)
            self.names[target], self.num_read[target] = self.names[source], self.num_read[source]
            self.texts[target] = list(self.texts[source])

    def compare(self, rows: list[int], counts: list[int], logits: Tensor) -> None:
        for row, count, found in zip(rows, counts, logits.split(counts), strict=True):
            if count:
                text = torch.tensor([self.texts[row][: self.num_read[row]]])
                self.errors.append(relative_error(found, self.alone[self.names[row]](text)[0, -count:]))


def mixed_errors(model: BloomForCausalLM, alone: Models, seed: int) -> list[float]:
    """The relative errors of the logits of every row and step."""
    with torch.inference_mode():
        mixed = MixedRows(model, alone, random.Random(seed))
        for _ in range(12):
            mixed.arrive()
            mixed.read()
            mixed.copy()
            mixed.step()
            mixed.leave()
    return mixed.errors


@torch.inference_mode()
def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def alone(base: Path, paths: dict[str, Path]) -> Models:
    return models_alone(base, paths)


@pytest.fixture(scope="module")
def together(base: Path, paths: dict[str, Path]) -> BloomForCausalLM:
    return model_of_all(base, paths)


def test_the_adapters_differ(alone: Models) -> None:
    text = torch.tensor([[100, 5, 8, 47, 30]])
    logits = [model(text)[0, -1] for model in alone.values()]
    errors = [relative_error(one, other) for one, other in itertools.combinations(logits, 2)]
    assert len(errors) == 45 and min(errors) > 0.01


@pytest.mark.parametrize("seed", range(4))
def test_rows_have_the_logits_of_their_adapter_alone(together: BloomForCausalLM, alone: Models, seed: int) -> None:
    errors = mixed_errors(together, alone, seed)
    assert len(errors) > 40 and max(errors) < 1e-5


@pytest.mark.parametrize(
    ("options", "bound"),
    [({"quantization": INT8}, 1e-5), ({"dtype": torch.bfloat16}, 0.06), ({"dtype": torch.float16}, 0.01)],
    ids=["int8", "bf16", "fp16"],
)
def test_precisions(base: Path, paths: dict[str, Path], options: dict[str, Any], bound: float) -> None:
    chosen = {name: path for name, path in paths.items() if "prefix" not in name or "quantization" not in options}
    alone = models_alone(base, chosen, **options)
    errors = mixed_errors(model_of_all(base, chosen, **options), alone, seed=7)
    assert len(errors) > 40 and max(errors) < bound


def test_greedy_tokens_are_those_of_the_adapter_alone(together: BloomForCausalLM, alone: Models) -> None:
    prompts = {name: [5, 9, 40 + place] for place, name in enumerate(alone)}
    rows = together.open_rows(len(prompts), 30)
    for row, name in enumerate(prompts):
        rows.set_adapter(row, name)
    everywhere = list(range(len(prompts)))
    with torch.inference_mode():
        logits = rows.prefill(everywhere, list(prompts.values()))
        tokens = [logits.argmax(-1)]
        while len(tokens) < 12:
            tokens.append(rows.decode_step(everywhere, tokens[-1]).argmax(-1))
    config = GenerationConfig(max_new_tokens=12)
    for name, found in zip(prompts, torch.stack(tokens, 1).tolist(), strict=True):
        (expected,) = generate(alone[name], [prompts[name]], config)
        assert found[: len(expected.tokens)] == expected.tokens, name


def test_loading_and_unloading_disturb_no_other_row(base: Path, paths: dict[str, Path], alone: Models) -> None:
    model = load_model(base).eval()
    bank = AdapterBank(model)
    load_named_adapter(bank, "all", paths["all"])
    rows = model.open_rows(3, 30)
    texts: dict[int, tuple[str | None, list[int]]] = {0: ("all", [3, 1, 4]), 1: (None, [1, 5]), 2: ("x", [9, 2, 6])}
    kinds = ["dora", "biases", "rows", "projected prefix", "lora"]

    def compare(chosen: list[int], logits: Tensor, x_is: str) -> None:
        for row, found in zip(chosen, logits, strict=True):
            name, text = texts[row]
            expected = alone[x_is if name == "x" else name](torch.tensor([text]))[0, -1]
            assert relative_error(found, expected) < 1e-5, (row, x_is)

    with torch.inference_mode():
        rows.set_adapter(0, "all")
        compare([0, 1], rows.prefill([0, 1], [texts[0][1], texts[1][1]]), "")
        for kind in kinds:
            load_named_adapter(bank, "x", paths[kind])
            assert bank.names == ["all", "x"] and bank.adapter("x").describe() == ADAPTERS[kind].describe()
            rows.set_adapter(2, "x")
            texts[2] = "x", [9, 2, 6]
            compare([2], rows.prefill([2], [texts[2][1]]), kind)
            for row in range(3):
                texts[row][1].append(7 + row)
            compare([2, 0, 1], rows.decode_step([2, 0, 1], torch.tensor([9, 7, 8])), kind)
            rows.free(2)
            bank.unload("x")
            for row in range(2):
                texts[row][1].append(row)
            compare([0, 1], rows.decode_step([0, 1], torch.tensor([0, 1])), "")
    assert bank.names == ["all"]


def test_the_base_model_and_its_parameters_stay_as_they_were(together: BloomForCausalLM, alone: Models) -> None:
    plain = alone[None]
    assert [name for name, _ in together.named_parameters()] == [name for name, _ in plain.named_parameters()]
    text = torch.tensor([[5, 9, 40]])
    with torch.inference_mode():
        assert torch.equal(together(text), plain(text))


def test_size_of_an_adapter(base: Path, paths: dict[str, Path]) -> None:
    bank = AdapterBank(load_model(base))
    load_named_adapter(bank, "lora", paths["lora"])
    load_named_adapter(bank, "prefix", paths["prefix"])
    assert bank.size_bytes("lora") == 4 * 2 * 3 * (32 + 96)
    assert bank.size_bytes("prefix") == 4 * 2 * 2 * 5 * 32
    assert bank.adapter("prefix").num_virtual_tokens == 5


def test_a_kind_that_the_bank_does_not_know_is_refused(base: Path) -> None:
    """It would otherwise be ignored: only the layers that the bank knows are asked for their updates."""

    class Unknown(LayerNorm, AdapterModule):
        config = LoraConfig(r=2)

    bank = AdapterBank(load_model(base))
    model = bank.base_model()
    model.transformer.ln_f = Unknown(model.config.hidden_size)
    with pytest.raises(AdapterError, match="the adapter 'new' is of the kind LoRA, which cannot be used beside others"):
        bank.load("new", model)


def test_mistakes_are_named(base: Path, paths: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(base)
    bank = AdapterBank(model, most_virtual=4)
    load_named_adapter(bank, "one", paths["lora"])
    rows = model.open_rows(1, 8)
    with pytest.raises(AdapterError, match="no adapter 'two'; the loaded ones are one"):
        rows.set_adapter(0, "two")
    with pytest.raises(AdapterError, match="no adapter 'two'"):
        bank.unload("two")
    with pytest.raises(AdapterError, match="an adapter 'one' already; unload it first"):
        load_named_adapter(bank, "one", paths["dora"])
    with pytest.raises(AdapterError, match="has 5 virtual tokens; there is room for 4"):
        load_named_adapter(bank, "long", paths["prefix"])
    other = random_model(dataclasses.replace(TINY, hidden_size=64))
    with pytest.raises(AdapterError):
        load_named_adapter(AdapterBank(other), "one", paths["lora"])
    adapted = load_model(base)
    load_adapter(adapted, paths["lora"])
    with pytest.raises(AdapterError, match=r"has an adapter already .*LoRA of rank 3"):
        AdapterBank(adapted)
    with pytest.raises(AdapterError, match="shares no weights with the bank's base model"):
        bank.load("foreign", adapted)
    with pytest.raises(AdapterError, match="the model for 'none' has no adapter"):
        bank.load("none", bank.base_model())
    replacing = bank.base_model()
    weight = "transformer.h.0.mlp.dense_4h_to_h.weight"
    apply_adapter(replacing, LoraConfig(r=1, replaced_names=(weight,)))
    set_parameter(replacing, weight, torch.zeros(32, 128), requires_grad=False)
    with pytest.raises(AdapterError, match=f"'replacing' replaces {weight}"):
        bank.load("replacing", replacing)
    assert bank.names == ["one"]
