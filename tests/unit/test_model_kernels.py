"""The operators of our own in the model, by value against PyTorch's, and what happens where they cannot be had."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.kernels import compiled
from bloomlm.kernels.compiled import Operators, load_operators, operators
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.linear import Linear, linear
from bloomlm.model.plain_blocks import PlainBlocks
from bloomlm.model.quantized import quantize_rows
from tests.unit.test_kernels import LONG_CHUNKS, attention, attention_inputs, selected

load_operators()
needs_operators = pytest.mark.skipif(operators() is None, reason="there is no C++ compiler, or no AVX2")

LENGTHS = (9, 1, 17)


def use(monkeypatch: pytest.MonkeyPatch, loaded: Operators | None) -> None:
    monkeypatch.setattr(compiled, "_loaded", loaded)


class Counting:
    """An operator that counts its calls."""

    def __init__(self, operator: object) -> None:
        self.operator, self.calls = operator, 0

    def __call__(self, *arguments: Tensor) -> Tensor:
        self.calls += 1
        return self.operator(*arguments)  # type: ignore[operator,no-any-return]


class Counted(NamedTuple):
    """Operators that are in use."""

    product: Counting
    attend: Counting
    decode_block: Counting


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    loaded = operators()
    assert loaded is not None
    counted = Counted(*(Counting(getattr(loaded, name)) for name in Counted._fields))
    use(monkeypatch, replace(loaded, **counted._asdict(), causal=None, weight_gradient=None))
    return counted


@needs_operators
@pytest.mark.parametrize("num_rows", [1, 3, 16, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_without_gradients_are_those_of_our_operator(
    has_bias: bool, dtype: torch.dtype, num_rows: int, counted: Counted
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(37, 128, generator=generator)
    x = torch.randn(num_rows, 2, 128, generator=generator)[:, 1]
    bias = torch.randn(37, generator=generator)
    matrix, x, bias = matrix.to(dtype), x.to(dtype), bias.to(dtype)
    exact = F.linear(x.double(), matrix.double(), bias.double() if has_bias else None)
    with torch.no_grad():
        found = linear(x, matrix, bias if has_bias else None)
    assert counted.product.calls == 1
    assert found.dtype is dtype
    # rounded once: half of the distance of neighbouring numbers
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=2e-5)


@needs_operators
@pytest.mark.parametrize("num_rows", [3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_adds_gelu_in_the_product(dtype: torch.dtype, num_rows: int, counted: Counted) -> None:
    layer = Linear(32, 48).to(dtype)
    x = torch.randn(num_rows, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        found = layer.gelu(x)
    assert counted.product.calls == 1 and found.dtype is dtype
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(found.double(), F.gelu(exact, approximate="tanh"), rtol=rounding, atol=1e-5)


@needs_operators
def test_other_products_are_not(counted: Counted) -> None:
    x, weight = torch.randn(4, 32), torch.randn(8, 32)
    linear(x, weight.requires_grad_())  # autograd needs its own
    with torch.no_grad():
        linear(x.double(), weight.double())
        linear(x, torch.randn(32, 8).t())
        linear(torch.randn(4, 20), torch.randn(8, 20))  # rows that do not fill vectors
        linear(x[:0], weight)
        with torch.autocast("cpu", torch.bfloat16):
            linear(x, weight)
    assert counted.product.calls == 0


def model(**changes: object) -> BloomForCausalLM:
    config = {"vocab_size": 101, "hidden_size": 48, "n_layer": 3, "n_head": 3, "initializer_range": 0.2, **changes}
    made = BloomForCausalLM(BloomConfig(**config))  # type: ignore[arg-type]
    made.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bias" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    return made.eval()


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are not computed by their operator, but by those of their parts."""
    monkeypatch.setattr(PlainBlocks, "take", lambda *arguments: False)


def decoded(made: BloomForCausalLM, lengths: Sequence[int]) -> Tensor:
    """Logits [steps, B, V] of rows that do not lie side by side, after prompts of some lengths."""
    opened = made.open_rows(2 * len(lengths), 40)
    rows = [2 * i + 1 for i in range(len(lengths))][::-1]
    prompts = [[(7 * j + length) % 101 for j in range(length)] for length in lengths]
    with torch.inference_mode():
        steps = [opened.prefill(rows, prompts)]
        for i in range(6):
            steps.append(opened.decode_step(rows, torch.tensor([(11 * i + length) % 101 for length in lengths])))
    return torch.stack(steps)


@needs_operators
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize(("lengths", "size"), [(LENGTHS, 48), (range(1, 30), 576)], ids=["one thread", "all threads"])
def test_decoding_gives_what_the_library_gives(
    lengths: Sequence[int], size: int, post_norm: bool, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(
        hidden_size=size, initializer_range=1.4 / size**0.5, apply_residual_connection_post_layernorm=post_norm
    )
    found = decoded(made, lengths)
    assert counted.decode_block.calls == 6 * 3 and counted.attend.calls == 0
    use(monkeypatch, None)
    expected = decoded(made, lengths)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@needs_operators
@pytest.mark.usefixtures("divided")
def test_operators_of_its_parts_give_what_the_library_gives(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    found = decoded(made, LENGTHS)
    assert counted.attend.calls == 6 * 3 and counted.decode_block.calls == 0
    use(monkeypatch, None)
    torch.testing.assert_close(found, decoded(made, LENGTHS), rtol=0, atol=1e-5)


@needs_operators
def test_a_block_writes_what_its_modules_write(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = [model().open_rows(3, 20) for _ in range(2)]
    with torch.inference_mode():
        for rows in opened:
            rows.prefill([2, 0], [[1, 2, 3], [4]])
        opened[0].decode_step([0, 2], torch.tensor([5, 6]))
        monkeypatch.setattr(PlainBlocks, "take", lambda *arguments: False)
        opened[1].decode_step([0, 2], torch.tensor([5, 6]))
    assert counted.decode_block.calls == 3
    found, expected = (rows.cache for rows in opened)
    assert found.lengths == expected.lengths == [2, 0, 4]
    torch.testing.assert_close(found.tensor, expected.tensor, rtol=0, atol=1e-5)


@needs_operators
def test_prompts_of_one_token_have_the_logits_that_are_asked_for(counted: Counted) -> None:
    made, logits = model(), []
    for wanted in ([1, 1], [0, 1]):
        rows = made.open_rows(2, 20)
        with torch.inference_mode():
            rows.prefill([0, 1], [[1, 2, 3], [4]])
            logits.append(rows.prefill([0, 1], [[5], [6]], num_logits=wanted))
    assert counted.decode_block.calls == 2 * 3
    assert torch.equal(logits[1], logits[0][1:])


@needs_operators
def test_blocks_that_are_more_than_products_and_norms_are_left_to_their_modules(counted: Counted) -> None:
    seen: list[nn.Module] = []

    def see(module: nn.Module, *others: object) -> None:
        seen.append(module)

    hooked, adapted, quantised = model(), model(), model()
    hooked.transformer.h[1].mlp.register_forward_hook(see)
    apply_adapter(adapted, LoraConfig(r=2))
    layer = quantised.transformer.h[0].self_attention.dense
    codes, layer.weight_scale = quantize_rows(layer.weight.detach(), "dense")
    layer.weight = nn.Parameter(codes, requires_grad=False)
    for made in (hooked, adapted, quantised, model(hidden_size=24)):
        decoded(made, LENGTHS)
    assert counted.decode_block.calls == 0
    assert seen == [hooked.transformer.h[1].mlp] * 7


@needs_operators
def test_prefix_tokens_are_attended_to(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    apply_adapter(made, PrefixConfig(num_prefix_tokens=4), torch.Generator().manual_seed(3))
    found = decoded(made, LENGTHS)
    assert counted.decode_block.calls == 6 * 3
    use(monkeypatch, None)
    torch.testing.assert_close(found, decoded(made, LENGTHS), rtol=0, atol=1e-5)


@needs_operators
def test_a_row_has_the_logits_that_it_has_alone() -> None:
    made = model()
    together = decoded(made, LENGTHS)
    for i, length in enumerate(LENGTHS):
        torch.testing.assert_close(together[1:, i], decoded(made, [length])[1:, 0], rtol=0, atol=1e-5)


@needs_operators
def test_bfloat16_is_decoded_by_our_operators(counted: Counted) -> None:
    found = decoded(model().bfloat16(), LENGTHS)
    assert counted.product.calls > 0
    assert counted.decode_block.calls == 6 * 3
    torch.testing.assert_close(found.float(), decoded(model().bfloat16().float(), LENGTHS), rtol=0, atol=0.1)


@pytest.mark.parametrize("problem", ["missing compiler", "failing compiler", "no room for the library"])
def test_without_a_library_one_line_says_why(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, None)
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path))
    expected = "No such file"
    if problem == "missing compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
        expected = "no C++ compiler 'no-such-compiler' was found; install g++, or set CXX"
    elif problem == "failing compiler":
        compiler = tmp_path / "compiler"
        compiler.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'x.cpp:1: error: too old' >&2; exit 1; }\n")
        compiler.chmod(0o700)
        monkeypatch.setenv("CXX", str(compiler))
        expected = f"{compiler} fails: x.cpp:1: error: too old"
    else:
        compiler = tmp_path / "compiler"
        compiler.write_text("#!/bin/sh\nexit 0\n")
        compiler.chmod(0o700)
        monkeypatch.setenv("CXX", str(compiler))
        (tmp_path / "kernels").write_text("a file")
        expected = "File exists"
    with caplog.at_level(logging.WARNING):
        load_operators.__wrapped__()
    assert operators() is None
    (message,) = caplog.messages
    assert "PyTorch's operators are used, which are slower" in message
    assert expected in message


@needs_operators
def test_a_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("it was compiled again")

    monkeypatch.setattr(compiled, "_compile", refuse)
    assert compiled._library().exists()


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_reads_keys_and_values_of_both_precisions(dtype: torch.dtype) -> None:
    loaded = operators()
    assert loaded is not None
    for given in attention_inputs(*LONG_CHUNKS, 300):
        query, keys, values, *others = given
        keys, values = keys.to(dtype), values.to(dtype)
        found = loaded.attend(*selected(query, keys, values, *others))
        expected = attention(query, keys.float(), values.float(), *others)
        torch.testing.assert_close(list(found.double()), expected, rtol=1e-5, atol=1e-6)
